"""QLoRA: frozen weights in 4 bits. bitsandbytes is optional."""

import importlib

import pytest
import torch
from helpers import as_flags, history, run_script

from parts.model.weights import load_weights

STEPS = dict(max_steps=6, eval_steps=3, logging_steps=1, sample_tokens=4, report_to="none", load_in_4bit="true")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is optional; .ci/run has a run with it"
)


def test_qlora_trains_an_adapter_that_the_plain_model_can_use(workspace, tiny_model):
    result = run_script("train_lora.py", *as_flags(STEPS | {"model_name": tiny_model}), cwd=workspace)
    assert result.returncode == 0, result.stdout
    curve = [log["loss"] for log in history(workspace / "output" / "qwen3-medical-lora") if "loss" in log]
    assert len(curve) == 6 and all(0 < loss < 20 for loss in curve)
    asked = run_script("inference_lora.py", "头痛？", "--max_new_tokens", 4, cwd=workspace)
    assert asked.returncode == 0, asked.stdout


def test_qlora_weights_take_a_third_of_the_memory(tiny_model):
    plain, small = (load_weights(str(tiny_model), torch.device("cpu"), bits) for bits in (False, True))
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (plain, small)]
    assert weights[1].nbytes * 8 == weights[0].nbytes  # float32 against 4 bits
