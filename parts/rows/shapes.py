"""The shapes in which sets of questions, thinking and answers are published, to our fields: by the names of a row's
columns, then by what is in them. Reads no file; what a row's texts must be is row.py's."""

import contextlib
import json

from parts.rows.row import FIELDS, TAG, Placed, Unusable, are_pairs, clean, strip_invisible
from parts.terminal import shorten

ALIASES = {  # lower-case names that leading sets have for a field; the field's own name goes before all of them
    "question": "问题,instruction,input,prompt,query,problem",
    "think": "思考,思考过程,complex_cot,reasoning_content,reasoning (reasoning_content),reasoning,thinking,cot",
    "answer": "回答,答案,response,response (content),output,content,completion",
}
TURNS = ("messages", "conversations", "conversation", "dialogue")
ROLES = {"user": "user", "human": "user", "system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
THINKING = ("reasoning_content", "thinking", "reasoning")  # of a message
CONVERT = (
    "能直接读的样子在 README 的“自己的数据”里；其他的先转换，换成自己的文件和列名，没有的一列删去：\n"
    "  python -c \"from parts.rows.files import *; write({'new.jsonl': to_jsonl([{'question': r['列名'],"
    " 'think': r['列名'], 'answer': r['列名']} for _, r in read('文件')])})\""
)


def to_fields(loaded: list[Placed], source: str, answered: bool = True) -> tuple[list[Placed], str]:
    """(rows with our fields, how they were made of the columns: "" where those are the fields).

    A row that cannot be read becomes row.Unusable. `answered`: whether the rows need answers, or may be questions
    alone. Raises SystemExit when no row's columns are recognised, or two of them could be one field.
    """
    chosen: dict[tuple, dict[str, list[str]]] = {}  # for each set of columns: those of each field
    converted, mappings = [], {}
    for place, raw in loaded:
        row = raw
        if isinstance(raw, dict):
            row = {strip_invisible(name): value for name, value in raw.items()}
            turns = [name for name in row if name.lower() in TURNS and row[name] not in (None, "")]
            columns = tuple(row)
            if turns:
                mappings[f"{turns[0]} 的各轮 -> question、think、answer，不用其中的 system"] = True
                row = from_turns(row[turns[0]], answered)
            else:
                if columns not in chosen:
                    chosen[columns] = {field: choose(field, columns, source, answered) for field in FIELDS}
                fields = chosen[columns]
                if fields["question"] and (fields["answer"] or not answered):
                    mappings[describe(fields, columns)] = True
                row = from_columns(row, fields, answered)
        converted.append((place, row))
    if chosen and not mappings:
        columns = quote(list(dict.fromkeys(name for names in chosen for name in names)))
        first = shorten(str(next(row for _, row in loaded if isinstance(row, dict))), 200)
        raise SystemExit(
            f"错误：{source} 里认不出问题和回答（有这些列：{columns}；一行是 {first}）。{CONVERT}"
        )
    return converted, "；".join(filter(None, mappings))


def choose(field: str, columns: tuple[str, ...], source: str, answered: bool) -> list[str]:
    """The columns that are this field. Raises SystemExit when several could be."""
    for wanted in ([field], ALIASES[field].split(",")):
        found = [name for name in columns if name == field] or [
            name for name in columns if name.lower() in wanted
        ]
        lower = [name.lower() for name in found]
        if sorted(lower) == ["input", "instruction"]:  # Alpaca's: the task, then what it is about
            return sorted(found, key=str.lower, reverse=True)
        if len(found) > 1 and (answered or field == "question"):
            raise SystemExit(
                f"错误：{source} 有几列都可能是 {field}：{quote(found)}；请把要用的一列改名为 {field}。"
            )
        if found:
            return found
    return []


def describe(fields: dict[str, list[str]], columns: tuple[str, ...]) -> str:
    """Which column is taken for which field, and which could have been and is not."""
    parts = [
        f"{' + '.join(names)} -> {field}" for field, names in fields.items() if names and names != [field]
    ]
    if not fields["think"]:
        parts.append(f"{'、'.join(fields['answer']) or '回答'} 开头的 <think>…</think> -> think")
    parts += [f"{name} -> 前几轮" for name in columns if name.lower() == "history"]
    like = {"system", *",".join(ALIASES.values()).split(",")} - {"instruction"}
    unused = [name for name in columns if name.lower() in like and name not in sum(fields.values(), [])]
    if unused:
        parts.append(f"不用 {'、'.join(unused)}")
    return "，".join(parts)


def quote(names: list[str]) -> str:
    return "、".join(f"“{name}”" for name in names[:12]) or "无"


def from_columns(row: dict, fields: dict[str, list[str]], answered: bool) -> object:
    """One row of columns. Values that are no text stay as they are: the check names them."""
    values = {field: row[names[0]] for field, names in fields.items() if names}
    lower = {name.lower(): value for name, value in row.items()}
    history = parse(lower.get("history"))
    if "instruction" in lower and "instruction" not in map(str.lower, fields["question"]):
        values["instruction"] = lower[
            "instruction"
        ]  # what the writer of the thinking was told; traces.py asks
    if isinstance(values.get("question"), list) or isinstance(
        values.get("answer"), list
    ):  # TRL's prompt, completion
        turns = []
        for role, field in (("user", "question"), ("assistant", "answer")):
            part = values.get(field) or []
            message = {"role": role, "content": part, "thinking": values.get("think")}
            turns += part if isinstance(part, list) else [message]
        return from_turns(turns, answered)
    if len(fields["question"]) > 1:
        texts = [row[name] for name in fields["question"] if row[name] not in (None, "")]
        values["question"] = "\n".join(texts) if all(isinstance(text, str) for text in texts) else texts
    values = split_thinking(values)
    if (
        isinstance(values.get("answer"), str)
        and not values.get("think")
        and TAG.match(values["answer"].lstrip())
    ):
        return Unusable("answer 开头的思考没有结束")
    if are_pairs(history):
        history = [[asked, split_thinking({"answer": said})["answer"]] for asked, said in history]
    if isinstance(history, list) and history:  # a text, such as a patient's, is a column like any other
        values["history"] = history
    return values


def parse(value: object) -> object:
    """What a cell of a table holds as JSON text; a struct of lists as a list of structs, as datasets stores them."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, turn)) for turn in zip(*value.values())]
    return value


def split_thinking(values: dict) -> dict:
    """Thinking without its one pair of tags; where there is none, that at the beginning of the answer. A template may
    itself open what a reply closes."""
    think, (before, after) = values.get("think"), cut(values.get("answer"))
    inner, rest = cut(think)
    if inner is not None and not clean(rest):
        think = values["think"] = inner
    if think is not None and not isinstance(think, str) or before is None:
        return values
    if not clean(think or ""):
        return values | {"think": before, "answer": after}
    return values | {"answer": after} if clean(before) in ("", clean(think)) else values


def cut(text: object) -> tuple[str | None, object]:
    """(thinking, rest) of a text that begins with thinking, else (None, text)."""
    if not isinstance(text, str) or "</think>" not in text:
        return None, text
    before, _, after = text.partition("</think>")
    before = strip_invisible(before).removeprefix("<think>")
    return (None, text) if TAG.search(before) else (before, after)


def from_turns(turns: object, answered: bool) -> object:
    """One conversation: its last exchange, the earlier ones without thinking as `history`."""
    turns = parse(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Unusable("对话不是消息的列表")
    read = []
    for place, turn in enumerate(turns):
        role = ROLES.get(str(turn.get("role") or turn.get("from")).strip().lower())
        if role is None or turn.get("tool_calls") or turn.get("function_call"):
            return Unusable("对话里有工具调用或不认识的角色")
        if role == "system" and place == 0:
            continue
        if role != ("user", "assistant")[len(read) % 2]:
            return Unusable("对话不是用户和助手轮流")
        text = turn["content"] if turn.get("content") is not None else turn.get("value")
        think = next((turn[name] for name in THINKING if turn.get(name)), None)
        read.append(
            split_thinking({"think": think, "answer": text}) if role == "assistant" else {"question": text}
        )
    if not answered and len(read) % 2:
        read.append({})
    if not read or len(read) % 2:
        return Unusable("对话不以助手的回答结束")
    earlier = [[question["question"], reply["answer"]] for question, reply in zip(read[:-2:2], read[1:-2:2])]
    return read[-2] | read[-1] | ({"history": earlier} if earlier else {})
