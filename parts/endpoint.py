"""A model behind an OpenAI-compatible address: its reply to messages, in bounded time, and the key kept to itself.
Knows nothing of what is asked."""

import argparse
import contextlib
import json
import os
import re
from time import monotonic
from urllib.parse import urlsplit

from parts.address import is_this_machine

KEY = "OPENAI_API_KEY"  # the environment variable with the key, where the address wants one
CONNECT, REPLY = 10, 180  # seconds: to connect; for a whole reply, as some models think first
LARGEST = 1_000_000  # bytes of a reply
RETRIES, PAUSE = 3, 1  # of what a moment may mend (no connection, 429, 5xx): after 0, 2 and 4 times so many seconds
PASSING = (429, 500, 502, 503, 504)


class Failed(Exception):
    """There is no reply. Says why in a few words of its own: a library's may hold the key."""


def address(text: str) -> str:
    """The address of an endpoint, for argparse."""
    with contextlib.suppress(ValueError):  # of a port, or of an IPv6 address
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"[@?#\s]", text):
            return text.rstrip("/").removesuffix("/chat/completions")
    raise argparse.ArgumentTypeError(f"要一个 http://127.0.0.1:8000/v1 这样的地址；密钥放在环境变量 {KEY} 里")


class Endpoint:
    """The model `model` at `url`, or the only one there. Raises SystemExit for a key that cannot be sent."""

    def __init__(self, url: str, model: str | None = None):
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3 import Retry

        self.url, self.model, self.key = url, model, os.environ.get(KEY, "").strip()
        if not re.fullmatch(r"[!-~]*", self.key):
            raise SystemExit(f"错误：环境变量 {KEY} 里有不能发送的字符；请重新设置。")
        # A reply that broke off is not asked for again: it may have cost minutes. Retry-After may name hours.
        retry = Retry(
            RETRIES,
            read=False,
            status_forcelist=PASSING,
            allowed_methods=None,
            backoff_factor=PAUSE,
            respect_retry_after_header=False,
            raise_on_status=False,
        )
        self.session = requests.Session()
        # A proxy would look for 127.0.0.1 on its own machine.
        self.session.trust_env = not is_this_machine(urlsplit(url).hostname)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))

    def sign(self, request):
        """Adds the key; as `auth` of requests, which then reads none of another's from ~/.netrc."""
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def fetch(self, method: str, path: str, body: dict | None = None) -> object:
        """What is answered, as JSON. Follows no redirect: neither key nor texts go to another host. Raises Failed."""
        import requests

        end, content = monotonic() + REPLY, bytearray()
        options = {"auth": self.sign, "timeout": (CONNECT, REPLY), "stream": True, "allow_redirects": False}
        try:
            with self.session.request(method, self.url + path, json=body, **options) as response:
                if response.status_code != 200:
                    raise Failed(f"HTTP {response.status_code}")
                for part in response.iter_content(1):  # more at a time would be waited for, however slowly it comes
                    content += part
                    if len(content) > LARGEST or monotonic() > end:
                        raise Failed("回复太长或太慢")
            return json.loads(content)
        except requests.Timeout:
            raise Failed("没有及时回复") from None
        except requests.ConnectionError:
            raise Failed("连不上") from None
        except requests.RequestException as error:
            raise Failed(type(error).__name__) from None
        except (ValueError, RecursionError):
            raise Failed("回复不是 JSON") from None

    def find_model(self) -> None:
        """Settles which model is asked. Raises Failed where that is not told, or not by itself clear."""
        if self.model:
            return
        try:
            found = [str(model["id"]) for model in self.fetch("GET", "/models")["data"]]
            names = [name.encode("utf-8", "replace").decode() for name in found]  # it stands in files later
        except (KeyError, TypeError):
            raise Failed("没有模型列表，请用 --judge_model 指定模型") from None
        if len(names) != 1:
            raise Failed(f"有 {len(names)} 个模型（{'、'.join(names[:5])}），请用 --judge_model 指定一个")
        [self.model] = names

    def reply(self, messages: list[dict[str, str]]) -> str:
        """The model's whole text, a thinking that it has there included. Raises Failed where there is none, or it was
        cut off."""
        # No temperature and no limit: each is refused by some models, and greedy thinking would loop.
        answered = self.fetch("POST", "/chat/completions", {"model": self.model, "messages": messages})
        try:
            choice = answered["choices"][0]
            text, cut_off = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Failed("回复不是对话的格式") from None
        if cut_off or not isinstance(text, str):
            raise Failed("回复没有写完")
        return text.replace(self.key, "***") if self.key else text


def reach(url: str, model: str | None, console) -> Endpoint:
    """The endpoint, and which model answers there. That it cannot be reached now is a line and no end: it is tried once
    more when it is needed. Raises SystemExit for a key that cannot be sent."""
    found = Endpoint(url, model)
    try:
        found.find_model()
    except Failed as failed:
        console.print(f"{url} 现在用不了：{failed}；先做别的，最后再试。", style="yellow", markup=False, soft_wrap=True)
    return found
