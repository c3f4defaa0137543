"""The flags of a training: a plain table, read by argparse before torch is imported, so that `--help` and a
wrong flag answer at once; what cannot be meant is refused here too. It knows no recipe: its numbers are
handed in by the scripts."""

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from parts import terminal

# The names are repeated here, and a test compares them: the table with their bytes would import torch.
OPTIMIZERS = ("kahan", "8bit", "8bit_in_backward", "adamw")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial")


# What launchers set: torchrun all of the first, mpirun and srun one of the second, with a number above 1.
LAUNCHER = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT".split()
SIZES = "WORLD_SIZE OMPI_COMM_WORLD_SIZE PMI_SIZE MV2_COMM_WORLD_SIZE SLURM_STEP_NUM_TASKS".split()


class Limit(NamedTuple):
    """What a number may be."""

    allows: Callable[[float], bool]
    words: str


ABOVE_0 = Limit(lambda value: 0 < value < math.inf, "大于 0 的数")
FROM_0 = Limit(lambda value: 0 <= value < math.inf, "不小于 0 的数")
SHARE = Limit(lambda value: 0 <= value < 1, "从 0 到 1（不含 1）的数")
SEED = Limit(lambda value: 0 <= value < 2**32, f"从 0 到 {2**32 - 1} 的整数")  # numpy takes no larger one


class Flag(NamedTuple):
    """One line of the table."""

    name: str
    kind: type | tuple[str, ...]  # what argparse reads, or the words that may be chosen from
    help: str
    limit: Limit | None = None


TABLE = (  # under the headings of --help
    "数据",
    Flag("train_file", str, "训练集，由 data.py 写出"),
    Flag("val_file", str, "验证集，由 data.py 写出"),
    Flag("max_length", int, "一条样本最多多少个 token，更长的会被跳过", ABOVE_0),
    "模型",
    Flag("model_name", str, "ModelScope 模型名、hf://owner/name 或本地文件夹"),
    Flag("model_revision", str, "hub 上模型的分支、标签或提交"),
    "训练",
    Flag("learning_rate", float, "学习率", ABOVE_0),
    Flag("lr_scheduler_type", SCHEDULERS, "学习率的变化方式（默认 linear）"),
    Flag("warmup_steps", float, "预热多少步；小于 1 时是占总步数的比例（默认 0）", FROM_0),
    Flag("weight_decay", float, "权重衰减（默认 0）", FROM_0),
    Flag("max_grad_norm", float, "梯度裁剪的范数，0 为不裁剪（默认 1）", FROM_0),
    Flag("adam_beta2", float, "AdamW 的 beta2（默认 0.999）", SHARE),
    Flag("num_train_epochs", float, "训练几轮", ABOVE_0),
    Flag("max_steps", int, "训练多少步，设置后忽略轮数", ABOVE_0),
    Flag("per_device_train_batch_size", int, "每张卡每次取多少条样本", ABOVE_0),
    Flag("gradient_accumulation_steps", int, "梯度累积几次", ABOVE_0),
    Flag("early_stopping_patience", int, "连续几次评估没有改善就提前停止，0 为不提前停止", FROM_0),
    Flag("seed", int, "随机种子", SEED),
    "显存与速度",
    Flag("memory_gb", float, "按多少 GB 显存规划（默认用全部空闲显存）", ABOVE_0),
    Flag("batch_tokens", int, "一次最多算多少个 token（默认按显存规划）", ABOVE_0),
    Flag("checkpoint_every", int, "每几层重算一层，0 不重算，1 全部重算（默认按显存规划）", FROM_0),
    Flag("offload_activations", bool, "重算的层的输入放到内存（默认按显存规划）"),
    Flag("optimizer", OPTIMIZERS, "bfloat16 权重的优化器（默认按显存规划）"),
    Flag("fast_kernels", bool, "使用本机可用的快速算子和 CUDA graph（默认 true）"),
    Flag("full_logits", bool, "用 transformers 自带的损失，仅供对比（默认 false）"),
    Flag("check", bool, "只检查这台机器能否训练、速度如何，不训练"),
    Flag("rehearse", bool, "训练前先预演最大的一步（默认有 GPU 时预演）"),
    Flag("use_cpu", bool, "有 GPU 也用 CPU"),
    "保存与继续",
    Flag("output_dir", str, "模型和检查点所在的文件夹；再次运行同一命令就会继续"),
    Flag("overwrite_output_dir", bool, "删除该文件夹里训练完的模型，重新训练"),
    Flag("resume_from_checkpoint", str, "从这个检查点继续（默认最近的完整检查点）"),
    Flag("save_steps", int, "每多少步保存一次；0（默认）为评估时看时间，保存最多占训练的 1/20", FROM_0),
    Flag("save_total_limit", int, "最多保留几个检查点，最好的和最新的始终保留", ABOVE_0),
    "记录",
    Flag("eval_steps", int, "每多少步评估一次；不超过 100 步的训练默认评估 5 次", ABOVE_0),
    Flag("eval_on_start", bool, "训练前先评估一次"),
    Flag("eval_samples", int, "每次评估时回答几个验证集的问题，0 为不回答", FROM_0),
    Flag("sample_tokens", int, "示例回复最多多少个 token", ABOVE_0),
    Flag("logging_steps", int, "每多少步记录一次", ABOVE_0),
    Flag("report_to", ("swanlab", "tensorboard", "wandb", "none"), "记录到哪里"),
    Flag("run_name", str, "这次训练的名字（默认输出文件夹的名字）"),
    "多张 GPU",
    Flag("fsdp", bool, "每张卡只放模型的一部分（FSDP2，用 torchrun 启动）：一张卡放不下时用"),
    Flag("ddp_timeout", int, "最多等待其他进程多少秒（默认 7200）", ABOVE_0),
    "LoRA",
    Flag("adapter", str, "接着训练这个 LoRA（文件夹或 hub 上的名称）：秩、缩放、层和基础模型取自它"),
    Flag("lora_rank", int, "适配器矩阵的秩", ABOVE_0),
    Flag("lora_alpha", int, "缩放：alpha / rank", ABOVE_0),
    Flag("lora_dropout", float, "适配器输入的 dropout", SHARE),
    Flag("target_modules", list, "给哪些层加适配器，可写多个名字（默认 all-linear：所有线性层）"),
    Flag("use_rslora", bool, "缩放改为 alpha / sqrt(rank)（rsLoRA）"),
    Flag("use_dora", bool, "DoRA：方向和大小分开训练，慢一些"),
    Flag("load_in_4bit", bool, "QLoRA：冻结的权重用 4 位（NF4），需要 bitsandbytes"),
)
FLAGS = {row.name: row for row in TABLE if isinstance(row, Flag)}


def parse(description: str, recipe: Mapping[str, object]) -> dict[str, object]:
    """Return what the command line says, {flag: value}, and nothing of the `recipe`, to whose values it is
    added. A recipe with a `lora_rank` has the flags of LoRA too. Raises SystemExit with one sentence for a
    flag or value that cannot be meant."""
    parser = terminal.Parser(description=description, usage="%(prog)s [--flag value ...]")
    for row in TABLE:
        if row == "LoRA" and "lora_rank" not in recipe:  # the last heading: what follows is of adapters
            break
        if isinstance(row, str):  # as the first row is
            group = parser.add_argument_group(row)
        else:
            add_flag(group, row, recipe.get(row.name))
    remedy = "放不下时请用 --fsdp true（每张卡放一部分），或 python train_lora.py"
    parser.gone = {"--deepspeed": f"不再支持；{remedy}"}
    given = vars(parser.parse_args())
    if given.get("target_modules") == ["all-linear"]:  # peft would take a list for names of layers
        given["target_modules"] = "all-linear"
    values = {**recipe, **given}
    check(values)
    require_packages(values)
    terminal.say_loading()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # where another one never comes, one sees who is waited for
        print("等 {WORLD_SIZE} 个进程在 {MASTER_ADDR}:{MASTER_PORT} 会合".format_map(os.environ), flush=True)
    return given


def add_flag(group, flag: Flag, default: object) -> None:
    """Add one line of the table to an argparse group. What the user does not give is not in the result."""
    text = flag.help if default is None else f"{flag.help}（默认 {default}）"
    options = {"type": flag.kind, "help": text, "default": terminal.NOT_GIVEN, "metavar": ""}
    if isinstance(flag.kind, tuple):
        options["type"] = lambda word: terminal.one_of(flag.kind, word)
        options["help"] = f"{text}：{'、'.join(flag.kind)}"
    elif flag.kind is bool:
        # --check alone is --check true.
        options |= {"type": terminal.true_or_false, "nargs": "?", "const": True, "metavar": "true"}
    elif flag.kind is list:
        options |= {"type": str, "nargs": "+", "metavar": "NAME"}
    group.add_argument(f"--{flag.name}", **options)


def refuse(reason: str) -> None:
    """Raise SystemExit with one sentence, said once on each machine: it may be that machine's alone."""
    raise SystemExit(2 if os.environ.get("LOCAL_RANK", "0") != "0" else f"错误：{reason}。")


def check(values: Mapping[str, object]) -> None:
    """Raise SystemExit for numbers and folders with which training would fail late, or do nothing, and for
    flags that contradict each other. `values` by the flags' names; one that is missing or None was not
    set."""
    for name, flag in FLAGS.items():
        value = values.get(name)
        # Trainer's own word for a max_steps that is not set is -1.
        if flag.limit is None or value is None or (name, value) == ("max_steps", -1):
            continue
        if not flag.limit.allows(value):
            refuse(f"--{name} {value}：要一个{flag.limit.words}")
    optimizer = values.get("optimizer")
    if not values.get("output_dir", True):
        refuse("--output_dir 是空的")
    if values.get("warmup_steps") and values.get("lr_scheduler_type") == "constant":
        refuse("--warmup_steps：constant 不预热，constant_with_warmup 才预热")
    # 1 is Trainer's default, which no user need have asked for.
    if optimizer == "8bit_in_backward" and values.get("max_grad_norm", 1) not in (0, 1):
        refuse(f"--max_grad_norm：--optimizer {optimizer} 不裁剪梯度")
    checkpoint = values.get("resume_from_checkpoint")
    if checkpoint and not os.path.isdir(checkpoint):
        remedy = "不写这个参数，就会从最近的完整检查点继续"
        refuse(f"--resume_from_checkpoint {checkpoint}：没有这个文件夹；{remedy}")
    if values.get("offload_activations") and values.get("checkpoint_every") == 0:
        refuse("--offload_activations：没有要重算的层（--checkpoint_every 0），也就没有可放到内存的输入")
    check_launch(values)


def check_launch(values: Mapping[str, object]) -> None:
    """Raise SystemExit for a launcher that tells a process too little or would cut the model itself, and for
    what does not go with --fsdp."""
    launched = "LOCAL_RANK" in os.environ
    found = [name for name in SIZES if os.environ.get(name, "") not in ("", "0", "1")]
    lacking = [name for name in LAUNCHER if not os.environ.get(name)]
    # Each process would train alone, and all would write into one folder; or they would wait for each other.
    if (found or launched) and lacking:
        name = (*found, "LOCAL_RANK")[0]
        refuse(f"有环境变量 {name}={os.environ[name]}，却没有 {'、'.join(lacking)}；请用 torchrun，或去掉它")
    # What accelerate launch sets for its own --use_fsdp and --use_deepspeed
    cuts = [os.environ.get(f"ACCELERATE_USE_{name}", "").lower() for name in ("FSDP", "DEEPSPEED")]
    if launched and "true" in cuts:
        refuse(
            "请去掉 accelerate launch 的 --use_fsdp、--use_deepspeed；把模型分到几张卡上，只写 --fsdp true"
        )
    if not values.get("fsdp"):
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":
        refuse("--fsdp：模型分给几张卡，要用 torchrun 启动：torchrun --nproc_per_node 2 train.py --fsdp true")
    for name in ("load_in_4bit", "full_logits", "eval_samples"):
        if values.get(name):
            refuse(f"--{name} 不能和 --fsdp 一起用")
    if str(values.get("optimizer")).startswith("8bit"):
        refuse(f"--optimizer {values['optimizer']} 不能和 --fsdp 一起用")


def require_packages(values: Mapping[str, object]) -> None:
    """Raise SystemExit where a package that was asked for is not installed. This is asked of a command only:
    plans for another machine can be made without them."""
    optimizer, tracker = str(values.get("optimizer")), values.get("report_to")
    wanted = {"bitsandbytes": values.get("load_in_4bit") and "--load_in_4bit"}
    wanted["torchao"] = optimizer.startswith("8bit") and f"--optimizer {optimizer}"
    wanted[tracker] = tracker in ("tensorboard", "wandb") and f"--report_to {tracker}"
    for package, flag in wanted.items():
        if flag and importlib.util.find_spec(package) is None:
            refuse(f"{flag} 要用 {package}；请先运行 pip install {package}")
