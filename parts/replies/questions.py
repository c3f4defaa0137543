"""A file of questions, answered into files of replies: a line of JSON for each reply, appended as they come, so that
what was interrupted goes on where it stopped, and at the end in the order of the questions. Each line says what made
it. Loses nothing that is there, mixes nothing, and imports heavy libraries only to answer."""

import codecs
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from parts import terminal
from parts.model.encoding import FORMS, Reply
from parts.rows import files as row_files
from parts.rows import shapes
from parts.rows.row import Row, check
from parts.run import checkpoints

BATCH_ROWS = 64  # questions that are answered together, at most
SETTINGS = ("no_thinking", "max_new_tokens", "seed")  # flags that decide what is replied
# Of a line: the fields of a Reply, in its order.
FIELDS = {"think": str, "answer": str, "complete": bool, "form": str, "tokens": int, "seconds": int | float}
LINE_START = b'{"question": "'
EARLIER = ".jsonl"  # what is compared with is a file of replies if its name ends so, else a model
RESULTS = (".scores.json", ".scores.html")  # ends of what lies beside a file of replies: the scores, and the page
LABELS = {"weights": "权重", "model": "模型"}
KEPT = "写完的回复"


@dataclass
class Candidate:
    """A model that answers, or an earlier file of replies, and what has become of it."""

    name: str
    path: str  # of the file with its replies
    revision: str | None = None
    by: dict | None = None  # what makes its replies: model, weights (of a local folder, else None), and SETTINGS
    trained: tuple | None = None  # where its weights are, a weights.Trained, once replies are missing
    replies: list[Reply] = field(default_factory=list)  # to all questions, in their order, once they are there


class Known(NamedTuple):
    """What a file has of the replies to certain questions."""

    replies: dict[int, Reply]  # by the question's index
    by: dict | None  # what made them
    lines: bytes  # those that were written to their end

    def in_order(self) -> list[Reply]:
        return [self.replies[i] for i in sorted(self.replies)]


def read(path: str) -> list[Row]:
    """Return rows with `question`, `history`, perhaps `think` and `answer`, and `seen`, which is True where data.py saw
    a near duplicate in the training part: one for each line of a .txt file, or for each row of a file that data.py
    reads. It raises SystemExit for a file that cannot be read, has no question, or a row without one."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", *row_files.SUFFIXES):
        kinds = "、".join(row_files.SUFFIXES)
        raise SystemExit(f"错误：--questions {path} 应是 .txt（一行一个问题）或 {kinds}（每行有 question 字段）。")
    if path.endswith(RESULTS):  # the scores would be written over it
        raise SystemExit(f"错误：--questions {path}：这样的名字是分数的；请给问题的文件换一个名字。")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SystemExit(f"错误：无法读取 --questions {path}（{error.strerror}）；请检查路径。") from None
    if suffix == ".txt":
        lines = row_files.decode_all(Path(path), content.removeprefix(codecs.BOM_UTF8)).split("\n")
        loaded = [(number, {"question": line.strip()}) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        loaded = row_files.parse(Path(path), content)
    if not loaded:
        raise SystemExit(f"错误：--questions {path} 里没有问题；请每行写一个问题。")
    rows = []
    for (_, raw), (number, row) in zip(loaded, shapes.to_fields(loaded, path, answered=False)[0]):
        try:
            asked = check(row, ("question",))
        except ValueError as problem:
            raise SystemExit(f"错误：{path} 第 {number} 行：{problem}；请改正这一行。") from None
        rows.append(row | {"history": []} | asked | {"seen": raw.get("seen") is True})
    return rows


def list_candidates(rows: list[Row], name: str, revision: str | None, replies: str, others: list) -> list[Candidate]:
    """Return the model `name`, whose replies go into the file `replies`, and those that it is compared with; earlier
    files with their replies. It raises SystemExit, before anyone looks for a model, for files that cannot be written,
    that hold anything but replies to these questions, or not all of them where that is needed."""
    candidates = [Candidate(name, replies, revision)]
    candidates += [Candidate(other, path_beside(replies, other)) for other in others]
    if len({os.path.realpath(candidate.path) for candidate in candidates[1:]}) < len(others):
        raise SystemExit(f"错误：--compare_with {' '.join(others)}：有两个是同一个，或名字太像；请去掉一个。")
    for candidate in candidates:
        path = candidate.path
        known = read_replies(path, rows)
        if candidate.name != path:
            require_writable(path)
        elif len(known.replies) < len(rows):
            remedy = f"而问题有 {len(rows)} 个；请检查路径，或先用写它的命令答完。"
            raise SystemExit(f"错误：--compare_with {path} 里有 {len(known.replies)} 条回复，{remedy}")
        else:
            candidate.by, candidate.replies = known.by, known.in_order()
    return candidates


def path_beside(replies: str, name: str) -> str:
    """Return the file for the replies of another model, beside the first one's; an earlier file is its own."""
    if name.endswith(EARLIER):
        return name
    short = re.sub(r"[^\w.-]+", "-", "-".join(Path(name).parts[-2:])).strip("-.") or "other"
    return str(Path(replies).with_name(f"{Path(replies).stem}.{short}{EARLIER}"))


def result_paths(replies: str) -> list[Path]:
    """Return where the scores and the page go, beside a file of replies; run.v1 and run.v2 have their own."""
    return [Path(replies.removesuffix(EARLIER) + suffix) for suffix in RESULTS]


def hold(path: str):
    """Keep a file of replies for this process alone: two would answer the same questions."""
    return terminal.hold(f"{path}.lock", f"错误：另一个进程正在写 {path}；请等它结束，或用 --replies 换一个文件名。")


def require_writable(path: str) -> None:
    """Raise SystemExit unless replies can be added to `path`, and a file be made beside it; nothing is changed."""
    try:
        with hold(path):
            if os.path.exists(path):
                open(path, "ab").close()
    except OSError as error:
        raise SystemExit(f"错误：无法写入 --replies {path}（{error.strerror}）；请换一个位置。") from None


def to_line(row: Row, reply: Reply, by: dict) -> str:
    """Return one line of a file of replies."""
    line = {"question": row["question"]}
    if row.get("history"):
        line["history"] = row["history"]
    line |= dict(zip(FIELDS, reply)) | {"by": by}
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


def parse(text: bytes) -> object:
    """Return what a line of JSON holds; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_reply(line: object) -> bool:
    """Whether `to_line` may have written this."""
    if not isinstance(line, dict) or not isinstance(line.get("question"), str) or not isinstance(line.get("by"), dict):
        return False
    return all(isinstance(line.get(name), kind) for name, kind in FIELDS.items()) and line["form"] in FORMS


def identify(row: Row) -> bytes:
    """Return what is equal for rows that ask the same after the same history."""
    return json.dumps([row["question"], row.get("history") or []], ensure_ascii=False).encode("utf-8", "replace")


def describe_changes(before: dict, now: dict, names=("weights", "model", *SETTINGS)) -> str:
    """Say in what two makers of replies are unlike. Where weights are known the model's name tells nothing: a folder
    may have been moved."""
    same_weights = None is not before.get("weights") == now.get("weights")
    changes = []
    for name in names:
        old, new = before.get(name), now.get(name)
        if old != new and not (name == "model" and same_weights):
            changes.append(f"{LABELS.get(name, f'--{name}')} 是 {old}，现在是 {new}")
    return "；".join(changes)


def read_replies(path: str, rows: list[Row], by: dict | None = None) -> Known:
    """Return what `path`, which need not be there, has of the replies to the questions of `rows`. It raises SystemExit
    for a file of anything else, or of other questions, and for replies that were made otherwise than `by` says, or in
    several ways."""
    content = Path(path).read_bytes() if os.path.exists(path) else b""
    *lines, last = content.split(b"\n")
    # What was cut off in mid-write begins as a line of ours, and is no JSON yet. Where the power failed there may be
    # zeros in the place of what was not on the disk yet.
    begun = last.startswith(LINE_START) or LINE_START.startswith(last.rstrip(b"\0"))
    if begun and parse(last) is None:
        content = content[: len(content) - len(last)]
    else:
        lines.append(last)
    indexes = defaultdict(list)  # of each question, which may stand there twice
    for i in reversed(range(len(rows))):
        indexes[identify(rows[i])].append(i)
    replies: dict[int, Reply] = {}
    for number, text in enumerate(lines, 1):
        line, where = parse(text), f"错误：{path} 第 {number} 行"
        if not is_reply(line):
            raise SystemExit(f"{where}不是 inference.py 写的回复；它不会被改写，请移走它，或换一个文件名。")
        if not indexes[identify(line)]:
            raise SystemExit(f"{where}不是对 --questions 里问题的回复，或多了一次；请移走它，或换一个文件名。")
        by = by or line["by"]
        if changes := describe_changes(line["by"], by):
            raise SystemExit(
                f"{where}是另一次提问的（{changes}）；它不会被改写，请移走它，或用 --replies 换一个文件名。"
            )
        replies[indexes[identify(line)].pop()] = Reply(*(line[name] for name in FIELDS))
    return Known(replies, by, content)


def answer(rows: list[Row], candidates: list[Candidate], settings: dict, begin: Callable) -> None:
    """Give all candidates their replies, models asked with `settings` (of SETTINGS). Those of which replies are missing
    are loaded one after another, and all that can be refused is, before the first one is. `begin(model, tokenizer)`
    returns the Conversation in which one is asked."""
    from parts.model.weights import find_local, find_trained

    asked = [candidate for candidate in candidates if not candidate.replies]
    for candidate in asked:
        folder = find_local(candidate.name)
        weights = checkpoints.weights_sha256(folder)[:16] if folder else None
        name = f"{candidate.name}@{candidate.revision}" if candidate.revision else candidate.name
        candidate.by = {"model": name, "weights": weights} | settings
        if len(read_replies(candidate.path, rows, candidate.by).replies) < len(rows):
            # What was found is what is loaded: a training that goes on may write a better checkpoint meanwhile.
            name = str(folder or candidate.name)
            candidate.trained = find_trained(name, candidate.revision, not settings["no_thinking"])
    for candidate in asked:
        with hold(candidate.path):
            complete(rows, candidate, begin)


def complete(rows: list[Row], candidate: Candidate, begin: Callable) -> None:
    """Bring a model's file to all replies, in the order of the questions. The model is loaded where some are missing,
    and gone when this returns."""
    from accelerate.utils.memory import clear_device_cache

    from parts.model.weights import load

    known = read_replies(candidate.path, rows, candidate.by)
    if len(known.replies) < len(rows):
        ask_missing(rows, candidate, known, begin(*load(candidate.trained)))
        clear_device_cache(garbage_collection=True)
    candidate.replies = known.in_order()
    lines = [to_line(row, reply, candidate.by) for row, reply in zip(rows, candidate.replies)]
    with terminal.explain_failed_write(candidate.path, KEPT):
        row_files.write({candidate.path: "".join(lines)})


def ask_missing(rows: list[Row], candidate: Candidate, known: Known, conversation) -> None:
    """Add to `known.replies`, and to the end of the candidate's file, what is not there yet, a batch at a time. It
    raises SystemExit, before any is answered, for a question that is too long."""
    from rich.progress import Progress

    from parts.model.generate import CACHE_STEP, room_in_memory

    path, replies, console = candidate.path, known.replies, conversation.console
    prompts = [conversation.to_messages(row["question"], history=row.get("history")) for row in rows]
    lengths = conversation.check_lengths(prompts, [f"第 {i} 个问题" for i in range(1, len(rows) + 1)])
    missing = {i: length for i, length in enumerate(lengths) if i not in replies}
    new_tokens = conversation.max_new_tokens + CACHE_STEP  # the cache grows in steps
    batches = make_batches(missing, new_tokens, room_in_memory(conversation.model))
    if replies:
        text = f"{path} 里已有 {len(replies)} 条，接着答其余 {len(missing)} 条。"
        console.print(text, markup=False, soft_wrap=True)
    try:
        with terminal.explain_failed_write(path, KEPT), open(path, "ab") as file, Progress(console=console) as bar:
            file.truncate(len(known.lines))  # without a line that was cut off
            if known.lines and not known.lines.endswith(b"\n"):
                file.write(b"\n")
            task = bar.add_task("已回答", total=len(rows), completed=len(replies))
            for batch in batches:
                new = dict(zip(batch, conversation.generate([prompts[i] for i in batch])))
                file.writelines(to_line(rows[i], reply, candidate.by).encode() for i, reply in new.items())
                file.flush()
                replies.update(new)
                bar.advance(task, len(batch))
    except BaseException:  # Ctrl-C too
        conversation.warn(f"没有答完；已答的 {len(replies)} 条在 {path}，再运行同一命令会接着答。")
        raise


def make_batches(lengths: dict[int, int], new_tokens: int, max_tokens: int) -> list[list[int]]:
    """Return the indexes of prompts of these lengths in tokens, in batches of at most `max_tokens` with all that may be
    generated. Longest first: there is little padding, and memory that does not suffice shows at once."""
    batches: list[list[int]] = []
    most = 0
    for i in sorted(lengths, key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) >= most:
            most = min(BATCH_ROWS, max_tokens // (lengths[i] + new_tokens))
            batches.append([])
        batches[-1].append(i)
    return batches
