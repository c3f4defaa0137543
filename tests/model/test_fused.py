"""What is fast gives what its plain form gives, or it is found out."""

import importlib.util
import subprocess
import sys
import sysconfig
from functools import partial

import pytest
import torch
from helpers import SMALL, build_model

from parts.model import fused

SIZES = (37, 91)  # tokens of the examples tried
needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is for Linux")
NO_LIGER = ("liger-kernel 不支持 seed_oss", "需要 GPU 和 liger-kernel")  # where it is installed, and where not


@pytest.mark.parametrize(("factor", "reason"), [(1.1, "与普通算子相差 10.0%"), (float("nan"), "与普通算子相差 nan%")])
def test_a_difference_anywhere_is_found_out(factor, reason):
    plain = torch.randn(4, 40, 30, generator=torch.Generator().manual_seed(0))
    for i in range(4):
        fast = plain.clone()
        fast[i] *= factor
        assert fused.compare(plain, fast) == fused.Verdict(False, reason)
    # What rounding explains is none, and two tensors of zeros would give 0/0.
    assert fused.compare(plain, plain * (1 + 1e-3)) == fused.Verdict(True, "与普通算子相差 0.1%")
    assert fused.compare(plain * 0, plain * 0).runs


def test_what_a_compiler_lacks_is_said(monkeypatch, folder):
    missing = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    failed = subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"])  # which does not tell why
    assert fused.reason(missing) == fused.COMPILER and "gcc" in fused.reason(failed)
    monkeypatch.setattr(sysconfig, "get_config_var", {"INCLUDEPY": str(folder)}.get)  # an image without python3-dev
    assert fused.reason(failed) == fused.HEADERS and fused.reason(RuntimeError("CUDA error")) == "CUDA error"


# ---- Liger's layers, on a small model of one layer ----------------------------------------------------------------


def test_the_layer_is_tried_with_its_heads_its_width_and_all_its_gradients():
    """Qwen2's configuration does not tell the size of a head."""
    shape = SMALL | {"hidden_size": 512}
    del shape["head_dim"]
    probe = fused.shrink(build_model(torch.float32, 2, shape, "Qwen2"))
    attention = probe.get_decoder().layers[0].self_attn
    assert attention.head_dim == 128 and attention.q_proj.weight.shape == (512, 512)
    assert probe.get_decoder().layers[0].mlp.up_proj.weight.shape == (SMALL["intermediate_size"], 512)
    results = fused.outcome(probe, SIZES, lengths=SIZES)
    assert results[0].shape == (1, sum(SIZES), 512) and len(results) == 1 + len([*probe.get_decoder().parameters()])


@needs_liger
@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2", "Llama"])
def test_only_the_model_that_is_given_gets_ligers_layers(kind):
    def forwards(model) -> list:
        layer = model.get_decoder().layers[0]
        return [module.forward.__func__ for module in (layer.input_layernorm, layer.mlp)]

    model = build_model(torch.float32, 1, SMALL, kind)
    module = sys.modules[type(model).__module__]
    rotary = module.apply_rotary_pos_emb
    plain = forwards(model)
    fused.fuse_layers(model)
    assert all(forward not in plain for forward in forwards(model))
    assert forwards(build_model(torch.float32, 1, SMALL, kind)) == plain
    assert module.apply_rotary_pos_emb is not rotary
    fused.shrink(model)  # what the next trial compares with is plain
    assert module.apply_rotary_pos_emb is rotary


@needs_liger
def test_layers_that_fail_leave_the_plain_ones():
    """On a CPU Liger's have no kernels."""
    probe = fused.shrink(build_model(torch.float32, 1, SMALL))
    module = vars(sys.modules[type(probe).__module__])
    before = dict(module)
    run = partial(fused.outcome, probe, SIZES, lengths=SIZES)
    assert not fused.try_layers(probe, run(), run).runs and module == before


def test_a_model_for_which_liger_has_nothing_is_said(monkeypatch):
    model = build_model(torch.float32, 1, SMALL)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(model.config, "model_type", "seed_oss")
    verdict = fused.layers_missing(model)
    assert verdict.why in NO_LIGER and not (verdict.runs or verdict.expected)
