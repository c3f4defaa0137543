"""kill -9 at any moment, again and again: it ends with the weights of a run that nothing touched."""

import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import as_flags, run_script, same, weights

import train
import train_lora
from parts import terminal
from parts.run import checkpoints

KILLS = int(os.environ.get("KILLS", "8"))  # each of full and LoRA
WRITING = ("w", "wb", "rb+")
ROWS = 60  # 15 steps an epoch: the second one begins behind the third of six checkpoints
RUN = {"max_steps": 24, "eval_steps": 4, "logging_steps": 4, "sample_tokens": 2, "learning_rate": 0.3}
# The rate grows until the loss rises: weights alone are written beside the last checkpoints.
RUN |= {"save_steps": 8, "warmup_steps": 24, "report_to": "none", "model_name": "base", "early_stopping_patience": 0}


def kill_while_saving(number: int, delay: float) -> None:
    """Kill this process `delay` seconds after its `number`-th creation, opening, renaming or removal of a file from the
    first checkpoint on. What torch and safetensors write, they write out of Python's sight: hence the delay."""
    count = 0

    def hook(event, args):
        nonlocal count
        change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or event == "open" and args[1] in WRITING
        if change and (count or "checkpoint-" in str(args[0])):
            count += 1
            if count == number:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
                time.sleep(0 if delay else 1)

    sys.addaudithook(hook)


def start(script: str, folder: str, *kill) -> int:
    """Fork a run of the script into this folder, which is killed while it saves where `kill` says so. Returns the
    process's id; what it prints is added to log.txt."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = [f"{script}.py", *as_flags(RUN), "--output_dir", folder]
        if kill:
            kill_while_saving(*kill)
        terminal.run_main({"train": train, "train_lora": train_lora}[script].main)
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve_kills(script: str, seed: str) -> None:
    """In a process that has imported all and forks for each run: one run that nothing touches, then KILLS killed ones
    or more, of which every second dies while it saves and two at least in a half-written checkpoint, until a run comes
    through. Prints what it saw."""
    draw = random.Random(int(seed))
    begun = time.monotonic()
    assert os.waitpid(start(script, "straight"), 0)[1] == 0
    took = time.monotonic() - begun
    kills, saving, finished = 0, 0, 0
    while kills < KILLS or saving < 2 or finished < 1:
        folder, begun = f"killed-{finished}", time.monotonic()
        fresh = not Path(folder).exists()
        aimed = kills % 2 or kills >= KILLS
        if kills >= KILLS and saving >= 2:
            pid = start(script, folder)
        elif aimed:
            pid = start(script, folder, draw.randrange(1, 40), draw.choice([0, draw.uniform(0, 0.03)]))
        else:
            pid = start(script, folder)
            time.sleep(draw.uniform(0.2, 0.7) * took)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            intact = checkpoints.find_intact(folder)
            saving += len(intact) < len(checkpoints.folders(folder))
            print(kills, "saving" if aimed else "time", *(path.name for path in intact), flush=True)
        else:
            assert status == 0, Path("log.txt").read_text(encoding="utf-8")[-3000:]
            if fresh:  # where the first run had to share the machine, kills would come too late again and again
                took = min(took, time.monotonic() - begun)
        if Path(folder, checkpoints.FINISHED_MARK).is_file():  # also where it was killed behind the mark
            assert same(weights(folder), weights("straight")), folder
            finished += 1
    print(f"kills {kills}, of them in a half-written checkpoint {saving}, finished runs {finished}")


@pytest.mark.kills
@pytest.mark.parametrize("script", ["train", "train_lora"])
def test_killed_again_and_again_it_ends_with_the_same_weights(workspace, tiny_model, script):
    shutil.copytree(tiny_model, "base")
    rows = Path("train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("train.jsonl").write_text("".join(rows[:ROWS]), encoding="utf-8")
    seed = os.environ.get("KILLS_SEED", "0")
    result = run_script("tests/run/test_kills.py", script, seed, cwd=workspace, call="serve_kills")
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-5000:]
    log = Path("log.txt").read_text(encoding="utf-8")
    assert "Traceback" not in log and log.count("resumed from step ") >= KILLS // 4
