"""Replies: the decoding loop against transformers' own, and files of questions."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, run_script
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import data
import inference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # float32 on either
STOP, PAD = 2, 0


def load_attentive(tiny_model, device: str = "cpu"):
    """The tiny model with weights so large that its tokens hang on all that came before: else it repeats one token."""
    model = models.load_weights(str(tiny_model), torch.device("cpu")).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_attentive(tiny_model, DEVICE)


def draw(rows: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts [rows, length]; row r begins with r x `padding` places of padding."""
    generator = torch.Generator().manual_seed(length)
    ids, mask = torch.randint(10, 4000, (rows, length), generator=generator), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, : row * padding] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def both(model, prompts, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' loop and ours generate for the same prompts, without the prompts."""
    plain = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    settings = {"pad_token_id": PAD, "eos_token_id": [STOP]} | plain | settings
    loops = (None, decoding.decode)
    found = (model.generate(**prompts, **settings, custom_generate=loop) for loop in loops)
    return tuple(output[:, prompts["input_ids"].shape[1] :] for output in found)


# ---- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "length", "padding", "new"),
    [(1, 1, 0, 20), (1, 5, 0, 1), (1, 510, 0, 8), (1, 511, 0, 8), (1, 512, 0, 8), (1, 700, 0, 700), (3, 500, 40, 90)],
)
def test_greedy_tokens_are_those_of_generate(model, capfd, rows, length, padding, new):
    """Also where the cache of 512 tokens grows once or twice, and with rows of unequal length."""
    expected, found = both(model, draw(rows, length, padding), max_new_tokens=new)
    assert found.shape == (rows, new) and found.equal(expected)
    assert capfd.readouterr().err == ""  # on a GPU: the graph was captured


def test_a_reply_ends_at_its_stop_token_and_the_batch_with_its_last_reply(model):
    prompts = draw(3, 20, 4)
    free, _ = both(model, prompts, max_new_tokens=200)
    stops = [free[0, 3].item(), free[1, 40].item()]  # the first and the second row end, the third goes on
    expected, found = both(model, prompts, max_new_tokens=200, eos_token_id=stops)
    assert (expected[0, 4:] == PAD).all() and found.equal(expected)
    stops.append(free[2, 60].item())
    expected, found = both(model, prompts, max_new_tokens=200, eos_token_id=stops)
    assert expected.shape[1] <= found.shape[1] < expected.shape[1] + decoding.READ_EVERY < 200
    assert found[:, : expected.shape[1]].equal(expected) and (found[:, expected.shape[1] :] == PAD).all()


def test_sampling_follows_temperature_top_k_and_top_p(model):
    prompts = {name: tensor.repeat(400, 1) for name, tensor in draw(1, 6).items()}
    settings = {"do_sample": True, "temperature": 0.05, "top_k": 6, "top_p": 0.8, "max_new_tokens": 1}
    torch.manual_seed(0)
    _, found = both(model, prompts, **settings)
    with torch.inference_mode():
        logits = model(prompts["input_ids"][:1]).logits[0, -1]
    values, places = (logits / 0.05).topk(6)
    shares = values.softmax(-1)
    shares = shares * (shares.cumsum(-1) - shares < 0.8)  # the fewest tokens that make up 0.8
    shares /= shares.sum()
    assert 1 < (shares > 0).sum() < 6
    counts = torch.stack([(found == place).sum() for place in places]) / len(found)
    assert counts.sum().item() == pytest.approx(1)
    assert ((counts - shares).abs() <= 4 * (shares * (1 - shares) / len(found)).sqrt()).all()


def test_streamed_text_is_the_reply(model, tokenizer):
    prompts = draw(1, 20)
    free, _ = both(model, prompts, max_new_tokens=100)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=1)
    output = model.generate(
        **prompts,
        max_new_tokens=100,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=free[0, 40].item(),
        streamer=streamer,
        custom_generate=partial(decoding.decode, streamer=streamer),
    )
    end = free[0].tolist().index(free[0, 40].item()) + 1
    assert end % decoding.READ_EVERY and output.shape[1] > 20 + end  # some padding was generated behind it
    assert "".join(streamer) == tokenizer.decode(free[0, :end])


class Recorder(TorchDispatchMode):
    """A CUDA graph for the CPU: notes each operation with the very tensors that it used, and runs them again."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "the step looks at a value on the host"
        result = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.steps:
            again = function(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (result, again))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize(("rows", "padding"), [(1, 0), (3, 5)])
@torch.no_grad()  # in inference mode a look at a value would be dispatched under other names
def test_a_step_can_be_recorded_once_and_replayed(model, rows, padding):
    """Nothing of a step may hang on Python: neither its values nor the addresses of its tensors."""
    prompts = draw(rows, 20, padding)
    mask = prompts["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    decoder = decoding.Decoder(model, prompts["input_ids"], positions, mask if padding else None)
    tokens = draw(rows, 40)["input_ids"]
    decoder.token.copy_(tokens[:, :1])
    decoder.position += 1
    with Recorder() as recorder:
        logits = decoder.forward(decoder.token, decoder.position, decoder.mask)
    for i in range(1, 40):
        decoder.token.copy_(tokens[:, i, None])
        decoder.position += 1
        recorder.replay()
    whole = torch.cat([prompts["input_ids"], tokens], 1)
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    expected = model(whole, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="there a capture succeeds")
@torch.inference_mode()
def test_a_capture_that_fails_says_why_in_one_line_and_decoding_goes_on(model, capsys):
    ids, tokens = draw(1, 20)["input_ids"], draw(1, 10)["input_ids"]
    decoder = decoding.Decoder(model, ids, torch.arange(20)[None])
    decoder.capturable = True
    for token in tokens.T:
        decoder.advance(token)
    expected = model(torch.cat([ids, tokens], 1)).logits[:, -1]
    torch.testing.assert_close(decoder.logits, expected, rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().err.count("\n") == 1 and decoder.graph is None


def test_graphs_are_for_gpus_and_replies_that_are_not_short(model):
    assert (decoding.fast_loop(model, 2048) is None) == (DEVICE == "cpu")
    assert decoding.fast_loop(model, decoding.SHORT_REPLY - 1) is None


@torch.inference_mode()
def test_fused_norms_change_no_logits(tiny_model):
    model = models.load_weights(str(tiny_model), torch.device("cpu"))
    for parameter in model.parameters():
        parameter.mul_(1 + 0.1 * torch.rand_like(parameter))  # new norms have weights of 1
    ids = draw(1, 20)["input_ids"].cpu()
    before, names = model(ids).logits, set(model.state_dict())
    decoding.fuse_norms(model)
    assert sum(isinstance(module, torch.nn.RMSNorm) for module in model.modules()) == 2 * 4 + 1
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names


# ---- a file of questions ------------------------------------------------------------------------------------------


def answer(model, tokenizer, *flags: str) -> None:
    args = inference.build_parser("", "").parse_args(["--max_new_tokens", "30", *flags])
    question_file.refuse_taken(args.replies)
    question_file.answer(model, tokenizer, args, Console())


@pytest.fixture
def likeliest(tiny_model):
    """A model that always takes the likeliest token, although replies.generate samples."""
    model = load_attentive(tiny_model)
    model.generation_config.top_k = 1
    return model


def read_lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_replies_come_in_the_order_of_the_questions(workspace, likeliest, tokenizer, capsys):
    rows = read_lines("val.jsonl")
    answer(likeliest, tokenizer, "--questions", "val.jsonl", "--replies", "out.jsonl")
    found = read_lines("out.jsonl")
    assert [row["question"] for row in found] == [row["question"] for row in rows]
    lengths = [len(row["question"]) for row in rows]
    assert sorted(lengths) != lengths != sorted(lengths, reverse=True)
    assert len({row["think"] + row["answer"] for row in found}) == len(rows)
    for row in found:
        [alone] = replies.generate(likeliest, tokenizer, [data.to_messages(row["question"])], max_new_tokens=30)
        assert alone == (row["think"], row["answer"], row["complete"])
    output = capsys.readouterr().out
    assert "ROUGE-L" in output and f"/{len(rows)}" in output and "out.jsonl" in output
    assert not Path("out.jsonl.part").exists()


def test_questions_from_a_text_file_without_references(workspace, likeliest, tokenizer, capsys):
    Path("q.txt").write_text("\ufeff 头痛怎么办？\r\n\n感冒了？", encoding="utf-8")
    answer(likeliest, tokenizer, "--questions", "q.txt", "--no_thinking")
    assert [row["question"] for row in read_lines(inference.REPLIES)] == ["头痛怎么办？", "感冒了？"]
    assert "ROUGE-L" not in capsys.readouterr().out


def test_batches_hold_every_prompt_once_and_fit():
    lengths = [10, 3000, 40, 500, 500, 7] * 20
    batches = question_file.make_batches(lengths, max_new_tokens=2000, max_tokens=10_000)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) * (longest + 2000) <= 10_000 and len(batch) <= question_file.BATCH_ROWS
    assert [len(batch) for batch in question_file.make_batches([9] * 130, 10, 10**9)] == [64, 64, 2]
    assert question_file.make_batches([9, 9], 10, 1) == [[0], [1]]  # too little memory: one at a time


def test_ctrl_c_keeps_what_is_answered(workspace, tiny_model):
    flags = ["--model_path", tiny_model, "--questions", "train.jsonl", "--max_new_tokens", "700"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "inference.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    part = Path("replies.jsonl.part")
    while not (part.is_file() and part.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in output, output
    rows = read_lines(part)
    assert f"已答的 {len(rows)} 条在 {part}" in output and 0 < len(rows) < 108
    assert {row["question"] for row in rows} < {row["question"] for row in read_lines("train.jsonl")}
    with pytest.raises(SystemExit, match="replies.jsonl.part 已经存在"):
        question_file.refuse_taken("replies.jsonl")


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("多喝水", "多喝水", 1),
        ("多 喝\n水", "多喝水", 1),
        ("水喝多", "多喝水", 2 * 1 / 6),
        ("请多喝点水", "多喝温水", 2 * 3 / 9),
        ("", "多喝水", 0),
        ("", "", 0),
    ],
)
def test_rouge_l(text, reference, expected):
    assert scores.rouge_l(text, reference) == pytest.approx(expected)


def test_scores_count_whole_replies_only():
    replies = [
        encoding.Reply("想", "多喝水", True),
        encoding.Reply("想想", "多喝水", False),
        encoding.Reply("想想想", "", True),
        encoding.Reply("", "多喝水", True),
    ]
    rows = [{"question": "问", "answer": "多喝水"}, {"question": "问", "answer": None}, *[{"question": "问"}] * 2]
    values = [value for _, value in scores.count(rows, replies)]
    assert values[0].startswith("1/4") and values[1] == "2" and values[2] == "2" and values[3].startswith("1.000（1 条")
    assert scores.count(rows, replies, thinking=False)[0][1].startswith("2/4")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("missing.txt", None, "无法读取 --questions missing.txt"),
        ("missing.jsonl", None, "无法读取 --questions missing.jsonl"),
        ("folder.txt", "folder", "无法读取 --questions folder.txt"),
        ("q.docx", b"x", "应是 .txt"),
        ("q.txt", b" \n\n", "q.txt 里没有问题"),
        ("q.txt", "头痛？".encode("gbk"), "q.txt 第 1 行不是 UTF-8"),
        ("q.jsonl", b"", "q.jsonl 是空文件"),
        ("q.jsonl", '{"question": "头痛？"}\n{"text": "头痛？"}'.encode(), "q.jsonl 第 2 行没有问题"),
        ("q.jsonl", b'{"question": " "}', "q.jsonl 第 1 行没有问题"),
        ("q.jsonl", b'{"question": 3}', "q.jsonl 第 1 行没有问题"),
        ("q.jsonl", b"[]", "q.jsonl 第 1 行没有问题"),
        ("q.jsonl", b"{", "q.jsonl 第 1 行不是合法的 JSON"),
    ],
    ids=str,
)
def test_files_without_questions_get_one_sentence(tmp_path, monkeypatch, name, content, part):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"^错误：[^\n]*{part}[^\n]*$"):
        question_file.read(name)


@pytest.mark.parametrize("script", ["inference.py", "inference_lora.py"])
def test_replies_that_are_there_are_kept_and_told_of_before_a_model_is_loaded(tmp_path, script):
    (tmp_path / "q.txt").write_text("头痛？", encoding="utf-8")
    (tmp_path / "old.jsonl").write_text("{}", encoding="utf-8")
    result = run_script(script, "--questions", "q.txt", "--replies", "old.jsonl", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert result.stdout.strip().splitlines()[-1].startswith("错误：old.jsonl 已经存在，不会覆盖")
    assert (tmp_path / "old.jsonl").read_text(encoding="utf-8") == "{}"


def test_replies_that_cannot_be_written():
    with pytest.raises(SystemExit, match="无法写入 --replies /proc/no/replies.jsonl"):
        question_file.refuse_taken("/proc/no/replies.jsonl")


def test_questions_and_a_conversation_exclude_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("头痛？", encoding="utf-8")
    for other in ("--chat", "感冒了？"):
        with pytest.raises(SystemExit) as error:
            inference.build_parser("", "").parse_args(["--questions", "q.txt", other])
        assert error.value.code == 2 and "not allowed with" in capsys.readouterr().err
