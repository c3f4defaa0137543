"""One run, one folder: a second one is refused, another one does not continue it, a finished one is kept."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    STEPS,
    At,
    arguments,
    contents,
    continues_from,
    crash,
    refused,
    run,
    run_script,
    run_steps,
    same,
    weights,
)

import data
import train
from parts.run import checkpoints
from parts.run import folder as run_folder


def test_second_run_in_the_same_folder_is_refused_and_named_the_first(workspace, tiny_model):
    with run_folder.opened(data.OUTPUT_DIR, False, str(tiny_model)):
        before = sorted(Path(data.OUTPUT_DIR).iterdir())
        result = run_script("train.py", "--model_name", tiny_model, "--report_to", "none", cwd=workspace)
        assert sorted(Path(data.OUTPUT_DIR).iterdir()) == before
    last = result.stdout.strip().splitlines()[-1]
    assert result.returncode == 1 and f"进程 {os.getpid()}，开始于 20" in last, result.stdout
    assert "--output_dir" in last
    with run_folder.opened(data.OUTPUT_DIR, False, str(tiny_model)):  # free again
        pass
    assert list(Path(data.OUTPUT_DIR).iterdir()) == []


CHANGES = [
    ({"learning_rate": 5e-4}, "learning_rate 0.001 -> 0.0005"),
    ({"gradient_accumulation_steps": 2}, "examples_per_step 4 -> 8"),
    ({"seed": 1, "max_length": 1000}, "max_length 2048 -> 1000，seed 42 -> 1"),
]


@pytest.mark.parametrize(("changes", "said"), CHANGES, ids=str)
def test_other_settings_do_not_continue_a_run(interrupted, tiny_model, changes, said):
    with pytest.raises(SystemExit, match=f"full 里未完成的训练用的是别的设置：{said}；.*--output_dir"):
        run_steps(tiny_model, output_dir="full", **changes)
    assert continues_from(arguments(tiny_model, output_dir="full", **STEPS)) == "full/checkpoint-10"


def test_other_data_prompts_and_adapters_do_not_continue_a_run(interrupted, tiny_model, monkeypatch):
    with pytest.raises(SystemExit, match="lora_rank 8 -> 4"):
        run_steps(tiny_model, True, output_dir="lora", lora_rank=4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="system_prompt 你是一个.* -> 你是医生。；"):
        patch.setattr(data, "SYSTEM_PROMPT", "你是医生。")
        run_steps(tiny_model, output_dir="full")
    rows = Path("train.jsonl").read_text(encoding="utf-8").splitlines()
    Path("train.jsonl").write_text("\n".join(rows[1:]), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"别的设置：train_file \(sha256\) \w+ -> \w+；"):
        run_steps(tiny_model, output_dir="full")


def test_the_same_content_by_another_name_continues_a_run(interrupted, tiny_model):
    shutil.copytree(tiny_model, "moved")
    shutil.copy("val.jsonl", "copy.jsonl")
    names = {"train_file": "./train.jsonl", "val_file": "copy.jsonl", "output_dir": "full"}
    assert continues_from(arguments("moved", **names, **STEPS)) == "full/checkpoint-10"
    with pytest.raises(SystemExit, match=r"设置：val_file \(sha256\) \w+ -> \w+；"):
        continues_from(arguments("moved", **names | {"val_file": "train.jsonl"}, **STEPS))


@pytest.mark.parametrize(("into", "said"), [("full", "full .*设置"), ("other", "full .*设置"), ("lora", "lora .*另一")])
def test_a_checkpoint_that_is_named_is_checked_too(interrupted, tiny_model, into, said):
    """By any path to it. In the folder of another run it would take that one's best weights for its own, and delete its
    checkpoints."""
    checkpoint = str(Path("full", "checkpoint-10").resolve())
    with pytest.raises(SystemExit, match=f"{said}.*--output_dir"):
        run_steps(tiny_model, output_dir=into, resume_from_checkpoint=checkpoint, learning_rate=5e-4)
    assert len(checkpoints.find_intact("lora")) == 2


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_settings_that_cannot_be_read_are_said_and_the_run_goes_on(interrupted, tiny_model, content, capsys):
    Path("full", checkpoints.RUN_FILE).write_text(content, encoding="utf-8")
    assert continues_from(arguments(tiny_model, output_dir="full", **STEPS)) == "full/checkpoint-10"
    assert "full/run.json 无法读取" in capsys.readouterr().out


def test_the_plan_is_kept_when_a_run_continues(workspace, tiny_model, straight):
    """Whatever memory is free then: passes of other sizes round otherwise, other optimizers have other states."""
    with pytest.raises(EOFError):
        run_steps(tiny_model, callbacks=[At(8, crash)], batch_tokens=130, max_steps=10)
    with pytest.raises(SystemExit, match="optimizer adamw -> kahan"):
        run_steps(tiny_model, optimizer="kahan", max_steps=10)
    trainer = run_steps(tiny_model, max_steps=10)
    assert (trainer.plan.batch_tokens, trainer.plan.optimizer) == (130, "adamw")
    assert same(weights(data.OUTPUT_DIR), straight(batch_tokens=130, max_steps=10))


def test_what_leaves_the_weights_alone_may_change(interrupted, tiny_model, straight):
    expected = straight()
    changes = {"logging_steps": 2, "save_total_limit": 3, "sample_tokens": 2, "checkpoint_every": 0}
    trainer = run_steps(tiny_model, output_dir="full", **changes)
    assert trainer.state.global_step == 20 and same(weights("full"), expected)


def test_other_weights_and_another_precision_do_not_continue_a_run(interrupted, tiny_model, monkeypatch):
    before = checkpoints.weights_sha256(tiny_model)
    settings = json.loads(Path("full", checkpoints.RUN_FILE).read_text(encoding="utf-8"))
    assert settings["model_sha256"] == before and settings["dtype"] == "torch.float32"
    shutil.copytree(tiny_model, "base")
    path = Path("base/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    settings["model_name"] = "base"
    Path("full", checkpoints.RUN_FILE).write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"别的设置：model_sha256 {before} -> {checkpoints.weights_sha256('base')}；"):
        run_steps("base", output_dir="full")
    shutil.copy(tiny_model / "model.safetensors", "base")
    monkeypatch.setattr("parts.model.weights.best_dtype", lambda device: torch.bfloat16)
    with pytest.raises(SystemExit, match="dtype torch.float32 -> torch.bfloat16"):
        run_steps("base", output_dir="full")


def test_a_folder_with_anything_but_a_run_is_not_written_into(finished, tiny_model):
    shutil.copytree(tiny_model, "base")
    Path("foreign/checkpoint-1082").mkdir(parents=True)  # another program's
    before = contents(finished)
    for folder in ("base", "foreign", "."):
        refused(
            f"{folder} 里有别的文件（~--output_dir~", run_folder.refuse_folder, Path(folder), False, "no model", None
        )
    assert contents(finished) == before


def test_a_finished_run_is_given_up_only_when_training_can_start(finished, tiny_model):
    before = contents(finished)
    args = arguments(Path("no model"), output_dir="full", overwrite_output_dir=True)
    refused("找不到模型 no model：~", train.train, args)
    assert contents(finished) == before


def test_a_checkpoint_that_is_named_is_not_passed_over(finished, tiny_model):
    changes = {"resume_from_checkpoint": "full/checkpoint-2", "output_dir": "lora", "overwrite_output_dir": True}
    refused("lora 里的训练已经完成；~full/checkpoint-2~--output_dir~", run, tiny_model, **changes)
    Path("full/checkpoint-2", checkpoints.MANIFEST).unlink()
    message = "--resume_from_checkpoint full/checkpoint-2 不是完整的检查点（~缺少 manifest.json~"
    refused(message, run_folder.choose_checkpoint, Path("new"), "full/checkpoint-2")


@pytest.mark.parametrize(("name", "base"), [("full", "--model_name full"), ("lora", "--adapter lora")])
def test_a_finished_run_names_the_way_to_train_on(finished, tiny_model, name, base):
    message = f"{name} 里训练完的模型用的是别的设置：max_steps 2 -> 4；~{base} --output_dir <新文件夹>。"
    changes = {"output_dir": "more", "max_steps": 4, "resume_from_checkpoint": f"{name}/checkpoint-2"}
    refused(message, run, tiny_model, name == "lora", **changes)


@pytest.mark.parametrize("base", ["full", "full/checkpoint-2"])
def test_a_base_is_not_overwritten_by_its_own_training(finished, base):
    before = contents(Path("full"))
    refused(f"--model_name {base} 在 --output_dir full 里~", run, base, output_dir="full", overwrite_output_dir=True)
    assert contents(Path("full")) == before


def test_a_run_with_an_optimizer_that_is_no_more_is_not_continued(interrupted, tiny_model):
    path = Path("full", checkpoints.RUN_FILE)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"optimizer": "4bit_in_backward"}))
    refused("~--optimizer 4bit_in_backward~不再支持~--output_dir~", run_steps, tiny_model, output_dir="full")


def test_a_renamed_checkpoint_is_continued_from(interrupted, tiny_model, capsys):
    shutil.copytree("full/checkpoint-10", "backup/of monday")
    trainer = run_steps(tiny_model, output_dir="new", resume_from_checkpoint="backup/of monday")
    assert trainer.state.global_step == 20 and "resumed from step of monday" in capsys.readouterr().out


def test_the_results_are_on_the_disk_before_the_mark(folder, monkeypatch):
    """Else power that ends would leave a finished run whose weights are gone, and checkpoints that nobody asks."""
    synced = []
    monkeypatch.setattr(checkpoints, "flush_to_disk", lambda path, like: synced.append((path.name, mark.exists())))
    mark = Path(checkpoints.FINISHED_MARK)
    with run_folder.Run(".").finishing(transformers.TrainerState()):
        Path("model.safetensors").touch()
    assert synced == [("model.safetensors", False)] and mark.exists()
