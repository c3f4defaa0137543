"""What small cards need: 8-bit optimizer states (torchao), 4-bit weights (bitsandbytes). Both also run on a CPU."""

import gc
import importlib.util
import json
import shutil
import signal
import weakref

import pytest
import torch
from conftest import run_script
from test_interruptions import at_step
from test_train import arguments

import data
import inference
import train

FLAGS = ("--max_steps", "6", "--eval_steps", "3", "--logging_steps", "1", "--sample_tokens", "4")
FLAGS += ("--disable_tqdm", "true", "--report_to", "none", "--model_name")


def needs(library: str):
    there = importlib.util.find_spec(library) is not None
    return pytest.mark.skipif(not there, reason=f"{library} is optional and not installed; .ci/run has a run with it")


def losses(folder) -> list[float]:
    history = json.loads((folder / checkpoints.FINISHED_MARK).read_text(encoding="utf-8"))["log_history"]
    return [log["loss"] for log in history if "loss" in log]


def trainer_on(tiny_model, tokenizer, **changes):
    dataset, _ = data.load_dataset("train.jsonl", tokenizer, 2048)
    args = train.TrainArguments(report_to="none", disable_tqdm=True, logging_steps=1, **changes)
    model = models.load_weights(str(tiny_model), torch.device("cpu")).to(torch.bfloat16)
    return train.build_trainer(args, model, tokenizer, dataset, dataset)


@needs("torchao")
def test_states_of_few_bits_and_steps_in_the_backward_pass_follow_the_kahan_curve(workspace, tiny_model, tokenizer):
    curves = {}
    for optimizer in ("kahan", "8bit", "8bit_in_backward", "4bit_in_backward"):
        changes = {"optimizer": optimizer, "max_steps": 12, "eval_steps": 12, "output_dir": optimizer}
        trainer = trainer_on(tiny_model, tokenizer, learning_rate=1e-3, **changes)
        trainer.train()
        curves[optimizer] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        in_backward = optimizer.endswith("in_backward")
        assert (trainer.args.max_grad_norm == 0) == in_backward
        assert ("grad_norm" in trainer.state.log_history[0]) == (not in_backward)
    assert curves["kahan"][-1] < curves["kahan"][0] - 0.2
    for name, far in {"8bit": 0.003, "8bit_in_backward": 0.003, "4bit_in_backward": 0.01}.items():
        assert curves[name] == pytest.approx(curves["kahan"], rel=far), name


@needs("torchao")
@pytest.mark.parametrize(("optimizer", "bits"), [("8bit_in_backward", 8), ("4bit_in_backward", 4)])
def test_gradients_do_not_outlive_their_own_step(workspace, tiny_model, tokenizer, monkeypatch, optimizer, bits):
    monkeypatch.setattr(train, "STEP_WEIGHTS", 2**15)
    trainer = trainer_on(tiny_model, tokenizer, optimizer=optimizer, learning_rate=0.1)
    trainer.create_optimizer()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(100))
    assert all(p.grad is None for p in trainer.model.parameters())
    moved = [old != new for old, new in zip(before, trainer.model.parameters(), strict=True)]
    assert all(rows.any(dim=-1).all() for rows in moved)  # each row of each part
    parts = trainer.optimizer.state
    largest = max(parts, key=torch.numel)
    assert all(part.grad is None for part in parts)
    assert largest.numel() == (2**15 if bits == 4 else before[0].numel())
    assert parts[largest]["exp_avg"].codes.nbytes * 8 == largest.numel() * bits
    assert len(trainer.step_hooks) == len(before) == len([*trainer.model.parameters()])
    trainer.create_optimizer()  # as Trainer does again when --auto_find_batch_size tries anew
    assert len(trainer.step_hooks) == len(before)


@needs("torchao")
@pytest.mark.parametrize("optimizer", ["8bit", "4bit_in_backward"])
def test_training_with_states_of_few_bits_resumes_where_it_was(workspace, tiny_model, tokenizer, optimizer):
    changes = {"optimizer": optimizer, "max_steps": 4, "eval_steps": 2}
    straight = trainer_on(tiny_model, tokenizer, output_dir="run", **changes)
    straight.train()
    shutil.rmtree("run/checkpoint-4")
    resumed = trainer_on(tiny_model, tokenizer, output_dir="run", **changes)
    resumed.train(resume_from_checkpoint="run/checkpoint-2")
    assert resumed.state.global_step == 4
    states = [state["step"].item() for state in resumed.optimizer.optimizer.state.values()]
    assert set(states) == {4}
    assert all(map(torch.equal, straight.model.parameters(), resumed.model.parameters()))


@needs("torchao")
def test_training_with_steps_in_the_backward_pass_continues_and_frees_its_memory(workspace, tiny_model, monkeypatch):
    monkeypatch.setattr(inference, "best_dtype", lambda device: torch.bfloat16)
    changes = {"optimizer": "8bit_in_backward", "max_steps": 6, "eval_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        train.train(arguments(tiny_model, **changes))
    states = []
    create = packed_trainer.PackedTrainer.create_optimizer

    def watched(self, *args, **kwargs):
        optimizer = create(self, *args, **kwargs)
        states.append(weakref.ref(getattr(optimizer, "optimizer", optimizer)))
        return optimizer

    monkeypatch.setattr(packed_trainer.PackedTrainer, "create_optimizer", watched)
    monkeypatch.setattr(train, "answer_samples", lambda *_: gc.collect() * [] or states.append(states[0]()) or [])
    trainer = train.train(arguments(tiny_model, **changes))
    assert trainer.state.global_step == 6 and states[1] is None


@needs("torchao")
def test_several_processes_cannot_step_in_the_backward_pass(workspace, tiny_model, monkeypatch):
    """Each would step on its own gradients, before they are added up."""
    args = train.TrainArguments(report_to="none", optimizer="8bit_in_backward")
    monkeypatch.setattr(train.TrainArguments, "world_size", 2)
    with pytest.raises(SystemExit, match="只用一张 GPU"):
        memory_plan.choose(args, models.load_weights(str(tiny_model), torch.device("cpu")), [100] * 8, False, 1e9)


@needs("bitsandbytes")
def test_qlora_trains_an_adapter_that_the_plain_model_can_use(workspace, tiny_model):
    result = run_script("train_lora.py", *FLAGS, tiny_model, "--load_in_4bit", "true", cwd=workspace)
    assert result.returncode == 0, result.stdout
    curve = losses(workspace / "output" / "qwen3-medical-lora")
    assert len(curve) == 6 and all(0 < loss < 20 for loss in curve)
    asked = run_script("inference_lora.py", "头痛？", "--max_new_tokens", 4, cwd=workspace)
    assert asked.returncode == 0, asked.stdout


@needs("bitsandbytes")
def test_qlora_weights_take_a_third_of_the_memory(tiny_model):
    plain, small = (models.load_weights(str(tiny_model), torch.device("cpu"), bits) for bits in (False, True))
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (plain, small)]
    assert weights[1].nbytes * 8 == weights[0].nbytes  # float32 against 4 bits


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="is about its absence")
def test_without_bitsandbytes_it_says_what_to_install(workspace, tiny_model):
    result = run_script("train_lora.py", *FLAGS, tiny_model, "--load_in_4bit", "true", cwd=workspace)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "错误：--load_in_4bit 要用 bitsandbytes；请先运行 pip install bitsandbytes"


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="is about its absence")
def test_without_torchao_it_says_what_to_install(workspace, tiny_model, tokenizer):
    with pytest.raises(SystemExit, match="^错误：--optimizer 8bit 要用 torchao；请先运行 pip install torchao$"):
        trainer_on(tiny_model, tokenizer, optimizer="8bit")
