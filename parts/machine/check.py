"""One page on what this machine can do: card, fast kernels, plan, a rehearsed step, a decoding graph. For a
person who rents a card, and to be pasted into a report. Writes no file; knows no recipe."""

import copy
import platform
import tempfile
from pathlib import Path

import datasets
import torch
import transformers

from parts import hub
from parts.machine import kernels
from parts.model import encoding, generate, weights
from parts.model.fused import Verdict, missing
from parts.training import environment

SMALL = {
    "num_hidden_layers": 2,
    "vocab_size": 8192,
}  # the model, and the tokens of an example at most, where there is
SMALL_LENGTH = 32  # neither a model nor a GPU
ROWS, EVAL_ROWS = 2000, 200  # of drawn examples, in place of the data sets
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "tie_word_embeddings",
)
SHAPES = {  # of each SIZES; heads of 128, 8 for keys
    "Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen3-14B": (5120, 17408, 40, 40, False),
    "Qwen3-32B": (5120, 25600, 64, 64, False),
}


def run(args, build_trainer, load_dataset, add_adapter, length: int) -> None:
    """Print the page. What is not here yet, model or data, is stood in for by random weights and by examples
    of `length` tokens, the longest of args.max_length. Raises SystemExit(1) when something that should run
    does not.

    The functions are the script's: (args, model, tokenizer, training set, validation set) -> trainer; (file,
    tokenizer, max_length) -> data set; (model, args) -> model with an adapter, or None.
    """
    print(f"显卡：{environment.describe_card(args.device)}")
    print(f"系统：{platform.platform()}，Python {platform.python_version()}")
    versions = environment.versions(environment.LIBRARIES)
    print("版本：" + "，".join(f"{name} {version}" for name, version in versions.items()))
    files = (args.train_file, args.val_file)
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(args)
        args.output_dir = folder  # which Trainer would make
        model, tokenizer = find_model(args)
        if tokenizer and all(Path(file).is_file() for file in files):
            train_dataset, eval_dataset = (load_dataset(file, tokenizer, args.max_length) for file in files)
        else:
            longest = min(args.max_length, SMALL_LENGTH) if args.device.type == "cpu" else args.max_length
            train_dataset = draw(args.per_device_train_batch_size, longest, min(length, longest))
            eval_dataset = train_dataset.select(range(EVAL_ROWS))
        model = add_adapter(model, args) if add_adapter else model
        trainer = build_trainer(args, model, tokenizer, train_dataset, eval_dataset)
        verdicts = verdicts_of(trainer)
    print("检查：")
    for name, verdict in verdicts.items():
        mark = "通过" if verdict.runs else "失败" if verdict.expected else "不用"
        print(f"  {mark}  {name}（{verdict.why}）")
    failed = [name for name, verdict in verdicts.items() if verdict.expected and not verdict.runs]
    print(f"结论：有问题：{'、'.join(failed)}" if failed else "结论：可以训练")
    if failed:
        raise SystemExit(1)


def find_model(args):
    """Return (model, its tokenizer or None): the one that is here, else its shape with random weights."""
    name, revision = args.model_name, args.model_revision
    local = Path(name).is_dir()
    path = None if local or not hub.split(name) else weights.find_downloaded(name, revision)
    if local or path:
        path = str(path or weights.find_model(name, "", revision))
        print(f"模型：{path}")
        tokenizer = weights.load_tokenizer(path)
        encoding.require_thinking(tokenizer, name)
        weights.check_family(path, name, tokenizer)
        return weights.load_weights(path, args.device, args.load_in_4bit, args.fsdp), tokenizer
    if args.fsdp:
        raise SystemExit(f"错误：--check 加 --fsdp 时要有模型，{name} 还没有下载；请先下载，或不加它。")
    small = args.device.type == "cpu"
    print(f"模型：{name} 的形状，随机的权重（还没有下载）{'，缩到 2 层，时间不能当真' if small else ''}")
    config = shape_of(name, **SMALL if small else {})
    weights.quiet_libraries()
    folder, dtype = str(Path(args.output_dir, "model")), weights.best_dtype(args.device)
    with args.device:  # into files, for the same way into 4 bits
        transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return weights.load_weights(folder, args.device, args.load_in_4bit), None


def shape_of(name: str, **changes) -> transformers.Qwen3Config:
    """Return the configuration, as far as its size goes, of a model that is not here. Raises SystemExit for
    one not known."""
    short = name.rpartition("/")[2].removesuffix("-Base")
    if short not in SHAPES:
        why = f"还没有下载 {name}，也不知道它的形状（知道 {'、'.join(SHAPES)}）"
        raise SystemExit(f"错误：{why}；请用 --model_name 指定本地文件夹。")
    shape = dict(zip(SIZES, SHAPES[short])) | {"num_key_value_heads": 8, "head_dim": 128}
    return transformers.Qwen3Config(**shape | changes)


def draw(batch_size: int, longest: int, length: int) -> datasets.Dataset:
    """Return examples of random ids: a step of the `longest`, then many of `length` tokens."""
    print(f"数据：{ROWS} 条随机的样本，最长 {longest} 个 token")
    ids = torch.randint(100, 1000, (longest,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = [longest] * batch_size + [length] * ROWS
    return datasets.Dataset.from_list([{"input_ids": ids[:size], "labels": ids[:size]} for size in sizes])


def verdicts_of(trainer) -> dict[str, Verdict]:
    """Return all that was tried, and what else is tried only here."""
    args, chosen = trainer.args, trainer.kernels
    verdicts = {"打包的注意力 torch varlen": chosen.attention, "融合算子 Liger": chosen.layers}
    verdicts["优化器 Triton"] = chosen.step
    if args.device.type == "cuda" or trainer.plan.optimizer.startswith("8bit"):
        verdicts["8 位优化器 torchao"] = kernels.try_step("8bit", args.device)
    verdicts |= kernels.require(trainer.model, args.load_in_4bit)
    model = trainer.release()
    verdicts["生成的 CUDA graph"] = missing("分片的模型不用它") if args.fsdp else generate.try_graph(model)
    return verdicts
