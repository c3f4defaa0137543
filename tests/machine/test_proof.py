"""What is fast gives what its plain form gives, or it is found out."""

import importlib.util

import pytest
import torch
from helpers import build_trainer

from parts.machine import proof
from parts.model import fused
from parts.training import loss, optimizers

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_all_logits(dtype, monkeypatch):
    assert proof.try_loss(CPU, dtype).runs
    backward = loss.LinearCrossEntropy.backward
    wrong = staticmethod(lambda *args: (backward(*args)[0] * 2, *backward(*args)[1:]))
    monkeypatch.setattr(loss.LinearCrossEntropy, "backward", wrong)
    assert not proof.try_loss(CPU, dtype).runs


def test_a_loss_that_is_wrong_here_stops_the_command(workspace, tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(proof, "try_loss", lambda *_: fused.Verdict(False, "与普通算子相差 7.0%"))
    with pytest.raises(SystemExit, match="^错误：损失在这里算不对（与普通算子相差 7.0%）；"):
        build_trainer(tiny_model, tokenizer)


def test_steps_are_adamws(monkeypatch):
    assert proof.try_step("kahan", CPU).runs
    assert proof.try_step("kahan", CPU, triton=True) == (False, "它要 GPU 和 triton", False)
    # Without Kahan sums the ways of bfloat16 weights are too short, and so it is found out.
    monkeypatch.setattr(optimizers, "pick", lambda name, triton, **common: (torch.optim.AdamW, common))
    assert 0.7 < optimizers.share_of_way("kahan", CPU, False) < 0.9


@pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is optional; .ci/run has a run with it"
)
def test_steps_with_8_bit_states_are_adamws(monkeypatch, capsys):
    proof.try_step.cache_clear()
    assert proof.try_step("8bit", CPU).runs and "第一次要编译" in capsys.readouterr().out
    proof.try_step.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    torch._dynamo.reset()
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    found = proof.try_step("8bit", CPU)
    assert not found.runs and found.expected, found
    proof.try_step.cache_clear()
    torch._dynamo.reset()
