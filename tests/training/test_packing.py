"""Several examples in one batch: they do not see each other, a batch is cut between them, and the loss
without logits is that of transformers."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import LENGTHS, examples
from transformers.loss.loss_utils import ForCausalLMLoss

from parts.model import encoding, weights
from parts.training import packing

CPU = torch.device("cpu")


def test_no_example_of_a_batch_sees_another_or_what_comes_later(tiny_model):
    """One token of the second example is changed: only that example, from there on, may change."""
    model = weights.load_weights(str(tiny_model), CPU)
    packing.use(model)
    position, hidden = LENGTHS[0] + 10, []
    for change in (0, 1):
        inputs = packing.PackedCollator()(examples())
        inputs["input_ids"][0, position] += change
        del inputs["labels"]
        hidden.append(model.get_decoder()(**inputs, use_cache=False).last_hidden_state)  # [1, T, H]
    changed = (hidden[0] != hidden[1]).any(dim=-1)[0]
    assert changed[position : sum(LENGTHS[:2])].all()
    assert not changed[:position].any() and not changed[sum(LENGTHS[:2]) :].any()


def test_heads_are_repeated_where_flash_is_missing(monkeypatch):
    """With grouped heads torch would take the kernel that keeps all scores; what is computed is the same."""
    tensors = [torch.randn(1, heads, 60, 16) for heads in (4, 2, 2)]
    attend, outputs = torch.nn.functional.scaled_dot_product_attention, []
    for repeats in (False, True):
        spy = mock.Mock(side_effect=attend)
        monkeypatch.setattr(packing, "scaled_dot_product_attention", spy)
        monkeypatch.setattr(packing, "repeats_heads", mock.Mock(return_value=repeats))
        outputs.append(packing.packed_attention(None, *tensors, None, 0.25, (20, 40))[0])
        assert [call.kwargs["enable_gqa"] for call in spy.mock_calls] == [not repeats] * 2
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "repeated"),
    [
        ("cuda", (7, 5), torch.float16, True),
        ("cuda", (8, 6), torch.float32, True),
        ("cuda", (8, 6), torch.bfloat16, False),
        ("mps", None, torch.bfloat16, True),
    ],
)
def test_flash_is_for_sixteen_bits_from_sm80_on(monkeypatch, kind, capability, dtype, repeated):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert packing.repeats_heads(SimpleNamespace(type=kind), dtype) == repeated


def test_starts_and_lengths_that_are_not_those_of_the_batch_are_refused():
    query, key = torch.zeros(1, 4, 60, 16), torch.zeros(1, 2, 60, 16)
    for lengths, starts in (((20, 25, 15), torch.tensor([0, 20, 45])), ((20, 25), None)):
        with pytest.raises(AssertionError):
            packing.packed_attention(None, query, key, key, None, 1.0, lengths, starts)


@pytest.mark.parametrize(
    ("most", "groups"),
    [(1, [(40,), (25,), (60,), (33,)]), (65, [(40, 25), (60,), (33,)]), (93, [(40, 25), (60, 33)]), (1000, [LENGTHS])],
)
def test_a_batch_is_split_between_examples(most, groups):
    batch = packing.PackedCollator()(examples())
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and batch["lengths"] == LENGTHS
    assert batch["position_ids"][0].tolist() == [i for length in LENGTHS for i in range(length)]
    parts = packing.split_batch(batch, most)
    assert [part["lengths"] for part in parts] == groups
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), batch[name])


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_example_is_evaluated_once(world_size):
    lengths = (9000, 10, 4000, 4200, 4100, 8192, 1)
    dataset = {"input_ids": [[0] * length for length in lengths]}
    shares = [packing.token_batches(dataset, rank, world_size, 8192) for rank in range(world_size)]
    batches = sum(shares, [])
    assert sorted(sum(batches, [])) == list(range(7))
    assert all(sum(lengths[i] for i in batch) <= 8192 or len(batch) == 1 for batch in batches)


# ---- the loss --------------------------------------------------------------------------------------------

HIDDEN, VOCAB, TOKENS = 64, 1000, 300


def layer(dtype: torch.dtype):
    """hidden [1, T, H], weight [V, H], labels [1, T] of which a third is masked."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (1, TOKENS), generator=generator)
    return hidden, weight, labels.masked_fill(torch.rand(1, TOKENS, generator=generator) < 0.3, encoding.IGNORE_INDEX)


def chunked(hidden, weight, labels):
    where = labels[:, 1:] != encoding.IGNORE_INDEX
    total, losses = packing.LinearCrossEntropy.apply(hidden[:, :-1][where], weight, labels[:, 1:][where])
    assert losses.dtype == total.dtype == torch.float32
    return total / len(losses)


@pytest.mark.parametrize("rows", [1, 7, 100_000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)], ids=["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_transformers(monkeypatch, dtype, tolerance, rows):
    """In bf16 against the reference in fp32 on the same numbers; its gradients are rounded once, hence the 1
    %."""
    monkeypatch.setattr(packing, "LOSS_BYTES", rows * VOCAB * 8)
    hidden, weight, labels = layer(dtype)
    exact_hidden, exact_weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    expected = ForCausalLMLoss(exact_hidden @ exact_weight.T, labels, VOCAB)
    ours = chunked(hidden, weight, labels)
    assert ours.item() == pytest.approx(expected.item(), rel=tolerance)
    expected.backward()
    ours.backward()
    for mine, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        error = (mine.grad.float() - exact.grad).norm() / exact.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_frozen_output_layer_gets_no_gradient():
    hidden, weight, labels = layer(torch.float32)
    chunked(hidden, weight.requires_grad_(False), labels).backward()
    assert weight.grad is None and hidden.grad is not None
