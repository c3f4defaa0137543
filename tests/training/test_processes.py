"""Several processes, as torchrun and accelerate start them, also on two machines: the curve of one, one
voice, one step at which all stop, and one sentence where they disagree or one is gone."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import ROOT, as_flags, free_port, history, run_script, same, together, weights

import train
from parts import terminal
from parts.run import checkpoints, processes

HERE = "tests/training/test_processes.py"
STEPS = dict(max_steps=36, eval_steps=6, save_steps=6, logging_steps=1, sample_tokens=2, learning_rate=1e-3)
STEPS |= {"report_to": "none"}
TORCHRUN = ("torchrun", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint")
ACCELERATE = ("accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")
ACCELERATE += ("--dynamo_backend=no", "--main_process_port")


def flags(model: Path, output_dir: str, **changes) -> list[str]:
    return as_flags(STEPS | {"model_name": model, "output_dir": output_dir} | changes)


def launch(launcher: tuple, flags: list[str], count: int = 1) -> list[subprocess.Popen]:
    """Start the launcher on `count` machines. Its last word is the address at which they meet."""
    address = f"127.0.0.1:{free_port()}" if count > 1 else str(free_port())
    command = [Path(sysconfig.get_path("scripts"), launcher[0]), *launcher[1:], address, ROOT / "train.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return [subprocess.Popen(command, **pipes) for _ in range(count)]


def newest_step(folder: str) -> int:
    """Of the last whole checkpoint."""
    return max([checkpoints.step_of(path) for path in checkpoints.find_intact(folder)], default=0)


def strike(launched: list[subprocess.Popen], number: int) -> str:
    """What the processes say when the second one gets this signal, once there is a new checkpoint."""
    before = newest_step("resumed")
    while newest_step("resumed") == before and launched[0].poll() is None:
        time.sleep(0.02)
    for launcher in launched:
        for child in psutil.Process(launcher.pid).children():
            if child.environ().get("RANK") == "1":
                child.send_signal(number)
    output = "".join(launcher.communicate(timeout=100)[0] for launcher in launched)
    assert all(launcher.returncode for launcher in launched), output
    return output


def test_two_processes_follow_the_curve_of_one_and_stop_at_the_same_step(workspace, tiny_model):
    """On two machines. There and on one a signal reaches the second one only, or it is killed; the same command
    continues, to the same weights, whoever launches it."""
    one = run_script("train.py", *flags(tiny_model, "one"), cwd=workspace)
    assert one.returncode == 0, one.stdout
    two = flags(tiny_model, "two", per_device_train_batch_size=2, rehearse="true")
    output = "".join(together("train.py", *two, cwds=[workspace] * 2, machines=2))
    assert output.count("训练完成") == 1 and output.count("【问题】") == 3
    assert "每步 4 条样本：2 个进程，各 2 条，累积 1 次。" in output
    logs, others = history("two"), history("one")
    assert len(logs) == len(others) > 12
    for log, expected in zip(logs, others):
        for name in ("loss", "grad_norm", "eval_loss", "eval_token_loss"):
            assert log.get(name, 0) == pytest.approx(expected.get(name, 0), rel=2e-4), name

    two = flags(tiny_model, "resumed", per_device_train_batch_size=2)
    assert strike(launch(TORCHRUN, two, 2), signal.SIGTERM).count("已中断：第") == 1
    stopped = newest_step("resumed")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(f"resumed/checkpoint-{stopped}"))
    output = strike(launch(ACCELERATE, two), signal.SIGKILL)
    assert f"resumed from step {stopped}" in output and "[rank" not in output, output  # no traceback of ours
    assert output.count("错误：另一个进程已经结束或没有响应") == 1, output
    killed = newest_step("resumed")
    assert f"resumed from step {killed}" in "".join(together("train.py", *two, cwds=[workspace] * 2))
    assert same(weights("resumed"), weights("two"))


def test_processes_that_disagree_hear_why(folder):
    own = (["--seed", "1"], ["--seed", "2"])
    [said, silent] = together("train.py", "--report_to", "none", cwds=[folder] * 2, own=own, status=1)
    assert "错误：各个进程的 --seed 不同：进程 0 是 1，进程 1 是 2；" in said and "等 2 个进程在 127.0.0.1:" in said
    assert not silent and not os.listdir()


def hasten(*flags: str) -> None:
    """In a forked process: train.py, which waits for a network's file system a second only."""
    processes.SHOWN_LATE, sys.argv = 1, ["train.py", *flags]
    terminal.run_main(train.main)


@pytest.mark.parametrize(("file", "why"), [("val.jsonl", "val.jsonl (sha256) 不同"), ("none", "看不到进程 0 写在 out")])
def test_machines_with_other_files_or_another_output_folder_are_refused(workspace, tiny_model, file, why):
    folders = [workspace / "one", workspace / "two"]
    for path in folders:
        path.mkdir()
        shutil.copy("train.jsonl", path)
        shutil.copy("val.jsonl", path)
    with open(folders[1] / file, "a", encoding="utf-8") as other:
        other.write("\n")
    two = flags(tiny_model, "out", per_device_train_batch_size=2)
    [said, silent] = together(HERE, *two, cwds=folders, machines=2, call="hasten", status=1)
    assert why in said and said.count("错误：") == 1 and "错误" not in silent
    assert not any(checkpoints.find_intact(path / "out") for path in folders)


@pytest.mark.parametrize("told", [{"WORLD_SIZE": "2", "RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"LOCAL_RANK": "0"}])
def test_a_launcher_that_tells_a_process_too_little_is_refused(folder, told):
    """As a pod of a PyTorchJob does, mpirun, and what a shell has left over."""
    ended = run_script("train.py", cwd=folder, env=os.environ | told)
    name, value = next(iter(told.items()))
    assert ended.returncode == 1 and f"{name}={value}，却没有" in ended.stdout and not os.listdir()


def test_what_says_that_a_process_is_gone():
    gone = torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error")
    memory = torch.distributed.DistBackendError("NCCL error: unhandled cuda error: out of memory")
    reset = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert processes.is_lost(gone) and processes.is_lost(reset)
    assert not processes.is_lost(memory) and not processes.is_lost(RuntimeError("shape mismatch"))
