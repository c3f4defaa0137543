"""Rows in the forms of leading sets read back as the plain ones; what is not recognised is shown."""

import json

import pytest
from helpers import REAL, make_row, make_rows, refused

from parts.rows import shapes
from parts.rows.row import FIELDS, check


def block(row: dict) -> str:
    return f"<think>\n{row['think']}\n</think>\n\n{row['answer']}"


def turns(row: dict, role="role", text="content", users=("user", "assistant")) -> list[dict]:
    return [{role: users[0], text: row["question"]}, {role: users[1], text: block(row)}]


FORMS = {
    "plain": lambda r: r,
    "o1": lambda r: {"Question": r["question"], "Complex_CoT": r["think"], "Response": r["answer"]},
    "chinese r1": lambda r: {"input": r["question"], "reasoning_content": r["think"], "content": r["answer"]},
    "alpaca": lambda r: {"instruction": r["question"], "input": "", "output": block(r)},
    "prompt": lambda r: {"prompt": r["question"], "response": block(r).removeprefix("<think>")},
    "trl": lambda r: {"prompt": turns(r)[:1], "completion": turns(r)[1:]},
    "trl, thinking beside": lambda r: {"prompt": turns(r)[:1], "reasoning": r["think"], "response": r["answer"]},
    "messages": lambda r: {"messages": [{"role": "system", "content": "你是"}, *turns(r)]},
    "both": lambda r: {"question": r["question"], "reasoning": r["think"], "answer": block(r)},
    "empty block": lambda r: r | {"answer": f"<think>\n\n</think>\n\n{r['answer']}"},
    "turns as text": lambda r: {"messages": json.dumps(turns(r))},
    "turns as pandas' text": lambda r: {"messages": str(turns(r))},
    "lists of one text": lambda r: {"questions": [[r["question"], "x"]], "cot": r["think"], "answers": [r["answer"]]},
    "turns as columns": lambda r: {"conversations": {"from": ["human", "gpt"], "value": [r["question"], block(r)]}},
    "sharegpt": lambda r: {"conversations": turns(r, "from", "value", (" Human ", "gpt"))},
}


MARKS = {  # of thinking and answer, in leading sets and models
    "r1-zero": "<think>{think}</think>\n<answer>{answer}</answer>",
    "reflection": "<thinking>\n{think}</thinking>\n\n<output>\n{answer}\n</output>",
    "openthoughts": "<|begin_of_thought|>{think}<|end_of_thought|>\n<|begin_of_solution|>{answer}<|end_of_solution|>",
    "cohere": "<|START_THINKING|>{think}<|END_THINKING|><|START_RESPONSE|>{answer}<|END_RESPONSE|>",
    "gpt-oss": "<|channel|>analysis<|message|>{think}<|end|><|start|>assistant<|channel|>final<|message|>{answer}",
    "medgemma": "<unused94>thought\n{think}<unused95>{answer}",
    "mistral": "[THINK]{think}[/THINK]{answer}</s>",
    "kimi": "◁think▷{think}◁/think▷{answer}",
    "huatuo": "## Thinking\n\n{think}\n\n## Final Response\n\n{answer}",
    "bold": "**思考过程**：{think}\n\n**最终回答**：{answer}",
    "brackets": "【思考】{think}【回答】{answer}",
}
FORMS |= {
    name: lambda r, text=text: {"question": r["question"], "answer": text.format(**r)} for name, text in MARKS.items()
}


def convert(*rows: dict) -> tuple[list, str]:
    """The rows with our fields, and what is said of them."""
    located, mapping = shapes.to_fields(list(enumerate(rows, 1)), "x.jsonl")
    return [row for _, row in located], mapping


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_plain_rows(form):
    rows = make_rows(5)
    if REAL.is_dir():
        for line in (REAL / "medical_r1_120.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append(check({field: row[field] for field in FIELDS}))
    assert list(map(check, convert(*map(form, rows))[0])) == rows


EARLIER = ["问题1？", "回答1。"]
TABLE = {"Instruction": "问题2？", "Input": "", "Output": block(make_row(2))}
CONVERSATIONS = {  # what is said of a row, and the row
    "messages 的各轮": {"messages": turns(make_row(1)) + turns(make_row(2))},
    "history -> 前几轮": TABLE | {"history": [[EARLIER[0], "<think>想</think>" + EARLIER[1]]]},
    "History -> 前几轮": TABLE | {"History": json.dumps([EARLIER])},
}


@pytest.mark.parametrize("said, row", CONVERSATIONS.items(), ids=CONVERSATIONS)
def test_earlier_turns_are_kept_without_thinking(said, row):
    [converted], mapping = convert(row)
    assert check(converted) == make_row(2, history=[EARLIER]) and said in mapping


def test_shapes_may_be_mixed():
    """Each row by its own columns."""
    rows = make_rows(4)
    converted, mapping = convert(*(FORMS[form](row) for form, row in zip(("plain", "o1", "messages", "alpaca"), rows)))
    assert list(map(check, converted)) == rows
    assert mapping.split("；")[0] == "Question -> question，Complex_CoT -> think，Response -> answer"


def test_what_is_not_used_is_said():
    converted, mapping = convert(make_row(1) | {"Response": "x", "system": "你是", "id": 3})
    assert converted == [make_row(1)] and mapping == "忽略 Response、system"


ODD = [  # what is wrong with a row, and the row
    ("answer 含思考或对话模板的标记 <think>", {"question": "问", "answer": "<think>想"}),
    ("answer 含思考或对话模板的标记 <think>", {"question": "问", "think": "想", "answer": "<think>别的</think>答"}),
    ("question 不是文本", {"instruction": "算剂量", "input": ["50kg"], "output": "<think>想</think>答"}),
    ("对话不是消息列表", {"messages": "x"}),
    ("对话不是消息列表", {"messages": [3]}),
    ("对话里有工具调用或未知角色", {"messages": [{"role": "tool", "content": ""}]}),
    ("对话里有工具调用或未知角色", {"messages": [{"role": []}]}),
    ("对话不是用户和助手交替", {"messages": turns(make_row(1))[1:]}),
    ("对话没有以助手的回答结束", {"messages": turns(make_row(1))[:1]}),
    ("对话没有以助手的回答结束", {"messages": []}),
]


@pytest.mark.parametrize("problem, row", ODD)
def test_odd_row_is_named(problem, row):
    with pytest.raises(ValueError) as raised:
        check(convert(row)[0][0])
    assert str(raised.value) == problem


def test_two_columns_for_one_field_are_refused():
    row = {"question": "问", "response": "答", "output": "答"}
    refused("x.jsonl 有几列都可能是 answer：“response”、“output”；请把要用的一列改名为 answer。", convert, row)
