"""No kernel is used that was not seen to run here and to agree with the plain one."""

import importlib.util

import pytest
import torch
from helpers import build_model, build_trainer

from parts import kernels, models, packing
from parts.terminal import first_line, shorten


def test_kernels_that_do_not_run_here_are_not_chosen_and_the_reason_is_said(workspace, tiny_model, tokenizer, capsys):
    trainer = build_trainer(tiny_model, tokenizer)
    assert not trainer.kernels.varlen and not trainer.kernels.fused
    assert (
        "注意力：逐条 sdpa（不用 torch varlen：它只在 sm80 及以上的 NVIDIA GPU 上）；融合算子：不用（"
        in capsys.readouterr().out
    )


@pytest.fixture
def probe(tiny_model):
    """The small model on which kernels are tried."""
    return kernels.shrink(models.load_weights(str(tiny_model), torch.device("cpu")))


def test_what_agrees_is_used(probe):
    plain = kernels.outcome(probe, starts=False)
    assert len(plain) == 1 + len([*probe.get_decoder().parameters()]) and kernels.disagreement(plain, plain) is None
    barely = [tensor * (1 + 1e-3) for tensor in plain]
    assert kernels.disagreement(plain, barely) is None


@pytest.mark.parametrize("place", [0, 3, -1])
@pytest.mark.parametrize(("factor", "reason"), [(1.1, "与普通算子相差 10.0%"), (float("nan"), "与普通算子相差 nan%")])
def test_a_kernel_that_disagrees_anywhere_is_found_out(probe, place, factor, reason):
    plain = kernels.outcome(probe, starts=False)
    fast = [tensor.clone() for tensor in plain]
    fast[place] = fast[place] * factor
    assert kernels.disagreement(plain, fast) == reason


def test_a_kernel_that_fails_is_found_out(probe):
    """torch's kernel for packed batches has no CPU form: as on a GPU without it."""
    plain, failed = (kernels.outcome(probe, starts=starts) for starts in (False, True))
    assert isinstance(failed, Exception)
    for pair in ((plain, failed), (failed, plain)):
        assert kernels.disagreement(*pair) == shorten(first_line(failed), 100)


def exact_attention(module, query, key, value, attention_mask, scaling, **_):
    """As sdpa, but worked out in float32: correct, and rounded otherwise."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (
        x.float() for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    )
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(
        torch.ones(query.shape[2], query.shape[2]).triu(1).bool(), float("-inf")
    )
    return (scores.softmax(-1) @ value).transpose(1, 2).bfloat16(), None


@pytest.mark.parametrize("seed", range(4))
def test_a_correct_kernel_that_rounds_otherwise_is_used(tiny_model, monkeypatch, seed):
    """In bfloat16, with Qwen3-1.7B's heads."""
    torch.manual_seed(seed)
    probe = kernels.shrink(build_model(layers=1))
    plain = kernels.outcome(probe, starts=False)
    monkeypatch.setattr(packing, "sdpa_attention_forward", exact_attention)
    found = kernels.outcome(probe, starts=False)
    assert not all(map(torch.equal, plain, found)) and kernels.disagreement(plain, found) is None


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
