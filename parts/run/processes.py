"""The processes of one training, on one machine or on several: that they agree, that they see one output folder, and
what is said when one is gone. It knows what torchrun and accelerate tell a process, not what is trained."""

import contextlib
import os
import time
from datetime import timedelta
from pathlib import Path

from parts.terminal import is_out_of_memory, shorten

SHOWN_LATE = 30  # seconds after which a network's file system shows a new file
LOST = (
    "gloo",
    "connection closed by peer",
    "connection reset by peer",
)  # in what torch says where one is gone


def agree(facts: dict | None) -> None:
    """Raise SystemExit in all processes where one has other `facts` than the first one; with None it has none to tell.
    All call this together."""
    from accelerate.utils import gather_object

    all_facts = gather_object([facts])
    for rank, others in enumerate(all_facts):
        for name in others or ():
            if others[name] != all_facts[0].get(name):
                first, other = (shorten(str(of.get(name)), 80) for of in (all_facts[0], others))
                values = f"进程 0 是 {first}，进程 {rank} 是 {other}"
                end_all(f"各个进程的 {name} 不同：{values}；请让每台机器上的命令、文件和软件都一样")


def require_shared(file: Path) -> None:
    """Raise SystemExit where another machine does not see this file as the first process wrote it: what is in its
    folder is written by that one, and read by all."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    state = PartialState()
    if state.num_processes == int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return
    [text] = broadcast_object_list([file.read_text(encoding="utf-8") if state.is_main_process else None])
    end, seen = time.monotonic() + SHOWN_LATE, False
    while (
        not (seen := file.is_file() and file.read_text(encoding="utf-8") == text) and time.monotonic() < end
    ):
        time.sleep(0.5)
    all_seen = gather_object([seen])
    if not all(all_seen):
        unseen = f"进程 {all_seen.index(False)} 的机器看不到进程 0 写在 {file.parent} 里的文件"
        end_all(f"{unseen}；几台机器要有一个共享的文件夹，请用 --output_dir 写它的路径")


def end_all(message: str) -> None:
    """End this process as all others are ended; the first one says why."""
    from accelerate import PartialState

    raise SystemExit(f"错误：{message}。" if PartialState().is_main_process else 1)


def is_lost(error: RuntimeError) -> bool:
    """Whether it says that another process does not answer. NCCL's errors may also tell of this one's memory."""
    from torch.distributed import DistError

    said = isinstance(error, DistError) or any(words in str(error).lower() for words in LOST)
    return said and not is_out_of_memory(error)


def is_first_to_leave() -> bool:
    """Whether no other process has ended with an error of its own, or has said so of another."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5)).add("lost", 1) == 1
    except RuntimeError:  # the store was that process's, or torchrun's, which ends
        return os.environ.get("LOCAL_RANK") == "0"


@contextlib.contextmanager
def explain_loss(message: str):
    """Turn what torch raises where another process has ended into `message`, said by the first one that notices, if
    that other one has not said why it ended."""
    from accelerate import PartialState

    several = PartialState().num_processes > 1
    try:
        yield
    except SystemExit as ended:
        if several and ended.code:
            is_first_to_leave()
        raise
    except RuntimeError as error:
        if not several or not is_lost(error):
            raise
        raise SystemExit(message if is_first_to_leave() else 1) from None
