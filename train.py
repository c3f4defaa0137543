"""Full-parameter fine-tuning of Qwen3-1.7B into a Chinese medical chat model that thinks before it answers.

    python train.py                                   # fetches what is missing; run again, it continues
    python train.py --model_name Qwen/Qwen3-0.6B      # a small card
    python train.py --learning_rate 5e-5 --output_dir output/lr5e-5       # any flag of transformers' Trainer
    torchrun --nproc_per_node 2 train.py --gradient_accumulation_steps 2  # two GPUs, still 4 examples a step

The best weights end up in the output folder itself; `python inference.py` finds them there.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import psutil
import torch
import transformers

import data
import inference

# ---- the recipe: the published one, and what keeps its best weights -----------------------------------------------

LEARNING_RATE = 1e-4  # linear to 0, no warm-up
NUM_EPOCHS = 2
BATCH_SIZE = 1  # examples at once on a device
ACCUMULATION_STEPS = 4  # x BATCH_SIZE x devices = 4 examples a step, about 3,150 tokens
EVAL_STEPS = 100  # optimizer steps between evaluations; a checkpoint is written at each
EVAL_TOKENS = 8192  # of whole examples in one evaluation batch, which keeps neither activations nor logits
LOSS_BYTES = 500_000_000  # of logits and their gradient at any time; all at once are 14 bytes x vocabulary a token
PATIENCE = 3  # evaluations without a better eval_loss before training stops; 0: never stop early
KEPT_CHECKPOINTS = 2  # the best and the newest
LOGGING_STEPS = 10
SAMPLES = 3  # validation questions answered at the end
SAMPLE_TOKENS = 1024  # at most, for each of these replies
PROJECT = "qwen3-sft-medical"  # in SwanLab

OUT_OF_MEMORY = (
    "错误：显存（内存）不足。请依次尝试：--per_device_train_batch_size 1；--max_length 1024；python train_lora.py；"
    "--model_name Qwen/Qwen3-0.6B。同一命令会从最近的检查点继续。"
)

MODEL_CARD = """\
---
base_model: {base}
language: zh
pipeline_tag: text-generation
---

# {name}

由 {base} 微调的中文医学对话模型：先在 `<think>…</think>` 里思考，再回答。

**它不是医生。** 回复可能有错，不能用于诊断和治疗；身体不适请就医，紧急情况请拨打 120。

| 训练 | |
| --- | --- |
{rows}

![损失曲线](loss.png)

对话模板在分词器里（apply_chat_template）；训练用的系统提示词：

> {system_prompt}
"""


@dataclass
class TrainArguments(transformers.TrainingArguments):
    """transformers.TrainingArguments with this recipe's defaults, and what it does not have."""

    model_name: str = field(default=data.MODEL_NAME, metadata={"help": "ModelScope id or local folder"})
    train_file: str = field(default=data.TRAIN_FILE, metadata={"help": "written by data.py"})
    val_file: str = field(default=data.VAL_FILE, metadata={"help": "written by data.py"})
    max_length: int = field(default=data.MAX_LENGTH, metadata={"help": "tokens; longer examples are left out"})
    early_stopping_patience: int = field(default=PATIENCE, metadata={"help": "evaluations; 0: never stop early"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "delete the finished run that is there"})
    kahan: bool = field(default=True, metadata={"help": "AdamW that keeps small updates; with bfloat16 weights only"})
    full_logits: bool = field(default=False, metadata={"help": "transformers' own loss, to compare with"})
    sample_tokens: int = field(default=SAMPLE_TOKENS, metadata={"help": "most tokens of each reply at the end"})

    output_dir: str | None = data.OUTPUT_DIR
    learning_rate: float = LEARNING_RATE
    num_train_epochs: float = NUM_EPOCHS
    per_device_train_batch_size: int = BATCH_SIZE
    gradient_accumulation_steps: int = ACCUMULATION_STEPS
    gradient_checkpointing: bool | None = True
    eval_strategy: str = "steps"
    eval_steps: float | None = EVAL_STEPS
    save_strategy: str | None = None  # as eval_strategy, and
    save_steps: float | None = None  # as eval_steps: each evaluated state is kept until a better or newer one comes
    save_total_limit: int | None = KEPT_CHECKPOINTS
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "eval_loss"
    greater_is_better: bool | None = False
    restore_callback_states_from_checkpoint: bool = True  # the early-stopping count
    logging_steps: float = LOGGING_STEPS
    report_to: None | str | list[str] = "swanlab"
    seed: int = data.SEED
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    ddp_find_unused_parameters: bool | None = False
    ddp_timeout: int = 7200  # seconds; the other processes wait while rank 0 downloads

    def __post_init__(self):
        self.check_numbers()
        if self.eval_strategy == "no":  # then there is no best
            self.load_best_model_at_end, self.early_stopping_patience = False, 0
        self.save_strategy = self.save_strategy or ("steps" if self.eval_strategy == "no" else self.eval_strategy)
        self.save_steps = (self.eval_steps or EVAL_STEPS) if self.save_steps is None else self.save_steps
        self.run_name = self.run_name or Path(self.output_dir).name
        if getattr(self, "activation_checkpointing", True) is None:  # its name from transformers 5.23 on
            self.activation_checkpointing = self.gradient_checkpointing
        # Without torchrun Trainer would spread one process over all GPUs with DataParallel, slower than one of them.
        if "LOCAL_RANK" not in os.environ:
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
        # Without this, processes that torchrun starts on a machine without GPUs would not find each other.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type == "cuda"

    def check_numbers(self):
        """Raises ValueError for numbers with which training would fail late, or do nothing."""
        above_0 = ("max_length", "sample_tokens", "per_device_train_batch_size", "gradient_accumulation_steps")
        above_0 += ("num_train_epochs", "learning_rate", "max_steps", "lora_rank", "lora_alpha")
        for name in (*above_0, "early_stopping_patience", "seed"):
            value = getattr(self, name, 1)
            if value < 0 or value == 0 and name in above_0:
                if (name, value) != ("max_steps", -1):  # Trainer's "not set"
                    raise ValueError(
                        f"--{name} {value}：要一个{'大于 0 的数' if name in above_0 else '不小于 0 的整数'}"
                    )
        if not self.output_dir:
            raise ValueError("--output_dir 是空的")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the description as it is written."""


class ArgumentParser(transformers.HfArgumentParser):
    """Leaves at once after --help or a wrong flag: taking the imported libraries down takes another second."""

    def exit(self, status: int = 0, message: str | None = None):
        print(message or "", end="", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(status)


def parse_args(arguments_class: type[TrainArguments], description: str) -> TrainArguments:
    """The command line as `arguments_class`. An unknown flag or a value that does not fit ends with one sentence."""
    parser = ArgumentParser(
        arguments_class,
        description=description,
        usage="%(prog)s [--flag value ...]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    inherited = {field.name: field.metadata.get("help") for field in fields(transformers.TrainingArguments)}
    for action in parser._actions:  # a field that is declared again has lost its help
        action.help = action.help or inherited.get(action.dest)
    values = vars(parser.parse_args())
    try:
        return arguments_class(**values)
    except ValueError as error:
        parser.error(str(error))


# ---- data ---------------------------------------------------------------------------------------------------------


def prepare_files(args: TrainArguments) -> None:
    """Make the default data files when neither is there; other files have to be there."""
    files = (args.train_file, args.val_file)
    missing = [file for file in files if not Path(file).is_file()]
    if len(missing) == 2 and files == (data.TRAIN_FILE, data.VAL_FILE):
        data.prepare()
    elif missing:
        raise SystemExit(
            f"错误：找不到 {'、'.join(missing)}；请先运行 python data.py --dataset <数据> "
            f"--train_file {args.train_file} --val_file {args.val_file}"
        )


def load_dataset(path: str, tokenizer, max_length: int):
    """(datasets.Dataset with input_ids and labels, lengths in tokens of all examples). Too long ones are left out
    rather than cut: a cut would lose the answer, which comes last."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(data.read_examples(path))
    encoded = rows.map(
        lambda row: data.encode_example(tokenizer, row),
        remove_columns=rows.column_names,
        new_fingerprint="encoded",  # else datasets hashes the whole tokenizer: 4 s, for a cache that is not used here
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    fitting = encoded.select([i for i, length in enumerate(lengths) if length <= max_length])
    if not len(fitting):
        raise SystemExit(
            f"错误：{path} 的样本都超过 {max_length} 个 token（最短 {min(lengths)}）；请加大 --max_length。"
        )
    return fitting, lengths


def describe_tokens(path: str, lengths: list[int], max_length: int) -> str:
    """Lengths in tokens, and how many examples were left out for theirs."""
    mean, p50, p95 = sum(lengths) / len(lengths), *(sorted(lengths)[int(len(lengths) * q)] for q in (0.5, 0.95))
    over = sum(length > max_length for length in lengths)
    return (
        f"{path}：{len(lengths)} 条，token 数平均 {mean:.0f}，p50 {p50}，p95 {p95}，最长 {max(lengths)}；"
        f"超过 --max_length {max_length} 而未采用的 {over} 条"
    )


def describe_example(tokenizer, example: dict[str, list[int]]) -> str:
    """One example as the model sees it: the prompt, and the supervised part."""
    prompt = sum(label == data.IGNORE_INDEX for label in example["labels"])
    parts = example["input_ids"][:prompt], example["input_ids"][prompt:]
    texts = (data.shorten(tokenizer.decode(part).replace("\n", "⏎"), 300) for part in parts)
    return "示例（⏎ 为换行）\n  提示（不计损失）：{}\n  监督部分：{}".format(*texts)


# ---- tracking -----------------------------------------------------------------------------------------------------


def library_versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "modelscope", "swanlab")
    return {name: importlib.metadata.version(name) for name in names}


def start_tracking(args: TrainArguments) -> None:
    """Begin the SwanLab run that Trainer's own callback then writes to. Only rank 0 does.

    SWANLAB_MODE is obeyed. Without it: online with a key or an earlier login, else local. No prompt blocks a run.
    """
    if "swanlab" not in args.report_to or args.process_index:
        return
    # SwanLab >= 0.8 reads SWANLAB_PROJECT as JSON settings and raises; older tutorials set it to a name.
    project = os.environ.pop("SWANLAB_PROJECT", None) or PROJECT
    import swanlab

    config = {"model_name": args.model_name, "max_length": args.max_length, "versions": library_versions()}
    try:
        logged_in = swanlab.Settings().api_key
        mode = os.environ.get("SWANLAB_MODE") or ("online" if logged_in else "local")
        if mode in ("online", "cloud") and not logged_in and not sys.stdin.isatty():
            raise ValueError("SWANLAB_MODE=online 需要先登录：swanlab login")
        swanlab.init(project=project, name=args.run_name, mode=mode, config=config)
    except Exception as error:  # a wrong key, mode or project name, a folder without permission, no network
        cause = data.shorten(str(error), 200)
        raise SystemExit(
            f"错误：SwanLab 无法开始（{cause}）；请改正，或设 SWANLAB_MODE=local，或加 --report_to none。"
        ) from None
    if mode == "local":
        print("SwanLab：只记录在本地。查看：swanlab watch swanlog；要在网上查看：先运行 swanlab login，再训练。")


def log_samples(args: TrainArguments, samples: list[str]) -> None:
    """The replies as text in the SwanLab run, and the end of that run."""
    if "swanlab" in args.report_to and not args.process_index:
        import swanlab

        swanlab.log({"Prediction": [swanlab.Text(sample) for sample in samples]})
        swanlab.finish()


# ---- loss ---------------------------------------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of an output layer that never holds all its logits, with their gradients made on the way.

    hidden [N, H], weight [V, H], labels [N] -> (sum of the losses, the losses [N]), both float32. Only the sum can be
    differentiated. Row chunks of LOSS_BYTES: full logits would take 6.8 GB at 3,200 tokens and Qwen3's vocabulary,
    and working them out once more in the backward pass would cost 6 % of a training step's FLOPs.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        losses = torch.empty(len(labels), device=hidden.device, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # frozen under LoRA
        rows = max(1, LOSS_BYTES // (len(weight) * (4 + weight.element_size())))
        for part in (slice(start, start + rows) for start in range(0, len(labels), rows)):
            logits = (hidden[part] @ weight.T).float()
            log_total = logits.logsumexp(dim=-1, keepdim=True)
            losses[part] = (log_total - logits.gather(1, labels[part, None])).squeeze(1)
            if grad_hidden is None:
                continue
            grad = logits.sub_(log_total).exp_()  # the softmax, in the logits' place
            grad.scatter_add_(1, labels[part, None], -torch.ones_like(log_total))
            grad = grad.to(weight.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[part].to(grad.dtype))  # under autocast they differ
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        return *(grad if grad is None else grad.mul_(grad_sum) for grad in ctx.saved_tensors), None


# ---- training -----------------------------------------------------------------------------------------------------


class MedicalTrainer(transformers.Trainer):
    """Trainer whose loss needs no logits, whose evaluation loss does not depend on the batch, and that logs tokens
    per second and peak memory beside the training loss."""

    window_start: float | None = None  # of the steps since the last log; evaluations and saving come after a log
    window_tokens = 0
    last_hidden: torch.Tensor | None = None  # [B, T, H] of the forward pass under way

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.get_decoder().register_forward_hook(self.keep_hidden)

    def keep_hidden(self, module, args, output) -> None:
        self.last_hidden = output.last_hidden_state

    def supervised_losses(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum, losses [N], where [B, T-1] the N supervised tokens stand). `model` is asked for no logits at all, but
        is called as a whole, so that DistributedDataParallel sees the pass."""
        inputs = dict(inputs)
        targets = inputs.pop("labels")[:, 1:]
        model(**inputs, logits_to_keep=torch.empty(0, dtype=torch.long, device=targets.device))
        hidden, self.last_hidden = self.last_hidden, None
        where = targets != data.IGNORE_INDEX
        weight = self.model.get_output_embeddings().weight
        return *LinearCrossEntropy.apply(hidden[:, :-1][where], weight, targets[where]), where

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the supervised tokens of the whole optimizer step, on all devices, as Trainer's own."""
        if self.args.full_logits:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total, losses, _ = self.supervised_losses(model, inputs)
        if num_items_in_batch is None:
            return total / len(losses)
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * scale / num_items_in_batch

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """{eval_loss: the mean over examples of each example's mean token loss, as published; eval_token_loss: the mean
        over tokens; eval_runtime in seconds}. Neither loss depends on batch size or number of processes."""
        started = time.perf_counter()
        dataset = eval_dataset or self.eval_dataset
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64)  # example means, examples, token losses, tokens
        for batch in token_batches(dataset, self.args.process_index, self.args.world_size):
            inputs = self._prepare_inputs(self.data_collator([dataset[i] for i in batch]))
            with self.compute_loss_context_manager():
                total, losses, where = self.supervised_losses(self.model, inputs)
            example = ((inputs["position_ids"] == 0).cumsum(dim=1) - 1)[:, 1:][where]
            means = torch.zeros(len(batch), device=losses.device).index_add_(0, example, losses)
            means /= torch.bincount(example, minlength=len(batch))
            sums += torch.tensor([means.sum().item(), len(batch), total.item(), len(losses)], dtype=torch.float64)
        sums = self.accelerator.reduce(sums.to(self.args.device, torch.float32)).tolist()
        metrics = {"loss": sums[0] / sums[1], "token_loss": sums[2] / sums[3], "runtime": time.perf_counter() - started}
        metrics = {f"{metric_key_prefix}_{name}": round(value, 6) for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, model, inputs, *args, **kwargs):
        if self.window_start is None:
            self.window_start = time.perf_counter()
        self.window_tokens += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self.window_start is not None:
            tokens = self.accelerator.reduce(torch.tensor(self.window_tokens, device=self.args.device)).item()
            logs["tokens_per_second"] = round(tokens / (time.perf_counter() - self.window_start), 1)
            logs["peak_memory_gb"] = round(peak_memory(self.args.device) / 1e9, 2)
            self.window_start, self.window_tokens = None, 0
        super().log(logs, *args, **kwargs)


def token_batches(dataset, rank: int, world_size: int) -> list[list[int]]:
    """This rank's share of the examples, by length, in batches of EVAL_TOKENS tokens at most (or of one example)."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    batches, tokens = [], EVAL_TOKENS
    for i in sorted(range(len(lengths)), key=lengths.__getitem__)[rank::world_size]:
        if tokens + lengths[i] > EVAL_TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the device's allocator has reserved; elsewhere what the process holds now."""
    backend = getattr(torch, device.type, None)  # torch.cuda, torch.npu
    if hasattr(backend, "max_memory_reserved"):
        return backend.max_memory_reserved()
    return psutil.Process().memory_info().rss


def claim_output_dir(args: TrainArguments) -> str | None:
    """The checkpoint to continue from, or None. Raises SystemExit for a finished run, for a folder that holds anything
    else, such as a model, and for one without permission."""
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SystemExit(
            f"错误：无法写入 {folder}（{error.strerror}）；请检查权限，或用 --output_dir 换位置。"
        ) from None
    checkpoints = inference.find_checkpoints(folder)
    finished = folder / inference.FINISHED_MARK
    ours = finished.exists() or any(re.fullmatch(r"checkpoint-\d+", path.name) for path in folder.iterdir())
    if not ours and (others := sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))):
        raise SystemExit(f"错误：{folder} 里有别的文件（{others[0]} 等）；请用 --output_dir 指定一个新文件夹。")
    if finished.exists() and not args.overwrite_output_dir:
        raise SystemExit(
            f"错误：{folder} 里已有训练完的模型。"
            "另存请用 --output_dir 换一个文件夹；删掉它重新训练请加 --overwrite_output_dir。"
        )
    if finished.exists():
        return None
    if args.resume_from_checkpoint:
        if not Path(args.resume_from_checkpoint, "trainer_state.json").is_file():
            raise SystemExit(
                f"错误：--resume_from_checkpoint {args.resume_from_checkpoint} 不是完整的检查点；"
                "不写这个参数，就会从最近的检查点继续。"
            )
        return args.resume_from_checkpoint
    return str(checkpoints[-1]) if checkpoints else None


def discard_finished_run(args: TrainArguments) -> None:
    """Delete the checkpoints of the finished run that --overwrite_output_dir gives up, then its mark.

    Late, when all that can go wrong before training has gone right. An unfinished run is continued even with the
    flag: it may be this command's own, interrupted.
    """
    finished = Path(args.output_dir, inference.FINISHED_MARK)
    if finished.exists() and not args.process_index:
        for checkpoint in inference.find_checkpoints(args.output_dir):
            shutil.rmtree(checkpoint)
        finished.unlink()


@contextlib.contextmanager
def explain_out_of_memory():
    """Turn any device's out-of-memory error into what to lower, in order."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; MPS and the CPU raise it plain
        text = str(error).lower()
        if "out of memory" in text or "allocate memory" in text:
            raise SystemExit(OUT_OF_MEMORY) from None
        raise


class BestCheckpoint(transformers.EarlyStoppingCallback):
    """Early stopping with the patience of this command, not of the one that was interrupted; and the best checkpoint
    is looked for where the output folder is now, not where it was then."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.early_stopping_patience = args.early_stopping_patience or sys.maxsize
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)


def kahan_adamw(args: TrainArguments, model):
    """(optimizer class, its arguments) for bfloat16 weights, or None: what --optim says.

    A bfloat16 weight has 8 significant bits: added to it, an update smaller than 1/512 of it is rounded away, and at a
    learning rate of 1e-5 nearly all are. Kahan summation keeps the lost part, 2 bytes a parameter, for later steps.
    """
    if not args.kahan or not any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()):
        return None
    import optimi

    betas = (args.adam_beta1, args.adam_beta2)
    # One tensor at a time: foreach would hold copies of all weights and states at once.
    return optimi.AdamW, dict(lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, foreach=False, triton=False)


def build_trainer(args: TrainArguments, model, tokenizer, train_dataset, eval_dataset) -> MedicalTrainer:
    """The Trainer over padding-free batches: a batch is its examples one after another, [1, T], with position ids
    that restart at each example, by which attention keeps them apart."""
    return MedicalTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithFlattening(),
        callbacks=[BestCheckpoint()] if args.load_best_model_at_end else [],
        optimizer_cls_and_kwargs=kahan_adamw(args, model),
    )


# ---- results ------------------------------------------------------------------------------------------------------


def save_results(trainer: MedicalTrainer, tokenizer) -> None:
    """Write the best weights, complete, into the output folder; the mark of a finished run comes last."""
    args = trainer.args
    trainer.model.config.use_cache = True  # Trainer switched it off for training
    if not args.process_index:
        trainer.model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        draw_losses(trainer.state.log_history, Path(args.output_dir, "loss.png"))
        Path(args.output_dir, "README.md").write_text(model_card(trainer), encoding="utf-8")
        trainer.save_state()


def draw_losses(log_history: list[dict], path: Path) -> None:
    """Training and evaluation loss over the steps, the best evaluation marked."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for key in ("loss", "eval_loss"):
        if points := [(log["step"], log[key]) for log in log_history if key in log]:
            axes.plot(*zip(*points), marker="o" if key == "eval_loss" else None, markersize=4, label=key)
    if evaluations := [(log["eval_loss"], log["step"]) for log in log_history if "eval_loss" in log]:
        loss, step = min(evaluations)
        axes.plot(step, loss, "*", markersize=14, label=f"best: {loss:.3f} at step {step}")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def model_card(trainer: MedicalTrainer) -> str:
    """README.md of the output folder: what the model was trained from and how, and what it is not."""
    args, state = trainer.args, trainer.state
    base = args.model_name if data.HUB_ID.fullmatch(args.model_name) else Path(args.model_name).name
    evaluations = [(log["eval_loss"], log["step"]) for log in state.log_history if "eval_loss" in log]
    best = "{:.4f}（第 {} 步）".format(*min(evaluations)) if evaluations else "未评估"
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    settings = {
        "learning_rate": f"{args.learning_rate:g}（{scheduler}）",
        "每步样本数": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "epoch / 步": f"{state.epoch:.2f} / {state.global_step}",
        "max_length": args.max_length,
        "训练 / 验证样本": f"{len(trainer.train_dataset)} / {len(trainer.eval_dataset)}",
        "最好的 eval_loss": best,
        "精度": str(trainer.model.dtype).removeprefix("torch."),
        "库": "，".join(f"{name} {version}" for name, version in library_versions().items()),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return MODEL_CARD.format(base=base, name=args.run_name, rows=rows, system_prompt=data.SYSTEM_PROMPT)


def answer_samples(trainer: MedicalTrainer, tokenizer, questions: list[str]) -> list[str]:
    """Replies of the trained model to `questions`, printed and as one text each."""
    conversations = [data.to_messages(question) for question in questions]
    replies = inference.generate(
        trainer.model.eval(), tokenizer, conversations, max_new_tokens=trainer.args.sample_tokens
    )
    samples = []
    for question, reply in zip(questions, replies):
        end = "" if reply.complete else f"……（到 {trainer.args.sample_tokens} 个 token 为止）"
        samples.append(f"【问题】{question}\n【思考】{reply.thinking}\n【回答】{reply.answer}{end}")
        print(f"\n{samples[-1]}")
    return samples


def run(args: TrainArguments, wrap_model=lambda model, args: model) -> MedicalTrainer:
    """The whole path from files to a finished output folder. `wrap_model(model, args)` may add an adapter."""
    with args.main_process_first(local=False):  # rank 0 downloads and writes, the others then find it there
        checkpoint = claim_output_dir(args)
        prepare_files(args)
        model_path = inference.resolve_model(args.model_name)
    tokenizer = inference.load_tokenizer(model_path)
    train_dataset, train_lengths = load_dataset(args.train_file, tokenizer, args.max_length)
    eval_dataset, eval_lengths = load_dataset(args.val_file, tokenizer, args.max_length)
    if not args.process_index:
        print(describe_tokens(args.train_file, train_lengths, args.max_length))
        print(describe_tokens(args.val_file, eval_lengths, args.max_length))
        print(describe_example(tokenizer, train_dataset[0]))
    if tokenizer.convert_tokens_to_ids("</think>") not in train_dataset[0]["labels"]:
        raise SystemExit(f"错误：{args.model_name} 的对话模板不写思考；请换一个会思考的模型，例如 {data.MODEL_NAME}。")
    transformers.set_seed(args.seed)  # the adapter's first weights are drawn before Trainer sets it
    with explain_out_of_memory():
        model = inference.load_weights(model_path, args.device)
        model.config.pad_token_id = tokenizer.pad_token_id  # Trainer would set it too, with a long warning
        model = wrap_model(model, args)
        trainer = build_trainer(args, model, tokenizer, train_dataset, eval_dataset)
        start_tracking(args)
        discard_finished_run(args)
        if checkpoint and not args.process_index:
            print(f"resumed from step {Path(checkpoint).name.split('-')[-1]}", flush=True)
        trainer.train(resume_from_checkpoint=checkpoint)
    save_results(trainer, tokenizer)
    if not args.process_index:
        questions = [row["question"] for row in data.read_examples(args.val_file)[:SAMPLES]]
        log_samples(args, answer_samples(trainer, tokenizer, questions))
    return trainer


def report(args: TrainArguments, script: str) -> None:
    """Last on the screen: where the model is and how to ask it."""
    if not args.process_index:
        state = json.loads(Path(args.output_dir, inference.FINISHED_MARK).read_text(encoding="utf-8"))
        kept_best = args.load_best_model_at_end and state["best_metric"] is not None
        best = f"，最好的 eval_loss {state['best_metric']:.4f}" if kept_best else "，保存的是最后一步"
        default = args.output_dir in (data.OUTPUT_DIR, data.LORA_OUTPUT_DIR)
        where = "" if default else f" --model_path {shlex.quote(args.output_dir)}"
        print(f"\n训练完成：{state['global_step']} 步{best}。模型在 {args.output_dir}，提问：python {script}{where}")


def main() -> None:
    args = parse_args(TrainArguments, __doc__)
    run(args)
    report(args, "inference.py")


if __name__ == "__main__":
    data.run_main(main)
