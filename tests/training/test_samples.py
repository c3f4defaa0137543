"""Questions asked during a training: their replies become texts, and the training ends in the same weights
with and without them, bit for bit."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import At, build_trainer, crash, losses, make_row, run, run_steps, same, weights

import data
from parts.training import samples

ROW = make_row(1, question="头痛怎么办？", answer="多休息，多喝水。")
ASKED = {"eval_samples": 2, "sample_tokens": 6}


@pytest.fixture
def logged(monkeypatch):
    """[(step, texts)] of the samples, as they come."""
    calls = []
    monkeypatch.setattr(samples.tracking, "log_texts", lambda name, texts, step=None: calls.append((step, texts)))
    return calls


WAYS = [(False, {}), (True, {}), (False, {"checkpoint_every": 1, "batch_tokens": 1}), (False, {"fast_kernels": False})]


@pytest.mark.parametrize(("lora", "changes"), WAYS, ids=str)
def test_weights_and_losses_are_the_same_bit_for_bit_with_and_without_them(
    workspace, tiny_model, logged, lora, changes, monkeypatch
):
    """With dropout, whose masks are drawn from the states that have to be put back; also after an interruption."""
    if "fast_kernels" in changes:
        monkeypatch.setattr(samples.generate, "fast_loop", None)  # is not called
    changes = {"max_steps": 10} | changes
    plain = run_steps(tiny_model, lora, output_dir="plain", **changes)
    with pytest.raises(EOFError):
        run_steps(tiny_model, lora, callbacks=[At(8, crash)], output_dir="asked", **changes, **ASKED)
    asked = run_steps(tiny_model, lora, output_dir="asked", **changes, **ASKED)
    assert [step for step, texts in logged if len(texts) == 2] == [5, 10]
    assert same(weights("plain"), weights("asked")) and losses(plain) == losses(asked)


@pytest.fixture
def callback(workspace, tiny_model, tokenizer):
    """Samples of a trainer."""
    return samples.Samples(build_trainer(tiny_model, tokenizer), [ROW] * 2, data.to_messages, 6)


def evaluate(callback, act) -> None:
    """As after an evaluation; `act()` at each token of the replies."""
    trainer = callback.trainer
    hook = trainer.model.register_forward_hook(lambda *_: act())
    callback.on_evaluate(trainer.args, trainer.state, trainer.control)
    hook.remove()


def test_without_swanlab_they_are_on_the_screen(callback, capsys):
    evaluate(callback, lambda: None)
    printed = capsys.readouterr().out
    assert "第 0 步  样例：\n\n【问题】头痛怎么办？" in printed and printed.count("【回答】") == 2


def test_a_signal_ends_them_at_the_next_token(callback, logged):
    calls, callback.tokens = [], 2000
    callback.trainer.interruption = SimpleNamespace(number=0)

    def signal():
        calls.append(1)
        callback.trainer.interruption.number = 15 if len(calls) >= 3 else 0

    for _ in range(2):
        evaluate(callback, signal)
    assert 3 <= len(calls) <= 5


class Fail(transformers.TrainerCallback):
    """The memory is not enough for the first reply."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.hook = model.register_forward_hook(self.fail, with_kwargs=True)

    def fail(self, module, args, kwargs, output):
        if kwargs.get("use_cache"):
            self.hook.remove()
            torch.rand(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_where_memory_is_not_enough_training_goes_on_without(workspace, tiny_model, logged, capsys):
    plain = run(tiny_model, output_dir="plain")
    capsys.readouterr()
    asked = run(tiny_model, callbacks=[Fail()], output_dir="asked", **ASKED)
    said = "第 2 步  样例：内存（显存）不足，之后不再生成；训练照常。"
    assert [line for line in capsys.readouterr().out.splitlines() if "样例" in line] == [said] and not logged
    assert same(weights("plain"), weights("asked")) and losses(plain) == losses(asked)


def test_the_model_is_afterwards_what_it_was_also_after_an_error(callback):
    model = callback.trainer.model.train()
    before = model.config._attn_implementation, model.training

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="illegal memory access"):  # which is not taken for memory
        evaluate(callback, fail)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1) and (model.config._attn_implementation, model.training) == before
    assert callback.trainer.last_hidden is None and all(p.grad is None for p in model.parameters())
