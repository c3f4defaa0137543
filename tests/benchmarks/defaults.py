"""What a CPU can say of the recipe's defaults: cleaned or raw thinking, one epoch or two, LoRA's learning rate.

    OMP_NUM_THREADS=1 python tests/benchmarks/defaults.py --data ROWS --json defaults.json    # three seeds
    OMP_NUM_THREADS=1 python tests/benchmarks/defaults.py --small    # the demo's rows, few steps: does it work

ROWS is what `data.py --dataset` takes: a file of yours, or a hub's name (krisfu/delicate_medical_r1_data: the published
rows). They are not part of this project. Real trainings, by train.py's and train_lora.py's own functions, of a Qwen3 of
about a million random parameters (tests/demo/tiny_model.py), one example a step.

Each seed, which draws weights, order and replies, learns ROWS twice from nothing, as `data.py --raw` writes them and as
`data.py` does. Both models answer the validation questions; parts/rows/traces.py counts in their thinking. Then the
model of the cleaned rows is fine-tuned on 20 topics of the demo, rows of another style, and the outcome is the
loss on its 20 other questions, as train.py has it: of the best weights, two evaluations an epoch.

Intervals are 95 %, bootstrap; seeds and validation rows are drawn apart, so that either can have made a difference.
Such a model cannot say how good replies are, nor where an absolute learning rate is best: small models learn best at
far higher ones. It can say how LoRA's best rate stands to full training's.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "demo")]

DEMO = ROOT / "tests" / "demo" / "medical.jsonl"
HIDDEN, LAYERS = 128, 2
LEARNING = {"learning_rate": 1e-2, "warmup_steps": 30, "adam_beta2": 0.95, "num_train_epochs": 12}  # from nothing
COMMON = {"per_device_train_batch_size": 1, "early_stopping_patience": 0, "sample_tokens": 1, "logging_steps": 100}
COMMON |= {"fast_kernels": False}  # packed attention costs a CPU a fifth more
RATES = [1e-4, 2e-4, 5e-4, 2e-3, 5e-3, 2e-2]  # the published one first
ARMS = [("full", 1), ("full", 2), ("LoRA", 2)]  # and epochs
DEMO_TRAINED = 80  # of the demo's 120 rows: 20 of its 30 topics, each in four wordings
REPLY_TOKENS, REPLIES = 800, 4  # to each validation question
DRAWS = 2000
SMALL = {"max_steps": 2}


def interval(values) -> list[float]:
    """[mean, low, high] of values [seeds, rows]."""
    import numpy as np

    rng, (seeds, rows) = np.random.default_rng(0), values.shape
    drawn = [values[rng.integers(seeds, size=seeds)][:, rng.integers(rows, size=rows)].mean() for _ in range(DRAWS)]
    return [float(values.mean()), *map(float, np.percentile(drawn, [2.5, 97.5]))]


def fit(model: str, train_file: str, val_file: str, lora: bool = False, **changes):
    """The Trainer after a training into a new folder; what is printed meanwhile goes to log.txt."""
    import train
    import train_lora

    values = {"report_to": "none", "disable_tqdm": True} | COMMON | changes
    make = train_lora.arguments if lora else train.arguments
    with open("log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        args = make(
            model_name=model, train_file=train_file, val_file=val_file, output_dir=tempfile.mkdtemp(dir="."), **values
        )
        return train.train(args, train_lora.add_adapter if lora else None)


def row_losses(trainer) -> list[float]:
    """The mean token loss of each validation row."""
    import torch

    tensors = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in trainer.eval_dataset]
    with torch.inference_mode():
        return [trainer.model(**row).loss.item() for row in tensors]


def leaks(trainer, questions: list[str], tokens: int, seed: int) -> tuple[dict[str, list[float]], list[str]]:
    """({kind of trace: [questions], the share of its replies with one}, the traces with what stands around them);
    `explicit`: any but a covert one."""
    import transformers

    import data
    from parts.model import generate
    from parts.rows import traces

    transformers.set_seed(seed)
    shares, seen = {kind: [0.0] * len(questions) for kind in [*traces.KINDS, "explicit"]}, []
    conversations = [data.to_messages(question) for question in questions] * REPLIES
    answered = generate.generate(trainer.model, trainer.processing_class, conversations, tokens)
    for place, (question, reply) in enumerate(zip(questions * REPLIES, answered)):
        found = traces.find(reply.thinking, question, reply.answer)
        seen += [f"{each.kind}: {reply.thinking[max(each.start - 12, 0) : each.end + 12]}" for each in found]
        kinds = {each.kind for each in found}
        for kind in kinds | ({"explicit"} if kinds - {"covert"} else set()):
            shares[kind][place % len(questions)] += 1 / REPLIES
    return shares, seen


def prepare(dataset: str) -> list[str]:
    """Write raw.jsonl, clean.jsonl, val.jsonl and the demo's two files; returns the validation questions."""
    import data

    with open("log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        data.prepare(dataset, "raw.jsonl", "val.jsonl", raw=True)
        data.prepare(dataset, "clean.jsonl", "val.jsonl")
    demo = sorted(DEMO.read_text(encoding="utf-8").splitlines(), key=lambda line: json.loads(line)["answer"])
    for file, part in (("demo.jsonl", demo[:DEMO_TRAINED]), ("demo_val.jsonl", demo[DEMO_TRAINED:])):
        Path(file).write_text("\n".join(part) + "\n", encoding="utf-8")
    return [row["question"] for row in data.read_examples("val.jsonl")]


def run_seed(seed: int, questions: list[str], rates: list[float], small: bool) -> dict[str, dict]:
    """{"leaks": {text: {kind: [questions]}}, "traces": {text: [...]}, "losses": {arm: [rows]}} of one seed."""
    import helpers
    import tiny_model

    import data

    texts = [row[field] for row in data.read_examples("raw.jsonl") for field in ("question", "think", "answer")]
    tiny_model.build(start := f"start{seed}", texts, seed, HIDDEN, LAYERS)
    helpers.load_attentive(start).save_pretrained(start)  # learns twice as fast as from the usual small weights
    result = {"leaks": {}, "traces": {}, "losses": {}}
    for text in ("raw", "clean"):
        settings = LEARNING | {"seed": seed, "eval_steps": 10**6} | (SMALL if small else {})
        trainer = fit(start, f"{text}.jsonl", "val.jsonl", **settings)
        tokens = 8 if small else REPLY_TOKENS
        result["leaks"][text], result["traces"][text] = leaks(trainer, questions, tokens, seed)
    base = trainer.args.output_dir
    for rate in rates:
        for kind, epochs in ARMS:
            settings = {"learning_rate": rate, "num_train_epochs": epochs, "eval_steps": DEMO_TRAINED // 2}
            settings |= {"seed": seed} | (SMALL if small else {})
            trainer = fit(base, "demo.jsonl", "demo_val.jsonl", kind == "LoRA", **settings)
            result["losses"][f"{kind}, {epochs} epochs, {rate:g}"] = row_losses(trainer)
    return result


def report(results: list[dict], rates: list[float], trained_on: dict[str, dict[str, float]]) -> list[dict]:
    """The tables, printed, and as rows of numbers."""
    import numpy as np

    rows = []

    def cell(name: str, values, form: str) -> str:
        numbers = interval(values)
        rows.append({"row": name} | dict(zip(("mean", "low", "high"), numbers)))
        mean, low, high = (f"{number:{form}}" for number in numbers)
        return f"{mean} ({low} to {high})"

    def leak(text: str, kind: str):
        return np.array([result["leaks"][text][kind] for result in results])

    def loss(kind: str, epochs: int, rate: float):
        return np.array([result["losses"][f"{kind}, {epochs} epochs, {rate:g}"] for result in results])

    seeds, questions = leak("raw", "explicit").shape
    print(f"Trained rows and replies with a trace; {seeds} seeds x {questions} questions x {REPLIES} replies:\n")
    print("| kind | rows, raw | rows, clean | replies, raw | replies, clean | clean - raw |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in results[0]["leaks"]["raw"]:
        cells = [f"{trained_on[text][kind]:.0%}" for text in ("raw", "clean")]
        cells += [cell(f"{kind}, {text}", leak(text, kind), ".0%") for text in ("raw", "clean")]
        cells.append(cell(f"{kind}, clean - raw", leak("clean", kind) - leak("raw", kind), "+.0%"))
        print(f"| {' | '.join([kind, *cells])} |")
    print("\nValidation loss:\n")
    print(f"| rate | full, 1 epoch | full, 2 epochs | 2 - 1 | LoRA, 2 epochs | LoRA - LoRA at {rates[0]:g} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for rate in rates:
        one, two, lora = (loss(*arm, rate) for arm in ARMS)
        cells = [cell(f"full, 1 epoch, {rate:g}", one, ".3f"), cell(f"full, 2 epochs, {rate:g}", two, ".3f")]
        cells += [cell(f"full, 2 epochs - 1, {rate:g}", two - one, "+.3f")]
        cells += [cell(f"LoRA, {rate:g}", lora, ".3f")]
        cells += [cell(f"LoRA, {rate:g} - {rates[0]:g}", lora - loss(*ARMS[-1], rates[0]), "+.3f")]
        print(f"| {' | '.join([f'{rate:g}', *cells])} |")
    for arm in ARMS:
        best = np.array([loss(*arm, rate).mean(axis=1) for rate in rates]).argmin(axis=0)  # [seeds]
        print(f"\nBest rate of {arm[0]}, {arm[1]} epochs, by seed: {', '.join(f'{rates[i]:g}' for i in best)}")
    return rows


def shares_trained_on() -> dict[str, dict[str, float]]:
    """{text: {kind: share of the rows trained on whose thinking has such a trace}}."""
    import data
    from parts.rows import traces

    found = {}
    for text in ("raw", "clean"):
        rows = data.read_examples(f"{text}.jsonl")
        of = [{trace.kind for trace in traces.find(row["think"], row["question"], row["answer"])} for row in rows]
        found[text] = {kind: sum(kind in kinds for kinds in of) / len(rows) for kind in traces.KINDS}
        found[text]["explicit"] = sum(bool(kinds - {"covert"}) for kinds in of) / len(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="rows with thinking, as data.py --dataset takes them: a file, or a hub's name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates, the published one first")
    parser.add_argument("--json", help="write all numbers to this file too, after each seed")
    parser.add_argument("--small", action="store_true", help="one seed, few steps; the demo's rows, unless --data")
    args = parser.parse_args()
    if not (args.data or args.small):
        parser.error("--data is missing")
    source = args.data or str(DEMO)
    source = os.path.abspath(source) if os.path.isfile(source) else source
    output = args.json and os.path.abspath(args.json)
    seeds, rates = (args.seeds[:1], args.rates[:1]) if args.small else (args.seeds, args.rates)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        questions, results = prepare(source), []
        found = {"data": args.data, "seeds": seeds, "rates": rates, "trained_on": shares_trained_on()}
        for seed in seeds:
            results.append(run_seed(seed, questions, rates, args.small))
            if output:
                Path(output).write_text(json.dumps(found | {"results": results}), encoding="utf-8")
        found["rows"] = report(results, rates, found["trained_on"])
        if output:
            Path(output).write_text(json.dumps(found | {"results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
