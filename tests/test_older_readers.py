"""What is saved reads in transformers 4 as it does here; TRANSFORMERS_4 names the folder of such an installation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import load_attentive, prepared, run

import inference_lora
from parts import models, older_readers

TRANSFORMERS_4 = os.environ.get("TRANSFORMERS_4")
TEXT = "<|im_start|>user\n感冒 and 0456<|im_end|>\n<think>\n想\n</think>"
IDS = torch.arange(100, 400)[None]
READER = """
import json, sys, torch, transformers
ids, messages = torch.arange(100, 400)[None], [{"role": "user", "content": "感冒"}]
found = {"version": transformers.__version__}
for folder in sys.argv[2:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found[folder] = {
        "ids": tokenizer(sys.argv[1]).input_ids,
        "prompt": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        "special": sorted(tokenizer.all_special_tokens),
        "padding": [tokenizer.eos_token, tokenizer.pad_token],
    }
    if folder != "lora":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            found[folder]["logits"] = model(ids).logits[0].tolist()
        settings = model.generation_config
        found[folder]["sampling"] = [settings.temperature, settings.top_k, settings.top_p, settings.eos_token_id]
        found[folder]["dtype"] = str(model.dtype)
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Path:
    """A working folder with `full`, `lora` and `merged`, trained from a base in the form that Qwen3 is published in."""
    with prepared(tmp_path_factory) as folder:
        shutil.copytree(tiny_model, "base")
        load_attentive(tiny_model).save_pretrained("base")
        change(
            "base/config.json",
            lambda old: old | {"rope_theta": 1000000, "rope_scaling": None, "torch_dtype": "float32"},
        )
        change("base/config.json", lambda old: {k: v for k, v in old.items() if k not in ("rope_parameters", "dtype")})
        names = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "extra_special_tokens": None}
        names |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        change("base/tokenizer_config.json", lambda old: {k: v for k, v in (old | names).items() if v is not None})
        for lora, name in ((False, "full"), (True, "lora")):
            run("base", lora, max_steps=2, output_dir=name)
        inference_lora.merge_to("merged", "lora")
    return folder


def change(path: str, edit) -> None:
    file = Path(path)
    file.write_text(json.dumps(edit(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")


@pytest.mark.skipif(not TRANSFORMERS_4, reason="TRANSFORMERS_4 names no installation; .ci/run makes one")
def test_transformers_4_reads_what_was_trained(trained, monkeypatch):
    monkeypatch.chdir(trained)
    folders, env = ("full", "merged", "lora"), os.environ | {"PYTHONPATH": TRANSFORMERS_4, "PYTHONUTF8": "1"}
    subprocess.run([sys.executable, "-c", READER, TEXT, *folders], check=True, env=env)
    found = json.loads(Path("found.json").read_text(encoding="utf-8"))
    assert found.pop("version").startswith("4.")
    messages = [{"role": "user", "content": "感冒"}]
    for folder, there in found.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert there["ids"] == tokenizer(TEXT).input_ids
        assert there["prompt"] == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert there["special"] == sorted(tokenizer.all_special_tokens)
        assert there["padding"] == ["<|im_end|>", "<|endoftext|>"]
    for folder in ("full", "merged"):
        model = models.load_weights(folder, torch.device("cpu"))
        with torch.no_grad():
            logits = model(IDS).logits[0]
            torch.testing.assert_close(torch.tensor(found[folder]["logits"]), logits, rtol=0, atol=1e-4)
            model.model.rotary_emb.inv_freq.copy_(1e4 ** -(torch.arange(0, 32, 2) / 32))
            assert (model(IDS).logits[0] - logits).abs().max() > 0.1  # so the base of the rotary embedding counts
        settings = model.generation_config
        expected = [settings.temperature, settings.top_k, settings.top_p, settings.eos_token_id]
        assert found[folder]["sampling"] == expected and found[folder]["dtype"] == "torch.float32"


@pytest.mark.parametrize("folder", ["full", "merged"])
def test_what_older_readers_look_for_is_there(trained, folder):
    config = json.loads((trained / folder / "config.json").read_text(encoding="utf-8"))
    expected = {"rope_theta": 1000000, "rope_scaling": None, "torch_dtype": "float32"}
    assert expected.items() <= config.items()
    assert config["rope_parameters"] == {"rope_theta": 1000000, "rope_type": "default"}


@pytest.mark.parametrize("folder", ["full", "merged", "lora"])
def test_the_tokenizer_has_its_older_names_too(trained, folder):
    settings = json.loads((trained / folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
    assert settings["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    tokens = {id: token["content"] for id, token in settings["added_tokens_decoder"].items()}
    assert list(tokens.values()) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192},
    ],
)
def test_transformers_5_reads_the_same_as_before(tmp_path, tokenizer, rope):
    config = transformers.Qwen3Config(rope_parameters=rope, dtype="bfloat16", max_position_embeddings=32768)
    read = []
    for include in (lambda folder: None, older_readers.include):
        config.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        include(tmp_path)
        tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
        vocabulary = (tokens.get_vocab(), tokens(TEXT).input_ids, tokens.special_tokens_map, tokens.all_special_tokens)
        read.append((transformers.AutoConfig.from_pretrained(tmp_path).to_dict(), vocabulary, tokens.chat_template))
    assert read[0] == read[1]
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["rope_theta"] == rope["rope_theta"] and written["torch_dtype"] == "bfloat16"
    scaling = written["rope_scaling"]
    assert scaling is None if rope["rope_type"] == "default" else scaling["factor"] == 4.0
