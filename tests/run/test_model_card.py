"""What is said of the saved weights, on the card, in the picture and on the screen, is true of them."""

import json
from pathlib import Path

import matplotlib.figure
import pytest
import transformers
from helpers import ROOT, At, crash, run, same, weights

import data
import train
import train_lora
from parts.run import model_card

RISING = {"learning_rate": 0.3, "warmup_steps": 16, "max_steps": 16, "eval_steps": 2}  # the loss falls, then it rises


def star(history: list[dict], saved: int | None) -> str:
    """What the picture says of the marked step, which comes last."""
    axes = matplotlib.figure.Figure().subplots()
    model_card.plot_losses(axes, history, saved)
    return axes.get_legend().get_texts()[-1].get_text()


CHANGES = [{}, {"save_steps": 8}, {"early_stopping_patience": 1}, {"max_steps": 3, "eval_steps": 5}]


@pytest.mark.parametrize("changes", [*CHANGES, None], ids=str)
def test_the_claims_are_of_the_saved_weights(workspace, tiny_model, capsys, changes):
    """With --save_steps too the best are saved, beside those; the fourth evaluates nothing, the last is resumed."""
    if changes is None:
        with pytest.raises(EOFError):
            run(tiny_model, callbacks=[At(9, crash)], **RISING)
    trainer = run(tiny_model, **RISING | (changes or {}))
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    claim = "未评估（第 3 步），最后一步"
    if losses:
        step = min(losses, key=losses.get)
        assert same(weights(data.OUTPUT_DIR), weights(Path(data.OUTPUT_DIR, f"checkpoint-{step}")))
        claim = f"eval_loss {losses[step]:.4f}（第 {step} 步），按 eval_loss 选出"
        assert star(trainer.state.log_history, step) == f"saved: {losses[step]:.3f} at step {step}"
    assert f"| 保存的权重 | {claim} |" in Path(data.OUTPUT_DIR, "README.md").read_text(encoding="utf-8")
    train.report(trainer, "inference.py")
    *_, compared, last = capsys.readouterr().out.splitlines()
    assert compared == "不与公开方案的损失曲线比较：数据不同。"
    assert last.startswith("训练完成：") and f"步。保存的权重：{claim}。模型在" in last


PUBLISHED_DATA = {"source": f"{data.DATASET_NAME}（r1.jsonl）", "revision": None, "sha256": "0"}
FAIR = "eval_loss 1.151；公开方案的一次运行（全部参数，公布的原文）最低 1.146（第 500 步），最后 1.163（第 1000 步）。"


def against(lora=False, sources=(PUBLISHED_DATA,), raw=True, steps=1080, evaluated=True, **flags) -> str:
    """What is said at the end of a run like the published one, but for these changes."""
    args = (train_lora.arguments if lora else train.arguments)(report_to="none", **flags)
    logs = [{"eval_loss": 1.1512, "step": 500}] if evaluated else []
    state = transformers.TrainerState(global_step=800, max_steps=steps, log_history=logs)
    state.best_model_checkpoint = "output/checkpoint-500"
    origin = {"sources": list(sources), "raw": raw}
    return model_card.against_published(args, state, origin, train.PUBLISHED, train.changed_flags(args))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"output_dir": "elsewhere", "logging_steps": 5, "eval_samples": 4, "batch_tokens": 800}, None),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, None),  # as published
        ({"full_logits": True, "optimizer": "adamw", "fast_kernels": False, "early_stopping_patience": 0}, None),  # too
        ({"sources": [PUBLISHED_DATA | {"source": f"ms://{data.DATASET_NAME}"}]}, None),
        ({"lora": True}, "只训练 LoRA"),
        ({"raw": False}, "清理过的"),
        ({"sources": [PUBLISHED_DATA | {"source": "my.jsonl"}]}, "数据不同"),
        ({"sources": [PUBLISHED_DATA] * 2}, "数据不只是"),
        ({"learning_rate": 5e-5, "val_file": "mine.jsonl"}, "设置不同（--learning_rate、--val_file）"),
        ({"gradient_accumulation_steps": 2}, "每步 8 条样本"),
        ({"steps": 224}, "共 224 步"),  # --dataset …#500
        ({"evaluated": False}, "保存的权重没有评估过"),
    ],
    ids=str,
)
def test_the_published_curve_is_named_only_where_the_comparison_is_fair(changes, why):
    said = against(**changes)
    assert (why or FAIR) in said and said.startswith("不与公开方案的损失曲线比较：") == bool(why)


def test_the_published_curve_is_that_of_the_public_run():
    curve = json.loads((ROOT / "tests" / "demo" / "curves.json").read_text(encoding="utf-8"))["published"]
    points = {point["step"]: point["eval_loss"] for point in curve if "eval_loss" in point}
    best, last = min(points, key=points.get), max(points)
    assert train.PUBLISHED["best"] == (best, round(points[best], 3))
    assert train.PUBLISHED["end"] == (last, round(points[last], 3))


@pytest.mark.parametrize("raw", [True, False])
def test_the_card_says_whether_the_thinking_was_cleaned(raw):
    said = model_card.describe_origin({"sources": [PUBLISHED_DATA], "raw": raw})
    assert ("训练用的思考由 data.py 清理过" in said) != raw
