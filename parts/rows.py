"""A row of data: three texts, checked and cleaned once. Knows no file format and no split."""

import re
import statistics

from parts.terminal import shorten

FIELDS = ("question", "think", "answer")
TAG = re.compile(r"</?think>")
SAME_FIELD_TWICE = object()  # stands for a row that has a field twice
Row = dict[str, str]
Place = int | tuple[str, int]  # of a row: its number, with the file's name where there are several


def clean(text: str) -> str:
    """Strip white space, make line ends `\\n`, and turn a literal backslash-n into the line break it stands for.

    Before a letter the two characters stay: there they begin a LaTeX command (\\nu) or a path.
    """
    return re.sub(r"\\n(?![A-Za-z])", "\n", text.replace("\r\n", "\n")).strip()


def check(row: object) -> tuple[Row | None, str | None]:
    """(clean row, None), or (None, what is wrong with it)."""
    if not isinstance(row, dict):
        return None, "同一字段出现多次" if row is SAME_FIELD_TWICE else "不是对象"
    cleaned = {}
    for field in FIELDS:
        if field not in row:
            return None, f"缺少字段 {field}"
        text = row[field]
        if text is None:
            return None, f"{field} 为 null"
        if not isinstance(text, str):
            return None, f"{field} 不是文本"
        if not (text := clean(text)):
            return None, f"{field} 为空"
        if field != "question" and TAG.search(text):  # the template writes them; these would be learnt as text
            return None, f"{field} 含 <think> 或 </think> 标签"
        try:
            text.encode()
        except UnicodeEncodeError:
            return None, f"{field} 含无效字符（不成对的代理码点）"
        cleaned[field] = text
    return cleaned, None


def keep_usable(part: list[tuple[Place, object]], problems: dict[str, list[Place]], taken: set[str]) -> list[Row]:
    """The clean, distinct rows of one part, in order; `problems` gathers what is left out: reason -> places.

    `taken` holds the questions of the other part, which must not appear here.
    """
    kept, seen = [], set()
    for number, raw in part:
        row, problem = check(raw)
        if row and tuple(row.values()) in seen:
            problem = "与前面的行重复"
        elif row and row["question"] in taken:
            problem = "验证集的问题也在训练集里"
        if problem:
            problems.setdefault(problem, []).append(number)
        else:
            seen.add(tuple(row.values()))
            kept.append(row)
    return kept


def describe_problems(problems: dict[str, list[Place]], most: int = 5) -> list[str]:
    """One line per kind of problem: how many rows, and where the first ones are."""
    lines = []
    for problem, places in problems.items():
        first, more = sorted(places)[:most], " 等" if len(places) > most else ""
        where = f"第 {'、'.join(map(str, first))}{more} 行"
        if isinstance(first[0], tuple):
            where = "、".join(f"{file} 第 {number} 行" for file, number in first) + more
        lines.append(f"{problem}：{len(places)} 行（{where}）")
    return lines


def summary(source: str, sha256: str, total: int, parts: dict[str, list[Row]], problems: dict) -> str:
    """What a person wants to know about the data, as text."""
    rows = [row for part in parts.values() for row in part]
    lines = [f"数据来源  {source}：共 {total} 行", f"SHA-256   {sha256}"]
    lines += [f"已写入    {path}：{len(part)} 行" for path, part in parts.items()]
    lines += [f"未采用    {line}" for line in describe_problems(problems)] or ["未采用    0 行"]
    for field in FIELDS:
        lengths = [len(row[field]) for row in rows]
        lines.append(
            f"字符数    {field}：平均 {statistics.mean(lengths):.0f}，"
            f"中位数 {statistics.median(lengths):.0f}，最长 {max(lengths)}"
        )
    example = rows[0]
    lines += ["", "示例（训练集第 1 行）"]
    lines += [f"  {name}：{shorten(example[field])}" for name, field in zip(("问题", "思考", "回答"), FIELDS)]
    return "\n".join(lines)
