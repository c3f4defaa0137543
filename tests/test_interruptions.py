"""Whatever ends a run, the same command continues it to the same weights, bit for bit; nothing is lost in silence."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, run_script
from test_train import arguments, weights

import data
import inference
import train
import train_lora

STEPS = {"max_steps": 20, "eval_steps": 5, "learning_rate": 1e-3, "gradient_accumulation_steps": 1, "logging_steps": 5}


class Straight:
    """The weights of runs that nothing touched, each made once: straight(model, cls, **changes) -> {name: tensor}."""

    def __init__(self):
        self.known = {}

    def __call__(self, model, cls=train.TrainArguments, **changes):
        key = (cls, *sorted(changes.items()))
        if key not in self.known:
            run(model, cls, output_dir="straight", **changes)
            self.known[key] = final_weights("straight")
        return self.known[key]


@pytest.fixture(scope="module")
def straight():
    return Straight()


def run(model, cls=train.TrainArguments, **changes):
    wrap = (train_lora.add_adapter, train_lora.name_base) if cls is train_lora.LoraArguments else ()
    return train.run(arguments(model, cls, **STEPS | changes), *wrap)


def final_weights(folder) -> dict[str, torch.Tensor]:
    adapter = Path(folder, "adapter_model.safetensors").is_file()
    return weights(folder, "adapter_model.safetensors" if adapter else "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def choose(args) -> str | None:
    """The checkpoint that a command with these arguments would continue from."""
    train.note_weights(args, args.model_name)
    return train.choose_checkpoint(args)


def at_step(patch, step: int, act) -> None:
    """Let `act()` happen in the next run while it computes step `step`."""

    class Acting(train.MedicalTrainer):
        acted = False

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == step - 1 and not self.acted:
                self.acted = True
                act()
            return loss

    patch.setattr(train, "MedicalTrainer", Acting)


# ---- damage -------------------------------------------------------------------------------------------------------


def flip(content: bytes) -> bytes:
    """One bit of `content` flipped, always the same one."""
    place = random.Random(len(content)).randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": Path.unlink,
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory, tiny_model):
    """A working folder with runs that ended after step 12 of 20, full and LoRA: checkpoint-10 is their best."""
    folder = tmp_path_factory.mktemp("cut_short")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data.prepare(str(ROOT / "tests" / "demo" / "medical.jsonl"))
        for cls, name in ((train.TrainArguments, "full"), (train_lora.LoraArguments, "lora")):
            with patch.context() as inner, pytest.raises(EOFError):
                at_step(inner, 13, lambda: exec("raise EOFError"))
                run(tiny_model, cls, output_dir=name)
    return folder


@pytest.fixture
def copies(cut_short, tmp_path, monkeypatch):
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(
    ("name", "cls"), [("full", train.TrainArguments), ("lora", train_lora.LoraArguments)], ids=["full", "lora"]
)
def test_damaged_checkpoint_is_passed_over_whatever_file_it_is(copies, tiny_model, name, cls, damage, capsys):
    args = arguments(tiny_model, cls, output_dir=name, **STEPS)
    newest, older = Path(name, "checkpoint-10"), str(Path(name, "checkpoint-5"))
    assert choose(args) == str(newest)
    files = sorted(path for path in newest.iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        damage(path)
        assert choose(args) == older, path
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1 and said[0].startswith(f"跳过 {newest}：") and path.name in said[0], said
        if not path.exists() or path.stat().st_size != len(content):  # inference looks at the sizes only
            config = "adapter_config.json" if name == "lora" else "config.json"
            assert inference.find_trained(name, config) == Path(older)
        path.write_bytes(content)
    assert choose(args) == str(newest)


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_in_the_manifest_never_lets_other_content_pass(copies, seed):
    """Any bit of it: the checkpoint is refused, or the manifest still says the same."""
    checkpoint = Path("full", "checkpoint-10")
    path = checkpoint / inference.MANIFEST
    content, place = path.read_bytes(), random.Random(seed)
    changed = bytearray(content)
    changed[place.randrange(len(content))] ^= 1 << place.randrange(8)
    path.write_bytes(changed)
    if inference.find_damage(checkpoint, hashes=True) is None:
        assert json.loads(changed) == json.loads(content)


@pytest.mark.parametrize(
    ("name", "cls", "file", "damage"),
    [
        ("full", train.TrainArguments, "model.safetensors", "flipped"),
        ("full", train.TrainArguments, "manifest.json", "removed"),
        ("lora", train_lora.LoraArguments, "optimizer.pt", "truncated"),
    ],
)
def test_training_continues_from_the_older_one_and_clears_the_damaged(
    copies, tiny_model, straight, name, cls, file, damage, capsys
):
    expected = straight(tiny_model, cls)
    DAMAGES[damage](Path(name, "checkpoint-10", file))
    shutil.copytree(f"{name}/checkpoint-5", f"{name}/checkpoint-7")  # a save that was cut off
    Path(name, "checkpoint-7", inference.MANIFEST).unlink()
    capsys.readouterr()
    run(tiny_model, cls, output_dir=name)
    out = capsys.readouterr().out
    assert f"跳过 {name}/checkpoint-10：" in out and "resumed from step 5" in out.splitlines()
    assert same(final_weights(name), expected)
    left = inference.checkpoint_folders(name)
    assert len(left) <= 2 and left == inference.find_checkpoints(name)


def test_no_whole_checkpoint_says_so_and_begins_anew(copies, tiny_model, straight, capsys):
    for number in (5, 10):
        DAMAGES["flipped"](Path("full", f"checkpoint-{number}", "rng_state.pth"))
    expected = straight(tiny_model)
    capsys.readouterr()
    run(tiny_model, output_dir="full")
    out = capsys.readouterr().out
    assert out.count("跳过 ") == 2 and "没有可用的检查点，从头开始训练。" in out
    assert same(final_weights("full"), expected)


def test_a_checkpoint_whose_best_is_damaged_does_not_decide_the_final_weights(copies, tiny_model, capsys):
    """The newest is whole, but training would end with weights read from the best."""
    path = Path("full/checkpoint-10/trainer_state.json")
    state = json.loads(path.read_text(encoding="utf-8")) | {"best_model_checkpoint": "elsewhere/checkpoint-5"}
    path.write_text(json.dumps(state), encoding="utf-8")
    path.with_name(inference.MANIFEST).unlink()
    train.Sealing(path.parent, None, None).join()
    args = arguments(tiny_model, output_dir="full", **STEPS)
    assert choose(args) == "full/checkpoint-10"
    DAMAGES["flipped"](Path("full/checkpoint-5/model.safetensors"))
    assert choose(args) is None
    assert "最好的 checkpoint-5 model.safetensors 与 manifest.json 不符" in capsys.readouterr().out


def test_older_checkpoints_stay_until_the_newer_one_is_whole(workspace, tiny_model, straight, monkeypatch):
    expected = straight(tiny_model)
    write = train.write_at_once

    def full_for_the_second(path, text):
        if str(path).endswith("checkpoint-10/manifest.json"):
            raise OSError(28, "No space left on device")
        write(path, text)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="写 .*checkpoint-10 失败.*No space left"):
        patch.setattr(train, "write_at_once", full_for_the_second)
        run(tiny_model, save_total_limit=1)
    assert [path.name for path in inference.find_checkpoints(data.OUTPUT_DIR)] == ["checkpoint-5"]
    run(tiny_model, save_total_limit=1)
    assert same(final_weights(data.OUTPUT_DIR), expected)
    assert len(inference.checkpoint_folders(data.OUTPUT_DIR)) == 1


# ---- the end of training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"max_steps": 18}], ids=["epochs", "max_steps"])
def test_killed_between_the_last_checkpoint_and_the_end_of_saving(workspace, tiny_model, straight, changes):
    if not changes:  # whole epochs
        changes = {"max_steps": -1, "num_train_epochs": 1, "eval_steps": 27, "gradient_accumulation_steps": 4}
    expected = straight(tiny_model, **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(EOFError):
        patch.setattr(train, "draw_losses", lambda *_: exec("raise EOFError"))  # the weights are written, the mark not
        run(tiny_model, **changes)
    folder = Path(data.OUTPUT_DIR)
    last = inference.find_checkpoints(folder)[-1]
    assert (folder / "model.safetensors").is_file() and inference.find_trained(folder) != folder
    (folder / "model.safetensors").write_bytes(b"cut off")
    trainer = run(tiny_model, **changes)
    assert trainer.state.global_step == int(last.name[11:])
    assert same(final_weights(folder), expected)
    assert inference.find_trained(folder) == folder


def test_early_stopping_is_not_forgotten(workspace, tiny_model, straight):
    changes = {"max_steps": 60, "eval_steps": 2, "learning_rate": 1.0}
    expected = straight(tiny_model, **changes)
    stopped = json.loads(Path("straight/trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(EOFError):
        patch.setattr(train, "save_results", lambda *_: exec("raise EOFError"))
        run(tiny_model, **changes)
    trainer = run(tiny_model, **changes)
    assert trainer.state.global_step == stopped < 60
    assert same(final_weights(data.OUTPUT_DIR), expected)


def test_adapter_names_its_base_before_the_run_counts_as_finished(workspace, tiny_model):
    with pytest.raises(EOFError):
        args = arguments(tiny_model, train_lora.LoraArguments, **STEPS | {"max_steps": 1})
        train.run(args, train_lora.add_adapter, lambda args: exec("raise EOFError"))
    assert not Path(data.LORA_OUTPUT_DIR, inference.FINISHED_MARK).exists()


# ---- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "cls", "step", "changes"),
    [
        (signal.SIGTERM, train.TrainArguments, 13, {}),
        (signal.SIGINT, train_lora.LoraArguments, 7, {"gradient_accumulation_steps": 4}),
        (signal.SIGTERM, train.TrainArguments, 10, {"save_total_limit": 1}),  # an evaluation comes at this very step
        (signal.SIGTERM, train.TrainArguments, 20, {}),  # the last step
        (signal.SIGTERM, train.TrainArguments, 13, {"save_total_limit": 1}),
        (signal.SIGTERM, train.TrainArguments, 13, {"save_strategy": "no", "load_best_model_at_end": False}),
        # an evaluation that is not the best so far: of itself it saves nothing
        (signal.SIGTERM, train.TrainArguments, 10, {"save_strategy": "best", "greater_is_better": True}),
        # 27 steps an epoch: in the second one, and at the end of the first
        *(
            (signal.SIGTERM, train.TrainArguments, step, {"eval_strategy": "epoch", "max_steps": 32} | {"per": 4})
            for step in (29, 27)
        ),
    ],
)
def test_signal_saves_at_the_end_of_the_step_and_the_command_continues(
    workspace, tiny_model, straight, number, cls, step, changes, capfd, monkeypatch
):
    if changes.pop("per", 0):
        changes["per_device_train_batch_size"] = 4
    expected = straight(tiny_model, cls, **changes)
    capfd.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        at_step(patch, step, lambda: signal.raise_signal(number))
        run(tiny_model, cls, output_dir="resumed", **changes)
    out, err = capfd.readouterr()
    assert end.value.code == 128 + number == {15: 143, 2: 130}[number]
    assert f"已中断：第 {step} 步的检查点在 resumed；同一命令会从这里继续。" in err
    assert "【问题】" not in out and not (Path("resumed") / inference.FINISHED_MARK).exists()
    assert inference.find_checkpoints("resumed")[-1].name == f"checkpoint-{step}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer = run(tiny_model, cls, output_dir="resumed", **changes)
    evaluated = {log["step"] for log in trainer.state.log_history if "eval_loss" in log}
    assert (step in evaluated) == (step in (10, 20, 27)), evaluated  # when it is due, not because of the signal
    assert f"resumed from step {step}" in capfd.readouterr().out.splitlines()
    assert same(final_weights("resumed"), expected)
    assert len(inference.checkpoint_folders("resumed")) <= changes.get("save_total_limit", 2)


def test_second_ctrl_c_leaves_at_once(workspace, tiny_model, monkeypatch):
    at_step(monkeypatch, 7, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model)
    assert [path.name for path in inference.checkpoint_folders(data.OUTPUT_DIR)] == ["checkpoint-5"]


def test_a_signal_that_the_shell_ignores_is_ignored(workspace, tiny_model, monkeypatch):
    """As in `nohup python train.py &`, where Ctrl-C is meant for another command."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert run(tiny_model).state.global_step == 20
    finally:
        signal.signal(signal.SIGINT, before)


def torchrun(*flags, port: int) -> subprocess.Popen:
    command = [Path(sysconfig.get_path("scripts"), "torchrun"), "--nproc_per_node=2", f"--master_port={port}"]
    command += [ROOT / "train.py", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def test_two_processes_stop_at_the_same_step_when_one_gets_the_signal(workspace, tiny_model):
    flags = {"max_steps": 24, "eval_steps": 6, "logging_steps": 6, "sample_tokens": 2, "learning_rate": 1e-3}
    flags |= {"gradient_accumulation_steps": 1, "report_to": "none", "model_name": tiny_model, "disable_tqdm": True}
    flags = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    output = (process := torchrun(*flags, "--output_dir", "straight", port=29541)).communicate(timeout=200)[0]
    assert process.returncode == 0, output
    process = torchrun(*flags, "--output_dir", "resumed", port=29542)
    while not inference.find_checkpoints("resumed") and process.poll() is None:
        time.sleep(0.02)
    workers = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    [second] = [worker for worker in workers if worker.environ()["RANK"] == "1"]
    second.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert process.returncode != 0 and output.count("已中断：第") == 1, output
    stopped = inference.find_checkpoints("resumed")[-1].name[11:]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(f"resumed/checkpoint-{stopped}"))
    output = (process := torchrun(*flags, "--output_dir", "resumed", port=29543)).communicate(timeout=200)[0]
    assert process.returncode == 0 and f"resumed from step {stopped}" in output.splitlines(), output
    assert same(final_weights("resumed"), final_weights("straight"))


# ---- one run, one folder ------------------------------------------------------------------------------------------


def test_second_run_in_the_same_folder_is_refused_and_named_the_first(workspace, tiny_model):
    with train.hold_output_dir(arguments(tiny_model)):
        before = sorted(Path(data.OUTPUT_DIR).iterdir())
        result = run_script("train.py", "--model_name", tiny_model, "--report_to", "none", cwd=workspace)
        assert sorted(Path(data.OUTPUT_DIR).iterdir()) == before
    last = result.stdout.strip().splitlines()[-1]
    assert result.returncode == 1 and f"进程 {os.getpid()}，开始于 20" in last, result.stdout
    assert "--output_dir" in last
    with train.hold_output_dir(arguments(tiny_model)):  # free again
        pass
    assert list(Path(data.OUTPUT_DIR).iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 5e-4}, "learning_rate 0.001 -> 0.0005"),
        ({"max_steps": 24}, "max_steps 20 -> 24"),
        ({"gradient_accumulation_steps": 2}, "examples_per_step 4 -> 8"),
        ({"seed": 1, "max_length": 1000}, "max_length 2048 -> 1000，seed 42 -> 1"),
    ],
    ids=str,
)
def test_other_settings_do_not_continue_a_run(copies, tiny_model, changes, said):
    with pytest.raises(SystemExit, match=f"full 里未完成的训练用的是别的设置：{said}；.*--output_dir"):
        run(tiny_model, output_dir="full", **changes)
    assert choose(arguments(tiny_model, output_dir="full", **STEPS)) == "full/checkpoint-10"


def test_other_data_and_other_adapters_do_not_continue_a_run(copies, tiny_model):
    with pytest.raises(SystemExit, match="lora_rank 8 -> 4"):
        run(tiny_model, train_lora.LoraArguments, output_dir="lora", lora_rank=4)
    rows = Path("train.jsonl").read_text(encoding="utf-8").splitlines()
    Path("train.jsonl").write_text("\n".join(rows[1:]), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"别的设置：train.jsonl \(sha256\) \w+ -> \w+；"):
        run(tiny_model, output_dir="full")


@pytest.mark.parametrize("folder", ["full", "other"])
def test_a_checkpoint_that_is_named_is_checked_too(copies, tiny_model, folder):
    """By any path to it, and into any folder."""
    checkpoint = str(Path("full", "checkpoint-10").resolve())
    with pytest.raises(SystemExit, match="full 里未完成的训练用的是别的设置：learning_rate 0.001 -> 0.0005"):
        run(tiny_model, output_dir=folder, resume_from_checkpoint=checkpoint, learning_rate=5e-4)


def test_another_prompt_does_not_continue_a_run(copies, tiny_model, monkeypatch):
    monkeypatch.setattr(data, "SYSTEM_PROMPT", "你是医生。")
    with pytest.raises(SystemExit, match="别的设置：system_prompt 你是一个医学专家.* -> 你是医生。；"):
        run(tiny_model, output_dir="full")


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_settings_that_cannot_be_read_are_said_and_the_run_goes_on(copies, tiny_model, content, capsys):
    Path("full", inference.RUN_FILE).write_text(content, encoding="utf-8")
    assert choose(arguments(tiny_model, output_dir="full", **STEPS)) == "full/checkpoint-10"
    assert "full/run.json 无法读取" in capsys.readouterr().out


def test_the_plan_is_kept_when_a_run_continues(workspace, tiny_model, straight, monkeypatch):
    """Whatever memory is free then: passes of other sizes round otherwise, other optimizers have other states."""
    expected = straight(tiny_model, batch_tokens=130)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "make_plan", lambda *args, **kwargs: train.Plan(130, 0, False, "optim", {}, 1))
        at_step(patch, 13, lambda: signal.raise_signal(signal.SIGTERM))
        run(tiny_model)
    with pytest.raises(SystemExit, match="optimizer optim -> kahan"):
        run(tiny_model, optimizer="kahan")
    trainer = run(tiny_model)
    assert (trainer.args.batch_tokens, trainer.args.optimizer) == (130, "optim")
    assert same(final_weights(data.OUTPUT_DIR), expected)


def test_bfloat16_adapters_continue_as_bfloat16(workspace, tiny_model, straight, monkeypatch):
    """As on a GPU: peft would load them as float32."""
    monkeypatch.setattr(inference, "best_dtype", lambda device: torch.bfloat16)
    expected = Straight()(tiny_model, train_lora.LoraArguments)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 13, lambda: signal.raise_signal(signal.SIGTERM))
        run(tiny_model, train_lora.LoraArguments, output_dir="resumed")
    run(tiny_model, train_lora.LoraArguments, output_dir="resumed")
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16}
    assert same(final_weights("resumed"), expected)


def test_a_folder_with_checkpoints_of_another_program_is_left_alone(workspace, tiny_model):
    foreign = Path(data.OUTPUT_DIR, "checkpoint-1082", "model.safetensors")
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"weights")
    with pytest.raises(SystemExit, match="qwen3-medical 里有别的文件（checkpoint-1082 等）"):
        run(tiny_model)
    assert foreign.read_bytes() == b"weights"


def test_a_run_outside_the_main_thread_trains_without_the_signals(workspace, tiny_model):
    trainers = []
    thread = threading.Thread(target=lambda: trainers.append(run(tiny_model, report_to="swanlab", max_steps=5)))
    thread.start()
    thread.join()
    assert trainers[0].state.global_step == 5


def test_what_leaves_the_weights_alone_may_change(copies, tiny_model, straight):
    expected = straight(tiny_model)
    trainer = run(
        tiny_model,
        output_dir="full",
        logging_steps=2,
        save_total_limit=3,
        sample_tokens=2,
        gradient_checkpointing=False,
    )
    assert trainer.state.global_step == 20 and same(final_weights("full"), expected)


# ---- no room, no numbers ------------------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "limit"])
def fill(request, workspace):
    """fill() lets no more be written to the folder `disk`, free() does again: a real disk that is full; and where
    nothing can be mounted, the system's limit on the size of a file."""
    disk = workspace / "disk"
    disk.mkdir()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if request.param == "limit":
        yield (
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard)),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)),
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk]).returncode:
        pytest.skip("nothing can be mounted here")

    def fill_up():
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(free - 1_000_000))  # the next checkpoint begins, and breaks off

    yield fill_up, (disk / "filler").unlink
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("moment", ["checkpoint", "results"])
def test_full_disk_keeps_the_checkpoints_and_the_command_continues(
    workspace, tiny_model, straight, fill, moment, monkeypatch
):
    expected = straight(tiny_model)
    fill_up, free = fill
    with monkeypatch.context() as patch:
        if moment == "checkpoint":
            at_step(patch, 13, fill_up)
        else:
            save = train.save_results
            patch.setattr(train, "save_results", lambda *args: (fill_up(), save(*args)))
        with pytest.raises(SystemExit, match="^错误：写 disk/out.* 失败.*磁盘剩余.*同一命令继续"):
            run(tiny_model, output_dir="disk/out")
    free()
    whole = inference.checkpoint_folders("disk/out")
    last = {"checkpoint": ["checkpoint-5", "checkpoint-10"], "results": ["checkpoint-15", "checkpoint-20"]}[moment]
    assert [path.name for path in whole] == last and whole == inference.find_checkpoints("disk/out")
    run(tiny_model, output_dir="disk/out")
    assert same(final_weights("disk/out"), expected)


def test_a_checkpoint_that_is_named_does_not_enter_the_folder_of_another_run(copies, tiny_model):
    """It would take that run's best weights for its own, and delete its checkpoints."""
    with pytest.raises(SystemExit, match="lora 里有另一个未完成的训练；从 full/checkpoint-10 继续.*--output_dir"):
        run(tiny_model, output_dir="lora", resume_from_checkpoint="full/checkpoint-10")
    assert len(inference.find_checkpoints("lora")) == 2


def test_other_weights_and_another_precision_do_not_continue_a_run(copies, tiny_model, monkeypatch):
    shutil.copytree(tiny_model, "base")
    before = inference.weights_sha256("base")
    args = arguments(tiny_model, output_dir="full", **STEPS)
    settings = json.loads(Path("full", inference.RUN_FILE).read_text(encoding="utf-8"))
    assert settings["model_sha256"] == before and settings["dtype"] == "torch.float32"
    args.model_sha256 = "another"
    with pytest.raises(SystemExit, match=f"model_sha256 {before} -> another"):
        train.choose_checkpoint(args)
    monkeypatch.setattr(inference, "best_dtype", lambda device: torch.bfloat16)
    with pytest.raises(SystemExit, match="dtype torch.float32 -> torch.bfloat16"):
        run(tiny_model, output_dir="full")


def test_a_signal_is_saved_where_a_broken_checkpoint_of_that_step_lies(copies, tiny_model, monkeypatch):
    shutil.copytree("full/checkpoint-10", "full/checkpoint-13")
    Path("full/checkpoint-13", inference.MANIFEST).unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        at_step(patch, 13, lambda: signal.raise_signal(signal.SIGTERM))
        run(tiny_model, output_dir="full")
    assert inference.find_checkpoints("full")[-1].name == "checkpoint-13"


def test_a_signal_after_the_last_step_lets_the_results_be_saved(workspace, tiny_model, monkeypatch):
    """Nothing is left to interrupt, and without checkpoints all would be lost."""
    end = train.MedicalTrainer._finalize_training
    signalled = lambda self, *args: (signal.raise_signal(signal.SIGTERM), end(self, *args))[1]  # noqa: E731
    monkeypatch.setattr(train.MedicalTrainer, "_finalize_training", signalled)
    run(tiny_model, save_strategy="no", load_best_model_at_end=False, max_steps=4)
    assert Path(data.OUTPUT_DIR, inference.FINISHED_MARK).is_file()


@pytest.mark.parametrize("limit", [1, 2])
def test_too_little_room_is_said_before_training(workspace, tiny_model, limit):
    model = torch.nn.Linear(10**7, 10**7, bias=False, device="meta")  # 400 TB
    args = arguments(tiny_model, output_dir=".", optimizer="optim")
    state = train.transformers.TrainerState(max_steps=8, save_steps=2)
    # Three checkpoints, the best, the newest and the one being written, of weights and AdamW's two states, and the
    # final weights: (3 x 3 + 1) x 400 TB.
    with pytest.raises(
        SystemExit, match=r"磁盘剩余 [\d.]+ GB，3 个检查点和最后的权重还需要约 (3999|4000)\d{3}\.\d\d GB"
    ):
        train.check_space(args, state, model, limit)
    train.check_space(args, state, torch.nn.Linear(10, 10), limit)
    with pytest.raises(SystemExit, match="，4 个检查点和最后的权重"):  # no more than there will ever be
        train.check_space(args, state, model, 100)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"logging_steps": 1}, "(loss|grad_norm)"),
        ({"logging_steps": 100, "eval_steps": 3}, "eval_loss"),
        ({"logging_steps": 100, "eval_strategy": "no", "save_steps": 3}, "weights"),
        ({"logging_steps": 100, "eval_strategy": "no", "save_steps": 6, "max_steps": 8}, "weights"),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing_of_it(
    workspace, tiny_model, changes, what, monkeypatch
):
    class Ruined(train.MedicalTrainer):
        """Its learning rate goes astray at step 8."""

        def training_step(self, *args, **kwargs):
            if self.state.global_step == 7:
                for group in self.optimizer.param_groups:
                    group["lr"] = 1e38
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(train, "MedicalTrainer", Ruined)
    changes = {"eval_steps": 3} | changes
    with pytest.raises(SystemExit) as end:
        run(tiny_model, **changes)
    assert re.search(
        rf"到第 (8|9) 步 {what} 成了 (nan|inf)（学习率 .*好检查点：{data.OUTPUT_DIR}/checkpoint-6。", end.value.code
    )
    checkpoints = inference.checkpoint_folders(data.OUTPUT_DIR)
    assert checkpoints[-1].name == "checkpoint-6" and checkpoints == inference.find_checkpoints(data.OUTPUT_DIR)
    assert all(value.isfinite().all() for value in final_weights(checkpoints[-1]).values())
    assert not Path(data.OUTPUT_DIR, "model.safetensors").exists()


# ---- kill -9 ------------------------------------------------------------------------------------------------------

KILLS = int(os.environ.get("KILLS", "12"))  # each of full and LoRA
WRITING = ("w", "wb", "rb+")
RUN = {"max_steps": 60, "eval_steps": 6, "logging_steps": 6, "sample_tokens": 2, "learning_rate": 1e-3}
RUN |= {
    "gradient_accumulation_steps": 2,
    "report_to": "none",
    "model_name": "base",
    "disable_tqdm": True,
}  # 54 an epoch


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


def serve_kills(script: str, seed: int) -> None:
    """In a process that has imported all and forks for each run, as an import takes 8 s: one run that nothing touches,
    then KILLS killed ones, of which every second dies while it saves, until a run comes through. Prints what it saw."""
    import matplotlib.figure  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    module, place = {"train": train, "train_lora": train_lora}[script], random.Random(seed)

    def start(folder: str, prepare=lambda: None) -> int:
        if pid := os.fork():
            return pid
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        flags = [str(part) for name, value in RUN.items() for part in (f"--{name}", value)]
        sys.argv = [f"{script}.py", *flags, "--output_dir", folder]
        prepare()
        code = 1
        try:
            data.run_main(module.main)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)

    begun = time.monotonic()
    assert os.waitpid(start("straight"), 0)[1] == 0
    took = time.monotonic() - begun
    kills, saving, finished = 0, 0, 0
    while kills < KILLS or finished < 1:
        folder = f"killed-{finished}"
        aimed = kills % 2
        if kills == KILLS:
            pid = start(folder)
        elif aimed:
            number, delay = place.randrange(1, 40), place.choice([0, place.uniform(0, 0.03)])
            pid = start(folder, lambda: kill_while_saving(number, delay))  # noqa: B023
        else:
            pid = start(folder)
            time.sleep(place.uniform(0.2, 0.9) * took)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            whole = inference.find_checkpoints(folder)
            saving += len(whole) < len(inference.checkpoint_folders(folder))
            print(kills, "saving" if aimed else "time", [path.name for path in whole], flush=True)
            continue
        assert status == 0, Path("log.txt").read_text(encoding="utf-8")[-3000:]
        assert same(final_weights(folder), final_weights("straight")), folder
        finished += 1
    print(f"kills {kills}, of them in a half-written checkpoint {saving}, finished runs {finished}")
    assert saving >= 2


@pytest.mark.kills
@pytest.mark.parametrize("script", ["train", "train_lora"])
def test_killed_again_and_again_it_ends_with_the_same_weights(workspace, tiny_model, script):
    shutil.copytree(tiny_model, "base")
    seed = int(os.environ.get("KILLS_SEED", "0"))
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_interruptions; test_interruptions.serve_kills"
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"}
    result = subprocess.run([sys.executable, "-c", f"{code}({script!r}, {seed})"], env=env, capture_output=True)
    assert result.returncode == 0, (result.stdout + result.stderr).decode()[-5000:]
    print(result.stdout.decode())
    log = Path("log.txt").read_text(encoding="utf-8")
    assert "Traceback" not in log and log.count("resumed from step ") >= KILLS // 2
