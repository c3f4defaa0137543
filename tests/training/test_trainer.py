"""However a step is cut and an evaluation batched, losses and gradients are the same; each log is one
line."""

import re
import sys
from pathlib import Path

import pytest
import rich.cells
import torch
import torch.nn.functional as F
import transformers
from helpers import LENGTHS, as_jsonl, build_trainer, examples, gradient, losses, make_row, run

import data
from parts.model import encoding, weights
from parts.training import trainer as training

X = encoding.IGNORE_INDEX
END = 7  # of thinking
HISTORY = [["先问？", "先答。"]]
CPU = torch.device("cpu")


@pytest.mark.parametrize("flags", [{}, {"fast_kernels": False}, {"checkpoint_every": 1}, {"checkpoint_every": 2}])
@pytest.mark.parametrize("tokens", [1, 65, 1000])
def test_gradient_does_not_depend_on_how_a_step_is_cut_or_what_is_recomputed(
    workspace, tiny_model, tokenizer, tokens, flags
):
    """Against transformers' own attention, loss and whole logits, each example in a padded row of its own."""
    rows = examples()
    ours = gradient(build_trainer(tiny_model, tokenizer, batch_tokens=tokens, **flags), rows)
    model = weights.load_weights(str(tiny_model), CPU).train()
    ids, labels, mask = (
        torch.tensor([row[name] + [fill] * (max(LENGTHS) - len(row[name])) for row in rows])
        for name, fill in (("input_ids", 0), ("labels", X), ("input_ids", -1))
    )
    model(input_ids=ids, attention_mask=(mask != -1).long(), labels=labels, use_cache=False).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (ours - expected).norm() / expected.norm() < 1e-4


def test_no_logits_are_made_in_training_and_evaluation(workspace, tiny_model, tokenizer):
    trainer, shapes = build_trainer(tiny_model, tokenizer, file="val.jsonl"), []
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    gradient(trainer, examples())
    trainer.evaluate()
    assert shapes and set(shapes) == {0}


def test_one_by_one_accumulated_and_all_at_once_give_the_same_losses(workspace, tiny_model):
    """Four examples a step: the published four batches of one with transformers' own loss and attention,
    against one batch of four."""
    published = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "checkpoint_every": 1}
    published |= {"full_logits": True, "fast_kernels": False, "optimizer": "adamw"}
    reference = run(tiny_model, output_dir="published", **published)
    assert losses(run(tiny_model, output_dir="ours")) == pytest.approx(losses(reference), rel=1e-5)


# ---- evaluation ------------------------------------------------------------------------------------------


def val_rows() -> list[dict]:
    """With and without thinking, with and without a history."""
    rows = [make_row(i, think=f"思考{i}，" * (i + 1)) for i in range(4)]
    return [*rows, make_row(4, think=""), make_row(5, history=HISTORY), make_row(6, think="", history=HISTORY)]


@torch.no_grad()
def expected_losses(tiny_model, tokenizer) -> dict[str, float]:
    """The losses, from whole logits of one row at a time, split where its text says."""
    model = weights.load_weights(str(tiny_model), CPU)
    means, parts = [], {"think": [], "answer": []}
    for row in val_rows():
        example = encoding.encode_example(tokenizer, data.to_messages(**row))
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"][1:])
        losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels, reduction="none")
        losses = losses[labels != X]
        reply = encoding.encode_messages(tokenizer, data.to_messages(row["question"], row["think"], row["answer"]))
        written = reply[reply.index(encoding.think_tokens(tokenizer)[0]) :]  # <think> and all behind it
        count = written.index(encoding.think_tokens(tokenizer)[1]) + 1 if row["think"] else 0
        start = len(losses) - (len(written) - 1) if row["think"] else 0  # not its line break
        parts["think"] += losses[start : start + count].tolist()
        parts["answer"] += losses[:start].tolist() + losses[start + count :].tolist()
        means.append(losses.mean().item())
    parts["token"] = parts["think"] + parts["answer"]
    mean = {f"{name}_loss": sum(losses) / len(losses) for name, losses in parts.items()}
    return {"loss": sum(means) / len(means)} | mean


def test_thinking_ends_with_its_tag_and_belongs_to_the_last_reply():
    thinking = [X, X, 3, 4, END, 5, 6]
    turns = [X, 8, 9, X, X, 3, END, 5]  # the answer of an earlier turn, and a last reply
    thinkless = [X, X, X, 5, 6]
    marks = training.is_thinking(torch.tensor(thinking + turns + thinkless), END)
    assert marks.nonzero().flatten().tolist() == [2, 3, 4, 7 + 5, 7 + 6]


@pytest.mark.parametrize("tokens", [1, 300, 100_000])
def test_losses_are_those_of_each_row_by_itself(workspace, tiny_model, tokenizer, tokens):
    Path("val.jsonl").write_text(as_jsonl(val_rows()), encoding="utf-8")
    metrics = build_trainer(tiny_model, tokenizer, file="val.jsonl", batch_tokens=tokens).evaluate()
    for name, loss in expected_losses(tiny_model, tokenizer).items():
        assert metrics[f"eval_{name}"] == pytest.approx(loss, rel=1e-5), name


def test_without_thinking_all_is_answer(workspace, tiny_model, tokenizer):
    Path("val.jsonl").write_text(as_jsonl([make_row(1, think="")]), encoding="utf-8")
    metrics = build_trainer(tiny_model, tokenizer, file="val.jsonl").evaluate()
    assert "eval_think_loss" not in metrics and metrics["eval_answer_loss"] == metrics["eval_token_loss"]


# ---- the screen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bar", [True, False], ids=["a terminal", "a file"])
def test_each_log_is_one_line_and_its_losses_are_on_the_card(workspace, tiny_model, bar, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bar)
    trainer = run(tiny_model, max_steps=2, disable_tqdm=False)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("第 ")]
    logged = ["第 1 步  loss", "第 2 步  loss", "第 2 步  评估 eval_loss", "第 2 步  训练用时"]
    assert [re.match(r"第 \d 步  (评估 )?\w+", line)[0] for line in lines] == logged
    assert "{'loss'" not in out and ("2/2" in err) == bar
    [log] = [log for log in trainer.state.log_history if "eval_loss" in log]
    mean, think, answer = (log[f"eval_{name}"] for name in ("loss", "think_loss", "answer_loss"))
    said = f"| 验证损失 | 按行平均 {mean:.4f}，思考 {think:.4f}，回答 {answer:.4f} |"
    assert said in Path(data.OUTPUT_DIR, "README.md").read_text(encoding="utf-8")


def test_the_longest_lines_fit_too(capsys):
    step = {"loss": 1.1234, "grad_norm": 12.34, "learning_rate": 9.88e-5, "tokens_per_second": 4e4}
    evaluation = {f"eval_{name}": 1.1234 for name in ("loss", "token_loss", "think_loss", "answer_loss")}
    for logs in (step | {"peak_memory_gb": 12.34}, evaluation | {"eval_runtime": 123.4}):
        training.LogLines().on_log(None, transformers.TrainerState(global_step=1000), None, logs)
        line = capsys.readouterr().out.rstrip()
        assert line.startswith("第 1000 步  ") and rich.cells.cell_len(line) <= 80, line
