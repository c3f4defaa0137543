"""Conversations to replies, sampled in one batch, and the loop that generates them with a static cache and
CUDA graphs. It knows prompts, sampling and a model, not where questions come from."""

import sys
import time
from functools import partial
from itertools import takewhile

import torch
import transformers
from torch.nn.functional import pad

from parts.model import fused
from parts.model.encoding import Reply, encode_messages, opens_thinking, split_reply
from parts.model.fused import Verdict, attempt, compare, head_dim, missing
from parts.terminal import first_line

# What Qwen advises for replies without thinking. While thinking the model's own generation settings hold.
NO_THINKING_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
BATCH_TOKENS = 10_000  # of prompts and replies where the free memory is not known: 2.3 GB in float32
BATCH_MEMORY = 0.5  # share of the free GPU memory that the cache of a batch may take
CACHE_STEP = 512  # tokens by which the cache grows; attention reads all of it, each growth costs a capture
READ_EVERY = 16  # tokens from one look at what was generated to the next: each look waits for the GPU
WARM_UP = 2  # steps before a capture, which must find kernels loaded and their workspaces allocated
SHORT_REPLY = 32  # max_new_tokens below which a capture costs more than it saves
Messages = list[dict[str, str]]


def generate(
    model,
    tokenizer,
    conversations,
    max_new_tokens,
    thinking=True,
    streamer=None,
    stop=None,
    fast_kernels=True,
) -> list[Reply]:
    """Return a Reply to each conversation, a list of Messages, sampled as one batch.

    All replies are cut off where `stop()` returns True. `streamer` is transformers'. Without `fast_kernels`
    the loop is transformers' too. How tokens are sampled is the model's own setting, which
    weights.settle_generation has seen to: thinking that is written greedily loops.
    """
    prompts = [
        encode_messages(tokenizer, messages, prompt_only=True, thinking=thinking)
        for messages in conversations
    ]
    # [batch, prompt]: padding stands on the left, so that all rows go on at the same place.
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    settings = {} if thinking else dict(NO_THINKING_SAMPLING)
    if fast_kernels:
        settings["custom_generate"] = fast_loop(model, max_new_tokens, streamer)
    if stop:  # transformers asks at each token, for [batch] answers
        settings["stopping_criteria"] = [lambda ids, _: torch.full_like(ids[:, 0], stop(), dtype=torch.bool)]
    settings |= {"max_new_tokens": max_new_tokens, "use_cache": True, "streamer": streamer}
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs.to(model.device), **settings)  # [batch, prompt + new]
    generated = output[:, inputs.input_ids.shape[1] :].tolist()  # which waits for the GPU
    seconds = (time.perf_counter() - began) / len(prompts)
    replies, stops = [], model.generation_config.eos_token_id
    for prompt, ids in zip(prompts, generated):
        # Behind a stop token there is padding, up to the end of the batch's longest reply.
        written = list(takewhile(lambda token: token not in stops, ids))
        complete = len(written) < len(ids)
        reply = split_reply(tokenizer, written, complete, opens_thinking(tokenizer, prompt))
        tokens = len(written) + (1 if complete else 0)  # the stop token was written too
        replies.append(reply._replace(tokens=tokens, seconds=seconds))
    return replies


def room_in_memory(model) -> int:
    """Return how many tokens of prompts and replies, padding included, a batch may have, so that their keys
    and values fit the GPU."""
    if model.device.type != "cuda":
        return BATCH_TOKENS
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)  # of a token
    room = torch.cuda.mem_get_info(model.device)[0] * BATCH_MEMORY
    return int(room) // (numbers * model.dtype.itemsize)


class Decoder:
    """A model that has read its prompts, and goes on by one token a row with `advance`.

    Plain decoding spends its time launching more than a thousand small kernels per token from Python. Here
    all that changes from token to token, the cache included, lives in tensors of fixed addresses, so on CUDA
    the launches are recorded once as a graph and then replayed at once. When the cache is full it grows, and
    the graph is recorded anew.

    input_ids and position_ids are [batch, prompt], left-padded; attention_mask is the same, or None without
    padding.
    """

    # On the last graph of this process: after one that failed there is no other, as it would fail too.
    verdict = missing("还没有试过")._replace(runs=True)

    def __init__(self, model, input_ids, position_ids, attention_mask=None):
        self.model, self.graph, self.warm_steps = model, None, 0
        self.capturable = input_ids.is_cuda
        self.used = input_ids.shape[1]  # tokens in the cache
        self.room = (self.used // CACHE_STEP + 1) * CACHE_STEP
        # Keys and values of each layer: [batch, key heads, room, head].
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=self.room)
        self.logits = self.forward(input_ids, position_ids, attention_mask)  # [batch, vocabulary]
        # What a step reads is written into these two, [batch, 1]: a graph knows addresses, no values.
        self.token = torch.zeros_like(input_ids[:, -1:])
        self.position = position_ids[:, -1:].clone()
        # What is yet to come is left out by its position, so the mask [batch, room] is the padding alone and
        # never changes.
        self.mask = attention_mask
        if attention_mask is not None:
            self.mask = pad(attention_mask.bool(), (0, self.room - self.used), value=True)

    def forward(self, input_ids, position_ids, attention_mask) -> torch.Tensor:
        """Return the logits [batch, vocabulary] after the last of `input_ids` [batch, tokens], whose keys and
        values join the cache."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
        output = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]  # of [batch, 1, vocabulary]

    def advance(self, token: torch.Tensor) -> None:
        """Put the logits after `token` [batch] into `self.logits`."""
        if self.used == self.room:
            self.grow()
        self.token.copy_(token[:, None])
        self.position += 1
        self.used += 1
        if self.graph:
            return self.graph.replay()
        self.logits = self.forward(self.token, self.position, self.mask)
        self.warm_steps += 1
        if self.capturable and self.verdict.runs and self.warm_steps >= WARM_UP and self.used < self.room:
            self.capture()

    def grow(self) -> None:
        """Make room for CACHE_STEP more tokens. The addresses change, so the graph is of no use any more."""
        self.graph, self.warm_steps = None, 0
        self.room += CACHE_STEP
        for layer in self.cache.layers:  # pad counts from the last dimension: the last but one is the tokens
            layer.keys = pad(layer.keys, (0, 0, 0, CACHE_STEP))
            layer.values = pad(layer.values, (0, 0, 0, CACHE_STEP))
            layer.max_cache_len = self.room
        if self.mask is not None:
            self.mask = pad(self.mask, (0, CACHE_STEP), value=True)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch alone. The graph is of no use any more."""
        self.graph, self.warm_steps = None, 0
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.token, self.position, self.logits = self.token[rows], self.position[rows], self.logits[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]

    def capture(self) -> None:
        """Record one step, and run the last one again by it, which has to give the same. Where either fails,
        say why and go on step by step."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads, a page's say, may go on with what cannot be recorded.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self.forward(self.token, self.position, self.mask)
            # Recording runs nothing: token and position are still the last step's. One token back, the replay
            # writes its keys and values over those that the step itself wrote.
            for layer in self.cache.layers:
                layer.cumulative_length -= 1
            graph.replay()
            Decoder.verdict = compare([self.logits], [logits])
            if not self.verdict.runs:
                raise RuntimeError(self.verdict.why)
            self.graph, self.logits = graph, logits
        except RuntimeError as error:
            Decoder.verdict = Verdict(False, first_line(error))
            torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own stream set
            slower = f"（无法使用 CUDA graph，改为逐步计算，速度会慢一些：{first_line(error)}"
            print(f"{slower}；加 --fast_kernels false 就不再尝试）", file=sys.stderr)


@torch.inference_mode()
def try_graph(model) -> Verdict:
    """Tell whether a step can be recorded here, and then gives what it gives by itself."""
    if model.device.type != "cuda":
        return missing("需要 GPU")
    take_steps(model)
    return Decoder.verdict


@torch.inference_mode()
def fuse(model) -> None:
    """Give `model`, which is to be asked, norms of one kernel, and Liger's rotary embedding and SwiGLU where
    they were seen to run on a model of one layer, in a graph too, and to give the same."""
    fused.fuse_norms(model)
    if not (verdict := fused.layers_missing(model)):
        probe = fused.shrink(model).eval()
        run = partial(take_steps, probe)
        verdict = fused.try_layers(probe, attempt(run), run, norms=False)
    if verdict.runs:
        fused.fuse_layers(model, norms=False)
    elif verdict.expected:
        print(f"（生成时没有用 Liger 的融合算子：{verdict.why}）", file=sys.stderr)


def take_steps(model) -> list[torch.Tensor]:
    """Return the logits [2, vocabulary] after two prompts, at other positions, and WARM_UP tokens more; where
    there are graphs the last step is one."""
    ids = torch.arange(40, device=model.device).view(2, 20)
    decoder = Decoder(model, ids, ids % 20 + ids // 20 * 5)  # the second row's as after padding
    for token in ids.T[:WARM_UP]:
        decoder.advance(token)
    return [decoder.logits]


def decode(
    model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **model_kwargs
):
    """The loop that `model.generate` runs as its `custom_generate`, with arguments that it has prepared.

    `input_ids` [batch, prompt] are left-padded. It returns prompts and replies as [batch, prompt + new],
    padded on the right; the last tokens may all be padding. Rows that are finished leave the batch when they
    are half of it; the others' replies are as if they had stayed.
    """
    (batch, prompt), longest = input_ids.shape, generation_config.max_length
    padding = generation_config.pad_token_id
    replies = pad(input_ids, (0, longest - prompt), value=padding)  # [batch, longest]
    # Of the rows that are left, [rows]: their numbers, what is written so far, and whether they are finished
    rows, sequence = torch.arange(batch, device=input_ids.device), replies.clone()
    finished = torch.zeros_like(rows, dtype=torch.bool)
    # A generator of its own: in torch 2.11 a capture that fails leaves the default one unusable.
    generator = torch.Generator(input_ids.device).manual_seed(int(torch.randint(2**62, ())))
    # From model_kwargs, not by name: what the loop names itself, generate would not prepare for it.
    decoder = Decoder(model, input_ids, model_kwargs["position_ids"], model_kwargs.get("attention_mask"))
    shown = prompt
    for length in range(prompt + 1, longest + 1):
        scores = logits_processor(sequence[:, : length - 1], decoder.logits.float())  # [rows, vocabulary]
        if generation_config.do_sample:
            # The largest of p / Exponential(1) is a sample of p. torch.multinomial would check p first, and
            # so wait for the GPU at each token. Drawn for all rows, so that each has numbers of its own.
            drawn = scores.new_empty(batch, scores.shape[1]).exponential_(generator=generator)
            scores = scores.softmax(-1) / drawn[rows]
        token = scores.argmax(-1).masked_fill(finished, padding)  # [rows]
        sequence[:, length - 1] = token
        finished |= stopping_criteria(sequence[:, :length], None)
        if (length - prompt) % READ_EVERY == 0 or length == longest:
            if streamer:
                for new in sequence[:, shown:length].cpu().flatten():
                    if new != padding:
                        streamer.put(new[None])
            shown = length
            left = (~finished).nonzero().squeeze(1)
            if not len(left):
                break
            if 2 * len(left) <= len(finished):
                replies[rows] = sequence
                rows, sequence, finished, token = rows[left], sequence[left], finished[left], token[left]
                decoder.keep(left)
        decoder.advance(token)
    if streamer:
        streamer.end()
    replies[rows] = sequence
    return replies[:, :length]


def fast_loop(model, max_new_tokens: int, streamer=None):
    """Return `decode` where its CUDA graphs pay and its static cache is known to be right, else None, which
    stands for transformers' loop."""
    # A sliding window would need another cache.
    layers = set(getattr(model.config, "layer_types", None) or ())
    fits = layers == {"full_attention"} and model.config._attn_implementation == "sdpa"
    pays = model.device.type == "cuda" and max_new_tokens >= SHORT_REPLY
    # `model.generate` does not hand the streamer on.
    return partial(decode, streamer=streamer) if fits and pays else None
