"""A model that is asked: one question at the terminal, or one after another; or by a program that takes a
reply as it is written. Knows a console, not where the model comes from."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from threading import Event

import transformers
from rich.console import Console

from parts import terminal
from parts.model import generate
from parts.model.encoding import Reply, encode_messages, opens_thinking, split_reply

TOKEN_LENGTH = 16  # characters: on average no text has tokens as long, but for runs of spaces
HEADINGS = {"thinking": "【思考】", "answer": "【回答】"}  # of the parts of a Reply


class TokenQueue(SimpleQueue):
    """A streamer of transformers: what is generated waits here, the prompt's tokens first; None ends it."""

    # Ids, not text: only the tokens tell a tag from the same letters in an answer.
    def end(self) -> None:
        self.put(None)


def print_stream(replies: Iterator[Reply], console: Console) -> Reply:
    """Print a reply as it is written, and return the whole one: the thinking dimmed, the answer plain, each
    under its heading. An answer without any thinking needs none."""
    last = ""  # the part that was printed last
    printed = dict.fromkeys(HEADINGS, "")
    for reply in replies:
        for part, heading in HEADINGS.items():
            style = "dim" if part == "thinking" else None
            # A character of several tokens decodes to this sign until its last token is there.
            text = terminal.name_unseen(getattr(reply, part).rstrip("\ufffd\r"))
            new = text.removeprefix(printed[part])
            printed[part] = text
            if new and part != last:
                if last:
                    console.print("\n")
                if last or part == "thinking":
                    console.print(heading, style=style or "bold")
                last = part
            console.print(new, end="", style=style, markup=False, soft_wrap=True)
    console.print()
    return reply


class Conversation:
    """How a model is asked, and the console on which it answers.

    `to_messages(question, history=[[question, answer], …])` makes of a question the messages that the model
    reads. Without `fast_kernels` the model stays as it was loaded and generates with transformers' loop.
    `generate` is generate.generate, asking in this way. Whoever sets `closed` ends the replies that are being
    streamed.
    """

    def __init__(self, model, tokenizer, to_messages, thinking, max_new_tokens, seed, fast_kernels=True):
        self.model, self.tokenizer, self.to_messages = model, tokenizer, to_messages
        self.thinking, self.max_new_tokens = thinking, max_new_tokens
        self.unfinished = f"到 {max_new_tokens} 个 token 为止，回复未完；可加大 --max_new_tokens。"
        settings = {"max_new_tokens": max_new_tokens, "thinking": thinking, "fast_kernels": fast_kernels}
        self.generate = partial(generate.generate, model, tokenizer, **settings)
        # rich would turn :smile: into a picture, and colour numbers: a reply is shown as it is.
        self.console = Console(highlight=False, emoji=False)
        self.closed = Event()
        # One reply at a time: all draw from the same random numbers, and a CUDA graph is captured alone.
        self.worker = ThreadPoolExecutor(1)
        if fast_kernels and model.device.type == "cuda":
            generate.fuse(model)
        transformers.set_seed(seed)

    def stream(self, messages: generate.Messages) -> Iterator[Reply]:
        """Yield the reply as far as it is written, again and again, and as the last the whole one. It ends
        early where the iterator is closed. One is written at a time: others wait."""
        tokens, left = TokenQueue(), Event()

        def stopped() -> bool:
            return left.is_set() or self.closed.is_set()

        def write() -> list[Reply]:
            try:
                return self.generate([messages], streamer=tokens, stop=stopped)
            finally:
                tokens.end()  # else the reader would wait for ever where generation fails

        writing = self.worker.submit(write)
        ids, opened = [], None
        try:
            while (new := tokens.get()) is not None:
                if opened is None:  # this is the prompt
                    opened = opens_thinking(self.tokenizer, new.flatten().tolist())
                    continue
                ids += new.flatten().tolist()
                if tokens.empty():  # a slow reader is shown fewer steps
                    yield split_reply(self.tokenizer, ids, False, opened)
        finally:
            left.set()
        yield writing.result()[0]  # raises what failed in the other thread

    def fit(self, question: str, history: list[list[str]]) -> tuple[generate.Messages, str]:
        """Return the messages of a question after its history, of which the oldest exchanges go until both
        fit into the context, and a sentence on how many went, or "". It raises SystemExit for a question that
        is too long by itself."""
        self.check_length(self.to_messages(question, history=[]), "这个问题")
        for dropped in range(len(history) + 1):
            messages = self.to_messages(question, history=history[dropped:])
            with contextlib.suppress(SystemExit):
                self.check_length(messages, "")
                break
        del history[:dropped]
        return messages, f"对话超过了模型的上下文，最早的 {dropped} 轮不再计入。" if dropped else ""

    def check_length(self, messages: generate.Messages, name: str) -> int:
        """Return the tokens of a prompt. It raises SystemExit, with the prompt's `name`, where it does not
        fit into the model's context together with its reply."""
        # What a model writes beyond its context cannot be relied on.
        most = self.model.config.max_position_embeddings
        length, unit = sum(len(message["content"]) for message in messages), "个字"
        # 10 MB would take 14 s to be cut into tokens: what is far too long is told by its characters.
        if length <= most * TOKEN_LENGTH:
            length, unit = len(encode_messages(self.tokenizer, messages, True, self.thinking)), "个 token"
        if length + self.max_new_tokens > most:
            total = f"{length} {unit}，加上 --max_new_tokens {self.max_new_tokens}"
            limit = f"超过模型的上下文 {most} 个 token；请缩短，或减小 --max_new_tokens。"
            raise SystemExit(f"错误：{name}有 {total} {limit}")
        return length

    def warn(self, text: str) -> None:
        """Show a remark that is not the model's."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def ask(self, question: str, history: list[list[str]] | None = None) -> Reply:
        """Stream one reply, and say so when it was cut off; the rest is as of `fit`."""
        messages, hint = self.fit(question, history or [])
        if hint:
            self.warn(f"（{hint}）")
        # Closed also after Ctrl-C: the model would write on, and the next question wait for it.
        with contextlib.closing(self.stream(messages)) as replies:
            reply = print_stream(replies, self.console)
        if not reply.complete:
            self.warn(f"（{self.unfinished}）")
        return reply

    def chat(self, read_line: Callable[[], str]) -> None:
        """Ask what `read_line` returns until an empty line or the end of input. Earlier thinking is not fed
        back, nor an exchange without an answer."""
        self.console.print("输入问题后回车；空行结束。")
        history: list[list[str]] = []
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while question := read_line().strip():
                try:
                    reply = self.ask(question, history)
                except KeyboardInterrupt:
                    self.warn("\n（已停止这次回复。）")
                except SystemExit as refused:  # too long
                    self.warn(str(refused))
                else:
                    if reply.answer:
                        history.append([question, reply.answer])
                    else:
                        self.warn("（没有回答，这一问不计入对话。）")
