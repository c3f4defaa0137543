"""The commands for medical exams in tests/benchmarks/README.md: an unfinished thinking is wrong, whatever
letters are in it.

EVALSCOPE names the program, which has an environment of its own; where there is none, only the filter is tested. The
questions of tests/demo/exam.jsonl go through the real EvalScope to a server on loopback; the sets of the exams
themselves are not here."""

import json
import os
import re
import shlex
import shutil
import subprocess
from functools import partial

import pytest
from chat_server import ChatServer
from helpers import ROOT

EVALSCOPE = os.environ.get("EVALSCOPE") or shutil.which("evalscope")
QUESTIONS = "tests/demo/exam.jsonl"
ROWS = [json.loads(line) for line in (ROOT / QUESTIONS).read_text(encoding="utf-8").splitlines()]
KINDS = [  # one for each question: the thinking, whether it is finished, what follows it, whether that is right
    ("像是{wrong}。答案：{wrong}。不对，再想。", True, "答案：{right}", 1),
    ("答案：{right}", True, "答案：{wrong}", 0),
    ("应该选{right}。答案：{right}", False, "", 0),
    ("", True, "答案：{right}", 1),
    ("", True, "多喝水，早点休息。", 0),
    ("", True, "", 0),
]


def commands() -> list[list[str]]:
    """The words of those lines that run EvalScope."""
    lines = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("evalscope eval ")]


def message(field: str, row: dict, think: str, finished: bool, answer: str) -> dict:
    """A reply as a server sends it: thinking in the text, or in a field of its own."""
    letters = {"right": row["answer"], "wrong": "B" if row["answer"] != "B" else "C"}
    think, answer = think.format(**letters), answer.format(**letters)
    if field != "content":
        return {"role": "assistant", field: think or None, "content": answer or None}
    mark = "\n</think>\n\n" if finished else ""
    return {"role": "assistant", "content": f"<think>\n{think}{mark}{answer}" if think else answer}


def reply(field: str, body: dict) -> bytes:
    """What a server sends whose model answers the questions, one in each way; its thinking goes into `field`."""
    [user] = body["messages"]  # the system prompt is in the model's chat template
    [number] = [i for i, row in enumerate(ROWS) if row["question"] in user["content"]]
    think, finished, answer, _ = KINDS[number]
    choice = {"index": 0, "message": message(field, ROWS[number], think, finished, answer)}
    choice["finish_reason"] = "stop" if finished else "length"
    sent = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
    return json.dumps(sent).encode()


@pytest.mark.skipif(not EVALSCOPE, reason="EVALSCOPE names no program and none is on PATH")
@pytest.mark.parametrize("field", ["content", "reasoning_content", "reasoning"])
def test_an_unfinished_thinking_is_wrong(field, folder):
    [words] = [words for words in commands() if QUESTIONS in " ".join(words) and "--api-url" in words]
    (folder / "tests" / "demo").mkdir(parents=True)
    shutil.copy(ROOT / QUESTIONS, QUESTIONS)
    with ChatServer(partial(reply, field)) as server:
        words[0], words[words.index("--api-url") + 1] = EVALSCOPE, server.url
        subprocess.run(words, check=True)
    [reviews] = folder.glob("output/exam/*/reviews/**/*.jsonl")
    reviews = [json.loads(line) for line in reviews.read_text(encoding="utf-8").splitlines()]
    right = {review["index"]: review["sample_score"]["score"]["value"]["accuracy"] for review in reviews}
    assert [right[i] for i in range(len(ROWS))] == [kind[-1] for kind in KINDS]


def test_only_what_follows_a_finished_thinking_is_marked():
    """Also where the template writes the opening mark itself."""
    options = [json.loads(words[words.index("--dataset-args") + 1]) for words in commands()]
    exams = [args for sets in options for name, args in sets.items() if name != "health_bench"]  # a judge marks that
    filters = [args["filters"] for args in exams]
    assert filters and all(set(one) == {"regex"} for one in filters)
    for one in filters:
        for reply in ("<think>\n答案：A\n</think>\n\n答案：B", "答案：A\n</think>\n\n答案：B"):
            assert re.findall(one["regex"], reply) == ["\n\n答案：B"]
        for reply in ("<think>\n答案：A", "<think>\n想\n</think>\n<think>\n答案：A"):
            assert re.findall(one["regex"], reply) == []
        assert re.findall(one["regex"], "答案：B") == ["答案：B"]
