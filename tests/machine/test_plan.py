"""The plan: its arithmetic against what autograd really keeps, and the first rung of the ladder that fits,
what the command line says obeyed."""

import importlib
import weakref
from types import SimpleNamespace

import pytest
import rich.cells
import torch
import transformers
from helpers import QWEN, SMALL, build_model, card_arguments, on_meta, refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import train_lora
from parts.machine import plan
from parts.training.packing import LinearCrossEntropy

LENGTHS = [700] * 50 + [2048] * 4

# ---- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_keeps_the_bytes_that_the_plan_counts(dtype, kind):
    shape = {name: size for name, size in SMALL.items() if kind == "Qwen3" or name != "head_dim"}
    one, two = (build_model(dtype, layers, shape, kind) for layers in (1, 2))
    assert plan.layer_bytes(two, False, 0) == pytest.approx(bytes_kept(two) - bytes_kept(one), rel=0.01)


def bytes_kept(model) -> float:
    """A token, for the backward pass, as autograd tells."""
    weights, stores = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stores[storage.data_ptr()] = storage
        return tensor

    ids, positions = torch.zeros(1, 256, dtype=torch.long), torch.arange(256)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.get_decoder()(input_ids=ids, position_ids=positions, lengths=(128, 128), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in stores.values()) / 256


def test_a_float32_adapter_on_float16_keeps_the_bytes_that_the_plan_counts():
    """Each has an input of its own, and autocast's copies of its weights."""
    args, kept, copied = card_arguments(True, bfloat16=False, lora_dropout=0.0), [], []
    for layers in (1, 2):
        model = train_lora.add_adapter(build_model(torch.float16, layers, SMALL), args)
        with torch.autocast("cpu", torch.float16):
            kept.append(bytes_kept(model))
        copied.append(sum(p.numel() for p in model.parameters() if p.requires_grad) * 2 / 256)
    layer = plan.layer_bytes(model, False, 0) + copied[1] - copied[0]
    assert layer == pytest.approx(kept[1] - kept[0], rel=0.01)


# The account below adds the two gradients of a tied embedding out of place, which autograd does to such
# tensors alone: with a small vocabulary that matters little.
FEW_WORDS = QWEN | {"vocab_size": 32768}
UNTIED = QWEN | {"tie_word_embeddings": False}


def peak(layers: int, tokens: int, every: int, optimizer: str, shape: dict) -> float:
    """Bytes that weights, gradients and activations of Qwen3-1.7B's layers take at most in a forward and
    backward pass: torch's own account of the real operations, on tensors without storage."""
    with FakeTensorMode():
        model = build_model(layers=layers, shape=shape)
        for weight in model.parameters():
            if optimizer.endswith("in_backward"):
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        plan.apply(plan.Plan(tokens, every, False, "kahan", {}, 0), model)
        ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            output = model.model(input_ids=ids, position_ids=positions, lengths=(tokens // 4,) * 4, use_cache=False)
            LinearCrossEntropy.apply(output.last_hidden_state[0], model.lm_head.weight, ids[0])[0].backward()
            [snapshot] = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"]


PEAKS = [(4, 2048, 0, "kahan", FEW_WORDS), (8, 8192, 4, "kahan", FEW_WORDS), (4, 8192, 3, "kahan", FEW_WORDS)]
PEAKS += [(8, 8192, 1, "8bit_in_backward", FEW_WORDS), (2, 2048, 1, "8bit_in_backward", UNTIED)]


@pytest.mark.parametrize(("layers", "tokens", "every", "optimizer", "shape"), PEAKS)
def test_the_estimate_is_never_below_the_peak_and_at_most_15_percent_above(layers, tokens, every, optimizer, shape):
    model = on_meta(layers=layers, shape=shape)
    estimate = plan.estimate(model, card_arguments(), False, tokens, every, False, optimizer, tokens)
    counted = peak(layers, tokens, every, optimizer, shape) + estimate["优化器"]
    assert counted <= sum(estimate.values()) <= 1.15 * counted


def test_repeated_heads_are_counted_where_flash_is_missing(monkeypatch):
    model = on_meta(layers=1)
    grouped = plan.layer_bytes(model, True, 0)
    monkeypatch.setattr(plan, "repeats_heads", lambda device, dtype: True)
    assert plan.layer_bytes(model, True, 0) - grouped == 2 * 2 * 8 * 128  # keys and values, bfloat16, 8 more heads


def test_all_logits_and_the_copies_of_other_processes_are_counted():
    def peak_bytes(world_size: int = 1, **changes) -> float:
        args = card_arguments(**changes)
        args.world_size = world_size
        return plan.estimate(on_meta(), args, False, 2048, 1, False, "kahan", 8192)["一步之内"]

    assert peak_bytes(full_logits=True) - peak_bytes() > 0.8 * 14 * 2048 * 151936
    assert peak_bytes(world_size=2) - peak_bytes() == pytest.approx(2 * on_meta().num_parameters(), rel=0.01)


# ---- what is free -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "memory_gb", "free"),
    [("npu", 20, 7e9), ("npu", None, 7e9), ("npu", 5, 5e9 - plan.DRIVER_BYTES), ("mps", None, 5e9), ("cpu", None, 5e9)],
)
def test_no_more_is_planned_with_than_is_free_on_the_device(monkeypatch, kind, memory_gb, free):
    """An NPU has memory of its own; Apple's chips share the CPU's, in which the model is already."""
    npu = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda: (6e9, 24e9), memory_reserved=lambda: 1e9)
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=3e9))
    model = SimpleNamespace(get_memory_footprint=lambda: 2e9)
    assert plan.free_bytes(SimpleNamespace(type=kind), model, memory_gb) == free


@pytest.mark.parametrize(("largest", "said"), [(24e9, "（24.0、12.0 GB），都按最少的规划。"), (12.1e9, "")])
def test_cards_of_different_size_all_get_the_smallest_ones_plan(monkeypatch, capsys, largest, said):
    monkeypatch.setattr(plan.accelerate.utils, "gather_object", lambda _: [largest, 12e9])
    assert plan.free_bytes(torch.device("cuda"), None, None) == 12e9
    assert capsys.readouterr().out.strip().endswith(said)


# ---- the ladder ---------------------------------------------------------------------------------------------------


def plans_of(lora: bool = False, **flags) -> list[plan.Plan]:
    """The plans of Qwen3-1.7B on a card with these flags."""
    args = card_arguments(lora, **flags)
    model = train_lora.add_adapter(on_meta(), args) if lora else on_meta()
    return plan.choose(args, model, LENGTHS, True, plan.free_bytes(args.device, model, args.memory_gb))


CARDS = [(140, 8192, 0, False, "kahan"), (32, 4096, 0, False, "kahan"), (24, 2048, 0, False, "kahan")]
CARDS += [(12, 8192, 1, False, "8bit_in_backward"), (10, 8192, 1, True, "8bit_in_backward")]


@pytest.mark.parametrize(("memory_gb", "tokens", "every", "offload", "optimizer"), CARDS)
def test_each_card_gets_the_fastest_plan_that_fits(monkeypatch, memory_gb, tokens, every, offload, optimizer):
    """Without torchao, which is asked for only where nothing else fits. Its table fits a terminal."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fastest, *_ = plans_of(memory_gb=memory_gb)
    assert fastest.total <= memory_gb * 1e9
    assert fastest[:4] == (tokens, every, offload, optimizer)
    text = plan.describe(fastest, "显存")
    assert max(map(rich.cells.cell_len, text.splitlines())) <= 80
    assert ("输入放内存" in text) == offload


def test_less_memory_never_gives_a_larger_plan():
    fastest = [plans_of(memory_gb=size)[0] for size in range(6, 60, 2)]
    totals = [one.total for one in fastest if one.fits]
    assert totals == sorted(totals) and len(totals) > 20 and totals[0] < totals[-1]


def test_a_plan_that_turns_out_too_large_can_give_way_to_smaller_ones():
    plans = plans_of(memory_gb=24)
    assert all(one.fits for one in plans) and plans[0].batch_tokens == 2048
    assert any(one.total < plans[0].total / 2 for one in plans)
    [smallest] = plans_of(memory_gb=3)
    assert smallest.total == min(one.total for one in plans)
    assert "可能放不下" in plan.describe(smallest, "显存") and "可能放不下" not in plan.describe(plans[0], "显存")


def test_lora_fits_where_full_training_does_not():
    [lora, *_], [full] = plans_of(lora=True, memory_gb=5), plans_of(memory_gb=5)
    assert lora.total <= 5e9 < full.total and lora.optimizer == "kahan"


def test_flags_are_obeyed():
    args = card_arguments(batch_tokens=4096, checkpoint_every=2, optimizer="8bit")
    for args.offload_activations in (False, True):
        expected = (4096, 2, args.offload_activations, "8bit")
        assert plan.choose(args, on_meta(), LENGTHS, True, 140e9)[0][:4] == expected


def test_steps_in_the_backward_pass_need_the_whole_step_at_once():
    flags = {"optimizer": "8bit_in_backward", "gradient_accumulation_steps": 4, "memory_gb": 12}
    refused("--optimizer 8bit_in_backward 要求一个进程一次算完一步的全部样本；~", plans_of, **flags)


@pytest.mark.parametrize("kind", ["npu", "mps"])
def test_other_devices_are_planned_without_what_wants_cuda(kind):
    """With Kahan sums for bfloat16, without 8 bits and without inputs in the CPU's memory."""
    args = card_arguments()
    args.device = SimpleNamespace(type=kind)
    rungs = plan.rungs(args, build_model(layers=1, shape=SMALL), 8192, 2048, None, None)
    assert {name for *_, name in rungs} == {"kahan"} and not any(offload for _, _, offload, _ in rungs)
    assert len(rungs) > 4


# ---- a plan in force ----------------------------------------------------------------------------------------------


def test_inputs_of_layers_in_the_cpus_memory_change_no_gradient(monkeypatch):
    """The CPU's memory stands for a GPU's here, and copies of tensors for those that would be moved out of
    it."""
    inputs = []
    to_cpu = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", lambda **_: to_cpu)
    gradients, ids = {}, torch.arange(64)[None]
    model = build_model(torch.float32, 2, SMALL)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    for offload in (False, True):
        model.zero_grad()
        inputs.clear()
        plan.apply(plan.Plan(64, 1, offload, "kahan", {}, 0), model)
        output = model.model(input_ids=ids, position_ids=ids, lengths=(64,), use_cache=False).last_hidden_state
        assert [storage() is not None for storage in inputs] == [not offload] * 2
        output.square().sum().backward()
        gradients[offload] = [p.grad.clone() for p in model.model.parameters()]
    assert all(map(torch.equal, *gradients.values()))


def test_a_plan_without_recomputing_takes_back_that_of_an_earlier_one():
    model = build_model(torch.float32, 2, SMALL)
    for every in (1, 0):
        plan.apply(plan.Plan(64, every, False, "kahan", {}, 0), model)
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [bool(every)] * 2


def test_the_limit_on_memory_does_not_outlive_a_training(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with pytest.raises(RuntimeError), plan.limited(torch.device("cuda")):
        raise RuntimeError
    assert fractions == [1.0]
