"""A file of questions: read, and answered in batches into a file of replies, of which those that are there already are
not asked again. Imports heavy libraries only to answer."""

import codecs
from collections.abc import Callable
from pathlib import Path

from parts import reply_file, row_files, shapes
from parts.encoding import Reply
from parts.rows import Row, Unusable, check_history, clean
from parts.terminal import explain_failed_write

BATCH_ROWS = 64  # questions of a file answered together, at most
KEPT = "写完的回复"


def read(path: str) -> list[Row]:
    """Rows with `question`, `history`, perhaps `think` and `answer`, and `seen`, which is True where data.py found a
    near duplicate in the training part: a line each of a .txt file, or any file that data.py reads. Raises SystemExit
    when it cannot be read, has no question, or a row without one."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", *row_files.SUFFIXES):
        raise SystemExit(
            f"错误：--questions {path} 应是 .txt（一行一个问题）"
            f"或 {'、'.join(row_files.SUFFIXES)}（每行有 question 字段）文件。"
        )
    if path.endswith(reply_file.RESULTS):  # they would be written over it
        raise SystemExit(f"错误：--questions {path}：这样的名字是分数的；请给问题的文件换一个名字。")
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise SystemExit(f"错误：无法读取 --questions {path}（{error.strerror}）；请检查路径。") from None
    if suffix == ".txt":
        lines = enumerate(row_files.decode_all(Path(path), content).split("\n"), 1)
        loaded = rows = [(number, {"question": line.strip()}) for number, line in lines if line.strip()]
    else:
        loaded = row_files.read(path)
        rows, _ = shapes.to_fields(loaded, path, answered=False)
    if not rows:
        raise SystemExit(f"错误：--questions {path} 里没有问题；请每行写一个问题。")
    found = []
    for (_, raw), (number, row) in zip(loaded, rows):
        question = row.get("question") if isinstance(row, dict) else None
        if isinstance(row, Unusable):
            raise SystemExit(f"错误：{path} 第 {number} 行：{row}；请改正这一行。")
        if not isinstance(question, str) or not (question := clean(question)):
            raise SystemExit(f"错误：{path} 第 {number} 行没有问题；每行需要一个不为空的 question 字段。")
        history, problem = check_history(row.get("history") or [])
        if problem:
            raise SystemExit(f"错误：{path} 第 {number} 行的 {problem}；请改正这一行。")
        found.append(row | {"question": question, "history": history, "seen": raw.get("seen") is True})
    return found


def make_batches(lengths: list[int], new_tokens: int, max_tokens: int) -> list[list[int]]:
    """The places of prompts of `lengths` tokens, in batches of at most `max_tokens` with all that may be generated.
    Longest first: there is little padding, and memory that does not suffice shows at once."""
    batches: list[list[int]] = []
    most = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if not batches or len(batches[-1]) >= most:
            most = min(BATCH_ROWS, max_tokens // (lengths[place] + new_tokens))
            batches.append([])
        batches[-1].append(place)
    return batches


def answer(rows: list[Row], path: str, by: dict, start: Callable) -> list[Reply]:
    """The replies to the questions of `rows`, each after its `history` if it has one. Those that `path` has, made as
    `by` says, are taken; for the others `start()` gives (the conversation to be asked, what makes its messages of a
    question), and it is not called where there are none. Then `path` has all, in the order of the questions. Raises
    SystemExit, before any is answered, for a question that is too long."""
    found = reply_file.read(path, rows, by)
    if len(found.replies) < len(rows) or not found.in_order:
        with reply_file.hold(path):
            found = reply_file.read(path, rows, by)  # by now nobody else writes
            if len(found.replies) < len(rows):
                answer_missing(rows, path, by, found, *start())
            with explain_failed_write(path, KEPT):
                reply_file.sort(path, rows, found.replies, by)
    return [found.replies[place] for place in range(len(rows))]


def answer_missing(rows: list[Row], path: str, by: dict, found: reply_file.Found, conversation, to_messages) -> None:
    """Add to `found.replies`, and to the end of `path`, what is not among them yet, a batch at a time."""
    from rich.progress import Progress

    from parts.decoding import CACHE_STEP
    from parts.replies import room_in_memory

    replies, console = found.replies, conversation.console
    conversations = [to_messages(row["question"], history=row.get("history")) for row in rows]
    lengths = conversation.check_lengths(conversations, [f"第 {place + 1} 个问题" for place in range(len(rows))])
    missing = [place for place in range(len(rows)) if place not in replies]
    if replies or found.cut:
        cut = "最后一行没有写完，不用；" if found.cut else ""
        console.print(
            f"{path} 里已有 {len(replies)} 条，{cut}接着答其余 {len(missing)} 条。", markup=False, soft_wrap=True
        )
    try:
        with explain_failed_write(path, KEPT), open(path, "ab") as file, Progress(console=console) as bar:
            file.truncate(found.size)
            file.write(b"" if found.ended else b"\n")
            task = bar.add_task("已回答", total=len(rows), completed=len(replies))
            new = conversation.max_new_tokens + CACHE_STEP  # the cache grows in steps
            for batch in make_batches([lengths[place] for place in missing], new, room_in_memory(conversation.model)):
                places = [missing[each] for each in batch]
                made = conversation.generate([conversations[place] for place in places])
                file.write("".join(reply_file.to_line(rows[p], reply, by) for p, reply in zip(places, made)).encode())
                file.flush()
                replies.update(zip(places, made))
                bar.advance(task, len(places))
    except BaseException:  # Ctrl-C too
        console.print(
            f"没有答完；已答的 {len(replies)} 条在 {path}，再运行同一命令会接着答。",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
        raise
