"""A page in the browser on which a model is asked: gradio's chat, with the thinking folded. Knows a
conversation and a browser, not the domain: title, notice and example are handed in. Nothing of it leaves the
machine: no telemetry, no share link, no font or picture from elsewhere."""

import contextlib
import importlib.metadata
import re
import socket
import time
from argparse import ArgumentTypeError

from parts import endpoint, terminal

GRADIO = "6.31.0"  # which was tried; others of its major version are taken
# The browser asks nobody else, whatever a reply says: a picture that is named in one would tell of it.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
# gradio reads HTML in a text for which it is told to read no Markdown. A tag or an entity begins with one of
# two signs; behind that sign this one, of no width, makes it a sign like any other.
JOINER = "\u2060"
CSS = ".chatbot { white-space: pre-wrap; }"  # of each text: line ends, and spaces in a row


def user_and_password(text: str) -> tuple[str, str]:
    """Return the two of user:password, for argparse."""
    user, _, password = text.partition(":")
    if not user or not password:
        raise ArgumentTypeError("要写成 用户名:密码")
    return user, password


def check_server(host: str, port: int, auth: tuple[str, str] | None) -> None:
    """Raise SystemExit where the page could not be shown: gradio is missing or of another major version,
    other machines would get in without a password, or the port is taken. It imports no gradio, which takes
    seconds."""
    installed = next(importlib.metadata.distributions(name="gradio"), None)
    if installed is None or installed.version.split(".")[0] != GRADIO.split(".")[0]:
        raise SystemExit(f"错误：--web 需要 gradio {GRADIO}；请先运行 pip install gradio=={GRADIO}")
    if not auth and host not in endpoint.THIS_MACHINE:
        raise SystemExit(f"错误：--host {host} 让其他机器也能提问；请加 --auth 用户名:密码。")
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        reason = terminal.first_line(error)
        raise SystemExit(f"错误：{host} 的端口 {port} 用不了（{reason}）；请用 --port 换一个端口。") from None


def chat_message(text: str, **metadata: str) -> dict:
    """Return a message as gradio keeps it. With a title it folds: a thinking, or a hint that is not the
    model's."""
    text = re.sub("[<&](?=[A-Za-z/!?#])", rf"\g<0>{JOINER}", terminal.name_unseen(text))
    # As a part: of a content that is a str, gradio takes out what its lines begin with.
    return {"role": "assistant", "content": [{"type": "text", "text": text}], "metadata": metadata}


def to_chat(reply, hint: str) -> list[dict]:
    """Return the messages of a reply as far as it is written, after a hint that is not the model's: its
    thinking is open until the answer begins."""
    # Of a character that is not whole yet, this sign stands for what is there.
    thinking, answer = reply.thinking.rstrip("\ufffd"), reply.answer.rstrip("\ufffd")
    state = {"status": "done"} if answer else {}  # which folds it
    messages = [(hint, {"title": "提示"}), (thinking, {"title": "思考", **state}), (answer, {})]
    return [chat_message(text, **metadata) for text, metadata in messages if text]


def read_history(messages: list[dict]) -> list[list[str]]:
    """Return [[question, answer], …] of the messages on the page: without what folds, which is not read back
    to the model, and without a question that got no answer."""
    turns: list[list[str]] = []
    for message in messages:
        # The content of a message is a list of parts; a file is one without a text.
        text = "".join(part.get("text", "") for part in message["content"]).replace(JOINER, "")
        if message["role"] == "user":
            turns.append([text, ""])
        elif turns and not (message.get("metadata") or {}).get("title"):
            turns[-1][1] += text
    return [turn for turn in turns if turn[1].strip()]


def open_page(conversation, host: str, port: int, auth, title, notice, example, out_of_memory):
    """Show a page on which the conversation is asked what a person types; return what closes it, and its URL.
    `out_of_memory` is said in place of a reply for which memory is not enough."""
    import gradio

    class Interface(gradio.ChatInterface):
        def _append_message_to_history(self, message, history, role="user"):
            # Private (gradio 6.31): here comes the question, as a str, and is put on the page. A subclass of
            # Chatbot would be the public way, but gradio writes a .pyi beside the file of each such class.
            shown = chat_message(message) if role == "user" else message
            return super()._append_message_to_history(shown, history, role)

    def answer(question: str, messages: list[dict]):
        """Yield the messages of the reply, again and again as it is written. gradio closes the iterator where
        the person stops it or leaves."""
        try:
            question = terminal.some_text(question.replace(JOINER, ""))
            asked, hint = conversation.fit(question, read_history(messages))
            with terminal.explain_out_of_memory(out_of_memory):
                for reply in conversation.stream(asked):
                    yield to_chat(reply, hint)
        # One question that is empty, or too long, does not end the page for everybody.
        except (SystemExit, ArgumentTypeError) as refused:
            yield [chat_message(str(refused), title="提示")]
            return
        if not reply.complete:
            yield [*to_chat(reply, hint), chat_message(conversation.unfinished, title="提示")]

    look = {"show_label": False, "buttons": ["copy"], "editable": "user", "render_markdown": False}
    chatbot = gradio.Chatbot(scale=1, placeholder=f"例如：{example}", latex_delimiters=[], **look)
    box = {"show_label": False, "submit_btn": True, "stop_btn": True, "max_lines": 8, "autofocus": True}
    textbox = gradio.Textbox(label="问题", placeholder="输入问题，回车发送", **box)
    words = {"title": title, "description": notice, "editable": True, "analytics_enabled": False}
    interface = Interface(answer, chatbot=chatbot, textbox=textbox, **words)
    # No link to another server, and no questions kept in the browser, where the next person would find them.
    private = {"share": False, "run_history": False, "footer_links": [], "quiet": True, "ssr_mode": False}
    # By default gradio's themes fetch their fonts from Google.
    theme = gradio.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    server = {"server_name": host, "server_port": port, "auth": auth, "prevent_thread_lock": True}
    _, url, _ = interface.launch(theme=theme, head=HEAD, css=CSS, **server, **private)
    return interface, url


def serve(conversation, host: str, port: int, auth, **texts: str) -> None:
    """Show the page until Ctrl-C, which also ends a reply that is being written. `texts` are open_page's."""
    interface, url = open_page(conversation, host, port, auth, **texts)
    print(f"网页：{url}（按 Ctrl-C 停止）", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
    # Python waits at its end for the thread that writes a reply: it is stopped first.
    conversation.closed.set()
    interface.close(verbose=False)
    print("\n已停止。")
