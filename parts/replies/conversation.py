"""A model that is asked: at the terminal one question whose reply streams, or one after another; or by a program that
takes a reply as it is written. Knows a console, not where the model comes from."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event, Lock, Thread

import transformers
from rich.console import Console
from transformers.generation.streamers import BaseStreamer

from parts.model import fused, generate, weights
from parts.model.encoding import Reply, encode_messages, opens_thinking, split_reply, think_tokens
from parts.model.generate import Messages

TOKEN_LENGTH = 16  # characters: on average no text has tokens as long, but for runs of spaces


class ReplyStreamer(transformers.TextStreamer):
    """Prints one reply as it is generated: the thinking dimmed, the answer plain, each under its heading."""

    def __init__(self, tokenizer, console: Console):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console, self.style, self.started = console, None, False
        self.thinking = None  # until a token says whether it is

    def put(self, value):
        tokens = value.flatten().tolist()
        if self.next_tokens_are_prompt:
            if opens_thinking(self.tokenizer, tokens):
                self.begin(thinking=True)
        elif tokens[-1] in (marks := think_tokens(self.tokenizer)):
            self.flush()
            return self.begin(thinking=tokens[-1] == marks[0])
        super().put(value)

    def begin(self, thinking: bool):
        if thinking != self.thinking:
            self.console.print("\n" * (self.started or self.thinking is not None), end="")
            self.console.print("【思考】" if thinking else "【回答】", style="dim" if thinking else "bold")
            self.thinking, self.style, self.started = thinking, "dim" if thinking else None, False

    def flush(self):
        self.on_finalized_text(self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :])
        self.token_cache, self.print_len = [], 0

    def on_finalized_text(self, text: str, stream_end: bool = False):
        text = text if self.started else text.lstrip()  # the template's line breaks around the thinking
        self.started = self.started or bool(text)
        self.console.print(text, end="\n" if stream_end else "", style=self.style, markup=False, soft_wrap=True)


class TokenQueue(BaseStreamer):
    """Hands on what is generated: lists of token ids, the prompt's first; None ends them."""

    def __init__(self):
        self.tokens = SimpleQueue()

    def put(self, value):
        self.tokens.put(value.flatten().tolist())

    def end(self):
        """Not yet: the reply itself is still to come."""


class Conversation:
    """How a model is asked, and the console on which it answers.

    `to_messages(question, history=[[question, answer], …])` makes of a question the messages that the model reads.
    Without `fast_kernels` the model stays as it was loaded and generates with transformers' loop.
    """

    lock = Lock()  # one is asked at a time: all draw from the same random numbers, and a CUDA graph is captured alone

    def __init__(
        self,
        model,
        tokenizer,
        to_messages: Callable[..., Messages],
        thinking: bool,
        max_new_tokens: int,
        seed: int,
        fast_kernels: bool = True,
    ):
        self.model, self.tokenizer, self.to_messages = model, tokenizer, to_messages
        self.thinking, self.max_new_tokens, self.fast_kernels = thinking, max_new_tokens, fast_kernels
        self.console = Console(highlight=False, emoji=False)
        transformers.set_seed(seed)
        if fast_kernels and model.device.type == "cuda":
            fused.fuse_norms(model)

    def generate(self, conversations: list[Messages], streamer=None, stop=None) -> list[Reply]:
        """Return what generate.generate returns when it asks as this conversation is held."""
        return generate.generate(
            self.model,
            self.tokenizer,
            conversations,
            self.max_new_tokens,
            self.thinking,
            streamer,
            stop,
            self.fast_kernels,
        )

    def stream(self, messages: Messages, closed: Event | None = None) -> Iterator[Reply]:
        """Yield the reply as far as it is written, again and again, and as the last the whole one. It ends early where
        `closed` is set or the iterator is closed. One is written at a time: others wait."""
        queue, left, outcome = TokenQueue(), Event(), []

        def stop() -> bool:
            return left.is_set() or closed is not None and closed.is_set()

        def generate():
            try:
                with self.lock:
                    outcome.extend(self.generate([messages], queue, stop))
            except Exception as error:  # is raised where the reply is waited for
                outcome.append(error)
            finally:
                queue.tokens.put(None)

        Thread(target=generate, daemon=True).start()
        stops, ids, prompt = weights.stop_tokens(self.model, self.tokenizer), [], None
        try:
            while (new := queue.tokens.get()) is not None:
                if prompt is None:
                    prompt = new
                    continue
                ids += [token for token in new if token not in stops]
                if queue.tokens.empty():  # a slow reader is shown fewer steps
                    yield split_reply(self.tokenizer, ids, False, opens_thinking(self.tokenizer, prompt))
        finally:
            left.set()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        yield outcome[0]

    def check_lengths(self, conversations: list[Messages], names: list[str]) -> list[int]:
        """Return the tokens of each prompt, and say which replies may reach beyond the model's context. It raises
        SystemExit, with the name of the conversation, for a prompt that does so alone."""
        most = self.model.config.max_position_embeddings
        lengths, over = [], []
        for name, messages in zip(names, conversations):
            size = sum(len(message["content"]) for message in messages)
            if size > most * TOKEN_LENGTH:  # 10 MB would take 14 s to be cut into tokens
                raise SystemExit(f"错误：{name}连同之前的对话有 {size} 个字，模型最多读 {most} 个 token；请缩短。")
            length = len(encode_messages(self.tokenizer, messages, True, self.thinking))
            if length >= most:
                raise SystemExit(f"错误：{name}连同之前的对话有 {length} 个 token，模型最多读 {most} 个；请缩短。")
            if length + self.max_new_tokens > most:
                over.append(name)
            lengths.append(length)
        if over:
            first = "、".join(over[:5]) + (" 等" if over[5:] else "")
            self.warn(
                f"（{first}加上 --max_new_tokens {self.max_new_tokens} 超过模型的上下文 {most} 个 token："
                "超出的回复不可靠；可减小 --max_new_tokens。）"
            )
        return lengths

    def warn(self, text: str) -> None:
        """Show a remark that is not the model's."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def ask(self, question: str, history: list[list[str]] | None = None) -> Reply:
        """Stream one reply, and say so when it was cut off. It raises SystemExit for a prompt that is too long."""
        messages = self.to_messages(question, history=history)
        self.check_lengths([messages], ["这个问题"])
        [reply] = self.generate([messages], ReplyStreamer(self.tokenizer, self.console))
        if not reply.complete:
            self.warn(f"（到 {self.max_new_tokens} 个 token 为止，回复未完；可加大 --max_new_tokens。）")
        return reply

    def chat(self) -> None:
        """Ask until an empty line or the end of input. Earlier thinking is not fed back, nor an exchange without an
        answer."""
        self.console.print("输入问题后回车；空行结束。")
        history: list[list[str]] = []
        while True:
            try:
                question = self.console.input("\n[bold]问：[/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if not question:
                break
            try:
                reply = self.ask(question, history)
            except KeyboardInterrupt:
                self.warn("\n（已停止这次回复。）")
                continue
            except SystemExit as refused:  # too long
                self.warn(str(refused))
                continue
            if reply.answer:
                history.append([question, reply.answer])
            else:
                self.warn("（没有回答，这一问不算在对话里。）")
