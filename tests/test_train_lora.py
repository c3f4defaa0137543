"""LoRA with the real peft: what moves, what is saved, and that base, adapter and merged model agree."""

import json
import shutil
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import At, contents, crash, history, refused, run, run_steps, same, save_other_base, weights

import data
import inference_lora
import train_lora
from parts.model import encoding
from parts.model.weights import load_tokenizer, load_trained, load_weights


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
    model, tokenizer = load_trained(data.LORA_OUTPUT_DIR)
    inference_lora.merge_to("merged", data.LORA_OUTPUT_DIR)
    ids = torch.tensor([encoding.encode_messages(tokenizer, data.to_messages("头痛？"), prompt_only=True)])
    plain, _ = load_trained("merged")
    with torch.no_grad():
        logits = [m.eval()(input_ids=ids).logits for m in (trainer.model, model, plain)]
        untuned = load_weights(str(tiny_model), torch.device("cpu"))(input_ids=ids).logits
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], logits[2], rtol=0, atol=0)
    assert (logits[0] - untuned).abs().max() > 1e-2


def test_adapters_have_the_dtype_of_the_weights(workspace, tiny_model):
    model = load_weights(str(tiny_model), torch.device("cpu")).to(torch.bfloat16)
    model = train_lora.add_adapter(model, train_lora.arguments())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_saving_an_adapter_asks_no_hub(tiny_model, tmp_path, monkeypatch):
    """Although it names its base as a hub does."""
    asked = []
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", lambda *names: asked.append(names))
    model = load_weights(str(tiny_model), torch.device("cpu"))
    args = train_lora.arguments(model_name="Qwen/Qwen3-1.7B", report_to="none")
    train_lora.add_adapter(model, args).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "Qwen/Qwen3-1.7B" and asked == []


def test_training_goes_on_from_an_adapter_with_its_own_settings(workspace, tiny_model, capsys):
    """Its loss is where the adapter's was, its base is the adapter's, and what it went on from is noted."""
    run(tiny_model, lora=True, max_steps=2, learning_rate=1e-1, lora_rank=4, target_modules=["v_proj", "q_proj"])
    run(tiny_model, lora=True, adapter=data.LORA_OUTPUT_DIR, max_steps=1, eval_on_start=True, output_dir="more")
    losses = []
    for folder in (data.LORA_OUTPUT_DIR, "more"):
        losses.append([log["eval_loss"] for log in history(folder) if "eval_loss" in log])
    assert losses[0][-1] == losses[1][0]
    args = train_lora.arguments(adapter="more", report_to="none")
    assert (args.model_name, args.lora_rank, args.target_modules) == (str(tiny_model), 4, ["q_proj", "v_proj"])
    assert "从适配器 more 接着训练" in capsys.readouterr().out
    assert f"| 从哪个适配器接着训练 | {data.LORA_OUTPUT_DIR}，SHA-256 " in Path("more/README.md").read_text()
    config = json.loads(Path("more/adapter_config.json").read_text())
    assert (config["r"], config["lora_dropout"], config["base_model_name_or_path"]) == (4, 0.1, str(tiny_model))


def test_an_interrupted_run_from_an_adapter_continues_to_the_same_weights(interrupted, tiny_model):
    """From a checkpoint of an unfinished run, and from nothing else."""
    train = partial(run_steps, tiny_model, True)
    train(adapter="lora/checkpoint-10", output_dir="straight")
    with pytest.raises(EOFError):
        train([At(13, crash)], adapter="lora", output_dir="more")
    other = "{} 里未完成的训练用的是别的设置：~adapter (sha256) {}~"
    refused(other.format("more", "~ -> None"), train, output_dir="more")
    shutil.copytree("lora", "copy")
    refused(other.format("lora", "None -> "), train, adapter="copy", output_dir="lora")
    file = Path("lora/checkpoint-10/adapter_model.safetensors")
    before = file.read_bytes()
    file.write_bytes(before[:-1] + b"!")
    refused(other.format("more", "~ -> "), train, adapter="lora/checkpoint-10", output_dir="more")
    file.write_bytes(before)
    train(adapter="lora", output_dir="more")
    assert same(weights("more"), weights("straight")) and not same(weights("more"), weights("lora/checkpoint-10"))


@pytest.mark.parametrize(
    ("flags", "stem"),
    [
        ({"lora_rank": 16}, "--lora_rank 16：适配器 lora 是 8；请去掉 --lora_rank。"),
        ({"target_modules": ["q_proj"]}, "--target_modules ['q_proj']：适配器 lora 是 "),
        ({"adapter": "full"}, "--adapter full 不是 LoRA 适配器；"),
        ({"adapter": "lora/checkpoint-2", "output_dir": "lora"}, "--adapter lora/checkpoint-2 在 --output_dir lora 里"),
        ({"model_name": "other"}, "lora 的适配器不是在现在的 other 上训练的"),
    ],
    ids=str,
)
def test_what_contradicts_an_adapter_is_refused(finished, tiny_model, flags, stem):
    save_other_base(tiny_model)
    before = contents(finished)
    values = {"model_name": tiny_model, "adapter": "lora", "output_dir": "more"} | flags
    refused(f"{stem}~", run, values.pop("model_name"), True, **values)
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("config", "stem"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "--adapter lora 不能接着训练（不是普通的 LoRA：peft_type 是 PROMPT_TUNING）"),
        ({"bias": "all"}, "--adapter lora 不能接着训练（不是普通的 LoRA：bias 是 all）"),
        ({"of_next_year": [1]}, "--adapter lora 不能接着训练（不是普通的 LoRA：of_next_year 是 [1]）"),
        ({"r": 4}, "lora 的适配器无法加载到 "),
        ({"target_modules": ["q_proj"]}, "lora 的适配器无法加载到 ~ 上（有 24 个权重对不上，例如 "),
    ],
    ids=str,
)
def test_an_adapter_of_another_kind_is_refused(finished, tiny_model, config, stem):
    path = Path("lora/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    before = contents(finished)
    refused(f"{stem}~", run, tiny_model, True, adapter="lora", output_dir="more")
    assert contents(finished) == before


@pytest.fixture
def base(tiny_model, folder):
    """A folder as Qwen3-1.7B-Base's: it stops at <|endoftext|> alone and is greedy."""
    shutil.copytree(tiny_model, "base")
    settings = json.loads(Path("base/tokenizer_config.json").read_text(encoding="utf-8"))
    Path("base/tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    end = load_tokenizer("base").convert_tokens_to_ids("<|endoftext|>")
    Path("base/generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": end}))
    config = json.loads(Path("base/config.json").read_text(encoding="utf-8"))
    Path("base/config.json").write_text(json.dumps(config | {"eos_token_id": end}))
    return "base"


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_is_asked_elsewhere_as_it_is_here(workspace, base, lora, capsys):
    """By a tool that knows only the folder: where to stop, how to sample, and what the model was told that it is."""
    run(base, lora=lora, max_steps=2, output_dir="out")
    assert "aligned accordingly" not in capsys.readouterr().err
    folders = ["out", "out/checkpoint-2"]
    if lora:
        inference_lora.merge_to("merged", "out")
        folders.append("merged")
    question = [{"role": "user", "content": "头痛？"}]
    for folder in folders:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        assert ids == encoding.encode_messages(tokenizer, data.to_messages("头痛？"), prompt_only=True), folder
        if not Path(folder, "adapter_config.json").exists():
            stop, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
            settings = transformers.GenerationConfig.from_pretrained(folder)
            assert (settings.eos_token_id, settings.pad_token_id) == ([stop, end], end)
            sampling = (settings.do_sample, settings.temperature, settings.top_p, settings.top_k)
            assert sampling == (True, 0.6, 0.95, 20)
            assert transformers.AutoConfig.from_pretrained(folder).eos_token_id == stop
