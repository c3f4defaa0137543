"""Training with the real Trainer and peft on a tiny model: what moves, what is saved, what is logged, what resumes."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import rich.cells
import torch
import transformers
from conftest import ROOT

import data
import inference
import inference_lora
import train
import train_lora

CURVE = ROOT / "tests" / "loss_curve.json"


def test_full_training_moves_every_parameter(workspace, tiny_model):
    run(tiny_model, max_steps=2, learning_rate=1e-3)
    before, after = weights(tiny_model), weights(data.OUTPUT_DIR)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_lora_training_moves_the_adapter_only_and_saves_only_it(workspace, tiny_model):
    trainer = run(tiny_model, lora=True, max_steps=2, learning_rate=1e-2)
    before = weights(tiny_model)
    base = {name.replace(".base_layer", ""): value for name, value in trainer.model.get_base_model().named_parameters()}
    assert all(torch.equal(before[name], base[name]) for name in before)
    adapter = weights(data.LORA_OUTPUT_DIR)
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(adapter) == 2 * 2 * len(linear)  # A and B, two layers
    assert all(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)  # B begins at 0
    assert not Path(data.LORA_OUTPUT_DIR, "model.safetensors").exists()
    config = json.loads(Path(data.LORA_OUTPUT_DIR, "adapter_config.json").read_text(encoding="utf-8"))
    settings = [config[key] for key in ("r", "lora_alpha", "lora_dropout", "base_model_name_or_path")]
    assert settings == [8, 32, 0.1, str(tiny_model)]


def test_merged_adapter_replies_as_base_and_adapter_do(workspace, tiny_model):
    trainer = run(tiny_model, lora=True, max_steps=2, learning_rate=1e-1)
    model, tokenizer = inference_lora.load_adapter(data.LORA_OUTPUT_DIR)
    inference_lora.merge_to("merged", model, tokenizer, data.LORA_OUTPUT_DIR)
    ids = torch.tensor([encoding.encode_messages(tokenizer, data.to_messages("头痛？"), prompt_only=True)])
    plain, _ = inference.load_trained("merged")
    with torch.no_grad():
        logits = [m.eval()(input_ids=ids).logits for m in (trainer.model, model, plain)]
        untuned = models.load_weights(str(tiny_model), torch.device("cpu"))(input_ids=ids).logits
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], logits[2], rtol=0, atol=0)
    assert (logits[0] - untuned).abs().max() > 1e-2


def test_output_folder_is_complete_and_holds_the_best_weights(workspace, tiny_model):
    # A learning rate that grows until the loss rises again: the best weights are not the last.
    trainer = run(tiny_model, max_steps=16, eval_steps=4, learning_rate=0.3, warmup_steps=16)
    folder = Path(data.OUTPUT_DIR)
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "README.md", "loss.png", "run.json", "trainer_state.json"),
    }
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


def test_one_by_one_accumulated_and_all_at_once_give_the_same_losses(workspace, tiny_model):
    """Four examples a step: the published four batches of one with transformers' own loss and attention, against one
    batch of four."""
    published = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "checkpoint_every": 1}
    published |= {"full_logits": True, "fast_kernels": False, "optimizer": "optim"}
    reference = run(tiny_model, output_dir="published", **published)
    assert losses(run(tiny_model, output_dir="ours")) == pytest.approx(losses(reference), rel=1e-5)


def test_evaluation_loss_is_the_mean_over_examples_of_their_mean_token_loss(workspace, tiny_model):
    trainer = run(tiny_model)
    per_example = []
    with torch.no_grad():
        for example in trainer.eval_dataset:
            logits = trainer.model.eval()(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
            per_example.append(torch.nn.functional.cross_entropy(logits, torch.tensor(example["labels"][1:])).item())
    best = min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert sum(per_example) / len(per_example) == pytest.approx(best, rel=1e-5)


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


def test_samples_are_answered_with_cache_and_without_dropout_or_checkpointing(workspace, tiny_model, monkeypatch):
    seen = []
    forward = transformers.Qwen3ForCausalLM.forward

    @functools.wraps(forward)  # Trainer reads the names of its parameters
    def watched(self, *args, **kwargs):
        seen.append((self.training, kwargs.get("use_cache"), kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", watched)
    run(tiny_model, sample_tokens=5)
    samples = [(training, shape[1]) for training, use_cache, shape in seen if use_cache and shape[0] == train.SAMPLES]
    # Three questions in one batch; after the prompt one new token at a time, which only a cache allows.
    assert samples[0][1] > 1 and samples[1:] == [(False, 1)] * 4


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB", "MPS backend out of memory"])
def test_out_of_memory_says_what_to_lower_in_order(message):
    with pytest.raises(SystemExit) as error, terminal.explain_out_of_memory(train.OUT_OF_MEMORY):
        raise RuntimeError(message)
    steps = ("--memory_gb", "--max_length 1024", "train_lora.py", "Qwen/Qwen3-0.6B")
    places = [str(error.value).index(step) for step in steps]
    assert places == sorted(places)


def test_real_out_of_memory_of_the_cpu_is_recognised():
    with pytest.raises(SystemExit, match="显存（内存）不足"), terminal.explain_out_of_memory(train.OUT_OF_MEMORY):
        torch.empty(2**60)


def test_other_runtime_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), terminal.explain_out_of_memory(train.OUT_OF_MEMORY):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("bar", [True, False], ids=["bar", "no bar"])
def test_each_log_is_one_line_that_fits_a_terminal(workspace, tiny_model, bar, capsys):
    run(tiny_model, max_steps=2, logging_steps=1, eval_steps=2, disable_tqdm=not bar)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("第 ")]
    assert [re.match(r"第 (\d) 步  (loss|评估 eval_loss|训练用时) ", line).groups() for line in lines] == [
        ("1", "loss"),
        ("2", "loss"),
        ("2", "评估 eval_loss"),
        ("2", "训练用时"),
    ]
    assert "{'loss'" not in out and ("2/2" in err) == bar
    longest = {"loss": 1.1234, "grad_norm": 12.34, "learning_rate": 9.88e-5, "tokens_per_second": 40000.0}
    state = train.transformers.TrainerState(global_step=1000)
    packed_trainer.LogLines().on_log(None, state, None, longest | {"peak_memory_gb": 12.34})
    line = capsys.readouterr().out.rstrip()
    assert rich.cells.cell_len(line) <= 80
