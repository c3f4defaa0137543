"""What is counted of replies, that it is what rouge-score says, and how sure it is."""

import numpy
import pytest

from parts.model.encoding import Reply
from parts.replies import scores
from parts.replies.scores import Score

SEED = 42
ROWS = [
    {"question": "头痛怎么办？", "think": "用户问头痛，先想原因。", "answer": "头痛可以先休息，多喝水。"},
    {"question": "感冒了要吃抗生素吗？", "think": "感冒多由病毒引起。", "answer": "一般不需要吃抗生素。"},
    {"question": "失眠怎么调理？", "think": "", "answer": "规律作息，少喝咖啡。", "seen": True},
    {"question": "How much water should I drink?", "answer": "Drink about two litres of water a day."},
    {"question": "发烧呢？", "answer": None},
]
REPLIES = [
    Reply("用户问头痛，要想原因。根据用户提供的答案，休息即可。", "", True, "one", 10, 1.0),  # no answer
    Reply("感冒多由病毒引起。", "", False, "unclosed", 30, 1.0),
    Reply("想想再想", "规律作息，不喝咖啡。", True, "broken", 20, 2.0),  # two thinkings
    Reply("Think.", "Drink two litres of water every day.", True, "one", 20, 2.0),
    Reply("想", "多喝水。", True, "one", 20, 2.0),  # nothing to hold it against
]
# rouge-score 0.1.2 with rjieba's words says so of the third and the fourth row, and of a text that repeats words: F1 of
# ROUGE-1, -2, -L, then recall.
MEASURED = {
    ("规律作息，不喝咖啡。", "规律作息，少喝咖啡。"): [0.8333333333333334, 0.6, 0.8333333333333334] * 2,
    (REPLIES[3].answer, ROWS[3]["answer"]): [14 / 17, 8 / 15, 14 / 17, 7 / 9, 0.5, 7 / 9],
    ("多喝水，多休息，多喝水。", "多喝水。多喝水，休息。"): [10 / 13, 4 / 11, 8 / 13, 5 / 6, 0.4, 2 / 3],
    ("", "多喝水。"): [0] * 6,
}


def lines(rows=ROWS, replies=REPLIES, thinking: bool = True) -> dict[str, dict]:
    return {key: score.as_json() for key, score in scores.measure(rows, replies, thinking, SEED).scores.items()}


def share(values, of=None) -> Score:
    return Score("share", "份额", "%", values, of, seed=SEED)


def test_rouge_is_what_rouge_score_says():
    for (text, reference), expected in MEASURED.items():
        assert scores.rouge(text, reference) == pytest.approx(expected, abs=1e-12)


def test_five_rows_worked_out_by_hand():
    measured = lines()
    third, fourth = list(MEASURED.values())[:2]
    by_hand = {"whole": (5, 2 / 5), "stopped": (5, 4 / 5), "loops": (5, 0)}  # (n, value)
    by_hand |= {"traces": (5, 1 / 5), "traces_answer": (5, 1 / 5), "traces_process": (5, 0)}
    by_hand |= {"think_length": (5, (26 + 9 + 4 + 6 + 1) / 5), "speed": (5, 100 / 8)}
    by_hand["answer_length"] = (4, (0 + 10 + 36 + 4) / 4)  # the second one got to no answer
    for i, kind in enumerate(scores.OVERLAPS):
        by_hand[f"answer_{kind}"] = (4, (third[i] + fourth[i]) / 4)
        by_hand[f"answer_{kind}_new"] = (3, fourth[i] / 3)  # without the row that stands in the training part too
    for key, (n, value) in by_hand.items():
        assert (measured[key]["n"], measured[key]["value"]) == (n, pytest.approx(value)), key
    assert measured.keys() - by_hand.keys() == {"traces_doctor", "traces_two", "traces_covert"}
    others = scores.draw_references(ROWS[:4], SEED)
    floors = [scores.rouge(reply.answer, other)[0] for reply, other in zip(REPLIES, others)]
    assert (measured["answer_rouge1"]["floor"], measured["whole"]["floor"]) == (pytest.approx(sum(floors) / 4), None)
    without = lines(ROWS[:3], [Reply("", "多喝水。", True, "none"), REPLIES[4], Reply("", "", True, "none")], False)
    assert without["whole"]["value"] == pytest.approx(1 / 3)  # where no thinking was asked for
    assert not [key for key in without if key.startswith(("traces", "think"))]


def test_a_reply_that_ends_in_its_thinking_shares_nothing_whatever_it_says():
    """Not even with the words that it wrote before it began to think."""
    text = ROWS[0]["answer"]
    measured = lines(ROWS[:1], [Reply(text, text, False, "unclosed")])
    assert [measured[f"answer_{kind}"]["value"] for kind in scores.OVERLAPS] == [0] * 6
    assert (measured["answer_length"]["n"], measured["answer_length"]["value"]) == (0, None)


def test_loops_are_found_wherever_they_are():
    advice, english = "多喝水，注意休息，按时吃药。", "The patient should rest and drink water. " * 8
    listed = "".join(f"{number}. {advice}\n" for number in range(12))
    ended = "先说别的。" * 2 + english + "然后结束了，就这样。"
    for text in ("用户可能需要更多的信息。" * 20, "想到这里，" + "哈" * 80, listed, ended):
        assert scores.loops(text)
    for text in ("", advice * 2, "| 药 | 量 |\n|" + "-" * 200 + "|", "每日3次，每次1片。" * 4):
        assert not scores.loops(text)


def test_an_interval_is_about_as_wide_as_the_formula_says():
    width = 1.96 * (1 / 3 * 2 / 3 / 240) ** 0.5  # of a share, by the normal distribution
    for unit in ("%", "0–1"):  # a share, and a mean by the bootstrap
        line = Score("share", "份额", unit, [1] * 80 + [0] * 160, seed=SEED).as_json()
        assert (line["value"], line["n"]) == (pytest.approx(1 / 3), 240)
        assert [line["low"], line["high"]] == pytest.approx([1 / 3 - width, 1 / 3 + width], abs=0.008)
    assert share([0, 0], of=[0, 0]).compare(share([1, 1]))["differs"] is False


def test_none_of_twenty_may_still_be_one_in_six():
    """Where all rows are alike the bootstrap would know it for sure."""
    none, tenth = share([0] * 20), share([1] * 2 + [0] * 18)
    assert [none.as_json()[end] for end in ("low", "high")] == pytest.approx([0, 0.1611], abs=1e-4)
    assert [none.compare(none)[end] for end in ("low", "high")] == pytest.approx([-0.1611, 0.1611], abs=1e-4)
    assert tenth.compare(none)["low"] < 0 < tenth.compare(none)["high"]
    # Newcombe's example: of 50 pairs 36 are both, 12 and 2 the one alone.
    line = share([1] * 48 + [0] * 2).compare(share([1] * 36 + [0] * 12 + [1] * 2))
    assert [line[end] for end in ("difference", "low", "high")] == pytest.approx([0.2, 0.0569, 0.3404], abs=1e-4)


def test_the_shorter_or_the_longer_answer_is_no_better_for_its_length():
    """F1 prefers the first one's, recall the other's: both say the same, the second one among much else."""
    rows = [{"question": f"第 {i} 问？", "answer": f"多喝水，休息 {i} 天，少吃盐。"} for i in range(12)]
    short = [Reply("想", f"多喝水，休息 {i} 天。", True, "one", 9, 1.0) for i in range(12)]
    padding = "另外注意观察体温和饮食的变化，保持室内通风，避免劳累，按时作息，适当活动。"
    long = [reply._replace(answer=f"{reply.answer}少吃盐。{padding}") for reply in short]
    one, other = (scores.measure(rows, replies, True, SEED).scores for replies in (short, long))
    lines = {line["key"]: line for line in scores.compare_all(one, other)}
    assert lines["answer_rouge1"]["differs"] and lines["answer_rouge1"]["difference"] > 0.1
    assert lines["answer_rouge1_recall"]["differs"] and lines["answer_rouge1_recall"]["difference"] < -0.1
    overlapping = {line["judgement"] for key, line in lines.items() if key.startswith("answer_rouge")}
    assert overlapping == {"length"} and lines["answer_length"]["judgement"] == "different"
    half = scores.measure(rows, [reply._replace(answer=reply.answer[:5]) for reply in short], True, SEED).scores
    assert {line["judgement"] for line in scores.compare_all(one, one | {"loops": half["loops"]})} == {"unclear"}


def test_pairs_show_a_difference_that_two_intervals_would_hide():
    """Each row is a little better: the rows scatter far more than they differ."""
    generator = numpy.random.default_rng(2)
    values = generator.random(100)
    better, worse = (Score("mean", "平均", "0–1", some, seed=SEED) for some in (values + 0.02, values))
    better.counts[:, 0] += generator.normal(0, 0.01, 100)
    better = Score("mean", "平均", "0–1", better.counts[:, 0], seed=SEED)
    assert better.as_json()["low"] < worse.as_json()["high"]
    line = better.compare(worse)
    assert line["differs"] and 0 < line["low"] < line["difference"] < line["high"] < 0.03


def test_chance_is_called_a_difference_about_once_in_twenty():
    """Of 200 pairs of models that are the same; and never where a few rows alone are unlike."""
    generator = numpy.random.default_rng(3)
    pairs = [(share(generator.random(60) < 0.4), share(generator.random(60) < 0.4)) for _ in range(200)]
    assert sum(one.compare(other)["differs"] for one, other in pairs) <= 20
    same = [0] * 200
    assert not share([1] * 5 + same).compare(share([0] * 5 + same))["differs"]
    assert share([1] * 9 + same).compare(share([0] * 9 + same))["differs"]
