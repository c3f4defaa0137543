"""The arithmetic of memory against what autograd really keeps."""

from types import SimpleNamespace

import pytest
import torch
from helpers import QWEN, SMALL, build_model, card_arguments, on_meta
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from parts.machine import memory
from parts.machine import plan as memory_plan
from parts.training.packing import LinearCrossEntropy


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_keeps_the_bytes_that_the_plan_counts(dtype, kind):
    shape = {name: size for name, size in SMALL.items() if kind == "Qwen3" or name != "head_dim"}
    kept = {}
    for layers in (2, 4):
        model, seen = build_model(dtype, layers, shape, kind), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor, seen=seen, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage
            return tensor

        ids, positions = torch.zeros(1, 256, dtype=torch.long), torch.arange(256)[None]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.model(input_ids=ids, position_ids=positions, lengths=(128, 128), use_cache=False)
        kept[layers] = sum(storage.nbytes() for storage in seen.values()) / 256
        assert output.last_hidden_state.requires_grad
    assert memory.layer_bytes(model, False, 0) == pytest.approx((kept[4] - kept[2]) / 2, rel=0.01)


# The account below adds the two gradients of a tied embedding out of place, which autograd does to such tensors alone:
# with a small vocabulary that matters little.
FEW_WORDS = QWEN | {"vocab_size": 32768}
UNTIED = QWEN | {"tie_word_embeddings": False}


def peak(layers: int, tokens: int, every: int, optimizer: str, shape: dict) -> float:
    """Bytes that weights, gradients and activations of Qwen3-1.7B's layers take at most in a forward and backward pass:
    torch's own account of the real operations, on tensors without storage."""
    with FakeTensorMode():
        model = build_model(layers=layers, shape=shape)
        for weight in model.parameters():
            if optimizer.endswith("in_backward"):
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        memory_plan.apply(memory_plan.Plan(tokens, every, False, "kahan", {}, 0), model)
        ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            output = model.model(input_ids=ids, position_ids=positions, lengths=(tokens // 4,) * 4, use_cache=False)
            LinearCrossEntropy.apply(output.last_hidden_state[0], model.lm_head.weight, ids[0])[0].backward()
            [snapshot] = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"]


@pytest.mark.parametrize(
    ("layers", "tokens", "every", "optimizer", "shape"),
    [
        (8, 2048, 0, "kahan", FEW_WORDS),
        (8, 8192, 4, "kahan", FEW_WORDS),
        (8, 8192, 1, "kahan", FEW_WORDS),
        (10, 8192, 3, "kahan", FEW_WORDS),
        (8, 8192, 1, "8bit_in_backward", FEW_WORDS),
        (2, 2048, 1, "kahan", UNTIED),
        (2, 2048, 1, "8bit_in_backward", UNTIED),
    ],
)
def test_the_estimate_is_never_below_the_peak_and_at_most_15_percent_above(layers, tokens, every, optimizer, shape):
    model = on_meta(layers=layers, shape=shape)
    estimate = memory.estimate(model, card_arguments(), False, tokens, every, False, optimizer, tokens)
    found = peak(layers, tokens, every, optimizer, shape) + estimate["优化器"]
    assert found <= sum(estimate.values()) <= 1.15 * found


@pytest.mark.parametrize("passes", [1, 2])
def test_the_two_gradients_of_the_tied_embedding_are_added_in_place(monkeypatch, passes):
    """So that there are never three; what a second pass adds to is there besides."""
    model, places = build_model(layers=1, shape=SMALL), []
    backward = LinearCrossEntropy.backward

    def noting(*args):
        gradients = backward(*args)
        places.append(gradients[1].data_ptr())
        return gradients

    monkeypatch.setattr(LinearCrossEntropy, "backward", staticmethod(noting))
    seen = []
    model.lm_head.weight.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    ids = torch.arange(16)[None]
    for _ in range(passes):
        hidden = model.model(input_ids=ids, position_ids=ids, lengths=(16,), use_cache=False).last_hidden_state
        LinearCrossEntropy.apply(hidden[0], model.lm_head.weight, ids[0])[0].backward()
    assert seen == places and len(seen) == passes


def test_repeated_heads_are_counted_where_flash_is_missing(monkeypatch):
    model = on_meta(layers=1)
    grouped = memory.layer_bytes(model, True, 0)
    monkeypatch.setattr(memory, "repeats_heads", lambda device, dtype: True)
    assert memory.layer_bytes(model, True, 0) - grouped == 2 * 2 * 8 * 128  # keys and values, bfloat16, 8 more heads


def test_all_logits_and_the_copies_of_other_processes_are_counted():
    def peak_bytes(world_size: int = 1, **changes) -> float:
        args = card_arguments(**changes)
        args.world_size = world_size
        return memory.estimate(on_meta(), args, False, 2048, 1, False, "kahan", 8192)["一步之内"]

    gradients = 2 * on_meta().num_parameters()
    assert peak_bytes(full_logits=True) - peak_bytes() > 0.8 * 14 * 2048 * 151936
    assert peak_bytes(world_size=2) - peak_bytes() == pytest.approx(gradients, rel=0.01)


def test_no_more_is_planned_with_than_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6e9, 24e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1e9)
    assert memory.free(card_arguments(memory_gb=20), None) == 7e9
    assert memory.free(card_arguments(), None) == 7e9
    assert memory.free(card_arguments(memory_gb=5), None) == 5e9 - memory.DRIVER_BYTES


def test_cards_of_different_size_all_get_the_smallest_ones_plan(monkeypatch, capsys):
    monkeypatch.setattr(memory.accelerate.utils, "gather_object", lambda found: [24e9, 12e9])
    assert memory.free(card_arguments(), None) == 12e9
    assert "各张卡空闲的显存不同（24.0、12.0 GB），都按最少的规划。" in capsys.readouterr().out
    monkeypatch.setattr(memory.accelerate.utils, "gather_object", lambda found: [12.1e9, 12e9])
    assert memory.free(card_arguments(), None) == 12e9 and not capsys.readouterr().out


def test_what_is_free_is_asked_of_the_device_that_has_it(monkeypatch):
    """An NPU has memory of its own; Apple's chips share the CPU's, in which the model is already."""
    npu = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda: (6e9, 24e9), memory_reserved=lambda: 1e9)
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=3e9))
    model = SimpleNamespace(get_memory_footprint=lambda: 2e9)
    for kind, free in (("npu", 7e9), ("mps", 5e9), ("cpu", 5e9)):
        args = card_arguments()
        args.device = SimpleNamespace(type=kind)
        assert memory.free(args, model) == free, kind
