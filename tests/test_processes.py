"""Several processes, as torchrun and accelerate start them, also on two machines: the curve of one, one voice, one step
at which all stop, and one sentence where they disagree or one is gone."""

import multiprocessing
import os
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import psutil
import pytest
import torch
from helpers import ROOT, free_port, history, refused, run_script, same, weights

import train
from parts import checkpoints, processes, run_settings

STEPS = {"max_steps": 12, "eval_steps": 4, "logging_steps": 1, "sample_tokens": 2, "learning_rate": 1e-3}
STEPS |= {"report_to": "none", "disable_tqdm": "true"}
TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node=2")
ACCELERATE = ("accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")
ACCELERATE += ("--dynamo_backend=no", "--main_process_port=29532")


def flags(model: Path, **changes) -> list[str]:
    return [
        str(part) for name, value in (STEPS | {"model_name": model} | changes).items() for part in (f"--{name}", value)
    ]


def launch(launcher: tuple, script: str, flags: list[str]) -> subprocess.Popen:
    command = [Path(sysconfig.get_path("scripts"), launcher[0]), *launcher[1:], ROOT / script, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def launch_machines(port: int, script: str, flags: list[str], *more: str) -> list[subprocess.Popen]:
    """A process each on two machines that see each other at an address only, by one command."""
    place = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", *more)
    return [launch(("torchrun", *place), script, flags) for _ in range(2)]


def ended(started: list[subprocess.Popen]) -> list[str]:
    """What they wrote."""
    return [process.communicate(timeout=200)[0] for process in started]


def curve(folder: str) -> list[tuple[float, float]]:
    logs = history(folder)
    pairs = [(log["loss"], log["grad_norm"]) for log in logs if "loss" in log]
    return pairs + [(log["eval_loss"], log["eval_token_loss"]) for log in logs if "eval_loss" in log]


def follow_one(workspace, script: str, one: list[str], two, samples: bool = True) -> None:
    """One process with these flags, and what `two(flags)` starts, have the same curve, and one voice."""
    result = run_script(script, *one, "--output_dir", "one", cwd=workspace)
    assert result.returncode == 0, result.stdout
    outputs = ended(started := two(["--output_dir", "two"]))
    assert {process.returncode for process in started} == {0}, outputs
    output = "".join(outputs)
    assert output.count("训练完成") == 1 and output.count("【问题】") == 3
    # What the first process alone asks, while the second one waits
    assert not samples or "样例" in result.stdout and "样例" in output
    found, expected = curve("two"), curve("one")
    assert len(found) == len(expected) > 2
    for pair, other in zip(found, expected):
        assert pair == pytest.approx(other, rel=2e-4)


def worker_of(launched: list[subprocess.Popen], rank: int) -> psutil.Process:
    """The process of this rank."""
    children = [child for process in launched for child in psutil.Process(process.pid).children()]
    workers = [child for child in children if "train.py" in " ".join(child.cmdline())]
    [found] = [worker for worker in workers if worker.environ()["RANK"] == str(rank)]
    return found


def strike(launched: list[subprocess.Popen], number: int) -> str:
    """What the processes say when the second one gets this signal, once there is a new checkpoint."""
    before = newest_step("resumed")
    while newest_step("resumed") == before and launched[0].poll() is None:
        time.sleep(0.02)
    worker_of(launched, rank=1).send_signal(number)
    started = time.monotonic()
    output = "".join(ended(launched))
    assert time.monotonic() - started < 100, output
    return output


def newest_step(folder: str) -> int:
    """Of the last whole checkpoint."""
    return max([checkpoints.step_of(path) for path in checkpoints.find_whole(folder)], default=0)


def test_two_processes_follow_the_curve_of_one_and_stop_at_the_same_step(workspace, tiny_model):
    """On two machines. On one, a signal reaches the second one only, and the same command continues on two; there that
    one is killed, and torchrun starts the command again on both; to the same weights."""
    two = flags(tiny_model, per_device_train_batch_size=2)
    follow_one(workspace, "train.py", flags(tiny_model), lambda more: launch_machines(29541, "train.py", [*two, *more]))
    two += ["--output_dir", "resumed"]
    output = strike([process := launch(TORCHRUN, "train.py", two)], signal.SIGTERM)
    assert process.returncode != 0 and output.count("已中断：第") == 1, output
    stopped = newest_step("resumed")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(f"resumed/checkpoint-{stopped}"))
    output = strike(both := launch_machines(29542, "train.py", two, "--max_restarts=2"), signal.SIGKILL)
    assert {process.returncode for process in both} == {0} and "[rank" not in output, output  # no traceback of ours
    resumed = [int(line.split()[-1]) for line in output.splitlines() if line.startswith("resumed from step")]
    assert output.count("错误：另一个进程已经结束或没有回应，训练停止；") == 1 and resumed == [stopped, 8]
    assert same(weights("resumed"), weights("two"))


@pytest.mark.four
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_four_processes_follow_the_curve_of_one(workspace, tiny_model, sharded):
    four = flags(tiny_model, per_device_train_batch_size=1, eval_samples=0, fsdp=sharded)
    launcher = (*TORCHRUN[:-1], "--nproc_per_node=4")
    one = flags(tiny_model, eval_samples=0)
    follow_one(workspace, "train.py", one, lambda more: [launch(launcher, "train.py", [*four, *more])], samples=False)


def test_accelerate_launches_lora_too(workspace, tiny_model):
    steps = {"max_steps": 2, "eval_steps": 1, "lora_dropout": 0}  # each process drops other elements
    two = flags(tiny_model, per_device_train_batch_size=2, **steps)
    one = flags(tiny_model, **steps)
    follow_one(workspace, "train_lora.py", one, lambda more: [launch(ACCELERATE, "train_lora.py", [*two, *more])])


def forked(act, *all_arguments) -> list[str]:
    """What each of so many processes hears from `act(rank, …)`: its ValueError or SystemExit, or nothing."""
    port = free_port()
    fork = multiprocessing.get_context("fork")
    heard, all_heard = fork.Queue(), fork.Barrier(len(all_arguments))

    def start(rank: int, *words) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            act(rank, *words)
            heard.put((rank, ""))
        except (ValueError, SystemExit) as error:
            heard.put((rank, str(error)))
        all_heard.wait(60)

    started = [fork.Process(target=start, args=(rank, *words)) for rank, words in enumerate(all_arguments)]
    for process in started:
        process.start()
    found = dict(heard.get(timeout=60) for _ in started)
    for process in started:
        process.join()
    return [found[rank] for rank in sorted(found)]


def join() -> None:
    """Make a group, in one of these processes."""
    accelerate.PartialState._reset_state()  # of the tests before
    accelerate.PartialState(cpu=True)


def meet(*all_facts: dict) -> list[str]:
    """What each of two processes is told when those that have facts come."""
    return forked(lambda _, facts: processes.meet(facts, 60, "gloo"), *((facts,) for facts in all_facts))


def test_machines_that_do_not_share_the_output_folder_are_refused(folder, monkeypatch):
    monkeypatch.setattr(processes, "SHOWN_LATE", 1)
    for name in ("one/out", "two/out"):
        Path(name).mkdir(parents=True)
    Path("one/out/owner").write_text("进程 1", encoding="utf-8")

    def look(rank: int, place: str) -> None:
        os.chdir(place)
        join()
        processes.require_shared(SimpleNamespace(process_index=rank, world_size=2), Path("out/owner"))

    assert forked(look, ("one",), ("one",)) == ["", ""]
    said, quiet = forked(look, ("one",), ("two",))
    assert said.startswith("错误：进程 1 的机器看不到进程 0 写在 out 里的文件；") and quiet == "1"


def test_machines_with_other_files_are_refused():
    def compare(rank: int, digest: str) -> None:
        join()
        processes.agree(SimpleNamespace(process_index=rank, world_size=2), {"train.jsonl (sha256)": digest})

    assert forked(compare, ("a1",), ("a1",)) == ["", ""]
    said, quiet = forked(compare, ("a1",), ("b2",))
    assert said.startswith("错误：各个进程的 train.jsonl (sha256) 不同：进程 0 是 a1，进程 1 是 b2；") and quiet == "1"


def test_files_are_fetched_by_one_at_a_time(folder):
    """The first one of another machine comes after the first of all: they may share the folder."""

    def fetch(rank: int, seconds: float) -> None:
        join()
        with processes.in_turns(SimpleNamespace(process_index=rank, local_process_index=0)):
            assert sorted(os.listdir()) == ["0"] * rank
            time.sleep(seconds)
            Path(str(rank)).touch()
        assert sorted(os.listdir()) == ["0", "1"]

    assert forked(fetch, (0.3,), (0.1,)) == ["", ""]


def test_processes_that_agree_go_on():
    assert meet({"设备": "cuda", "--seed": 42}, {"设备": "cuda", "--seed": 42}) == ["", ""]


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [("设备", "cuda", "CPU"), ("torch", "2.13.0", "2.11.0"), ("--seed", 1, 2), ("--fsdp", None, True)],
)
def test_processes_that_disagree_all_hear_why(name, one, two):
    [said, other] = meet({"same": 1, name: one}, {"same": 1, name: two})
    expected = f"各个进程的 {name} 不同：进程 0 是 {one}，进程 1 是 {two}；请让每台机器上的命令、文件和软件都一样"
    assert said == other == expected


def test_a_process_that_never_comes_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(processes, "MEETING", 1)
    [said] = meet({"a": 1})
    assert said.startswith("等了 1 秒，2 个进程没有到齐（") and said.endswith(
        "请检查每台机器上的命令，和它们之间的网络"
    )


def test_other_numbers_of_processes_hear_how_a_step_stays_the_same(tmp_path):
    refused(
        f"{tmp_path} 里未完成的训练用的是别的设置：examples_per_step 4 -> 8；请用 --per_device_train_batch_size "
        "让所有进程每步仍是 4 条，或用 --output_dir 换一个文件夹重新训练。",
        run_settings.refuse_changes,
        tmp_path,
        {"examples_per_step": 4},
        {"examples_per_step": 8},
    )


@pytest.mark.parametrize(("each", "more"), [(2, ""), (4, "；公开方案是 4 条，学习率是照它定的")])
def test_how_many_examples_a_step_of_several_processes_has_is_said(each, more):
    args = SimpleNamespace(
        train_batch_size=each, gradient_accumulation_steps=1, world_size=2, examples_per_step=2 * each
    )
    args.sharded = None
    assert train.describe_step(args) == f"每步 {2 * each} 条样本：2 个进程，各 {each} 条，累积 1 次{more}。"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error: out of memory"), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"), True),
        (RuntimeError("shape mismatch"), False),
    ],
    ids=str,
)
def test_what_says_that_a_process_is_gone(error, lost):
    assert processes.is_lost(error) == lost
