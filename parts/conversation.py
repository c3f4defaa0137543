"""A model that is asked: at the terminal one question whose reply streams, or one after another; or by a program that
takes a reply as it is written. Knows a console, not where the model comes from."""

from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Lock, Thread

import transformers
from rich.console import Console
from transformers.generation.streamers import BaseStreamer

from parts import decoding, replies
from parts.encoding import Reply, encode_messages, opens_thinking, split_reply, think_tokens
from parts.replies import Messages

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
    """How a model is asked, and the console on which it answers."""

    asked = Lock()  # by one at a time: all draw from the same random numbers, and a CUDA graph is captured alone

    def __init__(self, model, tokenizer, thinking: bool, max_new_tokens: int, seed: int):
        self.model, self.tokenizer, self.thinking, self.max_new_tokens = model, tokenizer, thinking, max_new_tokens
        self.console = Console(highlight=False, emoji=False)
        transformers.set_seed(seed)
        if model.device.type == "cuda":
            decoding.fuse_norms(model)

    def generate(self, conversations: list[Messages], streamer=None, stop=None) -> list[Reply]:
        """replies.generate as this conversation is held."""
        most, thinking = self.max_new_tokens, self.thinking
        return replies.generate(self.model, self.tokenizer, conversations, most, thinking, streamer, stop)

    def stream(self, messages: Messages, seed: int | None = None, closed: Event | None = None) -> Iterator[Reply]:
        """The reply as far as it is written, again and again, and whole as the last; it ends early where `closed` is
        set or the iterator is closed. One at a time: others wait. `seed` makes a reply repeatable."""
        queue, left, outcome = TokenQueue(), Event(), []

        def stop() -> bool:
            return left.is_set() or closed is not None and closed.is_set()

        def generate():
            try:
                with self.asked:
                    if seed is not None:
                        transformers.set_seed(seed)
                    outcome.extend(self.generate([messages], queue, stop))
            except Exception as error:  # is raised where the reply is waited for
                outcome.append(error)
            finally:
                queue.tokens.put(None)

        Thread(target=generate, daemon=True).start()
        stops, ids, prompt = replies.stop_tokens(self.model, self.tokenizer), [], None
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
        """Tokens of each prompt. Says which replies may reach beyond the model's context; raises SystemExit where the
        prompt alone does."""
        prompts = (encode_messages(self.tokenizer, each, True, self.thinking) for each in conversations)
        most = self.model.config.max_position_embeddings
        for name, messages in zip(names, conversations):
            size = sum(len(message["content"]) for message in messages)
            if size > most * TOKEN_LENGTH:  # 10 MB would take 14 s to be cut into tokens
                raise SystemExit(f"错误：{name}连同之前的对话有 {size} 个字，模型最多读 {most} 个 token；请缩短。")
        lengths = [len(ids) for ids in prompts]
        for name, length in zip(names, lengths):
            if length >= most:
                raise SystemExit(f"错误：{name}连同之前的对话有 {length} 个 token，模型最多读 {most} 个；请缩短。")
        over = [name for name, length in zip(names, lengths) if length + self.max_new_tokens > most]
        if over:
            first = "、".join(over[:5]) + (" 等" if over[5:] else "")
            self.console.print(
                f"（{first}加上 --max_new_tokens {self.max_new_tokens} 超过模型的上下文 {most} 个 token："
                "超出的回复不可靠；可减小 --max_new_tokens。）",
                style="yellow",
                soft_wrap=True,
            )
        return lengths

    def ask(self, messages: Messages) -> Reply:
        """Stream one reply, and say so when it was cut off. Raises SystemExit for a prompt that is too long."""
        self.check_lengths([messages], ["这个问题"])
        [reply] = self.generate([messages], ReplyStreamer(self.tokenizer, self.console))
        if not reply.complete:
            self.console.print(
                f"（到 {self.max_new_tokens} 个 token 为止，回复未完；可加大 --max_new_tokens。）", style="yellow"
            )
        return reply

    def chat(self, to_messages) -> None:
        """Until an empty line or the end of input. `to_messages(question, history=[[question, answer], ...])` makes the
        conversation; earlier thinking is not fed back, nor an exchange without an answer."""
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
                reply = self.ask(to_messages(question, history=history))
            except KeyboardInterrupt:
                self.console.print("\n（已停止这次回复。）", style="yellow")
                continue
            except SystemExit as refused:  # too long
                self.console.print(str(refused), style="yellow", soft_wrap=True)
                continue
            if reply.answer:
                history.append([question, reply.answer])
            else:
                self.console.print("（没有回答，这一问不算在对话里。）", style="yellow")
