"""How much texts share with their references: ROUGE of words, by rouge-score and rjieba; chrF and BLEU, by sacrebleu.
Only letters are compared, nobody knows here whether a text is right. Gives statistics that can be summed, see
intervals.py; imports the libraries when first used."""

from functools import lru_cache, partial

import numpy

from parts.intervals import ratio

ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}  # rouge-score's types -> for people
CORPUS = {"chrf": "chrF", "bleu": "BLEU"}  # of all texts at once, 0 to 100
SEED = 42


class Split:
    """rouge-score's tokenizer for texts that are split already."""

    def tokenize(self, tokens: tuple[str, ...]) -> tuple[str, ...]:
        return tokens


@lru_cache(maxsize=4096)
def words(text: str) -> tuple[str, ...]:
    """The words and signs of a text, without white space."""
    import rjieba

    return tuple(word for word in rjieba.cut(text) if not word.isspace())


@lru_cache(maxsize=2)
def rouge_scorer(*types: str):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(types, tokenizer=Split())


def rouge(text: str, reference: str) -> list[float]:
    """F1 of each of ROUGE, 0 to 1; 0 for an empty text."""
    text, reference = words(text), words(reference)
    scores = rouge_scorer("rouge1", "rouge2").score(reference, text)
    # The longest common subsequence takes rouge-score time for each pair of words: those that only one of the two has
    # cannot be in it and are left out, 5 s become 0.6. What is shared is the same, and F1 = 2 shared / all words.
    common = set(text) & set(reference)
    short = [[word for word in each if word in common] for each in (reference, text)]
    share = sum(map(len, short)) / max(len(text) + len(reference), 1)
    longest = rouge_scorer("rougeL").score(*short)["rougeL"].fmeasure * share
    return [scores["rouge1"].fmeasure, scores["rouge2"].fmeasure, longest]


@lru_cache(maxsize=1)
def corpus_metrics() -> dict:
    """Of CORPUS. BLEU takes each Chinese character for a word; `force` only keeps it from warning."""
    from sacrebleu.metrics import BLEU, CHRF

    return {"chrf": CHRF(), "bleu": BLEU(tokenize="zh", force=True)}


def corpus_total(key: str, sums: list[float]) -> float:
    """The score of a corpus of whose sentences these are the statistics, summed."""
    return corpus_metrics()[key]._compute_score_from_stats([int(each) for each in sums]).score


def totals(kinds) -> dict:
    """{kind of ROUGE or CORPUS: what sums of its statistics come to}."""
    return {kind: ratio if kind in ROUGE else partial(corpus_total, kind) for kind in kinds}


def signatures() -> dict[str, str]:
    """sacrebleu's, once there were scores."""
    return {CORPUS[key]: str(metric.get_signature()) for key, metric in corpus_metrics().items()}


def statistics(texts: list[str], references: list[str], corpus: bool) -> dict[str, numpy.ndarray]:
    """{kind: [texts, k]} of ROUGE, and of CORPUS where asked."""
    scores = numpy.array([rouge(*pair) for pair in zip(texts, references)])
    ones = numpy.ones(len(texts))
    found = {kind: numpy.stack([scores[:, place], ones], axis=1) for place, kind in enumerate(ROUGE)}
    if corpus:
        for kind, metric in corpus_metrics().items():
            found[kind] = numpy.array(metric._extract_corpus_statistics(texts, [references]), dtype=float)
    return found


def strangers(questions: list[str], references: list[str]) -> list[int] | None:
    """For each question the place of another one with another reference, seeded; None where one has none."""
    order = numpy.random.default_rng(SEED).permutation(len(questions)).tolist()
    found = {}
    for turn, place in enumerate(order):
        for other in order[turn + 1 :] + order[:turn]:
            if questions[other] != questions[place] and references[other] != references[place]:
                found[place] = other
                break
    return [found[place] for place in range(len(order))] if len(found) == len(order) else None
