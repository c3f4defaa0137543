"""See the whole path run on a CPU, without a network, in one to two minutes.

    python tests/demo/demo.py

A tiny Qwen3 with random weights learns 30 short medical topics: with the real scripts, called as a person would call
them, in output/demo. Each topic has four wordings of its question; twelve of them, each of another topic, are not
trained on but asked. It shows that the path works. It is no medical model.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from parts.replies import scores  # noqa: E402

WORK = Path("output/demo")
SAMPLES = ROOT / "tests" / "demo" / "medical.jsonl"
QUESTION = "糖尿病患者应该怎样选择碳水化合物？"  # not trained on
LEAST = 10  # right answers to the twelve questions that were not trained on
# From random weights a model learns by heart in few steps only with a warm-up and a short memory of gradients.
TRAINING = [
    *("--learning_rate", "3e-3", "--warmup_steps", "30", "--adam_beta2", "0.95", "--checkpoint_every", "0"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    *("--sample_tokens", "160"),
]


def run(script: str, *flags: str) -> str:
    """Run a script in WORK, show its command and output, and return the output. Ends the demo when it fails."""
    path = ROOT / script
    print(f"\n$ python {script} {' '.join(flags)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, path, *flags],
        cwd=WORK,
        # Small tensors: a second thread costs more than it brings.
        env=os.environ | {"SWANLAB_MODE": "local", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(f"演示失败：python {script} 的退出码是 {process.returncode}")
    return "".join(lines)


def check_losses(folder: str, most: float) -> str:
    """The first and the last training loss of a run; the demo fails when their ratio is above `most`."""
    history = json.loads((WORK / folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if not losses[-1] < most * losses[0]:
        raise SystemExit(f"演示失败：{folder} 的训练损失没有降下来：{losses[0]:.3f} -> {losses[-1]:.3f}")
    return f"{losses[0]:.3f} -> {losses[-1]:.3f}"


def read(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_right(question: str, answer: str) -> bool:
    """Whether of all topics' answers that to this question is the nearest, by ROUGE."""
    references = {row["question"]: row["answer"] for row in read(SAMPLES)}
    return references[question] == max(references.values(), key=lambda reference: sum(scores.rouge(answer, reference)))


def check_reply(output: str) -> None:
    """The reply to QUESTION must have thinking, then an answer, and be right."""
    reply = re.search(r"【思考】\n\S.*【回答】\n(\S.*)", output, re.DOTALL)
    if not reply or not is_right(QUESTION, reply[1]):
        raise SystemExit("演示失败：回复里没有思考，没有回答，或答非所问。")


def count_right() -> str:
    """How many questions were answered rightly, of how many; the demo fails when they are fewer than LEAST."""
    replies = read(WORK / "replies.jsonl")
    right = sum(is_right(reply["question"], reply["answer"]) for reply in replies)
    if right < LEAST:
        raise SystemExit(f"演示失败：没有训练过的 {len(replies)} 种问法只答对 {right} 种。")
    return f"{len(replies)} 种问法，答对 {right} 种"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run("tests/demo/tiny_model.py", "base")
    run("data.py", "--dataset", os.path.relpath(SAMPLES, WORK))
    steps = ["--max_steps", "300", "--eval_steps", "60"]
    run("train.py", "--model_name", "base", "--output_dir", "full", *steps, *TRAINING)
    full = check_losses("full", most=0.5)
    check_reply(run("inference.py", "--model_path", "full", QUESTION))
    steps = ["--max_steps", "60", "--eval_steps", "60"]
    run("train_lora.py", "--model_name", "full", "--output_dir", "lora", *steps, *TRAINING)
    lora = check_losses("lora", most=5)  # small from the start: it must not grow
    check_reply(run("inference_lora.py", "--model_path", "lora", QUESTION))
    asked = ["--questions", "val.jsonl", "--max_new_tokens", "160", "--compare_with", "base"]
    run("inference.py", "--model_path", "full", *asked)
    print(
        f"\n演示完成，用时 {time.monotonic() - started:.0f} 秒。损失：全参数 {full}，LoRA {lora}。\n"
        f"没有训练过的 {count_right()}。\n"
        f"文件在 {WORK}；看训练曲线：swanlab watch {WORK / 'swanlog'}\n"
        f"训练前后的回复并排看：用浏览器打开 {WORK / 'replies.scores.html'}\n"
        "这个小模型只学了 30 个话题，问别的会答非所问；它不能用来看病。\n"
        "真正的训练：python data.py，然后 python train.py"
    )


if __name__ == "__main__":
    main()
