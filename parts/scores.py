"""What can be counted of replies: whole or not, lengths, and how much they share with a reference. None of it says
whether a reply is medically right."""

import statistics

from parts.encoding import Reply
from parts.rows import Row


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of characters, white space left out: 0 to 1."""
    text, reference = "".join(text.split()), "".join(reference.split())
    row = [0] * (len(reference) + 1)  # row[i]: length of the subsequence common to the text so far and reference[:i]
    for character in text:
        before = row
        row = [0]
        for i, other in enumerate(reference):
            row.append(before[i] + 1 if character == other else max(before[i + 1], row[i]))
    return 2 * row[-1] / max(len(text) + len(reference), 1)


def count(rows: list[Row], replies: list[Reply], thinking: bool = True) -> list[tuple[str, str]]:
    """[(name, value as text)] for the `replies` to the questions of `rows`."""
    whole = sum(bool(reply.complete and reply.answer and (reply.thinking or not thinking)) for reply in replies)
    lines = [
        ("完整的回复" + "（有思考，有回答）" * thinking, f"{whole}/{len(replies)}（{whole / len(replies):.0%}）"),
        ("思考平均字数", f"{statistics.mean(len(reply.thinking) for reply in replies):.0f}"),
        ("回答平均字数", f"{statistics.mean(len(reply.answer) for reply in replies):.0f}"),
    ]
    pairs = [(reply.answer, row["answer"]) for row, reply in zip(rows, replies) if isinstance(row.get("answer"), str)]
    if pairs:
        mean = statistics.mean(rouge_l(*pair) for pair in pairs)
        lines.append(("与参考回答的 ROUGE-L（按字）", f"{mean:.3f}（{len(pairs)} 条；只比字面，不表示医学上正确）"))
    return lines
