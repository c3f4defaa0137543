"""One page on what this machine can do: card, fast kernels, plan, a rehearsed step, a decoding graph. For a
person who rents a card, and to be pasted into a report. It leaves no file, and knows no recipe."""

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

# Where there is neither a model nor a GPU: the page then shows only that all parts run.
SMALL = {"num_hidden_layers": 2, "vocab_size": 8192}
SMALL_LENGTH = 32  # tokens of an example, at most
ROWS, EVAL_ROWS = 2000, 200  # of drawn examples, in place of the data sets
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, tie_word_embeddings, as published;
# all have 8 heads for keys and values, and heads of 128 dimensions.
SHAPES = {
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
    print("版本：" + "，".join(map(" ".join, versions.items())))
    disk = next(filter(Path.is_dir, Path(args.output_dir, "checkpoint").absolute().parents))
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(args)
        args.output_dir = folder  # Trainer makes it: not where the person's run would be
        model, tokenizer = find_model(args)
        if tokenizer and Path(args.train_file).is_file() and Path(args.val_file).is_file():
            train_dataset = load_dataset(args.train_file, tokenizer, args.max_length)
            eval_dataset = load_dataset(args.val_file, tokenizer, args.max_length)
        else:
            longest = args.max_length
            if args.device.type == "cpu":
                longest = min(longest, SMALL_LENGTH)
            train_dataset = draw(args.per_device_train_batch_size, longest, min(length, longest))
            eval_dataset = train_dataset.select(range(EVAL_ROWS))
        model = add_adapter(model, args) if add_adapter else model
        trainer = build_trainer(args, model, tokenizer, train_dataset, eval_dataset)
        verdicts = verdicts_of(trainer)
    print(trainer.describe_saving(disk, args.eval_steps))
    print("检查：")
    failed = []
    for name, verdict in verdicts.items():
        mark = "通过" if verdict.runs else "跳过"
        if verdict.expected and not verdict.runs:
            mark = "失败"
            failed.append(name)
        print(f"  {mark}  {name}（{verdict.why}）")
    print(f"结论：有问题：{'、'.join(failed)}" if failed else "结论：可以训练")
    if failed:
        raise SystemExit(1)


def find_model(args):
    """Return (model, its tokenizer): the one that is here, else (its shape with random weights, None). Raises
    SystemExit for a model that cannot be trained, or whose shape is not known."""
    name, revision = args.model_name, args.model_revision
    local = Path(name).is_dir()
    # Nothing is downloaded: a person wants to know first whether this card is worth the gigabytes.
    path = None if local or not hub.split(name) else weights.find_downloaded(name, revision)
    if local or path:
        path = weights.find_model(str(path or name), "", None if path else revision)
        print(f"模型：{path}")
        tokenizer = weights.load_tokenizer(path)
        encoding.require_thinking(tokenizer, name)
        weights.check_family(path, name, tokenizer)
        return weights.load_weights(path, args.device, args.load_in_4bit, args.fsdp, args.dtype), tokenizer
    if args.fsdp:
        remedy = "请先下载，或去掉 --fsdp"
        raise SystemExit(f"错误：--check 和 --fsdp 一起用时需要模型，而 {name} 还没有下载；{remedy}。")
    shrunk = args.device.type == "cpu"
    note = "，缩到 2 层" if shrunk else ""
    print(f"模型：{name} 还没有下载，用形状相同的随机权重代替{note}")
    config = shape_of(name, **SMALL if shrunk else {})
    weights.quiet_libraries()
    folder = str(Path(args.output_dir, "model"))
    # Through files, as 4-bit weights are made when a model is loaded; drawn on the device, which is faster.
    with args.device:
        transformers.AutoModelForCausalLM.from_config(config, dtype=args.dtype).save_pretrained(folder)
    return weights.load_weights(folder, args.device, args.load_in_4bit, dtype=args.dtype), None


def shape_of(name: str, **changes) -> transformers.Qwen3Config:
    """Return the configuration, as far as its size goes, of a model that is not here, with these `changes`.
    Raises SystemExit for one not known."""
    short = name.rpartition("/")[2].removesuffix("-Base")
    if short not in SHAPES:
        problem = f"{name} 还没有下载，也不知道它的形状（已知的有 {'、'.join(SHAPES)}）"
        raise SystemExit(f"错误：{problem}；请用 --model_name 指定本地文件夹。")
    hidden, inner, layers, heads, tied = SHAPES[short]
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    return transformers.Qwen3Config(**shape | {"tie_word_embeddings": tied} | changes)


def draw(batch_size: int, longest: int, length: int) -> datasets.Dataset:
    """Return examples of random ids: a step of the `longest`, then many of `length` tokens."""
    print(f"数据：{ROWS} 条随机样本，最长 {longest} 个 token")
    # Ids that are ordinary tokens in every vocabulary here, the shrunk one too.
    ids = torch.randint(100, 1000, (longest,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = [longest] * batch_size + [length] * ROWS
    examples = [{"input_ids": ids[:size], "labels": ids[:size]} for size in sizes]
    return datasets.Dataset.from_list(examples)


def verdicts_of(trainer) -> dict[str, Verdict]:
    """Return {name: verdict} of all that `trainer` has tried, and of what is tried only here."""
    args, chosen = trainer.args, trainer.kernels
    verdicts = {"打包的注意力 torch varlen": chosen.attention, "融合算子 Liger": chosen.layers}
    verdicts["优化器 Triton"] = chosen.step
    # A smaller plan may need it later; on a CPU its compilation would take minutes for nothing.
    if args.device.type == "cuda" or trainer.plan.optimizer.startswith("8bit"):
        verdicts["8 位优化器 torchao"] = kernels.try_step("8bit", args.device)
    verdicts |= kernels.require(trainer.model, args.load_in_4bit)
    # Last, as the trainer cannot go on afterwards: the graph needs the optimizer's memory.
    model = trainer.release()
    off = missing("不支持分片的模型") if args.fsdp else kernels.OFF
    usable = args.fast_kernels and not args.fsdp
    return verdicts | {"生成的 CUDA graph": generate.try_graph(model) if usable else off}
