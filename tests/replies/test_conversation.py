"""A model asked at the terminal: what is shown, what a chat remembers, and what is too long."""

import argparse
import copy
import io
import shutil
import sys
import time
from pathlib import Path

import pexpect
import pytest
import torch
from helpers import ROOT, opening, recite, refused
from rich.console import Console

import data
import inference
from parts import terminal
from parts.model import encoding, weights
from parts.model.encoding import encode_messages, split_reply
from parts.replies.conversation import Conversation, print_stream


@pytest.fixture
def model(tiny_model):
    return weights.load_weights(str(tiny_model), torch.device("cpu"))


@pytest.fixture
def thinking_only(tokenizer):
    """A tokenizer whose prompt opens <think>."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = opening(tokenizer.chat_template)
    return tokenizer


def converse(model, tokenizer, to_messages=data.to_messages, most=6, **more) -> Conversation:
    return Conversation(model, tokenizer, to_messages, True, most, seed=42, **more)


def chat(model, tokenizer, monkeypatch, *questions: str) -> list[list]:
    """The questions of the history that each reply is to."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions) + "\n\n"))
    conversation, seen = converse(model, tokenizer), []
    stream = conversation.stream
    monkeypatch.setattr(conversation, "stream", lambda messages: seen.append(messages[1:-1:2]) or stream(messages))
    conversation.chat(terminal.line_reader("问："))
    return [[message["content"] for message in asked] for asked in seen]


def test_a_chat_remembers_answers_alone(model, tokenizer, thinking_only, monkeypatch, capsys):
    """It goes on after a question that is too long, and after a reply that ended in its thinking."""
    assert chat(model, tokenizer, monkeypatch, "头痛？", "头" * 99_999, "然后？") == [[], ["头痛？"]]
    assert capsys.readouterr().out.count("错误：这个问题有 ") == 1
    assert chat(model, thinking_only, monkeypatch, "头痛？", "多久？") == [[], []]
    assert capsys.readouterr().out.count("没有回答") == 2


def test_a_chat_that_is_longer_than_the_context_goes_on_without_its_oldest_exchanges(
    model, tokenizer, monkeypatch, capsys
):
    model.config.max_position_embeddings = 200
    asked = [f"第 {i} 问：" + "头痛。" * 10 for i in range(5)]
    seen = chat(model, tokenizer, monkeypatch, *asked)
    assert seen[0] == [] and all(seen[1:]) and 0 < len(seen[4]) < 4
    assert all(history == asked[i - len(history) : i] for i, history in enumerate(seen))
    dropped = sum(len(history) <= len(before) for before, history in zip(seen, seen[1:]))
    assert capsys.readouterr().out.count("对话超过了模型的上下文，最早的 ") == dropped > 0


def test_a_paste_of_several_lines_is_one_question_whenever_it_comes_and_keys_edit():
    code = """
import time
from parts.terminal import line_reader
read_line = line_reader("问：")
time.sleep(1)  # a model is loaded, a reply is written
while line := read_line():
    print([line], flush=True)
    time.sleep(1)
"""
    person = pexpect.spawn(sys.executable, ["-c", code], cwd=ROOT, encoding="utf-8", timeout=30)
    person.expect_exact("\x1b[?2004h")  # from here on the terminal marks what is pasted
    for typed, line in (
        ("\x1b[200~甲\r\r乙\r\x1b[201~\r", "甲\n\n乙\n"),
        ("\x1b[200~丙\r\r丁\x1b[201~\x1b[D戊\r", "丙\n\n戊丁"),
        ("\x1b[A\x1b[H己\r", "丙\n\n己戊丁"),
    ):
        person.send(typed)
        person.expect_exact(f"{[line]}")
    person.send("\r")
    person.expect(pexpect.EOF)
    assert person.before.endswith("\x1b[?2004l")


def test_what_does_not_fit_into_the_context_is_refused_with_its_reply(model, tokenizer):
    conversation = converse(model, tokenizer, most=100)
    asked = data.to_messages("头" * 30)
    length = len(encode_messages(tokenizer, asked, prompt_only=True))
    model.config.max_position_embeddings = length + 100
    assert conversation.check_length(asked, "第 2 个问题") == length
    model.config.max_position_embeddings -= 1
    refused(f"第 2 个问题有 {length} 个 token~", conversation.check_length, asked, "第 2 个问题")


def shown(tokenizer, text: str, opened: bool) -> str:
    """What is printed of a reply that comes token by token."""
    console, ids = Console(file=io.StringIO()), tokenizer(text)["input_ids"]
    replies = [split_reply(tokenizer, ids[: end + 1], end + 1 == len(ids), opened) for end in range(len(ids))]
    assert print_stream(iter(replies), console) == replies[-1]
    return console.file.getvalue()


def test_thinking_and_answer_stream_under_their_headings(tokenizer):
    for reply, expected in (
        ("<think>\n想，头痛\n</think>\n\n答", "【思考】\n想，头痛\n\n【回答】\n答\n"),
        ("答", "答\n"),
        ("<think>想<think>再想</think>答<think>又", "【思考】\n想再想\n\n【回答】\n答\n\n【思考】\n又\n"),
        ("想</think>答", "想\n\n【思考】\n想\n\n【回答】\n答\n"),  # nothing told that it was a thinking
    ):
        assert shown(tokenizer, reply, opened=False) == expected
    # Neither a colour nor a question that is written over reaches the terminal as such.
    assert (
        shown(tokenizer, "1~2 [b]片\x1b[2K\r每天\u202e3", opened=False) == "1~2 [b]片[U+001B][2K[U+000D]每天[U+202E]3\n"
    )
    assert shown(tokenizer, "想</think>答", opened=True) == "【思考】\n想\n\n【回答】\n答\n"  # by the prompt


def test_the_model_is_asked_with_the_system_prompt_it_was_trained_with(model, tokenizer):
    args = argparse.Namespace(no_thinking=False, max_new_tokens=1, seed=42, fast_kernels=True)
    prompts = recite(model, tokenizer, ["答"])
    for tokens in (tokenizer, encoding.with_system(tokenizer, "另一个")):
        inference.begin(args, model, tokens).ask("头痛？")
    asked = [data.to_messages("头痛？", system=system) for system in (data.SYSTEM_PROMPT, "另一个")]
    assert prompts == [encode_messages(tokenizer, messages, prompt_only=True) for messages in asked]


def test_a_model_that_cannot_do_without_thinking_is_not_asked_to(tiny_model, folder):
    shutil.copytree(tiny_model, "base")
    template = Path("base/chat_template.jinja")
    template.write_text(opening(template.read_text(encoding="utf-8")), encoding="utf-8")
    refused("base 的对话模板不能关闭思考；请去掉 --no_thinking，~", weights.load_trained, "base", thinking=False)


def test_fast_kernels_are_one_switch(model, tokenizer, monkeypatch):
    """Without it no layer is another one, and the loop is transformers'."""
    used = []
    monkeypatch.setattr("parts.model.generate.fuse", lambda _: used.append("layers"))
    monkeypatch.setattr("parts.model.generate.fast_loop", lambda *_: used.append("loop"))
    for fast in (True, False):
        converse(model, tokenizer, most=2, fast_kernels=fast).ask("头痛？")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))  # where layers are fused
    for fast in (True, False):
        converse(model, tokenizer, fast_kernels=fast)
    assert used == ["loop", "layers"]


def test_a_reply_streams_as_it_is_written_and_comes_whole_at_last(model, thinking_only):
    recite(model, thinking_only, ["想一想\n</think>\n\n多喝水"], pause=0.01)
    *parts, whole = converse(model, thinking_only, most=100).stream(data.to_messages("头痛？"))
    assert whole[:4] == ("想一想", "多喝水", True, "one")
    assert len(parts) > 3 and not any(part.complete for part in parts)
    assert all(whole.thinking.startswith(part.thinking.rstrip("\ufffd")) for part in parts)
    assert parts[0].answer == "" and parts[-1][:2] == whole[:2]


def test_a_stream_that_is_left_stops_the_model_and_the_next_begins(model, tokenizer):
    prompts = recite(model, tokenizer, ["想" * 3000, "答", "想" * 3000], pause=0.01)
    conversation, asked = converse(model, tokenizer, most=3000), data.to_messages("头痛？")
    stream = conversation.stream(asked)
    next(stream)
    stream.close()
    began = time.monotonic()
    assert list(conversation.stream(asked))[-1].answer == "答" and len(prompts) == 2
    assert time.monotonic() - began < 20  # the first one would have taken 30 seconds
    stream = conversation.stream(asked)
    next(stream)
    conversation.closed.set()  # as Ctrl-C does on the page
    assert not list(stream)[-1].complete


def test_what_fails_while_a_reply_streams_is_raised_where_it_is_read(model, tokenizer):
    hook = model.register_forward_hook(lambda *_: 1 / 0)
    conversation, asked = converse(model, tokenizer, most=2), data.to_messages("头痛？")
    with pytest.raises(ZeroDivisionError):
        list(conversation.stream(asked))
    hook.remove()
    assert list(conversation.stream(asked))[-1].tokens == 2
