"""What other programs read in a saved folder: transformers 4 its own words for some settings, Ollama a
Modelfile. Knows these forms and how Qwen3 writes a conversation; converts no weights, and knows no text of a
system prompt."""

import json
from pathlib import Path

from parts.model import encoding

# Tokens: the longest example and reply, 2,048 each, and turns before. Of Qwen3-1.7B that is 0.9 GB of cache.
NUM_CTX = 8192

# Qwen3's chat template in the language of Go's text/template, whose result has to be the same to the last
# line break: Ollama's own for qwen3 puts another after "system" and writes /think behind the question,
# neither of which was trained. {{- swallows the line break before it. Thinking of earlier turns is left out.
# Ollama takes the two tags by which it tells thinking from answer out of the branch with .Thinking, so it has
# to hold nothing else; .Think is its switch. The last message is the assistant's where a reply is to be
# continued.
TEMPLATE = Path(__file__).with_name("ollama.gotmpl").read_text(encoding="utf-8").removesuffix("\n")

# A conversation, and what TEMPLATE makes of it, for comparison with a tokenizer's own template
CONVERSATION = [*encoding.PROBE, {"role": "assistant", "content": "答"}, {"role": "user", "content": "再问"}]
PROMPT = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CONVERSATION)
PROMPT += "<|im_start|>assistant\n"

MODELFILE = '''\
# 对话模板、系统提示词和采样参数与训练时相同。命令见 README“GGUF 与 Ollama”。
# 它不是医生：回复可能有错，不能用于诊断和治疗；身体不适请就医，紧急情况请拨打 120。
FROM ./model.gguf

TEMPLATE """{template}"""
{system}
{parameters}
'''


def translate(folder: str | Path) -> None:
    """Add to config.json and tokenizer_config.json in `folder`, where they are, what transformers 4 looks
    for, on which many engines stand: it would take transformers 5's for a rotary base of 10,000 without a
    word, and not read its tokenizer. Newer ones read the same as before."""
    for name, translated in (("config.json", older_config), ("tokenizer_config.json", older_tokenizer)):
        path = Path(folder, name)
        if path.is_file():
            settings = translated(json.loads(path.read_text(encoding="utf-8")), path.parent)
            path.write_text(
                json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def older_config(config: dict, folder: Path) -> dict:
    """Return `config` with rope_theta, rope_scaling and torch_dtype beside rope_parameters and dtype."""
    config, rope = dict(config), dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    return config


def older_tokenizer(settings: dict, folder: Path) -> dict:
    """Return `settings` with the special tokens and the class under their older names, which the newer
    libraries know too."""
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    decoder = {str(token.pop("id")): token for token in tokens}
    settings = settings | {"added_tokens_decoder": decoder}
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return settings


def write_modelfile(folder: str | Path, tokenizer, generation_config) -> None:
    """Write what Ollama needs beside the weights in GGUF into the folder of a whole model, from the tokenizer
    and the transformers.GenerationConfig saved there. Where it could not say what was trained, one line says
    why there is none."""
    path = Path(folder, "Modelfile")
    if why := objection(tokenizer):
        path.unlink(missing_ok=True)  # of an earlier training
        print(f"提示：没有写 {path}（Ollama 用）：{why}。")
        return
    text = encoding.default_system(tokenizer)
    system = f'\nSYSTEM """{text}"""\n' if text else ""
    stops = tokenizer.convert_ids_to_tokens(generation_config.eos_token_id)
    # What Ollama would fill in differently, such as repeat_penalty, is there too.
    sampling = {name: getattr(generation_config, name) for name in ("temperature", "top_p", "top_k")}
    sampling |= {"repeat_penalty": generation_config.repetition_penalty or 1.0, "num_ctx": NUM_CTX}
    parameters = "".join(f'PARAMETER stop "{stop}"\n' for stop in stops)
    parameters += "\n".join(f"PARAMETER {name} {value}" for name, value in sampling.items())
    path.write_text(
        MODELFILE.format(template=TEMPLATE, system=system, parameters=parameters), encoding="utf-8"
    )


def objection(tokenizer) -> str | None:
    """Return why a Modelfile would ask this model otherwise than it was trained, or None."""
    for thinking, ending in ((True, ""), (False, "<think>\n\n</think>\n\n")):
        ids = encoding.encode_messages(tokenizer, CONVERSATION, prompt_only=True, thinking=thinking)
        if tokenizer.decode(ids) != PROMPT + ending:
            return "它的对话模板与 Qwen3 的不同"
    text = encoding.default_system(tokenizer) or ""
    # Ollama ends a text at three quotes, knows no escape for them, and drops characters that are not
    # printable.
    if '"""' in text or not text.replace("\n", "").replace("\t", "").isprintable():
        return "系统提示词里有 Modelfile 写不了的字符（连续三个双引号、全角空格或不可见字符）"
    return None
