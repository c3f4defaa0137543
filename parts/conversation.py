"""A model that is asked at the terminal: one question whose reply streams, or one after another. Knows a console, not
where the model comes from."""

import transformers
from rich.console import Console

from parts import decoding, replies
from parts.encoding import Reply
from parts.replies import Messages


class ReplyStreamer(transformers.TextStreamer):
    """Prints one reply as it is generated: the thinking dimmed, the answer plain, each under its heading."""

    def __init__(self, tokenizer, console: Console):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console, self.style, self.started = console, None, False
        self.start, self.stop = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    def put(self, value):
        token = value.flatten()[-1].item()
        if self.next_tokens_are_prompt or token not in (self.start, self.stop):
            return super().put(value)
        self.flush()
        thinking = token == self.start
        self.console.print("【思考】" if thinking else "\n【回答】", style="dim" if thinking else "bold")
        self.style, self.started = "dim" if thinking else None, False

    def flush(self):
        self.on_finalized_text(self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :])
        self.token_cache, self.print_len = [], 0

    def on_finalized_text(self, text: str, stream_end: bool = False):
        text = text if self.started else text.lstrip()  # the template's line breaks around the thinking
        self.started = self.started or bool(text)
        self.console.print(text, end="\n" if stream_end else "", style=self.style, markup=False, soft_wrap=True)


class Conversation:
    """How a model is asked, and the console on which it answers."""

    def __init__(self, model, tokenizer, thinking: bool, max_new_tokens: int, seed: int):
        self.model, self.tokenizer, self.thinking, self.max_new_tokens = model, tokenizer, thinking, max_new_tokens
        self.console = Console(highlight=False, emoji=False)
        transformers.set_seed(seed)
        if model.device.type == "cuda":
            decoding.fuse_norms(model)

    def generate(self, conversations: list[Messages], streamer=None) -> list[Reply]:
        """replies.generate as this conversation is held."""
        return replies.generate(self.model, self.tokenizer, conversations, self.max_new_tokens, self.thinking, streamer)

    def ask(self, messages: Messages) -> Reply:
        """Stream one reply, and say so when it was cut off."""
        [reply] = self.generate([messages], ReplyStreamer(self.tokenizer, self.console))
        if not reply.complete:
            self.console.print(
                f"（到 {self.max_new_tokens} 个 token 为止，回复未完；可加大 --max_new_tokens。）", style="yellow"
            )
        return reply

    def chat(self, to_messages) -> None:
        """Until an empty line or the end of input. `to_messages(question)` begins a conversation; earlier thinking is
        not fed back."""
        self.console.print("输入问题后回车；空行结束。")
        history: Messages = []
        while True:
            try:
                question = self.console.input("\n[bold]问：[/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if not question:
                break
            messages = to_messages(question)
            messages[1:1] = history
            try:
                reply = self.ask(messages)
            except KeyboardInterrupt:
                self.console.print("\n（已停止这次回复。）", style="yellow")
                continue
            history += [{"role": "user", "content": question}, {"role": "assistant", "content": reply.answer}]
