"""What is read at a library's start is there before the first library is imported, and the user's own stays; a card
that torch cannot use, or only in part, is said in one sentence before anything is loaded."""

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


@pytest.fixture
def bare(monkeypatch):
    """An environment in which none of it is set."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    return monkeypatch


def test_it_is_set_before_the_first_library_is_imported():
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    found = subprocess.run([sys.executable, "-c", SPY], cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
    assert found.stdout == "torch expandable_segments:True 0\n", found.stderr


def test_the_users_own_values_stay(bare):
    bare.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    bare.setenv("CUDA_VISIBLE_DEVICES", "3")
    environment.prepare()
    assert "PYTORCH_ALLOC_CONF" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_under_torchrun_each_process_chooses_its_own_card(bare):
    bare.setenv("LOCAL_RANK", "1")
    environment.prepare()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_no_expandable_segments_under_wsl_and_windows(bare):
    with bare.context() as patch:
        patch.setattr(platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
        environment.prepare()
    bare.setattr(sys, "platform", "win32")
    environment.prepare()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    bare.setattr(sys, "platform", "linux")
    environment.prepare()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


CUDA = torch.device("cuda")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about a torch that sees no card")
def test_a_card_that_torch_cannot_use_is_said_and_not_left_aside(tiny_model, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    message = r"^错误：有显卡（GPU 0: NVIDIA GeForce RTX 3060），但 torch .* 用不了：.*--use_cpu true。$"
    with pytest.raises(SystemExit, match=message):
        arguments(tiny_model)
    assert arguments(tiny_model, use_cpu=True).device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert arguments(tiny_model).device.type == "cpu"  # hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program.write_text("#!/bin/sh\nexit 9\n")  # a program without a card
    assert arguments(tiny_model).device.type == "cpu"


@pytest.fixture
def faked(monkeypatch):
    """A card of 8 GB as torch's queries would describe it."""
    properties = {"name": "GeForce GTX 1080", "total_memory": 8_500_000_000, "major": 6, "minor": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), properties))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties["name"])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    return monkeypatch


def test_a_torch_that_was_not_built_for_the_card_is_said(faked):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    faked.setattr(torch, "zeros", fail)
    said = environment.no_kernels(CUDA)
    assert "没有为这张卡（GeForce GTX 1080，sm61）编译，它只有 sm_75 sm_90" in said and "--use_cpu true" in said
    assert environment.no_kernels(torch.device("cpu")) is None


def test_more_memory_than_the_card_has_is_refused(faked):
    assert environment.too_small(CUDA, 12.0) == "--memory_gb 12.0：这张卡只有 8.5 GB"
    assert environment.too_small(CUDA, 8.0) is None and environment.too_small(CUDA, None) is None


def test_the_card_is_described_in_one_line(faked, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.95.05\n")
    program.chmod(0o755)
    faked.setenv("PATH", str(tmp_path), prepend=":")
    assert environment.describe_card(CUDA).startswith("GeForce GTX 1080，8.5 GB，sm61，驱动 580.95.05，")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert "驱动 未知" in environment.describe_card(CUDA)
    assert environment.describe_card(torch.device("cpu")).startswith("没有 GPU，用 cpu（")
    assert environment.describe_card(torch.device("mps")).startswith("没有 NVIDIA 或 AMD 的 GPU，用 mps（")
