"""What is around a training: the environment variables that libraries read once, when they start; which versions are
installed; the graphics card, its driver, and what keeps torch from it. Knows no flag; imports torch only when asked."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

ALLOCATOR = "PYTORCH_ALLOC_CONF"  # and its older names, which torch still reads
ALLOCATORS = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
DECISIVE = ("torch", "transformers", "peft", "accelerate", "datasets", "modelscope-hub", "swanlab")
OPTIONAL = ("liger-kernel", "torch-optimi", "triton", "torchao", "bitsandbytes")  # only some cards or flags need them
ON_CPU = "如果确实要用 CPU 训练，请加 --use_cpu true"


def prepare() -> None:
    """Set what libraries read at their start. It has to be called before torch is imported: with it come others
    (bitsandbytes, torchao) whose import starts CUDA. What the user has set stays."""
    # Less is lost between blocks of memory. Windows has no such segments, and under WSL drivers before R615 crash at
    # the first one (pytorch#192330).
    if sys.platform == "linux" and "microsoft" not in platform.release().lower():
        if not any(name in os.environ for name in ALLOCATORS):
            os.environ[ALLOCATOR] = "expandable_segments:True"
    # Without torchrun Trainer would spread one process over all GPUs with DataParallel, slower than one of them.
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.pop("SWANLAB_DEBUG", None)  # it would write a stored key into a log


def versions() -> dict[str, str]:
    """Those libraries that decide a training, {name: version}."""
    return {name: importlib.metadata.version(name) for name in DECISIVE}


def optional_versions() -> dict[str, str]:
    """Those libraries of OPTIONAL that are installed, {name: version}."""
    installed = {}
    for name in OPTIONAL:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def ask_driver(*flags: str) -> str | None:
    """What nvidia-smi answers; None where there is none, or no card."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    answer = subprocess.run([program, *flags], capture_output=True, encoding="utf-8", errors="replace")
    return None if answer.returncode else answer.stdout.strip()


def unused_card() -> str | None:
    """What keeps torch from an NVIDIA card that is there, as its driver says, and was not hidden; else None."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    listed = None if hidden else ask_driver("-L")
    if not listed or not listed.startswith("GPU "):
        return None
    card = listed.splitlines()[0].split(" (UUID")[0]
    why = f"它要支持 CUDA {torch.version.cuda} 的驱动，请升级驱动，或照 PyTorch 网站上的命令装别的 CUDA 版本"
    if torch.version.cuda is None:
        why = "它是只有 CPU 的版本，请照 PyTorch 网站上的命令装 CUDA 版"
    return f"有显卡（{card}），但 torch {torch.__version__} 用不了：{why}；{ON_CPU}"


def no_kernels(device) -> str | None:
    """What is wrong when this torch was not built for the card: its first kernel would fail. None when it was."""
    import torch

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
            f"它只有 {' '.join(torch.cuda.get_arch_list())}；请照 PyTorch 网站装另一个版本；{ON_CPU}"
        )
    return None


def too_small(device, memory_gb: float | None) -> str | None:
    """That the card does not have the memory which it is to plan with, or None."""
    import torch

    if not memory_gb or device.type != "cuda":
        return None
    size = torch.cuda.get_device_properties(device).total_memory / 1e9
    return f"--memory_gb {memory_gb}：这张卡只有 {size:.1f} GB" if memory_gb > size else None


def describe_card(device) -> str:
    """The card, its memory and driver, in one line."""
    import torch

    if device.type != "cuda":
        kind = "GPU" if device.type == "cpu" else "NVIDIA 或 AMD 的 GPU"
        return f"没有 {kind}，用 {device.type}（{os.cpu_count()} 核）"
    properties = torch.cuda.get_device_properties(device)
    driver = ask_driver("--query-gpu=driver_version", "--format=csv,noheader") or "未知"
    return (
        f"{properties.name}，{properties.total_memory / 1e9:.1f} GB，sm{properties.major}{properties.minor}，"
        f"驱动 {driver.splitlines()[0]}，torch 的 CUDA {torch.version.cuda or torch.version.hip}"
    )
