"""What libraries and the driver read from a process's environment once, when they start. Knows no flag."""

import os
import platform
import sys

ALLOCATOR = "PYTORCH_ALLOC_CONF"  # and its older names, which torch still reads
ALLOCATORS = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def prepare() -> None:
    """To be called before torch is imported: with it come others (bitsandbytes, torchao) whose import starts CUDA. What
    the user has set stays."""
    # Less is lost between blocks of memory. Windows has no such segments, and under WSL drivers before R615 crash at
    # the first one (pytorch#192330).
    if sys.platform == "linux" and "microsoft" not in platform.release().lower():
        if not any(name in os.environ for name in ALLOCATORS):
            os.environ[ALLOCATOR] = "expandable_segments:True"
    # Without torchrun Trainer would spread one process over all GPUs with DataParallel, slower than one of them.
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.pop("SWANLAB_DEBUG", None)  # it would write a stored key into a log
