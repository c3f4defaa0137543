"""The page, served by gradio and used in a real browser; the model recites."""

import shutil
import signal
import sys
import time

import pytest
import requests
import torch
from helpers import Started, free_port, recite, refused

import data
import inference
from parts import dialogue, models, web
from parts.address import Address
from parts.conversation import Conversation
from parts.encoding import Reply, encode_messages

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
THINKING, ANSWER = "要点是多休息、多喝水。", "多休息，**多喝水**。"
REPLY = f"<think>\n{THINKING}\n</think>\n\n{ANSWER}"
LONG = "<think>\n" + "想一想。" * 500
TEXTS = {"title": "问答", "notice": inference.NOT_A_DOCTOR, "example": "头痛？"}


@pytest.fixture
def conversation(tiny_model, tokenizer):
    model = models.load_weights(str(tiny_model), torch.device("cpu"))
    return Conversation(model, tokenizer, True, max_new_tokens=2048, seed=42)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="gradio is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium or Chrome here")
    with playwright.sync_playwright() as running:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        started = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


class Visitor:
    """A person before the page."""

    def __init__(self, browser, url: str, width: int = 1280):
        self.page = browser.new_page(viewport={"width": width, "height": 800}, locale="zh-CN")
        self.page.set_default_timeout(20_000)
        self.requests = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.box = self.page.get_by_role("textbox", name="问题")
        self.box.wait_for()

    def ask(self, question: str) -> None:
        self.page.get_by_test_id("submit-button").wait_for()
        self.box.fill(question)
        self.box.press("Enter")

    def sees(self, text: str, nth: int = -1) -> None:
        found = self.page.get_by_text(text)
        (found.nth(nth) if nth >= 0 else found.last).wait_for()


def hold(conversation, out_of_memory: str = "", *names: str) -> dialogue.Dialogue:
    """With so many models, all of them the same one."""
    asked = [dialogue.Model(name, conversation, data.to_messages) for name in names or ("甲",)]
    return dialogue.Dialogue(asked, out_of_memory)


@pytest.fixture
def visit(browser, conversation, tokenizer):
    """visit(replies, pause, **more): a Visitor of a page whose model recites; its prompts are in `.prompts`."""
    opened = []

    def start(*replies: str, pause: float = 0.0, names=("甲",), **more) -> Visitor:
        prompts = recite(conversation.model, tokenizer, [*replies], pause)
        page = web.Page(hold(conversation, inference.OUT_OF_MEMORY, *names))
        interface, url = page.open(Address("127.0.0.1", free_port(), None), **TEXTS)
        visitor = Visitor(browser, url, **more)
        opened.append((visitor, page, interface))
        visitor.prompts, visitor.url = prompts, url
        return visitor

    yield start
    for visitor, page, interface in opened:
        visitor.page.close()
        page.dialogue.closed.set()
        interface.close(verbose=False)


def prompt(tokenizer, question: str, history=(), thinking: bool = True) -> list[int]:
    return encode_messages(tokenizer, data.to_messages(question, history=history), True, thinking)


def test_thinking_is_seen_then_folded_and_not_read_back(visit, tokenizer):
    person = visit(REPLY, pause=0.05)
    thinking = person.page.get_by_text(THINKING)
    person.ask("感冒了怎么办？")
    thinking.wait_for()
    person.sees("多喝水", 0)
    thinking.wait_for(state="hidden")
    assert person.page.get_by_text("思考", exact=True).count() == 1
    assert person.page.locator("strong", has_text="多喝水").count() == 1
    person.page.get_by_text("思考", exact=True).click()
    thinking.wait_for()
    person.ask("还有呢？")
    person.page.wait_for_function("document.querySelectorAll('strong').length == 2")
    history = [["感冒了怎么办？", ANSWER]]
    assert person.prompts == [prompt(tokenizer, "感冒了怎么办？"), prompt(tokenizer, "还有呢？", history)]
    person.page.get_by_text(inference.NOT_A_DOCTOR).wait_for()


def test_a_reply_is_stopped_and_the_next_question_answered(visit, tokenizer):
    person = visit(LONG, REPLY, pause=0.05)
    person.ask("感冒了怎么办？")
    person.sees("想一想。")
    person.page.get_by_test_id("stop-button").click()
    person.ask("还有呢？")
    person.sees("多喝水")
    assert person.prompts == [prompt(tokenizer, "感冒了怎么办？"), prompt(tokenizer, "还有呢？")]


def test_retry_and_edit_ask_again(visit, tokenizer):
    person = visit(REPLY, "再答", "改答")
    person.ask("感冒了怎么办？")
    person.sees("多喝水")
    person.page.get_by_test_id("submit-button").wait_for()
    person.page.get_by_label("重试").click()
    person.sees("再答")
    person.page.get_by_test_id("submit-button").wait_for()
    person.page.get_by_label("编辑").click()
    field = person.page.locator(".user textarea")
    field.fill("头痛怎么办？")
    person.page.get_by_label("发送").click()
    person.sees("改答")
    asked = ["感冒了怎么办？", "感冒了怎么办？", "头痛怎么办？"]
    assert person.prompts == [prompt(tokenizer, question) for question in asked]


def test_what_a_person_sets_is_what_happens(visit, tokenizer):
    person = visit(ANSWER)
    person.page.get_by_text("设置", exact=True).click()
    person.page.get_by_label("先思考再回答").uncheck()
    seed, most = (
        person.page.get_by_role(role, name=name)
        for role, name in (("textbox", "随机种子"), ("spinbutton", "最多生成的 token 数"))
    )
    assert seed.input_value() == ""
    seed.fill("-1")
    seed.blur()
    person.ask("头痛？")
    person.sees("“设置”里的随机种子：要一个 0 到 4294967295 的整数，不是 '-1'")
    person.page.get_by_test_id("submit-button").wait_for()
    seed.fill("7")
    most.fill("2")
    most.blur()
    person.ask("头痛？")
    person.sees("到 2 个 token 为止，回复未完；可在“设置”里加大。")
    assert person.prompts == [prompt(tokenizer, "头痛？", thinking=False)]


def test_a_text_that_is_too_long_is_refused_and_the_next_is_answered(visit, tokenizer):
    person = visit(REPLY)
    person.ask("头" * 200_000)
    person.sees("错误：这个问题连同之前的对话有 ")
    person.ask("  ")
    person.sees("问题是空的")
    person.ask("头痛？")
    person.sees("多喝水")
    assert person.prompts == [prompt(tokenizer, "头痛？")]


def test_nothing_is_fetched_from_elsewhere_and_tags_are_text(visit):
    hostile = '![x](http://127.0.0.2:9/x.png) <img src="http://127.0.0.2:9/y.png" onerror="document.title=1"> </think>'
    person = visit("<think>\n想</think>" + hostile)
    blocked = []
    person.page.on("requestfailed", lambda request: blocked.extend([request.url] * (request.failure == "csp")))
    person.ask("头痛？" + hostile)
    person.sees("思考")
    person.page.wait_for_timeout(500)
    elsewhere = [url for url in person.requests if not url.startswith((person.url, "data:", "blob:"))]
    assert sorted(elsewhere) == sorted(blocked)
    assert person.page.title() == TEXTS["title"]


def test_two_tabs_wait_for_each_other(visit, browser):
    person = visit(REPLY, pause=0.03)
    other = Visitor(browser, person.url)
    person.ask("头痛？")
    other.ask("腹痛？")
    person.sees("多喝水", 0)
    other.sees("多喝水", 0)
    assert len(person.prompts) == 2
    other.page.close()


def test_who_leaves_stops_the_reply(visit, browser):
    person = visit(LONG, REPLY, pause=0.05)
    leaving = Visitor(browser, person.url)
    leaving.ask("头痛？")
    leaving.sees("想一想。")
    leaving.page.close()
    person.ask("腹痛？")
    person.sees("多喝水")


def test_two_models_answer_side_by_side_each_from_its_own_history(visit, tokenizer):
    person = visit(
        "<think>\n想甲</think>答甲", LONG, "再甲", "再乙", "改甲", "改乙", pause=0.05, names=("一号", "二号")
    )
    person.ask("头痛？")
    person.sees("等 一号 答完。")
    person.sees("答甲")
    person.sees("想一想。")
    boxes = [person.page.get_by_text(name, exact=True).bounding_box() for name in ("一号", "二号")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    person.page.get_by_test_id("stop-button").click()
    person.ask("腹痛？")
    person.sees("再乙")
    assert person.page.get_by_text("等 一号 答完。").count() == 0
    person.page.get_by_test_id("submit-button").wait_for()
    person.page.get_by_label("编辑").first.click()
    person.page.locator(".user textarea").fill("牙痛？")
    person.page.get_by_label("发送").click()
    person.sees("改乙")
    assert person.page.get_by_text("再乙").count() == person.page.get_by_text("腹痛？").count() == 0
    first, later = prompt(tokenizer, "头痛？"), prompt(tokenizer, "腹痛？")
    of_one = prompt(tokenizer, "腹痛？", [["头痛？", "答甲"]])
    assert person.prompts == [first, first, of_one, later, *[prompt(tokenizer, "牙痛？")] * 2]


def test_going_back_goes_back_on_both_sides(visit):
    person = visit("答甲", "答乙", "再甲", "再乙", names=("一号", "二号"))
    for question, answer in (("头痛？", "答乙"), ("腹痛？", "再乙")):
        person.ask(question)
        person.sees(answer)
    person.page.get_by_test_id("submit-button").wait_for()
    person.page.get_by_label("撤销").first.click()
    person.page.get_by_text("再乙").wait_for(state="detached")
    person.sees("答乙")
    person.page.get_by_label("清空对话").first.click()
    person.page.get_by_text("答乙").wait_for(state="detached")


def test_several_models_stand_below_each_other_on_a_phone(visit):
    person = visit("答甲", "答乙", names=("一号", "二号"), width=390)
    person.ask("头痛？")
    person.sees("答乙")
    assert person.page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [person.page.get_by_text(name, exact=True).bounding_box() for name in ("一号", "二号")]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]


def test_it_fits_a_phone(visit):
    person = visit(REPLY, width=390)
    person.ask("感冒了怎么办？" * 10)
    person.sees("多喝水")
    assert person.page.evaluate("document.documentElement.scrollWidth") <= 390
    for place in (
        person.box,
        person.page.get_by_text(inference.NOT_A_DOCTOR),
        person.page.get_by_text("设置", exact=True),
    ):
        box = place.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] >= 0 and box["y"] + box["height"] <= 800


def test_the_page_of_a_script_asks_for_a_password_and_ends_with_ctrl_c(tiny_model, folder):
    pytest.importorskip("gradio", reason="gradio is not installed")
    shutil.copytree(tiny_model, "other")
    port = free_port()
    flags = ("--web", "--host", "0.0.0.0", "--port", port, "--auth", "a:b", "--model_path", tiny_model)
    started, end = Started("inference.py", (*flags, "--compare_with", "other"), folder), time.monotonic() + 60
    while "网页：" not in started.stdout:
        assert started.poll() is None and time.monotonic() < end, started.stdout
        time.sleep(0.1)
    visitor, page = requests.Session(), f"http://127.0.0.1:{port}"
    assert visitor.get(f"{page}/config", timeout=10).status_code == 401
    visitor.post(f"{page}/login", data={"username": "a", "password": "b"}, timeout=10).raise_for_status()
    parts = visitor.get(f"{page}/config", timeout=10).json()["components"]
    assert [part["props"]["label"] for part in parts if part["type"] == "chatbot"] == [str(tiny_model), "other"]
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 0, started.stdout
    assert started.stdout.splitlines()[-1] == "已停止。" and "Traceback" not in started.stdout
    assert [path.name for path in folder.iterdir()] == ["other"]


@pytest.mark.parametrize(("version", "found"), [("5.50.0", "，不是 5.50.0"), ("7.0", "，不是 7.0")])
def test_another_gradio_is_refused(version, found, tmp_path, monkeypatch):
    (tmp_path / f"gradio-{version}.dist-info").mkdir()
    metadata = tmp_path / f"gradio-{version}.dist-info/METADATA"
    metadata.write_text(f"Metadata-Version: 2.1\nName: gradio\nVersion: {version}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    wanted = f"--web 要用 gradio {web.GRADIO}{found}；请先运行 pip install gradio=={web.GRADIO}"
    refused(wanted, web.require_gradio)


def test_without_gradio_the_page_is_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # where packages are looked for
    monkeypatch.setattr(sys, "argv", ["inference.py", "--web", "--model_path", "no-such-model"])
    refused(f"--web 要用 gradio {web.GRADIO}；请先运行 pip install gradio=={web.GRADIO}", inference.main)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--web", "头痛？"], "argument question: not allowed with argument --web"),
        (["--web", "--chat"], "argument --chat: not allowed with argument --web"),
        (["--web", "--replies", "r.jsonl"], "--replies 只和 --questions 一起起作用"),
        (["--port", "7861"], "--port 只和 --web 一起起作用"),
        (["--chat", "--auth", "a:b"], "--auth 只和 --web 一起起作用"),
        (["--host", "0.0.0.0"], "--host 只和 --web 一起起作用"),
        (["--compare_with", "x"], "--compare_with 只和 --questions 或 --web 一起起作用"),
        (["--web", "--compare_with", "r.jsonl"], "--web 的页面上只能并排几个模型，不能是回复文件"),
        (["--web", "--compare_with", "x", "--judge", "http://127.0.0.1:1/v1"], "--judge 只和 --questions 一起起作用"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference.py", *flags])
    with pytest.raises(SystemExit):
        inference.main()
    assert capsys.readouterr().err.strip().endswith(message)


def test_history_has_the_answers_alone():
    thought, hint = ({"role": "assistant", "content": "想", "metadata": {"title": title}} for title in ("思考", "提示"))
    said = {"role": "assistant", "content": [{"type": "text", "text": "答"}], "metadata": None}
    asked = [{"role": "user", "content": [{"type": "text", "text": text}]} for text in "甲乙丙丁"]
    messages = [asked[0], thought, said, hint, asked[1], thought, asked[2], asked[3], hint, said]
    assert dialogue.read_history(messages) == [["甲", "答"], ["丁", "答"]]


def test_models_side_by_side_have_the_same_questions():
    """Also where a person went back, or stopped before another model heard of the question."""
    asked = [{"role": "user", "content": text} for text in "甲乙丙"]
    said = [{"role": "assistant", "content": text, "metadata": None} for text in "一二三"]
    waited = dialogue.hint("等 一号 答完。", dialogue.WAITING)
    first = [asked[0], said[0], asked[1]]
    assert dialogue.keep_up(first, [asked[0], said[1]]) == [asked[0], said[1], asked[1]]
    assert dialogue.keep_up(first, [asked[0], said[1], asked[1], waited]) == [asked[0], said[1], asked[1]]
    assert dialogue.keep_up(first[:2], [asked[0], said[1], asked[1], said[2]]) == [asked[0], said[1]]
    assert dialogue.keep_up([], [asked[0], said[1]]) == []


def test_half_a_character_is_not_shown():
    shown = [
        dialogue.show_reply(Reply("想", "答\ufffd", False, "one"), whole)[-1]["content"] for whole in (False, True)
    ]
    assert shown == ["答", "答\ufffd"]
    assert [part["metadata"] for part in dialogue.show_reply(Reply("想", "", False, "unclosed"), False)] == [
        {"title": "思考"}
    ]


def test_memory_that_does_not_suffice_is_said(conversation):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    conversation.model.register_forward_hook(fail)
    assert list(hold(conversation, "错误：显存不足。").answer("头痛？", [], True, 9, "", "")) == [
        [dialogue.hint("错误：显存不足。")]
    ]


def test_a_temperature_that_is_set_is_sampled_with(conversation):
    """Nearly greedy, the likeliest token comes more often. Empty is what the model's settings say."""
    first = {}
    conversation.model.generation_config.temperature = 0.6
    for temperature in ("0.1", "0.6", "2", " "):
        shown = [[*hold(conversation).answer("头痛？", [], True, 1, temperature, str(seed))][-1] for seed in range(12)]
        first[temperature] = [repr(messages) for messages in shown]
    assert first[" "] == first["0.6"] != first["2"]
    assert len({*first["0.1"]}) < len({*first["2"]})
    for text in ("0", "-1", "9", "nan", "热"):
        [[said]] = hold(conversation).answer("头痛？", [], True, 1, text, "")
        assert said["content"] == f"“设置”里的温度：要一个 0.1 到 2 的数，不是 {text!r}"


def test_megabytes_are_refused_before_they_are_cut_into_tokens(conversation):
    started = time.perf_counter()
    most = conversation.model.config.max_position_embeddings
    refused(
        f"这个问题连同之前的对话有 ~ 个字，模型最多读 {most} 个 token；请缩短。",
        conversation.check_lengths,
        [data.to_messages("头痛" * 2_000_000)],
        ["这个问题"],
    )
    assert time.perf_counter() - started < 1


def test_what_may_reach_beyond_the_context_is_said_on_the_page(conversation, tokenizer):
    recite(conversation.model, tokenizer, ["答"])
    conversation.model.config.max_position_embeddings = 2000
    [*_, last] = hold(conversation).answer("头痛？", [], True, 1990, "", "")
    assert last[0]["content"] == "答" and "超过模型的上下文 2000 个 token" in last[1]["content"]
