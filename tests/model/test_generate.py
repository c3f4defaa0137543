"""The loop of generation: greedy, it gives what transformers' gives; sampling follows the settings; a step can be
recorded."""

from functools import partial

import pytest
import torch
import transformers
from helpers import SMALL, build_model, load_attentive
from torch.utils._python_dispatch import TorchDispatchMode

from parts.model import fused, generate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # float32 on either
STOP, PAD = 2, 0


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_attentive(tiny_model, DEVICE)


def draw(rows: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts [rows, length]; row r begins with r x `padding` places of padding."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(10, 4000, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row * padding] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def both(model, prompts, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' loop and ours generate for the same prompts, without the prompts."""
    plain = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    settings = {"pad_token_id": PAD, "eos_token_id": [STOP]} | plain | settings
    expected, ours = (model.generate(**prompts, **settings, custom_generate=loop) for loop in (None, generate.decode))
    length = prompts["input_ids"].shape[1]
    return expected[:, length:], ours[:, length:]


@pytest.mark.parametrize(
    ("rows", "length", "padding", "new"),
    [(1, 1, 0, 20), (1, 5, 0, 1), (1, 62, 0, 8), (1, 63, 0, 8), (1, 64, 0, 8), (1, 90, 0, 120), (3, 60, 18, 40)],
)
def test_greedy_tokens_are_those_of_generate(model, monkeypatch, capfd, rows, length, padding, new):
    """Also where the cache, here by 64 tokens, grows once or twice, and with rows of unequal length."""
    monkeypatch.setattr(generate, "CACHE_STEP", 64)
    expected, ours = both(model, draw(rows, length, padding), max_new_tokens=new)
    assert ours.shape == (rows, new) and ours.equal(expected)
    assert capfd.readouterr().err == ""  # on a GPU: the graph was captured


def test_a_reply_ends_at_its_stop_token_and_the_batch_with_its_last_reply(model):
    prompts = draw(3, 20, 4)
    free, _ = both(model, prompts, max_new_tokens=100)
    stops = [free[0, 3].item(), free[1, 40].item()]  # the first and the second row end, the third goes on
    expected, ours = both(model, prompts, max_new_tokens=100, eos_token_id=stops)
    assert (expected[0, 4:] == PAD).all() and ours.equal(expected)
    stops.append(free[2, 60].item())
    expected, ours = both(model, prompts, max_new_tokens=100, eos_token_id=stops)
    assert expected.shape[1] <= ours.shape[1] < expected.shape[1] + generate.READ_EVERY < 100
    assert ours[:, : expected.shape[1]].equal(expected) and (ours[:, expected.shape[1] :] == PAD).all()


def test_rows_that_are_finished_leave_and_change_no_other_reply(model, monkeypatch):
    """What is drawn for a row does not depend on who is still there."""
    left, keep = [], generate.Decoder.keep
    monkeypatch.setattr(generate.Decoder, "keep", lambda self, rows: (left.append(len(rows)), keep(self, rows)))
    prompts = draw(5, 20, 3)
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 20, "max_new_tokens": 100, "pad_token_id": PAD}

    def sample(stops: list[int]) -> list[list[int]]:
        torch.manual_seed(0)
        replies = model.generate(**prompts, **settings, eos_token_id=stops, custom_generate=generate.decode)
        return replies[:, 20:].tolist()

    free = sample([STOP])
    assert left == []
    stops = [free[0][3], free[1][10], free[3][20], free[4][60]]
    for row, whole in zip(sample(stops), free):
        end = next((i + 1 for i, token in enumerate(whole) if token in stops), len(whole))
        assert row[:end] == whole[:end] and set(row[end:]) <= {PAD}
    assert left[0] < 3 and len(left) > 1


def test_sampling_follows_temperature_top_k_and_top_p(model):
    prompt = draw(1, 6)["input_ids"]
    prompts = {"input_ids": prompt.repeat(400, 1), "attention_mask": torch.ones_like(prompt).repeat(400, 1)}
    settings = {"do_sample": True, "temperature": 0.05, "top_k": 6, "top_p": 0.8, "max_new_tokens": 1}
    torch.manual_seed(0)
    _, ours = both(model, prompts, **settings)
    with torch.inference_mode():
        logits = model(prompt).logits[0, -1]
    values, tokens = (logits / 0.05).topk(6)
    shares = values.softmax(-1)
    shares = shares * (shares.cumsum(-1) - shares < 0.8)  # the fewest tokens that make up 0.8
    shares /= shares.sum()
    assert 1 < (shares > 0).sum() < 6
    counts = (ours == tokens).sum(0) / len(ours)
    assert counts.sum().item() == pytest.approx(1)
    assert ((counts - shares).abs() <= 4 * (shares * (1 - shares) / len(ours)).sqrt()).all()


def test_streamed_text_is_the_reply(model, tokenizer):
    prompts = draw(1, 20)
    free, _ = both(model, prompts, max_new_tokens=100)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=1)
    stop = free[0, 40].item()
    settings = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": PAD, "eos_token_id": stop}
    loop = partial(generate.decode, streamer=streamer)
    output = model.generate(**prompts, **settings, streamer=streamer, custom_generate=loop)
    end = free[0].tolist().index(stop) + 1
    assert end % generate.READ_EVERY and output.shape[1] > 20 + end  # some padding was generated behind it
    assert "".join(streamer) == tokenizer.decode(free[0, :end])


class Graph(TorchDispatchMode):
    """A CUDA graph for the CPU: it notes each operation with the very tensors that it used, and runs them again;
    `wrong`: with another outcome."""

    wrong, cache = False, None

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "the step looks at a value on the host"
        result = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *args):
        super().__exit__(*args)
        for layer in self.cache.layers:  # what CUDA records has not run, so the cache is not one step on
            layer.cumulative_length -= 1

    def replay(self):
        for function, args, kwargs, result in self.steps:
            again = function(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (result, again))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        if self.wrong:
            self.steps[-1][-1].mul_(1.1)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the graph is CUDA's, and test_gpu.py looks at it")
@pytest.mark.parametrize(("rows", "padding", "wrong"), [(1, 0, False), (3, 5, False), (1, 0, True)])
@torch.no_grad()  # in inference mode a look at a value would be dispatched under other names
def test_a_graph_is_used_where_its_first_replay_gives_the_same(model, monkeypatch, capsys, rows, padding, wrong):
    """Nothing of a step may hang on Python: neither its values nor the addresses of its tensors."""
    ids, mask = draw(rows, 20, padding).values()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    decoder = generate.Decoder(model, ids, positions, mask if padding else None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: graph)
    monkeypatch.setattr(generate.Decoder, "verdict", generate.Decoder.verdict)  # put back behind
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(Graph, "cache", decoder.cache)
    monkeypatch.setattr(Graph, "wrong", wrong)
    decoder.capturable = True
    tokens = draw(rows, 30)["input_ids"]
    for token in tokens.T:
        decoder.advance(token)
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(torch.cat([ids, tokens], 1), attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(decoder.logits, expected, rtol=1e-4, atol=1e-5)
    assert decoder.verdict.runs == (decoder.graph is not None) == (not wrong)
    again = generate.Decoder(model, ids, positions[:, :20], mask[:, :20] if padding else None)
    again.capturable, Graph.cache = True, again.cache
    for token in tokens.T[:3]:
        again.advance(token)
    assert (again.graph is not None) == (not wrong)  # one that failed is not tried again
    said = capsys.readouterr().err
    assert said.count("与普通算子相差 10.0%") == wrong and ("--fast_kernels false" in said) == wrong


def test_graphs_are_for_gpus_and_replies_that_are_not_short(model):
    assert (generate.fast_loop(model, 2048) is None) == (DEVICE == "cpu")
    assert generate.fast_loop(model, generate.SHORT_REPLY - 1) is None


@pytest.mark.parametrize(("kind", "norms"), [("Qwen3", 2 * 4 + 1), ("Qwen2", 2 * 2 + 1), ("Llama", 2 * 2 + 1)])
@torch.inference_mode()
def test_fused_norms_change_no_logits(kind, norms):
    model = build_model(torch.float32, 2, SMALL | {"vocab_size": 4096}, kind).eval()
    model.set_attn_implementation("sdpa")
    for parameter in model.parameters():
        parameter.mul_(1 + 0.1 * torch.rand_like(parameter))  # new norms have weights of 1
    ids = draw(1, 20)["input_ids"].cpu()
    before, names = model(ids).logits, set(model.state_dict())
    fused.fuse_norms(model)
    assert sum(isinstance(module, torch.nn.RMSNorm) for module in model.modules()) == norms
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names
