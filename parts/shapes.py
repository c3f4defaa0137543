"""The forms in which sets of questions, thinking and answers are published, to our fields: by the names of the columns
of all rows, then by what is in them. Reads no file; what a row's texts must be is rows.py's."""

import json

from parts.rows import FIELDS, SAME_FIELD_TWICE, TAG, Placed, Unusable, strip_invisible
from parts.terminal import shorten

# Lower-case names of leading sets; an exact field name goes before all of them.
ALIASES = {
    "question": ("问题", "instruction", "input", "prompt", "query", "problem"),
    "think": (
        *("思考", "思考过程", "complex_cot", "reasoning_content", "reasoning (reasoning_content)", "reasoning"),
        *("thinking", "cot"),
    ),
    "answer": ("回答", "答案", "response", "response (content)", "output", "content", "completion"),
}
CONVERSATIONS = ("messages", "conversations")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
THINKING = ("reasoning_content", "thinking", "reasoning")  # of a message


def to_fields(loaded: list[Placed], source: str, answered: bool = True) -> tuple[list[Placed], str | None]:
    """(rows with our fields, how they were made from the columns: None where they had them).

    A row that cannot be read becomes rows.Unusable. `answered`: whether the rows need answers, or may be questions
    alone. Raises SystemExit when the columns are not recognised, or two of them could be one field.
    """
    named = [(place, strip_names(row)) for place, row in loaded]
    columns = list(dict.fromkeys(name for _, row in named if isinstance(row, dict) for name in row))
    if not columns and not answered:
        return named, None
    if set(FIELDS) <= set(columns):
        taken, mapping = {field: [field] for field in FIELDS}, None
    elif turns := [name for name in columns if name.lower() in CONVERSATIONS]:
        if len(turns) > 1:
            raise SystemExit(f"错误：{source} 有两列对话：{quote(turns)}；请只留一列。")
        convert = lambda row: from_turns(row.get(turns[0]), answered)  # noqa: E731
        mapping = f"{turns[0]} 的各轮 -> question、think、answer；不用其中的 system（训练用本项目的系统提示词）"
        return [(place, convert(row) if isinstance(row, dict) else row) for place, row in named], mapping
    else:
        taken = {field: choose(field, columns, source) for field in FIELDS}
        if not taken["question"] or answered and not taken["answer"]:
            raise SystemExit(describe_unknown(named, columns, source))
        pairs = [f"{' + '.join(names)} -> {field}" for field, names in taken.items() if names and names != [field]]
        if not taken["think"]:
            pairs.append(f"{'、'.join(taken['answer']) or '回答'} 开头的 <think>…</think> -> think")
        if "system" in columns:
            pairs.append("不用 system（训练用本项目的系统提示词）")
        mapping = "，".join(pairs)
    return [
        (place, from_columns(row, taken, answered) if isinstance(row, dict) else row) for place, row in named
    ], mapping


def strip_names(row: object) -> object:
    """A row without blanks and invisible characters around the names of its columns."""
    if not isinstance(row, dict):
        return row
    stripped = {strip_invisible(name): value for name, value in row.items()}
    return stripped if len(stripped) == len(row) else SAME_FIELD_TWICE


def quote(names: list[str]) -> str:
    return "、".join(f"“{name}”" for name in names[:12]) or "无"


def choose(field: str, columns: list[str], source: str) -> list[str]:
    """The columns that are this field. Raises SystemExit when several could be."""
    if field in columns:
        return [field]
    found = [name for name in columns if name.lower() in (field, *ALIASES[field])]
    if [name.lower() for name in sorted(found, key=str.lower, reverse=True)] == ["instruction", "input"]:
        return sorted(found, key=str.lower, reverse=True)  # Alpaca's: the task, then what it is about
    if len(found) > 1:
        raise SystemExit(f"错误：{source} 有几列都可能是 {field}：{quote(found)}；请把要用的一列改名为 {field}。")
    return found


def from_columns(row: dict, taken: dict[str, list[str]], answered: bool) -> object:
    """One row of columns. Values that are no text stay as they are: the check names them."""
    values = {field: row[names[0]] for field, names in taken.items() if names and names[0] in row}
    if isinstance(values.get("question"), list) or isinstance(values.get("answer"), list):  # TRL's prompt, completion
        parts = (("user", values.get("question")), ("assistant", values.get("answer")))
        turns = [part if isinstance(part, list) else [{"role": role, "content": part}] for role, part in parts if part]
        return from_turns(sum(turns, []), answered)
    if len(taken["question"]) > 1:
        texts = [row.get(name) for name in taken["question"]]
        if all(text is None or isinstance(text, str) for text in texts):
            values["question"] = "\n".join(text for text in texts if text and strip_invisible(text))
    values, history = split_thinking(values), row.get("history")
    if isinstance(history, list) and history:  # a text, such as a patient's, is a column like any other
        pairs = all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history)
        if not pairs:
            return Unusable("history 不是 [[问题, 回答], …]")
        values["history"] = [[asked, split_thinking({"answer": said})["answer"]] for asked, said in history]
    return values


def split_thinking(values: dict) -> dict:
    """Thinking without its one pair of tags; where there is none, that at the beginning of the answer."""
    think, answer = values.get("think"), values.get("answer")
    if isinstance(think, str) and (text := strip_invisible(think)):
        inner = text.removeprefix("<think>").removesuffix("</think>")
        wrapped = len(text) - len(inner) == len("<think></think>") and not TAG.search(inner)
        return values | {"think": inner} if wrapped else values
    if isinstance(answer, str) and (think is None or isinstance(think, str)):
        before, end, after = answer.partition("</think>")
        before = strip_invisible(before).removeprefix("<think>")  # which R1's template gives, and its replies lack
        if end and "<think>" not in before:
            return values | {"think": before, "answer": after}
    return values


def from_turns(turns: object, answered: bool) -> object:
    """One conversation: its last exchange, the earlier ones without thinking as `history`."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Unusable("对话不是消息的列表")
    read = []
    for place, turn in enumerate(turns):
        name = turn.get("role") or turn.get("from")
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None or turn.get("tool_calls") or turn.get("function_call"):
            return Unusable("对话里有工具调用或不认识的角色")
        if role == "system" and place == 0:
            continue
        if role != ("user", "assistant")[len(read) % 2]:
            return Unusable("对话不是用户和助手轮流")
        text = turn["content"] if turn.get("content") is not None else turn.get("value")
        if isinstance(text, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
                return Unusable("消息里有不是文本的内容")
            text = "".join(part["text"] for part in text)
        think = next((turn[name] for name in THINKING if turn.get(name)), None)
        read.append(split_thinking({"think": think, "answer": text}) if role == "assistant" else {"question": text})
    if not answered and len(read) % 2:
        read.append({})
    if not read or len(read) % 2:
        return Unusable("对话不以助手的回答结束")
    earlier = [[question["question"], reply["answer"]] for question, reply in zip(read[:-2:2], read[1:-2:2])]
    return read[-2] | read[-1] | ({"history": earlier} if earlier else {})


def describe_unknown(named: list[Placed], columns: list[str], source: str) -> str:
    """What is there, and a command that makes our fields of it."""
    first = json.dumps(next((row for _, row in named if isinstance(row, dict)), None), ensure_ascii=False, default=str)
    names = [*columns, "列名", "列名", "列名"]
    made = ", ".join(f"'{field}': r[{name!r}]" for field, name in zip(FIELDS, names))
    return (
        f"错误：{source} 里认不出问题和回答（有这些列：{quote(columns)}；一行是 {shorten(first, 200)}）。"
        "能直接读的样子在 README 的“自己的数据”里；其他的先转换，例如（换成对应的列名和文件）：\n"
        '  python -c "from parts import row_files as f; '
        f"f.write({{'new.jsonl': f.to_jsonl([{{{made}}} for _, r in f.read({source!r})])}})\""
    )
