"""Full-parameter fine-tuning of Qwen3-1.7B into a Chinese medical chat model that thinks before it answers.

    python train.py                                   # fetches what is missing; run again, it continues
    python train.py --model_name Qwen/Qwen3-0.6B      # a small card
    python train.py --learning_rate 5e-5 --output_dir output/lr5e-5       # any flag of transformers' Trainer
    torchrun --nproc_per_node 2 train.py --per_device_train_batch_size 2  # two GPUs, still 4 examples a step

The best weights end up in the output folder itself; `python inference.py` finds them there.
"""

import argparse
import atexit
import contextlib
import copy
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import accelerate
import filelock
import psutil
import rich.console
import rich.table
import torch
import transformers
from safetensors import SafetensorError
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import data
import inference

# ---- the recipe: the published one, and what keeps its best weights -----------------------------------------------

LEARNING_RATE = 1e-4  # linear to 0, no warm-up
NUM_EPOCHS = 2
BATCH_SIZE = 4  # examples a step on a device, about 3,150 tokens; together in one pass when memory allows
ACCUMULATION_STEPS = 1  # x BATCH_SIZE x devices = 4 examples a step
EVAL_STEPS = 100  # optimizer steps between evaluations; a checkpoint is written at each
EVAL_TOKENS = 8192  # at most, of whole examples in one evaluation batch, which keeps neither activations nor logits
LOSS_BYTES = 500_000_000  # of logits and their gradient at any time; all at once are 14 bytes x vocabulary a token
DRIVER_BYTES = 500_000_000  # of a card, that the driver takes for this process; an estimate
RESERVE_BYTES = 300_000_000  # for what no formula counts: matrix products' workspace, fragments; an estimate
STEP_WEIGHTS = 2**22  # that a 4-bit step updates at a time: torchao's works with 24 bytes for each
PATIENCE = 3  # evaluations without a better eval_loss before training stops; 0: never stop early
KEPT_CHECKPOINTS = 2  # the best and the newest
LOGGING_STEPS = 10
SAMPLES = 3  # validation questions answered at the end
SAMPLE_TOKENS = 1024  # at most, for each of these replies
PROJECT = "qwen3-sft-medical"  # in SwanLab
LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "load_in_4bit")  # shown in the card of an adapter
PACKED = "packed"  # name of packed_attention among transformers' attention implementations
OPTIMIZERS = {  # of bfloat16 weights: bytes of state for each trained one, and what the plan says of it
    "kahan": (6, "AdamW，Kahan 求和"),
    "8bit": (2.04, "8 位 AdamW，随机舍入"),
    "8bit_in_backward": (2.04, "8 位 AdamW，随机舍入，在反向传播中更新，不存也不裁剪梯度"),
    "4bit_in_backward": (1.07, "4 位 AdamW，随机舍入，在反向传播中更新，不存也不裁剪梯度"),
    "optim": (None, "由 --optim 指定，默认 AdamW"),  # of AdamW two states, each as large as the weight
}
LOG_PARTS = {  # of a log, as they stand in its line
    "loss": "loss {:.4f}",
    "eval_loss": "评估 eval_loss {:.4f}",
    "eval_token_loss": "按 token {:.4f}",
    "grad_norm": "梯度 {:.2f}",
    "learning_rate": "学习率 {:.3g}",
    "tokens_per_second": "{:,.0f} token/秒",
    "peak_memory_gb": "{:.2f} GB",
    "eval_runtime": "{:.1f} 秒",
    "train_runtime": "训练用时 {:.0f} 秒",
}
RUN_ID_FILE = ".swanlab_run"  # in the output folder of an unfinished run; a resumed one goes on in the same SwanLab run
TRACKER_SECONDS = 20  # at most that SwanLab's server can delay the start, and again the end

OUT_OF_MEMORY = (
    "错误：显存（内存）不足。请依次尝试：关掉其他占用显存的程序；--memory_gb 写得比显存小一些；--max_length 1024；"
    "python train_lora.py；python train_lora.py --load_in_4bit true；--model_name Qwen/Qwen3-0.6B。"
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
    model_revision: str | None = field(default=None, metadata={"help": "of the ModelScope model; default: master"})
    model_sha256: str | None = field(default=None, metadata={"help": "that its safetensors files must have, by name"})
    train_file: str = field(default=data.TRAIN_FILE, metadata={"help": "written by data.py"})
    val_file: str = field(default=data.VAL_FILE, metadata={"help": "written by data.py"})
    max_length: int = field(default=data.MAX_LENGTH, metadata={"help": "tokens; longer examples are left out"})
    early_stopping_patience: int = field(default=PATIENCE, metadata={"help": "evaluations; 0: never stop early"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "delete the finished run that is there"})
    memory_gb: float | None = field(
        default=None, metadata={"help": "plan for a card of this size; default: what is free"}
    )
    batch_tokens: int | None = field(default=None, metadata={"help": "most tokens in one pass; default: planned"})
    checkpoint_every: int | None = field(
        default=None, metadata={"help": "recompute every n-th layer; 0: none, 1: all; default: planned"}
    )
    offload_activations: bool | None = field(
        default=None, metadata={"help": "keep the recomputed layers' inputs in the CPU's memory; default: planned"}
    )
    optimizer: str | None = field(
        default=None,
        metadata={"help": "of bfloat16 weights; optim: what --optim says; default: planned", "choices": OPTIMIZERS},
    )
    fast_kernels: bool = field(default=True, metadata={"help": "packed attention and fused layers where they run"})
    full_logits: bool = field(default=False, metadata={"help": "transformers' own loss, to compare with"})
    sample_tokens: int = field(default=SAMPLE_TOKENS, metadata={"help": "most tokens of each reply at the end"})

    output_dir: str | None = data.OUTPUT_DIR
    learning_rate: float = LEARNING_RATE
    num_train_epochs: float = NUM_EPOCHS
    per_device_train_batch_size: int = BATCH_SIZE
    gradient_accumulation_steps: int = ACCUMULATION_STEPS
    gradient_checkpointing: bool | None = None  # planned; True or False stands for --checkpoint_every 1 or 0
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
    logging_nan_inf_filter: bool = False  # it would log 0 for a loss that is no number
    report_to: None | str | list[str] = "swanlab"
    seed: int = data.SEED
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    ddp_find_unused_parameters: bool | None = False
    ddp_timeout: int = 7200  # seconds; the other processes wait while rank 0 downloads

    def __post_init__(self):
        self.check_numbers()
        if self.save_only_model:
            raise ValueError("--save_only_model：这样的检查点不能继续训练，不支持")
        if self.eval_strategy == "no":  # then there is no best
            self.load_best_model_at_end, self.early_stopping_patience = False, 0
        self.save_strategy = self.save_strategy or ("steps" if self.eval_strategy == "no" else self.eval_strategy)
        self.save_steps = (self.eval_steps or EVAL_STEPS) if self.save_steps is None else self.save_steps
        self.run_name = self.run_name or Path(self.output_dir).name
        asked = getattr(self, "activation_checkpointing", None)  # its name from transformers 5.23 on
        asked = self.gradient_checkpointing if asked is None else asked
        if self.checkpoint_every is None and asked is not None:
            self.checkpoint_every = int(asked)
        self.gradient_checkpointing = self.activation_checkpointing = False  # until the plan says otherwise
        if self.offload_activations and self.checkpoint_every == 0:
            raise ValueError("--offload_activations：没有要重算的层（--checkpoint_every 0），也就没有什么可放")
        # Less is lost between blocks of memory. Has to be set before the first one is asked for.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        # Without torchrun Trainer would spread one process over all GPUs with DataParallel, slower than one of them.
        if "LOCAL_RANK" not in os.environ:
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
        os.environ.pop("SWANLAB_DEBUG", None)  # it would write a stored key into a log; Trainer imports SwanLab
        # Without this, processes that torchrun starts on a machine without GPUs would not find each other.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.disable_tqdm is None:  # in a file each move of a bar would be a line
            self.disable_tqdm = not (sys.stderr.isatty() or transformers.utils.is_in_notebook())
        super().__post_init__()
        if self.offload_activations and self.device.type == "cpu":
            raise ValueError("--offload_activations 要 GPU")
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type == "cuda"

    def check_numbers(self):
        """Raises ValueError for numbers with which training would fail late, or do nothing."""
        above_0 = ("max_length", "sample_tokens", "per_device_train_batch_size", "gradient_accumulation_steps")
        above_0 += ("num_train_epochs", "learning_rate", "max_steps", "lora_rank", "lora_alpha")
        above_0 += ("memory_gb", "batch_tokens")
        for name in (*above_0, "early_stopping_patience", "seed", "checkpoint_every"):
            value = getattr(self, name, None)
            if value is None:
                continue
            if name == "seed" and value >= 2**32:
                raise ValueError(f"--seed {value}：要一个小于 {2**32} 的整数")
            if not 0 <= value < float("inf") or value == 0 and name in above_0:
                if (name, value) != ("max_steps", -1):  # Trainer's "not set"
                    raise ValueError(
                        f"--{name} {value}：要一个{'大于 0 的数' if name in above_0 else '不小于 0 的整数'}"
                    )
        if self.memory_gb and self.memory_gb * 1e9 <= DRIVER_BYTES:
            raise ValueError(f"--memory_gb {self.memory_gb}：驱动自己就要约 {DRIVER_BYTES / 1e9:.1f} GB")
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
        if action.type is transformers.hf_argparser.string_to_bool:  # of a field that may be None too: --flag is true
            action.nargs, action.const = "?", True
    values = vars(parser.parse_args())
    try:
        return arguments_class(**values)
    except ValueError as error:
        parser.error(str(error))


# ---- data ---------------------------------------------------------------------------------------------------------


def prepare_files(args: TrainArguments) -> None:
    """Make the default data files when neither is there; other files have to be there."""
    files = (args.train_file, args.val_file)
    missing = [file for file in files if not os.path.isfile(file)]  # unlike Path's, False for a name too long
    if len(missing) == 2 and files == (data.TRAIN_FILE, data.VAL_FILE):
        data.prepare()
    elif missing:
        raise SystemExit(
            f"错误：找不到 {'、'.join(missing)}；请先运行 python data.py --dataset <数据> "
            f"--train_file {args.train_file} --val_file {args.val_file}"
        )


def note_weights(args: TrainArguments, model_path: str) -> None:
    """Write the SHA-256 of the model's weights into the arguments. Raises SystemExit unless it is the one there."""
    found = inference.weights_sha256(model_path)
    if args.model_sha256 and args.model_sha256.lower() != found:
        raise SystemExit(
            f"错误：{args.model_name} 的权重的 SHA-256 是 {found}，不是 --model_sha256 {args.model_sha256}；"
            "请核对来源，或去掉 --model_sha256。"
        )
    args.model_sha256 = found


# ---- tracking -----------------------------------------------------------------------------------------------------


def library_versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "modelscope-hub", "swanlab")
    return {name: importlib.metadata.version(name) for name in names}


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class TrackerTimeout(BaseException):
    """Raised by tracker_limit. Not an Exception: SwanLab catches those and tries again."""


@contextlib.contextmanager
def tracker_limit():
    """TrackerTimeout after TRACKER_SECONDS; Windows has no such signal, nor have other threads than the main one.
    SwanLab's own lines stay off the screen."""

    def late(*_):
        raise TrackerTimeout(f"{TRACKER_SECONDS} 秒没有结果")

    alarm = getattr(signal, "SIGALRM", None) if in_main_thread() else None
    if alarm:
        before = signal.signal(alarm, late)
        signal.alarm(TRACKER_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as hidden:
            yield hidden
    finally:
        if alarm:
            signal.alarm(0)
            signal.signal(alarm, before)


def tracker_settings(args: TrainArguments, run_id: str | None):
    """(SwanLab's settings for this run, its mode). Raises SystemExit where the user has to mend something.

    SWANLAB_MODE is obeyed; without it: online with a key or an earlier login, else local. No prompt blocks a run.
    """
    # SwanLab >= 0.8 reads SWANLAB_PROJECT as JSON settings and raises; older tutorials set it to a name.
    project = os.environ.pop("SWANLAB_PROJECT", None) or PROJECT
    import swanlab

    try:
        settings = swanlab.Settings(
            project={"name": project},
            experiment={"name": args.run_name},
            run={"id": run_id, "resume": "allow"},
            # Off: what names people, machines and folders (command line, packages, git remote), and the screen's text.
            probe={"runtime": False, "requirements": False, "git": False, "swanlab": False},
            terminal={"proxy_type": "none"},
        )
        mode = settings.mode if "mode" in settings.model_fields_set else "online" if settings.api_key else "local"
        if mode == "online" and not settings.api_key:
            raise ValueError("SWANLAB_MODE=online 需要先登录：swanlab login")
    except ValueError as error:
        cause = data.shorten(str(error).split("[type=")[0], 200)  # behind it pydantic shows what it was given
        raise SystemExit(
            f"错误：SwanLab 无法开始（{cause}）；请改正，或设 SWANLAB_MODE=local，或加 --report_to none。"
        ) from None
    return settings, mode


def start_tracking(args: TrainArguments, checkpoint: str | None = None) -> None:
    """Begin the SwanLab run that Trainer's own callback then writes to, or go on with that of `checkpoint`. Only rank 0
    does. What fails here, such as the network, makes the run a local one and never ends the training."""
    if "swanlab" not in args.report_to or args.process_index:
        return
    import swanlab

    id_file = Path(args.output_dir, RUN_ID_FILE)
    settings, mode = tracker_settings(args, id_file.read_text() if checkpoint and id_file.is_file() else None)
    config = {"model_name": args.model_name, "max_length": args.max_length, "versions": library_versions()}
    excepthook, on_interrupt, problem = sys.excepthook, signal.getsignal(signal.SIGINT), ""
    for choice in dict.fromkeys((mode, "local", "disabled")):
        try:
            with tracker_limit():
                run = swanlab.init(reinit=True, mode=choice, config=config, settings=settings)
            break
        except (Exception, TrackerTimeout) as error:
            problem += f"{choice} 模式无法开始（{data.shorten(str(error))}），训练照常；"
    # SwanLab's own would wait for its server without limit after an error or Ctrl-C.
    sys.excepthook = excepthook
    if in_main_thread():
        signal.signal(signal.SIGINT, on_interrupt)
    atexit.register(end_tracking, "aborted")  # a run that does not come to its end
    with explain_failed_write(id_file):
        id_file.write_text(run.id)
    folder = run.dir.relative_to(Path.cwd()) if Path.cwd() in run.dir.parents else run.dir
    how = {
        "local": f"只记录在本地。查看：swanlab watch {folder.parent}；上传：swanlab login 后 swanlab sync {folder}",
        "offline": f"只记录在本地。上传：swanlab login 后 swanlab sync {folder}",
        "disabled": "不记录。",
    }
    print(f"SwanLab：{problem}{how.get(run.mode) or f'查看：{run.url}'}", flush=True)


def end_tracking(state: str = "success") -> None:
    """Close the SwanLab run, if there is one. What its server does not take in time stays on the disk only."""
    import swanlab

    if not swanlab.has_run():
        return
    run = swanlab.get_run()
    try:
        with tracker_limit() as hidden:
            run.finish(state)
        if "| ERROR" in hidden.getvalue():  # SwanLab gives up what its server refuses, and says so only there
            raise RuntimeError("服务器拒绝接收")
    except (Exception, TrackerTimeout) as error:
        cause = data.shorten(str(error))
        print(f"SwanLab：没有全部上传（{cause}）。补传本地的记录：swanlab sync --id {run.id} {run.dir}")


def log_samples(args: TrainArguments, samples: list[str]) -> None:
    """The replies as text in the SwanLab run, and the end of that run."""
    if "swanlab" in args.report_to and not args.process_index:
        import swanlab

        swanlab.log({"Prediction": [swanlab.Text(sample) for sample in samples]})
        end_tracking()
        Path(args.output_dir, RUN_ID_FILE).unlink(missing_ok=True)


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
        rows = max(1, LOSS_BYTES // (len(weight) * 8))  # float32 logits, and as much again inside logsumexp
        for part in (slice(start, start + rows) for start in range(0, len(labels), rows)):
            logits = (hidden[part] @ weight.T).float()
            log_total = logits.logsumexp(dim=-1, keepdim=True)
            losses[part] = (log_total - logits.gather(1, labels[part, None])).squeeze(1)
            if grad_hidden is not None:
                grad = logits.sub_(log_total).exp_()  # the softmax, in the logits' place
                grad.scatter_add_(1, labels[part, None], -torch.ones_like(log_total))
                grad = grad.to(weight.dtype)
                grad_hidden[part] = grad @ weight
                if grad_weight is not None:
                    grad_weight.addmm_(grad.T, hidden[part].to(grad.dtype))  # under autocast they differ
                del grad
            del logits  # else they would live on beside the next ones
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        return *(grad if grad is None else grad.mul_(grad_sum) for grad in ctx.saved_tensors), None


# ---- attention ----------------------------------------------------------------------------------------------------


class PackedCollator(transformers.DataCollatorWithFlattening):
    """A batch is its examples one after another, [1, T], without padding; position ids restart at each, and `lengths`
    has their lengths in tokens, as whole numbers that stay on the CPU."""

    def __call__(self, features, **kwargs):
        lengths = tuple(len(feature["input_ids"]) for feature in features)
        return super().__call__(features, **kwargs) | {"lengths": lengths}


def split_batch(inputs: dict, most: int) -> list[dict]:
    """The batch as batches of whole examples, of at most `most` tokens each, or of one example."""
    groups: list[list[int]] = []
    for length in inputs["lengths"]:
        if not groups or sum(groups[-1]) + length > most:
            groups.append([])
        groups[-1].append(length)
    sizes = [sum(group) for group in groups]
    names = ("input_ids", "labels", "position_ids")
    tensors = zip(*(inputs[name].split(sizes, dim=1) for name in names))
    return [dict(zip(names, part)) | {"lengths": tuple(group)} for part, group in zip(tensors, groups)]


def packed_attention(module, query, key, value, attention_mask, scaling, lengths, starts=None, **_):
    """Causal attention within each example of a packed batch, none between them.

    query [1, heads, T, D], key and value [1, key heads, T, D], lengths of the examples, starts [examples + 1] where
    torch's kernel for such batches runs -> ([1, T, heads, D], None). Elsewhere one example after another: a mask for
    all of them would be T x T.
    """
    assert attention_mask is None and sum(lengths) == query.shape[2], (lengths, query.shape)
    if starts is None:
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
        return torch.cat([sdpa_attention_forward(module, *part, None, scaling=scaling)[0] for part in parts], 1), None
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # Before torch 2.13 grouped heads need no word.
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    longest = max(lengths)
    out = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), **options
    )
    return out[None], None


def starts_of(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[examples + 1], int32: where each example of a packed batch starts, and where the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)


def check_varlen(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's attention kernel for packed batches is not used on `device`; None: it runs, and agrees with sdpa."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        return "它只在 sm80 及以上的 NVIDIA GPU 上"
    if dtype == torch.float32:
        return "它只算 bfloat16 和 float16"
    lengths = (37, 91)
    query, key, value = (torch.randn(1, heads, 128, 128, device=device, dtype=dtype) for heads in (16, 8, 8))
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2

    def attend(starts):
        return gradients(lambda *qkv: packed_attention(layer, *qkv, None, 0.1, lengths, starts)[0], query, key, value)

    return disagreement(attend(None), attend(starts_of(lengths, device)))


def check_fused(device: torch.device, dtype: torch.dtype, config) -> str | None:
    """Why Liger's norms, rotary embedding and SwiGLU are not used; None: they run, and agree with transformers'."""
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return "它要 GPU 和 liger-kernel"
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb
    from transformers.models.qwen3 import modeling_qwen3 as plain

    config = copy.deepcopy(config)
    config.hidden_size, config.intermediate_size = 256, 512
    like = {"device": device, "dtype": dtype}
    mlp, fused_mlp = plain.Qwen3MLP(config).to(**like), LigerSwiGLUMLP(config).to(**like)
    fused_mlp.load_state_dict(mlp.state_dict())
    norm, fused_norm = plain.Qwen3RMSNorm(256).to(**like), LigerRMSNorm(256).to(**like)
    hidden, query, key = (torch.randn(1, *shape, **like) for shape in ((64, 256), (16, 64, 128), (8, 64, 128)))
    angles = torch.rand(1, 64, 128, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pairs = [
        [gradients(layer, hidden) for layer in (mlp, fused_mlp)],
        [gradients(layer, hidden) for layer in (norm, fused_norm)],
        [
            gradients(lambda q, k, rotate=rotate: torch.cat(rotate(q, k, cos, sin), 1), query, key)
            for rotate in (plain.apply_rotary_pos_emb, liger_rotary_pos_emb)
        ],
    ]
    return next(filter(None, (disagreement(*pair) for pair in pairs)), None)


def gradients(function, *inputs) -> list[torch.Tensor] | Exception:
    """What `function` gives for `inputs`, and the gradients of its squared sum, or the error that it raised."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    try:
        output = function(*[leaf * 1 for leaf in leaves])  # * 1: a kernel may write over what it is given
        return [output.detach().clone(), *torch.autograd.grad(output.float().square().sum(), leaves)]
    except Exception as error:  # whatever a kernel, its compiler or the driver raises: then it is not used
        return error


def disagreement(plain, fast) -> str | None:
    """What is wrong with `fast`, of `gradients`, beside `plain`; None when they differ by rounding alone."""
    if isinstance(fast, Exception):
        return data.shorten(data.first_line(fast), 100)
    differences = [((a - b).float().norm() / a.float().norm()).item() for a, b in zip(plain, fast)]
    return None if max(differences) < 0.03 else f"与普通算子相差 {max(differences):.1%}"


# ---- memory plan --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What decides over memory and speed, and the bytes that it takes at its peak."""

    batch_tokens: int
    checkpoint_every: int
    offload: bool
    optimizer: str
    memory: dict[str, float]  # bytes: weights, optimizer states, the peak within a step, and what no formula counts
    cost: float  # time of a step, relative to the fastest plan's; an estimate

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def layer_bytes(model, fused: bool, lora_dropout: float) -> float:
    """Bytes a token that one decoder layer keeps for its backward pass: 117 kB plain and 72 kB fused for Qwen3-1.7B.

    Counted from what the operations of a Qwen3 layer keep: norms their input (plain ones in float32, and before the
    weight), matrix products their input, SiLU and the product of the MLP theirs, attention its four tensors.
    """
    config, size = model.config, model.dtype.itemsize
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    norm = size if fused else 4 + size
    kept = 2 * (norm + size) * hidden + norm * (query + key) + size * (3 * query + 2 * key)
    kept += (3 if fused else 4) * size * inner + 4 * config.num_attention_heads
    if lora_dropout:  # each of the seven adapters keeps its own input and the mask; the frozen products keep nothing
        kept += (size + 1) * (5 * hidden + query + inner) - size * (2 * hidden + inner)
    return kept


def state_bytes(trained: list, optimizer: str) -> float:
    """Bytes of the optimizer's states for the trained weights."""
    each, _ = OPTIMIZERS[optimizer]
    return sum(2 * p.nbytes for p in trained) if each is None else each * sum(p.numel() for p in trained)


def estimate_memory(
    model, args, fused: bool, tokens: int, whole_step: bool, every: int, offload: bool, optimizer: str
) -> dict:
    """Bytes at the peak of training, part by part. `tokens` in one pass; `whole_step`: they are all of a step's."""
    config, size = model.config, model.dtype.itemsize
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = 0 if optimizer.endswith("in_backward") else sum(p.nbytes for p in trained)
    gradients *= 1 + (args.world_size > 1)  # DistributedDataParallel sends copies of them
    output = model.get_output_embeddings().weight
    output_gradient = output.numel() * size * output.requires_grad
    layer = tokens * layer_bytes(model, fused, getattr(args, "lora_dropout", 0) * (output_gradient == 0))
    checkpointed = math.ceil(config.num_hidden_layers / every) if every else 0
    kept = (config.num_hidden_layers - checkpointed) * layer
    kept += 0 if offload else checkpointed * tokens * size * config.hidden_size
    tail = tokens * (4 + 4 * size) * config.hidden_size  # last norm, and the gradient on its way down
    loss = tokens * len(output) * 14 if args.full_logits else min(LOSS_BYTES, tokens * len(output) * 8)
    # Gradients on their way down through an MLP, while its activations, kept or recomputed, are still there.
    flowing = tokens * size * (4 * config.intermediate_size + 2 * config.hidden_size)
    flowing += 24 * STEP_WEIGHTS * (optimizer == "4bit_in_backward")
    # The output layer is the embedding too: the second gradient of it is added to the first one in place, unless that
    # had to be added to the sum of earlier passes.
    second = output_gradient * (1 if whole_step else 2)
    last_recomputed = every > 0 and (config.num_hidden_layers - 1) % every == 0  # while all others are still kept
    top = kept + max(loss + tail, flowing + layer * last_recomputed)
    top += output_gradient + (0 if whole_step else gradients)
    bottom = max(gradients, output_gradient) + max(second, layer + flowing)
    return {
        "权重": float(model.get_memory_footprint()),
        "优化器": float(state_bytes(trained, optimizer)),
        "一步之内": max(top, bottom),
        "余量": RESERVE_BYTES,
    }


def free_memory(args, model) -> float:
    """Bytes that training may take, its weights included: what is free now, or --memory_gb less the driver's own."""
    if args.memory_gb:
        return args.memory_gb * 1e9 - DRIVER_BYTES
    if args.device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return psutil.virtual_memory().available + model.get_memory_footprint()


def make_plan(args, model, lengths: list[int], fused: bool, free: float) -> Plan:
    """The fastest plan that fits into `free` bytes, what the command line says obeyed; the smallest when none does.

    lengths: tokens of each training example. The worst step holds the longest ones.
    """
    lengths = sorted(lengths)
    worst = sum(lengths[-args.per_device_train_batch_size :])
    at_once = [args.batch_tokens] if args.batch_tokens else sorted({worst, max(lengths[-1], worst // 2), lengths[-1]})
    layers = [0, 4, 2, 1] if args.checkpoint_every is None else [args.checkpoint_every]
    offloads = [False, True] if args.device.type == "cuda" else [False]
    offloads = offloads if args.offload_activations is None else [args.offload_activations]
    optimizers = [args.optimizer]
    if args.optimizer is None:
        rounded = any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
        optimizers = ["kahan"] if rounded else ["optim"]
        if rounded and not hasattr(args, "lora_rank") and args.device.type == "cuda":
            optimizers += ["8bit", "8bit_in_backward", "4bit_in_backward"]
    plans = []
    for tokens, every, offload, optimizer in itertools.product(at_once, layers, offloads, optimizers):
        if offload and not every:
            continue
        whole = tokens >= worst and args.gradient_accumulation_steps == 1
        if optimizer.endswith("in_backward") and not (whole and args.world_size == 1):
            continue
        memory = estimate_memory(model, args, fused, min(tokens, worst), whole, every, offload, optimizer)
        # Recomputing every layer is one forward pass more, 27 % of the FLOPs; the rest orders what costs the same.
        cost = 1 + ((0.27 + 0.1 * offload) / every if every else 0)
        cost += 0.02 * (worst / tokens - 1) + 0.03 * optimizers.index(optimizer)
        plans.append(Plan(tokens, every, offload, optimizer, memory, cost))
    if not plans:
        raise SystemExit(
            f"错误：--optimizer {args.optimizer} 要一个进程把一步的样本一次算完；"
            "请去掉 --batch_tokens 和梯度累积，只用一张 GPU。"
        )
    fitting = [plan for plan in plans if plan.total <= free]
    if importlib.util.find_spec("torchao") is None:  # then it is asked for only where nothing else fits
        fitting = [plan for plan in fitting if plan.optimizer in ("kahan", "optim")] or fitting
    if not fitting:
        return min(plans, key=lambda plan: plan.total)
    return min(fitting, key=lambda plan: (plan.optimizer == "4bit_in_backward", plan.cost))  # 4 bits where 8 do not fit


def describe_plan(plan: Plan, free: float, kind: str) -> str:
    """The plan as a table: what, GB, why."""
    layers = {0: "全部保留", 1: "每层重算"}.get(plan.checkpoint_every, f"每 {plan.checkpoint_every} 层重算一层")
    layers += "，输入放内存" * plan.offload
    why = {
        "优化器": OPTIMIZERS[plan.optimizer][1],
        "一步之内": f"一次 {plan.batch_tokens} 个 token，激活{layers}；梯度；损失",
        "余量": "碎片和库自己的缓冲",
    }
    table = rich.table.Table(f"{kind}计划", rich.table.Column("GB", justify="right"), "", box=None, pad_edge=False)
    for name, size in plan.memory.items():
        table.add_row(name, f"{size / 1e9:.2f}", why.get(name, ""))
    fits = "" if plan.total <= free else "，可能放不下"
    table.add_row("合计（估算）", f"{plan.total / 1e9:.2f}", f"可用 {free / 1e9:.2f}{fits}")
    console = rich.console.Console(width=100, record=True, file=io.StringIO(), force_jupyter=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def apply_plan(args, model, plan: Plan) -> None:
    """Write the plan into the arguments, and switch the recomputing of layers on."""
    args.batch_tokens, args.optimizer = plan.batch_tokens, plan.optimizer
    args.checkpoint_every, args.offload_activations = plan.checkpoint_every, plan.offload
    if plan.checkpoint_every:
        # Its name from transformers 5.23 on, and before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(every_n_layers=plan.checkpoint_every, offload=plan.offload)
    if args.memory_gb and args.device.type == "cuda":
        share = free_memory(args, model) / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


# ---- checkpoints --------------------------------------------------------------------------------------------------

# What decides the weights. Logging, saving, samples, patience and what only saves memory may change while continuing.
SETTINGS = (
    "model_name max_length num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim optim_args full_logits label_smoothing_factor "
    "neftune_noise_alpha seed data_seed bf16 fp16 eval_strategy eval_steps load_best_model_at_end "
    "metric_for_best_model model_revision lora_rank lora_alpha lora_dropout load_in_4bit optimizer ignore_data_skip "
    "model_sha256"
).split()


def check_output_dir(args: TrainArguments) -> None:
    """Raises SystemExit for a finished run, for a folder that holds anything else, such as a model, and for one
    without permission."""
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
    finished = folder / inference.FINISHED_MARK
    ours = finished.exists() or (folder / inference.RUN_FILE).exists()
    if not ours and (others := sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))):
        raise SystemExit(f"错误：{folder} 里有别的文件（{others[0]} 等）；请用 --output_dir 指定一个新文件夹。")
    if finished.exists() and not args.overwrite_output_dir:
        raise SystemExit(
            f"错误：{folder} 里已有训练完的模型。"
            "另存请用 --output_dir 换一个文件夹；删掉它重新训练请加 --overwrite_output_dir。"
        )


@contextlib.contextmanager
def hold_output_dir(args: TrainArguments):
    """The output folder for this run alone: two runs in it would delete each other's checkpoints. Rank 0 holds it for
    all; the system lets go of it when the process ends, however it ends."""
    if args.process_index:
        yield
        return
    check_output_dir(args)
    path, owner = Path(args.output_dir, ".lock"), Path(args.output_dir, ".lock_owner")
    lock = filelock.FileLock(path)
    with explain_failed_write(path):
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            who = owner.read_text(encoding="utf-8") if owner.is_file() else "刚刚开始"
            raise SystemExit(
                f"错误：另一个训练（{who}）正在写 {args.output_dir}；请等它结束，或用 --output_dir 换一个文件夹。"
            ) from None
        for thread in threading.enumerate():  # of an earlier run in this process, which a second Ctrl-C ended
            if isinstance(thread, Sealing):
                thread.join()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        write_at_once(owner, f"进程 {os.getpid()}，开始于 {now}")
    with held:
        try:
            yield
        finally:
            for file in (owner, path):
                with contextlib.suppress(OSError):  # Windows deletes no open file
                    file.unlink()


def write_at_once(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever the process or the power ends."""
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def describe_run(args: TrainArguments) -> dict[str, object]:
    """The settings that decide the weights, {name: value}, with the content of the data files."""
    values = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    values = {name: getattr(value, "value", value) for name, value in values.items()}  # enums
    values["examples_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    values |= {"system_prompt": data.SYSTEM_PROMPT, "dtype": str(inference.best_dtype(args.device))}
    return values | {f"{file} (sha256)": inference.sha256(file) for file in (args.train_file, args.val_file)}


def check_settings(args: TrainArguments, folder: Path) -> None:
    """Raises SystemExit when the run in `folder` was begun with settings that give other weights. Where the command
    line says nothing its plan is kept: other optimizers have other states, other passes round otherwise."""
    try:
        old = {**json.loads((folder / inference.RUN_FILE).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        cause = data.first_line(error)
        return print(f"{folder / inference.RUN_FILE} 无法读取（{cause}），无法核对设置是否与原来相同。")
    tokens = old.pop("batch_tokens", None)
    args.optimizer = args.optimizer or old.get("optimizer")
    if args.memory_gb is None:
        args.batch_tokens = args.batch_tokens or tokens
    new = json.loads(json.dumps(describe_run(args)))
    changed = [name for name in old if old[name] != new.get(name)]
    if changed:
        changes = "，".join(f"{name} {str(old[name])[:80]} -> {str(new.get(name))[:80]}" for name in changed)
        raise SystemExit(
            f"错误：{folder} 里未完成的训练用的是别的设置：{changes}；"
            "请用原来的设置继续，或用 --output_dir 换一个文件夹重新训练。"
        )


def choose_checkpoint(args: TrainArguments) -> str | None:
    """The checkpoint to continue from, or None: the newest that is whole to the last bit, and whose best one is, as the
    weights that training ends with may be read from there. Prints which were passed over and why."""
    if Path(args.output_dir, inference.FINISHED_MARK).exists():
        return None
    wanted, own = args.resume_from_checkpoint, inference.checkpoint_folders(args.output_dir)
    if wanted and own and Path(wanted).resolve().parent != Path(args.output_dir).resolve():
        raise SystemExit(
            f"错误：{args.output_dir} 里有另一个未完成的训练；从 {wanted} 继续，请用 --output_dir 换一个新文件夹。"
        )
    folders = [Path(wanted)] if wanted else own
    for checkpoint in reversed(folders):
        fault = find_fault(checkpoint, args)
        if wanted and fault:
            raise SystemExit(
                f"错误：--resume_from_checkpoint {wanted} 不是完整的检查点（{fault}）；"
                "不写这个参数，就会从最近的完整检查点继续。"
            )
        if not fault:
            check_settings(args, checkpoint.parent)
            return str(checkpoint)
        print(f"跳过 {checkpoint}：{fault}。")
    if folders:
        print("没有可用的检查点，从头开始训练。")
    return None


def find_fault(checkpoint: Path, args: TrainArguments) -> str | None:
    """Why training cannot continue from `checkpoint` to the same weights, or None."""
    damage = inference.find_damage(checkpoint, hashes=True)
    if damage or not args.load_best_model_at_end:
        return damage
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    best = Path(state["best_model_checkpoint"] or checkpoint)
    moved = checkpoint.with_name(best.name)  # with the whole folder
    best = moved if moved.is_dir() else best
    if best != checkpoint and (damage := inference.find_damage(best, hashes=True)):
        return f"到它为止最好的 {best.name} {damage}"
    return None


def begin_run(args: TrainArguments, checkpoint: str | None) -> None:
    """Delete the finished run that --overwrite_output_dir gives up, its mark last, and note this run's settings.

    Late, when all that can go wrong before training has gone right. An unfinished run is continued even with the
    flag: it may be this command's own, interrupted.
    """
    if args.process_index:
        return
    finished = Path(args.output_dir, inference.FINISHED_MARK)
    if finished.exists():
        for folder in inference.checkpoint_folders(args.output_dir):
            shutil.rmtree(folder)
        finished.unlink()
    settings = json.dumps(describe_run(args) | {"batch_tokens": args.batch_tokens}, ensure_ascii=False, indent=1)
    with explain_failed_write(args.output_dir):
        write_at_once(Path(args.output_dir, inference.RUN_FILE), settings)
    if checkpoint:
        print(f"resumed from step {Path(checkpoint).name.split('-')[-1]}", flush=True)


@contextlib.contextmanager
def explain_failed_write(path: str | Path):
    """Turn a write that failed, on a full disk say, into one sentence."""
    try:
        yield
    except Exception as error:
        # safetensors, torch.save and tokenizers have errors of their own for it.
        if not isinstance(error, OSError | SafetensorError) and not re.search("inline_container|os error", str(error)):
            raise
        free = shutil.disk_usage(Path(path).parent).free / 1e9
        raise SystemExit(
            f"错误：写 {path} 失败（{data.shorten(str(error))}），磁盘剩余 {free:.2f} GB。"
            "此前的检查点都还在；请腾出空间，再用同一命令继续。"
        ) from None


def check_space(args: TrainArguments, state: transformers.TrainerState, model, limit: int | None) -> None:
    """Raises SystemExit when the disk will not hold the checkpoints that are kept (at most `limit`, but the best and
    the newest always), the one that is written before an older one goes, and the final weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.nbytes for p in trained)
    steps = state.max_steps / args.num_train_epochs if args.save_strategy == "epoch" else state.save_steps
    count = math.ceil(state.max_steps / steps)
    if limit and limit > 0:
        count = min(count, max(limit, 1 + args.load_best_model_at_end) + 1)
    count = 1 if args.save_strategy == "no" else count  # one, at a signal
    there = sum(path.stat().st_size for path in Path(args.output_dir).rglob("*") if path.is_file())
    need = count * (weights + state_bytes(trained, args.optimizer)) + weights - there
    free = shutil.disk_usage(args.output_dir).free
    if need > free:
        raise SystemExit(
            f"错误：{args.output_dir} 所在的磁盘剩余 {free / 1e9:.2f} GB，{count} 个检查点和最后的权重还需要约 "
            f"{need / 1e9:.2f} GB；请腾出空间，或用 --output_dir 换到别的磁盘。"
        )


class Sealing(threading.Thread):
    """Sees a checkpoint that was just written to the disk, writes its manifest, and only then deletes older ones.

    A thread of its own: hashing 10 GB takes 6 s, in which the GPU trains on. The next save and the end of training
    wait for it. Killed before its end, the checkpoint does not count and the older ones are still there.
    """

    def __init__(self, checkpoint: Path, best: str | None, limit: int | None):
        super().__init__(daemon=True)  # a second Ctrl-C does not wait for it
        self.checkpoint, self.error = checkpoint, None
        self.kept = {checkpoint, checkpoint.with_name(Path(best or checkpoint).name)}
        self.limit = limit if limit and limit > 0 else sys.maxsize
        self.start()

    def run(self) -> None:
        try:
            manifest = {}
            for path in sorted(path for path in self.checkpoint.rglob("*") if path.is_file()):
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                manifest[path.relative_to(self.checkpoint).as_posix()] = path.stat().st_size, inference.sha256(path)
            write_at_once(self.checkpoint / inference.MANIFEST, json.dumps(manifest, indent=1))
            self.sweep()
        except Exception as error:  # to be raised where it is waited for
            self.error = error

    def sweep(self) -> None:
        """Delete what an interrupted save left, and the oldest checkpoints beyond the limit."""
        folder = self.checkpoint.parent
        whole = [path for path in inference.find_checkpoints(folder) if path not in self.kept]
        surplus = whole[: max(0, len(whole) - max(0, self.limit - len(self.kept)))]
        cut_off = set(inference.checkpoint_folders(folder)) - set(whole) - self.kept
        for path in (*cut_off, *surplus):
            shutil.rmtree(path, ignore_errors=True)


class SafeTrainer(transformers.Trainer):
    """Trainer whose checkpoints count only when whole, that saves nothing after a loss that is no number, and that
    takes no further step when it continues from its last one."""

    sealing: Sealing | None = None
    saved_step = -1  # of the checkpoint last written, or continued from
    interruption = None  # the Interruption that this training listens to

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args = copy.copy(self.args)
        # Trainer would delete before there is a manifest.
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None

    def finish_checkpoint(self) -> None:
        """Wait for the manifest of the last checkpoint."""
        if self.sealing:
            self.sealing.join()
            with explain_failed_write(self.sealing.checkpoint):
                if self.sealing.error:
                    raise self.sealing.error

    def _save_checkpoint(self, model, trial):
        args, step = self.args, self.state.global_step
        self.saved_step = step
        self.check_weights()
        checkpoint = Path(args.output_dir, f"checkpoint-{step}")
        if not args.process_index:
            self.finish_checkpoint()
            for folder in inference.checkpoint_folders(args.output_dir):
                if inference.step_of(folder) >= step:  # this run passed it over when it continued from an older one
                    shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        try:
            with explain_failed_write(checkpoint):
                super()._save_checkpoint(model, trial)
        except SystemExit:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if not args.process_index:
            self.sealing = Sealing(checkpoint, self.state.best_model_checkpoint, self.limit)

    def _load_from_checkpoint(self, *args, **kwargs):
        super()._load_from_checkpoint(*args, **kwargs)
        self.restore_dtype()

    def _load_best_model(self):
        super()._load_best_model()
        self.restore_dtype()

    def restore_dtype(self) -> None:
        """peft loads adapters as float32, whatever they were: training would go on with other rounding."""
        for p in self.model.parameters():
            if p.requires_grad:
                p.data = p.data.to(self.model.dtype)

    def _run_epoch(self, *args, **kwargs):
        # Continued from its last checkpoint, Trainer would take one step more.
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        if self.interruption and self.interruption.came(self.args):
            self.control.should_training_stop = self.interruption.acted = True
            if self.saved_step != self.state.global_step:
                self._save_checkpoint(self.model, None)
        self.finish_checkpoint()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        self.check_finite(logs)

    def check_weights(self) -> None:
        sums = [p.detach().sum(dtype=torch.float32) for p in self.model.parameters() if p.requires_grad]
        self.check_finite({"weights": torch.stack(sums).sum().item()})

    def check_finite(self, numbers: dict[str, float]) -> None:
        """Stop before anything is saved when one of these is infinite or no number: the weights are ruined, or will be
        at the next step."""
        for name in ("loss", "grad_norm", "eval_loss", "weights"):
            if not math.isfinite(numbers.get(name, 0)):
                self.finish_checkpoint()
                good = inference.find_checkpoints(self.args.output_dir)
                rate = numbers.get("learning_rate", self._get_learning_rate())
                raise SystemExit(
                    self.args.process_index  # all processes stop, the first one says why
                    or f"错误：到第 {self.state.global_step} 步 {name} 成了 {numbers[name]}（学习率 {rate:g}），"
                    f"训练停止，这之后的权重没有保存。最近的好检查点：{good[-1] if good else '还没有'}。"
                    "请用更小的 --learning_rate 和另一个 --output_dir 重新训练。"
                )


class BestCheckpoint(transformers.EarlyStoppingCallback):
    """Early stopping with the patience of this command, not of the one that was interrupted; and the best checkpoint
    is looked for where the output folder is now, not where it was then."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.early_stopping_patience = args.early_stopping_patience or sys.maxsize
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)


class Interruption(transformers.TrainerCallback):
    """At SIGTERM or Ctrl-C write a checkpoint at the end of the step, and exit with 143 or 130. A second one acts at
    once. Entered, it holds the two signals, which reach the main thread only."""

    number = 0  # the signal that came
    acted = False  # it came while there were steps to interrupt, and not in what follows the last one
    message = ""

    def __init__(self, trainer: SafeTrainer):
        self.trainer, trainer.interruption = trainer, self
        trainer.add_callback(self)

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread() else ()
        # A shell's & lets a process ignore Ctrl-C; it stays ignored.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self.note) for number in heard}
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.acted and kind is None:
            if self.message:
                print(self.message, file=sys.stderr)
            raise SystemExit(128 + self.number)

    def note(self, number, frame):
        if self.number:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
        self.number = number
        # print() may be under way in the very thread that the signal interrupts
        os.write(2, "\n做完这一步就保存检查点并退出；再来一次信号（Ctrl-C）立即退出。\n".encode())

    def came(self, args) -> bool:
        """Whether any process got a signal: all have to stop at the same step."""
        came = bool(self.number)
        if args.world_size > 1:
            came = bool(accelerate.utils.reduce(torch.tensor(float(came), device=args.device)).item())
        self.number = self.number or came * signal.SIGTERM
        return came

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trainer.saved_step = state.global_step
        if not args.process_index:
            check_space(args, state, model, self.trainer.limit)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.came(args)  # and the checkpoint is written when the epoch is left

    def on_epoch_end(self, args, state, control, **kwargs):
        cut_off = state.epoch % 1 > 0 and state.global_step < state.max_steps
        if self.number and cut_off:  # Trainer evaluates and saves here, but the epoch has not ended
            control.should_evaluate = control.should_save = False

    def on_train_end(self, args, state, control, **kwargs):
        if not args.process_index and (whole := inference.find_checkpoints(args.output_dir)):
            self.message = (
                f"\n已中断：第 {inference.step_of(whole[-1])} 步的检查点在 {args.output_dir}；同一命令会从这里继续。"
            )


# ---- training -----------------------------------------------------------------------------------------------------


class MedicalTrainer(SafeTrainer):
    """Trainer whose loss needs no logits, whose evaluation loss does not depend on the batch, and that logs tokens
    per second and peak memory beside the training loss."""

    window_start: float | None = None  # of the steps since the last log; evaluations and saving come after a log
    window_tokens = 0
    last_hidden: torch.Tensor | None = None  # [B, T, H] of the forward pass under way
    varlen = False  # whether torch's attention kernel for packed batches runs here
    step_hooks: tuple = ()  # that step in the backward pass

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.get_decoder().register_forward_hook(self.keep_hidden)

    def keep_hidden(self, module, args, output) -> None:
        self.last_hidden = output.last_hidden_state

    def supervised_losses(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum, losses [N], where [B, T-1] the N supervised tokens stand). `model` is asked for no logits at all, but
        is called as a whole, so that DistributedDataParallel sees the pass."""
        inputs = self.for_attention(inputs)
        targets = inputs.pop("labels")[:, 1:]
        model(**inputs, logits_to_keep=torch.empty(0, dtype=torch.long, device=targets.device))
        hidden, self.last_hidden = self.last_hidden, None
        where = targets != data.IGNORE_INDEX
        weight = self.model.get_output_embeddings().weight
        weight = weight if torch.is_grad_enabled() else weight.detach()  # else room is made for its gradient
        return *LinearCrossEntropy.apply(hidden[:, :-1][where], weight, targets[where]), where

    def for_attention(self, inputs: dict) -> dict:
        """A copy of `inputs` with what the attention in use wants to know of where examples begin; transformers' own
        sees it in the position ids."""
        inputs = dict(inputs)
        if self.model.config._attn_implementation != PACKED:
            inputs.pop("lengths")
        elif self.varlen:
            inputs["starts"] = starts_of(inputs["lengths"], inputs["input_ids"].device)
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the supervised tokens of the whole optimizer step, on all devices, as Trainer's own."""
        if self.args.full_logits:
            return super().compute_loss(model, self.for_attention(inputs), return_outputs, num_items_in_batch)
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
        most = min(EVAL_TOKENS, self.args.batch_tokens)
        for batch in token_batches(dataset, self.args.process_index, self.args.world_size, most):
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

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The batch in parts of at most batch_tokens tokens; their losses and gradients add up to the batch's."""
        if self.window_start is None:
            self.window_start = time.perf_counter()
        self.window_tokens += inputs["input_ids"].numel()
        assert num_items_in_batch is not None  # else the parts' means would add up
        *parts, last = split_batch(inputs, self.args.batch_tokens)
        with self.accelerator.no_sync(model):  # several GPUs add up their gradients once, after the last part
            losses = [super(MedicalTrainer, self).training_step(model, part, num_items_in_batch) for part in parts]
        return sum(losses, super().training_step(model, last, num_items_in_batch))

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.optimizer.endswith("in_backward") and not self.step_hooks:
            self.args.max_grad_norm = 0  # the norm of all gradients is never known
            most = STEP_WEIGHTS if self.args.optimizer == "4bit_in_backward" else sys.maxsize
            self.step_hooks = step_in_backward(optimizer, most)
        return optimizer

    def free_optimizer(self) -> None:
        """Drop its states: the replies at the end need their memory."""
        for hook in self.step_hooks:
            hook.remove()
        for holder in (self, self.callback_handler):
            holder.optimizer = holder.lr_scheduler = None
        self.model_wrapped = self.model  # DistributedDataParallel holds gradients
        self.accelerator.free_memory()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.step_hooks:
            logs.pop("grad_norm", None)  # Trainer's, of no gradients
        if "loss" in logs and self.window_start is not None:
            tokens = self.accelerator.reduce(torch.tensor(self.window_tokens, device=self.args.device)).item()
            logs["tokens_per_second"] = round(tokens / (time.perf_counter() - self.window_start), 1)
            logs["peak_memory_gb"] = round(peak_memory(self.args.device) / 1e9, 2)
            self.window_start, self.window_tokens = None, 0
        super().log(logs, *args, **kwargs)


class Bar(transformers.ProgressCallback):
    """Trainer's bar without the logs, which are LogLines'."""

    def on_log(self, *args, **kwargs):
        pass


class LogLines(transformers.TrainerCallback):
    """A line of at most 80 columns for each log, where Trainer would print a dict."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        parts = [form.format(logs[name]) for name, form in LOG_PARTS.items() if name in logs]
        if state.is_world_process_zero and parts:
            tqdm.write("  ".join([f"第 {state.global_step} 步", *parts]))


def token_batches(dataset, rank: int, world_size: int, most: int) -> list[list[int]]:
    """This rank's share of the examples, by length, in batches of `most` tokens at most (or of one example)."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    batches, tokens = [], most
    for i in sorted(range(len(lengths)), key=lengths.__getitem__)[rank::world_size]:
        if tokens + lengths[i] > most:
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


def pick_optimizer(args: TrainArguments):
    """(optimizer class, its arguments) of the plan, or None: what --optim says. Raises SystemExit without torchao.

    A bfloat16 weight has 8 significant bits: added to it, an update smaller than 1/512 of it is rounded away, and at a
    learning rate of 1e-5 nearly all are. Kahan summation keeps the lost part, 2 bytes a parameter, for later steps;
    stochastic rounding rounds up as often as the lost part is large, so that on average nothing is lost.
    """
    if args.optimizer == "optim":
        return None
    common = dict(lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    if args.optimizer == "kahan":
        import optimi

        # Without its kernel one tensor at a time: foreach would hold copies of all weights and states at once.
        return optimi.AdamW, common | {"foreach": False, "triton": args.use_liger_kernel}  # Triton runs here
    try:
        from torchao.optim import AdamW4bit, AdamW8bit
    except ImportError:
        raise SystemExit(f"错误：--optimizer {args.optimizer} 要用 torchao；请先运行 pip install torchao") from None
    return AdamW4bit if args.optimizer.startswith("4bit") else AdamW8bit, common | {"bf16_stochastic_round": True}


def choose_kernels(args: TrainArguments, model) -> bool:
    """Set the model's attention and Liger's kernels to what runs on this device, and say so. Whether torch's attention
    kernel for packed batches is among them."""
    if not args.fast_kernels:
        return False
    no_varlen = check_varlen(args.device, model.dtype)
    no_fused = check_fused(args.device, model.dtype, model.config)
    transformers.AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)
    args.use_liger_kernel = no_fused is None
    args.liger_kernel_config = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the loss is our own
    if not args.process_index:
        attention = f"逐条 sdpa（不用 torch varlen：{no_varlen}）" if no_varlen else "torch varlen"
        print(f"注意力：{attention}；融合算子：{f'不用（{no_fused}）' if no_fused else 'Liger'}")
    return no_varlen is None


def step_in_backward(optimizer, most: int) -> list:
    """Update each weight as soon as its gradient is there, and drop the gradient: they never exist all at once.

    The optimizer is given views of the weights, of about `most` numbers at most. Only one weight's have gradients
    whenever it steps, so it is that one's step; Trainer's own finds none. Clipping by the norm of all gradients is not
    possible, nor is a step of several backward passes. Returns the hooks.
    """
    hooks = []
    for group in optimizer.param_groups:
        weights, group["params"] = group["params"], []
        for weight in weights:
            count = math.ceil(weight.numel() / most)
            parts = weight.detach().chunk(count)
            group["params"] += parts

            def step(weight: torch.Tensor, count=count, parts=parts) -> None:
                for part, grad in zip(parts, weight.grad.chunk(count)):
                    part.grad = grad
                optimizer.step()
                for part in (*parts, weight):
                    part.grad = None

            hooks.append(weight.register_post_accumulate_grad_hook(step))
    return hooks


def build_trainer(args: TrainArguments, model, tokenizer, train_dataset, eval_dataset) -> MedicalTrainer:
    """The Trainer over padding-free batches, with the kernels that run here and the plan that fits here."""
    varlen = choose_kernels(args, model)
    free = min(accelerate.utils.gather_object([free_memory(args, model)]))
    plan = make_plan(args, model, [len(ids) for ids in train_dataset["input_ids"]], args.use_liger_kernel, free)
    [plan] = accelerate.utils.broadcast_object_list([plan])  # one for all processes, whatever each found
    if not args.process_index:
        if args.use_cpu:
            print("没有找到 GPU，在 CPU 上训练：Qwen3-1.7B 会非常慢。")
        print(describe_plan(plan, free, "内存" if args.use_cpu else "显存"))
    apply_plan(args, model, plan)
    trainer = MedicalTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=PackedCollator(),
        callbacks=[BestCheckpoint()] if args.load_best_model_at_end else [],
        optimizer_cls_and_kwargs=pick_optimizer(args),
    )
    trainer.varlen = varlen
    if bar := trainer.pop_callback(transformers.ProgressCallback):  # a notebook's table stays
        trainer.add_callback(Bar())
    if bar or trainer.pop_callback(transformers.PrinterCallback):
        trainer.add_callback(LogLines())
    return trainer


# ---- results ------------------------------------------------------------------------------------------------------


def save_results(trainer: MedicalTrainer, tokenizer, finish) -> None:
    """Write the best weights, complete, into the output folder; the mark of a finished run comes last."""
    args = trainer.args
    trainer.model.config.use_cache = True  # Trainer switched it off for training
    trainer.check_weights()
    trainer.free_optimizer()
    trainer.model.set_attn_implementation("sdpa")  # which knows padding and the cache
    if args.process_index:
        return
    with explain_failed_write(args.output_dir):
        trainer.model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        draw_losses(trainer.state.log_history, Path(args.output_dir, "loss.png"))
        Path(args.output_dir, "README.md").write_text(model_card(trainer), encoding="utf-8")
        finish(args)
        write_at_once(Path(args.output_dir, inference.FINISHED_MARK), json.dumps(asdict(trainer.state), indent=2))


def draw_losses(log_history: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    plot_losses(axes, log_history)
    figure.savefig(path, dpi=120)


def plot_losses(axes, log_history: list[dict]) -> None:
    """Training and evaluation loss over the steps, the best evaluation marked."""
    for key in ("loss", "eval_loss"):
        if points := [(log["step"], log[key]) for log in log_history if key in log]:
            axes.plot(*zip(*points), marker="o" if key == "eval_loss" else None, markersize=4, label=key)
    if evaluations := [(log["eval_loss"], log["step"]) for log in log_history if "eval_loss" in log]:
        loss, step = min(evaluations)
        axes.plot(step, loss, "*", markersize=14, label=f"best: {loss:.3f} at step {step}")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()


def model_card(trainer: MedicalTrainer) -> str:
    """README.md of the output folder: what the model was trained from and how, and what it is not."""
    args, state, origin = trainer.args, trainer.state, data.read_origin(trainer.args.train_file)
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
        "基础模型的版本": args.model_revision or ("本地文件夹" if Path(args.model_name).is_dir() else "master"),
        "基础权重的 SHA-256": args.model_sha256,
        "数据": describe_origin(origin),
        f"{args.train_file} 的 SHA-256": origin["train_sha256"],
        "最好的 eval_loss": best,
        "优化器": args.optim if args.optimizer == "optim" else args.optimizer,
        "梯度裁剪": args.max_grad_norm or "没有",
        "精度": str(trainer.model.dtype).removeprefix("torch."),
        "库": "，".join(f"{name} {version}" for name, version in library_versions().items()),
    }
    settings |= {name: getattr(args, name) for name in LORA_SETTINGS if hasattr(args, name)}
    rows = "\n".join(f"| {name} | {getattr(value, 'value', value)} |" for name, value in settings.items())
    return MODEL_CARD.format(base=base, name=args.run_name, rows=rows, system_prompt=data.SYSTEM_PROMPT)


def describe_origin(origin: dict) -> str:
    """What the training file was made from, in the model card."""
    if "source" not in origin:
        return "不是 data.py 写的，或之后改过"
    revision = f"，版本 {origin['revision']}" if origin["revision"] else ""
    return f"{origin['source']}{revision}，SHA-256 {origin['sha256']}"


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


def run(args: TrainArguments, wrap_model=lambda model, args: model, finish=lambda args: None) -> MedicalTrainer:
    """The whole path from files to a finished output folder. `wrap_model(model, args)` may add an adapter, and
    `finish(args)` change what was saved before the run counts as finished."""
    with hold_output_dir(args):
        return fine_tune(args, wrap_model, finish)


def fine_tune(args: TrainArguments, wrap_model, finish) -> MedicalTrainer:
    """`run`, once the output folder is this run's."""
    with args.main_process_first(local=False):  # rank 0 downloads and writes, the others then find it there
        prepare_files(args)
        model_path = inference.resolve_model(args.model_name, revision=args.model_revision)
        checkpoint = None
        if not args.process_index:
            note_weights(args, model_path)
            checkpoint = choose_checkpoint(args)
    chosen = [checkpoint, args.optimizer, args.batch_tokens]
    checkpoint, args.optimizer, args.batch_tokens = accelerate.utils.broadcast_object_list(chosen)
    tokenizer = inference.load_tokenizer(model_path)
    train_dataset, train_lengths = data.load_dataset(args.train_file, tokenizer, args.max_length)
    eval_dataset, eval_lengths = data.load_dataset(args.val_file, tokenizer, args.max_length)
    if not args.process_index:
        print(data.describe_tokens(args.train_file, train_lengths, args.max_length))
        print(data.describe_tokens(args.val_file, eval_lengths, args.max_length))
        print(data.describe_example(tokenizer, train_dataset[0]))
    if tokenizer.convert_tokens_to_ids("</think>") not in train_dataset[0]["labels"]:
        raise SystemExit(f"错误：{args.model_name} 的对话模板不写思考；请换一个会思考的模型，例如 {data.MODEL_NAME}。")
    transformers.set_seed(args.seed)  # the adapter's first weights are drawn before Trainer sets it
    with inference.explain_out_of_memory(OUT_OF_MEMORY):
        model = inference.load_weights(model_path, args.device, getattr(args, "load_in_4bit", False))
        model.config.pad_token_id = tokenizer.pad_token_id  # Trainer would set it too, with a long warning
        model = wrap_model(model, args)
        trainer = build_trainer(args, model, tokenizer, train_dataset, eval_dataset)
        start_tracking(args, checkpoint)
        begin_run(args, checkpoint)
        with Interruption(trainer):
            trainer.train(resume_from_checkpoint=checkpoint)
        save_results(trainer, tokenizer, finish)
    if not args.process_index:
        questions = [row["question"] for row in data.read_examples(args.val_file)[:SAMPLES]]
        with inference.explain_out_of_memory(
            f"错误：显存不足，没有示例回复；但训练已经完成，模型在 {args.output_dir}。"
        ):
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
