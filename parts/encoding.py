"""Messages to token ids and labels, and generated ids back to thinking and answer. What people wrote is text and never
control. The only place where the chat template is called, for training and for asking alike. Knows no question."""

import json
import re
from functools import lru_cache
from typing import NamedTuple

from parts.terminal import shorten

IGNORE_INDEX = -100  # a label that the loss skips


class Reply(NamedTuple):
    """What a model wrote, in its two parts."""

    thinking: str
    answer: str
    complete: bool  # False when max_new_tokens cut it off


@lru_cache(maxsize=4)
def control_pattern(tokenizer) -> re.Pattern:
    """Matches any token, such as <|im_end|> or <think>, that the tokenizer takes whole out of a text."""
    tokens = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, tokens)) + ")")


@lru_cache(maxsize=4)
def text_tokenizer(tokenizer):
    """The same tokenizer without its control tokens: to it, `<|im_end|>` is ten ordinary characters."""
    from tokenizers import Tokenizer

    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(settings))


def encode_messages(tokenizer, messages: list[dict], prompt_only: bool = False, thinking: bool = True) -> list[int]:
    """Token ids of `messages` through the tokenizer's own chat template: the only place where it is called.

    `prompt_only` adds the opening of the assistant's turn; with `thinking=False` the template puts an empty thinking
    block into it. What people wrote is text and never control: the template is rendered around placeholders, and
    only control tokens that the template itself wrote become control ids, so a question that contains `<|im_end|>`
    cannot end its own turn. For all other text the ids are those of `tokenizer.apply_chat_template`.
    """
    texts: list[str] = []

    def placeholder(text: str) -> str:
        texts.append(text.encode("utf-8", "replace").decode())  # a terminal may hand over half a character
        return f"\ue000{len(texts) - 1}\ue001"

    shells = [{k: v if k == "role" else placeholder(v) for k, v in message.items()} for message in messages]
    rendered = tokenizer.apply_chat_template(
        shells, tokenize=False, add_generation_prompt=prompt_only, enable_thinking=thinking
    )
    # Text between two control tokens is tokenized as one piece, as the tokenizer itself does it.
    ids, piece = [], ""
    for part in re.split(r"(\ue000\d+\ue001)", rendered):
        if part.startswith("\ue000"):
            piece += texts[int(part[1:-1])]
            continue
        for token in control_pattern(tokenizer).split(part):
            if control_pattern(tokenizer).fullmatch(token):
                ids += text_tokenizer(tokenizer).encode(piece, add_special_tokens=False).ids if piece else []
                ids.append(tokenizer.convert_tokens_to_ids(token))
                piece = ""
            else:
                piece += token
    return ids + (text_tokenizer(tokenizer).encode(piece, add_special_tokens=False).ids if piece else [])


def encode_example(tokenizer, messages: list[dict]) -> dict[str, list[int]]:
    """{"input_ids", "labels"}, both of length T, of a conversation that ends with the assistant's message: the prompt's
    labels are IGNORE_INDEX, the last label is <|im_end|>."""
    prompt = encode_messages(tokenizer, messages[:-1], prompt_only=True)
    ids = encode_messages(tokenizer, messages)
    assert ids[: len(prompt)] == prompt, (prompt, ids)
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)  # drops the line break after <|im_end|>
    return {"input_ids": ids[:end], "labels": [IGNORE_INDEX] * len(prompt) + ids[len(prompt) : end]}


def describe_lengths(path: str, lengths: list[int], max_length: int) -> str:
    """Lengths in tokens, and how many examples were left out for theirs."""
    mean, p50, p95 = sum(lengths) / len(lengths), *(sorted(lengths)[int(len(lengths) * q)] for q in (0.5, 0.95))
    over = sum(length > max_length for length in lengths)
    return (
        f"{path}：{len(lengths)} 条，token 数平均 {mean:.0f}，p50 {p50}，p95 {p95}，最长 {max(lengths)}；"
        f"超过 --max_length {max_length} 而未采用的 {over} 条"
    )


def describe_example(tokenizer, example: dict[str, list[int]]) -> str:
    """One example as the model sees it: the prompt, and the supervised part."""
    prompt = sum(label == IGNORE_INDEX for label in example["labels"])
    parts = example["input_ids"][:prompt], example["input_ids"][prompt:]
    texts = (shorten(tokenizer.decode(part).replace("\n", "⏎"), 300) for part in parts)
    return "示例（⏎ 为换行）\n  提示（不计损失）：{}\n  监督部分：{}".format(*texts)


def split_reply(tokenizer, ids: list[int], complete: bool = True) -> Reply:
    """Thinking and answer of the generated `ids`. Cut off inside the thinking, the answer is empty."""
    start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    if end in ids:
        thinking, answer = ids[: ids.index(end)], ids[ids.index(end) + 1 :]
    elif start in ids:
        thinking, answer = ids, []
    else:
        thinking, answer = [], ids
    thinking = [token for token in thinking if token != start]
    texts = (tokenizer.decode(part, skip_special_tokens=True).strip() for part in (thinking, answer))
    return Reply(*texts, complete)
