"""Training speed and memory, side by side: the published recipe, this project's full, LoRA and QLoRA training, TRL.

    python tests/benchmarks/train_speed.py                   # Qwen3-1.7B's shape with random weights; wants a GPU
    python tests/benchmarks/train_speed.py --small --steps 2 --rounds 1      # a check on a CPU that it works
    python tests/benchmarks/train_speed.py --whole_command MODEL_FOLDER      # wall time of train.py, beside train.jsonl

Each arm runs in a process of its own, the arms in turn and the whole round --rounds times; the table has medians over
the rounds of each round's median step. The first --warmup steps are left out. Random weights: speed does not depend on
them. Example lengths are drawn from quantiles of 120 published rows tokenized with Qwen3's tokenizer. An arm whose
library is not installed (trl, bitsandbytes) is named and left out.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PROMPT_TOKENS = 64  # on average, of an example
LENGTHS = [422, 524, 571, 591, 620, 632, 666, 693, 709, 735, 757, 796, 819, 837, 852, 883, 903, 948, 993, 1117, 2048]
# GFLOPs a token, forward and backward, of Qwen3-1.7B: with activation checkpointing one more forward pass.
GFLOPS = {"full": 10.61, "full, checkpointing": 13.52, "lora": 7.22, "lora, checkpointing": 10.13}
PEAK_TFLOPS = 790  # bf16 matrix products of an H200 on random data, measured
NEVER = 10**6  # steps: neither evaluated, saved nor logged
PUBLISHED = {"full_logits": True, "fast_kernels": False, "optimizer": "adamw", "checkpoint_every": 1}
PUBLISHED |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "batch_tokens": 1}

# name -> (script, its flags, key of GFLOPS). All of them take 4 examples a step.
ARMS = {
    "published recipe": ("train", PUBLISHED, "full, checkpointing"),
    "full": ("train", {}, "full"),
    "full, every layer recomputed": ("train", {"checkpoint_every": 1}, "full, checkpointing"),
    "full, plain kernels": ("train", {"fast_kernels": False, "batch_tokens": 1}, "full"),
    "full, compiled layers": ("train", {"compile": True}, "full"),
    "full, 8 bit in backward": ("train", {"optimizer": "8bit_in_backward"}, "full"),
    "full, inputs offloaded": ("train", {"checkpoint_every": 1, "offload_activations": True}, "full, checkpointing"),
    "TRL, full": ("trl", {}, "full"),
    "published recipe, LoRA": ("train_lora", PUBLISHED, "lora, checkpointing"),
    "LoRA": ("train_lora", {}, "lora"),
    "QLoRA": ("train_lora", {"load_in_4bit": True}, "lora"),
    "TRL, LoRA": ("trl", {"lora": True}, "lora"),
}


def build_model(small: bool, device: str | None = None):
    """Qwen3-1.7B's shape, or a small one with its vocabulary; random bfloat16 weights, on the GPU if there is one."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=64 if small else 2048,
        intermediate_size=192 if small else 6144,
        num_hidden_layers=2 if small else 28,
        num_attention_heads=4 if small else 16,
        num_key_value_heads=2 if small else 8,
        head_dim=16 if small else 128,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)  # the same weights for every arm
    with torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")):
        return transformers.AutoModelForCausalLM.from_config(config)


def draw_examples(count: int, first: tuple = ()):
    """A datasets.Dataset: `first`, and `count` examples of the published lengths, random ids, the prompt masked."""
    import datasets

    rng = random.Random(0)
    examples = list(first)
    for _ in range(count):
        ids = rng.choices(range(1000, 150_000), k=rng.choice(LENGTHS))
        examples.append({"input_ids": ids, "labels": [-100] * PROMPT_TOKENS + ids[PROMPT_TOKENS:]})
    return datasets.Dataset.from_list(examples)


def our_trainer(script: str, flags: dict, folder: str, common: dict, examples):
    import train
    import train_lora
    from parts.model import weights

    if compiled := "compile" in flags:
        flags = {}
        sys.modules["liger_kernel"] = None  # as if it were not installed
    make = train_lora.arguments if script == "train_lora" else train.arguments
    args = make(eval_steps=NEVER, **common, **flags)
    model = weights.load_weights(folder, args.device, flags.get("load_in_4bit", False), dtype=args.dtype)
    model = train_lora.add_adapter(model, args) if script == "train_lora" else model
    trainer = train.build_trainer(args, model, None, examples, examples)
    for layer in model.model.layers if compiled else ():
        layer.compile(dynamic=True)
    return trainer


def trl_trainer(flags: dict, folder: str, common: dict, examples):
    """TRL's SFTTrainer with what makes it fast: Liger's kernels and loss, bfloat16; padding-free batches where the
    flash-attn package is installed, which they need, else padded ones on sdpa."""
    import importlib.util

    import peft
    import torch
    import trl

    cuda = torch.cuda.is_available()
    flash = cuda and importlib.util.find_spec("flash_attn") is not None
    args = trl.SFTConfig(
        per_device_train_batch_size=4,
        padding_free=flash,
        use_liger_kernel=cuda,
        bf16=cuda,
        max_length=None,
        save_strategy="no",
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        model_init_kwargs={
            "dtype": "bfloat16" if cuda else "float32",
            "attn_implementation": "flash_attention_2" if flash else "sdpa",
        },
        **common,
    )
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=32, lora_dropout=0.1)
    tokenizer = fast_tokenizer()
    return trl.SFTTrainer(
        folder, args, train_dataset=examples, processing_class=tokenizer, peft_config=lora if flags else None
    )


def fast_tokenizer():
    """A tokenizer that TRL asks for and never uses: the examples are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<e>", pad_token="<e>")


def run_arm(name: str, small: bool, steps: int, warmup: int) -> dict[str, float]:
    """Median seconds and tokens of a step, and peak GB, of one arm in this process."""
    import torch
    import transformers

    from parts.training.trainer import peak

    script, flags, _ = ARMS[name]
    total = warmup + steps
    examples = draw_examples(4 * total)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        on_train_end = on_step_begin

    with tempfile.TemporaryDirectory() as folder:
        build_model(small).save_pretrained(folder)
        common = {"output_dir": f"{folder}/output", "max_steps": total, "report_to": "none", "disable_tqdm": True}
        common |= {"logging_steps": NEVER}
        if script == "trl":
            trainer = trl_trainer(flags, folder, common, examples)
        else:
            trainer = our_trainer(script, flags, folder, common, examples)
        trainer.add_callback(Clock())
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
    seconds = [end - begin for begin, end in zip(times, times[1:])]
    labels = [label for example in examples for label in example["labels"]]
    return {
        "first": seconds[0],  # with what is compiled at run time
        "seconds": statistics.median(seconds[warmup:]),
        "tokens": len(labels) / total,
        "supervised": sum(label != -100 for label in labels) / total,
        "peak_gb": peak(trainer.args.device) / 1e9,
        "loss": trainer.state.log_history[-1]["train_loss"],
    }


def in_turn(commands: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run the commands one after another, `rounds` times; what each printed last, as JSON, and its wall seconds."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            result = subprocess.run(command, capture_output=True, text=True)
            wall = time.perf_counter() - started
            if result.returncode:
                print(f"{name}: left out\n{result.stderr[-600:]}", file=sys.stderr)
                continue
            last = result.stdout.strip().splitlines()[-1]
            results[name].append({"wall": wall} | (json.loads(last) if last.startswith("{") else {}))
    return {name: runs for name, runs in results.items() if runs}


def whole_command(model: str, rounds: int) -> None:
    """Wall seconds of train.py from start to the last reply, ours against the published recipe by flags. No flag takes
    away our evaluation without logits and our decoding, so the first arm is faster than the published script was."""
    flags = ["--report_to", "none", "--model_name", model, "--overwrite_output_dir", "true"]
    published = [word for name, value in PUBLISHED.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            name: [sys.executable, str(ROOT / "train.py"), *flags, "--output_dir", f"{folder}/{number}", *more]
            for number, (name, more) in enumerate({"published recipe": published, "ours": []}.items())
        }
        results = in_turn(commands, rounds)
    print("| command | wall s | x first |\n| --- | --- | --- |")
    walls = {name: statistics.median(run["wall"] for run in runs) for name, runs in results.items()}
    for name, wall in walls.items():
        print(f"| {name} | {wall:.0f} | {next(iter(walls.values())) / wall:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a two-layer model")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of an arm (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps left out before (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arm, in turn (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--whole_command", metavar="MODEL_FOLDER", help="measure the wall time of train.py instead")
    parser.add_argument("--one_arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.whole_command:
        return whole_command(args.whole_command, args.rounds)
    if args.one_arm:
        return print(json.dumps(run_arm(args.one_arm, args.small, args.steps, args.warmup)))
    options = ["--steps", str(args.steps), "--warmup", str(args.warmup)] + ["--small"] * args.small
    results = in_turn(
        {name: [sys.executable, __file__, "--one_arm", name, *options] for name in args.arms}, args.rounds
    )
    print("| arm | first step s | s/step | tokens/s | supervised/s | x first | MFU % | peak GB | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    first = None
    for name, runs in results.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        speed, supervised = (median[key] / median["seconds"] for key in ("tokens", "supervised"))
        first = first or speed
        mfu = "-" if args.small else f"{speed * GFLOPS[ARMS[name][2]] / PEAK_TFLOPS / 10:.1f}"
        print(
            f"| {name} | {median['first']:.1f} | {median['seconds']:.3f} | {speed:.0f} | {supervised:.0f} | "
            f"{speed / first:.2f} | {mfu} | {median['peak_gb']:.1f} | {median['loss']:.4f} |"
        )


if __name__ == "__main__":
    main()
