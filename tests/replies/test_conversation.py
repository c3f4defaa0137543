"""A model asked at the terminal: what is shown, what a chat remembers, and what is too long."""

import argparse
import copy
import io
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers import opening, recite, refused
from rich.console import Console

import data
import inference
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
    """The history that each question was asked with."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions) + "\n\n"))
    seen = []

    def to_messages(question, history):
        seen.append([turn[0] for turn in history])
        return data.to_messages(question, history=history)

    converse(model, tokenizer, to_messages).chat()
    return seen


def test_a_chat_remembers_answers_alone(model, tokenizer, thinking_only, monkeypatch, capsys):
    """It goes on after a question that is too long, and after a reply that ended in its thinking."""
    assert chat(model, tokenizer, monkeypatch, "头痛？", "头" * 99_999, "然后？") == [[], ["头痛？"], ["头痛？"]]
    assert capsys.readouterr().out.count("错误：这个问题连同之前的对话有 ") == 1
    assert chat(model, thinking_only, monkeypatch, "头痛？", "多久？") == [[], []]
    assert capsys.readouterr().out.count("没有回答") == 2


def test_what_does_not_fit_into_the_context_is_refused_with_its_reply(model, tokenizer):
    conversation = converse(model, tokenizer, most=100)
    asked = [data.to_messages(question) for question in ("头痛？", "头" * 30)]
    lengths = [len(encode_messages(tokenizer, messages, prompt_only=True)) for messages in asked]
    names, model.config.max_position_embeddings = ["一", "第 2 个问题"], lengths[1] + 100
    assert conversation.check_lengths(asked, names) == lengths
    model.config.max_position_embeddings -= 1
    refused(f"第 2 个问题连同之前的对话有 {lengths[1]} 个 token~", conversation.check_lengths, asked, names)


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
