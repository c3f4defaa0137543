"""Two processes, as torchrun and accelerate start them: the curve of one, one voice, one step at which both stop."""

import os
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, history, run_script, same, weights

from parts import checkpoints

STEPS = {"max_steps": 12, "eval_steps": 4, "logging_steps": 1, "sample_tokens": 2, "learning_rate": 1e-3}
STEPS |= {"report_to": "none", "disable_tqdm": "true"}
TORCHRUN = ("torchrun", "--nproc_per_node=2")
ACCELERATE = ("accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")
ACCELERATE += ("--dynamo_backend=no", "--main_process_port=29532")


def flags(model: Path, **changes) -> list[str]:
    return [
        str(part) for name, value in (STEPS | {"model_name": model} | changes).items() for part in (f"--{name}", value)
    ]


def launch(launcher: tuple, script: str, flags: list[str]) -> subprocess.Popen:
    command = [Path(sysconfig.get_path("scripts"), launcher[0]), *launcher[1:], ROOT / script, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def curve(folder: str) -> list[tuple[float, float]]:
    logs = history(folder)
    pairs = [(log["loss"], log["grad_norm"]) for log in logs if "loss" in log]
    return pairs + [(log["eval_loss"], log["eval_token_loss"]) for log in logs if "eval_loss" in log]


def follow_one(workspace, script: str, one: list[str], launcher: tuple, two: list[str]) -> None:
    """One process with these flags, and two with those, have the same curve, and one voice."""
    result = run_script(script, *one, "--output_dir", "one", cwd=workspace)
    assert result.returncode == 0, result.stdout
    output = (process := launch(launcher, script, [*two, "--output_dir", "two"])).communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert output.count("训练完成") == 1 and output.count("【问题】") == 3
    assert "样例" in result.stdout and "样例" in output  # what the first process alone asks, while the second one waits
    found, expected = curve("two"), curve("one")
    assert len(found) == len(expected) > 2
    for pair, other in zip(found, expected):
        assert pair == pytest.approx(other, rel=2e-4)


def test_two_processes_follow_the_curve_of_one_and_stop_at_the_same_step(workspace, tiny_model):
    """The signal reaches the second one only; the same command then continues to the same weights."""
    two = flags(tiny_model, per_device_train_batch_size=2)
    follow_one(workspace, "train.py", flags(tiny_model), (*TORCHRUN, "--master_port=29541"), two)
    process = launch((*TORCHRUN, "--master_port=29542"), "train.py", [*two, "--output_dir", "resumed"])
    while not checkpoints.find_whole("resumed") and process.poll() is None:
        time.sleep(0.02)
    workers = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    [second] = [worker for worker in workers if worker.environ()["RANK"] == "1"]
    second.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert process.returncode != 0 and output.count("已中断：第") == 1, output
    stopped = checkpoints.step_of(checkpoints.find_whole("resumed")[-1])
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(f"resumed/checkpoint-{stopped}"))
    process = launch((*TORCHRUN, "--master_port=29543"), "train.py", [*two, "--output_dir", "resumed"])
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and f"resumed from step {stopped}" in output.splitlines(), output
    assert same(weights("resumed"), weights("two"))


def test_accelerate_launches_lora_too(workspace, tiny_model):
    steps = {"max_steps": 2, "eval_steps": 1, "lora_dropout": 0}  # each process drops other elements
    two = flags(tiny_model, per_device_train_batch_size=2, **steps)
    follow_one(workspace, "train_lora.py", flags(tiny_model, **steps), ACCELERATE, two)
