"""Make the pictures of the READMEs, in readme_images/.

    python tests/demo/pictures.py                # losses.png and memory.png, from curves.json and memory.json
    python tests/demo/demo.py && python tests/demo/pictures.py --screens    # the others, of that demo

The screens need pexpect, gradio, playwright and a Chromium (its path, where playwright has none: --chromium PATH).
"""

import argparse
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from parts.run import model_card  # noqa: E402

HERE = ROOT / "tests" / "demo"
IMAGES = ROOT / "readme_images"
DEMO = Path("output/demo")
CHAT = "python inference.py --chat --model_path full"
QUESTION = "夜里老是睡不好觉，有什么调理的办法？"
WEB_PORT = 5093
KEEP_LITTLE = """question => {
  const remove = (names, unless) => document.querySelectorAll(names).forEach(part => unless(part) || part.remove());
  remove('nav, header, #list, #scores, #cases > :not(.case)', () => false);
  remove('.case', part => part.textContent.includes(question));
  document.querySelectorAll('.reply details').forEach(part => part.open = true);
}"""
CHAT_PAGE = """\
<body style="margin: 0"><pre style="display: inline-block; padding: 16px 20px; border-radius: 8px; background: #0c0c0c;
color: #d9d9d9; font: 16px/1.5 'Noto Sans Mono CJK SC', monospace">{code}</pre></body>"""


def read_numbers(name: str) -> dict:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


# ---- figures ------------------------------------------------------------------------------------------------------


def begin_figure(height: float):
    """(figure, axes) with a font that has Chinese."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["font.sans-serif"] = ["Noto Sans CJK SC", "Noto Sans CJK JP", "DejaVu Sans"]
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots()


def draw_losses():
    """The losses of the published run, its best evaluation marked."""
    figure, axes = begin_figure(3.8)
    published = read_numbers("curves.json")["published"]
    model_card.plot_losses(axes, published)
    best = min((log["eval_loss"], log["step"]) for log in published if "eval_loss" in log)
    names = ["训练损失", "验证损失", "验证损失最低：{:.3f}，第 {} 步".format(*best)]
    axes.legend(axes.get_legend_handles_labels()[0], names)
    axes.set(xlabel="步", ylabel="损失", title="公开方案的一次运行（Qwen3-1.7B，全参数）")
    return figure


def draw_memory():
    """A bar for each card: what is planned of its memory; and, across them, what the published recipe says of its."""
    figure, axes = begin_figure(4.6)
    numbers = read_numbers("memory.json")
    names, sizes = [], []
    for card in numbers["cards"]:
        names.append(f"{card['card']} GB 的卡：{card['training']}")
        sizes.append(card["planned"])
    axes.barh(names, [card["card"] for card in numbers["cards"]], color="#e4e4df", label="这张卡的显存")
    planned = axes.barh(names, sizes, color="#3b7dbd", label="计划用的显存")
    axes.bar_label(planned, fmt="%.1f", label_type="center", color="white")
    for (name, size), color in zip(numbers["published"].items(), ("#b3261e", "#c26a1b")):
        axes.axvline(size, color=color, linestyle="--", label=f"公开方案：{name} {size} GB")
    axes.invert_yaxis()
    axes.set(xlabel="GB", title="Qwen3-1.7B，最长 2,048 个 token：按公式估算，不是实测")
    axes.legend(loc="upper right", framealpha=1)
    return figure


def digest(numbers: dict) -> str:
    """By which a test sees that a committed picture was drawn from the committed numbers."""
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def save(figure, name: str, numbers: dict) -> None:
    """On a white card, so that it can be read on any background."""
    IMAGES.mkdir(exist_ok=True)
    metadata = {"Software": None, "Source": digest(numbers)}
    figure.savefig(IMAGES / name, dpi=120, facecolor="white", metadata=metadata)


# ---- screens ------------------------------------------------------------------------------------------------------


def hold_chat() -> str:
    """What a terminal of 80 columns shows of a conversation with the demo's model, colours included."""
    import pexpect

    command = [str(ROOT / "inference.py"), *CHAT.split()[2:]]
    env = os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    chat = pexpect.spawn(
        sys.executable, command, cwd=str(DEMO), env=env, encoding="utf-8", dimensions=(50, 80), timeout=120
    )
    seen = ""
    for question in (QUESTION, ""):
        chat.expect_exact("问：")
        seen += chat.before + chat.after
        time.sleep(0.5)
        chat.sendline(question)
    chat.expect(pexpect.EOF)
    seen += chat.before
    seen = re.sub(r"\x1b\[\?\d+[hl]", "", seen).replace("\r", "")
    return f"$ {CHAT}\n{seen[seen.index('提醒：') :].rstrip()}\n"


def chat_page() -> str:
    """The conversation as the page of a dark terminal window."""
    from rich.console import Console
    from rich.terminal_theme import MONOKAI
    from rich.text import Text

    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(hold_chat()))
    return console.export_html(theme=MONOKAI, inline_styles=True, code_format=CHAT_PAGE)


def open_when_ready(page, address: str, seconds: int = 60) -> None:
    """Open a page whose server may still be starting."""
    for _ in range(seconds):
        try:
            return page.goto(address)
        except Exception:  # not listening yet
            time.sleep(1)
    raise SystemExit(f"错误：{address} 在 {seconds} 秒内没有打开")


def photograph(chromium: str | None) -> None:
    """The conversation at the terminal, the page of replies side by side, and the page in the browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, locale="zh-CN")
        page.set_content(chat_page())
        page.locator("pre").screenshot(path=IMAGES / "chat.png", omit_background=True)
        photograph_comparison(browser)
        photograph_web(browser)
        browser.close()


def photograph_comparison(browser) -> None:
    """Of the page of replies the summary, and one question with those of full training and of LoRA.
    An untrained model writes halves of characters, which no picture should show."""
    asked = ["--questions", "val.jsonl", "--max_new_tokens", "160", "--replies", "pair.jsonl"]
    for command in (
        ["inference_lora.py", "--model_path", "lora", "--merge_to", "merged"],
        ["inference.py", "--model_path", "full", "--compare_with", "merged", *asked],
    ):
        subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=DEMO, check=True)
    page = browser.new_page(viewport={"width": 1000, "height": 900}, locale="zh-CN")
    page.goto((DEMO / "pair.scores.html").resolve().as_uri())
    page.evaluate(KEEP_LITTLE, QUESTION)
    page.locator("body").screenshot(path=IMAGES / "compare.png")
    make_small(IMAGES / "compare.png")


def make_small(path: Path) -> None:
    """In 64 colours."""
    import PIL.Image

    with PIL.Image.open(path) as picture:
        small = picture.convert("RGB").quantize(64)
    small.save(path, optimize=True)


def photograph_web(browser) -> None:
    """The page while the demo's model writes its thinking."""
    flags = ["--model_path", "full", "--port", str(WEB_PORT)]
    command = [sys.executable, ROOT / "inference.py", "--web", "--max_new_tokens", "160", *flags]
    server = subprocess.Popen(command, cwd=DEMO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page = browser.new_page(viewport={"width": 1000, "height": 600}, locale="zh-CN")
        open_when_ready(page, f"http://127.0.0.1:{WEB_PORT}")
        page.get_by_role("textbox", name="问题").fill(QUESTION)
        page.get_by_role("textbox", name="问题").press("Enter")
        while not page.get_by_text("咖啡因").is_visible():  # step by step: it writes faster than a picture is taken
            server.send_signal(signal.SIGCONT)
            time.sleep(0.05)
            server.send_signal(signal.SIGSTOP)
            page.wait_for_timeout(200)
        page.screenshot(path=IMAGES / "web.png")
        page.close()
    finally:
        server.kill()
        server.wait()
    make_small(IMAGES / "web.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", action="store_true", help="the screens instead of the two figures")
    parser.add_argument("--chromium", help="path of a Chromium or Chrome")
    args = parser.parse_args()
    if args.screens:
        if not (DEMO / "full" / "config.json").is_file():
            raise SystemExit("错误：找不到 output/demo；请先运行 python tests/demo/demo.py")
        photograph(args.chromium)
    else:
        save(draw_losses(), "losses.png", read_numbers("curves.json"))
        save(draw_memory(), "memory.png", read_numbers("memory.json"))


if __name__ == "__main__":
    main()
