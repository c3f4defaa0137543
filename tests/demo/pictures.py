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
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import memory_budget  # noqa: E402

import train  # noqa: E402
import train_lora  # noqa: E402
from parts.machine import plan  # noqa: E402
from parts.run import model_card  # noqa: E402
from parts.training import packing  # noqa: E402

HERE = ROOT / "tests" / "demo"
IMAGES = ROOT / "readme_images"
DEMO = Path("output/demo")
CHAT = "python inference.py --chat --model_path full"
QUESTION = "夜里老是睡不好觉，有什么调理的办法？"
WEB_PORT = 5093
CHAT_PAGE = """\
<body style="margin: 0"><pre style="display: inline-block; padding: 16px 20px; border-radius: 8px; background: #0c0c0c;
color: #d9d9d9; font: 16px/1.5 'Noto Sans Mono CJK SC', monospace">{code}</pre></body>"""


def read_numbers(name: str) -> dict:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


# ---- figures ------------------------------------------------------------------------------------------------------


def draw_losses():
    """The demo's losses beside those of the published run, the best evaluation of each marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, titles = read_numbers("curves.json"), {"demo": "the demo", "published": "Qwen3-1.7B, one published run"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items()):
        model_card.plot_losses(axes, curves[name])
        axes.set_title(title)
    return figure


def memory_table() -> dict[str, dict[str, float]]:
    """GB of each part, by the plan's own arithmetic, every layer recomputed: training -> part -> 10^9 bytes. One
    example of `tokens` tokens in a pass; the update inside the backward pass needs a step's four in one."""
    import peft
    import torch
    import transformers

    n = read_numbers("memory.json")
    with torch.device("meta"):  # shapes alone, which take no memory
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**n["shape"])).to(torch.bfloat16)
    step = n["tokens"] * train.RECIPE["per_device_train_batch_size"]
    one, whole = (n["tokens"], step), (step, step)
    table = {"published recipe": memory_parts(model, "adamw", *one)}
    # All logits and their gradients at once, in place of chunks of them.
    table["published recipe"]["full logits"] = (14 * n["shape"]["vocab_size"] * n["tokens"] - packing.LOSS_BYTES) / 1e9
    table["train.py --optimizer kahan"] = memory_parts(model, "kahan", *one)
    table["train.py --optimizer 8bit"] = memory_parts(model, "8bit", *one)
    table["train.py --optimizer 8bit_in_backward"] = memory_parts(model, "8bit_in_backward", *whole)
    table["… --offload_activations"] = memory_parts(model, "8bit_in_backward", *whole, offload=True)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=train_lora.RECIPE["lora_rank"])
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    table["train_lora.py"] = memory_parts(adapted, "kahan", *one)
    table["train_lora.py --load_in_4bit"] = memory_parts(adapted, "kahan", *one)
    table["train_lora.py --load_in_4bit"]["weights"] -= memory_budget.saved_by_4_bits(adapted) / 1e9
    return table


def memory_parts(model, optimizer: str, tokens: int, worst: int, offload: bool = False) -> dict[str, float]:
    """The plan's estimate, with the gradients apart from what else a step takes."""
    args = argparse.Namespace(
        lora_dropout=train_lora.RECIPE["lora_dropout"], full_logits=False, gradient_accumulation_steps=1
    )
    args.world_size, args.fsdp = 1, False
    weights, states, peak, reserve = plan.estimate(model, args, False, tokens, 1, offload, optimizer, worst).values()
    gradients = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    gradients *= not optimizer.endswith("in_backward")
    parts = {"weights": weights, "gradients": gradients, "optimizer states": states}
    parts |= {"activations and loss": peak - gradients + reserve, "full logits": 0}
    return {part: round(size / 1e9, 6) for part, size in parts.items()}


def draw_memory():
    """One bar for each kind of training, its parts side by side."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(10, 3.6), layout="constrained")).subplots()
    table = memory_table()
    names, ends = list(table), dict.fromkeys(table, 0.0)
    for part in table[names[0]]:
        sizes = [table[name][part] for name in names]
        axes.barh(names, sizes, left=list(ends.values()), label=part)
        ends = {name: ends[name] + size for name, size in zip(names, sizes)}
    for name, end in ends.items():
        axes.text(end + 0.2, name, f"{end:.1f}", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="GB", title="Qwen3-1.7B, examples of 2,048 tokens: arithmetic, not a measurement")
    axes.set_xlim(0, max(ends.values()) * 1.08)
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.2), ncols=5, frameon=False)
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
    """The page of the demo's replies, down to the first question, with one thinking open."""
    page = browser.new_page(viewport={"width": 1000, "height": 900}, locale="zh-CN")
    page.goto((DEMO / "replies.scores.html").resolve().as_uri())
    page.locator("#case-1 .reply summary").first.click()
    page.evaluate("scrollTo(0, 0)")  # the bar sticks to the top of what is seen
    case = page.locator("#case-1").bounding_box()
    area = {"x": 0, "y": 0, "width": 1000, "height": case["y"] + case["height"] + 12}
    page.screenshot(path=IMAGES / "compare.png", full_page=True, clip=area)
    make_small(IMAGES / "compare.png")


def make_small(path: Path) -> None:
    """In 64 colours."""
    import PIL.Image

    with PIL.Image.open(path) as picture:
        small = picture.convert("RGB").quantize(64)
    small.save(path, optimize=True)


def photograph_web(browser) -> None:
    """The page when the demo's model has answered, its thinking folded."""
    flags = ["--model_path", "full", "--port", str(WEB_PORT)]
    command = [sys.executable, ROOT / "inference.py", "--web", "--max_new_tokens", "120", *flags]
    server = subprocess.Popen(command, cwd=DEMO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page = browser.new_page(viewport={"width": 1000, "height": 600}, locale="zh-CN")
        open_when_ready(page, f"http://127.0.0.1:{WEB_PORT}")
        page.get_by_role("textbox", name="问题").fill(QUESTION)
        page.get_by_role("textbox", name="问题").press("Enter")
        page.get_by_text("要点是").wait_for()
        page.get_by_test_id("submit-button").wait_for()
        page.wait_for_timeout(500)  # what folds does so slowly
        page.screenshot(path=IMAGES / "web.png")
        page.close()
    finally:
        server.terminate()
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
        save(draw_memory(), "memory.png", memory_table())


if __name__ == "__main__":
    main()
