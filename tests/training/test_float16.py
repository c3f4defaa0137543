"""Adapters on cards without bfloat16: frozen weights in float16, adapters in float32, a scaled loss. A CPU computes in
float16 too: accelerate is told to make the autocast and the scaler here that it makes for a GPU."""

import math
import shutil
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from helpers import (
    At,
    arguments,
    build_trainer,
    examples,
    gradient,
    losses,
    refused,
    run_steps,
    same,
    terminate,
    weights,
)

from parts.model import weights as loading
from parts.run import checkpoints


@pytest.fixture
def without_bfloat16(monkeypatch):
    """without_bfloat16(scale): what is made from now on is made on such a card, whose scaler begins with `scale`."""
    plain = accelerate.Accelerator.__init__

    def use(scale: float = 2.0**16) -> None:
        def init(accelerator, *args, **kwargs):
            plain(accelerator, *args, **kwargs)
            if accelerator.mixed_precision == "fp16":
                accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", scale)

        monkeypatch.setattr(accelerate.Accelerator, "__init__", init)
        monkeypatch.setattr(loading, "best_dtype", lambda device: torch.float16)

    return use


@pytest.mark.parametrize("full_logits", [False, True])
def test_gradients_are_those_of_float32(without_bfloat16, workspace, tiny_model, tokenizer, full_logits):
    changes = {"lora": True, "lora_dropout": 0.0, "full_logits": full_logits}
    exact = build_trainer(tiny_model, tokenizer, **changes)
    without_bfloat16(2.0**10)
    ours = build_trainer(tiny_model, tokenizer, **changes)
    ours.model.load_state_dict(exact.model.state_dict())
    dtypes = {(p.requires_grad, p.dtype) for p in ours.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.float16)}
    expected, found = gradient(exact, examples()), gradient(ours, examples()) / 2**10
    assert 0 < (found - expected).norm() < 5e-3 * expected.norm()
    assert arguments(tiny_model).dtype == arguments(tiny_model, True, fast_kernels=False).dtype == torch.float32


def test_steps_that_overflow_are_skipped_and_a_stopped_run_goes_on_to_the_same_bits(
    without_bfloat16, workspace, tiny_model
):
    without_bfloat16(2.0**24)
    changes = {"logging_steps": 1, "learning_rate": 1e-2}
    trainer = run_steps(tiny_model, True, output_dir="straight", **changes)
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    skipped = [not math.isfinite(log["grad_norm"]) for log in logs]
    assert all(skipped[:3]) and sum(skipped) < 10  # the first ones, until the scale fits
    assert logs[-1]["learning_rate"] == pytest.approx(1e-2 / 20) and losses(trainer)[-1] < losses(trainer)[0]
    with pytest.raises(SystemExit):  # while the scale is on its way down
        run_steps(tiny_model, True, [At(3, terminate)], output_dir="resumed", **changes)
    assert "scaler.pt" in Path("resumed/checkpoint-3", checkpoints.MANIFEST).read_text()
    run_steps(tiny_model, True, output_dir="resumed", **changes)
    assert same(weights("resumed"), weights("straight"))


class Spoil(transformers.TrainerCallback):
    """From step 3 on the adapter's outputs are too large for float16."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        for name, weight in model.named_parameters():
            if state.global_step == 2 and "lora_B" in name:
                weight.data.fill_(1e6)


def test_a_run_that_goes_on_overflowing_is_stopped_with_one_sentence(without_bfloat16, workspace, tiny_model):
    without_bfloat16(2.0**3)
    with pytest.raises(SystemExit, match="第 6 步 loss 成了 nan.*--fast_kernels false（float32），并换一个"):
        run_steps(tiny_model, True, [Spoil()], output_dir="spoilt", logging_steps=1, eval_steps=20)


def test_a_run_begun_in_float32_is_refused_and_told_how_to_go_on(without_bfloat16, interrupted, tiny_model):
    without_bfloat16()
    told = "请加 --fast_kernels false 继续，或用 --output_dir 换一个文件夹重新训练。"
    refused(
        f"lora 里未完成的训练用的是别的设置：dtype torch.float32 -> torch.float16；{told}",
        run_steps,
        tiny_model,
        True,
        output_dir="lora",
    )
    run_steps(tiny_model, True, output_dir="lora", fast_kernels=False)


def test_a_model_too_large_for_float16_is_asked_in_float32_and_not_trained(
    without_bfloat16, folder, tiny_model, capsys
):
    without_bfloat16()
    assert loading.load_weights(str(tiny_model)).dtype == torch.float16
    shutil.copytree(tiny_model, "large")
    model = loading.load_weights("large").float()
    model.get_input_embeddings().weight.data *= 1e5
    model.save_pretrained("large")
    assert loading.load_weights("large").dtype == torch.float32
    assert "large 的中间结果超出 float16 的范围，改用 float32。" in capsys.readouterr().out
    refused(
        "large 的中间结果超出 float16 的范围；请加 --fast_kernels false，~",
        loading.load_weights,
        "large",
        dtype=torch.float16,
    )
