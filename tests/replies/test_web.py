"""The page, served by gradio and used in a real browser; the model recites."""

import shutil
import signal
import socket
import sys
import time

import pytest
import requests
import torch
from helpers import Started, free_port, recite, refused

import data
import inference
from parts.model import weights
from parts.model.encoding import encode_messages
from parts.replies import web
from parts.replies.conversation import Conversation

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
THINKING, ANSWER = "要点是多休息、多喝水。", "多休息，**多喝水**。"
REPLY = f"<think>\n{THINKING}\n</think>\n\n{ANSWER}"
LONG = "<think>\n" + "想一想。" * 500
HOSTILE = '![x](http://127.0.0.2:9/x.png) <img src="http://127.0.0.2:9/y.png" onerror="document.title=1"> </think>'
# What Markdown, HTML, LaTeX and gradio itself would take out of a text, or make something else of.
SIGNS = r"""每次 1~2 片，每天 2~3 次；~~删~~ **粗** *斜* _下_ __下__ ==亮== H^2^ x_1 `码` 70 / 1.7*1.7 \* \\ \n :smile:
# 标题
> 引  两个空格 <37℃ a<b x</b >5 <头痛> <b>粗</b> <think>想</think> <br> <!-- 注 --> <?php ?> <![CDATA[1]]>
   1. 甲
   - [ ] 乙 [链](http://127.0.0.2:9/) ![图](x.png) [^1] http://127.0.0.2:9/ a@b.cn | 甲 | 乙 |
|-|-|
$x$ $$y$$ \(z\) \[w\] %%%LATEX_BLOCK_0%%% &lt; &nbsp; &#65; &copy R&D & --- === + "引" '引'
```
码
```
[^1]: 注"""
TEXTS = {"title": "问答", "notice": inference.NOT_A_DOCTOR, "example": "头痛？", "out_of_memory": "错误：显存不足。"}


class Visitor:
    """A person before the page."""

    def __init__(self, browser, url: str):
        self.page, self.url, self.requests, self.blocked = browser.new_page(locale="zh-CN"), url, [], []
        self.page.set_default_timeout(20_000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.blocked.extend([request.url] * (request.failure == "csp")))
        self.page.goto(url)

    def ask(self, question: str, sees: str = "") -> None:
        self.page.get_by_test_id("submit-button").wait_for()
        self.page.get_by_role("textbox", name="问题").fill(question)
        self.page.get_by_role("textbox", name="问题").press("Enter")
        self.sees(sees or question)

    def sees(self, text: str) -> None:
        self.page.get_by_text(text).last.wait_for()


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="gradio is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium or Chrome here")
    with playwright.sync_playwright() as running:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        yield running.chromium.launch(executable_path=CHROMIUM, args=flags)


@pytest.fixture
def visit(browser, tiny_model, tokenizer):
    """visit(*replies) is a Visitor of a page whose model recites them slowly; its prompts are in `.prompts`."""
    opened = []

    def start(*replies: str, max_new_tokens: int = 2048, pause: float = 0.03) -> Visitor:
        model = weights.load_weights(str(tiny_model), torch.device("cpu"))
        conversation = Conversation(model, tokenizer, data.to_messages, True, max_new_tokens, seed=42)
        prompts = recite(model, tokenizer, [*replies], pause)
        interface, url = web.open_page(conversation, "127.0.0.1", free_port(), None, **TEXTS)
        visitor = Visitor(browser, url)
        visitor.prompts, visitor.conversation = prompts, conversation
        opened.append((visitor, conversation, interface))
        return visitor

    yield start
    for visitor, conversation, interface in opened:
        visitor.page.close()
        conversation.closed.set()
        interface.close(verbose=False)


def prompts(tokenizer, *asked) -> list[list[int]]:
    """Of (question, history) each."""
    return [encode_messages(tokenizer, data.to_messages(question, history=old), True) for question, old in asked]


def test_thinking_is_seen_then_folded_and_not_read_back(visit, tokenizer):
    person = visit(REPLY)
    thinking = person.page.get_by_text(THINKING)
    person.ask("感冒了怎么办？", sees=THINKING)
    person.sees("多喝水")
    thinking.wait_for(state="hidden")
    person.page.get_by_text("思考", exact=True).click()
    thinking.wait_for()
    person.ask("还有呢？")
    person.page.wait_for_function("[...document.querySelectorAll('.bot')].at(-1).innerText.includes('**多喝水**')")
    assert person.prompts == prompts(tokenizer, ("感冒了怎么办？", []), ("还有呢？", [["感冒了怎么办？", ANSWER]]))
    person.sees(inference.NOT_A_DOCTOR)
    assert all(url.startswith((person.url, "data:", "blob:")) for url in person.requests)


def test_a_reply_is_stopped_and_the_next_question_answered_asked_again_and_edited(visit, tokenizer):
    person = visit(LONG, REPLY, "再答", "改答")
    person.ask("感冒了怎么办？", sees="想一想。")
    person.page.get_by_test_id("stop-button").click()
    person.ask("还有呢？", sees="多喝水")
    person.page.get_by_test_id("submit-button").wait_for()
    person.page.get_by_label("重试").click()
    person.sees("再答")
    person.page.get_by_test_id("submit-button").wait_for()
    person.page.get_by_label("编辑").last.click()
    person.page.locator(".user textarea").fill("头痛怎么办？")
    person.page.get_by_label("发送").click()
    person.sees("改答")
    asked = ["感冒了怎么办？", "还有呢？", "还有呢？", "头痛怎么办？"]
    assert person.prompts == prompts(tokenizer, *[(question, []) for question in asked])


def test_who_leaves_stops_the_reply(visit, browser):
    person = visit(LONG, REPLY)
    leaving = Visitor(browser, person.url)
    leaving.ask("头痛？", sees="想一想。")
    leaving.page.close()
    person.ask("腹痛？", sees="多喝水")


def test_what_is_too_long_is_refused_and_what_is_cut_off_says_so(visit, tokenizer):
    person = visit("头晕", max_new_tokens=1)
    person.ask("头" * 200_000, sees="错误：这个问题有 ")
    person.ask("  ", sees="问题是空的")
    person.ask("头痛？", sees="到 1 个 token 为止，回复未完")
    assert person.prompts == prompts(tokenizer, ("头痛？", []))


def test_each_character_is_seen_of_replies_and_questions_and_read_back(visit, tokenizer):
    said = SIGNS.replace("think>", "reply>")
    person = visit(f"<think>\n{said}\n</think>\n\n{said}", "答", "改答", pause=0)

    def seen(speaker: str) -> list[str]:
        texts = person.page.locator(f"[data-testid={speaker}] .md").all_inner_texts()
        return [text.replace(web.JOINER, "") for text in texts]

    person.ask(SIGNS, sees="注")
    person.page.get_by_test_id("submit-button").wait_for()
    person.page.get_by_text("思考", exact=True).click()
    person.page.wait_for_timeout(500)
    assert seen("user") == [SIGNS] and seen("bot")[-2:] == [said, said]
    person.ask("还有呢？", sees="答")
    person.page.get_by_test_id("submit-button").wait_for()
    person.page.get_by_label("编辑").first.click()
    person.page.get_by_label("发送").click()
    person.sees("改答")
    assert seen("user") == [SIGNS]
    asked = (SIGNS, []), ("还有呢？", [[SIGNS, said]]), (SIGNS, [])
    assert person.prompts == prompts(tokenizer, *asked)


def test_a_conversation_that_is_longer_than_the_context_goes_on(visit, tokenizer):
    person = visit("好" * 30, max_new_tokens=100)
    person.conversation.model.config.max_position_embeddings = 200
    for i in range(4):
        person.ask(f"第 {i} 问" + "头" * 20)
        person.page.get_by_test_id("submit-button").wait_for()
    person.page.get_by_text("提示", exact=True).last.click()
    person.sees("最早的 ")
    assert len(person.prompts) == 4 and max(map(len, person.prompts)) <= 100


def test_nothing_is_fetched_from_elsewhere_and_tags_are_text(visit):
    person = visit("<think>\n想</think>" + HOSTILE)
    person.ask("头痛？" + HOSTILE, sees="思考")
    person.page.wait_for_timeout(500)
    elsewhere = [url for url in person.requests if not url.startswith((person.url, "data:", "blob:"))]
    assert sorted(elsewhere) == sorted(person.blocked) and person.page.title() == TEXTS["title"]


def test_the_page_of_a_script_asks_for_a_password_and_ends_with_ctrl_c(tiny_model, folder):
    pytest.importorskip("gradio", reason="gradio is not installed")
    port, end = free_port(), time.monotonic() + 60
    flags = ("--web", "--host", "0.0.0.0", "--port", port, "--auth", "a:b", "--model_path", tiny_model)
    started = Started("inference.py", flags, folder)
    while "网页：" not in started.stdout:
        assert started.poll() is None and time.monotonic() < end, started.stdout
        time.sleep(0.1)
    visitor, page = requests.Session(), f"http://127.0.0.1:{port}"
    assert visitor.get(f"{page}/config", timeout=10).status_code == 401
    visitor.post(f"{page}/login", data={"username": "a", "password": "b"}, timeout=10).raise_for_status()
    assert visitor.get(f"{page}/config", timeout=10).json()["title"] == inference.TITLE
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 0, started.stdout
    assert f":{port}/（按 Ctrl-C 停止）" in started.stdout and "Traceback" not in started.stdout
    assert not list(folder.iterdir())


def test_what_cannot_be_shown_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    metadata = tmp_path / "gradio-5.50.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: gradio\nVersion: 5.50.0\n", encoding="utf-8")
    wanted = f"--web 需要 gradio {web.GRADIO}；请先运行 pip install gradio=={web.GRADIO}"
    monkeypatch.setattr(sys, "argv", ["inference.py", "--web", "--model_path", "no-such-model"])
    for path in ([str(tmp_path)], []):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "path", path)  # where packages are looked for
            refused(wanted, inference.main)
    pytest.importorskip("gradio", reason="gradio is not installed")
    refused("--host 0.0.0.0 让其他机器也能提问；请加 --auth ~", web.check_server, "0.0.0.0", 7860, None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(f"127.0.0.1 的端口 {port} 用不了（~）；~", web.check_server, "127.0.0.1", port, None)
    web.check_server("0.0.0.0", port, web.user_and_password("医生:a:b"))
