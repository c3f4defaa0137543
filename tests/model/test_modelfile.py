"""The Modelfile beside a trained model says in Ollama's form what was trained: how a conversation is written, where a
reply ends, how it is sampled, the system prompt. Ollama itself is not asked; what Go makes of the template is, where
there is a Go."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers
from helpers import opening

import data
import inference_lora
from parts.model import encoding, export

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
    assert re.findall("PARAMETER (.*)", text) == [
        *('stop "<|im_end|>"', 'stop "<|endoftext|>"'),
        *(f"{name} {getattr(saved, name)}" for name in ("temperature", "top_p", "top_k")),
        *("repeat_penalty 1.0", "num_ctx 8192"),
    ]
    inference_lora.merge_to("merged", "lora")
    assert Path("merged/Modelfile").read_text(encoding="utf-8") == text and not Path("lora/Modelfile").exists()


def test_a_model_that_ollama_would_ask_otherwise_gets_none(folder, tokenizer, capsys):
    config = transformers.GenerationConfig(eos_token_id=[0], temperature=0.6)
    text = '第一行 "引号"\n\t第二行 # 不是注释 {{ .System }} "'
    export.write_modelfile(".", encoding.with_system(tokenizer, text), config)
    assert f'\nSYSTEM """{text}"""\n' in Path("Modelfile").read_text(encoding="utf-8")
    other = encoding.with_system(tokenizer, "系统")
    other.chat_template = opening(other.chat_template)
    for model, reason in (
        (encoding.with_system(tokenizer, '说"""三个引号"""'), "系统提示词里有 Modelfile 写不了的字符"),
        (encoding.with_system(tokenizer, "零宽\u200b空格"), "系统提示词里有 Modelfile 写不了的字符"),
        (other, "它的对话模板与 Qwen3 的不同"),
    ):
        Path("Modelfile").write_text("of an earlier training")
        export.write_modelfile(".", model, config)
        assert not Path("Modelfile").exists() and reason in capsys.readouterr().out
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
            told = [{"Role": role, "Content": text, "Thinking": "想"} for role, text in conversation]
            values.append({"System": system, "Messages": told, "IsThinkSet": think is not None, "Think": think is True})
            messages = [{"role": role, "content": text} for role, text in conversation]
            asked = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": think is not False}
            expected.append(any_tokenizer.apply_chat_template(messages, **asked))
    Path("render.go").write_text(RENDERER, encoding="utf-8")
    given = json.dumps({"Template": export.TEMPLATE, "Values": values})
    ran = subprocess.run(["go", "run", "render.go"], input=given, capture_output=True, encoding="utf-8", check=True)
    assert ran.stdout.split("\0")[:-1] == expected
