"""The memory plan: its arithmetic against what autograd really keeps, and what it chooses."""

import weakref
from types import SimpleNamespace

import pytest
import rich.cells
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import train
import train_lora

QWEN = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16}
QWEN |= {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
SMALL = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}


def build(dtype=torch.bfloat16, layers: int = 28, shape=QWEN, attention=True):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(num_hidden_layers=layers, **shape))
    torch.set_default_dtype(before)
    if attention:
        transformers.AttentionInterface.register(packing.PACKED, packing.packed_attention)
        model.set_attn_implementation(packing.PACKED)
    return model.train()


def on_meta(**changes):
    """A model that takes no memory: the plan asks for shapes and dtypes alone."""
    with torch.device("meta"):
        return build(**changes)


def arguments(cls=train.TrainArguments, device="cuda", **changes):
    """The recipe's arguments as the plan reads them, on a card that this machine need not have."""
    real = cls(report_to="none", **changes)
    return SimpleNamespace(**(vars(real) | {"device": torch.device(device), "world_size": 1, "process_index": 0}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_keeps_the_bytes_that_the_plan_counts(dtype):
    kept = {}
    for layers in (2, 4):
        model, seen = build(dtype, layers, SMALL), {}
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


def peak(layers: int, tokens: int, every: int, optimizer: str) -> float:
    """Bytes that weights, gradients and activations of Qwen3-1.7B's layers take at most in a forward and backward pass:
    torch's own account of the real operations, on tensors without storage."""
    with FakeTensorMode():
        model = build(layers=layers, shape=FEW_WORDS)
        for weight in model.parameters():
            if optimizer.endswith("in_backward"):
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        args = arguments(checkpoint_every=every)
        memory_plan.apply(args, model, memory_plan.Plan(tokens, every, False, "kahan", {}, 1))
        ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            output = model.model(input_ids=ids, position_ids=positions, lengths=(tokens // 4,) * 4, use_cache=False)
            LinearCrossEntropy.apply(output.last_hidden_state[0], model.lm_head.weight, ids[0])[0].backward()
            [snapshot] = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"]


@pytest.mark.parametrize(
    ("layers", "tokens", "every", "optimizer"),
    [
        (8, 2048, 0, "kahan"),
        (8, 8192, 0, "kahan"),
        (8, 8192, 4, "kahan"),
        (8, 8192, 2, "kahan"),
        (8, 8192, 1, "kahan"),
        (8, 2048, 1, "kahan"),
        (10, 8192, 3, "kahan"),
        (16, 8192, 1, "kahan"),
        (8, 8192, 1, "8bit_in_backward"),
        (16, 8192, 1, "8bit_in_backward"),
    ],
)
def test_the_estimate_is_never_below_the_peak_and_at_most_15_percent_above(layers, tokens, every, optimizer):
    model = on_meta(layers=layers, shape=FEW_WORDS)
    estimate = memory.estimate(model, arguments(), False, tokens, True, every, False, optimizer)
    found = peak(layers, tokens, every, optimizer) + estimate["优化器"]
    assert found <= sum(estimate.values()) <= 1.15 * found


@pytest.mark.parametrize("passes", [1, 2])
def test_the_two_gradients_of_the_tied_embedding_are_added_in_place(monkeypatch, passes):
    """So that there are never three; what a second pass adds to is there besides."""
    model, places = build(layers=1, shape=SMALL), []
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


def test_inputs_of_layers_in_the_cpus_memory_change_no_gradient(monkeypatch):
    """The CPU's memory stands for a GPU's here, and copies of tensors for those that would be moved out of it."""
    moved, inputs = [], []
    to_cpu = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: moved.append(tensor.shape) or tensor.clone(), torch.clone
    )
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", lambda **_: to_cpu)
    gradients, ids = {}, torch.arange(64)[None]
    model = build(torch.float32, 2, SMALL)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    for offload in (False, True):
        model.zero_grad()
        inputs.clear()
        memory_plan.apply(arguments(), model, memory_plan.Plan(64, 1, offload, "kahan", {}, 1))
        output = model.model(input_ids=ids, position_ids=ids, lengths=(64,), use_cache=False).last_hidden_state
        alive = [storage() is not None for storage in inputs]
        assert alive == [not offload] * 2
        output.square().sum().backward()
        gradients[offload] = [p.grad.clone() for p in model.model.parameters()]
    assert [shape for shape in moved if shape.numel()] == [(1, 64, 128)] * 2  # before torch 2.13 an empty tensor, too
    assert all(torch.equal(*pair) for pair in zip(*gradients.values()))


def test_all_logits_and_the_copies_of_other_processes_are_counted():
    def peak_bytes(world_size: int = 1, **changes) -> float:
        args = arguments(**changes)
        args.world_size = world_size
        return memory.estimate(on_meta(), args, False, 2048, False, 1, False, "kahan")["一步之内"]

    gradients = 2 * on_meta().num_parameters()
    assert peak_bytes(full_logits=True) - peak_bytes() > 0.8 * 14 * 2048 * 151936
    assert peak_bytes(world_size=2) - peak_bytes() == pytest.approx(gradients, rel=0.01)


def make_plan(args, model, lengths):
    return memory_plan.choose(args, model, lengths, True, memory.free(args, model))


LENGTHS = [700] * 50 + [2048] * 4


@pytest.mark.parametrize(
    ("memory", "most", "every", "offload", "optimizer"),
    [
        (140, 8192, 0, False, "kahan"),
        (32, 4096, 0, False, "kahan"),
        (24, 2048, 0, False, "kahan"),
        (12, 8192, 1, False, "8bit_in_backward"),
        (10, 8192, 1, True, "8bit_in_backward"),
        (8, 8192, 1, True, "4bit_in_backward"),
    ],
)
def test_each_card_gets_the_fastest_plan_that_fits(monkeypatch, memory, most, every, offload, optimizer):
    """Without torchao, which is asked for only where nothing else fits."""
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    plan = make_plan(arguments(memory_gb=memory), on_meta(), LENGTHS)
    assert plan.total <= memory * 1e9
    assert plan[:4] == (most, every, offload, optimizer)


@pytest.mark.parametrize("longest", [256, 1024])
def test_4_bits_are_only_for_cards_on_which_8_do_not_fit(longest):
    """Also where 4 bits would leave room for recomputing nothing."""
    for tenth in range(75, 130, 5):
        args = arguments(memory_gb=tenth / 10)
        plan = make_plan(args, on_meta(), [longest] * 8)
        args.optimizer = "8bit_in_backward"
        fits = make_plan(args, on_meta(), [longest] * 8).total <= memory.free(args, None)
        assert (plan.optimizer == "4bit_in_backward") == (not fits)


def test_less_memory_never_gives_a_larger_plan():
    plans = [make_plan(arguments(memory_gb=size), on_meta(), LENGTHS) for size in range(6, 60, 2)]
    fitting = [plan for plan, size in zip(plans, range(6, 60, 2)) if plan.total <= size * 1e9]
    assert [plan.total for plan in fitting] == sorted(plan.total for plan in fitting)
    assert len(fitting) > 20 and fitting[0].total < fitting[-1].total


def test_lora_fits_where_full_training_does_not():
    args = arguments(train_lora.LoraArguments, memory_gb=5)
    lora = make_plan(args, train_lora.add_adapter(on_meta(), args), LENGTHS)
    assert lora.total <= 5e9 < make_plan(arguments(memory_gb=5), on_meta(), LENGTHS).total
    assert lora.optimizer == "kahan"


def test_flags_are_obeyed():
    flags = {"batch_tokens": 4096, "checkpoint_every": 2, "optimizer": "8bit"}
    for offload in (False, True):
        args = arguments(memory_gb=140, **flags)
        args.offload_activations = offload
        assert make_plan(args, on_meta(), LENGTHS)[:4] == (4096, 2, offload, "8bit")


@pytest.mark.parametrize(("flag", "every"), [(True, 1), (False, 0), (None, None)])
def test_trainers_own_flag_for_checkpointing_is_obeyed(flag, every):
    assert arguments(gradient_checkpointing=flag).checkpoint_every == every


def test_steps_in_the_backward_pass_need_the_whole_step_at_once():
    args = arguments(optimizer="8bit_in_backward", gradient_accumulation_steps=4, memory_gb=12)
    with pytest.raises(SystemExit, match="8bit_in_backward 要一个进程把一步的样本一次算完"):
        make_plan(args, on_meta(), LENGTHS)


def test_a_plan_that_may_not_fit_says_so():
    args = arguments(memory_gb=3)
    plan = make_plan(args, on_meta(), LENGTHS)
    text = memory_plan.describe(plan, memory.free(args, None), "显存")
    assert "可能放不下" in text and "合计（估算）" in text
    assert "可能放不下" not in memory_plan.describe(plan, 1e12, "显存")


@pytest.mark.parametrize("memory", [8, 10, 12, 16, 24, 140])
def test_the_plan_fits_a_terminal(memory):
    args = arguments(memory_gb=memory)
    text = memory_plan.describe(make_plan(args, on_meta(), LENGTHS), 1e9, "显存")
    assert max(map(rich.cells.cell_len, text.splitlines())) <= 80
    assert ("输入放内存" in text) == (memory < 12)
