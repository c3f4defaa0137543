"""A page in the browser on which a model is asked, or several side by side: gradio's, with the thinking folded. Knows a
dialogue and a browser, not the domain: title, notice and example are handed in. Nothing of it leaves the machine: no
telemetry, no share link, no font or picture from elsewhere."""

import importlib.metadata
import time

from parts.address import Address
from parts.dialogue import SETTINGS, Dialogue, count_turns, first_turns
from parts.encoding import has_no_thinking_mode

GRADIO = "6.31.0"  # which was tried; others of its major version are taken
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


def place_beside(interface, others: list) -> None:
    """Put other Chatbots beside the one of a ChatInterface, which knows that one alone; they follow where a person goes
    back or clears it."""
    import gradio

    chatbot = interface.chatbot
    column = chatbot.parent
    where = column.children.index(chatbot)
    with interface:
        with column, gradio.Row(scale=1, equal_height=True):
            for each in (chatbot, *others):
                each.unrender()
                each.render()
        column.children.insert(where, column.children.pop())
        for other in others:
            chatbot.undo(lambda shown: first_turns(shown, count_turns(shown) - 1), other, other)
            chatbot.clear(lambda: [], None, other)


class Page:
    """What a dialogue.Dialogue looks like."""

    def __init__(self, dialogue: Dialogue):
        self.dialogue = dialogue

    def settings(self) -> list:
        """The components of Settings."""
        import gradio

        each = [model.conversation for model in self.dialogue.models]
        can_do_without = all(has_no_thinking_mode(conversation.tokenizer) for conversation in each)
        most, now = min(c.model.config.max_position_embeddings for c in each), each[0].max_new_tokens
        return [
            gradio.Checkbox(each[0].thinking, label="先思考再回答", interactive=can_do_without),
            gradio.Slider(1, max(most, now), now, step=1, label="最多生成的 token 数"),
            # Texts, as a Number is never empty.
            gradio.Textbox("", label="温度", placeholder="留空：照模型的设置；越低越稳，越高越多样", max_lines=1),
            gradio.Textbox("", label="随机种子", placeholder="留空：每次不同", max_lines=1),
        ]

    def build(self, title: str, notice: str, example: str):
        """The page itself: gradio's ChatInterface, which knows one Chatbot; other models' stand beside it."""
        import gradio

        # Alone it fills the page; side by side each has a height, and they stand below each other on a phone.
        several = len(self.dialogue.models) > 1
        look = {"show_label": several, "min_width": 280} | ({"height": "62vh"} if several else {})
        chatbot, *others = (
            gradio.Chatbot(label=model.name, scale=1, buttons=["copy"], render=False, **look)
            for model in self.dialogue.models
        )
        chatbot.editable, chatbot.placeholder = "user", f"例如：{example}"
        textbox = gradio.Textbox(
            label="问题",
            placeholder="输入问题，回车发送",
            show_label=False,
            max_lines=8,
            autofocus=True,
            submit_btn=True,
            stop_btn=True,
        )
        interface = gradio.ChatInterface(
            self.dialogue.answer,
            chatbot=chatbot,
            textbox=textbox,
            editable=True,
            title=title,
            description=f"<div class='notice'>{notice}</div>",
            additional_inputs=[*self.settings(), *others],
            additional_outputs=others,
            additional_inputs_accordion=gradio.Accordion(SETTINGS, open=False),
            analytics_enabled=False,
            api_visibility="private",
            validator=self.dialogue.validate,
        )
        if others:
            place_beside(interface, others)
        return interface

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
            self.dialogue.closed.set()
            interface.close(verbose=False)
