"""Rows in the forms of leading sets read back as the plain ones; what is not recognised is shown."""

import json

import pytest
from helpers import REAL, make_rows, refused

from parts.rows import shapes
from parts.rows.row import FIELDS, Unusable, check


def turns(row: dict, role: str, text: str, users: tuple[str, str]) -> list[dict]:
    return [{role: users[0], text: row["question"]}, {role: users[1], text: block(row)}]


def block(row: dict) -> str:
    return f"<think>\n{row['think']}\n</think>\n\n{row['answer']}"


CHAT = ("user", "assistant")
FORMS = {
    "plain": lambda r: r,
    "o1": lambda r: {"Question": r["question"], "Complex_CoT": r["think"], "Response": r["answer"]},
    "chinese r1": lambda r: {"input": r["question"], "reasoning_content": r["think"], "content": r["answer"]},
    "alpaca": lambda r: {"instruction": r["question"], "input": "", "output": block(r)},
    "prompt": lambda r: {"prompt": r["question"], "response": block(r).removeprefix("<think>")},
    "trl": lambda r: dict(zip(("prompt", "completion"), ([turn] for turn in turns(r, "role", "content", CHAT)))),
    "messages": lambda r: {"messages": [{"role": "system", "content": "你是"}, *turns(r, "role", "content", CHAT)]},
    "both": lambda r: {"question": r["question"], "reasoning": r["think"], "answer": block(r)},
    "empty block": lambda r: r | {"answer": f"<think>\n\n</think>\n\n{r['answer']}"},
    "turns as text": lambda r: {"messages": json.dumps(turns(r, "role", "content", CHAT))},
    "turns as columns": lambda r: {"conversations": {"from": ["human", "gpt"], "value": [r["question"], block(r)]}},
    "trl, thinking beside": lambda r: {
        "prompt": [{"role": " User ", "content": r["question"]}],
        "reasoning": r["think"],
        "response": r["answer"],
    },
    "sharegpt": lambda r: {"conversations": turns(r, "from", "value", ("human", "gpt"))},
}


def plain(loaded: list) -> list[dict]:
    return [{field: text.strip() for field, text in row.items()} for _, row in loaded]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_plain_rows(form):
    rows = make_rows(5)
    if REAL.is_dir():
        for line in (REAL / "medical_r1_120.jsonl").read_text(encoding="utf-8").splitlines():
            rows.append({field: json.loads(line)[field].strip() for field in FIELDS})
    assert plain(shapes.to_fields(list(enumerate(map(form, rows), 1)), "x.jsonl")[0]) == rows


def test_earlier_turns_are_kept_without_thinking():
    [first, second] = make_rows(2)
    messages = turns(first, "role", "content", CHAT) + turns(second, "role", "content", CHAT)
    [(_, row)], _ = shapes.to_fields([(1, {"messages": messages})], "x.jsonl")
    assert row["question"] == second["question"]
    assert [[text.strip() for text in turn] for turn in row["history"]] == [[first["question"], first["answer"]]]


def test_conversation_that_cannot_be_trained_on_is_named():
    half = turns(make_rows(1)[0], "role", "content", CHAT)[:1]
    for messages in ([], "x", [3], [{"role": "tool", "content": ""}], [{"role": []}], half):
        [(_, row)], _ = shapes.to_fields([(1, {"messages": messages})], "x.jsonl")
        assert isinstance(row, Unusable)


def test_shapes_may_be_mixed():
    """Each row by its own columns."""
    rows = make_rows(4)
    loaded = [FORMS[form](row) for form, row in zip(("plain", "o1", "messages", "alpaca"), rows)]
    found, mapping = shapes.to_fields(list(enumerate(loaded, 1)), "x.jsonl")
    assert plain(found) == rows
    assert mapping.split("；")[0] == "Question -> question，Complex_CoT -> think，Response -> answer"


def test_what_is_not_used_is_said():
    row = make_rows(1)[0] | {"Response": "x", "system": "你是", "id": 3}
    [(_, found)], mapping = shapes.to_fields([(1, row)], "x.jsonl")
    assert plain([(1, found)]) == make_rows(1) and mapping == "不用 Response、system"


@pytest.mark.parametrize(
    "name, value", [("history", [["前？", "<think>想</think>前。"]]), ("History", '[["前？", "前。"]]')]
)
def test_earlier_turns_of_a_table(name, value):
    row = {"Instruction": "问", "Input": "", "Output": "<think>想</think>答", name: value}
    [(_, found)], mapping = shapes.to_fields([(1, row)], "x.jsonl")
    assert found == {"question": "问", "think": "想", "answer": "答", "history": [["前？", "前。"]]}
    assert f"{name} -> 前几轮" in mapping


ODD = {  # a row, and what is wrong with it
    "answer 开头的思考没有结束": {"question": "问", "answer": "<think>想"},
    "answer 含 <think> 或 </think> 标签": {"question": "问", "think": "想", "answer": "<thinking>想</thinking>答"},
    "question 不是文本": {"instruction": "算剂量", "input": ["50kg"], "output": "<think>想</think>答"},
}


@pytest.mark.parametrize("problem, row", ODD.items())
def test_odd_row_is_named(problem, row):
    [(_, found)], _ = shapes.to_fields([(1, row)], "x.jsonl")
    with pytest.raises(ValueError) as raised:
        check(found)
    assert str(raised.value) == problem


def test_two_columns_for_one_field_are_refused():
    row = {"question": "问", "response": "答", "output": "答"}
    message = "x.jsonl 有几列都可能是 answer：“response”、“output”；请把要用的一列改名为 answer。"
    refused(message, shapes.to_fields, [(1, row)], "x.jsonl")
