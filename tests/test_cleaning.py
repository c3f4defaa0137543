"""A thinking without the traces of its making: sentences read on, nothing else changes, and it is done once."""

import difflib
import json
import random
import re

import pytest
from helpers import REAL, ROOT, make_row, refused, save, written

import data
from parts import cleaning, traces

QUESTION = "高血压患者日常生活中应该注意些什么？"
ANSWER = "建议低盐饮食，规律运动，按时服药，定期监测血压。"
MENDED = {
    # The answer is no longer spoken of; what was said of the matter stays.
    "但答案里提到的是低盐饮食，可能需要解释原因。": "但可以提到低盐饮食，可能需要解释原因。",
    "可能需要检查，但答案里用的是“低盐”，可能没问题。": "可能需要检查，但可以用“低盐”，可能没问题。",
    "还有运动，但答案已经提到的是饮食，所以可能已经包含了。": "还有运动，可能已经包含了。",
    "不过答案里提到的例子是低盐饮食，所以可能用户希望用这些例子。": "不过例子可以是低盐饮食。",
    "不过答案里提到了快走，所以应该包括进去。": "不过可以提到快走。",
    "不过，答案中提到“低盐”，这可能是指每天不超过5克。": "不过，“低盐”可能是指每天不超过5克。",
    "总结下来，应该按照答案的结构，但更详细地解释每一点。": "总结下来，应该更详细地解释每一点。",
    "要严格按照答案内容来组织思考过程，不遗漏要点。": "要组织回答，不遗漏要点。",
    "确保答案中的信息准确，并且好懂。": "确保信息准确，并且好懂。",
    "所以可能答案里提到的肌肉和脂肪是对的。": "所以可能肌肉和脂肪是对的。",
    "答案中提到低盐饮食可以降低血压。": "可以提到低盐饮食可以降低血压。",
    "不过根据提供的答案，重点在饮食和运动。": "不过重点在饮食和运动。",
    "根据答案，里面提到了低盐饮食，还有运动。": "可以提到低盐饮食，还有运动。",
    "所以答案里提到颅内出血可能危及生命是正确的。": "所以颅内出血可能危及生命。",
    "这些细节在答案中没有提到，但可能也是制度的一部分。": "这些细节可能也是制度的一部分。",
    "可能需要按照答案的步骤来组织：": "可能需要组织：",
    "如果答案中提到维生素，就要说明作用。": "如果提到维生素，就要说明作用。",
    "间隔是两周（答案提到的），这点容易忽略。": "间隔是两周，这点容易忽略。",
    "参考答案中说，低盐饮食可以降低血压。": "低盐饮食可以降低血压。",
    "确认答案中的三个阶段是否正确。": "确认三个阶段是否正确。",
    "最后，检查答案是否覆盖了用户的问题。": "最后，检查回答是否覆盖了用户的问题。",
    "接下来看答案，它提到了低盐饮食。": "可以提到低盐饮食。",
    "答案主要分为三部分：饮食、运动、药物。": "可以分为三部分：饮食、运动、药物。",
    "正如答案中写的那样，网织红细胞最先升高。": "网织红细胞最先升高。",
    "除了答案里说的浓茶和牛奶，咖啡也有影响。": "除了浓茶和牛奶，咖啡也有影响。",
    "答案之所以强调储存铁，是因为停药过早容易复发。": "之所以强调储存铁，是因为停药过早容易复发。",
    # That it is complete, or right, goes, and what rests on that.
    "需要说明治疗，但答案里已经提到了，所以没问题。": "需要说明治疗。",
    "根据提供的答案，没有提到这些，所以可能不需要加入。": "",
    "血压波动会损伤血管，这点在答案里提到了，但还要解释原因。": "血压波动会损伤血管，但还要解释原因。",
    "确保回答与提供的答案一致，但需要详细说明每个检查。": "需要详细说明每个检查。",
    "症状可能不明显，但根据现有知识，答案是正确的。": "症状可能不明显。",
    "是的，答案中的点都包括了这些，所以要说明顺序。": "要说明顺序。",
    # What was to be written down is the reply.
    "所以思考过程需要确认剂量是否正确。": "所以需要确认剂量是否正确。",
    "我需要仔细分析答案，然后整理出推理过程。": "",
    "总结思考过程：先定义，再举例。": "总结：先定义，再举例。",
    "总结下来，思考过程需要涵盖病因和治疗。": "总结下来，回答需要涵盖病因和治疗。",
    "可能需要分点，但答案已经给出，我需要解释思考过程。": "可能需要分点。",
    "推理时要集中在适用条件上。": "回答时要集中在适用条件上。",
    # Nobody is a doctor here, nor asked twice.
    "用户是医生，可能在学习，所以要解释得清晰。": "",
    "如果用户是医生，可能要更专业，但答案已经很详细，可能需要确认术语是否正确。": "可能需要确认术语是否正确。",
    "嗯，用户问的是高血压，还有一位医生在问同样的问题。": "嗯，用户问的是高血压。",
    "用户的问题有两个部分，一个是定义，另一个是要求。": "",
    # What the asker did not say is said by nobody.
    "然后，用户提到按时服药可以稳定血压。": "然后，按时服药可以稳定血压。",
    "不过用户提到的是按时服药。": "不过是按时服药。",
    "那用户提到的低盐饮食应该是最重要的一点吧？": "那低盐饮食应该是最重要的一点吧？",
    # The sentence after a gap does not hang in the air.
    "答案里的建议是合理的。因此，需要补充运动的频率。": "需要补充运动的频率。",
    "答案已经给出。这说明重点是盐。需要解释钠的作用。": "需要解释钠的作用。",
}


def clean(text: str) -> str:
    return cleaning.clean(QUESTION, text, ANSWER, "说明高血压患者的注意事项。")[0]


@pytest.mark.parametrize("text", MENDED)
def test_a_sentence_is_mended_so_that_it_reads_on(text):
    assert clean(text) == MENDED[text]


@pytest.mark.parametrize("text", MENDED)
def test_its_neighbours_stay(text):
    before, after = "嗯，先想想高血压的定义。\n\n1. 血压≥140/90 mmHg；", "最后提醒用户及时就医。"
    if text.startswith("答案里的建议") or "。这说明" in text:
        text = text.split("。")[0] + "。"
        assert clean(before + text + "需要解释。" + after) == before + "需要解释。" + after
    else:
        assert clean(before + text + after) == before + MENDED[text] + after


@pytest.mark.parametrize(
    "text",
    [
        "Okay, the answer is not given. 诊断的思考过程要从常见病到少见病，如果一天内出现两次发作，就要考虑癫痫。",
        "嗯，用户问的是高血压。\r\n\n  首先，低盐饮食；其次，运动……\n\n\n- **监测**：每周2次！所以答案需要涵盖这些。 ",
        "“答”与“案”分开写，“没有句号",
        "",
    ],
)
def test_without_a_trace_not_a_character_changes(text):
    assert cleaning.clean(QUESTION, text, ANSWER) == (text, {})


def test_the_next_sentence_still_has_what_it_speaks_of():
    two = "用户的问题有两个部分，一个是定义，另一个是治疗。"
    assert clean(two + "所以答案需要涵盖这两个方面。") == "定义和治疗都要说明。所以答案需要涵盖这两个方面。"
    assert clean("用户的问题有两个部分。这两个部分都要说明。") == "各个部分都要说明。"
    said = "这里可能是指片剂，但也可能用户有误解。"
    assert clean("用户提到按时服药可以稳定血压。" + said[:10] + "，可能用户有误解，需要说明。") == (
        "按时服药可以稳定血压。" + said[:10] + "，需要说明。"
    )
    assert clean("第一。" + said) == "第一。" + said


def test_a_paragraph_of_which_nothing_is_left_goes_with_its_line_break():
    assert clean("第一段。\n\n答案里已经提到了。\n\n第三段。\n\n用户是医生。") == "第一段。\n\n第三段。"


def test_lines_of_windows_and_commas_of_english():
    assert clean("第一。\r\n\r\n答案里已经提到了。\r\n\r\n第二。") == "第一。\r\n\r\n第二。"
    assert clean("Okay, 根据答案, the dose is 5 mg daily. Then stop.") == "Okay, the dose is 5 mg daily. Then stop."


def test_kinds_are_counted():
    text = "总结思考过程：答案里提到的盐。用户是医生。"
    assert cleaning.clean(QUESTION, text, ANSWER)[1] == {"process": 1, "answer": 1, "doctor": 1}


def test_training_text_is_cleaned_validation_is_there_both_ways(folder, capsys):
    leak = "先想想病因和机制，再想想治疗和预防。答案里已经提到了。"
    rows = [make_row(i, think=leak + f"第{i}点需要解释清楚。", instruction="说明病因") for i in range(1, 41)]
    rows[0]["think"] = "答案里已经提到了病因和机制，所以可能不需要再解释。完。"
    data.prepare(save(rows, "rows.jsonl"))
    train, val = written()
    clean_val = [json.loads(line) for line in (folder / "val.clean.jsonl").read_text().splitlines()]
    assert {row["think"] for row in train + clean_val} <= {
        row["think"].replace("答案里已经提到了。", "") for row in rows
    }
    assert [row | {"think": ""} for row in val] == [row | {"think": ""} for row in clean_val]
    assert all(row["think"] in {row["think"] for row in rows} for row in val)
    assert len(train) + len(val) == 39 and all(row.keys() == {"question", "think", "answer"} for row in train + val)
    out = capsys.readouterr().out
    assert "清理      36/36 行的思考改过" in out and "提到给定的答案 36 处" in out
    assert "未采用    清理后剩下的思考不到 60%：1 行（第 1 行）\n" in out and "已写入    val.clean.jsonl：4 行" in out
    assert json.loads((folder / "train.jsonl.source.json").read_text())["raw"] is False


def test_nothing_left_to_train_on_names_the_reason_and_the_way_out(folder):
    rows = [make_row(i, think="根据用户提供的答案，答案里已经提到了。要点都要符合答案。") for i in range(1, 21)]
    message = "20 行中可用的有 2 行，划分后训练集为空；请按下面的原因改正，或加 --raw 照原文写。"
    refused(f"{message}\n  清理后剩下的思考不到 60%：18 行（~）", data.prepare, save(rows, "rows.jsonl"))


def test_without_thinking_nothing_is_lost():
    assert cleaning.clean_rows([(1, make_row(1, think=""))])[1] == "0/1 行的思考改过，保留 100.0% 的字"


def test_a_validation_row_that_is_all_trace_stays_as_it_was(folder):
    rows = [make_row(i, think="答案里已经提到了，所以没问题。") for i in range(1, 21)]
    data.prepare(save(rows, "rows.jsonl"), raw=True)
    clean_val = [json.loads(line) for line in (folder / "val.clean.jsonl").read_text().splitlines()]
    assert clean_val == written()[1] and {row["think"] for row in clean_val} == {rows[0]["think"]}


def test_raw_is_the_text_as_it_was(folder, capsys):
    rows = [make_row(i, think=f"答案里已经提到了。第{i}点。") for i in range(1, 21)]
    data.prepare(save(rows, "rows.jsonl"), raw=True)
    train, val = written()
    assert sorted(row["think"] for row in train + val) == sorted(row["think"] for row in rows)
    assert "清理      没有（--raw）；会是：18/18 行的思考改过" in capsys.readouterr().out
    assert json.loads((folder / "train.jsonl.source.json").read_text())["raw"] is True


def test_a_validation_row_whose_answer_stands_in_the_training_part_is_marked(folder, capsys):
    RANDOM = random.Random(0)
    texts = ["".join(chr(RANDOM.randrange(0x4E00, 0x9000)) for _ in range(60)) for _ in range(20)]
    rows = [make_row(i, answer=texts[i]) for i in range(20)]
    data.prepare(save(rows, "rows.jsonl"))
    (other, _), (marked, unmarked) = written()[0][:2], written()[1]
    rows[int(marked["question"][2:-1])]["answer"] = other["answer"][:40] + "另外多休息。"
    data.prepare(save(rows, "rows.jsonl"))
    found = {row["question"]: row.get("seen", False) for row in written()[1]}
    assert found == {marked["question"]: True, unmarked["question"]: False}
    assert "训练集内 0 对；验证集 1/2 行与训练集近似" in capsys.readouterr().out
    assert data.read_examples("val.jsonl")[0].keys() == {"question", "think", "answer"}


def test_the_demos_rows_have_no_trace():
    """They were written for this project, by nobody who had been shown anything."""
    for line in (ROOT / "tests" / "demo" / "medical.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert cleaning.clean(**row) == (row["think"], {})


REAL_ROWS = REAL / "medical_r1_120.jsonl"
PLANNED = re.compile(
    r"(?:所以|总之，|下来，|确保|如何组织|先给出|得到|整理|总结|直接的|但|不过)答案(?:里|中)?(?:也|可能)?(?:应该|需要|应|要|不需要|，)"
)


@pytest.mark.skipif(not REAL_ROWS.is_file(), reason="the published rows are not part of the project")
def test_the_published_rows():
    """The bars: hardly a trace is left, hardly anything else is lost, next to nothing is new."""
    rows = [json.loads(line) for line in REAL_ROWS.read_text(encoding="utf-8").splitlines()]
    left, before, after, new = {kind: 0 for kind in traces.KINDS}, 0, 0, 0
    planned = kept = 0
    for row in rows:
        text = (row["question"], row["think"], row["answer"], row["instruction"])
        cleaned, _ = cleaning.clean(*text)
        assert cleaning.clean(text[0], cleaned, *text[2:]) == (cleaned, {})  # once is enough
        assert len(cleaned) >= cleaning.KEPT * len(row["think"])
        before, after = before + len(row["think"]), after + len(cleaned)
        for kind in {trace.kind for trace in traces.find(cleaned, text[0], *text[2:])}:
            left[kind] += 1
        changes = difflib.SequenceMatcher(None, row["think"], cleaned, autojunk=False).get_opcodes()
        new += sum(end - start for change, _, _, start, end in changes if change in ("insert", "replace"))
        for sentence in re.findall(r"[^。！？；\n]+", row["think"]):
            if PLANNED.search(sentence) and not traces.find(sentence, text[0], *text[2:]):
                planned, kept = planned + 1, kept + (sentence.lstrip("所以") in cleaned)
    assert left["answer"] <= 0.01 * len(rows) and left["covert"] <= 0.04 * len(rows), left
    assert left["process"] + left["doctor"] + left["two"] <= 0.01 * len(rows), left
    assert after >= 0.93 * before and new <= 0.005 * before
    assert planned >= 10 and kept >= 0.95 * planned
