"""Conversations to replies, sampled in one batch. Knows prompts and sampling, not where questions come from."""

import time
from collections.abc import Callable

import torch

from parts.decoding import fast_loop
from parts.encoding import Reply, encode_messages, opens_thinking, split_reply
from parts.memory import head_dim

# What Qwen advises. While thinking the model's own generation settings hold; these are for a model that has none.
THINKING_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
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
) -> list[Reply]:
    """A Reply for each conversation, sampled as one left-padded batch: never greedy, which makes thinking loop. All
    replies are cut off where `stop()` says so."""
    prompts = [encode_messages(tokenizer, messages, prompt_only=True, thinking=thinking) for messages in conversations]
    longest = max(map(len, prompts))
    padding, device = tokenizer.pad_token_id, model.device
    stops = stop_tokens(model, tokenizer)
    began = time.perf_counter()
    sampling = {"do_sample": True} | ({} if thinking else NO_THINKING_SAMPLING)
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([[padding] * (longest - len(ids)) + ids for ids in prompts], device=device),
            attention_mask=torch.tensor(
                [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device
            ),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            streamer=streamer,
            custom_generate=fast_loop(model, max_new_tokens, streamer),
            stopping_criteria=[lambda ids, _: torch.full_like(ids[:, 0], stop(), dtype=torch.bool)] if stop else [],
            pad_token_id=padding,
            eos_token_id=stops,
            **sampling,
        )
    replies, generated = [], output[:, longest:].tolist()  # which waits for the GPU
    seconds = (time.perf_counter() - began) / len(prompts)
    for prompt, ids in zip(prompts, generated):
        length = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        complete, opened = length < len(ids), opens_thinking(tokenizer, prompt)
        reply = split_reply(tokenizer, ids[:length], complete, opened)
        replies.append(reply._replace(tokens=length + complete, seconds=seconds))
    return replies


def stop_tokens(model, tokenizer) -> list[int]:
    """The end of turn, and what the model's own settings name."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    return [tokenizer.eos_token_id, *(token for token in stops if token != tokenizer.eos_token_id)]


def settle_generation(model, tokenizer) -> None:
    """Make the settings that are saved with `model` those with which it is asked here: a base model's would not stop at
    the end of turn, and would think greedily, which loops."""
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = stop_tokens(model, tokenizer), tokenizer.pad_token_id
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not (settings.do_sample and settings.temperature):
        settings.update(do_sample=True, **THINKING_SAMPLING)
    for name, value in THINKING_SAMPLING.items():  # what is left out, each tool fills in as it likes
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def room_in_memory(model) -> int:
    """Tokens of prompts and replies that a batch may have: their keys and values have to fit into the GPU's memory."""
    if model.device.type != "cuda":
        return BATCH_TOKENS
    return int(torch.cuda.mem_get_info(model.device)[0] * BATCH_MEMORY) // token_bytes(model)


def token_bytes(model) -> int:
    """Of the keys and values of one token."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * model.dtype.itemsize
