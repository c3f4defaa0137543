"""A file of questions: every reply in its place, and nothing that is there is written over."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import Started, load_attentive, refused

import data
import inference
from parts import question_file, replies
from parts.conversation import Conversation


def answer(model, tokenizer, questions: str, path: str = "replies.jsonl", thinking: bool = True) -> None:
    question_file.refuse_taken(path)
    conversation = Conversation(model, tokenizer, thinking, max_new_tokens=30, seed=42)
    question_file.answer(conversation, question_file.read(questions), data.to_messages, path)


@pytest.fixture
def likeliest(tiny_model):
    """A model that always takes the likeliest token, although replies.generate samples."""
    model = load_attentive(tiny_model)
    model.generation_config.top_k = 1
    return model


def read_lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_replies_come_in_the_order_of_the_questions(workspace, likeliest, tokenizer, capsys):
    rows = read_lines("val.jsonl")
    answer(likeliest, tokenizer, "val.jsonl", "out.jsonl")
    found = read_lines("out.jsonl")
    assert [row["question"] for row in found] == [row["question"] for row in rows]
    lengths = [len(row["question"]) for row in rows]
    assert sorted(lengths) != lengths != sorted(lengths, reverse=True)
    assert len({row["think"] + row["answer"] for row in found}) == len(rows)
    for row in found:
        [alone] = replies.generate(likeliest, tokenizer, [data.to_messages(row["question"])], max_new_tokens=30)
        assert alone[:3] == (row["think"], row["answer"], row["complete"])
    output = capsys.readouterr().out
    assert "ROUGE-L" in output and f"/{len(rows)}" in output and "out.jsonl" in output
    assert not Path("out.jsonl.part").exists()


def test_questions_from_a_text_file_without_references(workspace, likeliest, tokenizer, capsys):
    Path("q.txt").write_text("\ufeff 头痛怎么办？\r\n\n感冒了？", encoding="utf-8")
    answer(likeliest, tokenizer, "q.txt", thinking=False)
    assert [row["question"] for row in read_lines("replies.jsonl")] == ["头痛怎么办？", "感冒了？"]
    assert "ROUGE-L" not in capsys.readouterr().out


def test_a_question_is_asked_after_its_history(folder, likeliest, tokenizer):
    rows = [{"question": "多久？"}, {"question": "多久？", "history": [["头痛？", "先休息。"]]}]
    conversation = Conversation(likeliest, tokenizer, True, max_new_tokens=30, seed=42)
    question_file.answer(conversation, rows, data.to_messages, "out.jsonl")
    found = read_lines("out.jsonl")
    for row, reply in zip(rows, found):
        asked = data.to_messages("多久？", history=row.get("history"))
        [alone] = replies.generate(likeliest, tokenizer, [asked], max_new_tokens=30)
        assert alone[:3] == (reply["think"], reply["answer"], reply["complete"])
    assert found[0] != found[1]


def test_a_question_that_is_too_long_is_named_before_any_is_answered(folder, likeliest, tokenizer):
    likeliest.config.max_position_embeddings = 300
    Path("q.txt").write_text("头痛？\n" + "头" * 600, encoding="utf-8")
    message = "第 2 个问题连同之前的对话有 ~ 个 token，模型最多读 300 个；请缩短。"
    refused(message, answer, likeliest, tokenizer, "q.txt")
    assert sorted(path.name for path in folder.iterdir()) == ["q.txt"]


def test_batches_hold_every_prompt_once_and_fit():
    lengths = [10, 3000, 40, 500, 500, 7] * 20
    batches = question_file.make_batches(lengths, new_tokens=2000, max_tokens=10_000)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) * (longest + 2000) <= 10_000 and len(batch) <= question_file.BATCH_ROWS
    assert [len(batch) for batch in question_file.make_batches([9] * 130, 10, 10**9)] == [64, 64, 2]
    assert question_file.make_batches([9, 9], 10, 1) == [[0], [1]]  # too little memory: one at a time


def test_ctrl_c_keeps_what_is_answered(workspace, tiny_model):
    flags = ["--model_path", tiny_model, "--questions", "train.jsonl", "--max_new_tokens", "700"]
    process, part = Started("inference.py", flags, workspace), Path("replies.jsonl.part")
    while not (part.is_file() and part.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.stdout, process.stdout
    rows = read_lines(part)
    assert f"已答的 {len(rows)} 条在 {part}" in process.stdout and 0 < len(rows) < 108
    assert {row["question"] for row in rows} < {row["question"] for row in read_lines("train.jsonl")}
    with pytest.raises(SystemExit, match="replies.jsonl.part 已经存在"):
        question_file.refuse_taken("replies.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("missing.txt", None, "无法读取 --questions missing.txt"),
        ("missing.jsonl", None, "无法读取 --questions missing.jsonl"),
        ("folder.txt", "folder", "无法读取 --questions folder.txt"),
        ("q.docx", b"x", "应是 .txt"),
        ("q.txt", b" \n\n", "q.txt 里没有问题"),
        ("q.txt", "头痛？".encode("gbk"), "q.txt 第 1 行不是 UTF-8"),
        ("q.jsonl", b"", "q.jsonl 是空文件"),
        ("q.jsonl", '{"question": "头痛？"}\n{"text": "头痛？"}'.encode(), "q.jsonl 第 2 行没有问题"),
        ("q.jsonl", b'{"question": " "}', "q.jsonl 第 1 行没有问题"),
        ("q.jsonl", b'{"question": 3}', "q.jsonl 第 1 行没有问题"),
        ("q.jsonl", b"[]", "q.jsonl 里没有一行数据"),
        ("q.jsonl", b"{", "q.jsonl 第 1 行不是合法的 JSON"),
    ],
    ids=str,
)
def test_files_without_questions_get_one_sentence(tmp_path, monkeypatch, name, content, part):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"^错误：[^\n]*{part}[^\n]*$"):
        question_file.read(name)


def test_replies_that_cannot_be_written():
    with pytest.raises(SystemExit, match="无法写入 --replies /proc/no/replies.jsonl"):
        question_file.refuse_taken("/proc/no/replies.jsonl")


def test_a_place_for_replies_without_questions_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference.py", "--replies", "mine.jsonl"])
    with pytest.raises(SystemExit) as end:
        inference.main()
    assert end.value.code == 2 and "--replies 只和 --questions 一起起作用" in capsys.readouterr().err


def test_questions_and_a_conversation_exclude_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("头痛？", encoding="utf-8")
    for other in ("--chat", "感冒了？"):
        with pytest.raises(SystemExit) as error:
            inference.build_parser("", "").parse_args(["--questions", "q.txt", other])
        assert error.value.code == 2 and "not allowed with" in capsys.readouterr().err
