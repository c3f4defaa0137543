"""Modelfile of an output folder: what Ollama needs beside the weights in GGUF to ask the model as it was trained. Knows
Ollama's form and how Qwen3 writes a conversation; converts nothing, and knows no text of a system prompt."""

from pathlib import Path

from parts.model import encoding, system_prompt

WEIGHTS = "model.gguf"  # in the same folder, as the README's commands name it
NUM_CTX = 8192  # tokens: the longest example and reply, 2,048 each, and turns before; Qwen3-1.7B: 0.9 GB of cache

# Qwen3's chat template in the language of Go's text/template, whose result has to be the same to the last line break:
# Ollama's own for qwen3 puts another after "system" and writes /think behind the question, neither of which was
# trained. {{- swallows the line break before it. Thinking of earlier turns is left out. Ollama takes the two tags by
# which it tells thinking from answer out of the branch with .Thinking, so it has to hold nothing else; .Think is its
# switch. The last message is the assistant's where a reply is to be continued.
TEMPLATE = """\
{{- $user := -1 }}{{ $last := -1 }}{{ $role := "" }}
{{- range $i, $message := .Messages }}
{{- $last = $i }}{{ $role = $message.Role }}
{{- if eq $role "user" }}{{ $user = $i }}{{ end }}
{{- end }}
{{- if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}
{{- range $i, $message := .Messages }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if and .Thinking (gt $i $user) }}<think>
{{ .Thinking }}
</think>

{{ end }}{{ .Content }}{{ if lt $i $last }}<|im_end|>
{{ end }}
{{- end }}
{{- end }}
{{- if ne $role "assistant" }}<|im_start|>assistant
{{ if and .IsThinkSet (not .Think) }}<think>

</think>

{{ end }}
{{- end }}"""

# What TEMPLATE makes of a conversation, for comparison with a tokenizer's own template
CONVERSATION = [*encoding.PROBE, {"role": "assistant", "content": "答"}, {"role": "user", "content": "再问"}]
PROMPT = """\
<|im_start|>system
系统<|im_end|>
<|im_start|>user
问<|im_end|>
<|im_start|>assistant
答<|im_end|>
<|im_start|>user
再问<|im_end|>
<|im_start|>assistant
"""
NO_THINKING = "<think>\n\n</think>\n\n"

MODELFILE = '''\
# 对话模板、系统提示词和采样参数与训练时相同。命令见 README“GGUF 与 Ollama”。
# 它不是医生：回复可能有错，不能用于诊断和治疗；身体不适请就医，紧急情况请拨打 120。
FROM ./{weights}

TEMPLATE """{template}"""
{system}
{parameters}
'''


def write(folder: str | Path, tokenizer, generation_config) -> None:
    """Into the folder of a whole model, from the tokenizer and the transformers.GenerationConfig saved there. Where it
    could not say what was trained, one line says why there is none."""
    path = Path(folder, "Modelfile")
    if why := objection(tokenizer):
        path.unlink(missing_ok=True)  # of an earlier training
        print(f"提示：没有写 {path}（Ollama 用）：{why}。")
    else:
        path.write_text(describe(tokenizer, generation_config), encoding="utf-8")


def objection(tokenizer) -> str | None:
    """Why a Modelfile would ask this model otherwise than it was trained, or None."""
    for thinking, ending in ((True, ""), (False, NO_THINKING)):
        ids = encoding.encode_messages(tokenizer, CONVERSATION, prompt_only=True, thinking=thinking)
        if tokenizer.decode(ids) != PROMPT + ending:
            return "它的对话模板与 Qwen3 的不同"
    text = system_prompt.default(tokenizer) or ""
    # Ollama ends a text at three quotes, knows no escape for them, and drops characters that are not printable.
    if '"""' in text or not text.replace("\n", "").replace("\t", "").isprintable():
        return "系统提示词里有 Modelfile 写不了的字符（连续三个双引号、全角空格或不可见字符）"
    return None


def describe(tokenizer, generation_config) -> str:
    """The Modelfile's text. What Ollama would fill in differently, such as repeat_penalty, is there too."""
    text = system_prompt.default(tokenizer)
    stops = tokenizer.convert_ids_to_tokens(generation_config.eos_token_id)
    sampling = {name: getattr(generation_config, name) for name in ("temperature", "top_p", "top_k")}
    sampling |= {"repeat_penalty": generation_config.repetition_penalty or 1.0, "num_ctx": NUM_CTX}
    lines = [f"PARAMETER {name} {value}" for name, value in sampling.items()]
    return MODELFILE.format(
        weights=WEIGHTS,
        template=TEMPLATE,
        system=f'\nSYSTEM """{text}"""\n' if text else "",
        parameters="\n".join([*(f'PARAMETER stop "{stop}"' for stop in stops), *lines]),
    )
