"""Rows in the forms of leading sets read back as the plain ones; what is not recognised is shown."""

import json

import pytest
from helpers import REAL, make_rows, refused

from parts import shapes
from parts.rows import Unusable


def turns(row: dict, role: str, text: str, users: tuple[str, str]) -> list[dict]:
    return [{role: users[0], text: row["question"]}, {role: users[1], text: block(row)}]


def block(row: dict) -> str:
    return f"<think>\n{row['think']}\n</think>\n\n{row['answer']}"


CHAT = ("user", "assistant")
FORMS = {
    "plain": lambda r: r,
    "wrapped": lambda r: r | {"think": f"<think>{r['think']}</think>"},
    "o1": lambda r: {"Question": r["question"], "Complex_CoT": r["think"], "Response": r["answer"]},
    "distill": lambda r: {
        "question": r["question"],
        "reasoning (reasoning_content)": r["think"],
        "response (content)": r["answer"],
    },
    "chinese r1": lambda r: {"input": r["question"], "reasoning_content": r["think"], "content": r["answer"]},
    "chinese": lambda r: {"问题": r["question"], "思考": r["think"], "回答": r["answer"]},
    "alpaca": lambda r: {"instruction": r["question"], "input": "", "output": block(r)},
    "prompt": lambda r: {"prompt": r["question"], "response": block(r).removeprefix("<think>")},
    "trl": lambda r: dict(zip(("prompt", "completion"), ([turn] for turn in turns(r, "role", "content", CHAT)))),
    "messages": lambda r: {"messages": [{"role": "system", "content": "你是"}, *turns(r, "role", "content", CHAT)]},
    "sharegpt": lambda r: {"conversations": turns(r, "from", "value", ("human", "gpt"))},
}


def plain(loaded: list) -> list[dict]:
    return [{field: text.strip() for field, text in row.items()} for _, row in loaded]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_plain_rows(form):
    rows = make_rows(5)
    if REAL.is_dir():
        lines = (REAL / "medical_r1_120.jsonl").read_text(encoding="utf-8").split("\n")
        real = [json.loads(line) for line in lines if line.strip()]
        rows += [{field: row[field].strip() for field in ("question", "think", "answer")} for row in real]
    assert plain(shapes.to_fields(list(enumerate(map(form, rows), 1)), "x.jsonl")[0]) == rows


def test_earlier_turns_are_kept_without_thinking():
    [first, second] = make_rows(2)
    messages = turns(first, "role", "content", CHAT) + turns(second, "role", "content", CHAT)
    [(_, row)], _ = shapes.to_fields([(1, {"messages": messages})], "x.jsonl")
    assert row["question"] == second["question"]
    assert [[text.strip() for text in turn] for turn in row["history"]] == [[first["question"], first["answer"]]]


@pytest.mark.parametrize(
    "messages",
    [[], "x", [3], [{"role": "tool", "content": ""}], [{"role": []}],
     turns(make_rows(1)[0], "role", "content", CHAT)[:1]]
)  # fmt: skip
def test_conversation_that_cannot_be_trained_on_is_named(messages):
    [(_, row)], _ = shapes.to_fields([(1, {"messages": messages})], "x.jsonl")
    assert isinstance(row, Unusable)


def test_two_columns_for_one_field_are_refused():
    row = {"question": "问", "response": "答", "output": "答"}
    message = "x.jsonl 有几列都可能是 answer：“response”、“output”；请把要用的一列改名为 answer。"
    refused(message, shapes.to_fields, [(1, row)], "x.jsonl")
