"""What is counted of replies, and that it is what the libraries say when they are called directly."""

import json
import subprocess
import sys
import time

import numpy
import pytest
import rjieba
import sacrebleu
from helpers import REAL, ROOT, SAMPLES
from rouge_score.rouge_scorer import RougeScorer

from parts import intervals, overlaps, scores, traces
from parts.encoding import Reply

ROWS = [
    {"question": "头痛怎么办？", "think": "用户问头痛，先想原因。", "answer": "头痛可以先休息，多喝水。"},
    {"question": "感冒了要吃抗生素吗？", "think": "感冒多由病毒引起。", "answer": "一般不需要吃抗生素。"},
    {"question": "失眠怎么调理？", "think": "", "answer": "规律作息，少喝咖啡。", "seen": True},
    {"question": "How much water should I drink?", "answer": "Drink about two litres of water a day."},
    {"question": "发烧呢？", "answer": None},
]
KINDS = overlaps.ROUGE | overlaps.CORPUS
REPLIES = [
    Reply("用户问头痛，要想原因。根据用户提供的答案，休息即可。", "", True, "one", 10, 1.0),  # no answer
    Reply("感冒多由病毒引起。", "", False, "unclosed", 30, 1.0),
    Reply("想想再想", "规律作息，不喝咖啡。", True, "broken", 20, 2.0),  # two thinkings
    Reply("Think.", "Drink two litres of water every day.", True, "one", 20, 2.0),
    Reply("想", "多喝水。", True, "one", 20, 2.0),  # nothing to hold it against
]


def lines(rows=ROWS, replies=REPLIES, thinking: bool = True) -> dict[str, intervals.Line]:
    return {each.key: intervals.line(each) for each in scores.measure(rows, replies, thinking)}


class Jieba:
    def tokenize(self, text: str) -> list[str]:
        return [word for word in rjieba.cut(text) if word.strip()]


def directly(texts: list[str], references: list[str]) -> dict[str, float]:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Jieba())
    found = [scorer.score(reference, text) for text, reference in zip(texts, references)]
    means = {kind: sum(each[kind].fmeasure for each in found) / len(found) for kind in found[0]}
    corpus = {"bleu": sacrebleu.corpus_bleu(texts, [references], tokenize="zh").score}
    return means | corpus | {"chrf": sacrebleu.corpus_chrf(texts, [references]).score}


def test_five_rows_worked_out_by_hand():
    found = lines()
    by_hand = {  # (n, value)
        "whole": (5, 2 / 5),
        "stopped": (5, 4 / 5),
        "loops": (5, 0),
        "traces": (5, 1 / 5),
        "traces_answer": (5, 1 / 5),
        "traces_process": (5, 0),
        "think_length": (5, (26 + 9 + 4 + 6 + 1) / 5),
        "answer_length": (4, (0 + 10 + 36 + 4) / 4),  # the second one got to no answer
        "speed": (5, 100 / 8),
    }
    for key, (n, value) in by_hand.items():
        assert (found[key].n, found[key].value) == (n, pytest.approx(value)), key
    references = [row["answer"] for row in ROWS[:4]]
    answers = ["", "", "规律作息，不喝咖啡。", "Drink two litres of water every day."]
    for key, value in directly(answers, references).items():
        assert (found[f"answer_{key}"].n, found[f"answer_{key}"].value) == (4, pytest.approx(value)), key
    new = [0, 1, 3]  # without the row that stands in the training part too
    expected = directly([answers[place] for place in new], [references[place] for place in new])
    for key, value in expected.items():
        assert (found[f"answer_{key}_new"].n, found[f"answer_{key}_new"].value) == (3, pytest.approx(value)), key
    thinkings = directly([REPLIES[0].thinking, ""], [row["think"] for row in ROWS[:2]])
    for key in overlaps.ROUGE:
        assert (found[f"think_{key}"].n, found[f"think_{key}"].value) == (2, pytest.approx(thinkings[key])), key
    # 规律作息，不喝咖啡。 and 规律作息，少喝咖啡。, however they are cut: what both have, twice, of all words
    one, other = Jieba().tokenize(answers[2]), Jieba().tokenize(references[2])
    assert overlaps.rouge(answers[2], references[2])[0] == 2 * len(set(one) & set(other)) / len(one + other)


def test_the_floor_is_each_answer_against_another_questions():
    references = [row["answer"] for row in ROWS[:4]]
    others = overlaps.strangers([row["question"] for row in ROWS[:4]], references)
    assert all(place != other for place, other in enumerate(others))
    expected = directly(["", "", REPLIES[2].answer, REPLIES[3].answer], [references[place] for place in others])
    for key, value in expected.items():
        assert lines()[f"answer_{key}"].floor == pytest.approx(value)
    assert overlaps.strangers(["问", "问", "另问"], ["甲", "乙", "丙"]) in ([2, 2, 0], [2, 2, 1])
    assert overlaps.strangers(["问", "另问"], ["甲", "甲"]) is None  # the same answer would be no stranger
    assert lines(ROWS[:1], REPLIES[:1])["answer_rouge1"].floor is None
    assert lines()["whole"].floor is None


def test_signatures_are_sacrebleus():
    lines()
    found = overlaps.signatures()
    assert "tok:zh" in found["BLEU"] and "nrefs:1" in found["BLEU"] and "nc:6" in found["chrF"]


@pytest.mark.parametrize("reference", [None, "", " \n", "\u200b", 3, ["多喝水"]])
def test_rows_without_a_reference_are_left_out_of_the_overlaps_alone(reference):
    rows = [{"question": "头痛？", "answer": "多喝水。"}, {"question": "感冒？", "answer": reference}]
    found = lines(rows, [REPLIES[4]] * 2)
    assert found["answer_rouge1"].n == 1 and found["answer_rouge1"].value == 1 and found["whole"].n == 2
    assert not [key for key in lines(rows[1:], [REPLIES[4]]) if "rouge" in key or "bleu" in key]


def test_half_a_character_in_a_reference_is_no_error():
    assert lines([{"question": "问", "answer": "水\ud83d"}], [REPLIES[4]])["answer_rouge1"].n == 1


def test_a_reply_that_ends_in_its_thinking_shares_nothing_whatever_it_says():
    """Not even with the words that it wrote before it began to think."""
    text = "头痛可以先休息，多喝水。"
    for reply in (Reply(text, text, False, "unclosed"), Reply(text, "", False, "unclosed")):
        found = lines([ROWS[0] | {"think": text}], [reply])
        assert [
            each.value for key, each in found.items() if "rouge" in key or key in ("answer_bleu", "answer_chrf")
        ] == [0] * 8
        assert (found["answer_length"].n, found["answer_length"].value) == (0, None)


def test_without_thinking_none_is_expected():
    replies = [Reply("", "多喝水。", True, "none"), Reply("想", "多喝水。", True, "one"), Reply("", "", True, "none")]
    found = lines(ROWS[:3], replies, thinking=False)
    assert found["whole"].value == pytest.approx(1 / 3)
    assert not [key for key in found if key.startswith(("traces", "think"))]
    assert lines(ROWS[:3], replies)["whole"].value == pytest.approx(1 / 3)  # the second


def test_what_was_said_in_earlier_turns_is_what_the_asker_said(monkeypatch):
    asked = []
    monkeypatch.setattr(traces, "find", lambda think, question, answer="", instruction="": asked.append(question) or [])
    scores.find_traces({"question": "多久？", "history": [["头痛？", "休息。"]]}, REPLIES[4])
    assert asked == ["头痛？\n多久？"]


@pytest.mark.parametrize(
    "text",
    [
        "用户可能需要更多的信息。" * 20,
        "想到这里，" + "哈" * 80,
        "".join(f"{number}. 多喝水，注意休息，按时吃药。\n" for number in range(12)),
        "先说别的。" * 2 + "The patient should rest and drink water. " * 8 + "然后结束了，就这样。",
    ],
)
def test_loops_are_found_wherever_they_are(text):
    assert scores.loops(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "多喝水，注意休息，按时吃药。" * 2,
        "| 药 | 量 |\n|" + "-" * 200 + "|",
        "每日3次，每次1片。" * 4,
        "用户问头痛。" * 3,
    ],
)
def test_what_is_said_twice_or_is_short_is_no_loop(text):
    assert not scores.loops(text)


def test_published_texts_do_not_loop():
    files = [SAMPLES, *([REAL / "medical_r1_120.jsonl"] if REAL.is_dir() else [])]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert not [row for row in rows if scores.loops(row["think"]) or scores.loops(row["answer"])]


def test_two_hundred_and_forty_one_replies_take_seconds():
    """Thinkings of 500 characters and answers of 400, other ones in each row, so that nothing is remembered."""
    generator = numpy.random.default_rng(0)
    sentences = [json.loads(line)["answer"] for line in SAMPLES.read_text(encoding="utf-8").splitlines()]

    def text(length: int) -> str:
        return "".join(generator.choice(sentences, 12))[:length]

    rows = [{"question": f"第 {i} 问", "think": text(500), "answer": text(400), "seen": i % 2 == 0} for i in range(241)]
    replies = [Reply(text(500), text(400), True, "one", 500, 0.1) for _ in rows]
    began = time.process_time()
    found = lines(rows, replies)
    assert time.process_time() - began < 10
    assert found["answer_rougeL"].n == 241 and found["answer_rougeL_new"].n == 120


def test_scores_need_no_download_and_no_torch():
    """rouge-score brings nltk, which has data to fetch for other ends; an address it cannot have would be an error."""
    code = "import sys, socket; socket.socket.connect = None; from parts import overlaps; "
    code += "print(overlaps.statistics(['多喝水'], ['喝水'], True)['rougeL'][0, 0], 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == [str(overlaps.rouge("多喝水", "喝水")[2]), "False"], result.stderr
