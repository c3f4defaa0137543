"""What others read in a saved folder is what was trained: transformers 4 reads as it does here (TRANSFORMERS_4 names
the folder of such an installation), and the Modelfile says in Ollama's form how a conversation is written, where a
reply ends, how it is sampled, the system prompt. Ollama itself is not asked; what Go makes of the template is, where
there is a Go."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import load_attentive, opening, prepared, run

import data
import inference_lora
from parts.model import encoding, export

TRANSFORMERS_4 = os.environ.get("TRANSFORMERS_4")
OLDER = {"rope_theta": 1000000, "rope_scaling": None, "torch_dtype": "float32"}  # of config.json
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
        sampling = [settings.temperature, settings.top_k, settings.top_p, settings.eos_token_id]
        read[folder]["settings"] = [*sampling, str(model.dtype)]
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
        change("base/config.json", OLDER, "rope_parameters", "dtype")
        names = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        names |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        change("base/tokenizer_config.json", names, "extra_special_tokens")
        for lora, name in ((False, "full"), (True, "lora")):
            run("base", lora, max_steps=2, output_dir=name)
        inference_lora.merge_to("merged", "lora")
    return folder


def change(path: str, new: dict, *gone: str) -> None:
    settings = read(path) | new
    for name in gone:
        settings.pop(name, None)
    Path(path).write_text(json.dumps(settings), encoding="utf-8")


def read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


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


def test_what_older_readers_look_for_is_there(trained):
    for folder in ("full", "merged", "lora"):
        settings = read(trained / folder / "tokenizer_config.json")
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
        assert settings["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
        tokens = [token["content"] for token in settings["added_tokens_decoder"].values()]
        assert tokens == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert OLDER.items() <= read(trained / "full" / "config.json").items()


# ---- Ollama ----------------------------------------------------------------------------------------------------

# Ollama hands these values over; its templates, too, are Go's own text/template.
RENDERER = """
package main
import ("encoding/json"; "os"; "text/template")
func main() {
	var given struct { Template string; Values []map[string]any }
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil { panic(err) }
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	for _, values := range given.Values {
		if err := parsed.Execute(os.Stdout, values); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""
SYSTEM, USER = ("system", "你是医生助手。\n要谨慎。"), ("user", "感冒 {{ .System }}\n怎么办？")
REPLY = ("assistant", "休息。")
CONVERSATIONS = [[USER], [SYSTEM, USER], [SYSTEM, USER, REPLY, USER, REPLY, ("user", " 两边的空格 ")]]


def test_it_says_what_was_trained(finished):
    text = Path("full/Modelfile").read_text(encoding="utf-8")
    saved = transformers.GenerationConfig.from_pretrained("full")
    assert "FROM ./model.gguf\n" in text and f'TEMPLATE """{export.TEMPLATE}"""\n' in text
    assert f'SYSTEM """{data.SYSTEM_PROMPT}"""\n' in text
    sampling = [f"{name} {getattr(saved, name)}" for name in ("temperature", "top_p", "top_k")]
    expected = ['stop "<|im_end|>"', 'stop "<|endoftext|>"', *sampling, "repeat_penalty 1.0", "num_ctx 8192"]
    assert re.findall("PARAMETER (.*)", text) == expected
    inference_lora.merge_to("merged", "lora")
    assert Path("merged/Modelfile").read_text(encoding="utf-8") == text and not Path("lora/Modelfile").exists()


def test_a_model_that_ollama_would_ask_otherwise_gets_none(folder, tokenizer, capsys):
    config = transformers.GenerationConfig(eos_token_id=[0], temperature=0.6)
    text = '第一行 "引号"\n\t第二行 # 不是注释 {{ .System }} "'
    export.write_modelfile(".", encoding.with_system(tokenizer, text), config)
    assert f'\nSYSTEM """{text}"""\n' in Path("Modelfile").read_text(encoding="utf-8")
    other = encoding.with_system(tokenizer, "系统")
    other.chat_template = opening(other.chat_template)
    quotes, invisible = '说"""三个引号"""', "零宽\u200b空格"
    for spoilt in (encoding.with_system(tokenizer, quotes), encoding.with_system(tokenizer, invisible), other):
        Path("Modelfile").write_text("of an earlier training")
        export.write_modelfile(".", spoilt, config)
        assert not Path("Modelfile").exists()
        assert ("对话模板与 Qwen3 的不同" if spoilt is other else "系统提示词里有") in capsys.readouterr().out
    export.write_modelfile(".", tokenizer, config)
    assert "SYSTEM" not in Path("Modelfile").read_text(encoding="utf-8")


def test_the_tags_of_thinking_are_where_ollama_looks_for_them():
    """It takes the first and the last text of the branch around {{ .Thinking }}."""
    [branch] = re.findall(r"\{\{ if and \.Thinking [^}]*\}\}(.*?)\{\{ end \}\}", export.TEMPLATE, re.S)
    assert [text.strip() for text in branch.split("{{ .Thinking }}")] == ["<think>", "</think>"]


@pytest.mark.skipif(not shutil.which("go"), reason="no Go here")
def test_go_makes_of_it_what_the_tokenizers_template_makes(folder, any_tokenizer):
    values, expected = [], []
    for conversation in CONVERSATIONS:
        for think in (None, True, False):
            system = "".join(text for role, text in conversation if role == "system")
            # Thinking of earlier turns, which is left out; it stands in the others' messages as well, where none looks.
            turns = [{"Role": role, "Content": text, "Thinking": "想"} for role, text in conversation]
            switch = {"IsThinkSet": think is not None, "Think": think is True}
            values.append({"System": system, "Messages": turns} | switch)
            messages = [{"role": role, "content": text} for role, text in conversation]
            asked = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": think is not False}
            expected.append(any_tokenizer.apply_chat_template(messages, **asked))
    Path("render.go").write_text(RENDERER, encoding="utf-8")
    given = json.dumps({"Template": export.TEMPLATE, "Values": values})
    ran = subprocess.run(["go", "run", "render.go"], input=given, capture_output=True, encoding="utf-8", check=True)
    assert ran.stdout.split("\0")[:-1] == expected
