"""A file of questions: every reply in its place, and what is answered is not asked again, whatever comes between."""

import contextlib
import json
import os
import resource
import signal
import sys
import time
import weakref
from pathlib import Path

import pytest
from helpers import Started, as_jsonl, load_attentive, refused, run_script, save

import data
from parts.model import generate, weights
from parts.model.encoding import Reply
from parts.replies import questions
from parts.replies.conversation import Conversation, make_batches
from parts.replies.questions import Candidate

LONG = "头痛怎么办？" * 680  # a question so long that a batch has three
ROWS = [{"question": "头痛？", "history": []}, {"question": "感冒？"}, {"question": "头痛？"}]
SETTINGS = {"no_thinking": False, "max_new_tokens": 30, "seed": 42}
BY = {"model": "output/full", "weights": "0123", **SETTINGS}
REPLY = Reply("想", "答", True, "one", 5, 0.25)


@pytest.fixture
def likeliest(tiny_model):
    """A model that always takes the likeliest token, although generate.generate samples."""
    model = load_attentive(tiny_model)
    model.generation_config.top_k = 1
    return model


@pytest.fixture
def answer(likeliest, tokenizer, monkeypatch):
    """answer(rows): the rows of r.jsonl after the model was asked; `.asked` has the questions that it got."""
    asked = []

    def begin(_):
        conversation = Conversation(likeliest, tokenizer, data.to_messages, True, max_new_tokens=30, seed=42)
        generate = conversation.generate

        def generate_and_note(prompts):
            asked.extend(prompt[-1]["content"] for prompt in prompts)
            return generate(prompts)

        conversation.generate = generate_and_note
        return conversation

    def run(rows: list[dict]) -> list[dict]:
        asked.clear()
        questions.answer_all(rows, [Candidate("tiny", "r.jsonl")], SETTINGS, begin)
        return read_lines("r.jsonl")

    monkeypatch.setattr(weights, "find_trained", lambda *_: None)
    run.asked = asked
    return run


def read_lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(*changes: dict, path: str = "r.jsonl", rows=ROWS) -> Candidate:
    """Write a file with a line for each of the changes: a reply, changed so, to the question in its place."""
    lines = [json.loads(questions.to_line(row, REPLY, BY)) | change for row, change in zip(rows, changes)]
    Path(path).write_text(as_jsonl(lines), encoding="utf-8")
    return Candidate("some/model", path)


def test_killed_after_three_of_ten_and_started_again_it_has_ten(finished):
    """By two models, whose replies stand side by side in the browser; and a third time nothing is asked."""
    rows = [{"question": f"第 {i} 问：" + LONG, "answer": "多休息。"} for i in range(10)]
    Path("q.jsonl").write_text(as_jsonl(rows), encoding="utf-8")
    flags = ["--questions", "q.jsonl", "--max_new_tokens", "40", "--model_path", "full", "--compare_with", "lora"]
    process, path = Started("inference.py", flags, finished), Path("replies.jsonl")
    while not path.is_file() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, process.stdout
    before = read_lines(path)
    assert len(before) in (3, 6, 9)
    again = run_script("inference.py", *flags, cwd=finished)
    assert again.returncode == 0, again.stdout
    assert f"replies.jsonl 里已有 {len(before)} 条" in again.stdout and "full 比 lora" in again.stdout
    assert not [line for line in before if line not in read_lines(path)]
    for file in (path, "replies.lora.jsonl"):
        assert [line["question"] for line in read_lines(file)] == [row["question"] for row in rows]
    [full, lora] = json.loads(Path("replies.scores.json").read_text(encoding="utf-8"))["models"]
    assert full["by"]["weights"] != lora["by"]["weights"] and lora["differences"]
    page = Path("replies.scores.html").read_text(encoding="utf-8")
    assert page.count("<h4>full</h4>") == page.count("<h4>lora</h4>") == 10
    # The adapter by its own script: the same file of its replies, and the other model's as an earlier file.
    flags = [*flags[:4], "--replies", "replies.lora.jsonl", "--model_path", "lora", "--compare_with", "replies.jsonl"]
    third = run_script("inference_lora.py", *flags, cwd=finished)
    assert third.returncode == 0 and "已回答" not in third.stdout, third.stdout


def test_replies_come_in_the_order_of_the_questions(workspace, likeliest, tokenizer, answer):
    """Longest are asked first, in batches with padding; each reply is the one that its question gets alone."""
    rows = questions.read("val.jsonl")
    rows.append({"question": rows[0]["question"], "history": [["头痛？", "先休息。"]]})
    lines = answer(rows)
    assert [line["question"] for line in lines] == [row["question"] for row in rows]
    assert [len(question) for question in answer.asked] != [len(row["question"]) for row in rows]
    for row, line in zip(rows, lines):
        asked = data.to_messages(row["question"], history=row["history"])
        [alone] = generate.generate(likeliest, tokenizer, [asked], max_new_tokens=30)
        assert list(alone[:5]) == [line[name] for name in questions.FIELDS[:5]]
        assert line["seconds"] > 0 and line["by"] == {"model": "tiny", "weights": None, **SETTINGS}
    assert lines[-1]["history"] == [["头痛？", "先休息。"]] and lines[-1]["answer"] != lines[0]["answer"]


def test_it_goes_on_where_it_stopped(folder, answer):
    """The same question may stand there twice, and after other turns; a line that was cut off is not used."""
    rows = [{"question": text} for text in ("头痛？", "感冒？", "头痛？", "失眠？")]
    rows.append({"question": "感冒？", "history": [["头痛？", "先休息。"]]})
    answer(rows)
    lines = Path("r.jsonl").read_bytes().splitlines()
    known = as_jsonl(json.loads(lines[i]) | {"answer": f"第 {i} 行"} for i in (2, 4)).encode()
    for last in (b"", lines[1][:40], lines[1][:5], lines[1][:-2], b"\0" * 40, b'{"ques\0\0', b'{"question": "\0'):
        Path("r.jsonl").write_bytes(known + last)
        written = answer(rows)
        assert [row["question"] for row in written] == [row["question"] for row in rows]
        assert sorted(answer.asked) == ["失眠？", "头痛？", "感冒？"]
        assert (written[0]["answer"], written[4]["answer"]) == ("第 2 行", "第 4 行")
    assert len(answer(rows)) == 5 and answer.asked == []
    assert [path.name for path in folder.iterdir()] == ["r.jsonl"]


def test_a_full_disk_keeps_what_is_answered(folder, answer):
    """A file that takes no more is what a full disk is, to one who writes."""
    rows = [{"question": f"第 {i} 问：" + LONG} for i in range(6)]
    answer(rows)
    size = Path("r.jsonl").stat().st_size
    Path("r.jsonl").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, limits[1]))
    try:
        refused("写 r.jsonl 失败（~）~写完的回复都还在；~", answer, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(read_lines("r.jsonl")) == 3 and len(answer(rows)) == 6 and len(answer.asked) == 3


def test_what_cannot_be_answered_or_written_is_refused_before_anything_is(folder, likeliest, answer):
    likeliest.config.max_position_embeddings = 300
    refused("第 2 个问题~有 ~ 个 token~", answer, [{"question": "头痛？"}, {"question": "头" * 600}])
    with contextlib.ExitStack() as stack:
        questions.hold("r.jsonl", stack)
        refused("另一个进程~正在写 r.jsonl；~", answer, ROWS)
    assert not Path("r.jsonl").exists()
    refused("无法写入 /proc/no/r.jsonl（~）；~", questions.hold, "/proc/no/r.jsonl", contextlib.ExitStack())


def test_models_are_loaded_one_after_another(finished):
    """The second one when nothing holds the first one any more."""
    candidates = questions.list_candidates("full", None, "a.jsonl", ["lora"])
    loaded = []

    def begin(candidate):
        model, tokenizer = weights.load(candidate.trained)
        assert [reference() for reference in loaded] == [None] * len(loaded)
        model.itself = [model]  # as models are, here and there: only the collector frees them
        loaded.append(weakref.ref(model))
        return Conversation(model, tokenizer, data.to_messages, True, 3, seed=42)

    questions.answer_all(ROWS, candidates, SETTINGS | {"max_new_tokens": 3}, begin)
    assert [len(candidate.replies) for candidate in candidates] == [3, 3] and len(loaded) == 2


def test_a_model_that_cannot_be_asked_is_refused_before_another_answers(finished):
    config = Path("lora/adapter_config.json")  # now an adapter of another base than it was trained on
    settings = json.loads(config.read_bytes()) | {"base_model_name_or_path": "full"}
    config.write_text(json.dumps(settings), encoding="utf-8")
    Path("q.txt").write_text("\ufeff头痛？\r\n\n", encoding="utf-8")
    flags = ("--model_path", "full", "--questions", "q.txt", "--max_new_tokens", "3", "--compare_with", "lora")
    result = run_script("inference.py", *flags, cwd=finished)
    last = result.stdout.splitlines()[-1]
    assert result.returncode == 1 and last.startswith("错误：") and "lora" in last, result.stdout
    assert not Path("replies.jsonl").exists()


def test_replies_that_were_made_otherwise_are_refused(folder):
    """Those of a folder that was moved were not: its weights are the same."""
    for change, what in (
        ({"max_new_tokens": 9, "no_thinking": True}, "--no_thinking 是 False，现在是 True；--max_new_tokens 是 30，~"),
        ({"weights": "4567"}, "权重 是 0123，现在是 4567"),
        ({"model": "Qwen/Qwen3-1.7B", "weights": None}, "~模型 是 output/full，现在是 Qwen/Qwen3-1.7B"),
    ):
        candidate = write({})
        candidate.read(ROWS)
        refused(f"r.jsonl 是另一次提问的（{what}）；它不会被改写~", candidate.settle, BY | change, "r.jsonl ")
        candidate.settle(BY | {"model": "moved"}, "")
        refused("r.jsonl 第 2 行是另一次提问的（~）；~", write({}, {"by": BY | change}).read, ROWS)


def test_what_is_no_reply_or_no_reply_to_these_questions_is_refused_and_stays(folder):
    row = '{"question": "头痛？", "think": "想", "answer": "答"}'  # of data, its line not ended
    for content in ("\n", "头痛？", row, "[" * 100_000):
        Path("r.jsonl").write_text(content, encoding="utf-8")
        refused("r.jsonl 第 1 行不是 inference.py 写的回复；~", Candidate("a", "r.jsonl").read, ROWS)
        assert Path("r.jsonl").read_text(encoding="utf-8") == content
    refused("r.jsonl 第 2 行不是 inference.py 写的回复；~", write({}, {"by": None}).read, ROWS)
    after_a_turn = {"question": "头痛？", "history": [["甲", "乙"]]}
    for asked, line in (([{"question": "别的？"}], 1), (ROWS[:2], 3), ([*ROWS[:2], after_a_turn], 3)):
        message = f"r.jsonl 第 {line} 行不是对 --questions 里问题的回复，或多了一次；~"
        refused(message, write({}, {}, {}).read, asked)


def test_files_that_cannot_be_compared_are_named(folder):
    write({}, path="part.jsonl")
    for others, message in (
        (["none.jsonl"], "--compare_with none.jsonl 里有 0 条回复，而问题有 3 个；请检查路径~"),
        (["part.jsonl"], "--compare_with part.jsonl 里有 1 条回复，~先用写它的命令答完。"),
        (["a/b", "a-b"], "~另一个 --compare_with，正在写 r.a-b.jsonl；~"),
    ):
        candidates = questions.list_candidates("some/model", None, "r.jsonl", others)
        refused(message, questions.answer_all, ROWS, candidates, SETTINGS, None)
    assert not Path("r.jsonl").exists()


@pytest.mark.parametrize("path", ["r.jsonl", "r.scores.json", "r.scores.html"])
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_looked_for(folder, path):
    """A folder is in the place of one of the three files."""
    Path("q.txt").write_text("头痛？", encoding="utf-8")
    Path(path).mkdir()
    before = sorted(folder.iterdir())
    result = run_script("inference.py", "--questions", "q.txt", "--replies", "r.jsonl", cwd=folder)
    assert result.returncode == 1 and result.stdout.splitlines()[-1].startswith(f"错误：无法写入 {path}"), result.stdout
    assert sorted(folder.iterdir()) == before


def test_places_and_batches():
    assert questions.result_paths("r.v1") != questions.result_paths("r.v2")
    assert questions.path_beside("out/r.jsonl", "Qwen/Qwen3-1.7B") == "out/r.Qwen-Qwen3-1.7B.jsonl"
    lengths = [10, 3000, 40, 500, 500, 7] * 20
    batches = make_batches(range(120), lengths, new_tokens=2000, max_tokens=10_000)
    assert sorted(sum(batches, [])) == list(range(120))
    assert all(len(batch) * (max(lengths[i] for i in batch) + 2000) <= 10_000 for batch in batches)


def test_a_file_of_questions_is_read_or_refused_in_one_sentence(folder):
    rows = [{"question": "甲？", "answer": "答\udcff", "seen": True}, {"question": "乙？", "answer": " ", "seen": 1}]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = {"question": "甲？", "history": [], "seen": True, "answer": "答?", "rest": {"seen": True}}
    second = {"question": "乙？", "history": [], "seen": False, "rest": {"seen": 1}}
    assert questions.read("q.jsonl") == [expected, second]
    # As Excel in China saves it, with rows in which nothing stands.
    for name, head, empty in (("q.csv", "question,id\n", ",\n , \n"), ("q.txt", "", "\n \u3000\n")):
        Path(name).write_text(f"{head}甲？\n乙？\n{empty}", encoding="gb18030")
    rows = [{"question": text, "id": None} for text in ("甲？", "乙？", None, "")]
    for name in ("q.csv", "q.txt", save(rows, "q.xlsx"), save(rows, "q.jsonl"), save(rows, "q.parquet")):
        assert [row["question"] for row in questions.read(name)] == ["甲？", "乙？"], name
    refused("无法读取数据文件 missing.jsonl~", questions.read, "missing.jsonl")
    for name, content, message in (
        ("q.txt", b" \n\n", "--questions q.txt 里没有问题~"),
        ("q.csv", b"question,id\n,7\n", "q.csv 第 2 行：question 为空；~"),
        ("q.jsonl", '{"question": "头痛？"}\n{"text": "头痛？"}'.encode(), "q.jsonl 第 2 行：缺少字段 question；~"),
        ("q.scores.json", b"[]", "--questions q.scores.json 应是 .txt~"),
    ):
        Path(name).write_bytes(content)
        refused(message, questions.read, name)


def test_other_fields_of_a_question_are_kept_and_none_takes_the_place_of_ours(folder, answer):
    """Also where replies are there from before they were kept; a file that is whole stays as it is."""
    kept = {"id": 20240131123456789, "department": "神经内科"}
    ours = {"question": "头痛？", "form": "片剂", "by": 1, "Response": "参考。"}
    Path("q.jsonl").write_text(as_jsonl([kept | ours, {"question": "感冒？"}]), encoding="utf-8")
    rows = questions.read("q.jsonl")
    plain = answer([{"question": row["question"]} for row in rows])
    Path("r.jsonl").write_text(as_jsonl(plain[:1]), encoding="utf-8")
    written = answer(rows)
    assert answer.asked == ["感冒？"] and written[0] == plain[0] | kept
    Path("r.jsonl").write_text(as_jsonl(plain), encoding="utf-8")
    assert answer(rows) == plain and not answer.asked


def test_what_a_pipe_brings_is_read_whole_and_one_that_brings_nothing_is_not_waited_for(monkeypatch):
    output, pipe = os.pipe()
    with open(output, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert questions.read_piped(wait=False) == ""
        os.write(pipe, "头痛，\r\n\r\n怎么办？\n".encode("gb18030"))
        os.close(pipe)
        assert questions.read_piped(wait=False) == "头痛，\n\n怎么办？"
        assert questions.read_piped(wait=True) == ""
    monkeypatch.setattr(sys, "stdin", None)  # as where it is closed
    assert questions.read_piped(wait=False) == ""
