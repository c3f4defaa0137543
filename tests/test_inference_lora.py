"""Adapters that cannot be asked get one sentence, and merging writes over nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import refused

import inference
import inference_lora
from parts import hub, models

ADAPTER = "lora 的适配器无法装到 {} 上（{}）；请重新运行 python train_lora.py"


def test_adapter_as_the_model_to_train_or_to_ask(finished):
    merge = "请先合并：python inference_lora.py --model_path lora --merge_to output/merged"
    refused(f"lora 是 LoRA 适配器，不是完整的模型；{merge}", hub.find_model, "lora", "")
    other = "{0} 要用另一个脚本来问：python {1} --model_path {0}"
    refused(other.format("lora", "inference_lora.py"), inference.load_trained, "lora")
    refused(other.format("full", "inference.py"), inference_lora.load_adapter, "full")


def test_weights_that_are_cut_off(finished):
    for file in (Path("full/model.safetensors"), Path("lora/adapter_model.safetensors")):
        file.write_bytes(file.read_bytes()[:1000])
    refused("full 里的模型无法读取（~）；请重新下载或重新训练。", inference.load_trained, "full")
    base = json.loads(Path("lora/adapter_config.json").read_text())["base_model_name_or_path"]
    refused(ADAPTER.format(base, "~"), inference_lora.load_adapter, "lora")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"base_model_name_or_path": null}'])
def test_adapter_configuration_that_is_broken(finished, text):
    Path("lora/adapter_config.json").write_text(text, encoding="utf-8")
    unreadable = "lora/adapter_config.json 无法读取（~）；请重新运行 python train_lora.py"
    no_base = "lora 的适配器需要基础模型 ，但它不在那里；请放回，或改 adapter_config.json 里的路径。"
    refused(no_base if "null" in text else unreadable, inference_lora.load_adapter, "lora")


def test_adapter_without_its_weights_asks_no_hub(finished):
    Path("lora/adapter_model.safetensors").unlink()
    base = json.loads(Path("lora/adapter_config.json").read_text())["base_model_name_or_path"]
    refused(ADAPTER.format(base, "缺少 adapter_model.safetensors"), inference_lora.load_adapter, "lora")


@pytest.mark.parametrize("folder", ["a_file", "full", "/proc/merged", ""])
def test_merging_is_refused_into_anything_but_a_new_folder(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("x")
    Path("full").mkdir()
    Path("full", "model.safetensors").touch()
    message = f"错误：{folder} 不是可写的空文件夹；请用 --merge_to 指定一个新文件夹。"
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}$"):
        inference_lora.refuse_unless_empty(folder)


def test_adapter_of_another_base(finished, tmp_path):
    import tiny_model

    tiny_model.build(tmp_path / "wide", tiny_model.sample_texts(), hidden_size=128)
    shutil.copytree(finished / "lora", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(tmp_path / "wide")}
    config.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(SystemExit, match="的适配器无法装到.*train_lora.py"):
        inference_lora.load_adapter(str(tmp_path / "adapter"))


def test_adapter_whose_base_is_missing(finished, tmp_path):
    shutil.copytree(finished / "lora", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": "/nowhere/base"}
    config.write_text(json.dumps(settings), encoding="utf-8")
    message = "adapter 的适配器需要基础模型 /nowhere/base，但它不在那里；请放回，或改 adapter_config.json 里的路径。"
    refused(message, inference_lora.load_adapter, "adapter")


def test_a_base_models_replies_end_with_the_turn_in_any_tool(tiny_model, tokenizer, folder):
    """Its own settings name another token."""
    model = models.load_weights(str(tiny_model), torch.device("cpu"))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.pad_token_id
    inference_lora.merge_to("merged", model, tokenizer, "no adapter")
    settings = json.loads(Path("merged/generation_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert models.load_weights("merged", torch.device("cpu")).config.eos_token_id == tokenizer.eos_token_id
