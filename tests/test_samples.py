"""Questions answered during a training: what is counted and logged of the replies, what they may cost, and that the
training ends in the same weights with and without them, bit for bit."""

import math
import random
import time
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
from helpers import At, build_trainer, crash, losses, make_row, run, run_steps, same, weights

import data
from parts import encoding, models, rehearsal, samples
from parts.encoding import Reply

ROW = make_row(1, question="头痛怎么办？", answer="多休息，多喝水。")
EVERY = {"eval_samples": 2, "sample_tokens": 6}  # seconds of a tiny model's training are no time for the real ones
NAMES = {f"eval_sample_{name}" for name in ("whole", "leak", "loop", "overlap", "seconds")}


def sampled(trainer) -> list[int]:
    """The steps at which samples were logged, each with all curves."""
    logs = [log for log in trainer.state.log_history if "eval_sample_whole" in log]
    assert all(log.keys() >= NAMES for log in logs)
    return [log["step"] for log in logs]


@pytest.fixture
def no_limit(monkeypatch):
    """They may take as long as they like."""
    monkeypatch.setattr(samples, "SHARE", 1e9)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_weights_and_losses_are_the_same_bit_for_bit_with_and_without_them(
    workspace, tiny_model, straight, no_limit, lora
):
    """With dropout, whose masks are drawn from the states that have to be put back; and where layers are recomputed."""
    trainer = run_steps(tiny_model, lora, **EVERY)
    assert sampled(trainer) == [5, 10, 15, 20]
    assert same(weights(trainer.args.output_dir), straight(lora))
    plain = run_steps(tiny_model, lora, output_dir="plain")
    assert losses(trainer) == losses(plain) and not sampled(plain)


@pytest.mark.parametrize("changes", [{"checkpoint_every": 1}, {"fast_kernels": False}, {"batch_tokens": 1}], ids=str)
def test_they_leave_each_way_of_training_as_it_was(workspace, tiny_model, no_limit, changes):
    runs = [run(tiny_model, output_dir=f"run{name}", **{"learning_rate": 1e-2} | changes | flags)
            for name, flags in (("plain", {}), ("sampled", EVERY))]  # fmt: skip
    assert sampled(runs[1]) == [2, 4]
    assert same(weights("runplain"), weights("runsampled")) and losses(runs[0]) == losses(runs[1])


def test_an_interrupted_run_goes_on_with_them_and_repeats_none(workspace, tiny_model, straight, no_limit):
    with pytest.raises(EOFError):
        run_steps(tiny_model, callbacks=[At(13, crash)], **EVERY)
    trainer = run_steps(tiny_model, **EVERY)
    assert sampled(trainer) == [5, 10, 15, 20] and same(weights(data.OUTPUT_DIR), straight())


def callback(tiny_model, tokenizer):
    """Samples of a training of 100 steps, after 10 of them."""
    trainer = build_trainer(tiny_model, tokenizer, max_steps=100)
    found = samples.Samples(trainer, [ROW] * 2, data.to_messages, 6)
    trainer.state = transformers.TrainerState(global_step=0, max_steps=100)
    found.on_train_begin(trainer.args, trainer.state, None)
    trainer.state.global_step = 10
    return found


def evaluate(found, seconds: float) -> list[int]:
    """As after an evaluation, `seconds` after the training began: the steps of all samples so far."""
    found.began = time.perf_counter() - seconds
    found.on_evaluate(found.trainer.args, found.trainer.state, found.trainer.control)
    return sampled(found.trainer)


def test_a_batch_is_begun_only_where_it_fits_into_its_share_and_what_is_left_out_is_said_once(
    workspace, tiny_model, tokenizer, capsys
):
    found = callback(tiny_model, tokenizer)
    assert evaluate(found, 100) == [10] and found.last == found.spent > 0
    found.last, found.spent = 3.0, 3.0
    capsys.readouterr()
    for step in (20, 30):
        found.trainer.state.global_step = step
        assert evaluate(found, 119) == [10]
    said = "第 20 步  样例暂不生成：已用 3.0 秒，再来一批就超过训练时间的 5%。"
    assert capsys.readouterr().out.splitlines() == [said]
    assert evaluate(found, 121) == [10, 30] and 3 < found.spent < 6
    found.last = math.inf
    evaluate(found, 121)
    assert "样例暂不生成" in capsys.readouterr().out.splitlines()[-1]  # said again after the next gap began


def test_a_batch_that_takes_longer_than_its_share_of_the_whole_run_is_broken_off(
    workspace, tiny_model, tokenizer, capsys
):
    found = callback(tiny_model, tokenizer)
    found.tokens, steps = 2000, []
    found.trainer.model.register_forward_hook(lambda *_: steps.append(1))
    assert evaluate(found, 0.1) == []  # 5 % of a run of 1 s: 50 ms
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("第 10 步  样例没有做完：给它的 0.1 秒不够（最多占训练时间的 5%），不记录")
    assert 0 < len(steps) < 500 and found.spent >= 0.05
    assert evaluate(found, 0.2) == [] and "样例暂不生成" in capsys.readouterr().out


def test_before_the_first_step_there_are_none(workspace, tiny_model, tokenizer, capsys):
    found = callback(tiny_model, tokenizer)
    found.trainer.state.global_step = 0
    assert evaluate(found, 100) == [] and "样例暂不生成" in capsys.readouterr().out


def test_a_signal_ends_them_at_the_next_token(workspace, tiny_model, tokenizer):
    found, steps = callback(tiny_model, tokenizer), []
    found.tokens, found.trainer.interruption = 2000, SimpleNamespace(number=0)

    def signal(*_):
        steps.append(1)
        found.trainer.interruption.number = 15 * (len(steps) >= 3)

    found.trainer.model.register_forward_hook(signal)
    assert evaluate(found, 100_000) == [] and 3 <= len(steps) <= 5
    assert evaluate(found, 100_000) == [] and len(steps) <= 5


def test_where_memory_is_not_enough_training_goes_on_without(workspace, tiny_model, straight, no_limit, capsys):
    def fail(module, args, kwargs, output):
        if kwargs.get("use_cache"):
            random.random(), numpy.random.rand(), torch.rand(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    at = At(1, lambda: None)
    at.on_train_begin = lambda args, state, control, model=None, **_: hooks.append(
        model.register_forward_hook(fail, with_kwargs=True)
    )
    at.on_train_end = lambda *_, **__: hooks.pop().remove()
    hooks = []
    trainer = run_steps(tiny_model, callbacks=[at], **EVERY)
    said = "第 5 步  样例：内存（显存）不足，之后不再生成；训练照常。"
    lines = [line for line in capsys.readouterr().out.splitlines() if "样例" in line]
    assert lines == [said] and sampled(trainer) == [] and same(weights(data.OUTPUT_DIR), straight())


def test_other_errors_are_not_taken_for_memory(workspace, tiny_model, tokenizer):
    found = callback(tiny_model, tokenizer)

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    found.trainer.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        evaluate(found, 100)


@pytest.mark.parametrize(("room", "fits"), [(1.0, 2), (0.6, 1), (0.4, 0)])
def test_no_more_questions_than_a_step_leaves_room_for(workspace, tiny_model, tokenizer, capsys, room, fits):
    found = callback(tiny_model, tokenizer)
    plan, args = found.trainer.plan, found.trainer.args
    prompt = encoding.encode_messages(tokenizer, data.to_messages(ROW["question"]), prompt_only=True)
    cache = 2 * (2 * 2 * 1 * 32 * 4) * (len(prompt) + 6 + 512)  # rows; keys and values, layers, heads, size, float32
    parts = {"权重": 1e6, "优化器": 1e6, "一步之内": room * cache + 1, "余量": 0.0}
    found.trainer.plan = plan._replace(parts=parts, free=0.0)
    found.trainer.state.global_step = 0
    found.on_train_begin(args, found.trainer.state, None)
    found.trainer.state.global_step = 10
    said = f"样例：评估时内存只够同时回答 {fits} 个问题，不是 2 个。\n"
    assert len(found.rows) == fits and capsys.readouterr().out.endswith(said if fits < 2 else "")
    assert evaluate(found, 100) == ([10] if fits else [])


def test_the_model_is_afterwards_what_it_was_also_after_an_error(workspace, tiny_model, tokenizer):
    trainer = build_trainer(tiny_model, tokenizer)

    def state():
        return trainer.model.config._attn_implementation, trainer.model.training, trainer.last_hidden

    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    trainer.model.train()
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    before, drawn = state(), draw()
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    with pytest.raises(EOFError), samples.untouched(trainer):
        assert state()[:2] == ("sdpa", False) != before[:2]
        transformers.set_seed(1)
        samples.answer(trainer.model, tokenizer, [ROW], data.to_messages, 3)
        draw()
        raise EOFError
    assert state() == before and draw() == drawn
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_same_weights_give_the_same_replies(workspace, tiny_model, tokenizer):
    found = callback(tiny_model, tokenizer)
    first, _, second = found.ask(math.inf), torch.rand(7), found.ask(math.inf)
    assert [reply[:3] for reply in first] == [reply[:3] for reply in second] and len(first) == 2


def test_deterministic_algorithms_are_asked_of_training_only(tiny_model, tokenizer):
    """On CUDA sampling has none, and would end the training."""
    model, seen = models.load_weights(str(tiny_model), torch.device("cpu")), []
    model.register_forward_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    for wanted in (True, False):
        torch.use_deterministic_algorithms(wanted)
        try:
            samples.answer(model, tokenizer, [ROW], data.to_messages, 1)
            assert torch.are_deterministic_algorithms_enabled() == wanted
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [False, False]


@pytest.mark.parametrize("thinks", [["", "", ""], ["想", "", ""]])
def test_samples_are_asked_as_their_rows_are_trained(tiny_model, tokenizer, thinks):
    """After their history; without thinking where the rows have none."""
    rows = [{"question": "问", "think": think, "answer": "答", "history": [["早", "好"]]} for think in thinks]
    model, seen = models.load_weights(str(tiny_model), torch.device("cpu")), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    samples.answer(model, tokenizer, rows, data.to_messages, 1)
    asked = data.to_messages("问", history=[["早", "好"]])
    prompt = encoding.encode_messages(tokenizer, asked, prompt_only=True, thinking=any(thinks))
    assert seen[0].tolist() == [prompt] * 3


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply("用户头痛，先安慰。", "多休息，多喝水。", True, "one"), (1, 0, 0, 1)),
        (Reply("用户头痛，先安慰。", "多休息，多喝水。", False, "one"), (1, 0, 0, 1)),  # cut off inside the answer
        (Reply("用户头痛，先安慰", "", False, "unclosed"), (0, 0, 0, 0)),
        (Reply("", "多休息，多喝水。", True, "none"), (0, 0, 0, 1)),  # a thinking was asked for
        (Reply("根据用户提供的答案，要多休息。", "多休息，多喝水。", True, "one"), (1, 1, 0, 1)),
        (Reply("想想。" + "需要注意休息，别太累了。" * 9, "", False, "unclosed"), (0, 0, 1, 0)),
        (Reply("好。", "Take it easy.", True, "one"), (1, 0, 0, 0)),
    ],
    ids=str,
)
def test_what_is_counted_of_a_reply(reply, expected):
    assert tuple(samples.measure(ROW, reply, True).values()) == expected


def test_the_rehearsal_puts_random_states_back_after_an_error():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    first = draw()
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    with pytest.raises(EOFError), rehearsal.same_random_states(torch.device("cpu")):
        draw()
        raise EOFError
    assert draw() == first
