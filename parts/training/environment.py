"""What is around a training: the environment variables that libraries read once, when they start; which
versions are installed; the graphics card, its driver, and what keeps torch from it. It knows no flag, and
imports torch only where it is asked about a card."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

# The setting of torch's allocator, and its older names, which torch still reads
ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# Those that every training uses, and that are noted beside its numbers
DECISIVE = ("torch", "transformers", "peft", "accelerate", "datasets", "modelscope-hub", "swanlab")
# With those that only some cards or flags need
LIBRARIES = (*DECISIVE, "liger-kernel", "torch-optimi", "triton", "torchao", "bitsandbytes")
ON_CPU = "如果确实要用 CPU 训练，请加 --use_cpu true"


def prepare() -> None:
    """Set what libraries read at their start. This has to be called before torch is imported: with it come
    others (bitsandbytes, torchao) whose import starts CUDA. What the user has set stays."""
    # Less is lost between blocks of memory. Windows has no such segments, and under WSL drivers before R615
    # crash at the first one (pytorch#192330).
    linux = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if linux and not any(name in os.environ for name in ALLOCATORS):
        os.environ[ALLOCATORS[0]] = "expandable_segments:True"
    # Without torchrun Trainer would spread one process over all GPUs (DataParallel), slower than one.
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.pop("SWANLAB_DEBUG", None)  # it would write a stored key into a log


def versions(names: tuple[str, ...] = DECISIVE) -> dict[str, str]:
    """Return {name: version} of those libraries that are installed."""
    installed = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def ask_driver(*flags: str) -> str | None:
    """Return what nvidia-smi answers, or None where there is no such program, or no card."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    answer = subprocess.run([program, *flags], capture_output=True, encoding="utf-8", errors="replace")
    return None if answer.returncode else answer.stdout.strip()


def unused_card() -> str | None:
    """Return what keeps torch from an NVIDIA card that is there, as its driver says, and was not hidden; else
    None."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    listed = ask_driver("-L") or ""
    if hidden or not listed.startswith("GPU "):
        return None
    card = listed.splitlines()[0].split(" (UUID")[0]
    reason = f"它需要支持 CUDA {torch.version.cuda} 的驱动，请升级驱动，或按 PyTorch 网站换一个 CUDA 版本"
    if torch.version.cuda is None:  # as is what pip installs on Windows
        reason = "它是只支持 CPU 的版本，请按 PyTorch 网站上的命令安装 CUDA 版"
    return f"有显卡（{card}），但 torch {torch.__version__} 用不了：{reason}；{ON_CPU}"


def unusable(device, memory_gb: float | None) -> str | None:
    """Return why this card cannot be trained on: this torch was not built for it, and its first kernel would
    fail, or it does not have the `memory_gb` that it is to plan with; else None."""
    import torch

    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_properties(device)
    size = card.total_memory / 1e9
    if memory_gb and memory_gb > size:
        return f"--memory_gb {memory_gb}：这张卡只有 {size:.1f} GB"
    # The list of architectures alone does not tell: what is built for sm_80 runs on sm_86 too.
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        if "no kernel image" not in str(error) and "not compatible" not in str(error):
            raise
        built = " ".join(torch.cuda.get_arch_list())
        reason = f"没有为这张卡（{card.name}，sm{card.major}{card.minor}）编译，只支持 {built}"
        return f"torch {torch.__version__} {reason}；请按 PyTorch 网站的说明换一个版本；{ON_CPU}"
    return None


def describe_card(device) -> str:
    """Return the card, its memory in GB and its driver in one line; without a card, the device."""
    import torch

    if device.type != "cuda":
        kind = "GPU" if device.type == "cpu" else "NVIDIA 或 AMD 的 GPU"
        return f"没有 {kind}，用 {device.type}（{os.cpu_count()} 核）"
    card = torch.cuda.get_device_properties(device)
    driver = ask_driver("--query-gpu=driver_version", "--format=csv,noheader") or "未知"
    name = f"{card.name}，{card.total_memory / 1e9:.1f} GB，sm{card.major}{card.minor}"
    return f"{name}，驱动 {driver.splitlines()[0]}，torch 的 CUDA {torch.version.cuda or torch.version.hip}"
