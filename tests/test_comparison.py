"""Models held against each other, and the first one's scores: tables, JSON, and the questions one by one."""

import json
import math
from pathlib import Path

import pytest
from chat_server import ChatServer, text
from helpers import opening, run_script
from parts.candidates import Answered
from rich.console import Console

from parts import comparison, intervals, score_table
from parts.encoding import Reply
from parts.endpoint import Endpoint

BY = {"model": "a", "weights": None, "no_thinking": False, "max_new_tokens": 30, "seed": 42}
ROWS = [
    {
        "question": f"第 {place} 问？",
        "think": "先想原因。",
        "answer": f"多喝水，休息 {place} 天。",
        "seen": place % 3 == 0,
    }
    for place in range(12)
]
GOOD = [Reply("先想原因。", f"多喝水，休息 {place} 天。", True, "one", 10, 0.1) for place in range(12)]
BAD = [Reply("根据用户提供的答案，想", "", False, "unclosed", 30, 0.1) for _ in range(12)]


def measured(*replies: list[Reply], rows=ROWS, **by) -> list[comparison.Measured]:
    answered = [Answered(f"模型{place}", f"{place}.jsonl", BY | by, each) for place, each in enumerate(replies)]
    return [comparison.measure(rows, each) for each in answered]


def test_what_is_compared_with_itself_differs_nowhere():
    mixed = [*GOOD[:6], *BAD[6:]]
    found = comparison.differences(*measured(mixed, mixed))
    assert len(found) == len(measured(mixed)[0].lines) - 1 > 20  # all but the speed
    assert {(each.difference, each.low, each.high, each.differs) for each in found} == {(0, 0, 0, False)}


def test_differences_are_found_and_have_the_sign_of_the_first_one():
    found = {each.key: each for each in comparison.differences(*measured(GOOD, BAD))}
    assert {key for key, each in found.items() if not each.differs} == {
        *("loops", "traces_process", "traces_doctor", "traces_two", "traces_covert", "answer_length")
    }
    assert (found["whole"].difference, found["traces"].difference) == (1, -1)
    assert (found["answer_rougeL"].value, found["answer_rougeL"].other) == (1, 0)
    assert found["answer_length"].difference is None  # the second one never came to an answer
    few = measured(GOOD[:5], BAD[:5], rows=ROWS[:5])
    assert not [each for each in comparison.differences(*few) if each.differs]


def test_tables_fit_into_80_columns_and_say_what_they_mean():
    console = Console(width=80, record=True, highlight=False)
    for *table, notes in comparison.tables(measured([*GOOD[:10], *BAD[10:]], BAD), []):
        score_table.show(console, table, *notes)
    text = console.export_text()
    first, second = text.split("模型0（前）与 模型1（后）相比")
    assert "模型0：12 个问题" in first and "tok:zh" in first and "（新题）" in first
    names = [line.name for line in measured(GOOD)[0].lines]
    for name in names:
        [row] = [line for line in first.splitlines() if line.startswith((f"{name} %", f"{name}  "))]
        assert "[" in row, row
        assert any(line.startswith(name) for line in second.splitlines()) == (name != "每秒 token")
    assert "不同" in second and "分不出" in second and "—" in second
    [whole] = [line.split() for line in first.splitlines() if line.startswith("完整的回复")]
    assert whole == ["完整的回复", "%", "12", "83.3", "[58.3,", "100.0]"]


def test_settings_that_are_unlike_are_told():
    one, other = measured(GOOD)[0], measured(GOOD, seed=7)[0]
    [_, (*_, notes)] = comparison.tables([one, other], [])
    assert "注意：后者不是这样问的（--seed 是 7，现在是 42）。" in notes
    other = measured(GOOD, no_thinking=True)[0]
    assert "think_rougeL" not in {each.key for each in comparison.differences(one, other)}


def test_json_has_all_of_it():
    found = json.loads(comparison.to_json(measured(GOOD, BAD), []))
    first, second = found["models"]
    assert set(found["signatures"]) == {"chrF", "BLEU"} and first["by"] == BY
    assert [tuple(line.values()) for line in first["scores"]] == [tuple(line) for line in measured(GOOD)[0].lines]
    assert set(second["differences"][0]) == set(intervals.Difference._fields) and "differences" not in first
    assert "NaN" not in comparison.to_json(measured(BAD[:1], rows=ROWS[:1]), [])


def test_a_case_says_by_how_much_its_answers_differ():
    asked_before = ROWS[0] | {"question": "多久？", "history": [["头痛？", "休息。"]]}
    rows = [asked_before, ROWS[1], {"question": "无参考？"}]
    one, other = [*GOOD[:2], GOOD[0]], [GOOD[0], BAD[0], BAD[0]]
    found = comparison.cases(rows, measured(one, other, rows=rows), [])
    assert [case.question for case in found] == ["头痛？\n多久？", "第 1 问？", "无参考？"]
    question, reference, replies, difference, note = found[1]
    assert reference == {"think": "先想原因。", "answer": "多喝水，休息 1 天。"} and difference == 1 and note == ""
    assert [name for name, _ in replies] == ["模型0", "模型1"] and replies[1][1]["think"] == BAD[0].thinking
    assert found[0].difference == 0 and found[2].reference is None and math.isnan(found[2].difference)


def test_a_judge_is_asked_about_answers_alone_and_heard_in_tables_cases_and_json(folder):
    """It prefers whichever answer is longer, in whatever place."""

    def speak(body):
        asked = body["messages"][-1]["content"]
        return text("裁决：A" if asked.index("休息 2 天。" * 3) < asked.index("只要睡觉") else "裁决：B")

    longer, shorter = GOOD[0]._replace(answer="休息 2 天。" * 3), GOOD[0]._replace(answer="只要睡觉")
    both = measured([longer] * 2 + GOOD[2:3], [shorter] * 2 + GOOD[2:3], rows=ROWS[:3])
    console = Console(record=True)
    with ChatServer(speak) as server:
        endpoint = Endpoint(server.url)
        judged = comparison.judge_all(ROWS[:3], both, endpoint, "比较", "replies.jsonl", console)
        again = comparison.judge_all(ROWS[:3], both, endpoint, "比较", "replies.jsonl", console)
        asked = [body["messages"][-1]["content"] for method, _, _, body in server.requests if method == "POST"]
    assert judged == again and [each.verdicts for each in judged] == [["win", "win", "tie"]]
    assert (
        len(asked) == 4
        and not any(GOOD[0].thinking in each for each in asked)
        and Path("replies.jsonl.judge.jsonl").is_file()
    )
    heading, columns, lines, notes = comparison.tables(both, judged)[2]
    assert heading == "评审 judge：模型0（前）与 模型1（后）" and lines[1] == ["较好、平、较差", "2、1、0"]
    assert [case.note for case in comparison.cases(ROWS[:3], both, judged)] == ["评审：前者较好"] * 2 + ["评审：平"]
    found = json.loads(comparison.to_json(both, judged))["models"]
    assert found[1]["judge"]["model"] == "judge" and found[1]["judge"]["wins"] == 2 and "judge" not in found[0]
    assert comparison.judge_all(ROWS[:3], both, None, "比较", "replies.jsonl", console) == []


def test_a_judge_that_is_down_is_a_line_and_no_end(folder):
    with ChatServer() as server:
        pass
    both, console = (
        measured([GOOD[0]], [GOOD[0]._replace(answer="别的")], rows=ROWS[:1]),
        Console(record=True, width=500),
    )
    endpoint = Endpoint(server.url)
    [judged] = comparison.judge_all(ROWS[:1], both, endpoint, "比较", "replies.jsonl", console)
    assert judged.verdicts == ["failed"] and judged.judge == server.url and "用不了" in console.export_text()


@pytest.fixture
def questions(finished, tiny_model) -> Path:
    """A working folder with trained models, and four questions of which one has no reference and one an empty one."""
    rows = [json.loads(line) for line in Path("val.jsonl").read_text(encoding="utf-8").splitlines()[:4]]
    rows[1].pop("answer")
    rows[2] |= {"answer": ""}
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return finished


def read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_a_model_an_adapter_and_a_file_are_compared_and_nothing_is_generated_twice(questions, tiny_model):
    """By both scripts."""
    flags = ("--questions", "q.jsonl", "--max_new_tokens", 12)
    base = run_script("inference.py", "--model_path", tiny_model, "--replies", "base.jsonl", *flags, cwd=questions)
    assert base.returncode == 0, base.stdout
    before = Path("base.jsonl").read_bytes()
    others = ("--compare_with", "lora", "--compare_with", "base.jsonl")
    result = run_script("inference.py", "--model_path", "full", *flags, *others, cwd=questions)
    assert result.returncode == 0 and "Traceback" not in result.stdout, result.stdout
    page = Path("replies.scores.html").read_text(encoding="utf-8")
    assert "网页：replies.scores.html" in result.stdout and page.count("full（前）与 base.jsonl（后）相比") == 1
    assert "full：4 个问题" in result.stdout and "full（前）与 base.jsonl（后）相比" in result.stdout
    assert Path("base.jsonl").read_bytes() == before and len(read("replies.jsonl")) == 4
    models = json.loads(Path("replies.scores.json").read_text(encoding="utf-8"))["models"]
    assert [model["replies"] for model in models] == ["replies.jsonl", "replies.lora.jsonl", "base.jsonl"]
    assert models[0]["by"]["weights"] != models[1]["by"]["weights"] != models[2]["by"]["weights"]
    scores = {line["key"]: line for line in models[0]["scores"]}
    assert (scores["whole"]["n"], scores["answer_rouge1"]["n"]) == (4, 2)
    # The adapter alone, by its own script, has said the same; and is not asked again for the full one's sake.
    alone = run_script("inference_lora.py", "--model_path", "lora", "--replies", "alone.jsonl", *flags, cwd=questions)
    assert alone.returncode == 0, alone.stdout
    assert [row["answer"] for row in read("alone.jsonl")] == [row["answer"] for row in read("replies.lora.jsonl")]
    earlier = ("--replies", "alone.jsonl", "--compare_with", "alone.jsonl", "--compare_with", "full")
    again = run_script("inference_lora.py", "--model_path", "lora", *flags, *earlier, cwd=questions)
    assert again.returncode == 0 and again.stdout.count("已回答") == 1, again.stdout  # by full
    assert " 不同" not in again.stdout.split("相比")[1]


def test_a_model_that_never_closes_its_thinking_and_one_token_get_a_table(questions):
    """Nothing of it is an answer, or is left out."""
    template = Path("full/chat_template.jinja")
    template.write_text(opening(template.read_text(encoding="utf-8")), encoding="utf-8")
    for tokens in (1, 9):
        flags = (
            "--questions",
            "q.jsonl",
            "--model_path",
            "full",
            "--max_new_tokens",
            tokens,
            "--replies",
            f"{tokens}.jsonl",
        )
        result = run_script("inference.py", *flags, cwd=questions)
        assert result.returncode == 0 and "完整的回复" in result.stdout, result.stdout
        assert {(row["tokens"], row["form"], row["answer"]) for row in read(f"{tokens}.jsonl")} == {
            (tokens, "unclosed", "")
        }
        [model] = json.loads(Path(f"{tokens}.scores.json").read_text(encoding="utf-8"))["models"]
        scores = {line["key"]: (line["n"], line["value"]) for line in model["scores"]}
        assert scores["whole"] == scores["stopped"] == (4, 0) and scores["answer_length"] == (0, None)
        assert {scores[f"answer_{kind}"] for kind in ("rouge1", "rouge2", "rougeL", "chrf", "bleu")} == {(2, 0)}
