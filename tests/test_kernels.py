"""No kernel is used that was not seen to run here and to agree with the plain one."""

import importlib.util

import pytest
import torch
from helpers import build_model, build_trainer

from parts import kernels, models, packing, proof

LENGTHS = (37, 91)


def test_kernels_that_do_not_run_here_are_not_chosen_and_the_reason_is_said(workspace, tiny_model, tokenizer, capsys):
    trainer = build_trainer(tiny_model, tokenizer)
    assert not trainer.kernels.varlen and not trainer.kernels.fused
    assert not any(verdict.expected for verdict in trainer.kernels)  # a CPU is no fault
    assert (
        "注意力：逐条 sdpa（不用 torch varlen：它只在 sm80 及以上的 NVIDIA GPU 上）；融合算子：不用（"
        in capsys.readouterr().out
    )


@pytest.fixture
def probe(tiny_model):
    """The small model on which kernels are tried."""
    return kernels.shrink(models.load_weights(str(tiny_model), torch.device("cpu")))


def test_the_layer_is_tried_with_all_its_gradients(probe):
    assert len(kernels.outcome(probe, lengths=LENGTHS)) == 1 + len([*probe.get_decoder().parameters()])


def test_norms_of_keys_are_tried_at_the_rows_at_which_liger_changes_its_kernel():
    assert sum(kernels.LENGTHS) * 8 >= 4096 * 8  # ops/rms_norm.py; 8 heads of Qwen3-0.6B to 8B


def test_a_kernel_that_fails_is_found_out(probe):
    """torch's kernel for packed batches has no CPU form: as on a GPU without it."""
    plain, failed = (proof.attempt(kernels.outcome, probe, starts, LENGTHS) for starts in (False, True))
    assert isinstance(failed, Exception)
    for pair in ((plain, failed), (failed, plain)):
        assert proof.compare(*pair) == (False, proof.reason(failed), True)


def exact_attention(query, key, value, is_causal, scale, enable_gqa):
    """As sdpa, but worked out in float32: correct, and rounded otherwise."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (
        x.float() for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    )
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(
        torch.ones(query.shape[2], query.shape[2]).triu(1).bool(), float("-inf")
    )
    return (scores.softmax(-1) @ value).bfloat16()


@pytest.mark.parametrize("seed", range(4))
def test_a_correct_kernel_that_rounds_otherwise_is_used(monkeypatch, seed):
    """In bfloat16, with Qwen3-1.7B's heads."""
    torch.manual_seed(seed)
    probe = kernels.shrink(build_model(layers=1))
    plain = kernels.outcome(probe, lengths=LENGTHS)
    monkeypatch.setattr(packing, "scaled_dot_product_attention", exact_attention)
    found = kernels.outcome(probe, lengths=LENGTHS)
    assert not all(map(torch.equal, plain, found)) and proof.compare(plain, found).runs


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is for Linux")
def test_only_the_model_that_is_given_gets_ligers_layers(probe, monkeypatch):
    from transformers.models.qwen3 import modeling_qwen3

    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", modeling_qwen3.apply_rotary_pos_emb)  # put back behind
    layer = probe.get_decoder().layers[0]
    plain = [module.forward.__func__ for module in (layer.input_layernorm, layer.mlp)]
    kernels.fuse(probe)
    assert all(module.forward.__func__ not in plain for module in (layer.input_layernorm, layer.mlp))
    other = kernels.shrink(build_model(layers=1)).get_decoder().layers[0]
    assert [module.forward.__func__ for module in (other.input_layernorm, other.mlp)] == plain
