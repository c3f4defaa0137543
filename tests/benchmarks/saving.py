"""What saving costs a training of 20 steps with an evaluation at each: bytes written, and the seconds it waits.

    python tests/benchmarks/saving.py                        # a model of 150 million parameters; some minutes on a CPU
    python tests/benchmarks/saving.py --save_steps 1         # a checkpoint at each evaluation
    python tests/benchmarks/saving.py --root ../before       # the same, of another checkout of the project
    python tests/benchmarks/saving.py --small                # a check that it works

The loss falls at each evaluation, so each finds new best weights. Waiting is what the training's own thread spends in
saving, in copying best weights, and in waiting for a manifest. The last weights are written besides.
"""

import argparse
import functools
import sys
import tempfile
import time
from pathlib import Path

import psutil

STEPS = 20
MODEL = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 12}
SMALL = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True}


def watch(trainer) -> list[float]:
    """Return a list that gets the seconds of each call of what saves, but for calls inside of one another."""
    waited, inside = [], []

    def timed(method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            begun = time.perf_counter()
            inside.append(method)
            try:
                return method(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:
                    waited.append(time.perf_counter() - begun)

        return call

    for name in ("_save_checkpoint", "finish_checkpoint", "keep"):
        if hasattr(trainer, name):
            setattr(trainer, name, timed(getattr(trainer, name)))
    return waited


def measure(small: bool, flags: dict) -> dict[str, float]:
    import datasets
    import torch
    import transformers

    import train
    from parts.model import weights

    torch.manual_seed(0)
    ids = [[(7 * row + 3 * place) % 1000 for place in range(8)] for row in range(4)]
    examples = datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    with tempfile.TemporaryDirectory(dir=".") as folder:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(SMALL if small else MODEL), **HEADS))
        model.save_pretrained(f"{folder}/base")
        flags = {"max_steps": STEPS, "eval_steps": 1, "learning_rate": 1e-5, "report_to": "none"} | flags
        args = train.arguments(output_dir=f"{folder}/out", disable_tqdm=True, **flags)
        model = weights.load_weights(f"{folder}/base", args.device)
        trainer = train.build_trainer(args, model, None, examples, examples)
        waited, before = watch(trainer), psutil.Process().io_counters().write_chars
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        written = psutil.Process().io_counters().write_chars - before
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        assert len(losses) == STEPS and losses == sorted(losses, reverse=True), losses
    size = sum(p.numel() for p in model.parameters())
    return {"parameters": size, "written": written, "waited": sum(waited), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--save_steps", type=int)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(args.root.resolve()))
    found = measure(args.small, {"save_steps": args.save_steps} if args.save_steps else {})
    print(
        "| million parameters | GB written | saving s | training s, with it | share |\n| --- | --- | --- | --- | --- |"
    )
    share = found["waited"] / found["seconds"]
    print(
        f"| {found['parameters'] / 1e6:.0f} | {found['written'] / 1e9:.2f} | {found['waited']:.1f} "
        f"| {found['seconds']:.1f} | {share:.1%} |"
    )


if __name__ == "__main__":
    main()
