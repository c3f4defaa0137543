"""A model behind an OpenAI-compatible address that answers a file of questions, such as the one that was trained,
in the server that others will ask. Knows no weights: what the server makes of messages is the server's."""

import time
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console

from parts.endpoint import AT_ONCE, Completion, Endpoint, Failed
from parts.model.encoding import Reply
from parts.rows.shapes import split_block


def to_reply(said: Completion, seconds: float) -> Reply:
    """Return what a server said in two parts: its thinking stands in a field of its own, or in the text."""
    thinking, answer = said.reasoning, said.content
    if not thinking:
        before, answer = split_block(answer)
        thinking = before or ""
    form = "one" if thinking else "none"
    # A thinking that never ends is in the text too, where no parser took it out.
    if answer.lstrip().startswith("<think>"):
        thinking, answer = answer.lstrip().removeprefix("<think>"), ""
    if said.cut and not answer.strip():
        form = "unclosed"
    # The prompt's tokens are in the server's count, which is the only one there is.
    return Reply(thinking.strip(), answer.strip(), not said.cut, form, said.tokens or 0, seconds)


class Served:
    """How such a model is asked; for parts/replies/questions.py what a conversation.Conversation is."""

    def __init__(self, endpoint: Endpoint, to_messages, thinking, max_new_tokens: int, seed: int):
        self.endpoint, self.to_messages = endpoint, to_messages
        self.limits = {"max_tokens": max_new_tokens, "seed": seed}
        if not thinking:  # only then: a server may refuse fields that it does not know
            self.limits["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
        self.console = Console(highlight=False, emoji=False)

    def warn(self, text: str) -> None:
        """Show a remark that is not the model's."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def make_batches(self, missing: list[int], prompts: list) -> list[list[int]]:
        """Return the `missing` indexes in parts, after each of which the file is written."""
        size = 2 * AT_ONCE
        return [missing[start : start + size] for start in range(0, len(missing), size)]

    def generate(self, conversations: list) -> list[Reply]:
        """Return the replies, AT_ONCE asked at a time. It raises SystemExit where one cannot be had."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.ask, conversations))

    def ask(self, messages: list[dict]) -> Reply:
        """Return one reply, timed."""
        start = time.monotonic()
        try:
            said = self.endpoint.complete(messages, **self.limits)
        except Failed as failed:
            raise SystemExit(
                f"错误：{self.endpoint.url} 没有回复（{failed}）；请检查服务器后重试。"
            ) from None
        return to_reply(said, (time.monotonic() - start) / AT_ONCE)
