"""The Triton kernels that are used on a GPU: here Triton's interpreter runs them, and they are compiled for cards that
are not here. So a version of Liger or Triton that breaks them is seen before somebody pays for a card."""

import importlib.util
import json
import os

import pytest
import torch
from helpers import QWEN, build_model, run_script

from parts.model import fused
from parts.training import optimizers

pytestmark = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("triton", "liger_kernel")), reason="Triton and Liger are for Linux"
)
LENGTHS = (3, 5)
# From Turing (T4) over A100, RTX 30 and 40, and H100 to Blackwell: B200 and RTX 50
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


def test_real_kernels_agree_with_the_plain_forms(folder):
    ran = run_script("tests/triton_interpreter.py", cwd=folder, fresh=True)
    assert ran.returncode == 0, ran.stdout
    verdicts = json.loads(ran.stdout.splitlines()[-1])
    assert len(verdicts) == 3 and all(runs for runs, _ in verdicts.values()), verdicts


class Card:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all() -> None:
    """Take a step of a layer as wide as Qwen3-1.7B's and one of the optimizer for each card; what would launch a kernel
    compiles it and runs nothing. Prints how many were compiled."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled, run = set(), JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        compiled.add((kernel.metadata.target.arch, kernel.hash))

    JITFunction.run = compile_only
    model = build_model(layers=1, shape=QWEN | {"vocab_size": 128})
    fused.fuse_layers(model)
    weight = torch.nn.Parameter(torch.ones(3000, dtype=torch.bfloat16))
    for capability in CAPABILITIES:
        driver.set_active(Card(capability))
        fused.outcome(model, LENGTHS, lengths=LENGTHS)
        cls, options = optimizers.pick("kahan", True, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
        weight.grad = torch.ones_like(weight)
        cls([weight], **options).step()
    print(json.dumps([sum(arch == capability for arch, _ in compiled) for capability in CAPABILITIES]))


def test_they_compile_for_every_card(folder):
    empty = os.environ | {"TRITON_CACHE_DIR": str(folder)}
    ran = run_script("tests/machine/test_triton.py", cwd=folder, env=empty, call="compile_all")
    assert ran.returncode == 0, ran.stdout
    counts = json.loads(ran.stdout.splitlines()[-1])
    assert min(counts) == max(counts) >= 9, counts
