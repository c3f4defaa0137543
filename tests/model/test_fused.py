"""What is fast gives what its plain form gives, or it is found out."""

import importlib.util
import sys

import pytest
import torch
from helpers import SMALL, build_model

from parts.model import fused, weights
from parts.training import packing

SIZES = (37, 91)  # tokens of the examples tried
needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is for Linux")
NO_LIGER = ("liger-kernel 没有 seed_oss 的", "它要 GPU 和 liger-kernel")  # where it is installed, and where not


@pytest.fixture
def plain() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 30, generator=generator) for _ in range(4)]


def test_what_differs_by_rounding_alone_agrees(plain):
    assert fused.compare(plain, [tensor * (1 + 1e-3) for tensor in plain]) == (True, "与普通算子相差 0.1%", True)
    zeros = [torch.zeros(3)] * 2
    assert fused.compare(zeros, zeros).runs  # 0/0


@pytest.mark.parametrize("place", [0, 2, -1])
@pytest.mark.parametrize(("factor", "reason"), [(1.1, "与普通算子相差 10.0%"), (float("nan"), "与普通算子相差 nan%")])
def test_a_difference_anywhere_is_found_out(plain, place, factor, reason):
    fast = [tensor.clone() for tensor in plain]
    fast[place] = fast[place] * factor
    assert fused.compare(plain, fast) == (False, reason, True)


def test_a_missing_compiler_is_named():
    error = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    assert fused.compare([], error) == (False, fused.COMPILER, True)


# ---- Liger's layers, on a small model of one layer ----------------------------------------------------------------


@pytest.fixture
def probe(tiny_model):
    model = weights.load_weights(str(tiny_model), torch.device("cpu"))
    packing.use(model)
    return fused.shrink(model)


def test_the_layer_is_tried_with_all_its_gradients(probe):
    results = fused.outcome(probe, SIZES, lengths=SIZES)
    assert len(results) == 1 + len([*probe.get_decoder().parameters()])


@needs_liger
@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2", "Llama"])
def test_only_the_model_that_is_given_gets_ligers_layers(monkeypatch, kind):
    def forwards(model) -> list:
        layer = model.get_decoder().layers[0]
        return [module.forward.__func__ for module in (layer.input_layernorm, layer.mlp)]

    model = build_model(torch.float32, 1, SMALL, kind)
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)  # put back behind
    plain = forwards(model)
    fused.fuse_layers(model)
    assert all(forward not in plain for forward in forwards(model))
    assert forwards(build_model(torch.float32, 1, SMALL, kind)) == plain


@needs_liger
def test_layers_that_fail_leave_the_plain_ones(probe):
    """On a CPU Liger's have no kernels."""
    module = vars(sys.modules[type(probe).__module__])
    before = dict(module)
    plain = fused.outcome(probe, SIZES, lengths=SIZES)
    assert not fused.try_layers(probe, plain, SIZES, lengths=SIZES).runs and module == before


def test_a_model_for_which_liger_has_nothing_is_said(monkeypatch):
    model = build_model(torch.float32, 1, SMALL)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(model.config, "model_type", "seed_oss")
    assert fused.layers_missing(model) in [(False, why, False) for why in NO_LIGER]


def test_heads_are_tried_as_they_are_where_the_configuration_does_not_tell_their_size():
    shape = {name: size for name, size in SMALL.items() if name != "head_dim"} | {"hidden_size": 512}
    attention = fused.shrink(build_model(torch.float32, 2, shape, "Qwen2")).get_decoder().layers[0].self_attn
    assert attention.head_dim == 128 and attention.q_proj.weight.shape == (512, 256)
