"""A model behind an address, against a real server on this machine."""

import argparse
import time

import pytest
from chat_server import ChatServer, text
from helpers import refused

from parts import endpoint
from parts.endpoint import KEY, Endpoint, Failed, address

SECRET = "sk-very-secret"
MESSAGES = [{"role": "user", "content": "问"}]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(endpoint, "PAUSE", 0)
    monkeypatch.setattr(endpoint, "REPLY", 1)
    monkeypatch.setattr(endpoint, "LARGEST", 50_000)


@pytest.fixture
def server():
    with ChatServer() as server:
        yield server


def fails(server) -> str:
    with pytest.raises(Failed) as failed:
        Endpoint(server.url, "judge").reply(MESSAGES)
    assert SECRET not in str(failed.value)
    return str(failed.value)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("http://[::1]:8000/v1/chat/completions", "http://[::1]:8000/v1"),
    ],
)
def test_address(given, found):
    assert address(given) == found


@pytest.mark.parametrize(
    "given",
    ["", "127.0.0.1:8000", "ftp://host/v1", "http://", "http://host:0", "http://host:99999", "http://[::1/v1"]
    + [f"http://me:{SECRET}@host/v1", f"http://host/v1?key={SECRET}", "http://host/v1#x", "http://ho st/v1"],
)
def test_address_that_is_none(given):
    with pytest.raises(argparse.ArgumentTypeError, match="^要一个 http") as wrong:
        address(given)
    assert SECRET not in str(wrong.value)


def test_what_is_sent_and_what_comes_back(server):
    assert Endpoint(server.url, "some/model").reply(MESSAGES) == "好"
    [(method, path, headers, body)] = server.requests
    assert (method, path, headers["Authorization"]) == ("POST", "/v1/chat/completions", f"Bearer {SECRET}")
    assert body == {"model": "some/model", "messages": MESSAGES}


def test_without_a_key_none_is_sent_not_even_that_of_another_tool(server, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv(KEY)
    monkeypatch.setattr(endpoint, "is_this_machine", lambda host: False)  # as for an address elsewhere
    Endpoint(server.url, "judge").reply(MESSAGES)
    assert "Authorization" not in server.requests[0][2]


def test_redirect_takes_neither_key_nor_texts_elsewhere(server):
    with ChatServer() as other:
        server.elsewhere = other.url + "/chat/completions"
        for status in (301, 302, 303, 307, 308):
            server.speak = lambda body, status=status: (status, b"")
            assert fails(server) == f"HTTP {status}"
        assert not other.requests


def test_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Endpoint(server.url, "judge").reply(MESSAGES) == "好"


def test_key_that_comes_back_is_not_passed_on(server):
    server.speak = lambda body: text(f"你的密钥是 {SECRET}")
    assert Endpoint(server.url, "judge").reply(MESSAGES) == "你的密钥是 ***"


def test_key_that_cannot_be_sent(monkeypatch):
    for key in ("sk-a b", "sk-a\nX-Other: b", "密钥"):
        monkeypatch.setenv(KEY, key)
        refused(f"环境变量 {KEY} 里有不能发送的字符；请重新设置。", Endpoint, "http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ((401, b"Incorrect API key: sk-very-secret"), "HTTP 401"),
        (b"<html>log in</html>", "回复不是 JSON"),
        (b"", "回复不是 JSON"),
        (b"[" * 40_000, "回复不是 JSON"),
        (b"\xff\xfe", "回复不是 JSON"),
        (b"null", "回复不是对话的格式"),
        (b'{"error": "busy"}', "回复不是对话的格式"),
        (b'{"choices": []}', "回复不是对话的格式"),
        (b'{"choices": ["A"]}', "回复不是对话的格式"),
        (text(None), "回复没有写完"),
        (text("好", finish_reason="length"), "回复没有写完"),
        (b"1" * 60_000, "回复太长或太慢"),
    ],
)
def test_reply_that_is_none(server, said, reason):
    server.speak = lambda body: said
    assert fails(server) == reason
    assert len(server.requests) == 1


def test_what_a_moment_mends_is_asked_again(server):
    statuses = iter([500, 429, 503])
    server.speak = lambda body: (next(statuses, 200), text("好"))
    assert Endpoint(server.url, "judge").reply(MESSAGES) == "好"
    server.speak = lambda body: (502, b"")
    assert fails(server) == "HTTP 502" and len(server.requests) == 8


def test_slow_is_given_up(server):
    server.speak = lambda body: time.sleep(3) or text("好")
    start = time.monotonic()
    assert fails(server) == "没有及时回复"
    server.speak, server.pause = (lambda body: text("好" * 1000)), 0.1  # each pause is short, their sum is not
    assert fails(server) == "回复太长或太慢"
    assert time.monotonic() - start < 2.9 and len(server.requests) == 2


def test_down():
    with ChatServer() as server:
        pass
    assert fails(server) == "连不上"


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        (b'{"data": []}', "有 0 个模型（），请用 --judge_model 指定一个"),
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', "有 2 个模型（a、b），请用 --judge_model 指定一个"),
        (b'{"data": ["a"]}', "没有模型列表，请用 --judge_model 指定模型"),
        (b"[]", "没有模型列表，请用 --judge_model 指定模型"),
        (b"<html>", "回复不是 JSON"),
    ],
)
def test_model_is_the_only_one_or_the_one_that_was_named(server, models, reason):
    alone = Endpoint(server.url)
    alone.find_model()
    assert alone.model == "judge"
    server.models = models
    with pytest.raises(Failed, match=f"^{reason}$"):
        Endpoint(server.url).find_model()
    (named := Endpoint(server.url, "c")).find_model()
    assert named.model == "c"


def test_name_of_a_model_can_be_written(server):
    server.models = b'{"data": [{"id": "m\\ud800"}]}'
    (alone := Endpoint(server.url)).find_model()
    assert alone.model == "m?"
