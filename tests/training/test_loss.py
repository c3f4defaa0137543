"""The loss without logits against that of transformers."""

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from parts.model import encoding
from parts.training import loss
from parts.training.loss import LinearCrossEntropy

HIDDEN, VOCAB, TOKENS = 64, 1000, 300


def layer(dtype: torch.dtype, seed: int = 0):
    """hidden [1, T, H], weight [V, H], labels [1, T] of which a third is masked."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (1, TOKENS), generator=generator)
    return hidden, weight, labels.masked_fill(torch.rand(1, TOKENS, generator=generator) < 0.3, encoding.IGNORE_INDEX)


def chunked(hidden, weight, labels):
    where = labels[:, 1:] != encoding.IGNORE_INDEX
    total, losses = LinearCrossEntropy.apply(hidden[:, :-1][where], weight, labels[:, 1:][where])
    assert losses.dtype == total.dtype == torch.float32
    return total / len(losses)


@pytest.mark.parametrize("rows", [1, 7, 100_000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)], ids=["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_transformers(monkeypatch, dtype, tolerance, rows):
    """In bf16 against the reference in fp32 on the same numbers; its gradients are rounded once, hence the 1 %."""
    monkeypatch.setattr(loss, "LOSS_BYTES", rows * VOCAB * 8)
    hidden, weight, labels = layer(dtype)
    exact_hidden, exact_weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    expected = ForCausalLMLoss(exact_hidden @ exact_weight.T, labels, VOCAB)
    found = chunked(hidden, weight, labels)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    expected.backward()
    found.backward()
    for mine, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        error = (mine.grad.float() - exact.grad).norm() / exact.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_loss_works_under_autocast_with_float32_weights():
    """As with --bf16 or --fp16: the layers before hand over half precision, the output layer is float32."""
    exact = layer(torch.float32)
    hidden, weight, labels = layer(torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked(half, weight, labels)
    found.backward()
    expected = chunked(*exact)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    assert half.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert (weight.grad - exact[1].grad).norm() / exact[1].grad.norm() < 2e-2


def test_frozen_output_layer_gets_no_gradient():
    hidden, weight, labels = layer(torch.float32)
    chunked(hidden, weight.requires_grad_(False), labels).backward()
    assert weight.grad is None and hidden.grad is not None


def test_loss_in_float64_is_exact_but_for_its_float32_sums():
    hidden, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    labels, grads = torch.randint(11, (5,)), []
    for each in (
        lambda h, w: LinearCrossEntropy.apply(h, w, labels)[0],
        lambda h, w: F.cross_entropy(h @ w.T, labels, reduction="sum"),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        each(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
