"""No kernel is used that was not seen to run here and to agree with the plain one."""

import importlib.util
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from helpers import QWEN, build_model, build_trainer, refused
from torch.nn.functional import scaled_dot_product_attention as sdpa

from parts.machine import kernels
from parts.model import fused
from parts.training import optimizers, packing

CPU = torch.device("cpu")
LENGTHS = (37, 91)
HEADS = QWEN | {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 512}  # Qwen3-1.7B's heads
Device = namedtuple("Device", "type")


def test_kernels_that_do_not_run_here_are_not_chosen_and_the_reason_is_said(workspace, tiny_model, tokenizer, capsys):
    trainer = build_trainer(tiny_model, tokenizer)
    assert not any(verdict.runs or verdict.expected for verdict in trainer.kernels)  # a CPU is no fault
    assert "逐条 sdpa（未启用 torch varlen：只支持 sm80 " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["npu", "mps"])
def test_other_devices_get_plain_kernels(kind):
    model = SimpleNamespace(device=Device(kind), dtype=torch.bfloat16)
    step = kernels.try_step("kahan", model.device, triton=True)
    for verdict in (kernels.varlen_missing(model), fused.layers_missing(model), step):
        assert not verdict.runs and not verdict.expected


# ---- packed attention ---------------------------------------------------------------------------------------------


def test_norms_of_keys_are_tried_at_the_rows_at_which_liger_changes_its_kernel():
    assert sum(kernels.LENGTHS) * 8 >= 4096 * 8  # ops/rms_norm.py; 8 heads of Qwen3-0.6B to 8B


def test_a_kernel_that_fails_is_found_out():
    """torch's kernel for packed batches has no CPU form: as on a GPU without it."""
    probe = fused.shrink(build_model(layers=1, shape=HEADS))
    plain = fused.outcome(probe, LENGTHS, lengths=LENGTHS)
    starts = packing.starts_of(LENGTHS, CPU)
    failed = fused.attempt(fused.outcome, probe, LENGTHS, lengths=LENGTHS, starts=starts)
    assert isinstance(failed, Exception)
    for pair in ((plain, failed), (failed, plain)):
        assert fused.compare(*pair) == fused.Verdict(False, fused.reason(failed))


def exact_attention(query, key, value, **options):
    """As sdpa, but worked out in float64: correct, and rounded otherwise."""
    return sdpa(query.double(), key.double(), value.double(), **options).bfloat16()


def test_a_correct_kernel_that_rounds_otherwise_is_used(monkeypatch):
    """In bfloat16, with Qwen3-1.7B's heads."""
    torch.manual_seed(0)
    probe = fused.shrink(build_model(layers=1, shape=HEADS))
    plain = fused.outcome(probe, LENGTHS, lengths=LENGTHS)
    monkeypatch.setattr(packing, "scaled_dot_product_attention", exact_attention)
    exact = fused.outcome(probe, LENGTHS, lengths=LENGTHS)
    assert not all(map(torch.equal, plain, exact)) and fused.compare(plain, exact).runs


def test_layers_that_are_slower_are_taken_where_a_plan_needs_their_memory_alone(
    workspace, tiny_model, tokenizer, monkeypatch, capsys
):
    def slow(model, norms=True) -> None:
        model.get_decoder().register_forward_hook(lambda *_: time.sleep(0.05))

    monkeypatch.setattr(fused, "layers_missing", lambda model: None)
    monkeypatch.setattr(fused, "fuse_layers", slow)
    monkeypatch.setattr(kernels, "LENGTHS", LENGTHS)
    trainer = build_trainer(tiny_model, tokenizer)
    said = capsys.readouterr().out
    assert not trainer.kernels.layers.runs and "未启用（与普通算子相差 0.0%，用时为其 " in said and "半分钟" in said
    # A byte less than the fastest plan takes with plain layers
    monkeypatch.setattr("parts.machine.plan.free_bytes", lambda *_: trainer.plan.total - 1)
    tight = build_trainer(tiny_model, tokenizer, output_dir="tight")
    assert tight.kernels.layers.runs and tight.plan[:4] == trainer.plan[:4]
    assert "Liger（与普通算子相差 0.0%，用时为其 " in (said := capsys.readouterr().out)


# ---- the loss, and the optimizer's step ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_all_logits(dtype, monkeypatch):
    assert kernels.try_loss(CPU, dtype).runs
    backward = packing.LinearCrossEntropy.backward

    def wrong(*args):
        hidden, *others = backward(*args)
        return hidden * 2, *others

    monkeypatch.setattr(packing.LinearCrossEntropy, "backward", staticmethod(wrong))
    assert not kernels.try_loss(CPU, dtype).runs


def test_a_loss_that_is_wrong_here_stops_the_command(workspace, tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(kernels, "try_loss", lambda *_: fused.Verdict(False, "与普通算子相差 7.0%"))
    refused("损失~（与普通算子相差 7.0%）；~", build_trainer, tiny_model, tokenizer)


def test_steps_are_adamws(monkeypatch):
    assert kernels.try_step("kahan", CPU).runs
    assert kernels.try_step("kahan", CPU, triton=True) == fused.Verdict(False, "需要 GPU 和 triton", expected=False)
    # Without Kahan sums the ways of bfloat16 weights are too short, and so it is found out.
    monkeypatch.setattr(optimizers, "pick", lambda name, triton, **common: (torch.optim.AdamW, common))
    assert 0.1 < optimizers.deviation("kahan", CPU, False) < 0.3


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="is optional; .ci/run has a run with it")
def test_steps_with_8_bit_states_are_adamws(monkeypatch, capsys):
    kernels.try_step.cache_clear()
    assert kernels.try_step("8bit", CPU).runs and "第一次要编译" in capsys.readouterr().out
    kernels.try_step.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/c++",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    verdict = kernels.try_step("8bit", CPU)
    assert not verdict.runs and verdict.expected, verdict
    kernels.try_step.cache_clear()
    torch._dynamo.reset()
