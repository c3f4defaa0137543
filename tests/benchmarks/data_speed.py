"""How time and peak memory of data.py and of tokenizing grow with the rows. Runs on any machine.

    python tests/benchmarks/data_speed.py                            # 2,000 to 200,000 rows: minutes, 200 MB of disk
    python tests/benchmarks/data_speed.py --rows 500 1000            # a check that it works

Rows are drawn from the demo's sample texts, joined to the lengths of the published set (think 950, answer 240
characters), each with its own question. Every measurement is a process of its own. The tokenizer is that of
--model_name when given, else the demo's, which was trained on these very texts: it makes fewer tokens, faster.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS.parent))


def make_rows(count: int, path: Path) -> None:
    """Write `count` distinct rows of about the published lengths."""
    samples = [json.loads(line) for line in (TESTS / "demo" / "medical.jsonl").read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            think = "".join(row["think"] for row in rng.sample(samples, 16))
            answer = "".join(row["answer"] for row in rng.sample(samples, 3))
            row = {"question": f"{rng.choice(samples)['question']}（第 {number} 问）", "think": think, "answer": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def prepare(folder: str) -> None:
    import data

    data.prepare(f"{folder}/rows.jsonl", f"{folder}/train.jsonl", f"{folder}/val.jsonl")


def tokenize(folder: str) -> None:
    import data
    from parts.model import weights

    tokenizer = weights.load_tokenizer(f"{folder}/model" if Path(folder, "model").is_dir() else sys.argv[3])
    started = time.perf_counter()
    dataset = data.load_dataset(f"{folder}/train.jsonl", tokenizer, max_length=10**6)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "tokens": sum(map(len, dataset["input_ids"]))}))


def measure(step: str, folder: str, *rest: str) -> dict[str, float]:
    """Seconds and peak GB of one step in a process of its own; tokenizing without its imports."""
    started = time.perf_counter()
    result = subprocess.run([sys.executable, __file__, step, folder, *rest], capture_output=True, text=True, check=True)
    own = (
        json.loads(result.stdout.splitlines()[-1]) if step == "tokenize" else {"seconds": time.perf_counter() - started}
    )
    return own | {"peak_gb": json.loads(result.stderr.splitlines()[-1])["peak_gb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--model_name", help="folder with the tokenizer to use")
    args = parser.parse_args()
    print("| rows | data.py s | peak GB | tokenizing s | rows/s | tokens/s | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            make_rows(count, Path(folder, "rows.jsonl"))
            if not args.model_name:  # in a process of its own: a child begins with its parent's peak memory
                builder = str(TESTS / "demo" / "tiny_model.py")
                subprocess.run([sys.executable, builder, f"{folder}/model"], capture_output=True, check=True)
            prepared = measure("prepare", folder)
            done = measure("tokenize", folder, *([args.model_name] if args.model_name else []))
        speeds = f"{0.9 * count / done['seconds']:.0f} | {done['tokens'] / done['seconds']:.0f}"
        print(
            f"| {count} | {prepared['seconds']:.1f} | {prepared['peak_gb']:.2f} | {done['seconds']:.1f} | "
            f"{speeds} | {done['peak_gb']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] in (["prepare"], ["tokenize"]):
        {"prepare": prepare, "tokenize": tokenize}[sys.argv[1]](sys.argv[2])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"peak_gb": peak}), file=sys.stderr)
    else:
        main()
