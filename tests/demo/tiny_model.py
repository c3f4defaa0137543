"""Build a Qwen3 of some 1.7 million random parameters and its tokenizer, trained on the spot from a text.

    python tests/demo/tiny_model.py OUT_DIR

Everything but the size and the weights is as in Qwen3: the architecture, byte-level BPE, the control tokens, a chat
template that renders system, user, assistant and thinking alike, the generation settings. No network is needed.
"""

import json
import sys
from pathlib import Path

import rjieba
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, utils

SAMPLES = Path(__file__).parent / "medical.jsonl"
VOCAB_SIZE = 4096
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")  # taken whole out of a text, but shown when special tokens are skipped

# Where a text is cut before byte pairs are merged: contractions, words, single digits, punctuation, line breaks.
WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Qwen3's turns: thinking is written for the reply to the last question only; earlier replies lose theirs.
CHAT_TEMPLATE = """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.index0 > last.user -%}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with Qwen3's control tokens."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCAB_SIZE - len(CONTROL_TOKENS + THINK_TOKENS)
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(list(CONTROL_TOKENS))
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def build(out_dir: str | Path, texts: list[str], seed: int = 0, hidden_size: int = 192, layers: int = 2) -> None:
    """Write tokenizer, weights (float32, safetensors), configuration and generation settings to `out_dir`."""
    tokenizer = build_tokenizer(texts)
    stop, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=stop,
        pad_token_id=pad,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[stop, pad], pad_token_id=pad
    )
    utils.logging.disable_progress_bar()
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def sample_texts() -> list[str]:
    """All texts of the sample rows."""
    rows = map(json.loads, SAMPLES.read_text(encoding="utf-8").splitlines())
    return [text for row in rows for text in row.values()]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import data

    # Word by word: else a token may be half of a question, and stand in none of its other wordings.
    words = [word for text in [data.SYSTEM_PROMPT, *sample_texts()] for word in rjieba.cut(text)]
    build(sys.argv[1], words)
    print(f"{sys.argv[1]}：一个随机权重的小 Qwen3")
