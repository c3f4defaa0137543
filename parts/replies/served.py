"""A model behind an OpenAI-compatible address that answers a file of questions, such as the trained one in
the server that others will ask. Knows no weights: what the server makes of messages is the server's."""

import time
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console

from parts.endpoint import AT_ONCE, Completion, Endpoint, Failed
from parts.model.encoding import Reply
from parts.rows.shapes import split_block


def to_reply(said: Completion, seconds: float) -> Reply:
    """Return what a server said in two parts: its thinking stands in a field of its own, or in the text."""
    thinking, answer = said.reasoning, said.content.lstrip()
    if not thinking:
        block, answer = split_block(answer)
        thinking = block or ""
    form = "one" if thinking else "none"
    if answer.startswith("<think>") or said.cut and not answer:
        # A thinking that never ends may be in the text, where no parser took it out.
        thinking, answer, form = thinking or answer.removeprefix("<think>"), "", "unclosed"
    return Reply(thinking.strip(), answer.strip(), not said.cut, form, said.new_tokens, seconds)


class Served:
    """How the model at `endpoint` is asked; for parts/replies/questions.py what a Conversation is."""

    def __init__(self, endpoint: Endpoint, to_messages, thinking: bool, max_new_tokens: int, seed: int):
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
        return [missing[start : start + AT_ONCE] for start in range(0, len(missing), AT_ONCE)]

    def generate(self, conversations: list) -> list[Reply]:
        """Return the replies, asked for at once. It raises SystemExit where one cannot be had."""
        begun = time.monotonic()
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                said = list(pool.map(self.ask, conversations))
        except Failed as failed:
            refusal = f"错误：{self.endpoint.url} 没有回复（{failed}）；请检查服务器后重试。"
            raise SystemExit(refusal) from None
        seconds = (time.monotonic() - begun) / len(said)
        return [to_reply(completion, seconds) for completion in said]

    def ask(self, messages: list[dict]) -> Completion:
        """Return one reply. Raises Failed."""
        return self.endpoint.complete(messages, **self.limits)
