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
from helpers import At, Started, arguments, crash, prepared, run, run_script, same, weights
from tracker import Tracker

import data
import train
from parts import terminal
from parts.run import tracking

KEY = "a-key-that-must-stay-a-secret"
FLAGS = "--max_steps 2 --eval_steps 2 --logging_steps 1 --sample_tokens 1".split()
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


def local_series(run: Path) -> list[list[dict]]:
    """The points of each series of a local run: index (the step) and data."""
    return [list(map(json.loads, path.read_text("utf-8").splitlines())) for path in run.glob("logs/*/1000.log")]


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
    monkeypatch.setenv("SWANLAB_MODE", " ")  # as unset
    trainer = run(tiny_model, eval_samples=2, report_to="swanlab")
    [folder] = Path("swanlog").glob("run-*")
    series = [[point["data"] for point in points] for points in local_series(folder)]
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb"):
        logged = [log[key] for log in trainer.state.log_history if key in log]
        assert any(values == pytest.approx(logged) for values in series), key
    questions = [text.read_text(encoding="utf-8").split("\n")[0] for text in folder.glob("media/text/*.txt")]
    assert len(questions) == 2 * 2 + train.SAMPLES and len(set(questions)) == train.SAMPLES  # the same each time
    config = (folder / "files" / "config.yaml").read_text(encoding="utf-8")
    for part in ("model_name", "max_length", f"transformers: {transformers.__version__}", "learning_rate"):
        assert part in config
    line = tracker_line(capfd.readouterr().out)
    assert line.startswith("SwanLab：只记录在本地。查看：swanlab watch swanlog；")
    assert not Path(data.OUTPUT_DIR, tracking.RUN_ID_FILE).exists()


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


@pytest.mark.parametrize("setting", ["MODE=online", "MODE=onlin", "PROJECT=我的项目", "WORKSPACE=a b", f"PROBE={KEY}"])
def test_settings_to_be_mended_end_the_run_before_anything_is_loaded(folder, monkeypatch, setting):
    name, value = setting.split("=")
    monkeypatch.setenv(f"SWANLAB_{name}", value)
    with pytest.raises(SystemExit, match="^错误：.*，或加 --report_to none。$") as error:
        train.train(arguments("no model", report_to="swanlab"))
    assert name.lower() in str(error.value).lower() and KEY not in str(error.value)
    assert not Path(data.OUTPUT_DIR).exists()


@pytest.mark.parametrize("mode", ["401", "refused", "hang", "no disk"])
def test_training_goes_on_where_no_run_can_begin(workspace, tiny_model, monkeypatch, untracked, capfd, mode):
    monkeypatch.setattr(tracking, "SECONDS", 3)  # a busy machine also has to get the local run going in it
    with Tracker(mode) as tracker:
        if mode == "no disk":
            monkeypatch.setenv("SWANLAB_LOG_DIR", "/proc/swanlog")
        else:
            login(monkeypatch, "http://127.0.0.1:9" if mode == "refused" else tracker.url)
        started = time.monotonic()
        run(tiny_model, max_steps=2, sample_tokens=1, report_to="swanlab")
        assert time.monotonic() - started < 25  # without a limit: 33 s refused, 75 s and more unanswered
    line = tracker_line(capfd.readouterr().out)
    assert "模式无法开始" in line and "训练照常" in line and same(weights(data.OUTPUT_DIR), untracked)
    assert ("不记录。" if mode == "no disk" else "查看：swanlab watch swanlog") in line
    if mode != "no disk":
        assert any(len(points) == 2 for path in Path("swanlog").glob("run-*") for points in local_series(path))


def train_within_a_second(*flags: str) -> None:
    """train.py with less patience for SwanLab, in a process of its own."""
    tracking.SECONDS = 1
    terminal.run_main(train.main)


@pytest.mark.parametrize("after_points", ["hang", "401", "close"])
def test_server_that_dies_during_training(workspace, tiny_model, untracked, after_points):
    """In a process of its own, because a wait without limit would also keep that from ending; the last one is ended by
    Ctrl-C."""
    interrupt = after_points == "close"
    flags = ["--model_name", tiny_model, *FLAGS]
    flags += ["--max_steps", "100000", "--eval_steps", "100000"] if interrupt else []
    with Tracker(after_points=after_points) as tracker:
        env = os.environ | {"SWANLAB_API_KEY": KEY, "SWANLAB_API_HOST": tracker.url}
        process = Started("tests/run/test_tracking.py", flags, workspace, env, call="train_within_a_second")
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
        assert same(weights(data.OUTPUT_DIR), untracked) and text.splitlines()[-1].startswith("训练完成")


@pytest.mark.parametrize("online", [True, False])
def test_a_resumed_run_goes_on_in_the_same_one(workspace, tiny_model, monkeypatch, online):
    """On the site without a point twice; in the local folder as a second one with the same id, by which both can be
    uploaded into one run. Another training is another run."""
    args = {"max_steps": 4, "eval_steps": 2, "sample_tokens": 1, "report_to": "swanlab"}
    with Tracker() as tracker:
        if online:
            login(monkeypatch, tracker.url)
        with pytest.raises(EOFError):
            run(tiny_model, callbacks=[At(4, crash)], **args)  # step 3 comes twice
        tracking.end("aborted")  # what is registered for the end of the process
        run(tiny_model, **args)
        assert not Path(data.OUTPUT_DIR, tracking.RUN_ID_FILE).exists()
        run(tiny_model, **args | {"max_steps": 1, "overwrite_output_dir": True})
    if online:
        first, second, third = tracker.experiments
        assert sorted(step for key, step in tracker.points if key == "train/loss") == [1, *range(1, 5)]
    else:
        first, second, third = (path.name.split("-")[-1] for path in sorted(Path("swanlog").glob("run-*")))
    assert first == second != third


def test_no_secret_host_or_command_line_gets_into_what_a_run_writes(workspace, tiny_model, monkeypatch, capfd):
    """With a key in the environment, and, where SwanLab is told to debug, with one from an earlier login."""
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", "remote", "add", "origin", "https://user:git-token@example.com/x.git"], check=True)
    monkeypatch.setenv("SWANLAB_MODE", "local")
    Path(".swanlab").mkdir()
    (stored := Path(".swanlab", ".netrc")).write_text(f"machine https://api.swanlab.cn\nlogin x\npassword {KEY}\n")
    stored.chmod(0o600)
    flags = ("--model_name", tiny_model, *FLAGS, "--output_dir", "stored")
    result = run_script("train.py", *flags, cwd=workspace, env=os.environ | {"SWANLAB_DEBUG": "1"})
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
        ours = path.parts[0] in ("swanlog", "screen.txt")  # training_args.bin is Trainer's, with every argument in it
        for secret in (KEY, "git-token", *(("host-of-a-person", sys.executable) if ours else ())):
            assert secret.encode() not in content, (secret, path)
