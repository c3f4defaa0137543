"""What is read at a library's start is there before the first library is imported, and the user's own stays."""

import os
import platform
import subprocess
import sys

import pytest
from helpers import ROOT

from parts import environment

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
