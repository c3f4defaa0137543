"""What is said of the saved weights, on the card, in the picture and on the screen, is true of them."""

import json
from pathlib import Path

import matplotlib.figure
import pytest
import torch
import transformers
from helpers import ROOT, At, crash, run, same, weights

import data
import train
import train_lora
from parts import model_card

RISING = {"learning_rate": 0.3, "warmup_steps": 16, "max_steps": 16, "eval_steps": 2}  # the loss falls, then it rises
METRICS = ("eval_loss", "eval_token_loss")


def evaluations(trainer, metric: str = "eval_loss") -> dict[int, float]:
    return {log["step"]: log[metric] for log in trainer.state.log_history if metric in log}


def star(trainer) -> list[str]:
    """What the picture says of the marked step."""
    axes = matplotlib.figure.Figure().subplots()
    model_card.plot_losses(axes, trainer.state.log_history, model_card.saved_step(trainer.args, trainer.state))
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    return [name for name in names if name not in ("loss", "eval_loss")]


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, "，按 eval_loss 选出"),
        ({"metric_for_best_model": "token_loss"}, "，按 eval_token_loss 选出"),
        ({"save_steps": 8}, "，按 eval_loss 选出"),  # the best is saved beside them
        ({"load_best_model_at_end": False}, "，最后一步"),
        ({"early_stopping_patience": 1}, "，按 eval_loss 选出"),
        ({"eval_strategy": "no"}, "，最后一步"),
        ({"eval_steps": 5, "load_best_model_at_end": False}, "，最后一步"),  # the last step was not evaluated
    ],
    ids=str,
)
def test_the_claims_are_of_the_saved_weights(workspace, tiny_model, capsys, changes, end):
    kept = []  # the weights of each step
    snap = At(1, lambda: None)
    snap.on_step_end = lambda args, state, control, model=None, **kwargs: kept.append(
        {name: p.detach().clone() for name, p in model.named_parameters()}
    )
    trainer = run(tiny_model, callbacks=[snap], **RISING | changes)
    saved = weights(data.OUTPUT_DIR)
    [step] = [i + 1 for i, state in enumerate(kept) if all(torch.equal(state[name], saved[name]) for name in saved)]
    loss = evaluations(trainer).get(step)
    claim = f"eval_loss {loss:.4f}（第 {step} 步）" if loss else f"未评估（第 {step} 步）"
    claim += end
    if end == "，按 eval_loss 选出":
        assert loss == min(evaluations(trainer).values())
    assert f"| 保存的权重 | {claim} |" in Path(data.OUTPUT_DIR, "README.md").read_text(encoding="utf-8")
    assert star(trainer) == ([f"saved: {loss:.3f} at step {step}"] if loss else [])
    train.report(trainer, "inference.py")
    assert f"步。保存的权重：{claim}。模型在" in capsys.readouterr().out


def test_a_resumed_run_claims_the_best_of_both_parts(workspace, tiny_model):
    with pytest.raises(EOFError):
        run(tiny_model, callbacks=[At(9, crash)], **RISING)
    trainer = run(tiny_model, **RISING)
    found = evaluations(trainer)
    best = min(found, key=found.get)
    assert best < 8 and model_card.saved_step(trainer.args, trainer.state) == best
    assert same(weights(data.OUTPUT_DIR), weights(Path(data.OUTPUT_DIR, f"checkpoint-{best}")))


def test_without_a_saved_step_the_best_evaluation_is_marked():
    axes = matplotlib.figure.Figure().subplots()
    model_card.plot_losses(axes, [{"step": 2, "eval_loss": 2.0}, {"step": 4, "eval_loss": 1.0}])
    assert "best: 1.000 at step 4" in [text.get_text() for text in axes.get_legend().get_texts()]


PUBLISHED_DATA = {"source": f"{data.DATASET_NAME}（r1.jsonl）", "revision": None, "sha256": "0"}
FAIR = "eval_loss 1.151；公开方案的一次运行（全部参数，公布的原文）最低 1.146（第 500 步），最后 1.163（第 1000 步）。"
CLEANED = "训练文本是清理过的，不是公布的原文（python data.py --raw）"


def against(cls=train.TrainArguments, sources=(PUBLISHED_DATA,), raw=True, steps=1080, evaluated=True, **flags) -> str:
    """What is said at the end of a run like the published one, but for these changes."""
    args = cls(report_to="none", **flags)
    logs = [{"eval_loss": 1.1512, "step": 500}] if evaluated else []
    state = transformers.TrainerState(global_step=800, max_steps=steps, log_history=logs)
    state.best_model_checkpoint = "output/checkpoint-500"
    return model_card.against_published(args, state, {"sources": list(sources), "raw": raw}, train.PUBLISHED)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"output_dir": "elsewhere", "logging_steps": 5, "eval_samples": 0, "batch_tokens": 800}, None),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, None),  # as published
        ({"full_logits": True, "optimizer": "optim", "fast_kernels": False, "early_stopping_patience": 0}, None),  # too
        ({"sources": [PUBLISHED_DATA | {"source": f"ms://{data.DATASET_NAME}"}]}, None),
        ({"cls": train_lora.LoraArguments}, "它训练了全部参数，这里只训练 LoRA"),
        ({"raw": False}, CLEANED),
        ({"sources": [PUBLISHED_DATA | {"source": "my.jsonl"}]}, "数据不同"),
        ({"sources": []}, "数据不同"),
        ({"sources": [PUBLISHED_DATA] * 2}, f"数据不只是 {data.DATASET_NAME}"),
        ({"model_name": "Qwen/Qwen3-0.6B"}, "设置不同（--model_name）"),
        ({"learning_rate": 5e-5, "seed": 1}, "设置不同（--learning_rate、--seed）"),
        ({"val_file": "mine.jsonl"}, "设置不同（--val_file）"),
        ({"gradient_accumulation_steps": 2}, "每步 8 条样本，它是 4 条"),
        ({"steps": 224}, "共 224 步，它是 1082 步"),  # --dataset …#500
        ({"evaluated": False}, "保存的权重没有评估过"),
    ],
    ids=str,
)
def test_the_published_curve_is_named_only_where_the_comparison_is_fair(changes, why):
    assert against(**changes) == (f"不与公开方案的损失曲线比较：{why}。" if why else FAIR)


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


def test_why_it_is_not_compared_is_said_before_the_last_line(workspace, tiny_model, capsys):
    train.report(run(tiny_model, max_steps=1), "inference.py")
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line == "不与公开方案的损失曲线比较：数据不同。" and last.startswith("训练完成：1 步。")
