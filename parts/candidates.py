"""Models that get the same questions, one after another, each with a file of its own for its replies. Knows those
files; how a model is found and loaded is handed in."""

import gc
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from parts import checkpoints, question_file, reply_file
from parts.encoding import Reply
from parts.rows import Row

EARLIER = ".jsonl"  # what is compared with is a file of replies if its name ends so, else a model


class Kind(NamedTuple):
    """How a kind of model is found and loaded."""

    locate: Callable  # (name, revision) -> the local folder of its weights, or None for a hub's
    find: Callable  # (name, revision, thinking) -> what `load` takes; refuses what can be refused without the weights
    load: Callable  # (*what was found) -> (model, tokenizer)


class Candidate(NamedTuple):
    """Who answers, and where the replies are."""

    name: str  # of the model, or of an earlier file
    path: str
    by: dict | None = None  # what makes its replies, see reply_file; None: they were made before
    find: Callable | None = None
    load: Callable | None = None


class Answered(NamedTuple):
    """All replies of a candidate, in the order of the questions."""

    name: str
    path: str
    by: dict
    replies: list[Reply]


def beside(replies: str, name: str) -> str:
    """The file for the replies of another model, beside the first one's; an earlier file is its own."""
    if name.endswith(EARLIER):
        return name
    short = re.sub(r"[^\w.-]+", "-", "-".join(Path(name).parts[-2:])).strip("-.") or "other"
    return str(Path(replies).with_name(f"{Path(replies).stem}.{short}{EARLIER}"))


def check(rows: list[Row], replies: str, others: list[str]) -> None:
    """Raises SystemExit for files that cannot be written, or are no replies to these questions, or no whole ones to
    compare with, before anyone looks for a model."""
    reply_file.require_writable(replies)
    reply_file.read(replies, rows)
    paths = [beside(replies, name) for name in others]
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise SystemExit(f"错误：--compare_with {' '.join(others)}：有两个是同一个，或名字太像；请去掉一个。")
    for name, path in zip(others, paths):
        if not name.endswith(EARLIER):
            reply_file.require_writable(path)
            reply_file.read(path, rows)
        elif not os.path.isfile(path):
            raise SystemExit(f"错误：找不到 --compare_with {name}；请检查路径。")
        elif os.path.realpath(path) != os.path.realpath(replies):  # that one will be whole when it is its turn
            if len(found := reply_file.read(name, rows, flag="--compare_with").replies) < len(rows):
                raise SystemExit(
                    f"错误：--compare_with {name} 只有 {len(found)} 条回复，而问题有 {len(rows)} 个；"
                    "请先用写它的命令答完。"
                )


def candidate(kind: Kind, name: str, revision: str | None, path: str, settings: dict) -> Candidate:
    """The model `name`, asked with `settings` (those of reply_file.FLAGS), its replies in `path`; or an earlier
    file."""
    if name == path:
        return Candidate(name, path)
    folder = kind.locate(name, revision)
    by = {"model": name if revision is None else f"{name}@{revision}"}
    by["weights"] = checkpoints.weights_sha256(folder)[:16] if folder else None
    # What was found is what is loaded: a training that goes on may write a better checkpoint meanwhile.
    find = partial(kind.find, str(folder or name), revision, not settings["no_thinking"])
    return Candidate(name, path, by | settings, find, kind.load)


def answer(rows: list[Row], candidates: list[Candidate], begin: Callable) -> list[Answered]:
    """The replies of all. Those models of which some are missing are loaded one after another, and all that can be
    refused is, before the first one is. `begin(model, tokenizer)` gives what question_file asks."""
    found = {}
    for each in candidates:
        if each.by and len(reply_file.read(each.path, rows, each.by).replies) < len(rows):
            found[each.path] = each.find()
    answered = []
    for each in candidates:
        if each.by:
            start = partial(load, each, found.get(each.path), begin)
            replies = question_file.answer(rows, each.path, each.by, start)
            answered.append(Answered(each.name, each.path, each.by, replies))
        else:
            earlier = reply_file.read(each.path, rows, flag="--compare_with")
            replies = [earlier.replies[place] for place in range(len(rows))]
            answered.append(Answered(each.name, each.path, earlier.by, replies))
        if each.path in found:
            free_memory()
    return answered


def load(each: Candidate, found: tuple, begin: Callable):
    """What question_file asks of a candidate."""
    return begin(*each.load(*found))


def free_memory() -> None:
    """Let go of what the model held that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
