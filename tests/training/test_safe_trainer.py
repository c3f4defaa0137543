"""Whatever ends a training, the same command continues it to the same weights, bit for bit; what is saved is
whole, and saving takes a twentieth of the time at most."""

import os
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
from helpers import At, build_trainer, crash, run_steps, same, terminate, weights

import data
from parts.model import weights as loading
from parts.run import checkpoints, model_card
from parts.run.folder import choose_checkpoint
from parts.training import safe_trainer

WRITING = ("w", "wb", "rb+")
# The loss falls, then it rises: the best weights are older than most checkpoints.
RISING = {"learning_rate": 0.3, "warmup_steps": 16, "max_steps": 16, "eval_steps": 2, "early_stopping_patience": 0}


@pytest.mark.parametrize(
    ("number", "lora", "step", "changes"),
    [
        (signal.SIGTERM, False, 13, {"save_total_limit": 1}),
        (signal.SIGTERM, False, 10, {"save_total_limit": 1}),  # an evaluation comes at this very step
        (signal.SIGTERM, False, 20, {"save_total_limit": 1}),  # the last step
        (signal.SIGINT, True, 7, {"gradient_accumulation_steps": 2, "max_steps": 10}),
        # an evaluation that is not the best so far: of itself it saves nothing
        (signal.SIGTERM, False, 10, {"save_steps": 1000, "learning_rate": 1.0}),
        # 27 steps an epoch: in the second one, and at the end of the first
        (signal.SIGTERM, False, 29, {"eval_steps": 100, "max_steps": 32}),
        (signal.SIGTERM, False, 27, {"eval_steps": 100, "max_steps": 32}),
    ],
)
def test_signal_saves_at_the_end_of_the_step_and_the_command_continues(
    workspace, tiny_model, straight, number, lora, step, changes, capfd
):
    expected = straight(lora, **changes)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run_steps(tiny_model, lora, [At(step, lambda: signal.raise_signal(number))], output_dir="resumed", **changes)
    out, err = capfd.readouterr()
    assert end.value.code == 128 + number == {15: 143, 2: 130}[number]
    assert f"已中断：第 {step} 步的检查点在 resumed；同一命令会从这里继续。" in err
    assert "【问题】" not in out and not (Path("resumed") / checkpoints.FINISHED_MARK).exists()
    assert checkpoints.find_intact("resumed")[-1].name == f"checkpoint-{step}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer = run_steps(tiny_model, lora, output_dir="resumed", **changes)
    evaluated = {log["step"] for log in trainer.state.log_history if "eval_loss" in log}
    assert (step in evaluated) == (step in (10, 20)), evaluated  # when it is due, not because of the signal
    assert f"resumed from step {step}" in capfd.readouterr().out.splitlines()
    assert same(weights("resumed"), expected)
    assert len(checkpoints.folders("resumed")) <= changes.get("save_total_limit", 2)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_best_weights_are_kept_and_written_with_the_next_checkpoint(
    workspace, tiny_model, straight, lora, capsys, monkeypatch
):
    """Asked to stop, and killed before anything was saved. A run that goes on and finds its best weights damaged at the
    end says that it saves the last ones."""
    monkeypatch.setattr(safe_trainer, "SAVING", 1e-9)
    changes = RISING | {"save_steps": 0, "learning_rate": 100 if lora else 0.3}
    expected = straight(lora, **changes)
    with pytest.raises(SystemExit, match="143"):
        run_steps(tiny_model, lora, [At(13, terminate)], output_dir="out", **changes)
    best, newest = checkpoints.find_intact("out")
    assert newest.name == "checkpoint-13" and not (best / "optimizer.pt").exists()
    assert checkpoints.find_trained("out") == best and same(weights(best), expected)
    with pytest.raises(SystemExit, match="只有权重"):
        choose_checkpoint(Path("new"), str(best))
    shutil.copytree("out", "damaged")
    run_steps(tiny_model, lora, output_dir="out", **changes)
    assert same(weights("out"), expected) and checkpoints.folders("out") == [best, newest]

    [file] = Path("damaged", best.name).glob("*.safetensors")
    capsys.readouterr()
    trainer = run_steps(tiny_model, lora, [At(15, file.unlink)], output_dir="damaged", **changes)
    assert f"{best.name} 缺少 {file.name}：改为保存最后一步的权重。" in capsys.readouterr().out
    assert "（第 16 步），最后一步" in model_card.describe_saved(trainer.state)
    assert "（第 16 步），最后一步" in Path("damaged/README.md").read_text(encoding="utf-8")
    assert not same(weights("damaged"), expected)

    with pytest.raises(EOFError):
        run_steps(tiny_model, lora, [At(15, crash)], output_dir="killed", **changes)
    assert checkpoints.folders("killed") == []
    run_steps(tiny_model, lora, output_dir="killed", **changes)
    assert same(weights("killed"), expected) and checkpoints.folders("killed") == []


def test_without_room_in_memory_the_best_are_saved_whole(workspace, tiny_model, straight, monkeypatch):
    fill = At(1, lambda: monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0)))
    trainer = run_steps(tiny_model, callbacks=[fill], output_dir="out", save_steps=0, **RISING)
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.kept is None and (best / "optimizer.pt").exists() and same(weights("out"), weights(best))
    assert same(weights("out"), straight(save_steps=0, **RISING))


@pytest.mark.parametrize("save_steps", [0, 3])
def test_saving_takes_a_twentieth_of_the_time_on_a_slow_disk(workspace, tiny_model, monkeypatch, save_steps, capsys):
    """It sleeps by the byte. --save_steps is obeyed as it stands, between evaluations too."""
    sync, rate, saves, begun = os.fsync, 120e6, [], []

    def slow(file):
        time.sleep(os.fstat(file).st_size / rate)
        sync(file)

    class Watch(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saves.append((state.global_step, time.perf_counter() - begun[0]))

    monkeypatch.setattr(os, "fsync", slow)
    callbacks = [At(1, lambda: begun.append(time.perf_counter())), Watch()]
    run_steps(tiny_model, callbacks=callbacks, output_dir="out", max_steps=100, save_steps=save_steps)
    said = capsys.readouterr().out
    if save_steps:
        assert [step for step, _ in saves] == [*range(3, 100, 3), 100] and "最多损失 3 步的训练" in said
        return
    size = sum(path.stat().st_size for path in checkpoints.files_in(checkpoints.find_intact("out")[-1]))
    assert 1 <= len(saves) < 20 and "最多损失约 1 分钟再加 5 步的训练" in said
    assert len(saves) * size / rate < 0.055 * saves[-1][1] and saves[-1][0] < 100


def test_a_kill_at_any_file_event_leaves_a_checkpoint_and_its_best_weights(workspace, tiny_model):
    """At each of them what is on the disk is copied. Each copy can be gone on from, and none from an older checkpoint
    than the copy before."""
    copies, watching = [], [True]

    def watch(event, args):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or event == "open" and args[1] in WRITING
        if changes and watching and "out/checkpoint-" in str(args[0]):
            watching.clear()  # copying is no event
            copies.append(shutil.copytree("out", f"copy-{len(copies)}"))
            watching.append(True)

    sys.addaudithook(watch)
    run_steps(tiny_model, output_dir="out", **RISING | {"save_steps": 5, "eval_steps": 1})
    watching.clear()
    chosen = [choose_checkpoint(Path(copy), None) or "checkpoint-0" for copy in copies]
    steps = [checkpoints.step_of(Path(path)) for path in chosen]
    assert steps == sorted(steps) and {*steps} == {0, 5, 10, 15, 16} and len(steps) > 60


def test_a_run_outside_the_main_thread_trains_without_the_signals(workspace, tiny_model):
    with ThreadPoolExecutor() as threads:
        trainer = threads.submit(run_steps, tiny_model, report_to="swanlab", max_steps=5).result()
    assert trainer.state.global_step == 5


def test_a_signal_is_saved_where_a_broken_checkpoint_of_that_step_lies(interrupted, tiny_model):
    shutil.copytree("full/checkpoint-10", "full/checkpoint-13")
    Path("full/checkpoint-13", checkpoints.MANIFEST).unlink()
    with pytest.raises(SystemExit, match="143"):
        run_steps(tiny_model, callbacks=[At(13, terminate)], output_dir="full")
    assert checkpoints.find_intact("full")[-1].name == "checkpoint-13"


def test_a_signal_after_the_last_step_lets_the_results_be_saved(workspace, tiny_model):
    """Nothing is left to interrupt, and without checkpoints all would be lost."""
    run_steps(tiny_model, callbacks=[At(None, terminate)], eval_steps=100, max_steps=4)
    assert Path(data.OUTPUT_DIR, checkpoints.FINISHED_MARK).is_file()


@pytest.mark.parametrize(
    "changes", [{"max_steps": -1, "num_train_epochs": 1, "eval_steps": 27}, {"max_steps": 8}], ids=str
)
def test_killed_between_the_last_checkpoint_and_the_end_of_saving(workspace, tiny_model, straight, changes):
    """The weights are written; the card behind them cannot be, so the mark of a finished run is not."""
    expected, card = straight(**changes), Path(data.OUTPUT_DIR, "README.md")
    with pytest.raises(SystemExit, match="写 .* 失败"):
        run_steps(tiny_model, callbacks=[At(3, card.mkdir)], **changes)
    folder = Path(data.OUTPUT_DIR)
    last = checkpoints.find_intact(folder)[-1]
    assert (folder / "model.safetensors").is_file() and checkpoints.find_trained(folder) != folder
    (folder / "model.safetensors").write_bytes(b"cut off")
    card.rmdir()
    trainer = run_steps(tiny_model, **changes)
    assert trainer.state.global_step == checkpoints.step_of(last)
    assert same(weights(folder), expected)
    assert checkpoints.find_trained(folder) == folder


def test_early_stopping_is_not_forgotten(workspace, tiny_model):
    """It counts on, with the patience of the command that continues."""
    changes = {"max_steps": 60, "eval_steps": 2, "learning_rate": 1.0, "early_stopping_patience": 5}
    stopped = run_steps(tiny_model, output_dir="straight", **changes).state.global_step
    with pytest.raises(EOFError):
        run_steps(tiny_model, callbacks=[At(None, crash)], **changes | {"early_stopping_patience": 3})
    trainer = run_steps(tiny_model, **changes)
    assert trainer.state.global_step == stopped < 60
    assert same(weights(data.OUTPUT_DIR), weights("straight"))


def test_bfloat16_adapters_continue_as_bfloat16(workspace, tiny_model, monkeypatch):
    """As on a GPU: peft would load them as float32."""
    monkeypatch.setattr(loading, "best_dtype", lambda device: torch.bfloat16)
    steps = {"max_steps": 4, "eval_steps": 4}
    run_steps(tiny_model, True, output_dir="straight", **steps)
    with pytest.raises(SystemExit):
        run_steps(tiny_model, True, [At(2, terminate)], output_dir="resumed", **steps)
    run_steps(tiny_model, True, output_dir="resumed", **steps)
    assert {tensor.dtype for tensor in weights("resumed").values()} == {torch.bfloat16}
    assert same(weights("resumed"), weights("straight"))


@pytest.fixture
def limit():
    """limit(size) lets no file grow beyond it, which ends a write as a full disk does."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    yield lambda size=hard: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize(("step", "kept"), [(13, [5, 10]), (None, [15, 20])], ids=["checkpoint", "results"])
def test_full_disk_keeps_the_checkpoints_and_the_command_continues(workspace, tiny_model, straight, limit, step, kept):
    expected = straight()
    with pytest.raises(SystemExit, match="^错误：写 out.* 失败.*磁盘剩余.*同一命令继续"):
        run_steps(tiny_model, callbacks=[At(step, lambda: limit(200_000))], output_dir="out")
    limit()
    assert [checkpoints.step_of(path) for path in checkpoints.find_intact("out")] == kept
    assert checkpoints.folders("out") == checkpoints.find_intact("out")
    run_steps(tiny_model, output_dir="out")
    assert same(weights("out"), expected)


def test_room_is_asked_for_the_checkpoints_that_will_be_kept(workspace, tiny_model, tokenizer, monkeypatch):
    """The best, the newest and the one being written; no more than there will ever be."""
    asked = []
    monkeypatch.setattr(checkpoints, "check_space", lambda *numbers: asked.append(numbers))
    trainer = build_trainer(tiny_model, tokenizer)
    trainer.state.max_steps, trainer.state.save_steps = 8, 2
    size = sum(p.nbytes for p in trainer.model.parameters())
    for trainer.limit, count in ((1, 3), (2, 3), (100, 4)):
        trainer.check_space()
        # AdamW's states: twice the weights. The final weights, and the best ones, which may be kept alone.
        assert asked.pop() == (data.OUTPUT_DIR, count, 3 * size, 2 * size)


def test_a_training_without_a_step_is_not_a_finished_one(workspace, tiny_model, tokenizer):
    trainer = build_trainer(tiny_model, tokenizer, max_steps=2)
    trainer._run_epoch = lambda *args, **kwargs: None
    with pytest.raises(SystemExit, match="一步也没有训练"):
        trainer.train()


class Ruin(transformers.TrainerCallback):
    """The learning rate goes astray at step 8."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups if state.global_step == 7 else ():
            group["lr"] = 1e38


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"logging_steps": 1}, "(loss|grad_norm)"),
        ({"logging_steps": 100, "eval_steps": 3}, "eval_loss"),
        ({"logging_steps": 100, "max_steps": 8}, "weights"),  # the last step is saved without an evaluation
    ],
)
def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing_of_it(workspace, tiny_model, changes, what):
    said = rf"到第 (8|9) 步 {what} 成了 (nan|inf)（学习率 .*好检查点：{data.OUTPUT_DIR}/checkpoint-6。"
    with pytest.raises(SystemExit, match=said):
        run_steps(tiny_model, callbacks=[Ruin()], **{"eval_steps": 3} | changes)
    whole = checkpoints.folders(data.OUTPUT_DIR)
    assert whole[-1].name == "checkpoint-6" and whole == checkpoints.find_intact(data.OUTPUT_DIR)
    assert all(value.isfinite().all() for value in weights(whole[-1]).values())
    assert not Path(data.OUTPUT_DIR, "model.safetensors").exists()
