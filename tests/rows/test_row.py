"""A row is checked and cleaned once; what cannot be used is left out and named."""

from pathlib import Path

import pytest
from helpers import as_jsonl, make_row, make_rows, published, refused, save, written

import data
from parts import terminal
from parts.rows.row import FIELDS

pytestmark = pytest.mark.usefixtures("folder")
BAD = {
    '{"question": "问", "answer": "答"}': "缺少字段 think",
    '{"question": "问", "think": NaN, "answer": "答"}': "think 不是文本",
    '{"question": "问", "think": "思", "answer": %s}' % ("1" * 5000): "answer 不是文本",  # more than int() takes
    '{"question": "问", "think": "\\\\n", "answer": "答"}': "think 为空",  # a literal backslash-n alone
    '{"question": "问", "think": "\u200b\ufeff\u2060\u3164", "answer": "答"}': "think 为空",  # nothing to be seen
    '{"question": "问", "think": "思", "answer": "\\ud83d"}': "answer 含损坏的字符（乱码、私用区或半个字符）",
    '{"question": "问\ufffd", "think": "思", "answer": "答"}': "question 含损坏的字符（乱码、私用区或半个字符）",
    '["问", "思", "答"]': "不是对象",
    '{"question": "问", "question": "另问", "think": "思", "answer": "答"}': "同一字段出现多次",
    '{"question": "问", "think": "思", "answer": "别的</think>答"}': "answer 含思考或对话模板的标记 </think>",
    '{"question": "问", "answer": "<|thought|>思<|said|>答"}': "answer 含思考或对话模板的标记 <|thought|>",
    '{"question": "问", "answer": "## Thinking\\n思"}': "answer 含思考或对话模板的标记 ## Thinking",
    '{"question": "问", "think": "思", "answer": "答", "history": [["问", ""]]}': "history 为空",
}


@pytest.mark.parametrize("line, problem", BAD.items(), ids=lambda value: value[:60])
def test_unusable_row_is_left_out_and_named(line, problem, capsys):
    lines = as_jsonl(make_rows(30)).splitlines()
    lines[6] = line
    Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data.prepare("rows.jsonl")
    assert f"\n未采用    {problem}：1 行（第 7 行）\n" in capsys.readouterr().out
    assert written() == tuple([row for row in part if row != make_row(7)] for part in published(make_rows(30)))
    Path("val.jsonl").write_text(f"{as_jsonl(make_rows(2))}\n{line}\n", encoding="utf-8")
    refused(f"val.jsonl 第 4 行 {problem}；请用 python data.py ~ 重新生成。", data.read_examples, "val.jsonl")


@pytest.mark.parametrize("first, second", [(0, 0), (0, 1)], ids=["in train", "in both"])
@pytest.mark.parametrize("change", [{}, {"answer": "另一个回答"}], ids=["same answer", "other answer"])
def test_repeated_rows_are_left_out_and_rows_of_one_question_stay_together(first, second, change, capsys):
    parts = published(range(1, 41))
    original, copy = parts[first][1], parts[second][2]
    rows = make_rows(40)
    rows[copy - 1] = make_row(original, **change)
    spaced = [row | {"think": row["think"] + " " * i} for i, row in enumerate(rows)]  # white space is no difference
    data.prepare(save(spaced, "rows.jsonl"))
    assert f"\n未采用    {'0 行' if change else f'与前面的行重复：1 行（第 {copy} 行）'}\n" in capsys.readouterr().out
    train, val = written()
    assert {row["question"] for row in train}.isdisjoint(row["question"] for row in val)
    assert sorted(map(str, train + val)) == sorted(map(str, rows if change else rows[: copy - 1] + rows[copy:]))


def test_summary_tells_counts_lengths_problems_and_an_example(capsys):
    rows = [make_row(i, think="思" * i) for i in (2, 150, 4)] + [make_row(i, think=" ") for i in range(7)]
    data.prepare(save(rows, "rows.csv"), "new/a.jsonl", "b.jsonl")
    out = capsys.readouterr().out
    assert out.startswith(f"数据来源  rows.csv：共 10 行\nSHA-256   {terminal.sha256('rows.csv')}\n没有思考  7 行，")
    assert "行，未采用；其余可用的 3 行。加 --without_thinking keep，" in out and "\n清理      0/3 行的" in out
    assert "\n已写入    new/a.jsonl：2 行\n已写入    b.jsonl：1 行\n" in out
    assert "\n未采用    think 为空：7 行（第 5 行、第 6 行、第 7 行、第 8 行、第 9 行 等）\n" in out
    assert "\n字符数    think：平均 52，中位数 4，最长 150\n" in out
    first = data.read_examples("new/a.jsonl")[0]
    assert f"思考：{first['think'][:120]}" in out and out.endswith(f"\n  回答：{first['answer']}\n")


CLEANED = {
    "如下：\\n1. 休息": "如下：\n1. 休息",
    "一\r\n二\n三\r四_x000D_\n五": "一\n二\n三\n四\n五",  # Excel's line ends too
    r"频率 $\nu$ 与 C:\new": r"频率 $\nu$ 与 C:\new",
    "红\x1b[1;31m色\x1b[0m，响\x07铃，空\0字": "红色，响铃，空字",
    "一页\f又一页": "一页\n又一页",
    "里面  的 空格\t不动": "里面  的 空格\t不动",
}


def test_text_is_cleaned_and_else_untouched():
    data.prepare(save([dict.fromkeys(FIELDS, raw) for raw in CLEANED], "rows.jsonl"))
    assert {tuple(row.values()) for row in sum(written(), [])} == {(text,) * 3 for text in CLEANED.values()}
