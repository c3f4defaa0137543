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
from parts import modelfile, system_prompt

# Ollama hands these values over; its templates, too, are Go's own text/template.
RENDERER = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var given struct {
		Template string
		Values   []map[string]any
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	for _, values := range given.Values {
		if err := parsed.Execute(os.Stdout, values); err != nil {
			panic(err)
		}
		os.Stdout.WriteString("\\x00")
	}
}
"""
SYSTEM, USER, REPLY = (
    ("system", "你是医生助手。\n要谨慎。"),
    ("user", "感冒 {{ .System }}\n怎么办？"),
    ("assistant", "休息。"),
)
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [SYSTEM, USER, REPLY, USER],
    [SYSTEM, USER, REPLY, USER, REPLY, ("user", " 两边的空格 ")],
]


def read(path: str | Path) -> dict[str, list[str]]:
    """{command: values} of a Modelfile, texts between three quotes without them, PARAMETER's by its name."""
    found: dict[str, list[str]] = {}
    text = re.sub(r"^#.*\n", "", Path(path).read_text(encoding="utf-8"), flags=re.M)
    for name, quoted, plain in re.findall(r'^((?:PARAMETER )?\w+) (?:"""(.*?)"""|([^\n]*))$', text, re.M | re.S):
        found.setdefault(name, []).append(quoted or plain)
    return found


def test_it_says_what_was_trained(finished):
    found = read("full/Modelfile")
    saved = transformers.GenerationConfig.from_pretrained("full")
    tokenizer = transformers.AutoTokenizer.from_pretrained("full")
    assert found.pop("FROM") == ["./model.gguf"]
    assert found.pop("SYSTEM") == [data.SYSTEM_PROMPT]
    assert found.pop("TEMPLATE") == [modelfile.TEMPLATE]
    stops = ['"<|im_end|>"', '"<|endoftext|>"']
    assert stops == [f'"{tokenizer.decode(token)}"' for token in saved.eos_token_id]
    assert found == {
        "PARAMETER stop": stops,
        "PARAMETER temperature": [str(saved.temperature)],
        "PARAMETER top_p": [str(saved.top_p)],
        "PARAMETER top_k": [str(saved.top_k)],
        "PARAMETER repeat_penalty": ["1.0"],
        "PARAMETER num_ctx": ["8192"],
    }


def test_a_merged_model_has_the_same_and_an_adapter_none(finished):
    inference_lora.merge_to("merged", "lora")
    assert Path("merged/Modelfile").read_bytes() == Path("full/Modelfile").read_bytes()
    assert not Path("lora/Modelfile").exists()


def test_a_model_without_a_system_prompt_gets_none(folder, tokenizer):
    modelfile.write(folder, tokenizer, transformers.GenerationConfig(eos_token_id=[0], temperature=0.6))
    assert "SYSTEM" not in read("Modelfile")


@pytest.mark.parametrize("text", ['说"""三个引号"""', "　　全角空格", "零宽\u200b空格"])
def test_a_system_prompt_that_ollama_would_change_is_not_written(folder, tokenizer, capsys, text):
    Path("Modelfile").write_text("of an earlier training")
    modelfile.write(".", system_prompt.with_default(tokenizer, text), transformers.GenerationConfig())
    assert not Path("Modelfile").exists()
    assert capsys.readouterr().out == (
        "提示：没有写 Modelfile（Ollama 用）：系统提示词里有 Modelfile 写不了的字符"
        "（连续三个双引号、全角空格或不可见字符）。\n"
    )


def test_a_system_prompt_with_quotes_and_lines_is_kept(folder, tokenizer):
    text = '第一行 "引号"\n\t第二行 # 不是注释 {{ .System }} "'
    config = transformers.GenerationConfig(eos_token_id=[0], temperature=0.6)
    modelfile.write(".", system_prompt.with_default(tokenizer, text), config)
    assert f'\nSYSTEM """{text}"""\n' in Path("Modelfile").read_text(encoding="utf-8")


def test_a_model_with_another_template_gets_none(folder, tokenizer, capsys):
    other = system_prompt.with_default(tokenizer, "系统")
    other.chat_template = opening(other.chat_template)
    modelfile.write(".", other, transformers.GenerationConfig())
    assert not Path("Modelfile").exists()
    assert capsys.readouterr().out == "提示：没有写 Modelfile（Ollama 用）：它的对话模板与 Qwen3 的不同。\n"


def test_the_tags_of_thinking_are_where_ollama_looks_for_them():
    """It takes the first and the last text of the branch around {{ .Thinking }}."""
    [branch] = re.findall(r"\{\{ if and \.Thinking [^}]*\}\}(.*?)\{\{ end \}\}", modelfile.TEMPLATE, re.S)
    assert [text.strip() for text in branch.split("{{ .Thinking }}")] == ["<think>", "</think>"]


@pytest.mark.skipif(not shutil.which("go"), reason="no Go here")
def test_go_makes_of_it_what_the_tokenizers_template_makes(folder, any_tokenizer):
    values, expected = [], []
    for conversation in CONVERSATIONS:
        for think in (None, True, False):
            system = "\n\n".join(text for role, text in conversation if role == "system")
            told = [
                {"Role": role, "Content": text, "Thinking": "想" * (text == REPLY[1])} for role, text in conversation
            ]
            values.append({"System": system, "Messages": told, "IsThinkSet": think is not None, "Think": think is True})
            messages = [{"role": role, "content": text} for role, text in conversation]
            expected.append(
                any_tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, enable_thinking=think is not False
                )
            )
    Path("render.go").write_text(RENDERER, encoding="utf-8")
    given = json.dumps({"Template": modelfile.TEMPLATE, "Values": values})
    ran = subprocess.run(["go", "run", "render.go"], input=given, capture_output=True, encoding="utf-8", check=True)
    assert ran.stdout.split("\0")[:-1] == expected
