"""The processes of one training, on one machine or on several: that they agree, that they see one output
folder, and what is said when one is gone. It knows what torchrun and accelerate tell a process, not what is
trained."""

import contextlib
import os
import time
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from parts.terminal import is_out_of_memory, shorten

SHOWN_LATE = 30  # seconds after which a network's file system shows a new file
# Words in what torch raises where another process is gone: gloo has no class of errors for it.
LOST = ("gloo", "connection closed by peer", "connection reset by peer")


def agree(facts: dict | None) -> None:
    """Raise SystemExit in all processes where one has other `facts` than the first one; with None it has none
    to tell. All call this together."""
    # Asked before anything is written: with other data or flags the processes would train on without an
    # error, and with gradients of different runs.
    all_facts = gather_object([facts])
    expected = all_facts[0]
    for rank, own in enumerate(all_facts):
        for name in own or ():
            if own[name] != expected.get(name):
                first, other = shorten(str(expected.get(name)), 80), shorten(str(own[name]), 80)
                values = f"进程 0 是 {first}，进程 {rank} 是 {other}"
                end_all(f"各个进程的 {name} 不同：{values}；请让每台机器上的命令、文件和软件都一样")


def require_shared(file: Path) -> None:
    """Raise SystemExit where another machine does not see `file` as the first process wrote it: what is in
    its folder is written by that process, and read by all. All call this together."""
    state = PartialState()
    # The processes of one machine share its disk.
    if state.num_processes == int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return
    # The content is compared, as a file of that name may be left there by an earlier run.
    [text] = broadcast_object_list([file.read_text(encoding="utf-8") if state.is_main_process else None])
    end = time.monotonic() + SHOWN_LATE
    while True:
        seen = file.is_file() and file.read_text(encoding="utf-8") == text
        if seen or time.monotonic() >= end:
            break
        time.sleep(0.5)
    all_seen = gather_object([seen])
    if not all(all_seen):
        unseen = f"进程 {all_seen.index(False)} 的机器看不到进程 0 写在 {file.parent} 里的文件"
        end_all(f"{unseen}；多台机器要共享一个文件夹，请用 --output_dir 写它的路径")


def end_all(message: str) -> None:
    """End this process as all others are ended; the first one says why."""
    raise SystemExit(f"错误：{message}。" if PartialState().is_main_process else 1)


def is_lost(error: RuntimeError) -> bool:
    """Tell whether an error of torch says that another process does not answer."""
    from torch.distributed import DistError  # here and below: some builds of torch have none of it

    text = str(error).lower()
    lost = isinstance(error, DistError) or any(words in text for words in LOST)
    # NCCL reports this process's own lack of memory by the same class.
    return lost and not is_out_of_memory(error)


def is_first_to_leave() -> bool:
    """Tell whether no other process has ended with an error of its own, or has said so of another. This
    process is counted by asking."""
    from torch.distributed import TCPStore

    # torchrun's store, where add() is atomic: exactly one process gets 1, however many notice at once. The
    # group itself cannot be asked, as it is what has failed.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5)).add("lost", 1) == 1
    except RuntimeError:  # the store was that process's, or torchrun's, which ends
        return os.environ.get("LOCAL_RANK") == "0"


@contextlib.contextmanager
def explain_loss(message: str):
    """Turn what torch raises where another process has ended into SystemExit(`message`), which the first one
    that notices says, unless that other one has said itself why it ended."""
    several = PartialState().num_processes > 1
    try:
        yield
    except SystemExit as ended:
        # It says why itself. The others lose this process next, and are to keep silent.
        if several and ended.code:
            is_first_to_leave()
        raise
    except RuntimeError as error:
        if not several or not is_lost(error):
            raise
        raise SystemExit(message if is_first_to_leave() else 1) from None
