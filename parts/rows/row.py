"""A row of data: question, thinking and answer, checked and cleaned once. Knows no file format, no split."""

import json
import re
import statistics

from parts.terminal import progress, shorten

FIELDS = ("question", "think", "answer")
THINKLESS = ("缺少字段 think", "think 为 null", "think 为空")  # what check says of a row without thinking
# Half a character, which neither UTF-8 nor a tokenizer takes, private use, U+FFFD for what could not be
# decoded, and what Unicode keeps from texts: something is lost there, and nobody can tell what.
DAMAGED = re.compile("[\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffd-\uffff\U000f0000-\U0010ffff]")
# Characters that no text has, and whole sequences that colour a terminal or move its cursor.
CONTROL = re.compile(r"[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f](?:(?<=\x1b)\[[0-?]*[ -/]*[@-~])?")
# White space, controls, marks of width 0 and fillers: nothing is seen of them, and str.strip leaves most.
INVISIBLE = (
    r"[\s\0-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0]"
)
# ## Thinking, **思考**：, 【思考】
HEADING = r"(?:^[#*]+ *(?:{0})(?:[：:]?\*\*[：:]?|[：:]|[ \t]*$)|【(?:{0})】[：:]?)"
THINK_HEADING = HEADING.format("thinking|reasoning|(?:思考|推理|思维)(?:过程)?")
THINK_TAGS = "think|thinking|thoughts?|reasoning|reflection|seed:think"
# What opens a thinking and what closes it, in published sets and in what models write for those who ask.
BLOCKS = (
    (f"<(?P<tag>{THINK_TAGS})>", "</(?P=tag)>"),
    # OpenThoughts, Cohere
    (r"<\|(?:begin_of_thought|start_thinking)\|>", r"<\|end_(?:of_thought|thinking)\|>"),
    # gpt-oss
    (r"<\|channel\|>analysis<\|message\|>", r"<\|end\|>(?:<\|start\|>assistant<\|channel\|>final)?"),
    # MedGemma
    ("<unused94>(?:thought)?", "<unused95>"),
    # Mistral, Kimi
    (r"[\[◁]think[\]▷]", r"[\[◁]/think[\]▷]"),
    # HuatuoGPT-o1
    (THINK_HEADING, HEADING.format("(?:final )?(?:response|answer)|(?:最终)?(?:回答|回复|答案)")),
)
# Marks of a thinking, an answer or a chat template: in a reply that is learnt they would be text. Each begins
# with a plain character, as re.search then passes quickly over all others.
MARK = re.compile(
    rf"(?i:</?(?:{THINK_TAGS}|answer|output|response|solution|tool_call|tool_response|unused\d+|s|\w+_of_turn)>"
    r"|<\|\w{2,40}\|>|<｜[^｜<>]{1,40}｜>|◁/?think▷|\[/?(?:INST|THINK|TOOL_CALLS)\]|<</?SYS>>)"
)
# FIELDS are texts; after earlier turns there is history, [[question, answer], …]; instruction is a text that
# the row's writer was told, and seen a bool of validation rows.
Row = dict[str, object]
Rows = tuple[Row, ...]
Location = tuple[str, int]  # of a row: the name of its file, "" where there is but one, and its number
LocatedRows = list[tuple[Location, object]]
Problems = dict[str, list[Location]]  # reason -> where the rows stand that are left out for it


class Unusable(str):
    """Stands for a row that cannot be read, and says why: a row is left out where it stands, so that the
    split of all others stays."""


SAME_FIELD_TWICE = Unusable("同一字段出现多次")


def strip_invisible(text: str) -> str:
    """Return a text without what cannot be seen at its ends."""
    return re.sub(rf"\A{INVISIBLE}+|{INVISIBLE}+\Z", "", text)


def clean(text: str) -> str:
    """Strip white space, make line ends `\\n`, Excel's _x000D_ and a page's end too, and turn a literal
    backslash-n into the line break it stands for. Control characters go. A text of which nothing can be seen
    is empty.

    Before a letter the two characters stay: there they begin a LaTeX command (\\nu) or a path.
    """
    text = re.sub(r"_x000[dD]_(\r?\n)?|\r\n?|\v|\f|\x85", "\n", CONTROL.sub("", text))
    # 8 of 241 published answers have the two characters where a line break was meant.
    text = re.sub(r"\\n(?![A-Za-z])", "\n", text).strip()
    return "" if re.fullmatch(f"{INVISIBLE}*", text) else text


def check(row: object, fields: tuple[str, ...] = FIELDS, thinkless: bool = False) -> Row:
    """Return the clean row of these fields, and of `history` where there is one. `thinkless`: a row without
    thinking is taken, its thinking is "". It raises ValueError with what is wrong, as the two functions that
    it calls do."""
    if not isinstance(row, dict):
        raise ValueError(row if isinstance(row, Unusable) else "不是对象")
    cleaned = dict.fromkeys(fields)
    # The thinking comes last: a mark in the answer says why there is none.
    for field in sorted(fields):
        try:
            if field not in row:
                raise ValueError(f"缺少字段 {field}")
            cleaned[field] = clean_field(field, row[field], by_model=field != "question")
        except ValueError as problem:
            if not thinkless or str(problem) not in THINKLESS:
                raise
            cleaned[field] = ""
    if row.get("history"):
        cleaned["history"] = clean_history(row["history"])
    return cleaned


def are_pairs(history: object) -> bool:
    """Tell whether a history has the form [[question, answer], …], whatever the two are."""
    if not isinstance(history, list):
        return False
    for turn in history:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            return False
    return True


def clean_history(history: object) -> list[list[str]]:
    """Return the clean earlier turns, or raise ValueError with what is wrong."""
    if not are_pairs(history):
        raise ValueError("history 不是 [[问题, 回答], …]")
    cleaned = []
    for question, answer in history:
        question = clean_field("history", question, by_model=False)
        cleaned.append([question, clean_field("history", answer, by_model=True)])
    return cleaned


def clean_field(field: str, text: object, by_model: bool) -> str:
    """Return a field's clean text, or raise ValueError with what is wrong. `by_model`: whether a model is to
    write such a text, as it is not to write questions."""
    if not isinstance(text, str):
        raise ValueError(f"{field} 为 null" if text is None else f"{field} 不是文本")
    text = clean(text)
    if not text:
        raise ValueError(f"{field} 为空")
    # The chat template writes the tags around the thinking; further ones would be learnt as text.
    mark = MARK.search(text) or field != "think" and re.match(THINK_HEADING, text, re.I | re.M)
    if by_model and mark:
        raise ValueError(f"{field} 含思考或对话模板的标记 {shorten(mark[0])}")
    if DAMAGED.search(text):
        raise ValueError(f"{field} 含损坏的字符（乱码、私用区或半个字符）")
    return text


def topic(row: dict) -> str:
    """Return the question that a conversation begins with."""
    return row["history"][0][0] if row.get("history") else row["question"]


def all_questions(row: Row) -> str:
    """Return the questions of earlier turns, and the one that is answered, a line each."""
    earlier = [question for question, _ in row.get("history") or []]
    return "\n".join([*earlier, row["question"]])


def keep_usable(rows: LocatedRows, problems: Problems, seen: set[str], thinkless: bool) -> LocatedRows:
    """Return the clean, distinct rows, in order, with the `instruction` that their writer had beside the
    question. `problems` gathers what is left out, `seen` the rows that there were."""
    usable = []
    for location, raw in progress(rows, "检查"):
        try:
            row = check(raw, thinkless=thinkless)
            # The clean row: white space makes no other one.
            text = json.dumps(row)
            if text in seen:
                raise ValueError("与前面的行重复")
        except ValueError as problem:
            problems.setdefault(str(problem), []).append(location)
            continue
        seen.add(text)
        # After the comparison: the same row under another instruction is the same training example.
        if isinstance(raw.get("instruction"), str):
            row["instruction"] = raw["instruction"]
        usable.append((location, row))
    return usable


def drop_overlap(rows: LocatedRows, others: LocatedRows, problem: str, problems: Problems) -> LocatedRows:
    """Return the rows that begin with no question of the `others`; `problems` gathers the rest."""
    topics = {topic(row) for _, row in others}
    remaining = []
    for location, row in rows:
        if topic(row) in topics:
            problems.setdefault(problem, []).append(location)
        else:
            remaining.append((location, row))
    return remaining


def describe_problems(problems: Problems, most: int = 5) -> list[str]:
    """Return one line for each kind of problem: how many rows have it, and where the first ones are."""
    lines = []
    for problem, locations in problems.items():
        first = [f"{file} 第 {number} 行".lstrip() for file, number in sorted(locations)[:most]]
        more = " 等" if len(locations) > most else ""
        lines.append(f"{problem}：{len(locations)} 行（{'、'.join(first)}{more}）")
    return lines


def count_thinkless(problems: Problems) -> int:
    """Return how many rows are left out because they have no thinking."""
    return sum(len(problems.get(problem, ())) for problem in THINKLESS)


def summary(lines: list[str], written: dict[str, Rows], problems: Problems) -> str:
    """Return what a person wants to know about the data, as text, after the `lines` on where it comes from.
    `written`: the rows of each file."""
    rows = sum(written.values(), ())
    lines = lines + [f"已写入    {path}：{len(part)} 行" for path, part in written.items()]
    lines += [f"未采用    {problem}" for problem in describe_problems(problems) or ["0 行"]]
    for field in FIELDS:
        lengths = [len(row[field]) for row in rows]
        middle = f"平均 {statistics.mean(lengths):.0f}，中位数 {statistics.median(lengths):.0f}"
        lines.append(f"字符数    {field}：{middle}，最长 {max(lengths)}")
    lines.append(f"多轮对话  {sum('history' in row for row in rows)} 行")
    lines += ["", "示例（训练集第 1 行）"]
    for title, field in zip(("问题", "思考", "回答"), FIELDS):
        lines.append(f"  {title}：{shorten(rows[0][field])}")
    return "\n".join(lines)
