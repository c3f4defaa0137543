"""--fsdp and --deepspeed, and the flags that do not go with a model that is cut among processes. Knows names and the
environment of a launcher, not how a model is cut."""

import os

from parts.terminal import shorten

WHY = {  # why these are refused
    "4 位的权重不能分片": "load_in_4bit",
    "分片时没有试过编译": "torch_compile torch_compile_backend torch_compile_mode",
    "分片的模型用自己的损失": "full_logits label_smoothing_factor",
    "分片时没有试过": "neftune_noise_alpha use_liger_kernel",
    "分片的权重按自己的精度算": "bf16 fp16",
    "分片时没有 DistributedDataParallel": (
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph"
    ),
    "分片时评估不生成样例，训练完才有": "eval_samples",
}
REFUSED = {name: why for why, names in WHY.items() for name in names.split()}
OPTIM = ("adamw_torch", "adamw_torch_fused")  # seen to give one process's weights


def asks(name: str, value) -> bool:
    """What --fsdp or --deepspeed says. Raises ValueError for a configuration, and for the names of FSDP1 that
    transformers still knows."""
    if str(value).lower() in ("true", "1", "yes"):
        return True
    if value is None or str(value).lower() in ("", "false", "0", "no", "[]"):
        return False
    raise ValueError(f"--{name} {shorten(str(value), 80)}：只能是 true 或 false")


def refuse(args, given: set[str]) -> None:
    """Raises ValueError for what does not go with --fsdp or --deepspeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" and "LOCAL_RANK" in os.environ:
        raise ValueError("--deepspeed true 就够了；请去掉 accelerate launch 的 DeepSpeed 设置（--use_deepspeed）")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and "LOCAL_RANK" in os.environ:
        raise ValueError("--fsdp true 就够了；请去掉 accelerate launch 的 FSDP 设置（--use_fsdp 或配置文件）")
    if not (flag := args.sharded):
        return
    if args.fsdp and args.deepspeed:
        raise ValueError("--deepspeed 不能和 --fsdp 一起用：两者都把模型分给几张卡，请只写一个")
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        command = f"torchrun --nproc_per_node 2 train.py --{flag} true"
        raise ValueError(f"--{flag}：模型分给几张卡，要用 torchrun 启动：{command}")
    for name in sorted(name for name in given & REFUSED.keys() if getattr(args, name)):
        raise ValueError(f"--{name} 不能和 --{flag} 一起用：{REFUSED[name]}")
    for name in sorted(given & {"optimizer", "optim", "optim_args", "optim_target_modules"} if args.deepspeed else ()):
        raise ValueError(f"--{name} 不能和 --deepspeed 一起用：它的优化器在 CPU 的内存里，是 float32 的 AdamW")
    if str(args.optimizer).endswith("in_backward"):
        raise ValueError(f"--optimizer {args.optimizer} 不能和 --{flag} 一起用：分片的梯度要等各张卡加起来才能更新")
    if args.optimizer == "8bit":
        raise ValueError(f"--optimizer 8bit 不能和 --{flag} 一起用：没有看到过它在分片的权重上算对")
    optim = getattr(args.optim, "value", args.optim)
    if optim not in OPTIM:
        raise ValueError(f"--optim {optim} 不能和 --{flag} 一起用：只有 {'、'.join(OPTIM)}")
