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
from parts.model import export

TRANSFORMERS_4 = os.environ.get("TRANSFORMERS_4")
READER = """
import json, sys, torch, transformers
ids, messages = torch.arange(100, 400)[None], [{"role": "user", "content": "感冒"}]
read = {}
for folder in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    read[folder] = {
        "ids": tokenizer("<|im_start|>user\\n感冒 and 0456<|im_end|>\\n<think>\\n想\\n</think>").input_ids,
        "prompt": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        "special": [*sorted(tokenizer.all_special_tokens), tokenizer.eos_token, tokenizer.pad_token],
    }
    if folder != "lora":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        settings = model.generation_config
        read[folder]["settings"] = [settings.temperature, settings.top_k, settings.top_p, settings.eos_token_id]
        read[folder]["settings"] += [str(model.dtype)]
        with torch.no_grad():
            read[folder]["logits"] = model(ids).logits[0].tolist()
print("\\n" + json.dumps([transformers.__version__, read]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Path:
    """A working folder with `full`, `lora` and `merged`, trained from a base in the form that Qwen3 is published in."""
    with prepared(tmp_path_factory) as folder:
        shutil.copytree(tiny_model, "base")
        load_attentive(tiny_model).save_pretrained("base")
        older = {"rope_theta": 1000000, "rope_scaling": None, "torch_dtype": "float32"}
        change("base/config.json", older, ("rope_parameters", "dtype"))
        names = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        names |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        change("base/tokenizer_config.json", names, ("extra_special_tokens",))
        for lora, name in ((False, "full"), (True, "lora")):
            run("base", lora, max_steps=2, output_dir=name)
        inference_lora.merge_to("merged", "lora")
    return folder


def change(path: str, new: dict, gone: tuple) -> None:
    settings = json.loads(Path(path).read_text(encoding="utf-8")) | new
    kept = {name: value for name, value in settings.items() if name not in gone}
    Path(path).write_text(json.dumps(kept), encoding="utf-8")


def read_with(env: dict) -> tuple[str, dict]:
    """The version of transformers, and what it reads of each folder."""
    command = [sys.executable, "-c", READER, "full", "merged", "lora"]
    ran = subprocess.run(command, env=os.environ | env | {"PYTHONUTF8": "1"}, stdout=subprocess.PIPE, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.skipif(not TRANSFORMERS_4, reason="TRANSFORMERS_4 names no installation; .ci/run makes one")
def test_transformers_4_reads_what_was_trained(trained, monkeypatch):
    monkeypatch.chdir(trained)
    (_, ours), (version, theirs) = read_with({}), read_with({"PYTHONPATH": TRANSFORMERS_4})
    assert version.startswith("4.") and ours["full"]["special"][-2:] == ["<|im_end|>", "<|endoftext|>"]
    for folder in ("full", "merged"):
        logits = [torch.tensor(read[folder].pop("logits")) for read in (ours, theirs)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert ours == theirs


@pytest.mark.parametrize("folder", ["full", "merged", "lora"])
def test_what_older_readers_look_for_is_there(trained, folder):
    settings = json.loads((trained / folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
    assert settings["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    tokens = [token["content"] for token in settings["added_tokens_decoder"].values()]
    assert tokens == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    if folder != "lora":
        config = json.loads((trained / folder / "config.json").read_text(encoding="utf-8"))
        assert {"rope_theta": 1000000, "rope_scaling": None, "torch_dtype": "float32"}.items() <= config.items()
        assert config["rope_parameters"] == {"rope_theta": 1000000, "rope_type": "default"}


def test_transformers_5_reads_the_same_as_before(tmp_path, tokenizer):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192}
    config, read = transformers.Qwen3Config(rope_parameters=rope, dtype="bfloat16"), []
    for include in (lambda folder: None, export.translate):
        config.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        include(tmp_path)
        tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
        vocabulary = (tokens.get_vocab(), tokens.special_tokens_map, tokens.all_special_tokens, tokens.chat_template)
        read.append((transformers.AutoConfig.from_pretrained(tmp_path).to_dict(), vocabulary))
    assert read[0] == read[1]
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (written["rope_theta"], written["rope_scaling"]["factor"], written["torch_dtype"]) == (1e6, 4.0, "bfloat16")
