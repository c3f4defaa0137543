"""The worst step is tried before anything is written; it leaves no trace, and a plan that is too large gives
way."""

import math
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import At, build_trainer, crash, losses, refused, run, run_steps, same, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from parts.machine import kernels, plan, rehearsal
from parts.model import fused
from parts.training.packing import lengths_of
from parts.training.trainer import PackedTrainer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_weights_and_losses_are_the_same_bit_for_bit_with_and_without_it(workspace, tiny_model, lora):
    """With dropout, whose masks are drawn from the state that the rehearsal has to put back."""
    plain, rehearsed = (run_steps(tiny_model, lora, rehearse=flag, output_dir=f"run{flag}") for flag in (False, True))
    assert same(weights("runFalse"), weights("runTrue")) and losses(plain) == losses(rehearsed)


def test_it_says_what_fits_and_how_long_it_takes(workspace, tiny_model, tokenizer, capsys):
    trainer = build_trainer(tiny_model, tokenizer, rehearse=True)
    lengths = sorted(lengths_of(trainer.train_dataset))
    assert f"最大的一步（{sum(lengths[-4:])} 个 token）" in capsys.readouterr().out
    assert all(p.grad is None for p in trainer.model.parameters()) and trainer.last_hidden is None
    assert trainer.window_start is None and trainer.optimizer is None


@pytest.mark.parametrize("length", [{"max_steps": 54}, {"max_steps": -1, "num_train_epochs": 2}])
def test_the_time_is_that_of_all_steps_and_evaluations(workspace, tiny_model, tokenizer, length):
    """And of saving, a twentieth."""
    trainer = build_trainer(tiny_model, tokenizer, eval_steps=27, **length)  # 27 steps of 4 are all 108 rows
    assert rehearsal.seconds_of_run(trainer, 5.0, 30.0) == pytest.approx(1.05 * (54 * 5 + 2 * 30))


@pytest.mark.parametrize("promised", [1e12, 1.0])
def test_after_20_steps_it_is_said_where_they_are_much_slower(workspace, tiny_model, monkeypatch, capsys, promised):
    monkeypatch.setattr(PackedTrainer, "promised", promised)
    run_steps(tiny_model, max_steps=40, logging_steps=10)
    assert capsys.readouterr().out.count("提示：速度只有预演的 0%；") == (promised > 1)


class Card(TorchDispatchMode):
    """A card for the CPU: counts the bytes of all tensors that are made while it is on, and has no more than
    `size`."""

    def __init__(self, size: float = math.inf):
        super().__init__()
        self.size, self.held, self.peak, self.known = size, 0, 0, set()

    def free(self, key: int, size: int) -> None:
        self.held -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.known:
                self.known.add(id(storage))
                self.held += storage.nbytes()
                weakref.finalize(storage, self.free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.held)
        if self.held > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result


def test_on_a_card_that_is_too_small_a_smaller_plan_is_found_by_itself(workspace, tiny_model, tokenizer, capsys):
    trainer = build_trainer(tiny_model, tokenizer, rehearse=True)
    plans, peaks = [], []
    for tokens, every, total in ((600, 0, 3.0), (130, 0, 2.0), (130, 1, 1.0)):
        plans.append(plan.Plan(tokens, every, False, "adamw", {"优化器": 0.0, "一步之内": total}, 4.0))
        with Card() as card:
            rehearsal.settle(trainer, plans[-1:])
        peaks.append(card.peak)
    assert peaks[0] > 1.2 * peaks[1] > 1.2 * peaks[2]
    capsys.readouterr()
    with Card((peaks[1] + peaks[2]) / 2):
        rehearsal.settle(trainer, plans)
    printed = capsys.readouterr().out
    assert printed.count("不足，放不下这个方案；换一个更小的。") == 2 and "都放得下" in printed
    assert trainer.plan == plans[2]
    assert all(layer.gradient_checkpointing for layer in trainer.model.get_decoder().layers)


def test_what_the_failed_step_held_is_free_before_the_next_is_tried(workspace, tiny_model, tokenizer):
    trainer = build_trainer(tiny_model, tokenizer, rehearse=True)
    held = []
    with Card(2_000_000) as card:
        for _ in range(2):
            assert rehearsal.rehearse(trainer) is None
            held.append(card.held)
    assert held[0] < 500_000 and abs(held[1] - held[0]) < 1000, held


def test_a_card_too_small_for_every_plan_ends_in_one_sentence_and_writes_nothing(workspace, tiny_model, monkeypatch):
    monkeypatch.setattr(rehearsal, "measure", measure := Mock(side_effect=torch.OutOfMemoryError("out of memory")))
    refused(train.OUT_OF_MEMORY.removeprefix("错误："), run, tiny_model, rehearse=True)
    assert not any(Path("output/qwen3-medical").iterdir())
    # Other errors of the step are not taken for memory.
    measure.side_effect = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tiny_model, rehearse=True)


def test_a_run_that_continues_changes_only_what_leaves_the_weights(workspace, tiny_model, monkeypatch, straight):
    """Its passes and its optimizer stay, also where the rehearsal finds the card smaller than before."""
    with pytest.raises(EOFError):
        run_steps(tiny_model, callbacks=[At(13, crash)], rehearse=True)
    tried, measure = [], rehearsal.measure

    def small(trainer):
        tried.append(trainer.plan)
        if not trainer.plan.checkpoint_every:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(trainer)

    monkeypatch.setattr(rehearsal, "measure", small)
    trainer = run_steps(tiny_model, rehearse=True)
    assert len(tried) > 1 and len({(one.batch_tokens, one.optimizer) for one in tried}) == 1
    assert trainer.plan.checkpoint_every and same(weights("output/qwen3-medical"), straight())


def test_plans_whose_optimizer_does_not_run_here_are_left_out(workspace, tiny_model, tokenizer, monkeypatch, capsys):
    """As where torchao is installed, but no compiler."""
    trainer = build_trainer(tiny_model, tokenizer)
    monkeypatch.setattr(kernels, "try_step", lambda name, device: fused.Verdict(False, fused.COMPILER))
    kahan, *eight = (trainer.plan._replace(optimizer=name) for name in ("kahan", "8bit", "8bit_in_backward"))
    rehearsal.settle(trainer, [*eight, kahan])
    assert trainer.plan == kahan
    assert capsys.readouterr().out.count(f"8 位优化器在这里用不了：{fused.COMPILER}。") == 1
    refused(f"~都需要 8 位优化器（8bit）~{fused.COMPILER}。", rehearsal.settle, trainer, eight)
