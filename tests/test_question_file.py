"""A file of questions: every reply in its place, and what is answered is not asked again, whatever comes between."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import Started, load_attentive, refused, run_script

import data
import inference
from parts import asking, question_file, replies, reply_file
from parts.conversation import Conversation

LONG = "头痛怎么办？" * 680  # a question so long that a batch has three
BY = {"model": "tiny", "weights": None, "no_thinking": False, "max_new_tokens": 30, "seed": 42}


def answer(model, tokenizer, questions: str | list, path: str = "replies.jsonl", thinking: bool = True, begin=None):
    rows = question_file.read(questions) if isinstance(questions, str) else questions
    conversation = Conversation(model, tokenizer, thinking, max_new_tokens=30, seed=42)
    by = BY | {"no_thinking": not thinking}
    return question_file.answer(rows, path, by, lambda: (conversation, begin or data.to_messages))


def never():
    raise AssertionError("a model is loaded for nothing")


@pytest.fixture
def likeliest(tiny_model):
    """A model that always takes the likeliest token, although replies.generate samples."""
    model = load_attentive(tiny_model)
    model.generation_config.top_k = 1
    return model


def read_lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_replies_come_in_the_order_of_the_questions(workspace, likeliest, tokenizer):
    rows = read_lines("val.jsonl")
    given = answer(likeliest, tokenizer, "val.jsonl", "out.jsonl")
    found = read_lines("out.jsonl")
    assert [row["question"] for row in found] == [row["question"] for row in rows]
    lengths = [len(row["question"]) for row in rows]
    assert sorted(lengths) != lengths != sorted(lengths, reverse=True)
    assert len({row["think"] + row["answer"] for row in found}) == len(rows)
    for row, reply in zip(found, given):
        [alone] = replies.generate(likeliest, tokenizer, [data.to_messages(row["question"])], max_new_tokens=30)
        assert alone[:5] == reply[:5] == (row["think"], row["answer"], row["complete"], row["form"], row["tokens"])
        assert row["seconds"] == reply.seconds > 0 and row["by"] == BY
    assert sorted(path.name for path in workspace.glob("out*")) == ["out.jsonl"]


def test_questions_from_a_text_file(workspace, likeliest, tokenizer):
    Path("q.txt").write_text("\ufeff 头痛怎么办？\r\n\n感冒了？", encoding="utf-8")
    assert {reply.form for reply in answer(likeliest, tokenizer, "q.txt", thinking=False)} == {"none"}
    assert [row["question"] for row in read_lines("replies.jsonl")] == ["头痛怎么办？", "感冒了？"]


def test_a_question_is_asked_after_its_history(folder, likeliest, tokenizer):
    rows = [{"question": "多久？"}, {"question": "多久？", "history": [["头痛？", "先休息。"]]}]
    answer(likeliest, tokenizer, rows, "out.jsonl")
    found = read_lines("out.jsonl")
    for row, reply in zip(rows, found):
        asked = data.to_messages("多久？", history=row.get("history"))
        [alone] = replies.generate(likeliest, tokenizer, [asked], max_new_tokens=30)
        assert alone[:3] == (reply["think"], reply["answer"], reply["complete"])
    assert found[0]["answer"] != found[1]["answer"] and found[1]["history"] == [["头痛？", "先休息。"]]


def test_what_data_py_saw_in_the_training_part_is_known(folder):
    rows = [{"question": "甲？", "answer": "答", "seen": True}, {"question": "乙？", "answer": None, "seen": "False"}]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [row["seen"] for row in question_file.read("q.jsonl")] == [True, False]


def test_it_goes_on_where_it_stopped(folder, likeliest, tokenizer, capsys):
    """The same question may stand there twice, and after other turns; a line that was cut off is not used."""
    rows = [{"question": text} for text in ("头痛？", "感冒？", "头痛？", "失眠？")]
    rows += [{"question": "感冒？", "history": [["头痛？", "先休息。"]]}, {"question": "水\udcff？"}]
    answer(likeliest, tokenizer, rows)
    lines = Path("replies.jsonl").read_bytes().splitlines(keepends=True)
    kept = [lines[5], lines[2], lines[4]]
    edited = [json.dumps(json.loads(line) | {"answer": f"第 {place} 行"}).encode() for place, line in enumerate(kept)]
    asked = []

    def begin(question, history=None):
        asked.append(question)
        return data.to_messages(question, history=history)

    for last in (b"", lines[1][:40], lines[1][:5], lines[1][:-2]):
        Path("replies.jsonl").write_bytes(b"\n".join(edited) + b"\n" + last)
        capsys.readouterr()
        answer(likeliest, tokenizer, rows, begin=begin)
        said = capsys.readouterr().out.replace("\n", "")
        assert f"replies.jsonl 里已有 3 条，{'最后一行没有写完，不用；' * bool(last)}接着答其余 3 条。" in said
        found = read_lines("replies.jsonl")
        assert [row["question"] for row in found] == ["头痛？", "感冒？", "头痛？", "失眠？", "感冒？", "水?？"]
        assert [row["answer"] for row in found if "行" in row["answer"]] == ["第 1 行", "第 2 行", "第 0 行"]
        assert found[0]["answer"] == "第 1 行" and found[4]["answer"] == "第 2 行"
    assert sorted(path.name for path in folder.iterdir()) == ["replies.jsonl"]


def test_interrupted_again_and_again_it_still_goes_on(folder, likeliest, tokenizer):
    """What was cut off is gone from the file before anything is added to it."""
    rows = [{"question": f"第 {place} 问：" + LONG} for place in range(9)]

    class Interrupted(Conversation):
        batches = 0

        def generate(self, *args):
            if self.batches:
                raise KeyboardInterrupt
            self.batches += 1
            return super().generate(*args)

    for known in (3, 6):
        conversation = Interrupted(likeliest, tokenizer, True, max_new_tokens=30, seed=42)
        with pytest.raises(KeyboardInterrupt):
            question_file.answer(rows, "replies.jsonl", BY, lambda: (conversation, data.to_messages))  # noqa: B023
        assert len(read_lines("replies.jsonl")) == known
        with open("replies.jsonl", "ab") as file:
            file.write(Path("replies.jsonl").read_bytes()[:50])
    assert len(answer(likeliest, tokenizer, rows)) == 9
    assert [row["question"] for row in read_lines("replies.jsonl")] == [row["question"] for row in rows]


def test_brackets_in_the_name_of_a_file_are_shown(folder, likeliest, tokenizer, capsys):
    answer(likeliest, tokenizer, [{"question": "头痛？"}], "r[b].jsonl")
    answer(likeliest, tokenizer, [{"question": "头痛？"}, {"question": "感冒？"}], "r[b].jsonl")
    assert "r[b].jsonl 里已有 1 条，接着答其余 1 条。" in capsys.readouterr().out


def test_nothing_is_loaded_where_nothing_is_missing(folder, likeliest, tokenizer):
    rows = [{"question": text} for text in ("头痛？", "感冒？")]
    given = answer(likeliest, tokenizer, rows)
    before = Path("replies.jsonl").read_bytes()
    assert question_file.answer(rows, "replies.jsonl", BY, never) == given
    assert Path("replies.jsonl").read_bytes() == before
    turned = b"".join(reversed(before.splitlines(keepends=True))).rstrip(b"\n")  # and its last line is not ended
    for text in (turned, before.rstrip(b"\n")):
        Path("replies.jsonl").write_bytes(text)
        assert question_file.answer(rows, "replies.jsonl", BY, never) == given
        assert Path("replies.jsonl").read_bytes() == before


def test_a_file_that_somebody_writes_is_left_to_them(folder, likeliest, tokenizer):
    with reply_file.hold("replies.jsonl"):
        message = "另一个进程正在写 replies.jsonl；请等它结束，或用 --replies 换一个文件名。"
        refused(message, answer, likeliest, tokenizer, [{"question": "头痛？"}])
    assert not Path("replies.jsonl").exists()


def test_killed_after_three_of_ten_and_started_again_it_has_ten(workspace, tiny_model):
    rows = [{"question": f"第 {place} 问：" + LONG} for place in range(10)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--model_path", tiny_model, "--questions", "q.jsonl", "--max_new_tokens", "40"]
    process, path = Started("inference.py", flags, workspace), Path("replies.jsonl")
    while not (path.is_file() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, process.stdout
    before = [line for line in path.read_bytes().split(b"\n")[:-1]]
    assert len(before) in (3, 6, 9)
    again = run_script("inference.py", *flags, cwd=workspace)
    assert again.returncode == 0, again.stdout
    assert f"replies.jsonl 里已有 {len(before)} 条" in again.stdout and "完整的回复" in again.stdout
    found = path.read_bytes().splitlines()
    assert len(found) == 10 and set(before) <= set(found)
    assert [json.loads(line)["question"] for line in found] == [row["question"] for row in rows]


def test_a_question_that_is_too_long_is_named_before_any_is_answered(folder, likeliest, tokenizer):
    likeliest.config.max_position_embeddings = 300
    Path("q.txt").write_text("头痛？\n" + "头" * 600, encoding="utf-8")
    message = "第 2 个问题连同之前的对话有 ~ 个 token，模型最多读 300 个；请缩短。"
    refused(message, answer, likeliest, tokenizer, "q.txt")
    assert sorted(path.name for path in folder.iterdir()) == ["q.txt"]


def test_batches_hold_every_prompt_once_and_fit():
    lengths = [10, 3000, 40, 500, 500, 7] * 20
    batches = question_file.make_batches(lengths, new_tokens=2000, max_tokens=10_000)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) * (longest + 2000) <= 10_000 and len(batch) <= question_file.BATCH_ROWS
    assert [len(batch) for batch in question_file.make_batches([9] * 130, 10, 10**9)] == [64, 64, 2]
    assert question_file.make_batches([9, 9], 10, 1) == [[0], [1]]  # too little memory: one at a time


def test_ctrl_c_keeps_what_is_answered(workspace, tiny_model):
    flags = ["--model_path", tiny_model, "--questions", "train.jsonl", "--max_new_tokens", "700"]
    process, path = Started("inference.py", flags, workspace), Path("replies.jsonl")
    while not (path.is_file() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.stdout, process.stdout
    rows = read_lines(path)
    assert f"已答的 {len(rows)} 条在 {path}，再运行同一命令会接着答" in process.stdout and 0 < len(rows) < 108
    assert {row["question"] for row in rows} < {row["question"] for row in read_lines("train.jsonl")}


def test_a_full_disk_keeps_what_is_answered(folder, likeliest, tokenizer):
    """A file that takes no more is what a full disk is, to one who writes."""
    import resource

    rows = [{"question": f"第 {place} 问：" + LONG} for place in range(6)]
    answer(likeliest, tokenizer, rows)
    size = Path("replies.jsonl").stat().st_size
    Path("replies.jsonl").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, limits[1]))
    try:
        message = "写 replies.jsonl 失败（~），磁盘剩余 ~写完的回复都还在；请腾出空间，再用同一命令继续。"
        refused(message, answer, likeliest, tokenizer, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    kept = len(reply_file.read("replies.jsonl", rows, BY).replies)
    assert kept in (3, 4)
    answer(likeliest, tokenizer, rows)
    assert len(read_lines("replies.jsonl")) == 6


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
        ("q.jsonl", b"[]", "q.jsonl 里没有一行数据"),
        ("q.jsonl", b"{", "q.jsonl 第 1 行不是合法的 JSON"),
        ("q.scores.json", b"[]", "q.scores.json：这样的名字是分数的；请给问题的文件换一个名字"),
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


def test_what_scores_need_is_missed_before_an_hour_of_replies(tmp_path, monkeypatch):
    """In an environment that is older than the scores."""
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("头痛？", encoding="utf-8")
    monkeypatch.setattr(asking, "SCORING", ("rouge_score", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["inference.py", "--questions", "q.txt"])
    refused("--questions 评分要用 no_such_package；请先运行 pip install -r requirements.txt", inference.main)


def test_a_place_for_replies_without_questions_is_an_error(monkeypatch, capsys):
    for flag in ("--replies", "--compare_with"):
        monkeypatch.setattr(sys, "argv", ["inference.py", flag, "mine.jsonl"])
        with pytest.raises(SystemExit) as end:
            inference.main()
        assert end.value.code == 2 and f"{flag} 只和 --questions 一起起作用" in capsys.readouterr().err


def test_every_file_of_replies_has_scores_of_its_own():
    named = {name: [str(path) for path in reply_file.places_of_results(name)] for name in ("a/r.jsonl", "r.v1", "r.v2")}
    assert named["a/r.jsonl"] == ["a/r.scores.json", "a/r.scores.html"]
    assert len({path for paths in named.values() for path in paths}) == 6


def test_questions_and_a_conversation_exclude_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("头痛？", encoding="utf-8")
    for other in ("--chat", "感冒了？"):
        with pytest.raises(SystemExit) as error:
            inference.build_parser("", "").parse_args(["--questions", "q.txt", other])
        assert error.value.code == 2 and "not allowed with" in capsys.readouterr().err
