"""What a CPU can say of the recipe's defaults: cleaned against raw thinking, one epoch against two, LoRA's learning rate.

    python tests/benchmarks/defaults.py --data ROWS            # ROWS: what data.py --dataset takes, the published rows say
    python tests/benchmarks/defaults.py --data ROWS --seeds 0 1 2 --json defaults.json
    python tests/benchmarks/defaults.py --small                # the demo's rows and few steps: a check that it works

Real trainings of train.py and train_lora.py, of a Qwen3 of some million random parameters (tests/demo/tiny_model.py).
Each seed, which draws the weights and the order of the rows, learns --data twice from nothing, as `data.py --raw` and as
`data.py` write it; both models answer the validation questions, and parts/traces.py counts in their thinking. The model
that learnt the cleaned rows is then the base for the other two questions: it is fine-tuned on 40 questions of the demo,
rows of another style, and the outcome is the loss on its 20 other questions, of the weights that train.py keeps.

Intervals: 95 %, bootstrap, seeds and validation rows drawn apart, so that either can have made a difference. What such
a model cannot say: how good replies are, and where an absolute learning rate is best; the rate at which LoRA is best
beside the one at which full training is, it can.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "demo")]

HIDDEN, LAYERS = 128, 2
LEARNING = {"learning_rate": 1e-2, "warmup_steps": 30, "adam_beta2": 0.95, "num_train_epochs": 12}  # from nothing
COMMON = {"per_device_train_batch_size": 1, "early_stopping_patience": 0, "sample_tokens": 1, "logging_steps": 100}
RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3]
DEMO_TRAINED = 80  # of the demo's 120 rows; the two wordings of a question stand together
REPLY_TOKENS, REPLIES = 800, 4  # to each validation question
DRAWS = 2000
SMALL = {"learning_rate": 1e-2, "max_steps": 2}


def interval(values) -> list[float]:
    """[mean, low, high] of values [seeds, rows]."""
    import numpy as np

    rng, (seeds, rows) = np.random.default_rng(0), values.shape
    drawn = [
        values[rng.integers(seeds, size=seeds)][:, rng.integers(rows, size=rows)].mean() for _ in range(DRAWS)
    ]
    return [float(values.mean()), *map(float, np.percentile(drawn, [2.5, 97.5]))]


def fit(model: str, train_file: str, val_file: str, lora: bool = False, **changes):
    """The Trainer after a training into a new folder; what is printed meanwhile goes to log.txt."""
    import train
    import train_lora

    values = {"report_to": "none", "disable_tqdm": True, "fast_kernels": False} | COMMON | changes
    cls = train_lora.LoraArguments if lora else train.TrainArguments
    with open("log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        args = cls(
            model_name=model, train_file=train_file, val_file=val_file, output_dir=tempfile.mkdtemp(dir="."), **values
        )
        return train.train(args, train_lora.add_adapter if lora else None)


def row_losses(trainer) -> list[float]:
    """The mean token loss of each validation row."""
    import torch

    tensors = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in trainer.eval_dataset]
    with torch.inference_mode():
        return [trainer.model(**row).loss.item() for row in tensors]


def leaks(trainer, questions: list[str], tokens: int, seed: int) -> dict[str, list[float]]:
    """{kind of trace: [questions], the share of its replies with one}; `explicit`: with any but a covert one."""
    import data
    import transformers
    from parts import replies, traces

    transformers.set_seed(seed)
    kinds = [*traces.KINDS, "explicit"]
    found = {kind: [0.0] * len(questions) for kind in kinds}
    conversations = [data.to_messages(question) for question in questions]
    for _ in range(REPLIES):
        answered = replies.generate(trainer.model, trainer.processing_class, conversations, tokens)
        for place, (question, reply) in enumerate(zip(questions, answered)):
            of = {trace.kind for trace in traces.find(reply.thinking, question, reply.answer)}
            for kind in of | ({"explicit"} if of - {"covert"} else set()):
                found[kind][place] += 1 / REPLIES
    return found


def prepare(dataset: str) -> list[str]:
    """Write raw.jsonl, clean.jsonl, val.jsonl and the demo's two files; returns the validation questions."""
    import data
    from parts import row_files

    with open("log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        data.prepare(dataset, "raw.jsonl", "val.jsonl", raw=True)
        data.prepare(dataset, "clean.jsonl", "val.jsonl")
    demo = (ROOT / "tests" / "demo" / "medical.jsonl").read_text(encoding="utf-8").splitlines()
    for file, part in (("demo.jsonl", demo[:DEMO_TRAINED]), ("demo_val.jsonl", demo[DEMO_TRAINED:])):
        Path(file).write_text("\n".join(part) + "\n", encoding="utf-8")
    return [row["question"] for _, row in row_files.read("val.jsonl")]


def run_seed(seed: int, questions: list[str], rates: list[float], small: bool) -> dict[str, dict]:
    """{"leaks": {text: {kind: [questions]}}, "losses": {arm: [rows]}} of one seed."""
    import tiny_model

    texts = [text for row in map(json.loads, open("raw.jsonl", encoding="utf-8")) for text in map(str, row.values())]
    tiny_model.build(start := f"start{seed}", texts + tiny_model.sample_texts(), seed, HIDDEN, LAYERS)
    result = {"leaks": {}, "losses": {}}
    for text in ("raw", "clean"):
        settings = SMALL if small else LEARNING
        trainer = fit(start, f"{text}.jsonl", "val.jsonl", seed=seed, eval_strategy="no", **settings)
        result["leaks"][text] = leaks(trainer, questions, 8 if small else REPLY_TOKENS, seed)
    base = trainer.args.output_dir
    for rate in rates:
        for kind, epochs in (("full", 1), ("full", 2), ("LoRA", 2)):
            changes = {"learning_rate": rate, "num_train_epochs": epochs, "eval_steps": DEMO_TRAINED // 2, "seed": seed}
            trainer = fit(base, "demo.jsonl", "demo_val.jsonl", kind == "LoRA", **changes)
            result["losses"][f"{kind}, {epochs} epochs, {rate:g}"] = row_losses(trainer)
    return result


def report(results: list[dict], rates: list[float], of_text: dict[str, float]) -> list[dict]:
    """The tables, printed, and as rows of numbers."""
    import numpy as np

    rows = []

    def line(name: str, values, form: str, *more: str) -> None:
        mean, low, high = interval(values)
        rows.append({"row": name, "mean": mean, "low": low, "high": high})
        print("| " + " | ".join([name, *more, f"{mean:{form}}", f"{low:{form}} to {high:{form}}"]) + " |")

    def leak(text: str, kind: str):
        return np.array([result["leaks"][text][kind] for result in results])

    def loss(kind: str, epochs: int, rate: float):
        return np.array([result["losses"][f"{kind}, {epochs} epochs, {rate:g}"] for result in results])

    print("| replies with a trace | rows trained on with one | mean | 95 % |\n| --- | --- | --- | --- |")
    for kind in results[0]["leaks"]["raw"]:
        for text in ("raw", "clean"):
            line(f"{kind}, {text}", leak(text, kind), ".1%", f"{of_text[text, kind]:.1%}")
        line(f"{kind}, clean - raw", leak("clean", kind) - leak("raw", kind), "+.1%", "")
    print("\n| validation loss | mean | 95 % |\n| --- | --- | --- |")
    for rate in rates:
        for kind, epochs in (("full", 1), ("full", 2), ("LoRA", 2)):
            line(f"{kind}, {epochs} epochs, {rate:g}", loss(kind, epochs, rate), ".3f")
        line(f"full, {rate:g}: 2 epochs - 1", loss("full", 2, rate) - loss("full", 1, rate), "+.3f")
        line(f"LoRA: {rate:g} - {rates[0]:g}", loss("LoRA", 2, rate) - loss("LoRA", 2, rates[0]), "+.3f")
    return rows


def shares(questions: list[str]) -> dict[tuple[str, str], float]:
    """{(text, kind): share of the rows trained on whose thinking has such a trace}."""
    from parts import row_files, traces

    found = {}
    for text in ("raw", "clean"):
        rows = [row for _, row in row_files.read(f"{text}.jsonl")]
        of = [{trace.kind for trace in traces.find(row["think"], row["question"], row["answer"])} for row in rows]
        for kind in traces.KINDS:
            found[text, kind] = sum(kind in kinds for kinds in of) / len(rows)
        found[text, "explicit"] = sum(bool(kinds - {"covert"}) for kinds in of) / len(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="rows with thinking, as data.py --dataset takes them: a file, or a hub's name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates, the published one first")
    parser.add_argument("--json", help="write all numbers to this file too, after each seed")
    parser.add_argument("--small", action="store_true", help="the demo's rows, one seed, few steps")
    args = parser.parse_args()
    if bool(args.data) == args.small:
        parser.error("either --data or --small")
    source = str(ROOT / "tests" / "demo" / "medical.jsonl") if args.small else args.data
    source = os.path.abspath(source) if os.path.isfile(source) else source
    output = args.json and os.path.abspath(args.json)
    seeds, rates = (args.seeds[:1], args.rates[:1]) if args.small else (args.seeds, args.rates)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        questions, results = prepare(source), []
        of_text = shares(questions)
        for seed in seeds:
            results.append(run_seed(seed, questions, rates, args.small))
            if output:
                Path(output).write_text(json.dumps({"data": args.data, "results": results}), encoding="utf-8")
        rows = report(results, rates, of_text)
        if output:
            numbers = {"data": args.data, "seeds": seeds, "rows": rows, "results": results}
            Path(output).write_text(json.dumps(numbers, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
