"""A file of replies is gone on with only where it is ours, of these questions, and made in the same way."""

import json
from pathlib import Path

import pytest
from helpers import refused

from parts import reply_file
from parts.encoding import Reply

ROWS = [{"question": "头痛？", "history": []}, {"question": "感冒？"}, {"question": "头痛？"}]
BY = {"model": "output/full", "weights": "0123", "no_thinking": False, "max_new_tokens": 30, "seed": 42}
REPLIES = [Reply("想", f"答{place}", True, "one", 5, 0.25) for place in range(3)]


def write(*changes: dict, rows=ROWS, by=BY) -> str:
    """A file with a line for each of these, the reply to a question but for the changes."""
    lines = [json.loads(reply_file.to_line(row, reply, by)) for row, reply in zip(rows, REPLIES)]
    text = "".join(json.dumps(line | change) + "\n" for line, change in zip(lines, changes))
    Path("r.jsonl").write_text(text, encoding="utf-8")
    return "r.jsonl"


def test_what_is_written_is_read(folder):
    found = reply_file.read(write({}, {}, {}), ROWS, BY)
    assert found.replies == dict(enumerate(REPLIES)) and found.by == BY and found.in_order
    assert reply_file.read("none.jsonl", ROWS, BY).replies == {}
    line = json.loads(Path("r.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert list(line) == ["question", "think", "answer", "complete", "form", "tokens", "seconds", "by"]


KEPT = "它不会被改写，请移走它，或用 --replies 换一个文件名。"
NOT_OURS = f"--replies r.jsonl 已经存在，而第 {{}} 行不是 inference.py 写的回复；{KEPT}"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}", 1),
        ("\n", 1),
        ("头痛？\n", 1),
        ("头痛？", 1),
        ('{"question": "头痛？", "think": "想", "answer": "答"}', 1),  # a row of data, its line not ended
        ('{"question": "头痛？", "think": "想", "answer": "答", "complete": true}\n', 1),  # of an earlier version
        ("[" * 100_000, 1),
    ],
    ids=range(7),
)
def test_a_file_that_is_no_file_of_replies_stays_as_it_is(folder, content, line):
    Path("r.jsonl").write_text(content, encoding="utf-8")
    refused(NOT_OURS.format(line), reply_file.read, "r.jsonl", ROWS, BY)
    assert Path("r.jsonl").read_text(encoding="utf-8") == content


@pytest.mark.parametrize("change", [{"form": "two"}, {"tokens": "5"}, {"by": None}, {"think": None}, {"complete": 1}])
def test_a_line_that_somebody_changed_is_refused(folder, change):
    refused(NOT_OURS.format(2), reply_file.read, write({}, change), ROWS, BY)


@pytest.mark.parametrize(
    "asked", [[{"question": "别的？"}], ROWS[:2], [ROWS[0], ROWS[1], {"question": "头痛？", "history": [["甲", "乙"]]}]]
)
def test_replies_to_other_questions_are_refused(folder, asked):
    message = "--{} r.jsonl {}第 {} 行不是对 --questions 里问题的回复，或多了一次；{}"
    line, path = (1 if len(asked) == 1 else 3), write({}, {}, {})
    refused(message.format("replies", "已经存在，而", line, KEPT), reply_file.read, path, asked, BY)
    refused(
        message.format("compare_with", "", line, "请换一个文件。"), reply_file.read, path, asked, flag="--compare_with"
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "--seed 是 42，现在是 1"),
        (
            {"max_new_tokens": 9, "no_thinking": True},
            "--no_thinking 是 False，现在是 True；--max_new_tokens 是 30，现在是 9",
        ),
        ({"weights": "4567"}, "output/full 的权重变了"),
        ({"model": "Qwen/Qwen3-1.7B", "weights": None}, "模型是 output/full，现在是 Qwen/Qwen3-1.7B"),
    ],
)
def test_replies_that_were_made_otherwise_are_refused(folder, change, what):
    message = f"--replies r.jsonl 已经存在，而第 1 行是另一次提问的（{what}）；{KEPT}"
    refused(message, reply_file.read, write({}), ROWS, BY | change)


def test_one_file_holds_the_replies_of_one_model(folder):
    mixed = write({}, {"by": BY | {"seed": 7}})
    refused(
        "--compare_with r.jsonl 第 2 行是另一次提问的（--seed 是 7，现在是 42）；请换一个文件。",
        reply_file.read,
        mixed,
        ROWS,
        flag="--compare_with",
    )


def test_a_folder_that_was_moved_has_the_same_weights_still(folder):
    assert len(reply_file.read(write({}, {}, {}), ROWS, BY | {"model": "elsewhere"}).replies) == 3
    hub = BY | {"model": "Qwen/Qwen3-1.7B", "weights": None}
    assert len(reply_file.read(write({}, by=hub), ROWS, hub).replies) == 1


def test_a_place_where_nothing_can_be_written(folder):
    Path("r.jsonl").mkdir()
    missing = "No such file or directory"
    for path, why in (("/proc/no/r.jsonl", missing), ("", missing), ("r.jsonl", "Is a directory")):
        refused(f"无法写入 --replies {path}（{why}）；请换一个位置。", reply_file.require_writable, path)
    reply_file.require_writable("new.jsonl")
    assert [path.name for path in folder.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize("rest", [b"\0" * 40, b'{"ques\0\0\0', b'{"question": "\0\0', '{"question": "头'.encode()[:-1]])
def test_zeros_after_a_power_failure_are_a_line_that_was_cut_off(folder, rest):
    path = write({}, {})
    size = Path(path).stat().st_size
    Path(path).write_bytes(Path(path).read_bytes() + rest)
    found = reply_file.read(path, ROWS, BY)
    assert len(found.replies) == 2 and found.cut and found.size == size
