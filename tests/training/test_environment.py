"""What is read at a library's start is there before the first library is imported, and the user's own stays;
a card that torch cannot use, or only in part, is said in one sentence before anything is loaded."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, arguments

from parts.training import environment

NAMES = (*environment.ALLOCATORS, "CUDA_VISIBLE_DEVICES", "LOCAL_RANK")
SPY = """
import os, sys

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "peft", "bitsandbytes", "torchao"):
            print(name, os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("CUDA_VISIBLE_DEVICES"))
            os._exit(0)

sys.meta_path.insert(0, Spy())
import train_lora
train_lora.arguments()
"""
CUDA = torch.device("cuda")


def test_it_is_set_before_the_first_library_is_imported():
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    ended = subprocess.run([sys.executable, "-c", SPY], cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
    assert ended.stdout == "torch expandable_segments:True 0\n", ended.stderr


@pytest.mark.parametrize(
    ("given", "release", "expected"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "CUDA_VISIBLE_DEVICES": "3"}, "6.8", (None, "3")),
        ({"LOCAL_RANK": "1"}, "6.8", ("expandable_segments:True", None)),  # as torchrun's
        ({}, "5.15.167.4-microsoft-standard-WSL2", (None, "0")),
    ],
)
def test_what_the_user_or_the_system_wants_otherwise_stays(monkeypatch, given, release, expected):
    env = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(sys, "platform", "linux")
    environment.prepare()
    assert (env.get("PYTORCH_ALLOC_CONF"), env.get("CUDA_VISIBLE_DEVICES")) == expected


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """driver(line): nvidia-smi says this, or fails where it is empty."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def write(line: str) -> None:
        program.write_text(f"#!/bin/sh\n{f'echo {line!r}' if line else 'exit 9'}\n")
        program.chmod(0o755)

    return write


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about a torch that sees no card")
def test_a_card_that_torch_cannot_use_is_said_and_not_left_aside(tiny_model, driver, monkeypatch):
    driver("GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-1)")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit, match=r"^错误：有显卡（GPU 0: NVIDIA GeForce RTX 3060），.*--use_cpu true。$"):
        arguments(tiny_model)
    assert arguments(tiny_model, use_cpu=True).device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert arguments(tiny_model).device.type == "cpu"  # hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver("")  # a program without a card
    assert arguments(tiny_model).device.type == "cpu"


@pytest.fixture
def card(monkeypatch):
    """A card of 8 GB as torch's queries would describe it; its kernels fail."""

    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    properties = {"name": "GeForce GTX 1080", "total_memory": 8_500_000_000, "major": 6, "minor": 1}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), properties))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch, "zeros", fail)


def test_a_card_that_is_too_old_or_too_small_is_said(card):
    reason = environment.unusable(CUDA, 8.0)
    assert "没有为这张卡（GeForce GTX 1080，sm61）编译" in reason and "--use_cpu true" in reason
    assert environment.unusable(CUDA, 12.0) == "--memory_gb 12.0：这张卡只有 8.5 GB"
    assert environment.unusable(torch.device("cpu"), 12.0) is None
