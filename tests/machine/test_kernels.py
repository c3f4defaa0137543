"""No kernel is used that was not seen to run here and to agree with the plain one."""

import importlib.util
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, build_model, build_trainer

from parts.machine import kernels, proof
from parts.model import fused, weights
from parts.training import packing

LENGTHS = (37, 91)
Device = namedtuple("Device", "type")
NOTHING = ("liger-kernel 没有 seed_oss 的", "它要 GPU 和 liger-kernel")  # where it is installed, and where not


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
    return kernels.shrink(weights.load_weights(str(tiny_model), torch.device("cpu")))


def test_the_layer_is_tried_with_all_its_gradients(probe):
    assert len(kernels.outcome(probe, lengths=LENGTHS)) == 1 + len([*probe.get_decoder().parameters()])


def test_norms_of_keys_are_tried_at_the_rows_at_which_liger_changes_its_kernel():
    assert sum(kernels.LENGTHS) * 8 >= 4096 * 8  # ops/rms_norm.py; 8 heads of Qwen3-0.6B to 8B


def test_a_kernel_that_fails_is_found_out(probe):
    """torch's kernel for packed batches has no CPU form: as on a GPU without it."""
    plain, failed = (fused.attempt(kernels.outcome, probe, starts, LENGTHS) for starts in (False, True))
    assert isinstance(failed, Exception)
    for pair in ((plain, failed), (failed, plain)):
        assert fused.compare(*pair) == (False, fused.reason(failed), True)


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
    assert not all(map(torch.equal, plain, found)) and fused.compare(plain, found).runs


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is for Linux")
@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2", "Llama"])
def test_only_the_model_that_is_given_gets_ligers_layers(monkeypatch, kind):
    probe = kernels.shrink(build_model(torch.float32, 1, SMALL, kind))
    module = sys.modules[type(probe).__module__]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)  # put back behind
    layer = probe.get_decoder().layers[0]
    plain = [module.forward.__func__ for module in (layer.input_layernorm, layer.mlp)]
    kernels.fuse(probe)
    assert all(module.forward.__func__ not in plain for module in (layer.input_layernorm, layer.mlp))
    other = kernels.shrink(build_model(torch.float32, 1, SMALL, kind)).get_decoder().layers[0]
    assert [module.forward.__func__ for module in (other.input_layernorm, other.mlp)] == plain


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is for Linux")
def test_layers_that_fail_leave_the_plain_ones(probe):
    """On a CPU Liger's have no kernels."""
    module = vars(sys.modules[type(probe).__module__])
    before = dict(module)
    verdict = kernels.try_fused(probe, kernels.outcome(probe, lengths=LENGTHS))
    assert not verdict.runs and module == before


def test_a_model_for_which_liger_has_nothing_is_said(monkeypatch):
    model = build_model(torch.float32, 1, SMALL)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(model.config, "model_type", "seed_oss")
    assert kernels.fused_missing(model) in [(False, why, False) for why in NOTHING]


def test_heads_are_tried_as_they_are_where_the_configuration_does_not_tell_their_size():
    shape = {name: size for name, size in SMALL.items() if name != "head_dim"} | {"hidden_size": 512}
    attention = kernels.shrink(build_model(torch.float32, 2, shape, "Qwen2")).get_decoder().layers[0].self_attn
    assert attention.head_dim == 128 and attention.q_proj.weight.shape == (512, 256)


@pytest.mark.parametrize("kind", ["npu", "mps"])
def test_other_devices_get_plain_kernels(kind):
    model = SimpleNamespace(device=Device(kind), dtype=torch.bfloat16)
    step = proof.try_step("kahan", model.device, triton=True)
    for verdict in (kernels.varlen_missing(model), kernels.fused_missing(model), step):
        assert not verdict.runs and not verdict.expected
