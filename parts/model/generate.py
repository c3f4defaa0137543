"""Conversations to replies, sampled in one batch. Knows prompts and sampling, not where questions come from."""

import time
from collections.abc import Callable

import torch

from parts.model.decoding import fast_loop
from parts.model.encoding import Reply, encode_messages, opens_thinking, split_reply
from parts.model.weights import head_dim, stop_tokens

# What Qwen advises for replies without thinking. While thinking the model's own generation settings hold.
NO_THINKING_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
BATCH_TOKENS = 10_000  # of prompts and replies together, at most, where the free memory is not known: 2.3 GB in float32
BATCH_MEMORY = 0.5  # share of the free GPU memory that the cache of a batch may take
Messages = list[dict[str, str]]


def generate(
    model,
    tokenizer,
    conversations: list[Messages],
    max_new_tokens: int,
    thinking: bool = True,
    streamer=None,
    stop: Callable[[], bool] | None = None,
    fast_kernels: bool = True,
) -> list[Reply]:
    """Return a Reply to each conversation, sampled as one left-padded batch: never greedily, which makes thinking loop.

    All replies are cut off where `stop()` says so. Without `fast_kernels` the loop is transformers'.
    """
    prompts = [encode_messages(tokenizer, messages, prompt_only=True, thinking=thinking) for messages in conversations]
    longest = max(map(len, prompts))
    input_ids, attention_mask = pad_left(prompts, longest, tokenizer.pad_token_id, model.device)
    stops = stop_tokens(model, tokenizer)
    criteria = []
    if stop:
        criteria.append(lambda ids, _: torch.full_like(ids[:, 0], stop(), dtype=torch.bool))
    sampling = {"do_sample": True} | ({} if thinking else NO_THINKING_SAMPLING)
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            streamer=streamer,
            custom_generate=fast_loop(model, max_new_tokens, streamer) if fast_kernels else None,
            stopping_criteria=criteria,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stops,
            **sampling,
        )
    generated = output[:, longest:].tolist()  # which waits for the GPU
    seconds = (time.perf_counter() - began) / len(prompts)
    replies = []
    for prompt, ids in zip(prompts, generated):
        length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        complete = length < len(ids)
        reply = split_reply(tokenizer, ids[:length], complete, opens_thinking(tokenizer, prompt))
        replies.append(reply._replace(tokens=length + complete, seconds=seconds))
    return replies


def pad_left(prompts: list[list[int]], longest: int, padding: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids and the attention mask, [prompts, longest] each, of prompts that end together."""
    ids = torch.full((len(prompts), longest), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def room_in_memory(model) -> int:
    """Return the tokens of prompts and replies that a batch may have: their keys and values have to fit the GPU."""
    if model.device.type != "cuda":
        return BATCH_TOKENS
    return int(torch.cuda.mem_get_info(model.device)[0] * BATCH_MEMORY) // token_bytes(model)


def token_bytes(model) -> int:
    """Return the bytes of the keys and values of one token."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * model.dtype.itemsize
