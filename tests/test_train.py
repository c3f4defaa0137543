"""Training with the real Trainer on a tiny model: what moves, what is saved, and the committed curve."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT, arguments, losses, make_row, opening, refused, run, save, weights

import data
import train
from parts.model import encoding
from parts.model.weights import load_tokenizer

CURVE = ROOT / "tests" / "loss_curve.json"


def test_full_training_moves_every_parameter(workspace, tiny_model):
    run(tiny_model, max_steps=2, learning_rate=1e-3)
    before, after = weights(tiny_model), weights(data.OUTPUT_DIR)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_output_folder_is_complete_and_holds_the_best_weights(workspace, tiny_model):
    # A learning rate that grows until the loss rises again: the best weights are not the last.
    trainer = run(tiny_model, max_steps=16, eval_steps=4, learning_rate=0.3, warmup_steps=16)
    folder = Path(data.OUTPUT_DIR)
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "README.md", "loss.png", "run.json", "trainer_state.json", "Modelfile"),
    }
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert modes == {Path("train.jsonl").stat().st_mode}  # what the umask gives, as for any file
    evaluations = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = min(evaluations, key=evaluations.get)
    assert best != max(evaluations)
    assert len(list(folder.glob("checkpoint-*"))) <= 2
    best_weights, saved = weights(folder / f"checkpoint-{best}"), weights(folder)
    assert all(torch.equal(saved[name], best_weights[name]) for name in saved)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["use_cache"] is True
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in (
        "它不是医生",
        f"{evaluations[best]:.4f}（第 {best} 步）",
        "108 / 12",
        transformers.__version__,
        "base_model: base",
    ):
        assert part in card
    assert str(tiny_model.parent) not in card  # no path of this machine
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_stops_when_the_evaluation_loss_no_longer_improves(workspace, tiny_model):
    trainer = run(tiny_model, max_steps=40, eval_steps=1, learning_rate=1.0, early_stopping_patience=3)
    evaluations = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.global_step == evaluations.index(min(evaluations)) + 1 + 3 < 40


def test_twenty_steps_follow_the_committed_curve(workspace, tiny_model):
    """The recipe as it is, on the demo's data. When it changes on purpose, the failure shows the new curve."""
    trainer = run(tiny_model, max_steps=20, eval_steps=20)
    curve = [[round(log["loss"], 4), round(log["grad_norm"], 4)] for log in trainer.state.log_history if "loss" in log]
    expected = json.loads(CURVE.read_text(encoding="utf-8"))
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], abs=2e-3), json.dumps(curve)
    assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in expected], rel=1e-2), json.dumps(curve)


def test_a_finished_run_is_not_overwritten_without_being_told(workspace, tiny_model):
    run(tiny_model, max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in Path(data.OUTPUT_DIR).rglob("*")}
    with pytest.raises(SystemExit, match="已有训练完的模型.*--output_dir.*--overwrite_output_dir"):
        run(tiny_model, max_steps=2)
    assert before == {path: path.stat().st_mtime_ns for path in Path(data.OUTPUT_DIR).rglob("*")}
    trainer = run(tiny_model, max_steps=4, overwrite_output_dir=True)
    assert trainer.state.global_step == 4 and len(losses(trainer)) == 4  # anew, not continued


@pytest.mark.parametrize("check", [False, True])
def test_a_template_that_does_not_think_is_refused_before_data_and_weights(workspace, tiny_model, check):
    shutil.copytree(tiny_model, "r1")
    Path("r1/model.safetensors").write_bytes(b"no weights")
    Path("train.jsonl").write_text("no data", encoding="utf-8")
    template = Path("r1/chat_template.jinja")
    template.write_text(template.read_text(encoding="utf-8").replace("loop.index0 > last.user", "false"))
    message = "r1 的对话模板不支持思考；请换一个会思考的模型，例如 Qwen/Qwen3-1.7B。"
    refused(message, train.check if check else train.train, arguments("r1"))


def test_another_system_prompt_of_the_base_is_replaced_and_said(workspace, tiny_model, capsys):
    shutil.copytree(tiny_model, "base")
    encoding.with_system(load_tokenizer("base"), "你是律师。").save_pretrained("base")
    run("base", max_steps=1)
    said = "提示：base 此前用的是另一个系统提示词，现在换成 data.py 里的 SYSTEM_PROMPT。"
    assert capsys.readouterr().out.count(said) == 1
    assert encoding.default_system(load_tokenizer(data.OUTPUT_DIR)) == data.SYSTEM_PROMPT
    run(data.OUTPUT_DIR, max_steps=1, output_dir="further")
    assert "另一个系统提示词" not in capsys.readouterr().out


def conversations(count: int) -> list[dict]:
    """Rows as data.py writes them: every second one after an earlier turn, every third one without thinking."""
    rows = [make_row(i, **{} if i % 3 else {"think": ""}) for i in range(count)]
    return [row | ({"history": [["先问？", "先答。"]]} if i % 2 else {}) for i, row in enumerate(rows)]


def test_conversations_and_rows_without_thinking_are_trained_on(workspace, tiny_model, capsys):
    files = {
        "train_file": save(conversations(12), "turns.jsonl"),
        "val_file": save(conversations(4), "v.jsonl"),
    }
    run(tiny_model, max_steps=2, **files)
    out = capsys.readouterr().out
    assert "turns.jsonl：12 条" in out and "\n【问题】问题0？\n" in out
    tokenizer = load_tokenizer(data.OUTPUT_DIR)
    examples = data.load_dataset("turns.jsonl", tokenizer, 2048)
    texts = [
        tokenizer.decode([label for label in labels if label != encoding.IGNORE_INDEX]) for labels in examples["labels"]
    ]
    assert "<think>" not in texts[0] and texts[0].startswith("回答0。")  # as --no_thinking asks
    assert texts[1].startswith("答。<|im_end|>") and "思考1。" in texts[1]  # the earlier answer but for its first token
    assert len(set(texts)) == 12


def test_data_without_thinking_are_said_to_the_end(workspace, tiny_model, capsys):
    file = save([make_row(i, think="") for i in range(8)], "plain.jsonl")
    train.report(run(tiny_model, max_steps=1, train_file=file, val_file=file), "inference.py")
    assert capsys.readouterr().out.endswith("提问：python inference.py --no_thinking\n")
    assert "训练数据没有思考，直接回答" in Path(data.OUTPUT_DIR, "README.md").read_text(encoding="utf-8")
    train.report(run(tiny_model, max_steps=1, output_dir="thinks"), "inference.py")
    assert capsys.readouterr().out.endswith("--model_path thinks\n")
    assert "里思考，再回答" in Path("thinks", "README.md").read_text(encoding="utf-8")


def test_rows_without_thinking_need_a_model_that_can_do_without(workspace, tiny_model, folder):
    shutil.copytree(tiny_model, "thinking_only")
    template = Path("thinking_only/chat_template.jinja")
    template.write_text(opening(template.read_text(encoding="utf-8")), encoding="utf-8")
    refused(
        "数据中有 think 为空的行，而这个模型的对话模板不能关闭思考；~",
        run,
        "thinking_only",
        train_file=save(conversations(12), "turns.jsonl"),
    )
