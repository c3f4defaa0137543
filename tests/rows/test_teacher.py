"""Thinking made anew by a teacher, from data.py as a person runs it, against a server on this machine: what is asked
and learnt, what is left out and why, and that nothing is asked twice."""

import json
import os
import re
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_server import ChatServer, text
from helpers import Started, contents, make_row, published, refused, run_script, save, says, written

import data
from parts import endpoint
from parts.endpoint import KEY
from parts.replies import questions
from parts.run import model_card

SECRET = "sk-very-secret"
THOUGHT, ANSWER = "先想病因，再想怎么处理。看来答案是正确的。", "多休息，多喝水，不好再就医。"
PUBLISHED = "注意休息，清淡饮食，按时服药，定期复查，如果出现胸痛、气促或者高热不退，要马上到医院就诊。"
VERDICT = text("两个都说休息。\n**裁决：一致**")


def said(content: str | None = ANSWER, field: str = "reasoning_content", thought: str = THOUGHT, tokens=900, **choice):
    message = {"role": "assistant", "content": content, field: thought}
    return json.dumps({"choices": [{"message": message, **choice}], "usage": {"total_tokens": tokens}}).encode()


# What the teacher replies to the question of this number, and what is said of it; all but one is asked once.
FAULTS = {
    10: ((500, b""), "没有回复（HTTP 500）"),
    11: (said()[:-30], "没有回复（返回的内容不符合"),
    12: (said("", finish_reason="length"), "回复被截断，或超过 2048 个 token"),
    13: (said(tokens=2049), "回复被截断，或超过 2048 个 token"),
    14: (said("<think>先想", thought=""), "思考没有写完"),
    15: (said(thought=""), "think 为"),
    16: (said(None), "answer 为"),
    17: (said(thought="Okay, the user asks about a cold. First, rest."), "没有用中文"),
    18: (said(thought=f"想一想。{PUBLISHED}"), "思考照抄了原来的回答"),
    19: (said(thought="根据提供的答案，要休息。"), "思考有答案泄露"),
}
VERDICTS = {20: (text("裁决：不一致"), "回答和原来的不一致"), 21: (text("都好"), "没有裁决（没有唯一的一行裁决）")}
# What gets no reply is asked again: three times at once where its trouble may pass, else by the next command.
UNANSWERED = Counter({(10, False): 100, (11, False): 100, (21, True): 100})
FINE = {
    30: said(field="reasoning"),
    31: said(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}", thought=""),
    32: said(PUBLISHED),  # as the row's own: nothing is to be compared
}
ROWS = [make_row(i, answer=PUBLISHED, instruction="写出思考过程") | {"think": ""} for i in range(40)]


def number_of(body) -> int:
    return int(re.search(r"问题(\d+)？", body["messages"][-1]["content"])[1])


def is_comparison(body) -> bool:
    return "裁决" in body["messages"][0]["content"]


def teach(body):
    number = number_of(body)
    if is_comparison(body):
        return VERDICTS.get(number, [VERDICT])[0]
    return FAULTS.get(number, [FINE.get(number, said())])[0]


@pytest.fixture
def server(monkeypatch, folder):
    monkeypatch.setenv(KEY, SECRET)
    save(ROWS, "rows.jsonl")
    with ChatServer(teach) as server:
        yield server


def flags(server, *more: str) -> list[str]:
    return ["--dataset", "rows.jsonl", "--think_with", server.url, *more]


def asked(server) -> Counter:
    """How often each thing was asked since the last call: (number of the question, whether to compare)."""
    bodies = [body for _, path, _, body in server.requests if path.endswith("/completions")]
    server.requests.clear()
    return Counter((number_of(body), is_comparison(body)) for body in bodies)


def test_what_is_asked_learnt_and_left_out_and_nothing_is_asked_twice(server, folder):
    result = run_script("data.py", *flags(server), cwd=folder, fresh=True)
    out = result.stdout
    assert result.returncode == 0 and "要问 40 行，至多 80 次请求，约 100,000 token" in out, out
    for number, (_, reason) in (FAULTS | VERDICTS).items():
        assert re.search(rf"教师模型：.*{re.escape(reason)}.*第 .*\b{number + 1}\b", out), (reason, out)
    for (_, _, headers, body), number in [(request, number_of(request[3])) for request in server.requests[1:]]:
        assert headers["authorization"] == f"Bearer {SECRET}" and "思考过程" not in body["messages"][-1]["content"]
        assert is_comparison(body) == (PUBLISHED in str(body)) and (is_comparison(body) or body["max_tokens"] == 2048)
        assert not (is_comparison(body) and number in FAULTS | {32: 0})
    train, val = written()
    kept = [row for part in published(ROWS) for row in part if (int(row["question"][2:-1])) not in FAULTS | VERDICTS]
    assert [row["question"] for row in train + val] == [row["question"] for row in kept]
    for row in train + val:
        answer = PUBLISHED if row["question"] == "问题32？" else ANSWER
        assert (row["think"], row["answer"]) == (THOUGHT, answer) and "instruction" not in row
    assert {row.get("reference") for row in val} == {PUBLISHED} and "reference" not in str(train)
    assert {row["answer"] for row in questions.read("val.jsonl")} == {PUBLISHED}  # what the scores use
    assert [row["answer"] for row in data.read_examples("val.jsonl")] == [ANSWER] * len(val)
    origin = data.read_origin("train.jsonl")
    assert origin["teacher"] == {"model": "judge", "rows": 28}
    assert "28 行（含验证集）的思考和回答由 judge 重写" in model_card.describe_origin(origin)
    assert SECRET not in str(contents(folder)) + out

    first, before = asked(server), written()
    again = run_script("data.py", *flags(server), cwd=folder)
    assert again.returncode == 0 and written() == before and "要问 3 行" in again.stdout
    assert asked(server).keys() == UNANSWERED.keys() and max((first - UNANSWERED).values()) == 1
    server.models = b'{"data": [{"id": "another"}]}'
    run_script("data.py", *flags(server, "--think_limit", "30"), cwd=folder)
    assert max(map(len, written())) < 26 and len(asked(server)) > 30  # another teacher: all anew


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_what_was_interrupted_goes_on_and_is_not_paid_for_twice(server, folder, number):
    Path("train.jsonl").write_text("old", encoding="utf-8")
    server.speak = lambda body: time.sleep(0.05) or teach(body)
    started = Started("data.py", flags(server), folder, os.environ)
    while len(server.requests) < 40:
        assert started.poll() is None, started.stdout
        time.sleep(0.01)
    started.send_signal(number)
    assert started.wait() in (130, -number), started.stdout
    assert Path("train.jsonl").read_text(encoding="utf-8") == "old" and not Path("val.jsonl").exists()
    with open("train.jsonl.teacher.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "cut o')
    result = run_script("data.py", *flags(server), cwd=folder)
    assert result.returncode == 0 and list(map(len, written())) == [26, 2], result.stdout
    twice = [
        key for key, times in asked(server).items() if times > 1 and key not in ((10, False), (11, False), (21, True))
    ]
    assert len(twice) <= (0 if number == signal.SIGINT else endpoint.AT_ONCE), twice  # what was under way when it died


USELESS = {
    "down": ((500, b""), "前 8 行都没有能用的回复（教师模型：没有回复（HTTP 500） 8 行）~"),
    "no thinking": (said(thought=""), "前 8 行都没有能用的回复（教师模型：think 为~"),
    "English": (said(thought="Okay, let me think."), "前 8 行都没有能用的回复（教师模型：没有用中文 8 行）~"),
    "nonsense": (text("哈"), "前 8 行都没有能用的回复（~"),
}


@pytest.mark.parametrize("reply, message", USELESS.values(), ids=USELESS)
def test_a_teacher_that_is_of_no_use_is_given_up_and_no_file_changes(server, folder, monkeypatch, reply, message):
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    Path("train.jsonl").write_text("old", encoding="utf-8")
    server.speak = lambda body: reply
    refused(message, data.prepare, "rows.jsonl", think_with=server.url)
    assert sum(asked(server).values()) == 8 and not Path("val.jsonl").exists()
    assert Path("train.jsonl").read_text(encoding="utf-8") == "old"


def test_what_can_be_known_at_once_is_said_at_once(server, folder, monkeypatch):
    save([make_row(i) for i in range(40, 60)], "thought.jsonl")
    refused(
        "每一行都有思考；要让教师模型重新思考，请加 --rethink。", data.prepare, "thought.jsonl", think_with=server.url
    )
    data.prepare("thought.jsonl", think_with=server.url, think_model="named", rethink=True)
    assert {row["think"] for row in sum(written(), [])} == {THOUGHT} and server.requests[-1][3]["model"] == "named"
    server.models = b'{"data": [{"id": "a"}, {"id": "b"}]}'
    refused("~有 2 个模型（a、b），请用 --think_model 指定一个。", data.prepare, "rows.jsonl", think_with=server.url)
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    refused("~的模型用不了：连不上。", data.prepare, "rows.jsonl", think_with="http://127.0.0.1:9/v1")
    refused(
        "写 no/where/t~已有的回复都还在~", full_disk, 0, train_file="no/where/t", think_with=server.url, think_model="x"
    )
    keep = ["--think_with", server.url, "--without_thinking", "keep"]
    for wrong, message in (["--rethink"], "--~起作用"), (keep, "--~同时使用"):
        result = run_script("data.py", *wrong, cwd=folder)
        assert result.returncode == 2 and says(result.stdout.splitlines()[-1], message), result.stdout


def full_disk(room: int, **options) -> None:
    """data.prepare where no file may become longer than this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        data.prepare("rows.jsonl", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_what_was_replied_stays(server):
    refused("写 train.jsonl.teacher.jsonl 失败~", full_disk, 4000, think_with=server.url)
    first = asked(server)
    data.prepare("rows.jsonl", think_with=server.url)
    assert list(map(len, written())) == [26, 2]
    assert len(first & asked(server) - UNANSWERED) <= endpoint.AT_ONCE  # what could not be written
