"""See the whole path run on a CPU, without a network, in one to two minutes.

    python tests/demo/demo.py

A tiny Qwen3 with random weights learns 60 short medical questions, each in two wordings, by heart: with the real
scripts, called as a person would call them, in output/demo. It shows that the path works. It is no medical model.
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
WORK = Path("output/demo")
SAMPLES = ROOT / "tests" / "demo" / "medical.jsonl"
QUESTION = "糖尿病患者应该怎样选择碳水化合物？"
# From random weights a model learns by heart in few steps only with a warm-up and a short memory of gradients.
TRAINING = [
    *("--learning_rate", "5e-3", "--warmup_steps", "30", "--adam_beta2", "0.95", "--checkpoint_every", "0"),
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
        env=os.environ | {"SWANLAB_MODE": "local", "PYTHONUTF8": "1"},
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


def check_reply(output: str) -> None:
    """The reply must have thinking, then an answer, neither of them empty."""
    if not re.search(r"【思考】\n\S.*【回答】\n\S", output, re.DOTALL):
        raise SystemExit("演示失败：回复里没有思考，或没有回答。")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run("tests/demo/tiny_model.py", "base")
    run("data.py", "--dataset", os.path.relpath(SAMPLES, WORK))
    steps = ["--max_steps", "360", "--eval_steps", "60"]
    run("train.py", "--model_name", "base", "--output_dir", "full", *steps, *TRAINING)
    full = check_losses("full", most=0.5)
    check_reply(run("inference.py", "--model_path", "full", QUESTION))
    steps = ["--max_steps", "120", "--eval_steps", "60"]
    run("train_lora.py", "--model_name", "full", "--output_dir", "lora", *steps, *TRAINING)
    lora = check_losses("lora", most=1)
    check_reply(run("inference_lora.py", "--model_path", "lora", QUESTION))
    asked = ["--questions", "val.jsonl", "--max_new_tokens", "160", "--compare_with", "base"]
    run("inference.py", "--model_path", "full", *asked)
    print(
        f"\n演示完成，用时 {time.monotonic() - started:.0f} 秒。损失：全参数 {full}，LoRA {lora}。\n"
        f"文件在 {WORK}；看训练曲线：swanlab watch {WORK / 'swanlog'}\n"
        f"训练前后的回复并排看：用浏览器打开 {WORK / 'replies.scores.html'}\n"
        "这个小模型只是背下了训练样例，没训练过的验证问题大多答错，这是正常的；它不能用来看病。\n"
        "真正的训练：python data.py，然后 python train.py"
    )


if __name__ == "__main__":
    main()
