"""Traces of how a thinking was made are found; what one thinks without having been given an answer is none."""

import pytest

from parts import traces

QUESTION = "高血压患者日常生活中应该注意些什么？"
ANSWER = "建议低盐饮食，规律运动，按时服药，定期监测血压。"


def kinds(text: str, question: str = QUESTION, instruction: str = "") -> list[str]:
    return [trace.kind for trace in traces.find(text, question, ANSWER, instruction)]


@pytest.mark.parametrize(
    "text",
    [
        "答案里已经提到低盐饮食，所以没问题。",
        "根据用户提供的答案，应该先说饮食。",
        "符合答案中的要点。",
        "参考答案中说，低盐饮食可以降低血压。",
        "用户已经给出了答案，我只需要补充。",
        "回答里已经提到了运动。",
        "确保与提供的答案一致。",
        "检查答案是否覆盖了这些点。",
    ],
)
def test_an_answer_that_was_given(text):
    assert kinds(text) == ["answer"]
    assert kinds(text, instruction="说明注意事项") == ["answer"]


@pytest.mark.parametrize(
    "text",
    ["看来答案是正确的。", "因为答案是低盐饮食，所以要说盐。", "答案的结构已经很清晰。"],
)
def test_what_may_be_ones_own_answer_counts_where_another_was_shown(text):
    assert kinds(text) == []
    assert kinds(text, instruction="说明注意事项") == ["answer"]
    assert kinds(text + "这与答案里提到的相同。") == ["answer"] * 2


@pytest.mark.parametrize(
    "text",
    [
        "所以答案需要涵盖这两个方面。",
        "先给出答案，然后分点解释。",
        "需要确保答案准确，条理清晰。",
        "需要确保答案正确，并且覆盖了这些点。",
        "保证答案涵盖了所有要点。",
        "确保答案中的每个部分都对应问题的要求。",
        "所以答案应该是核苷酸切除修复？",
        "综合来看，答案就是胃癌。",
        "答案里应该提到需要医生调整。",
        "我需要考虑如何组织答案的结构。",
        "这样用户不仅得到答案，还能了解注意事项。",
        "那么答案就很明确了。",
        "这个问题的答案其实不复杂。",
        "再选择答案B。",
        "现在可以回答用户的问题了。",
    ],
)
def test_a_reply_that_is_planned_is_no_trace(text):
    assert kinds(text) == kinds(text, instruction="说明注意事项") == []


@pytest.mark.parametrize(
    "text",
    [
        "A选项是最常见的并发症，排除。所以答案选E。再检查一遍，答案正确。",
        "不同国家的答案不一样，没有标准答案。",
        "受试者的回答提到了失眠，可以编码。参考内容可以看指南。",
        "先给结论，再给理由。",
        "诊断的思考过程要从常见病到少见病。",
        "患儿一周内出现了两次高热惊厥，这和癫痫不是同一回事。",
        "这个问题可以从两个方面来讲，一是药物，二是生活方式。",
        "用户可能是因为医生没有解释清楚才来问。",
    ],
)
def test_other_peoples_thinking_has_no_trace(text):
    assert kinds(text) == []


def test_an_exam_speaks_of_its_answers():
    question = "下列哪个答案是正确的？A. 肺炎 B. 哮喘"
    assert kinds("再看第二个答案，它提到了喘息。", question) == []
    assert kinds("根据提供的答案，是哮喘。", question) == ["answer"]


@pytest.mark.parametrize("text", ["总结思考过程：先定义。", "我需要解释思考过程。", "推理步骤需要清晰。"])
def test_a_process_that_is_written_down(text):
    assert kinds(text) == ["process"]
    assert kinds(text, "精神分裂症患者的思考过程有什么特点？推理步骤呢？") == []


def test_somebody_elses_process_is_medicine():
    assert kinds("患者的思考过程受影响，思维过程障碍明显。") == []


@pytest.mark.parametrize(
    "text", ["用户是医生，可能需要专业的解释。", "用户作为一名医生，更关心机制。", "另外，用户提到医生身份。"]
)
def test_an_asker_who_is_taken_for_a_doctor(text):
    assert kinds(text) == ["doctor"]
    assert kinds(text, "我是一名医生，想了解高血压的机制。") == []


@pytest.mark.parametrize(
    "text", ["用户可能是医学生。", "建议用户咨询医生。", "用户是在向医生咨询。", "作为医生应该谨慎。"]
)
def test_a_doctor_who_is_not_the_asker(text):
    assert kinds(text) == []


def test_two_questions_where_there_is_one():
    assert kinds("用户用了两个几乎相同的问题。") == ["two"]
    assert kinds("用户的问题有两个部分，一个是定义，另一个是要求。") == ["two"]
    assert kinds("用户的问题有两个部分，一个是病因，另一个是治疗。", "病因是什么？怎么治疗？") == []


def test_what_the_asker_did_not_mention():
    assert kinds("用户提到按时服药，说明已经在用药。") == ["covert"]
    assert kinds("用户提到了高血压患者的日常生活。") == []
    assert kinds("用户提到自己头晕。") == []
    assert kinds("用户提到的低盐饮食可能是指每天不超过五克，这里要解释清楚。") == ["covert"]
    assert kinds("用户提到的症状是头晕，可能与按时服药、监测血压有关。") == []
    instruction = "说明限制钠盐摄入的作用"
    assert kinds("用户提到限制钠盐摄入，需要解释。", instruction=instruction) == ["covert"]


def test_places_are_those_of_the_words_and_do_not_overlap():
    text = "首先，根据提供的答案整理思考过程，用户是医生。\n答案里提到低盐饮食。"
    found = traces.find(text, QUESTION, ANSWER)
    assert [text[trace.start : trace.end] for trace in found] == ["提供的答案", "思考过程", "用户是医生", "答案"]
    assert all(before.end <= after.start for before, after in zip(found, found[1:]))
    assert {trace.kind for trace in found} <= traces.KINDS.keys()
