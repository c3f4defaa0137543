"""The graphics card of this machine, its driver, and what keeps torch from it. Knows nothing of what it is to do."""

import os
import shutil
import subprocess

import torch


def ask_driver(*flags: str) -> str | None:
    """What nvidia-smi answers; None where there is none, or no card."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    answer = subprocess.run([program, *flags], capture_output=True, encoding="utf-8", errors="replace")
    return None if answer.returncode else answer.stdout.strip()


def unused() -> str | None:
    """What keeps torch from an NVIDIA card that is there, as its driver says, and was not hidden; else None."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or not (listed := ask_driver("-L")) or not listed.startswith("GPU "):
        return None
    card = listed.splitlines()[0].split(" (UUID")[0]
    why = f"它要支持 CUDA {torch.version.cuda} 的驱动，请升级驱动，或装旧一些的 torch"
    if torch.version.cuda is None:
        why = "它是只有 CPU 的版本，请照 PyTorch 网站上的命令装 CUDA 版"
    return f"有显卡（{card}），但 torch {torch.__version__} 用不了：{why}；就要在 CPU 上训练，请加 --use_cpu true"


def no_kernels(device: torch.device) -> str | None:
    """What is wrong when this torch was not built for the card: its first kernel would fail. None when it was."""
    if device.type != "cuda" or torch.version.hip:
        return None
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        if "no kernel image" not in str(error) and "not compatible" not in str(error):
            raise
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"torch {torch.__version__} 没有为这张卡（{torch.cuda.get_device_name(device)}，sm{major}{minor}）编译，"
            f"它只有 {' '.join(torch.cuda.get_arch_list())}；请照 PyTorch 网站装另一个版本，"
            "就要在 CPU 上训练，请加 --use_cpu true"
        )
    return None


def too_small(device: torch.device, memory_gb: float | None) -> str | None:
    """That the card does not have the memory which it is to plan with, or None."""
    if not memory_gb or device.type != "cuda":
        return None
    size = torch.cuda.get_device_properties(device).total_memory / 1e9
    return f"--memory_gb {memory_gb}：这张卡只有 {size:.1f} GB" if memory_gb > size else None


def describe(device: torch.device) -> str:
    """The card, its memory and driver, in one line."""
    if device.type != "cuda":
        kind = "GPU" if device.type == "cpu" else "NVIDIA 或 AMD 的 GPU"
        return f"没有 {kind}，用 {device.type}（{os.cpu_count()} 核）"
    properties = torch.cuda.get_device_properties(device)
    driver = ask_driver("--query-gpu=driver_version", "--format=csv,noheader") or "未知"
    return (
        f"{properties.name}，{properties.total_memory / 1e9:.1f} GB，sm{properties.major}{properties.minor}，"
        f"驱动 {driver.splitlines()[0]}，torch 的 CUDA {torch.version.cuda or torch.version.hip}"
    )
