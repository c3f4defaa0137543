"""Answers that say nearly the same are found, and no others."""

import random

from parts import near_duplicates

RANDOM = random.Random(0)
PHRASES = ["".join(RANDOM.choices([chr(0x4E00 + i) for i in range(2000)], k=12)) for _ in range(400)]


def answer(phrases: list[str], more: str = "") -> str:
    return "，".join(phrases) + more


def test_answers_that_share_a_third_of_their_passages_are_found_whatever_their_order():
    first, second, third = PHRASES[:12], PHRASES[20:32], PHRASES[40:52]
    answers = [answer(first), answer(second), answer(third[:7] + first[:5]), answer(second[::-1])]
    assert near_duplicates.pairs(answers) == [(0, 2), (1, 3)]
    assert near_duplicates.pairs([answer(first), answer(third[:10] + first[:2])]) == []


def test_an_answer_that_stands_there_many_times_is_found_each_time():
    others = [answer(PHRASES[i * 4 : i * 4 + 4]) for i in range(50)]
    copies = [answer(PHRASES[300:304])] * 30
    assert near_duplicates.pairs(others + copies) == [(50, place) for place in range(51, 80)]


def test_short_answers_and_what_all_say_do_not_count():
    assert near_duplicates.pairs(["多喝水，多休息。"] * 3) == []
    closing = "以上内容不能代替医生的诊断，如有不适请及时到正规医院就诊，并按照医生的建议用药和复查"
    answers = [answer(PHRASES[i * 4 : i * 4 + 4], closing) for i in range(60)]
    assert near_duplicates.pairs(answers) == []
    assert near_duplicates.pairs(answers[:5]) != []  # of so few, each passage counts
