"""A row of data: question, thinking and answer, checked and cleaned once. Knows no file format and no split."""

import json
import re
import statistics

from parts.terminal import shorten

FIELDS = ("question", "think", "answer")
THINKLESS = ("缺少字段 think", "think 为 null", "think 为空")  # what check says of a row without thinking
TAG = re.compile(r"</?think(?:ing)?>")
SURROGATE = re.compile("[\ud800-\udfff]")
# White space, controls, marks of width 0 and fillers: nothing is seen of them.
INVISIBLE = r"[\s\0-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0]"
Row = dict[str, str]  # of FIELDS; after earlier turns also history, [[question, answer], …]
Place = tuple[str, int]  # of a row: the name of its file, "" where there is but one, and its number
Placed = tuple[Place, object]  # a row, and where it stands
Problems = dict[str, list[Place]]  # why rows are left out, and where they stand


class Unusable(str):
    """Stands for a row that cannot be read: says why."""


SAME_FIELD_TWICE = Unusable("同一字段出现多次")


def strip_invisible(text: str) -> str:
    """Without what cannot be seen at its ends."""
    return re.sub(rf"\A{INVISIBLE}+|{INVISIBLE}+\Z", "", text)


def clean(text: str) -> str:
    """Strip white space, make line ends `\\n`, Excel's _x000D_ too, and turn a literal backslash-n into the line break
    it stands for. A text of which nothing can be seen is empty.

    Before a letter the two characters stay: there they begin a LaTeX command (\\nu) or a path.
    """
    text = re.sub(r"_x000[dD]_(\r?\n)?|\r\n?", "\n", text)
    text = re.sub(r"\\n(?![A-Za-z])", "\n", text).strip()
    return "" if re.fullmatch(f"{INVISIBLE}*", text) else text


def check(row: object, fields: tuple[str, ...] = FIELDS, thinkless: bool = False) -> Row:
    """The clean row of these fields, and of `history` where there is one. `thinkless`: a row without thinking is taken,
    its thinking is "". Raises ValueError with what is wrong, as the two functions below do."""
    if not isinstance(row, dict):
        raise ValueError(row if isinstance(row, Unusable) else "不是对象")
    cleaned = {}
    for field in fields:
        text = row.get(field)
        if field == "think" and thinkless and (text is None or isinstance(text, str) and not clean(text)):
            cleaned[field] = ""
        elif field in row:
            cleaned[field] = clean_field(field, text, answered=field != "question")
        else:
            raise ValueError(f"缺少字段 {field}")
    if row.get("history"):
        cleaned["history"] = clean_history(row["history"])
    return cleaned


def are_pairs(history: object) -> bool:
    return isinstance(history, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    )


def clean_history(history: object) -> list[list[str]]:
    if not are_pairs(history):
        raise ValueError("history 不是 [[问题, 回答], …]")
    return [
        [clean_field("history", asked, False), clean_field("history", said, True)] for asked, said in history
    ]


def clean_field(field: str, text: object, answered: bool) -> str:
    """`answered`: by the model, not by a person."""
    if not isinstance(text, str):
        raise ValueError(f"{field} 为 null" if text is None else f"{field} 不是文本")
    text = clean(text)
    if not text:
        raise ValueError(f"{field} 为空")
    if answered and TAG.search(text):  # the template writes them; these would be learnt as text
        raise ValueError(f"{field} 含 <think> 或 </think> 标签")
    if SURROGATE.search(text):
        raise ValueError(f"{field} 含无效字符（不成对的代理码点）")
    return text


def topic(row: dict) -> str:
    """The question that a conversation begins with."""
    return row["history"][0][0] if row.get("history") else row["question"]


def keep_usable(part: list[Placed], problems: Problems, seen: set[str], thinkless: bool) -> list[Placed]:
    """The clean, distinct rows of one part, in order, with the `instruction` that their writer had beside the question;
    `problems` gathers what is left out: reason -> places, `seen` the rows that there were."""
    kept = []
    for place, raw in part:
        try:
            row = check(raw, thinkless=thinkless)
            text = json.dumps(row)
            if text in seen:
                raise ValueError("与前面的行重复")
        except ValueError as problem:
            problems.setdefault(str(problem), []).append(place)
            continue
        seen.add(text)
        if isinstance(raw.get("instruction"), str):
            row["instruction"] = raw["instruction"]
        kept.append((place, row))
    return kept


def leave_out(part: list[Placed], other: list[Placed], problem: str, problems: Problems) -> list[Placed]:
    """The rows of `part` that begin with no question of the `other` part; `problems` gets the places of the rest."""
    topics = {topic(row) for _, row in other}
    kept = []
    for place, row in part:
        if topic(row) in topics:
            problems.setdefault(problem, []).append(place)
        else:
            kept.append((place, row))
    return kept


def describe_problems(problems: Problems, most: int = 5) -> list[str]:
    """One line per kind of problem: how many rows, and where the first ones are."""
    lines = []
    for problem, places in problems.items():
        first = [f"{file} 第 {number} 行".lstrip() for file, number in sorted(places)[:most]]
        more = " 等" if len(places) > most else ""
        lines.append(f"{problem}：{len(places)} 行（{'、'.join(first)}{more}）")
    if not problems.keys().isdisjoint(THINKLESS):
        lines.append("没有思考的行加 --without_thinking keep 就会采用，作为不思考的回答来学")
    return lines


def summary(lines: list[str], parts: dict[str, list[Placed]], problems: Problems) -> str:
    """What a person wants to know about the data, as text, after the `lines` on where it comes from. `parts`: the rows
    of each file."""
    rows = [row for part in parts.values() for _, row in part]
    lines = lines + [f"已写入    {path}：{len(part)} 行" for path, part in parts.items()]
    lines += [f"未采用    {line}" for line in describe_problems(problems)] or ["未采用    0 行"]
    for field in FIELDS:
        lengths = [len(row[field]) for row in rows]
        middle = f"平均 {statistics.mean(lengths):.0f}，中位数 {statistics.median(lengths):.0f}"
        lines.append(f"字符数    {field}：{middle}，最长 {max(lengths)}")
    lines.append(f"多轮对话  {sum('history' in row for row in rows)} 行")
    lines += ["", "示例（训练集第 1 行）"]
    lines += [f"  {name}：{shorten(rows[0][field])}" for name, field in zip(("问题", "思考", "回答"), FIELDS)]
    return "\n".join(lines)
