"""The processes of one training, on one machine or on several: that all come and agree, in which order they fetch
files, and what is said when one is gone. Knows what torchrun and accelerate tell a process, not what is trained."""

import contextlib
import functools
import json
import os
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from parts.terminal import first_line, is_out_of_memory

MEETING = 300  # seconds in which all processes have to come
SHOWN_LATE = 30  # seconds after which a network's file system shows a new file
LOST = ("gloo", "connection closed by peer", "connection reset by peer")  # in what torch says where one is gone
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def count() -> int:
    """How many there are; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else 1


@functools.cache  # kept as long as the process: others may still read what the first one holds for all
def open_store():
    """What torch has all processes share before they are a group: keys and values."""
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=MEETING)))
    return store


class Start(NamedTuple):
    """One start of all processes together."""

    name: str  # of its keys in that store, where a restart by torchrun finds what was said before
    again: bool  # they were started before, with the same store


started: Start | None = None  # this one, once all have met


def assemble(store, facts: str) -> tuple[Start, list[dict]]:
    """This start, and the facts of all. The first process gives it a name, and waits until all have told theirs under
    it; each other one tells its own until it is among those that were heard, as the name that it finds may be an
    earlier one's. torchrun's count of restarts would not do: each machine has its own."""
    rank, mine, end = int(os.environ["RANK"]), uuid.uuid4().hex, time.monotonic() + MEETING
    if rank == 0:
        again = store.add("starts", 1) > 1
        store.set("start", mine)
        heard = [[mine, facts], *(json.loads(store.get(f"{mine} {each}")) for each in range(1, count()))]
        store.set(f"{mine} heard", json.dumps([again, heard]))
        return Start(mine, again), [json.loads(of) for _, of in heard]
    while time.monotonic() < end:
        name = store.get("start").decode()
        store.set(f"{name} {rank}", json.dumps([mine, facts]))
        if store.check([f"{name} heard"]):
            again, heard = json.loads(store.get(f"{name} heard"))
            if heard[rank][0] == mine:
                return Start(name, again), [json.loads(of) for _, of in heard]
        time.sleep(0.1)
    raise TimeoutError("first process did not answer")


def meet(facts: dict[str, object], timeout: float, backend: str) -> None:
    """Wait until all processes are here, and have the same `facts`, {name: value as JSON has it}. Raises ValueError,
    the same in all of them. Before they are a group: that could not be made of a GPU and a CPU, and would be waited for
    much longer. After a restart they are one, of this `backend` and `timeout` in seconds: made as usual, it would take
    the addresses of processes that are gone from the store, and wait."""
    global started
    from torch.distributed import DistError, PrefixStore, init_process_group

    try:
        started, all_facts = assemble(store := open_store(), json.dumps(facts, default=str))
    except (DistError, TimeoutError) as error:
        raise ValueError(
            f"等了 {MEETING} 秒，{count()} 个进程没有到齐（{first_line(error)[:120]}）；"
            "请检查每台机器上的命令，和它们之间的网络"
        ) from None
    if why := describe_difference(all_facts):
        raise ValueError(why)
    if started.again:
        own, seconds = PrefixStore(f"{started.name} group", store), timedelta(seconds=timeout)
        own.set_timeout(seconds)
        rank = int(os.environ["RANK"])
        init_process_group(backend, store=own, rank=rank, world_size=count(), timeout=seconds)


def restarted() -> bool:
    """Whether torchrun has started these processes before."""
    return bool(started and started.again)


def describe_difference(all_facts: list[dict | None]) -> str | None:
    """In what a process differs from the first one, in a sentence; None where all agree, or say nothing."""
    first = all_facts[0]
    for rank, facts in enumerate(all_facts):
        if changed := [name for name in facts or () if facts[name] != first.get(name)]:
            name = changed[0]
            values = "，".join(f"进程 {i} 是 {str(of.get(name))[:80]}" for i, of in ((0, first), (rank, facts)))
            return f"各个进程的 {name} 不同：{values}；请让每台机器上的命令、文件和软件都一样"
    return None


def agree(args, facts: dict | None) -> None:
    """Raises SystemExit, which the first process explains, where processes have other `facts`; None: none to tell."""
    from accelerate.utils import gather_object

    if args.world_size > 1 and (why := describe_difference(gather_object([facts]))):
        raise SystemExit(1 if args.process_index else f"错误：{why}。")


@contextlib.contextmanager
def in_turns(args):
    """The first process, then the first one of each other machine, then all others: files are fetched and written once
    for each machine, and by one at a time where machines share them."""
    from accelerate import PartialState

    state = PartialState()
    turn = (args.process_index > 0) + (args.local_process_index > 0)
    for _ in range(turn):
        state.wait_for_everyone()
    yield
    for _ in range(turn, 2):
        state.wait_for_everyone()


def require_shared(args, file: Path) -> None:
    """Raises SystemExit where another machine does not see this file as the first process wrote it: what is in its
    folder is written by that one, and read by all."""
    if args.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return
    from accelerate.utils import broadcast_object_list, gather_object

    text = broadcast_object_list([None if args.process_index else file.read_text(encoding="utf-8")])[0]
    end, seen = time.monotonic() + SHOWN_LATE, False
    while not (seen := file.is_file() and file.read_text(encoding="utf-8") == text) and time.monotonic() < end:
        time.sleep(0.5)
    if not all(found := gather_object([seen])):
        said = (
            f"错误：进程 {found.index(False)} 的机器看不到进程 0 写在 {file.parent} 里的文件；"
            "几台机器要有一个共享的文件夹，请用 --output_dir 写它的路径。"
        )
        raise SystemExit(1 if args.process_index else said)


def is_lost(error: RuntimeError) -> bool:
    """Whether it says that another process does not answer. NCCL's errors may also tell of this one's memory."""
    from torch.distributed import DistError

    said = isinstance(error, DistError) or any(words in str(error).lower() for words in LOST)
    return said and not is_out_of_memory(error)


def is_first_to_leave() -> bool:
    """Whether no other process has ended with an error of its own, or has said so of another."""
    try:
        return open_store().add(f"{started.name if started else ''} lost", 1) == 1
    except RuntimeError:  # the store was that process's, or torchrun's, which ends
        return os.environ.get("LOCAL_RANK") == "0"


@contextlib.contextmanager
def explain_loss(args, message: str):
    """Turn what torch raises where another process has ended into `message`, said by the first one that notices, if
    that other one has not said why it ended."""
    try:
        yield
    except SystemExit as ended:
        if args.world_size > 1 and ended.code:
            is_first_to_leave()
        raise
    except RuntimeError as error:
        if args.world_size == 1 or not is_lost(error):
            raise
        raise SystemExit(message if is_first_to_leave() else 1) from None
