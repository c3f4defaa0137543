"""The modelled step counts what the real code does; what it says of speed is not looked at here."""

import importlib.util

import pytest
import step_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Liger and Triton are for Linux")
LAYER = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192  # weights in the small model's products
EMBEDDING = 151936 * 64
TOKENS, SUPERVISED = sum(step_model.LENGTHS), step_model.supervised(step_model.LENGTHS)


def products(ops) -> float:
    return sum(number * op.flops for op, number in ops.items() if op.name in ("mm", "addmm", "bmm"))


def test_the_products_are_those_of_the_formula_and_recomputing_is_a_forward_pass_but_each_layers_last():
    plain, recomputed = (step_model.ours(True, every=every) for every in (0, 1))
    # Older transformers multiply the rotary frequencies as matrices: some parts in ten million.
    assert products(plain) == pytest.approx(6 * (2 * LAYER * TOKENS + EMBEDDING * SUPERVISED), rel=1e-6)
    assert products(recomputed) - products(plain) == 2 * 2 * (LAYER - 64 * 192) * TOKENS  # without a layer's last one
    assert step_model.total(plain, "waits") == 1


def test_fused_layers_and_one_pass_launch_less_and_move_less():
    fused, plain = (step_model.ours(True, fused=fused) for fused in (True, False))
    assert step_model.total(fused, "kernels") < 0.6 * step_model.total(plain, "kernels")
    assert step_model.total(fused, "bytes") < step_model.total(plain, "bytes")
    assert products(fused) == products(plain)


def test_a_decoding_step_of_ours_reads_the_weights_once_and_launches_next_to_nothing():
    ops = step_model.decoding(True, 1, our_own=True)
    assert products(ops) == pytest.approx(2 * (2 * LAYER + EMBEDDING), rel=0.2)
    assert step_model.launching(ops, 1) < 60 < step_model.total(ops, "kernels")
