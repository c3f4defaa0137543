"""What is said of the saved weights, on the card, in the picture and on the screen, is true of them."""

from pathlib import Path

import matplotlib.figure
import pytest
import torch
from helpers import At, crash, run, same, weights

import data
import train
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
