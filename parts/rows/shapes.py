"""The shapes in which sets of questions, thinking and answers are published, to our fields: by the names of a
row's columns, then by what is in them. Reads no file; what a row's texts must be is row.py's."""

import ast
import contextlib
import itertools
import json
import re

from parts.rows.row import BLOCKS, FIELDS, MARK, LocatedRows, Unusable, are_pairs, clean, strip_invisible
from parts.terminal import shorten

ALIASES = {  # lower-case names of a field in leading sets; the field's own name goes before all of them
    "question": "问题,questions,instruction,input,prompt,query,problem",
    "think": "思考,思考过程,complex_cot,reasoning_content,reasoning (reasoning_content),"
    "reasoning,thinking,cot",
    "answer": "回答,答案,answers,response,response (content),output,content,completion",
}
# Columns of which one is told when they are not used. An instruction is: traces.py wants to know it.
TOLD_UNUSED = {"system", *",".join(ALIASES.values()).split(",")} - {"instruction"}
TURNS = ("messages", "conversations", "conversation", "dialogue")
ROLES = {"user": "user", "human": "user", "system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
CONVERT = (
    "支持的格式见 README 的“自己的数据”；其他格式请先转换（换成自己的文件名和列名，没有的列删去）：\n"
    "  python -c \"from parts.rows.files import *; write({'new.jsonl': to_jsonl([{'question': r['列名'],"
    " 'think': r['列名'], 'answer': r['列名']} for _, r in read('文件')])})\""
)
SPLIT = [re.compile(rf"\s*{start}(?P<think>.*?){end}", re.I | re.M | re.S) for start, end in BLOCKS]
# Marks at the ends of an answer.
EDGES = re.compile(rf"\A(?:\s*{MARK.pattern})+|(?:{MARK.pattern}\s*)+\Z")
Fields = dict[str, list[str]]  # each of FIELDS: the columns that it is made of, perhaps none


def to_fields(loaded: LocatedRows, source: str, answered: bool = True) -> tuple[LocatedRows, str]:
    """Return rows with our fields, and how they were made of the columns: "" where those are the fields.

    A row that cannot be read becomes row.Unusable. `answered`: whether the rows need answers, or may be
    questions alone. It raises SystemExit when no row's columns are recognised, or two of them could be one
    field.
    """
    # Each row is read by its own columns, as files that were put together mix shapes.
    chosen: dict[tuple[str, ...], Fields] = {}
    converted, example = [], None
    mappings = {}  # a dict, as a set would forget the order
    for location, raw in loaded:
        if not isinstance(raw, dict):
            converted.append((location, raw))  # row.check says what it is
            continue
        row = dict(zip(map(strip_invisible, raw), raw.values()))
        turns = [name for name, value in row.items() if name.lower() in TURNS and value not in (None, "")]
        if turns:
            mappings[f"{turns[0]} 的各轮 -> question、think、answer，忽略其中的 system"] = True
            converted.append((location, from_turns(row[turns[0]], answered)))
            continue
        columns = tuple(row)
        if columns not in chosen:
            example = example or raw
            fields = {field: choose(field, columns, source, answered) for field in FIELDS}
            chosen[columns] = fields
            if fields["question"] and (fields["answer"] or not answered):
                mappings[describe_fields(fields, row)] = True
        converted.append((location, from_columns(row, chosen[columns], answered)))
    if chosen and not mappings:
        columns = quote(dict.fromkeys(itertools.chain.from_iterable(chosen)))
        shown = f"有这些列：{columns}；一行是 {shorten(str(example), 200)}"
        raise SystemExit(f"错误：{source} 里认不出问题和回答（{shown}）。{CONVERT}")
    return converted, "；".join(filter(None, mappings))


def choose(field: str, columns: tuple[str, ...], source: str, answered: bool) -> list[str]:
    """Return the columns that are this field. It raises SystemExit when several could be."""
    own, aliases = [], []
    for name in columns:
        if name.lower() == field:
            own.append(name)
        elif name.lower() in ALIASES[field].split(","):
            aliases.append(name)
    names = [field] if field in columns else own or aliases
    if sorted(map(str.lower, names)) == ["input", "instruction"]:
        return sorted(names, key=str.lower, reverse=True)  # Alpaca's: the task, then what it is about
    if len(names) > 1 and (answered or field == "question"):
        remedy = f"请把要用的一列改名为 {field}"
        raise SystemExit(f"错误：{source} 有几列都可能是 {field}：{quote(names)}；{remedy}。")
    return names


def describe_fields(fields: Fields, row: dict) -> str:
    """Return, for people, which column is taken for which field, and which could have been and is not, by the
    first row that has these columns."""
    parts, used, unused = [], [], []
    for field, names in fields.items():
        used += names
        if names and names != [field]:
            parts.append(f"{' + '.join(names)} -> {field}")
    if not fields["think"]:
        parts.append(f"{'、'.join(fields['answer']) or '回答'} 开头的 <think>…</think> -> think")
    for name, value in row.items():
        if name in used and first_text(value) is not value:
            parts.append(f"{name} 是列表，取第一个文本")
        elif name.lower() == "history":
            parts.append(f"{name} -> 前几轮")
        elif name.lower() in TOLD_UNUSED and name not in used:
            unused.append(name)
    if unused:
        parts.append(f"忽略 {'、'.join(unused)}")
    return "，".join(parts)


def quote(names) -> str:
    """Return the first twelve names, for people."""
    return "、".join(f"“{shorten(name, 40)}”" for name in list(names)[:12]) or "无"


def first_text(value: object) -> object:
    """Return the first text of [text, …] or [[text, …], …], whose texts say the same in other words; any
    other value as it is."""
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    return first if isinstance(first, str) else value


def from_columns(row: dict, fields: Fields, answered: bool) -> object:
    """Return one row of columns with our fields. Values that are no text stay: the check names them."""
    values = {field: first_text(row[names[0]]) for field, names in fields.items() if names}
    question, answer = values.get("question"), values.get("answer")
    if isinstance(question, list) or isinstance(answer, list):
        # TRL's prompt and completion: either may be a list of messages.
        turns = []
        for role, part in (("user", question), ("assistant", answer)):
            if part and not isinstance(part, list):
                part = [{"role": role, "content": part, "thinking": values.get("think")}]
            turns += part or []
        return from_turns(turns, answered)

    if len(fields["question"]) > 1:
        texts = [row[name] for name in fields["question"] if row[name] not in (None, "")]
        values["question"] = "\n".join(texts) if set(map(type, texts)) <= {str} else texts
    values = split_thinking(values)

    lowered = dict(zip(map(str.lower, row), row.values()))
    if "instruction" in lowered and "instruction" not in map(str.lower, fields["question"]):
        values["instruction"] = lowered["instruction"]  # what the writer of the thinking was told
    history = decode_cell(lowered.get("history"))
    if are_pairs(history):
        history = [[question, split_block(reply)[1]] for question, reply in history]
    if isinstance(history, list) and history:  # a text, such as a patient's, is a column like any other
        values["history"] = history
    return values


def decode_cell(value: object) -> object:
    """Return what a cell of a table holds as the text of JSON or, as pandas writes lists, of Python; of a
    struct of lists, as datasets stores a list of structs, that list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value.strip())
    if isinstance(value, dict) and set(map(type, value.values())) == {list}:
        return [dict(zip(value, turn)) for turn in zip(*value.values())]
    return value


def split_thinking(values: dict) -> dict:
    """Return the fields with the thinking without its one pair of tags; where there is none, it is the block
    that the answer begins with."""
    think = values.get("think")
    inner, rest = split_block(think)
    if inner is not None and not clean(rest):
        values["think"] = think = inner
    before, after = split_block(values.get("answer"))
    if before is None or not isinstance(think, str | None):
        return values
    if not clean(think or ""):
        return values | {"think": before, "answer": after}
    # An answer that repeats the thinking of its column, or an empty block, goes without; another one stays,
    # for the check to name: which of the two is the row's cannot be told.
    return values | {"answer": after} if clean(before) in ("", clean(think)) else values


def split_block(text: object) -> tuple[str | None, object]:
    """Return (thinking, rest) of a text that begins with a block of thinking, else (None, text). Marks of the
    answer around the rest go."""
    if not isinstance(text, str):
        return None, text
    if "</think>" in text:
        # A template may itself open what a reply closes: then there is only the closing tag.
        text = "<think>" + strip_invisible(text).removeprefix("<think>")
    for pattern in SPLIT:
        if match := pattern.match(text):
            return match["think"], EDGES.sub("", text[match.end() :])
    return None, text


def from_turns(turns: object, answered: bool) -> object:
    """Return one conversation with our fields: its last exchange, and the earlier ones without thinking as
    `history`."""
    turns = decode_cell(turns)
    if not isinstance(turns, list) or not set(map(type, turns)) <= {dict}:
        return Unusable("对话不是消息列表")
    messages = []
    for number, turn in enumerate(turns):
        role = ROLES.get(str(turn.get("role") or turn.get("from")).strip().lower())
        if role is None or turn.get("tool_calls") or turn.get("function_call"):
            return Unusable("对话里有工具调用或未知角色")
        if role == "system" and number == 0:
            continue  # the project trains with its own
        if role != ("assistant" if len(messages) % 2 else "user"):
            return Unusable("对话不是用户和助手交替")
        text = turn["content"] if turn.get("content") is not None else turn.get("value")
        if role == "user":
            messages.append({"question": text})
        else:
            think = turn.get("reasoning_content") or turn.get("thinking") or turn.get("reasoning") or None
            messages.append(split_thinking({"think": think, "answer": text}))
    if not answered and len(messages) % 2:
        messages.append({})  # the reply that is to be asked for
    if not messages or len(messages) % 2:
        return Unusable("对话没有以助手的回答结束")
    earlier = zip(messages[:-2:2], messages[1:-2:2])
    history = [[question["question"], reply["answer"]] for question, reply in earlier]
    row = messages[-2] | messages[-1]
    return row | {"history": history} if history else row
