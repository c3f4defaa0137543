"""A file of questions: read, answered in batches, and the replies in a file, in the order of the questions. Writes over
nothing that is there; imports heavy libraries only to answer."""

import codecs
import json
from pathlib import Path

from parts import row_files, scores, shapes
from parts.encoding import Reply
from parts.rows import Row, Unusable, check_history, clean

BATCH_ROWS = 64  # questions of a file answered together, at most


def read(path: str) -> list[Row]:
    """Rows with `question`, perhaps also `answer`: a line each of a .txt file, or any file that data.py reads.
    Raises SystemExit when it cannot be read, has no question, or a row without one."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", *row_files.SUFFIXES):
        raise SystemExit(
            f"错误：--questions {path} 应是 .txt（一行一个问题）"
            f"或 {'、'.join(row_files.SUFFIXES)}（每行有 question 字段）文件。"
        )
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise SystemExit(f"错误：无法读取 --questions {path}（{error.strerror}）；请检查路径。") from None
    if suffix == ".txt":
        lines = enumerate(row_files.decode_all(Path(path), content).split("\n"), 1)
        rows = [(number, {"question": line.strip()}) for number, line in lines if line.strip()]
    else:
        rows, _ = shapes.to_fields(row_files.read(path), path, answered=False)
    if not rows:
        raise SystemExit(f"错误：--questions {path} 里没有问题；请每行写一个问题。")
    found = []
    for number, row in rows:
        question = row.get("question") if isinstance(row, dict) else None
        if isinstance(row, Unusable):
            raise SystemExit(f"错误：{path} 第 {number} 行：{row}；请改正这一行。")
        if not isinstance(question, str) or not (question := clean(question)):
            raise SystemExit(f"错误：{path} 第 {number} 行没有问题；每行需要一个不为空的 question 字段。")
        history, problem = check_history(row.get("history") or [])
        if problem:
            raise SystemExit(f"错误：{path} 第 {number} 行的 {problem}；请改正这一行。")
        found.append(row | {"question": question, "history": history})
    return found


def refuse_taken(path: str) -> None:
    """Raises SystemExit unless the replies can be written to `path` without losing anything that is there."""
    for taken in (path, f"{path}.part"):
        if Path(taken).exists():
            raise SystemExit(f"错误：{taken} 已经存在，不会覆盖；请移走它，或用 --replies 换一个文件名。")
    try:
        Path(path).touch()
        Path(path).unlink()
    except OSError as error:
        raise SystemExit(f"错误：无法写入 --replies {path}（{error.strerror}）；请换一个位置。") from None


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


def answer(conversation, rows: list[Row], to_messages, path: str) -> None:
    """Reply to the question of each row, after its `history` if it has one, in batches; `path` then has the replies in
    that order, one JSON object {question, think, answer, complete} a line. Until then what is answered is in a file
    beside it, `.part`. Raises SystemExit, before any is answered, for a question that is too long."""
    from rich.progress import Progress
    from rich.table import Table

    from parts.decoding import CACHE_STEP
    from parts.replies import room_in_memory

    conversations = [to_messages(row["question"], history=row.get("history")) for row in rows]
    lengths = conversation.check_lengths(conversations, [f"第 {place + 1} 个问题" for place in range(len(rows))])
    console, part, replies = conversation.console, Path(f"{path}.part"), {}
    try:
        with part.open("x", encoding="utf-8", errors="replace", newline="\n") as file, Progress(console=console) as bar:
            task = bar.add_task("已回答", total=len(lengths))
            new = conversation.max_new_tokens + CACHE_STEP  # the cache grows in steps
            for batch in make_batches(lengths, new, room_in_memory(conversation.model)):
                replies.update(zip(batch, conversation.generate([conversations[place] for place in batch])))
                file.writelines(reply_line(rows[place], replies[place]) for place in batch)
                file.flush()
                bar.advance(task, len(batch))
    except BaseException:  # Ctrl-C too
        console.print(f"没有答完；已答的 {len(replies)} 条在 {part}。", style="yellow", soft_wrap=True)
        raise
    in_order = [replies[place] for place in range(len(lengths))]
    with open(path, "x", encoding="utf-8", errors="replace", newline="\n") as file:
        file.writelines(map(reply_line, rows, in_order))
    part.unlink()
    table = Table.grid(padding=(0, 2))
    for line in scores.count(rows, in_order, conversation.thinking):
        table.add_row(*line)
    console.print(table, f"回复在 {path}", sep="\n")


def reply_line(row: Row, reply: Reply) -> str:
    """One line of the file of replies."""
    texts = {"question": row["question"], "think": reply.thinking, "answer": reply.answer, "complete": reply.complete}
    return json.dumps(texts, ensure_ascii=False) + "\n"
