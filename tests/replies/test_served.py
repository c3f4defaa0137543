"""A file of questions answered by a server: in which two parts its replies come, and what goes wrong with it."""

import json
from pathlib import Path

import pytest
from chat_server import ChatServer, text
from helpers import run_script

from parts import endpoint
from parts.endpoint import Completion
from parts.model.encoding import Reply
from parts.replies.served import to_reply

QUESTIONS = ["头痛？", "感冒？", "失眠？", "发烧？", "咳嗽？"]


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        (Completion("多休息。", "想一想", False, 9, 7), Reply("想一想", "多休息。", True, "one", 7, 1)),
        (Completion("<think>\n想\n</think>\n\n多休息。", "", False, 9, 7), Reply("想", "多休息。", True, "one", 7, 1)),
        (Completion("多休息。", "", False, 0, 0), Reply("", "多休息。", True, "none", 0, 1)),
        (Completion("<think>\n想了很久", "", True, 9, 7), Reply("想了很久", "", False, "unclosed", 7, 1)),
        (Completion("", "想了很久", True, 9, 7), Reply("想了很久", "", False, "unclosed", 7, 1)),
        (Completion("多休", "想", True, 9, 7), Reply("想", "多休", False, "one", 7, 1)),
    ],
)
def test_thinking_and_answer_are_told_apart(said, reply):
    assert to_reply(said, 1) == reply


def test_a_server_answers_a_file_and_what_is_answered_is_not_asked_again(folder, monkeypatch):
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    Path("q.txt").write_text("\n".join(QUESTIONS), encoding="utf-8")
    fails = {"now": True}

    def speak(body):
        question = body["messages"][-1]["content"]
        if question == "咳嗽？" and fails["now"]:
            return 400, b"{}"
        return text(f"答{question}", **{"finish_reason": "stop"})

    with ChatServer(speak) as server:
        command = ["inference.py", "--questions", "q.txt", "--endpoint", server.url, "--replies", "r.jsonl"]
        command += ["--no_thinking", "--max_new_tokens", "50"]
        first = run_script(*command, cwd=folder)
        assert first.returncode == 1 and f"错误：{server.url} 没有回复（HTTP 400）" in first.stdout
        assert "已答的 4 条在 r.jsonl" in first.stdout and "Traceback" not in first.stdout
        sent = [body for method, _, _, body in server.requests if method == "POST"]
        assert {body["max_tokens"] for body in sent} == {50}
        assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in sent)
        assert [message["role"] for message in sent[0]["messages"]] == ["system", "user"]
        fails["now"] = False
        server.requests.clear()
        assert run_script(*command, cwd=folder).returncode == 0
        asked = [body["messages"][-1]["content"] for method, _, _, body in server.requests if method == "POST"]
    assert asked == ["咳嗽？"]
    lines = [json.loads(line) for line in Path("r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["answer"] for line in lines] == [f"答{question}" for question in QUESTIONS]
    assert lines[0]["by"]["model"] == "judge" and lines[0]["by"]["weights"] is None
    down = run_script(*command[:-3], "--replies", "other.jsonl", cwd=folder)
    assert down.returncode == 1 and f"错误：{server.url} 的模型用不了：连不上" in down.stdout
    assert run_script("inference.py", "--endpoint", server.url, cwd=folder).returncode == 2
