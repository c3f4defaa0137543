"""A page in the browser on which one model is asked: gradio's, with the thinking folded. Knows a conversation and a
browser, not the domain: title, notice and example are handed in. Nothing of it leaves the machine: no telemetry, no
share link, no font or picture from elsewhere."""

import copy
import importlib.metadata
import io
import time
from argparse import ArgumentTypeError
from threading import Event

from parts import terminal
from parts.address import Address
from parts.encoding import Reply, has_no_thinking_mode

GRADIO = "6.31.0"  # which was tried; others of its major version are taken
THOUGHT, HINT = "思考", "提示"  # titles of what folds
SETTINGS = "设置"
# The browser asks nobody else, whatever a reply says: a picture that is named in one would tell of it.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
CSS = "footer { display: none !important } .notice { text-align: center; font-size: .9em }"


def require_gradio() -> None:
    """Raises SystemExit where it is missing, or of another major version. Does not import it: that takes seconds."""
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version.split(".")[0] != GRADIO.split(".")[0]:
        found = f"，不是 {version}" if version else ""
        raise SystemExit(f"错误：--web 要用 gradio {GRADIO}{found}；请先运行 pip install gradio=={GRADIO}")


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


def show_reply(reply: Reply, whole: bool) -> list[dict]:
    """The messages of a reply: the thinking, which folds, and the answer. While it is written, half a character may
    stand at its end."""
    thinking, answer = (text if whole else text.rstrip("\ufffd") for text in (reply.thinking, reply.answer))
    # Unfolded without a status, folded when it is done. "pending" would show a wheel that a stop leaves turning.
    state = {"title": THOUGHT} | ({"status": "done"} if whole or answer else {})
    shown = [{"role": "assistant", "content": thinking, "metadata": state}] * bool(thinking)
    return shown + [{"role": "assistant", "content": answer}] * bool(answer)


def hint(text: str) -> dict:
    """A message that is not the model's, and is not read back to it."""
    return {"role": "assistant", "content": text, "metadata": {"title": HINT}}


class Page:
    """How questions are answered by a conversation.Conversation, and what it looks like.

    `to_messages(question, history=[[question, answer], …])` makes what the
    model is asked; `out_of_memory` is said where memory does not suffice."""

    def __init__(self, conversation, to_messages, out_of_memory: str):
        self.conversation, self.to_messages, self.out_of_memory = conversation, to_messages, out_of_memory
        self.closed = Event()

    def hold(self, thinking: bool, max_new_tokens: int):
        """The conversation as this person wishes it. Its console is read, and shown on the page."""
        from rich.console import Console

        held = copy.copy(self.conversation)
        held.thinking, held.max_new_tokens = thinking, max_new_tokens
        held.console = Console(file=io.StringIO(), emoji=False)
        return held

    def validate(self, question: str) -> dict:
        """Before anything is shown of a question: that there is one, and that the model can read it."""
        import gradio

        try:
            self.hold(True, 1).check_lengths([self.to_messages(terminal.some_text(question))], ["这个问题"])
        except (SystemExit, ArgumentTypeError) as refused:
            return gradio.validate(False, str(refused))
        return gradio.validate(True, "")

    def answer(self, question: str, messages: list[dict], thinking: bool, max_new_tokens: int, seed: str):
        """Yields the messages of the reply as it is written; gradio closes it where the person stops it."""
        held, reply = self.hold(thinking, max_new_tokens), None
        asked = self.to_messages(question, history=read_history(messages))
        try:
            seed = terminal.whole_number(0, seed.strip()) if seed.strip() else None
            held.check_lengths([asked], ["这个问题"])
            hints = [hint(text)] if (text := held.console.file.getvalue().strip()) else []
            with terminal.explain_out_of_memory(self.out_of_memory):
                for reply in held.stream(asked, seed, self.closed):
                    yield show_reply(reply, False) + hints
        except (SystemExit, ArgumentTypeError) as refused:
            yield [hint(str(refused))]
            return
        if not reply.answer:
            hints.append(hint("没有回答，这一问不算在对话里。"))
        if not reply.complete:
            hints.append(hint(f"到 {max_new_tokens} 个 token 为止，回复未完；可在“{SETTINGS}”里加大。"))
        yield show_reply(reply, True) + hints

    def build(self, title: str, notice: str, example: str):
        """The page itself: gradio's ChatInterface."""
        import gradio

        conversation = self.conversation
        most = conversation.model.config.max_position_embeddings
        can_do_without = has_no_thinking_mode(conversation.tokenizer)
        settings = [
            gradio.Checkbox(conversation.thinking, label="先思考再回答", interactive=can_do_without),
            gradio.Slider(
                1,
                max(most, conversation.max_new_tokens),
                conversation.max_new_tokens,
                step=1,
                label="最多生成的 token 数",
            ),
            gradio.Textbox("", label="随机种子", placeholder="留空：每次不同", max_lines=1),  # a Number has no empty
        ]
        chatbot = gradio.Chatbot(
            label="对话", show_label=False, scale=1, buttons=["copy"], editable="user", placeholder=f"例如：{example}"
        )
        textbox = gradio.Textbox(
            label="问题",
            placeholder="输入问题，回车发送",
            show_label=False,
            max_lines=8,
            autofocus=True,
            submit_btn=True,
            stop_btn=True,
        )
        return gradio.ChatInterface(
            self.answer,
            chatbot=chatbot,
            textbox=textbox,
            editable=True,
            title=title,
            description=f"<div class='notice'>{notice}</div>",
            additional_inputs=settings,
            additional_inputs_accordion=gradio.Accordion(SETTINGS, open=False),
            analytics_enabled=False,
            api_visibility="private",
            validator=self.validate,
        )

    def open(self, address: Address, **texts: str):
        """Show the page of `build`; returns what closes it, and its URL."""
        import gradio

        interface = self.build(**texts)
        fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
        _, url, _ = interface.launch(
            server_name=address.host,
            server_port=address.port,
            auth=address.auth,
            share=False,
            ssr_mode=False,
            run_history=False,  # of questions, in the browser, where the next person finds them
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            theme=gradio.themes.Base(**fonts),
            css=CSS,
            head=HEAD,
        )
        return interface, url

    def serve(self, address: Address, **texts: str) -> None:
        """Show it until Ctrl-C, which also ends a reply that is being written."""
        interface, url = self.open(address, **texts)
        print(f"网页：{url}（按 Ctrl-C 停止）", flush=True)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            print("\n已停止。")
        finally:
            self.closed.set()
            interface.close(verbose=False)
