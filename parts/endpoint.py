"""A model behind an OpenAI-compatible address, asked by the `openai` client: its reply to messages, in
bounded time, and the key kept to itself. Knows nothing of what is asked."""

import argparse
import asyncio
import importlib.util
import os
import re
from urllib.parse import urlsplit

KEY = "OPENAI_API_KEY"  # the environment variable with the key, where the address wants one
TIMEOUT = 180  # seconds for a reply with all its retries, as some models think first
RETRIES = 3  # of what a moment may mend: no connection, 429, 5xx
# No name or password before the host, and no query behind the path: addresses are printed and recorded.
ADDRESS = r"https?://([^\s/:@?#\[\]]+|\[[\da-f:]+\])(:[1-9]\d{0,4})?(/[^\s@?#]*)?"
THIS_MACHINE = ("127.0.0.1", "::1", "localhost")


class Failed(Exception):
    """There is no reply. It says why in a few words of our own, as a library's may hold the key."""


def address(text: str) -> str:
    """Return the base address of an endpoint, as its client wants it, for argparse. Raises ArgumentTypeError,
    which does not repeat the text: a key may be in it."""
    if not re.fullmatch(ADDRESS, text):
        form = "要一个 http://127.0.0.1:8000/v1 这样的地址"
        raise argparse.ArgumentTypeError(f"{form}；密钥放在环境变量 {KEY} 里")
    return text.rstrip("/").removesuffix("/chat/completions")


class Endpoint:
    """The model `model` at `url`, or the only one there. Making one raises SystemExit without the client."""

    def __init__(self, url: str, model: str | None = None):
        self.url, self.model, self.key = url, model, os.environ.get(KEY, "").strip()
        if importlib.util.find_spec("openai") is None:
            raise SystemExit(f"错误：访问 {url} 的模型需要 openai；请先运行 pip install openai")

    def ask(self, request):
        """Return what the coroutine `request(client)` returns. Raises Failed."""
        import openai

        async def answer():
            # A redirect would take key and texts elsewhere; a proxy would look for 127.0.0.1 on its machine.
            elsewhere = urlsplit(self.url).hostname not in THIS_MACHINE
            http = openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=elsewhere)
            options = {"api_key": self.key or "none", "max_retries": RETRIES, "http_client": http}
            # The client's own time-out is one of each pause: a server that drips would never reach it.
            async with openai.AsyncOpenAI(base_url=self.url, **options) as client, asyncio.timeout(TIMEOUT):
                return await request(client)

        try:
            return asyncio.run(answer())
        except openai.APIStatusError as error:
            reason = f"HTTP {error.status_code}"
        except (openai.APITimeoutError, TimeoutError):
            reason = "没有及时回复"
        except openai.APIConnectionError:
            reason = "连不上"
        except UnicodeEncodeError:
            reason = f"环境变量 {KEY} 里有不能发送的字符"
        except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
            # A server that speaks something else: its JSON lacks fields that the client takes for granted.
            reason = "返回的内容不符合这种接口的格式"
        raise Failed(reason)  # not inside the except: that would carry the library's error along

    def find_model(self) -> None:
        """Settle which model is asked. Raises Failed where that is not told, or not by itself clear."""

        async def list_names(client):
            return [model.id for model in (await client.models.list()).data]

        names = [self.model] if self.model else self.ask(list_names)
        if len(names) != 1:
            raise Failed(f"有 {len(names)} 个模型（{'、'.join(names[:5])}），请用 --judge_model 指定一个")
        [self.model] = names

    def reply(self, messages: list[dict[str, str]]) -> str:
        """Return the model's text, with its thinking. Raises Failed where there is none or it was cut off."""

        async def complete(client):
            # No temperature and no limit: each is refused by some models, and greedy thinking would loop.
            answered = await client.chat.completions.create(model=self.model, messages=messages)
            return answered.choices[0].message.content, answered.choices[0].finish_reason

        text, reason = self.ask(complete)
        if reason == "length" or not isinstance(text, str):
            raise Failed("回复没有写完")
        # The server knows the key, and what it writes is recorded.
        return text.replace(self.key, "***") if self.key else text
