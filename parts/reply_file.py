"""A file of replies, a line of JSON each: appended as they come, so that what was interrupted goes on where it stopped,
and at the end in the order of the questions. Each line says what made it. Loses nothing that is there, mixes nothing,
and knows no model."""

import contextlib
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from parts import row_files
from parts.encoding import FORMS, Reply
from parts.rows import Row

REPLY = ("think", "answer", "complete", "form", "tokens", "seconds")  # of a line: the fields of a Reply, in its order
TYPES = dict(zip(("question", *REPLY), (str, str, str, bool, str, int, float | int)))
LINE_START = b'{"question": "'
FLAGS = {name: f"--{name}" for name in ("no_thinking", "max_new_tokens", "seed")}  # of `by`, beside the model
RESULTS = (".scores.json", ".scores.html")  # ends of what lies beside a file of replies: scores, and the page
REMEDY = {
    "--replies": "它不会被改写，请移走它，或用 --replies 换一个文件名。",
    "--compare_with": "请换一个文件。",
}


class Found(NamedTuple):
    """What a file has of the replies to certain questions."""

    replies: dict[int, Reply]  # by the place of the question
    by: dict | None  # what made them: model, weights (of a local folder, else None), and those of FLAGS
    size: int  # bytes of its whole lines
    cut: bool  # whether a line follows that was not written to its end
    ended: bool  # whether the last whole line ends as it should
    in_order: bool


def places_of_results(replies: str) -> tuple[Path, Path]:
    """Where the scores and the page go, beside a file of replies; run.v1 and run.v2 have their own."""
    return tuple(Path(replies.removesuffix(".jsonl") + suffix) for suffix in RESULTS)


def same_question(row: Row) -> bytes:
    """Equal for rows that ask the same after the same history."""
    return json.dumps([row["question"], row.get("history") or []], ensure_ascii=False).encode("utf-8", "replace")


def to_fields(reply: Reply) -> dict[str, object]:
    """A reply as a line has it."""
    return dict(zip(REPLY, reply))


def to_line(row: Row, reply: Reply, by: dict) -> str:
    """One line of the file."""
    line = {"question": row["question"]} | ({"history": row["history"]} if row.get("history") else {})
    line |= to_fields(reply) | {"by": by}
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


def is_json(text: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


def parse(line: bytes) -> dict | None:
    """One line of the file, or None where it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line)
        typed = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in TYPES.items())
        if typed and found["form"] in FORMS and isinstance(found.get("by"), dict):
            return found
    return None


def describe_changes(before: dict, now: dict) -> list[str]:
    """In what two makers of replies are unlike."""
    known = before.get("weights") and now.get("weights")  # a folder may have moved, or have been trained anew
    names = [now.get("model"), before.get("model")]
    changes = []
    if before.get("weights") != now.get("weights") or not known and names[0] != names[1]:
        same = names[0] == names[1]
        changes.append(f"{names[0]} 的权重变了" if same else f"模型是 {names[1]}，现在是 {names[0]}")
    return changes + describe_flags(before, now)


def describe_flags(before: dict, now: dict) -> list[str]:
    """In what FLAGS two makers of replies were asked otherwise."""
    unlike = [name for name in FLAGS if before.get(name) != now.get(name)]
    return [f"{FLAGS[name]} 是 {before.get(name)}，现在是 {now.get(name)}" for name in unlike]


def read(path: str, rows: list[Row], by: dict | None = None, flag: str = "--replies") -> Found:
    """What `path`, which need not be there, has of the replies to the questions of `rows`. Raises SystemExit for a file
    of anything else, or of other questions, and for replies that were made otherwise than `by`, where that is told, or
    in several ways."""
    content = Path(path).read_bytes() if os.path.exists(path) else b""
    lines = content.split(b"\n")
    # What was cut off in mid-write begins as a line of ours does, and is no JSON yet.
    last = lines[-1]
    # Where the power failed there may be zeros in the place of what was not on the disk yet.
    begun = last.rstrip(b"\0")
    cut = last.startswith(LINE_START) and not is_json(last) or last != b"" and LINE_START.startswith(begun)
    size = len(content) - cut * len(last)
    lines = lines[:-1] if cut or not last else lines
    open_places = defaultdict(list)
    for place in reversed(range(len(rows))):
        open_places[same_question(rows[place])].append(place)
    replies, first = {}, by
    for number, text in enumerate(lines, 1):
        line = parse(text)
        where = f"错误：{flag} {path} {'已经存在，而' * (flag == '--replies')}第 {number} 行"
        if line is None:
            raise SystemExit(f"{where}不是 inference.py 写的回复；{REMEDY[flag]}")
        if not (places := open_places[same_question(line)]):
            raise SystemExit(f"{where}不是对 --questions 里问题的回复，或多了一次；{REMEDY[flag]}")
        first = first or line["by"]
        if changes := describe_changes(line["by"], first):
            raise SystemExit(f"{where}是另一次提问的（{'；'.join(changes)}）；{REMEDY[flag]}")
        replies[places.pop()] = Reply(*(line[name] for name in REPLY))
    ended = content[:size].endswith(b"\n") or not size
    return Found(replies, first, size, cut, ended, ended and not cut and list(replies) == sorted(replies))


def require_writable(path: str) -> None:
    """Raises SystemExit unless replies can be added to `path`, and a file be made beside it; changes nothing."""
    probe = Path(f"{path}.{os.getpid()}.tmp")
    try:
        probe.touch()
        probe.unlink()
        if os.path.exists(path) or not path:  # beside "" a file can be made
            open(path, "ab").close()
    except OSError as error:
        raise SystemExit(f"错误：无法写入 --replies {path}（{error.strerror}）；请换一个位置。") from None


@contextlib.contextmanager
def hold(path: str):
    """The file for this process alone: two would answer the same questions. The system lets go of it when the process
    ends, however it ends."""
    import filelock

    lock = filelock.FileLock(f"{path}.lock")
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SystemExit(f"错误：另一个进程正在写 {path}；请等它结束，或用 --replies 换一个文件名。") from None
    with held:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                os.unlink(f"{path}.lock")


def sort(path: str, rows: list[Row], replies: dict[int, Reply], by: dict) -> None:
    """Bring a file that has all replies into the order of the questions; it is there whole at any time."""
    row_files.write({path: "".join(to_line(row, replies[place], by) for place, row in enumerate(rows))})
