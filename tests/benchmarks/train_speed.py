"""Training speed and memory, side by side: the published recipe, and this project's full and LoRA training.

    python tests/benchmarks/train_speed.py                   # Qwen3-1.7B's shape with random weights; wants a GPU
    python tests/benchmarks/train_speed.py --small --steps 2 # a small model: a check on a CPU that it works

Each arm runs in a process of its own, the arms in turn and the whole round --rounds times; the table has medians over
the rounds of each round's median step. The first --warmup steps are left out. Random weights: speed does not depend on
them. Example lengths are drawn from quantiles of 120 published rows tokenized with Qwen3's tokenizer.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PROMPT_TOKENS = 64  # on average, of an example
LENGTHS = [422, 524, 571, 591, 620, 632, 666, 693, 709, 735, 757, 796, 819, 837, 852, 883, 903, 948, 993, 1117, 2048]
# GFLOPs a token, forward and backward, of Qwen3-1.7B: with activation checkpointing one more forward pass.
GFLOPS = {"full": 10.61, "full, checkpointing": 13.52, "lora": 7.22}
PEAK_TFLOPS = 790  # bf16 matrix products of an H200 on random data, measured

# name -> (script, its flags, key of GFLOPS). All of them take 4 examples a step.
ARMS = {
    "published recipe": (
        "train",
        {"full_logits": True, "kahan": False, "gradient_checkpointing": True},
        "full, checkpointing",
    ),
    "full": ("train", {}, "full, checkpointing"),
    "full, no checkpointing": ("train", {"gradient_checkpointing": False}, "full"),
    "LoRA": ("train_lora", {}, "lora"),
    "LoRA, no checkpointing": ("train_lora", {"gradient_checkpointing": False}, "lora"),
}


def build_model(small: bool):
    """Qwen3-1.7B's shape, or a small one with its vocabulary, on the device, random weights in its best dtype."""
    import transformers

    import inference

    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=64 if small else 2048,
        intermediate_size=192 if small else 6144,
        num_hidden_layers=2 if small else 28,
        num_attention_heads=4 if small else 16,
        num_key_value_heads=2 if small else 8,
        head_dim=16 if small else 128,
        tie_word_embeddings=True,
    )
    device = inference.pick_device()
    return transformers.Qwen3ForCausalLM(config).to(inference.best_dtype(device)).to(device)


def draw_examples(count: int) -> list[dict[str, list[int]]]:
    """Examples of the published lengths, random ids, about 64 prompt tokens masked."""
    rng = random.Random(0)
    examples = []
    for _ in range(count):
        ids = rng.choices(range(1000, 150_000), k=rng.choice(LENGTHS))
        examples.append({"input_ids": ids, "labels": [-100] * PROMPT_TOKENS + ids[PROMPT_TOKENS:]})
    return examples


def run_arm(name: str, small: bool, steps: int, warmup: int) -> dict[str, float]:
    """Median seconds and tokens of a step, and peak GB, of one arm in this process."""
    import torch
    import transformers

    import train
    import train_lora

    script, flags, _ = ARMS[name]
    cls = train_lora.LoraArguments if script == "train_lora" else train.TrainArguments
    total = warmup + steps
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    quiet |= {"eval_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": 0}
    args = cls(output_dir=tempfile.mkdtemp(), max_steps=total, **quiet, **flags)
    transformers.set_seed(args.seed)
    model = build_model(small)
    model = train_lora.add_adapter(model, args) if script == "train_lora" else model
    examples = draw_examples(4 * total)

    class Clock(transformers.TrainerCallback):
        times: list[float] = []

        def on_step_begin(self, *_, **__):
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

        on_train_end = on_step_begin

    collator = transformers.DataCollatorWithFlattening()
    trainer = train.MedicalTrainer(
        model=model,
        args=args,
        train_dataset=examples,
        data_collator=collator,
        callbacks=[Clock()],
        optimizer_cls_and_kwargs=train.kahan_adamw(args, model),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    seconds = [end - begin for begin, end in zip(Clock.times, Clock.times[1:])][warmup:]
    tokens = statistics.mean(len(example["input_ids"]) for example in examples) * 4
    return {
        "seconds": statistics.median(seconds),
        "tokens": tokens,
        "peak_gb": train.peak_memory(args.device) / 1e9,
        "loss": trainer.state.log_history[-1]["train_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a two-layer model")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of an arm (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps left out before (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arm, in turn (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--one_arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_arm:
        print(json.dumps(run_arm(args.one_arm, args.small, args.steps, args.warmup)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.arms}
    for _ in range(args.rounds):
        for name in args.arms:
            command = [sys.executable, __file__, "--one_arm", name, "--steps", str(args.steps)]
            command += ["--warmup", str(args.warmup)] + ["--small"] * args.small
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                print(f"{name}: failed\n{result.stderr[-2000:]}", file=sys.stderr)
            else:
                results[name].append(json.loads(result.stdout.splitlines()[-1]))
    print("| arm | s/step | tokens/s | x first | MFU % | peak GB | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first = None
    for name, runs in results.items():
        if runs:
            median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            speed = median["tokens"] / median["seconds"]
            first = first or speed
            mfu = "-" if args.small else f"{speed * GFLOPS[ARMS[name][2]] / PEAK_TFLOPS / 10:.1f}"
            print(
                f"| {name} | {median['seconds']:.3f} | {speed:.0f} | {speed / first:.2f} | {mfu} | "
                f"{median['peak_gb']:.1f} | {median['loss']:.4f} |"
            )


if __name__ == "__main__":
    main()
