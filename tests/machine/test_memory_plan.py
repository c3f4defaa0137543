"""The plan: the first rung of the ladder that fits, what the command line says obeyed."""

import contextlib
import importlib
import weakref
from types import SimpleNamespace

import pytest
import rich.cells
import torch
import transformers
from helpers import SMALL, build_model, card_arguments, on_meta

import train_lora
from parts.machine import memory
from parts.machine import plan as memory_plan


def test_inputs_of_layers_in_the_cpus_memory_change_no_gradient(monkeypatch):
    """The CPU's memory stands for a GPU's here, and copies of tensors for those that would be moved out of it."""
    moved, inputs = [], []
    to_cpu = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: moved.append(tensor.shape) or tensor.clone(), torch.clone
    )
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", lambda **_: to_cpu)
    gradients, ids = {}, torch.arange(64)[None]
    model = build_model(torch.float32, 2, SMALL)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    for offload in (False, True):
        model.zero_grad()
        inputs.clear()
        memory_plan.apply(memory_plan.Plan(64, 1, offload, "kahan", {}, 0), model)
        output = model.model(input_ids=ids, position_ids=ids, lengths=(64,), use_cache=False).last_hidden_state
        alive = [storage() is not None for storage in inputs]
        assert alive == [not offload] * 2
        output.square().sum().backward()
        gradients[offload] = [p.grad.clone() for p in model.model.parameters()]
    assert [shape for shape in moved if shape.numel()] == [(1, 64, 128)] * 2  # before torch 2.13 an empty tensor, too
    assert all(torch.equal(*pair) for pair in zip(*gradients.values()))


def make_plan(args, model, lengths):
    return memory_plan.choose(args, model, lengths, True, memory.free(args, model))[0]


LENGTHS = [700] * 50 + [2048] * 4


@pytest.mark.parametrize(
    ("memory", "most", "every", "offload", "optimizer"),
    [
        (140, 8192, 0, False, "kahan"),
        (32, 4096, 0, False, "kahan"),
        (24, 2048, 0, False, "kahan"),
        (12, 8192, 1, False, "8bit_in_backward"),
        (10, 8192, 1, True, "8bit_in_backward"),
    ],
)
def test_each_card_gets_the_fastest_plan_that_fits(monkeypatch, memory, most, every, offload, optimizer):
    """Without torchao, which is asked for only where nothing else fits."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan = make_plan(card_arguments(memory_gb=memory), on_meta(), LENGTHS)
    assert plan.total <= memory * 1e9
    assert plan[:4] == (most, every, offload, optimizer)


def test_less_memory_never_gives_a_larger_plan():
    plans = [make_plan(card_arguments(memory_gb=size), on_meta(), LENGTHS) for size in range(6, 60, 2)]
    fitting = [plan for plan, size in zip(plans, range(6, 60, 2)) if plan.total <= size * 1e9]
    assert [plan.total for plan in fitting] == sorted(plan.total for plan in fitting)
    assert len(fitting) > 20 and fitting[0].total < fitting[-1].total


def test_a_plan_that_turns_out_too_large_can_give_way_to_smaller_ones():
    plans = memory_plan.choose(card_arguments(memory_gb=24), on_meta(), LENGTHS, True, 23.5e9)
    assert all(plan.fits for plan in plans) and plans[0].batch_tokens == 2048
    assert any(plan.total < plans[0].total / 2 for plan in plans)
    [smallest] = memory_plan.choose(card_arguments(memory_gb=3), on_meta(), LENGTHS, True, 2.5e9)
    assert smallest.total == min(plan.total for plan in plans)


def test_a_plan_without_recomputing_takes_back_that_of_an_earlier_one():
    model = build_model(torch.float32, 2, SMALL)
    for every in (1, 0):
        memory_plan.apply(memory_plan.Plan(64, every, False, "kahan", {}, 0), model)
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [bool(every)] * 2


def test_lora_fits_where_full_training_does_not():
    args = card_arguments(True, memory_gb=5)
    lora = make_plan(args, train_lora.add_adapter(on_meta(), args), LENGTHS)
    assert lora.total <= 5e9 < make_plan(card_arguments(memory_gb=5), on_meta(), LENGTHS).total
    assert lora.optimizer == "kahan"


def test_flags_are_obeyed():
    flags = {"batch_tokens": 4096, "checkpoint_every": 2, "optimizer": "8bit"}
    for offload in (False, True):
        args = card_arguments(memory_gb=140, **flags)
        args.offload_activations = offload
        assert make_plan(args, on_meta(), LENGTHS)[:4] == (4096, 2, offload, "8bit")


def test_steps_in_the_backward_pass_need_the_whole_step_at_once():
    args = card_arguments(optimizer="8bit_in_backward", gradient_accumulation_steps=4, memory_gb=12)
    with pytest.raises(SystemExit, match="8bit_in_backward 要一个进程把一步的样本一次算完"):
        make_plan(args, on_meta(), LENGTHS)


def test_a_plan_that_may_not_fit_says_so():
    args = card_arguments(memory_gb=3)
    plan = make_plan(args, on_meta(), LENGTHS)
    text = memory_plan.describe(plan, "显存")
    assert "可能放不下" in text and "合计（估算）" in text
    assert "可能放不下" not in memory_plan.describe(plan._replace(free=1e12), "显存")


@pytest.mark.parametrize("memory", [10, 12, 16, 24, 140])
def test_the_plan_fits_a_terminal(memory):
    args = card_arguments(memory_gb=memory)
    text = memory_plan.describe(make_plan(args, on_meta(), LENGTHS), "显存")
    assert max(map(rich.cells.cell_len, text.splitlines())) <= 80
    assert ("输入放内存" in text) == (memory < 12)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_limit_on_memory_does_not_outlive_a_training(monkeypatch, error):
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with pytest.raises(error) if error else contextlib.nullcontext(), memory_plan.limited(torch.device("cuda")):
        if error:
            raise error
    with memory_plan.limited(torch.device("cpu")):
        pass
    assert fractions == [1.0]


@pytest.mark.parametrize("kind", ["npu", "mps"])
def test_other_devices_are_planned_without_what_wants_cuda(kind):
    """With Kahan sums for bfloat16, without 8 bits and without inputs in the CPU's memory."""
    args = card_arguments()
    args.device = SimpleNamespace(type=kind)
    found = memory_plan.rungs(args, build_model(layers=1, shape=SMALL), 8192, 2048, None, None)
    assert {name for *_, name in found} == {"kahan"} and not any(offload for _, _, offload, _ in found)
    assert len(found) > 4
