"""What is counted of replies."""

import pytest

from parts import scores
from parts.encoding import Reply


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
        Reply("想", "多喝水", True),
        Reply("想想", "多喝水", False),
        Reply("想想想", "", True),
        Reply("", "多喝水", True),
    ]
    rows = [{"question": "问", "answer": "多喝水"}, {"question": "问", "answer": None}, *[{"question": "问"}] * 2]
    values = [value for _, value in scores.count(rows, replies)]
    assert values[0].startswith("1/4") and values[1] == "2" and values[2] == "2" and values[3].startswith("1.000（1 条")
    assert scores.count(rows, replies, thinking=False)[0][1].startswith("2/4")
