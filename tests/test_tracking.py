"""SwanLab: what is recorded where, that nothing of it can end a training, and that no secret gets into it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from helpers import At, Started, arguments, crash, prepared, run, run_script, says, weights
from tracker import Tracker

import data
import train
from parts import samples, terminal, tracking

KEY = "a-key-that-must-stay-a-secret"
FLAGS = "--max_steps 2 --eval_steps 2 --logging_steps 1 --sample_tokens 1 --disable_tqdm true".split()
connections: list[tuple] = []  # what this process has connected to
sys.addaudithook(lambda event, args: connections.append(args[1]) if event == "socket.connect" else None)


@pytest.fixture(autouse=True)
def fresh(workspace, monkeypatch):
    """Nobody is logged in, and no run or session of SwanLab outlives its test."""
    from swanlab.sdk.internal.core_python import client
    from swanlab.sdk.internal.settings import set_global_settings

    for name in [name for name in os.environ if name.startswith("SWANLAB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(workspace))
    yield
    tracking.end("aborted")
    if client.exists():
        client.reset()
    set_global_settings(None)
    for name in ("SWANLAB_LOG_DIR", tracking.PROJECT):  # SwanLab's local mode sets the first
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory, tiny_model):
    """The weights of two steps without a tracker."""
    with prepared(tmp_path_factory):
        run(tiny_model, max_steps=2, sample_tokens=1)
        return weights(data.OUTPUT_DIR)


def same_weights(untracked) -> bool:
    saved = weights(data.OUTPUT_DIR)
    return all(saved[name].equal(untracked[name]) for name in untracked)


def local_series(run: Path) -> list[list[dict]]:
    """The points of each series of a local run: index (the step) and data."""
    return [
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in run.glob("logs/*/1000.log")
    ]


def login(monkeypatch, url: str) -> None:
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    monkeypatch.setenv("SWANLAB_API_HOST", url)


def tracker_line(output: str) -> str:
    """The only line on the screen that speaks of SwanLab: none of its own."""
    lines = [line for line in output.splitlines() if "swanlab" in line.lower()]
    assert len(lines) == 1, lines
    return lines[0]


def test_local_run_holds_losses_speed_memory_configuration_and_samples(workspace, tiny_model, monkeypatch, capfd):
    monkeypatch.setenv("SWANLAB_PROJECT", "an-older-tutorial")  # crashes swanlab >= 0.8 when left in place
    trainer = run(tiny_model, report_to="swanlab")
    [folder] = Path("swanlog").glob("run-*")
    series = [[point["data"] for point in points] for points in local_series(folder)]
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb"):
        logged = [log[key] for log in trainer.state.log_history if key in log]
        assert any(values == pytest.approx(logged) for values in series), key
    samples = [text.read_text(encoding="utf-8") for text in folder.glob("media/text/*.txt")]
    assert len(samples) == 3 and all("【问题】" in text and "【回答】" in text for text in samples)
    config = (folder / "files" / "config.yaml").read_text(encoding="utf-8")
    for part in ("model_name", "max_length", f"transformers: {transformers.__version__}", "learning_rate"):
        assert part in config
    line = tracker_line(capfd.readouterr().out)
    assert line.startswith("SwanLab：只记录在本地。查看：swanlab watch swanlog；")
    assert not Path(data.OUTPUT_DIR, tracking.RUN_ID_FILE).exists()


def test_the_samples_of_each_evaluation_are_texts_and_curves(workspace, tiny_model, monkeypatch):
    monkeypatch.setattr(samples, "SHARE", 1e9)  # else not every evaluation of so short a run has them
    trainer = run(tiny_model, eval_samples=2, report_to="swanlab")
    [folder] = Path("swanlog").glob("run-*")
    series = local_series(folder)
    for key in ("whole", "leak", "loop", "overlap"):
        logged = [
            (log["step"], log[name]) for log in trainer.state.log_history if (name := f"eval_sample_{key}") in log
        ]
        assert len(logged) == 2 and any(
            [(point["index"], point["data"]) for point in points] == logged for points in series
        )
    texts = [text.read_text(encoding="utf-8") for text in folder.glob("media/text/*.txt")]
    assert len(texts) == 2 * 2 + train.SAMPLES
    assert sorted(text.split("\n")[0] for text in texts).count(texts[0].split("\n")[0]) >= 2  # the same ones each time


@pytest.mark.parametrize(("mode", "connects"), [("local", False), ("offline", False), ("online", True)])
def test_only_online_mode_connects_and_sends_samples(workspace, tiny_model, monkeypatch, capfd, mode, connects):
    with Tracker() as tracker:
        login(monkeypatch, tracker.url)
        monkeypatch.setenv("SWANLAB_MODE", mode)
        connections.clear()
        capfd.readouterr()
        run(tiny_model, max_steps=1, sample_tokens=1, report_to="swanlab")
        assert any(isinstance(address, tuple) for address in connections) == connects  # a string is a local socket
        assert any("Prediction" in body for _, _, body in tracker.requests) == connects
    tracker_line(capfd.readouterr().out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"SWANLAB_MODE": "online"},
            "SWANLAB_MODE=online 需要先登录：swanlab login；不登录，请设 SWANLAB_MODE=local，或加 --report_to none。",
        ),
        (
            {"SWANLAB_MODE": "onlin"},
            "SwanLab 的 SWANLAB_MODE 不能用：要 online、local、offline 或 disabled；请改正，或加 --report_to none。",
        ),
        (
            {"SWANLAB_MODE": "local", "SWANLAB_PROJECT": "我的项目"},
            "SwanLab 的 SWANLAB_PROJECT 不能用：要 1 到 100 个字符，只能是英文字母、数字和 _ - + .；"
            "请改正，或加 --report_to none。",
        ),
        (
            {"SWANLAB_WORKSPACE": "my team"},
            "SwanLab 的 SWANLAB_WORKSPACE 不能用：要 1 到 25 个字符，只能是英文字母、数字和 _ -；"
            "请改正，或加 --report_to none。",
        ),
        (
            {"SWANLAB_MODE": "local", "SWANLAB_CORE_SKIP_STORE": "1", "SWANLAB_API_KEY": KEY},
            "SwanLab 的设置不能用：~skip_store~；请改正，或加 --report_to none。",
        ),
        ({"SWANLAB_PROBE": "x"}, "SwanLab 的设置不能用：~probe~；请改正，或加 --report_to none。"),
    ],
)
def test_settings_to_be_mended_end_the_run_before_anything_is_loaded(folder, monkeypatch, settings, message):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as error:
        train.train(arguments("no model", report_to="swanlab"))
    assert says(str(error.value), message), error.value
    assert KEY not in str(error.value) and "input_value" not in str(error.value)  # where pydantic shows settings
    assert not Path(data.OUTPUT_DIR).exists()


def test_an_empty_setting_is_none(workspace, monkeypatch):
    for name in ("SWANLAB_MODE", "SWANLAB_PROJECT", "SWANLAB_WORKSPACE"):
        monkeypatch.setenv(name, " ")
    settings, mode = tracking.read_settings(arguments("no model"), "ours", None)
    assert (settings.project.name, settings.project.workspace, mode) == ("ours", None, "local")


@pytest.mark.parametrize("mode", ["401", "hang", "refused", "hang after login", "500 after login"])
def test_server_that_does_not_let_a_run_begin(workspace, tiny_model, monkeypatch, untracked, capfd, mode):
    monkeypatch.setattr(tracking, "SECONDS", 3)  # a busy machine also has to get the local run going in it
    later = mode.removesuffix(" after login") if "after" in mode else ""
    with Tracker("ok" if later else mode, later) as tracker:
        login(monkeypatch, "http://127.0.0.1:9" if mode == "refused" else tracker.url)
        started = time.monotonic()
        run(tiny_model, max_steps=2, sample_tokens=1, report_to="swanlab")
        assert time.monotonic() - started < 25  # without a limit: 33 s refused, 75 s and more unanswered
    line = tracker_line(capfd.readouterr().out)
    assert "online 模式无法开始" in line and "训练照常；只记录在本地。查看：swanlab watch swanlog" in line
    assert same_weights(untracked)
    assert any(len(points) == 2 for run in Path("swanlog").glob("run-*") for points in local_series(run))


def test_training_goes_on_where_even_the_disk_refuses(workspace, tiny_model, monkeypatch, untracked, capfd):
    monkeypatch.setenv("SWANLAB_LOG_DIR", "/proc/swanlog")
    run(tiny_model, max_steps=2, sample_tokens=1, report_to="swanlab")
    line = tracker_line(capfd.readouterr().out)
    assert "local 模式无法开始" in line and line.endswith("训练照常；不记录。")
    assert same_weights(untracked)


def train_within_a_second(*flags: str) -> None:
    """train.py with less patience for SwanLab, in a process of its own."""
    tracking.SECONDS = 1
    terminal.run_main(train.main)


@pytest.mark.parametrize(
    ("after_points", "interrupt"), [("hang", False), ("close", True)], ids=["hangs", "refuses, then Ctrl-C"]
)
def test_server_that_dies_during_training(workspace, tiny_model, untracked, after_points, interrupt):
    """In a process of its own, because a wait without limit would also keep that from ending."""
    flags = ["--model_name", tiny_model, *FLAGS]
    flags += ["--max_steps", "100000", "--eval_strategy", "no"] if interrupt else []
    with Tracker(after_points=after_points) as tracker:
        env = os.environ | {"SWANLAB_API_KEY": KEY, "SWANLAB_API_HOST": tracker.url}
        process = Started("tests/test_tracking.py", flags, workspace, env, call="train_within_a_second")
        while not tracker.points and process.poll() is None:
            time.sleep(0.05)
        if interrupt:
            process.send_signal(signal.SIGINT)
        status = process.wait(30)
    text = process.stdout
    assert status == (130 if interrupt else 0), text
    [line] = [line for line in text.splitlines() if line.startswith("SwanLab：没有全部上传")]
    [run] = Path("swanlog").glob("run-*")
    assert f"补传本地的记录：swanlab sync --id {run.name.split('-')[-1]} {run.resolve()}" in line
    if not interrupt:
        assert same_weights(untracked) and text.splitlines()[-1].startswith("训练完成")


def test_server_that_refuses_at_the_end(workspace, tiny_model, monkeypatch, untracked, capfd):
    with Tracker(after_points="401") as tracker:
        login(monkeypatch, tracker.url)
        run(tiny_model, max_steps=2, sample_tokens=1, report_to="swanlab")
    assert "SwanLab：没有全部上传（服务器拒绝接收）。补传本地的记录：" in capfd.readouterr().out
    assert same_weights(untracked)


def killed_and_resumed(tiny_model) -> None:
    """A run that stops after step 5, one after a checkpoint, and the same command again, up to step 8."""
    args = {"max_steps": 8, "eval_steps": 4, "sample_tokens": 1, "eval_samples": 2, "report_to": "swanlab"}
    with pytest.raises(EOFError):
        run(tiny_model, callbacks=[At(6, crash)], **args)
    tracking.end("aborted")  # what is registered for the end of the process
    run(tiny_model, **args)


def test_resumed_online_run_is_continued_without_a_point_twice(workspace, tiny_model, monkeypatch):
    monkeypatch.setattr(samples, "SHARE", 1e9)  # at each evaluation, however short the run
    with Tracker() as tracker:
        login(monkeypatch, tracker.url)
        killed_and_resumed(tiny_model)
        first, second = tracker.experiments
        assert first == second
        assert len(tracker.points) == len(set(tracker.points))
        assert sorted(step for key, step in tracker.points if key == "train/loss") == list(range(1, 9))
        assert sorted(step for key, step in tracker.points if key == "eval/sample_whole") == [4, 8]
        assert not Path(data.OUTPUT_DIR, tracking.RUN_ID_FILE).exists()
        run(tiny_model, max_steps=1, sample_tokens=1, report_to="swanlab", overwrite_output_dir=True)
        assert tracker.experiments[2] != first  # another training is another run


def test_resumed_local_run_is_a_second_one_that_carries_on_the_steps(workspace, tiny_model, monkeypatch):
    killed_and_resumed(tiny_model)
    first, second = sorted(Path("swanlog").glob("run-*"))
    assert first.name.split("-")[-1] == second.name.split("-")[-1]  # the id by which both can be uploaded into one run
    steps = [[[point["index"] for point in points] for points in local_series(run)] for run in (first, second)]
    assert [1, 2, 3, 4, 5] in steps[0] and [5, 6, 7, 8] in steps[1]
    assert all(len(points) == len(set(points)) for run in steps for points in run)


def test_no_secret_host_or_command_line_gets_into_what_a_run_writes(workspace, tiny_model, monkeypatch, capfd):
    """With a key in the environment, and, in a process that is told to debug, with one from an earlier login."""
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", "remote", "add", "origin", "https://user:git-token@example.com/x.git"], check=True)
    monkeypatch.setenv("SWANLAB_MODE", "local")
    stored = Path(".swanlab", ".netrc")
    stored.parent.mkdir()
    stored.write_text(f"machine https://api.swanlab.cn\nlogin x\npassword {KEY}\n")
    stored.chmod(0o600)
    flags = ("--model_name", tiny_model, *FLAGS, "--output_dir", "stored")
    result = run_script("train.py", *flags, cwd=workspace, env=os.environ | {"SWANLAB_DEBUG": "1"}, fresh=True)
    assert result.returncode == 0, result.stdout
    stored.unlink()
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    for name in ("socket.gethostname", "platform.node"):  # this machine's own may be two letters, which stand anywhere
        monkeypatch.setattr(name, lambda: "host-of-a-person")
    run(tiny_model, max_steps=2, sample_tokens=1, report_to="swanlab", output_dir="given")
    Path("screen.txt").write_text(result.stdout + "".join(capfd.readouterr()), encoding="utf-8")
    files = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.parts[0] != ".git"}
    assert {"config.yaml", "debug.log", "README.md", "trainer_state.json"} <= {path.name for path in files}
    for path, content in files.items():
        assert KEY.encode() not in content and b"git-token" not in content, path
        if path.parts[0] in ("swanlog", "screen.txt"):  # training_args.bin is Trainer's, with every argument in it
            for secret in ("host-of-a-person", sys.executable):
                assert secret.encode() not in content, (secret, path)
