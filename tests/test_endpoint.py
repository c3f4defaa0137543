"""A model behind an address, asked by OpenAI's client, against a real server on this machine."""

import argparse
import importlib.util
import time

import pytest
from chat_server import ChatServer, text
from helpers import refused

from parts import endpoint
from parts.endpoint import KEY, Endpoint, Failed, address

SECRET = "sk-very-secret"
MESSAGES = [{"role": "user", "content": "问"}]


@pytest.fixture(autouse=True)
def server(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with ChatServer() as server:
        yield server


def fails(server) -> str:
    with pytest.raises(Failed) as failed:
        Endpoint(server.url, "judge").reply(MESSAGES)
    assert SECRET not in str(failed.value) and not failed.value.__context__
    return str(failed.value)


def test_address():
    assert address("https://api.example.com/v1/") == "https://api.example.com/v1"
    assert address("http://[::1]:8000/v1/chat/completions") == "http://[::1]:8000/v1"
    for wrong in ("", "127.0.0.1:80", "ftp://host/v1", "http://", f"http://me:{SECRET}@host/v1", f"http://h?{SECRET}"):
        with pytest.raises(argparse.ArgumentTypeError, match="^要一个 http") as error:
            address(wrong)
        assert SECRET not in str(error.value)


def test_what_is_sent_and_what_comes_back(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which is not asked for this machine
    server.speak = lambda body: text(f"你的密钥是 {SECRET}")
    assert Endpoint(server.url, "some/model").reply(MESSAGES) == "你的密钥是 ***"
    [(method, path, headers, body)] = server.requests
    headers = {name.lower(): value for name, value in headers.items()}
    assert (method, path, headers["authorization"]) == ("POST", "/v1/chat/completions", f"Bearer {SECRET}")
    assert body == {"model": "some/model", "messages": MESSAGES}
    monkeypatch.delenv(KEY)
    assert Endpoint(server.url, "some/model").reply(MESSAGES) and SECRET not in str(server.requests[1])


def test_redirect_takes_neither_key_nor_texts_elsewhere(server):
    with ChatServer() as other:
        server.elsewhere = other.url + "/chat/completions"
        for status in (301, 302, 303, 307, 308):
            server.speak = lambda body, status=status: (status, b"")
            assert fails(server) == f"HTTP {status}"
        assert not other.requests


def test_reply_that_is_none(server):
    for said in (b"<html>sk-very-secret</html>", b"null", b'{"choices": []}', b'{"choices": ["A"]}'):
        server.speak = lambda body, said=said: said
        assert fails(server) == "返回的内容不符合这种接口的格式"
    for said in (text(None), text("好", finish_reason="length")):
        server.speak = lambda body, said=said: said
        assert fails(server) == "回复没有写完"
    server.speak = lambda body: (401, b'{"error": {"message": "Incorrect API key: sk-very-secret"}}')
    assert fails(server).startswith(f"HTTP 401，请检查环境变量 {KEY}") and len(server.requests) == 7


def test_what_a_moment_mends_is_asked_again_and_what_is_slow_given_up(server, monkeypatch):
    statuses = iter([500, 429, 503])
    server.speak = lambda body: (next(statuses, 200), text("好"))
    assert Endpoint(server.url, "judge").reply(MESSAGES) == "好"
    server.speak = lambda body: (502, b"")
    assert fails(server) == "HTTP 502" and len(server.requests) == 8
    monkeypatch.setattr(endpoint, "TIMEOUT", 1)
    server.speak, server.pause, start = (lambda body: text("好" * 1000)), 0.1, time.monotonic()
    assert fails(server) == "没有及时回复" and time.monotonic() - start < 3  # each pause is short, their sum is not
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    monkeypatch.setenv(KEY, "密钥")
    assert fails(server) == f"环境变量 {KEY} 里有不能发送的字符"


def test_model_is_the_only_one_or_the_one_that_was_named(server, monkeypatch):
    (alone := Endpoint(server.url)).find_model("--judge_model")
    assert alone.model == "judge"
    server.models = b'{"data": [{"id": "a"}, {"id": "b"}]}'
    with pytest.raises(Failed, match="^有 2 个模型（a、b）"):
        Endpoint(server.url).find_model("--judge_model")
    (named := Endpoint(server.url, "c")).find_model("--judge_model")
    assert named.model == "c"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as where the client is not installed
    refused("访问 ~openai；请先运行 pip install openai", Endpoint, server.url)
