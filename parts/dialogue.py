"""What a person and one model, or several side by side, say on a page, as gradio keeps it: lists of messages, of which
some fold under a title. Knows conversations and gradio's dictionaries, not what the page looks like."""

import copy
import io
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

from parts import terminal
from parts.encoding import Reply

if TYPE_CHECKING:  # it imports transformers
    from parts.conversation import Conversation

SETTINGS = "设置"  # title of what holds Settings
TEMPERATURES = (0.1, 2)  # lower is greedy, and thinks in circles; higher is noise
THOUGHT, HINT, WAITING = "思考", "提示", "等待"  # titles of what folds


def text_of(message: dict) -> str:
    """Of one message as gradio keeps it."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def read_history(messages: list[dict]) -> list[list[str]]:
    """[[question, answer], …] of the messages on the page: without thinking and hints, which have titles, and without
    a question that got no answer."""
    turns: list[list[str]] = []
    for message in messages:
        if message["role"] == "user":
            turns.append([text_of(message), ""])
        elif turns and not (message.get("metadata") or {}).get("title"):
            turns[-1][1] += text_of(message)
    return [turn for turn in turns if turn[1].strip()]


def count_turns(messages: list[dict]) -> int:
    """Questions, answered or not."""
    return sum(message["role"] == "user" for message in messages)


def first_turns(messages: list[dict], turns: int) -> list[dict]:
    """The messages up to the question after so many turns."""
    starts = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return messages[: starts[turns]] if turns < len(starts) else messages


def keep_up(messages: list[dict], other: list[dict]) -> list[dict]:
    """What is shown of another model, with the same questions as `messages`, the first one's: none that a person went
    back from, and those too that were stopped before it heard of them; without what it waited for."""
    asked = [message for message in messages if message["role"] == "user"]
    kept = first_turns(other, len(asked))
    kept = [message for message in kept if (message.get("metadata") or {}).get("title") != WAITING]
    return kept + asked[count_turns(kept) :]


def show_reply(reply: Reply, whole: bool) -> list[dict]:
    """The messages of a reply: the thinking, which folds, and the answer. While it is written, half a character may
    stand at its end."""
    thinking, answer = (text if whole else text.rstrip("\ufffd") for text in (reply.thinking, reply.answer))
    # Unfolded without a status, folded when it is done. "pending" would show a wheel that a stop leaves turning.
    state = {"title": THOUGHT} | ({"status": "done"} if whole or answer else {})
    shown = [{"role": "assistant", "content": thinking, "metadata": state}] * bool(thinking)
    return shown + [{"role": "assistant", "content": answer}] * bool(answer)


def hint(text: str, title: str = HINT) -> dict:
    """A message that is not the model's, and is not read back to it."""
    return {"role": "assistant", "content": text, "metadata": {"title": title}}


class Model(NamedTuple):
    """One that is asked on the page."""

    name: str
    conversation: "Conversation"
    to_messages: Callable  # (question, history=[[question, answer], …]) -> what the model is asked


class Settings(NamedTuple):
    """What a person has set on the page; texts as they were typed."""

    thinking: bool
    max_new_tokens: int
    temperature: str  # empty: the model's own
    seed: str  # empty: another one each time


def read_typed(label: str, read: Callable, text: str):
    """What `read` makes of a setting's text; None where it is empty. Raises SystemExit where it makes no sense."""
    try:
        return read(text.strip()) if text.strip() else None
    except ArgumentTypeError as error:
        raise SystemExit(f"“{SETTINGS}”里的{label}：{error}") from None


class Dialogue:
    """How questions are answered. `out_of_memory` is said where memory does not suffice; once `closed` is set, a reply
    that is being written ends."""

    def __init__(self, models: list[Model], out_of_memory: str):
        self.models, self.out_of_memory = models, out_of_memory
        self.closed = Event()

    def hold(self, model: Model, settings: Settings) -> "tuple[Conversation, int | None]":
        """The conversation as this person wishes it, and the seed. Its console is read, and shown on the page. Raises
        SystemExit for a setting that makes no sense."""
        from rich.console import Console

        held = copy.copy(model.conversation)
        held.thinking, held.max_new_tokens = settings.thinking, settings.max_new_tokens
        held.temperature = read_typed("温度", partial(terminal.number_between, *TEMPERATURES), settings.temperature)
        held.console = Console(file=io.StringIO(), emoji=False)
        return held, read_typed("随机种子", partial(terminal.whole_number, 0), settings.seed)

    def validate(self, question: str) -> dict:
        """Before anything is shown of a question: that there is one, and that each model can read it."""
        import gradio

        try:
            for model in self.models:
                held, _ = self.hold(model, Settings(True, 1, "", ""))
                held.check_lengths([model.to_messages(terminal.some_text(question))], ["这个问题"])
        except (SystemExit, ArgumentTypeError) as refused:
            return gradio.validate(False, str(refused))
        return gradio.validate(True, "")

    def reply(self, model: Model, question: str, messages: list[dict], settings: Settings) -> Iterator[list[dict]]:
        """The messages of one model's reply as it is written."""
        asked, reply = model.to_messages(question, history=read_history(messages)), None
        try:
            held, seed = self.hold(model, settings)
            held.check_lengths([asked], ["这个问题"])
            hints = [hint(text)] if (text := held.console.file.getvalue().strip()) else []
            with terminal.explain_out_of_memory(self.out_of_memory):
                for reply in held.stream(asked, seed, self.closed):
                    yield show_reply(reply, False) + hints
        except SystemExit as refused:
            yield [hint(str(refused))]
            return
        if not reply.answer:
            hints.append(hint("没有回答，这一问不算在对话里。"))
        if not reply.complete:
            hints.append(hint(f"到 {settings.max_new_tokens} 个 token 为止，回复未完；可在“{SETTINGS}”里加大。"))
        yield show_reply(reply, True) + hints

    def answer(self, question: str, messages: list[dict], *more):
        """Yields the messages of the reply as it is written; gradio closes it where the person stops it. `more`: the
        Settings, then what is shown of each other model. They answer one after another, each from its own history, and
        what all of it comes to is yielded beside the reply."""
        settings, others = Settings(*more[: len(Settings._fields)]), more[len(Settings._fields) :]
        histories = [messages, *(keep_up(messages, other) for other in others)]
        user = {"role": "user", "content": question}
        shown = [[], *([hint(f"等 {model.name} 答完。", WAITING)] for model in self.models[:-1])]
        for place, (model, history) in enumerate(zip(self.models, histories)):
            for shown[place] in self.reply(model, question, history, settings):
                beside = [[*old, user, *new] for old, new in zip(histories[1:], shown[1:])]
                yield (shown[0], *beside) if beside else shown[0]
