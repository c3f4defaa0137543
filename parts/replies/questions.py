"""A file of questions, answered into files of replies: a line of JSON for each reply, in the order of the
questions. The file is written anew, whole, after each batch, so that what was interrupted goes on where it
stopped. Each line says what made it. Loses nothing that is there, mixes nothing, and imports heavy libraries
only to answer."""

import contextlib
import json
import os
import re
import select
import sys
from collections import defaultdict
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from parts import terminal
from parts.model.encoding import Reply
from parts.rows import files, shapes
from parts.rows.row import Row, check, clean
from parts.run import checkpoints

BATCH_ROWS = 64  # questions that are answered together, at most
SETTINGS = ("no_thinking", "max_new_tokens", "seed")  # flags that decide what is replied
LABELS = {"weights": "权重", "model": "模型"}  # of what makes a reply; SETTINGS are called by their flags
# Of a line: the fields of a Reply, in its order.
FIELDS = ("think", "answer", "complete", "form", "tokens", "seconds")
# Of a question's row: what is not kept in its line, as it says what stands there, or would, in other words.
READ = {"question", "history", *FIELDS, "by", *shapes.TURNS, *shapes.TOLD_UNUSED}
# By this a line that was cut off is told from a file of anything else, which is never written over.
LINE_START = b'{"question": "'
EARLIER = ".jsonl"  # what is compared with is a file of replies if its name ends so, else a model
RESULTS = (".scores.json", ".scores.html")  # ends of the names of scores and page, beside a file of replies
OTHER_FILE = "它不会被改写，请移走它，或用 --replies 换一个文件名。"


@dataclass(eq=False)
class Candidate:
    """A model that answers, or an earlier file of replies, and what has become of it."""

    name: str
    path: str  # of the file with its replies
    revision: str | None = None
    by: dict | None = None  # what makes its replies: model, weights (None of a hub's model), and SETTINGS
    trained: tuple | None = None  # where its weights are, a weights.Trained, where replies are missing
    replies: list[Reply | None] = ()  # to the questions in their order, None to one that waits for its own

    def read(self, rows: list[Row]) -> None:
        """Take over what its file, which need not be there, has of the replies to `rows`. It raises
        SystemExit for a file of anything else, or of other questions, and for replies that were made in
        several ways."""
        lines = Path(self.path).read_bytes().split(b"\n") if os.path.isfile(self.path) else [b""]
        waiting = defaultdict(list)  # the indexes of each question, which may stand there twice
        # From the last one on: replies to a question that stands there twice are taken in the order of the
        # file.
        for i in reversed(range(len(rows))):
            waiting[identify(rows[i])].append(i)
        self.replies = [None] * len(rows)
        for number, text in enumerate(lines, 1):
            where = f"{self.path} 第 {number} 行"
            try:
                line = json.loads(text)
                asked, reply, by = identify(line), Reply(*itemgetter(*FIELDS)(line)), dict(line["by"])
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                # A copy that was cut off ends in what begins as a line of ours, and is no JSON yet. Where the
                # power failed there may be zeros in the place of what was not on the disk yet.
                ours = LINE_START.startswith(text.rstrip(b"\0")[: len(LINE_START)])
                if ours and number == len(lines) and isinstance(error, ValueError):
                    break
                raise SystemExit(f"错误：{where}不是 inference.py 写的回复；{OTHER_FILE}") from None
            if not waiting[asked]:
                raise SystemExit(f"错误：{where}不是对 --questions 里问题的回复，或多了一次；{OTHER_FILE}")
            self.replies[waiting[asked].pop()] = reply
            self.settle(by, where)

    def settle(self, by: dict, where: str) -> None:
        """Take over what makes the replies; raise SystemExit where it made those that are there otherwise."""
        if changes := describe_changes(self.by or by, by):
            raise SystemExit(f"错误：{where}是另一次提问的（{changes}）；{OTHER_FILE}")
        self.by = by

    def missing(self) -> list[int]:
        """Return the indexes of the questions that wait for a reply."""
        return [i for i, reply in enumerate(self.replies) if reply is None]

    def find_weights(self, settings: dict) -> None:
        """Find the weights that answer. It raises SystemExit where they are not those that did, or cannot be
        asked."""
        from parts.model import weights

        folder = weights.find_local(self.name)
        checksum = checkpoints.weights_sha256(folder)[:16] if folder else None
        name = f"{self.name}@{self.revision}" if self.revision else self.name
        self.settle({"model": name, "weights": checksum} | settings, f"{self.path} ")
        if self.missing():
            # What was found is what is loaded: a training that goes on may write a better checkpoint
            # meanwhile.
            name, thinking = str(folder or self.name), not settings["no_thinking"]
            self.trained = weights.find_trained(name, self.revision, thinking)

    def write(self, rows: list[Row]) -> None:
        """Write its file anew, with the replies that there are in the order of the questions."""
        lines = [to_line(row, reply, self.by) for row, reply in zip(rows, self.replies) if reply]
        with terminal.explain_failed_write(self.path, "写完的回复"):
            files.write({self.path: "".join(lines)})


def read_piped(wait: bool) -> str:
    """Return the text that standard input brings, whole. Without `wait` it is "" where nothing has come yet:
    nobody can tell whether a pipe that is open will ever bring anything."""
    # Where it is closed there is none, and nohup's cannot be read. On Windows select takes no pipe.
    with contextlib.suppress(OSError):
        if sys.stdin and (wait or not sys.stdin.isatty() and select.select([sys.stdin], [], [], 0)[0]):
            # `yes` has no end.
            return clean(files.decode_all(Path("标准输入"), sys.stdin.buffer.read(1 << 24)))
    return ""


def read(path: str) -> list[Row]:
    """Return rows with `question` and `history`, with `answer` where there is one, with `seen`, which is True
    where data.py saw a near duplicate in the training part, and with `rest`, the fields that are not read:
    one for each line of a .txt file, or for each row of a file that data.py reads, which has any text. It
    raises SystemExit for a file that cannot be read, has no question, or a row without one."""
    suffix = Path(path).suffix.lower()
    # Scores end in .json too, and would be written over the questions.
    if suffix not in (".txt", *files.SUFFIXES) or path.endswith(RESULTS):
        kinds = f".txt（一行一个问题）或 {'、'.join(files.SUFFIXES)}（每行有 question 字段）"
        raise SystemExit(f"错误：--questions {path} 应是 {kinds}，不能是 {'、'.join(RESULTS)}。")
    content = files.read_bytes(Path(path))
    loaded = load_lines(path, content) if suffix == ".txt" else files.parse(Path(path), content)
    loaded = [(number, raw) for number, raw in loaded if has_text(raw)]
    if not loaded:
        raise SystemExit(f"错误：--questions {path} 里没有问题；请每行写一个问题。")
    rows = []
    for (_, raw), (number, fields) in zip(loaded, shapes.to_fields(loaded, path, answered=False)[0]):
        try:
            fields = to_json(fields) if isinstance(fields, dict) else fields
            row = {"history": []} | check(fields, ("question",)) | {"seen": raw.get("seen") is True}
        except ValueError as problem:
            raise SystemExit(f"错误：{path} 第 {number} 行：{problem}；请改正这一行。") from None
        # A reference that is no text is none; a question can be asked without one.
        if isinstance(fields.get("answer"), str) and fields["answer"].strip():
            row["answer"] = fields["answer"]
        row["rest"] = to_json({name: raw[name] for name in raw if name.lower() not in READ})
        rows.append(row)
    return rows


def load_lines(path: str, content: bytes) -> list[tuple[int, dict]]:
    """Return (line number, row) for each line of text."""
    lines = enumerate(files.decode_all(Path(path), content).split("\n"), 1)
    return [(number, {"question": line}) for number, line in lines]


def has_text(raw: object) -> bool:
    """Tell whether anything stands in a row, as nothing does in those that Excel leaves at the end."""
    return not isinstance(raw, dict) or any(clean(str(value)) for value in raw.values() if value is not None)


def to_json(fields: dict) -> dict:
    """Return fields of a row as JSON keeps them."""
    text = json.dumps(fields, ensure_ascii=False, default=str)
    # JSON can hold half a character, which no file of text can.
    return json.loads(text.encode("utf-8", "replace"))


def list_candidates(name: str, revision: str | None, replies: str, others: list[str]) -> list[Candidate]:
    """Return the model `name`, whose replies go into the file `replies`, and those that it is compared with.
    It raises SystemExit where a folder is in the place of what would be written in the end."""
    for path in (replies, *result_paths(replies)):
        if os.path.isdir(path):
            raise SystemExit(f"错误：无法写入 {path}（是文件夹）；请用 --replies 换一个文件名。")
    others = [Candidate(other, path_beside(replies, other)) for other in others]
    return [Candidate(name, replies, revision), *others]


def path_beside(replies: str, name: str) -> str:
    """Return the file for the replies of another model, beside the first one's; an earlier file is its
    own."""
    if name.endswith(EARLIER):
        return name
    short = re.sub(r"[^\w.-]+", "-", "-".join(Path(name).parts[-2:])).strip("-.") or "other"
    return str(Path(replies).with_name(f"{Path(replies).stem}.{short}{EARLIER}"))


def result_paths(replies: str) -> list[str]:
    """Return where the scores and the page go, beside a file of replies."""
    # The suffix alone is cut off, not what follows a dot: run.v1 and run.v2 have their own.
    return [replies.removesuffix(EARLIER) + ending for ending in RESULTS]


def hold(path: str, stack: contextlib.ExitStack) -> None:
    """Keep a file of replies for this process alone, until `stack` is closed: two would answer the same
    questions. Two models whose names make the same file come here too."""
    others = f"另一个进程，或另一个 --compare_with，正在写 {path}"
    message = f"错误：{others}；请等它结束，或用 --replies 换一个文件名。"
    try:
        stack.enter_context(terminal.hold(f"{path}.lock", message))
    except OSError as error:
        raise SystemExit(f"错误：无法写入 {path}（{error.strerror}）；请用 --replies 换一个位置。") from None


def to_line(row: Row, reply: Reply, by: dict) -> str:
    """Return one line of a file of replies."""
    history = {"history": row["history"]} if row.get("history") else {}
    line = {"question": row["question"], **history, **dict(zip(FIELDS, reply)), "by": by}
    return json.dumps(line | row.get("rest", {}), ensure_ascii=False) + "\n"


def identify(row: Row) -> str:
    """Return what is equal for rows that ask the same after the same history."""
    return json.dumps([row["question"], row.get("history") or []])


def describe_changes(before: dict, now: dict, names=(*LABELS, *SETTINGS)) -> str:
    """Say in what two makers of replies are unlike."""
    # Where weights are known the model's name tells nothing: a folder may have been moved.
    same_weights = before.get("weights") and before["weights"] == now.get("weights")
    changes = []
    for name in names:
        if before.get(name) != now.get(name) and not (name == "model" and same_weights):
            label = LABELS.get(name, f"--{name}")
            changes.append(f"{label} 是 {before.get(name)}，现在是 {now.get(name)}")
    return "；".join(changes)


def answer_all(rows: list[Row], candidates: list[Candidate], settings: dict, begin) -> None:
    """Give all candidates their replies, models asked with `settings` (of SETTINGS). Those of which replies
    are missing are loaded one after another, and gone when the next one is. `begin(model, tokenizer)` returns
    the Conversation in which one is asked.

    It raises SystemExit, before anyone looks for a model, for files that cannot be written, that hold
    anything but replies to these questions, or not all of them where that is needed; and before the first
    model is loaded, for all that can be refused of the others.
    """
    models = [candidate for candidate in candidates if candidate.name != candidate.path]
    with contextlib.ExitStack() as stack:
        for candidate in models:
            hold(candidate.path, stack)
        for candidate in candidates:
            candidate.read(rows)
            missing = len(candidate.missing())
            if missing and candidate not in models:
                counts = f"里有 {len(rows) - missing} 条回复，而问题有 {len(rows)} 个"
                advice = "请检查路径，或先用写它的命令答完。"
                raise SystemExit(f"错误：--compare_with {candidate.path} {counts}；{advice}")
        # Both import torch, which takes seconds.
        from accelerate.utils.memory import clear_device_cache

        from parts.model import weights

        for candidate in models:
            candidate.find_weights(settings)
        for candidate in models:
            if candidate.missing():
                ask_missing(rows, candidate, begin(*weights.load(candidate.trained)))
                # Models hold themselves in circles: without the collector two would be on the card at once.
                clear_device_cache(garbage_collection=True)


def ask_missing(rows: list[Row], candidate: Candidate, conversation) -> None:
    """Add the replies that are missing, a batch at a time, each time also to the candidate's file. It raises
    SystemExit, before any is answered, for a question that is too long."""
    from rich.progress import Progress

    from parts.model.generate import CACHE_STEP, room_in_memory

    missing = candidate.missing()
    answered = len(rows) - len(missing)
    prompts, lengths = [], []
    for number, row in enumerate(rows, 1):
        prompts.append(conversation.to_messages(row["question"], history=row.get("history")))
        lengths.append(conversation.check_length(prompts[-1], f"第 {number} 个问题连同之前的对话"))
    new_tokens = conversation.max_new_tokens + CACHE_STEP  # the cache grows in steps
    batches = make_batches(missing, lengths, new_tokens, room_in_memory(conversation.model))
    if answered:
        print(f"{candidate.path} 里已有 {answered} 条，接着答其余 {len(missing)} 条。", flush=True)
    try:
        with Progress(console=conversation.console) as bar:
            task = bar.add_task("已回答", total=len(rows), completed=answered)
            for batch in batches:
                for i, reply in zip(batch, conversation.generate([prompts[i] for i in batch])):
                    candidate.replies[i] = reply
                candidate.write(rows)
                answered += len(batch)
                bar.advance(task, len(batch))
    except BaseException:  # Ctrl-C too
        conversation.warn(f"没有答完；已答的 {answered} 条在 {candidate.path}，再运行同一命令会接着答。")
        raise


def make_batches(missing: list[int], lengths: list[int], new_tokens: int, max_tokens: int) -> list[list[int]]:
    """Return the `missing` indexes, of prompts that are `lengths[i]` tokens long, in batches of at most
    BATCH_ROWS and `max_tokens`, with the `new_tokens` that each reply may have; a prompt that is longer is a
    batch by itself."""
    batches: list[list[int]] = []
    most = 0  # rows of the last batch
    # Longest first: there is little padding, and memory that does not suffice shows at once.
    for i in sorted(missing, key=lengths.__getitem__, reverse=True):
        if not batches or len(batches[-1]) >= most:
            most = min(BATCH_ROWS, max_tokens // (lengths[i] + new_tokens))
            batches.append([])
        batches[-1].append(i)
    return batches
