"""Traces of how a thinking was made are found and left out; what one thinks without having been given an answer is
none, and of it no character changes."""

import itertools
import json
import random
import re
import time
from collections import Counter

import pytest
from helpers import REAL, ROOT, make_row, refused, save, written

import data
from parts.rows import traces

QUESTION = "高血压患者日常生活中应该注意些什么？"
ANSWER = "建议低盐饮食，规律运动，按时服药，定期监测血压。"
INSTRUCTION = "说明高血压患者的注意事项"
FOUND = {  # in this order; what may be one's own answer counts where another was shown
    "答案里已经提到低盐饮食，所以没问题。": ["answer"],
    "回答里已经提到了运动。": ["answer"],
    "检查答案是否覆盖了这些点。": ["answer"],
    "看来答案是正确的。这与答案里提到的相同。": ["answer", "answer"],
    "我需要解释思考过程。": ["process"],
    "用户是医生，可能需要专业的解释。": ["doctor"],
    "用户用了两个几乎相同的问题。": ["two"],
    "用户的问题有两个部分，一个是定义，另一个是要求。": ["two"],
    "用户提到的低盐饮食可能是指每天不超过五克，这里要解释清楚。": ["covert"],
    "首先，根据提供的答案整理思考过程，用户是医生。\n答案里提到低盐饮食。": ["answer", "process", "doctor", "answer"],
}
PLANNED = [  # of the reply, by somebody who may have been shown another
    "先给出答案，然后分点解释。",
    "需要确保答案正确，并且覆盖了这些点。",
    "所以答案应该是核苷酸切除修复？",
    "答案里应该提到需要医生调整。",
    "再选择答案B。",
]
NONE = [
    "看来答案是正确的。",
    "患者的思考过程受影响，思维过程障碍明显。",
    "用户可能是医学生，建议用户咨询医生。",
    "患儿一周内出现了两次高热惊厥，这和癫痫不是同一回事。",
    "用户提到了高血压患者的日常生活，也提到自己头晕。",
    "用户提到的症状是头晕，可能与按时服药、监测血压有关。",
]
REMOVED = {
    "需要说明治疗，但答案里已经提到了，所以没问题。": "需要说明治疗。",
    "答案里提到低盐饮食可以降低血压。这说明重点是盐。因此，要解释钠的作用。": "要解释钠的作用。",
    "如果血压很高，答案里建议及时就医。需要提醒随访。": "需要提醒随访。",
    "总结思考过程：先定义，再举例。": "先定义，再举例。",
    "首先，应该分点回答，可能和答案中的分类类似，但需要详细展开。": "首先，应该分点回答，但需要详细展开。",
    "用户是医生，可能在学习，所以要解释得清晰。要准确。": "要准确。",
    "血压怎么分级？是不是按指南，而答案用的是旧标准？": "血压怎么分级？",
    "第一段。\n\n答案里已经提到了。\n\n第三段。\n\n用户是医生。": "第一段。\n\n第三段。",
}


def kinds(text: str, question: str = QUESTION, instruction: str = "") -> list[str]:
    return [trace.kind for trace in traces.find(text, question, ANSWER, instruction)]


def remove(text: str) -> str:
    return traces.remove_traces(QUESTION, text, ANSWER, INSTRUCTION)[0]


def is_part_of(text: str, other: str) -> bool:
    """Whether `text` is `other` without some characters."""
    characters = iter(other)
    return all(character in characters for character in text)


def test_a_trace_is_found_with_its_kind_and_apart_from_others():
    for text, expected in FOUND.items():
        assert kinds(text) == expected, text
        found = traces.find(text, QUESTION, ANSWER)
        assert all(before.end <= after.start for before, after in itertools.pairwise(found)), text


def test_a_reply_that_is_planned_is_no_trace():
    for text in PLANNED:
        assert kinds(text) == kinds(text, instruction=INSTRUCTION) == [], text


def test_other_peoples_thinking_has_no_trace():
    assert not [text for text in NONE if kinds(text)]


def test_what_is_a_trace_depends_on_the_question():
    assert kinds("看来答案是正确的。", instruction=INSTRUCTION) == ["answer"]
    assert kinds("再看第二个答案，它提到了喘息。", "下列哪个答案是正确的？A. 肺炎 B. 哮喘") == []
    assert kinds("我需要解释思考过程。", "推理步骤是什么？") == []
    assert kinds("用户是医生，关心机制。", "我是一名医生，想了解高血压的机制。") == []
    assert kinds("用户的问题有两个部分，一个是病因，另一个是治疗。", "病因是什么？怎么治疗？") == []
    assert kinds("用户提到限制钠盐摄入。", instruction="说明限制钠盐摄入的作用") == ["covert"]


def test_a_clause_with_a_trace_goes_and_what_cannot_stand_without_it():
    assert {text: remove(text) for text in REMOVED} == REMOVED


def test_without_a_trace_not_a_character_changes():
    odd = "嗯，用户问的是高血压。\r\n\n  首先，低盐；其次，“运动……\n\n\n- **监测**：每周2次！所以答案需要涵盖这些。 "
    for text in (odd, "Okay, the answer is not given. 是的", "“答”与“案”分开写，没有句号", ""):
        assert traces.remove_traces(QUESTION, text, ANSWER) == (text, {})
    for line in (ROOT / "tests" / "demo" / "medical.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)  # written for this project, by nobody who had been shown anything
        assert traces.remove_traces(**row) == (row["think"], {})


def test_characters_are_only_left_out_and_once_is_enough():
    pieces, drawn = [*FOUND, *PLANNED, *NONE, *REMOVED, "\n", "比如甲，", "“", "（"], random.Random(0)
    for _ in range(300):
        text = "".join(drawn.choices(pieces, k=6))
        left = remove(text)
        assert is_part_of(left, text) and remove(left) == left and not kinds(left), text


def test_what_all_of_a_pattern_begins_with_hides_none_of_it():
    pieces, drawn = (
        [*FOUND, *NONE, "内心独白", "在思考中，", "展开思考", "推理时需要", "的推理过程", "临床思维"],
        random.Random(0),
    )
    plain = re.sub(r"^\(\?=.*?\)", "", traces.PROCESS.pattern)
    for text in ["".join(drawn.choices(pieces, k=9)) for _ in range(300)]:
        assert re.findall(plain, text) == traces.PROCESS.findall(text)


def test_a_megabyte_takes_seconds():
    """No pattern's time grows with the square of a text's length."""
    started = time.perf_counter()
    for unit in ("答案里提到，", "如果甲，比如乙，", "答案里已经提到了。要解释钠。\n"):
        remove(unit * (300_000 // len(unit)) + "答案里提到了。")
    assert time.perf_counter() - started < 10


def test_both_files_are_cleaned_unless_raw(folder, capsys):
    rest = "先想想病因和机制，再想想治疗和预防。"
    rows = [make_row(i, think=rest + "答案里已经提到了。", instruction="说明病因") for i in range(1, 41)]
    rows[0]["think"] = "答案里已经提到了病因和机制，所以可能不需要再解释。完。"
    data.prepare(save(rows, "rows.jsonl"))
    assert list(map(len, written())) == [35, 4] and {row["think"] for row in sum(written(), [])} == {rest}
    out = capsys.readouterr().out
    assert "清理      40/40 行的思考改过" in out and "提到给定的答案 40 处" in out
    assert "未采用    清理答案泄露后，剩下的思考不到 60%：1 行（第 1 行）\n" in out
    data.prepare("rows.jsonl", raw=True)
    assert {row["think"] for row in sum(written(), [])} == {row["think"] for row in rows}
    assert "清理      跳过（--raw）" in capsys.readouterr().out and data.read_origin("train.jsonl")["raw"] is True
    save([row | {"think": "根据用户提供的答案，答案里已经提到了。"} for row in rows], "rows.jsonl")
    message = "划分后训练集为空，可用的只有 0 行；~--raw ~\n  清理答案泄露后，剩下的思考不到 60%：40 行（~）"
    refused(message, data.prepare, "rows.jsonl")


@pytest.mark.skipif(not REAL.is_dir(), reason="the published rows are not part of the project")
def test_of_the_published_rows_nine_tenths_are_kept():
    counts, problems, before = Counter(), {}, {}
    for number, line in enumerate((REAL / "medical_r1_120.jsonl").read_text(encoding="utf-8").splitlines()):
        before["", number] = json.loads(line)
    for location, row in traces.clean_rows(list(before.items()), problems, counts):
        assert is_part_of(row["think"], before[location]["think"])
        assert not traces.find(row["think"], row["question"], row["answer"], row["instruction"])
    assert counts["after"] >= 0.9 * counts["before"] and len(problems.get(traces.TOO_LITTLE, [])) <= 2


def test_what_was_said_in_an_earlier_turn_is_no_trace():
    row = {"question": "能吃阿莫西林吗？", "answer": "您有青霉素过敏反应，不能吃，请让医生换药。"}
    row["think"] = "这是用药的问题，先看有没有禁忌。用户提到青霉素过敏反应，所以不能用阿莫西林，要请医生换药。"
    earlier = row | {"history": [["我有青霉素过敏反应。", "好的，我记下了。"]]}
    counts = Counter()
    traces.clean_rows([(("", 1), row)], {}, counts)
    assert counts["covert"] == 1
    assert traces.clean_rows([(("", 1), earlier)], {}, Counter()) == [(("", 1), earlier)]
