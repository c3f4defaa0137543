"""A model behind an OpenAI-compatible address, asked by the `openai` client: its reply to messages, in
bounded time, and the key kept to itself; many requests at once, of which a file keeps every reply; and its
verdict on texts. Knows nothing of what is asked."""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import secrets
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple
from urllib.parse import urlsplit

KEY = "OPENAI_API_KEY"  # the environment variable with the key, where the address wants one
HINTS = {401: f"，请检查环境变量 {KEY} 里的密钥"}  # what to do about a status
TIMEOUT = 300  # seconds for a reply with all its retries, as some models think first
RETRIES = 3  # of what a moment may mend: no connection, 429, 5xx
# No name or password before the host, and no query behind the path: addresses are printed and recorded.
ADDRESS = r"https?://([^\s/:@?#\[\]]+|\[[\da-f:]+\])(:[1-9]\d{0,4})?(/[^\s@?#]*)?"
THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
AT_ONCE = 4  # requests
GIVE_UP = 8  # requests in a row that bring nothing


class Failed(Exception):
    """There is no reply. It says why in a few words of our own, as a library's may hold the key."""


def address(text: str) -> str:
    """Return the base address of an endpoint, as its client wants it, for argparse. Raises ArgumentTypeError,
    which does not repeat the text: a key may be in it."""
    if not re.fullmatch(ADDRESS, text):
        form = "要一个 http://127.0.0.1:8000/v1 这样的地址"
        raise argparse.ArgumentTypeError(f"{form}；密钥放在环境变量 {KEY} 里")
    return text.rstrip("/").removesuffix("/chat/completions")


class Completion(NamedTuple):
    """What a model said."""

    content: str
    reasoning: str  # its thinking, where the server gives that apart from the content
    cut: bool  # it ends at a limit of tokens
    tokens: int  # of prompt and completion; 0 where the server does not tell
    new_tokens: int  # of the completion; likewise


class Endpoint:
    """The model `model` at `url`, or the only one there. Making one raises SystemExit without the client."""

    def __init__(self, url: str, model: str | None = None):
        self.url, self.model, self.key = url, model, os.environ.get(KEY, "").strip()
        if importlib.util.find_spec("openai") is None:
            raise SystemExit(f"错误：访问 {url} 的模型需要 openai；请先运行 pip install openai")

    def ask(self, request):
        """Return what the coroutine `request(client)` returns. Raises Failed."""
        import asyncio  # here, as what only wants `address` for its flags does not wait for it

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
            reason = f"HTTP {error.status_code}{HINTS.get(error.status_code, '')}"
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

    def find_model(self, flag: str) -> None:
        """Settle which model is asked; `flag` is the one that names it. Raises Failed where that is not told,
        or not by itself clear."""

        async def list_names(client):
            return [self.redact(model.id) for model in (await client.models.list()).data]

        names = [self.model] if self.model else self.ask(list_names)
        if len(names) != 1:
            raise Failed(f"有 {len(names)} 个模型（{'、'.join(names[:5])}），请用 {flag} 指定一个")
        [self.model] = names

    def require_model(self, flag: str) -> None:
        """Settle which model is asked, as `find_model` does, or raise SystemExit."""
        try:
            self.find_model(flag)
        except Failed as failed:
            raise SystemExit(f"错误：{self.url} 的模型用不了：{failed}。") from None

    def redact(self, said: object) -> str:
        """Return what the server said as text, "" where it is none, without the key: the server knows it, and
        what it says is recorded. Half a character, which no file can hold, becomes a question mark."""
        text = said.encode("utf-8", "replace").decode() if isinstance(said, str) else ""
        return text.replace(self.key, "***") if self.key else text

    def complete(self, messages: list[dict[str, str]], **limits) -> Completion:
        """Return what the model says to the messages. `limits`: such as max_tokens. Raises Failed where there
        is no reply."""

        async def complete(client):
            # No temperature: it is refused by some models, and greedy thinking would loop.
            answered = await client.chat.completions.create(model=self.model, messages=messages, **limits)
            message, reason = answered.choices[0].message, answered.choices[0].finish_reason
            # DeepSeek's name and vLLM's: the client knows neither.
            thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
            text, thought = self.redact(message.content), self.redact(thought)
            counts = [getattr(answered.usage, name, 0) or 0 for name in ("total_tokens", "completion_tokens")]
            return Completion(text, thought, reason == "length", *map(int, counts))

        return self.ask(complete)

    def reply(self, messages: list[dict[str, str]]) -> str:
        """Return the model's text. Raises Failed where there is none or it was cut off."""
        completion = self.complete(messages)
        if completion.cut or not completion.content:
            raise Failed("回复没有写完")
        return completion.content


class Record:
    """A file of requests and what came of them, a line of JSON each, written as soon as the reply is there:
    what has one is not asked, and paid for, again. A file may hold those of several models and prompts: they
    are told apart by the id of the request."""

    def __init__(self, path: str):
        self.path = path
        self.rows: dict[str, dict] = {}  # by the id; with "problem" where there is no reply

    def is_answered(self, identity: str) -> bool:
        """Tell whether there is a reply to a request."""
        return "problem" not in self.rows.get(identity, {"problem": ""})

    def recall(self) -> None:
        """Read the file, which need not be there, and end its last line. It raises OSError."""
        with open(self.path, "a+", encoding="utf-8", errors="replace") as file:
            line = "\n"
            file.seek(0)
            for line in file:
                # A line that was cut off is no JSON, and is asked anew.
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    row = json.loads(line)
                    self.rows[row["id"]] = row
            if not line.endswith("\n"):
                file.write("\n")

    def ask_all(self, requests: dict[str, object], ask, title: str, wanted: str, console) -> tuple[str, int]:
        """Ask for what has no reply of `requests`, {id: request}, AT_ONCE at a time under a bar. Return (what
        failed or "", how many were given up unasked).

        `recall` comes before it. `ask(request, row)` adds what came to the row of the file, and raises Failed
        where that is not what is `wanted`, a word for people. It raises OSError where the file cannot be
        written.
        """
        from rich.progress import track

        missing = [identity for identity in requests if not self.is_answered(identity)]
        problems = []  # of the requests as they come back, None of one with a reply
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = [pool.submit(self.ask, identity, requests[identity], ask) for identity in missing]
            done, count = as_completed(futures), len(futures)
            try:
                for future in track(done, title, count, console=console, disable=not futures):
                    problems.append(future.result())
                    # A model that is down would be waited for, request after request.
                    if len(problems) >= GIVE_UP and all(problems[-GIVE_UP:]):
                        break
            finally:
                pool.shutdown(cancel_futures=True)  # after Ctrl-C too; it waits for those under way
        unasked, counts = len(missing) - len(problems), Counter(filter(None, problems))
        reasons = "、".join(f"{reason} {times} 次" for reason, times in counts.most_common(5))
        skipped = f"，不再问其余 {unasked} 次" if unasked else ""
        return (f"有 {counts.total()} 次没有给出{wanted}（{reasons}）{skipped}" if counts else ""), unasked

    def ask(self, identity: str, request, ask) -> str | None:
        """Ask, and write down what came. Return why it is not what is wanted."""
        row = {"id": identity}
        try:
            ask(request, row)
        except Failed as failed:
            row["problem"] = str(failed)
        self.add(row)
        return row.get("problem")

    def add(self, row: dict) -> None:
        """Write a row into the file at once: who ends the program keeps every reply that came back."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[row["id"]] = row


def identify(*asked: object) -> str:
    """Return by what a request is known again: by all that is sent, and to which model."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def build_messages(prompt: str, form: str, parts: dict[str, str]) -> list[dict[str, str]]:
    """Return messages that show texts, {name: text}, to a model for its verdict. `form` says how they are
    marked, by a {mark}, and what a verdict looks like."""
    # No text can close its part and speak to the model: the mark is drawn anew for each request.
    mark = secrets.token_hex(4)
    shown = [f"【{name} {mark}】\n{text}\n【{name}完 {mark}】" for name, text in parts.items() if text]
    system = {"role": "system", "content": prompt + form.format(mark=mark)}
    return [system, {"role": "user", "content": "\n\n".join(shown)}]


def read_verdict(text: str, verdict: re.Pattern) -> str:
    """Return the group of `verdict` in the one line that is a verdict. What stands in a thinking is none.
    Raises Failed where there is none, or more than one."""
    said = re.sub(r"(?s)\A.*</think>", "", text)
    # A verdict in bold, as a heading or as code is one too; full-width letters are letters.
    plain = re.sub(r"[*#`]", "", unicodedata.normalize("NFKC", said))
    verdicts = list(filter(None, map(verdict.fullmatch, map(str.strip, plain.split("\n")))))
    if len(verdicts) != 1 or "<think>" in said:
        raise Failed("没有唯一的一行裁决")
    return verdicts[0][1]
