"""Which training runs on which card: for each cap on memory, full, LoRA and QLoRA, speed, plan and measured peak.

    python tests/benchmarks/memory_budget.py                 # Qwen3-1.7B's shape, random weights; wants a GPU
    python tests/benchmarks/memory_budget.py --small --caps 2 4              # a check on a CPU that it works
    python tests/benchmarks/memory_budget.py --plans         # only what would be planned, on any machine

The cap holds for the whole process (--memory_gb: a fraction of the card's memory that CUDA refuses to go beyond). The
first step is the worst one, four examples of 2,048 tokens, and a warm-up: speed is that of the steps after it. The
plan's estimate should stand within 15 % above the peak, and never below it.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]


KINDS = {"full": ("train", {}), "LoRA": ("train_lora", {}), "QLoRA": ("train_lora", {"load_in_4bit": True})}
CAPS = [4, 6, 8, 10, 12, 16, 24, 32, 40]
NF4_BITS = 4.127  # a weight, its scales quantized too (arXiv 2305.14314, section 3)
WORST = {"input_ids": list(range(1000, 3048)), "labels": [-100] * 64 + list(range(1064, 3048))}


def run_one(kind: str, cap: float, small: bool, steps: int) -> dict:
    """Train the worst step and `steps` drawn ones under the cap: {tokens_per_second, peak_gb, estimate_gb, plan}."""
    import train_speed

    from parts import terminal
    from parts.training.trainer import peak

    script, flags = KINDS[kind]
    examples = train_speed.draw_examples(4 * steps, first=(WORST,) * 4)
    with tempfile.TemporaryDirectory() as folder:
        train_speed.build_model(small).save_pretrained(folder)
        common = {"output_dir": f"{folder}/output", "max_steps": steps + 1, "report_to": "none", "disable_tqdm": True}
        common |= {"logging_steps": 1, "train_sampling_strategy": "sequential"}
        with terminal.explain_out_of_memory("out of memory"):
            trainer = train_speed.our_trainer(script, flags | {"memory_gb": cap}, folder, common, examples)
            trainer.train()
    plan = trainer.plan
    speeds = [log["tokens_per_second"] for log in trainer.state.log_history if "loss" in log]
    return {
        "tokens_per_second": statistics.median(speeds[1:]),
        "peak_gb": peak(trainer.args.device) / 1e9,
        "estimate_gb": plan.total / 1e9,
        "plan": describe(plan),
    }


def describe(plan) -> str:
    offload = " offloaded" * plan.offload
    return f"{plan.batch_tokens} tokens, every {plan.checkpoint_every}{offload}, {plan.optimizer}"


def saved_by_4_bits(model) -> float:
    """Bytes by which the weights under the adapters are smaller in 4 bits."""
    weights = [weight for name, weight in model.named_parameters() if name.endswith("base_layer.weight")]
    return sum(weight.numel() for weight in weights) * (model.dtype.itemsize - NF4_BITS / 8)


def card_arguments(make, bfloat16: bool = True, **flags) -> SimpleNamespace:
    """Arguments as the plan reads them, of one process on a CUDA card, with or without bfloat16, that this machine need
    not have."""
    import torch

    from parts.model import weights

    with mock.patch.object(weights, "best_dtype", lambda device: torch.bfloat16 if bfloat16 else torch.float16):
        real = make(report_to="none", **flags)
        here = {"device": torch.device("cuda"), "world_size": 1, "process_index": 0}
        here |= {name: getattr(real, name) for name in ("trains_adapter", "dtype")}
    return SimpleNamespace(**vars(real) | here)


def plan_for(kind: str, cap: float, bfloat16: bool) -> str:
    """The cells of a CUDA card of this size, with or without bfloat16: does it fit, GB, plan; from shapes alone."""
    import train_speed

    import train
    import train_lora
    from parts.machine import plan

    make = train_lora.arguments if KINDS[kind][0] == "train_lora" else train.arguments
    args = card_arguments(make, bfloat16, memory_gb=cap)
    model = train_speed.build_model(False, "meta").to(args.dtype)
    with contextlib.redirect_stdout(sys.stderr):  # peft's line is no row of the table
        model = model if kind == "full" else train_lora.add_adapter(model, args)
    if kind == "QLoRA":
        size = model.get_memory_footprint() - saved_by_4_bits(model)
        model.get_memory_footprint = lambda: size
    free = plan.free_bytes(args.device, model, args.memory_gb)
    # The rule asks the card itself, which is not here.
    with mock.patch.object(plan, "repeats_heads", lambda device, dtype: not bfloat16):
        fastest, *_ = plan.choose(args, model, [2048] * 4, True, free)
    return f"{'yes' if fastest.fits else 'no'} | {fastest.total / 1e9:.1f} | {describe(fastest)}"


def print_plans(caps: list[float]) -> None:
    from parts.model import weights

    weights.quiet_libraries()
    print("| cap GB | training | fits | estimate GB | plan | without bfloat16: fits | estimate GB | plan |")
    print("| --- " * 8 + "|")
    for cap in caps:
        for kind in KINDS:
            print(f"| {cap:g} | {kind} | {plan_for(kind, cap, True)} | {plan_for(kind, cap, False)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a two-layer model")
    parser.add_argument("--caps", nargs="+", type=float, default=CAPS, help="GB (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps after the worst one (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--plans", action="store_true", help="do not train")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(run_one(args.one[0], float(args.one[1]), args.small, args.steps)))
    if args.plans:
        return print_plans(args.caps)
    print("| cap GB | training | tokens/s | peak GB | estimate GB | estimate / peak | plan |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for cap in args.caps:
        for kind in args.kinds:
            command = [sys.executable, __file__, "--one", kind, str(cap), "--steps", str(args.steps)]
            result = subprocess.run(command + ["--small"] * args.small, capture_output=True, text=True)
            if result.returncode:
                why = result.stderr.strip().splitlines()[-1][:80]
                print(f"| {cap:g} | {kind} | does not run: {why} | | | | |", flush=True)
                continue
            found = json.loads(result.stdout.strip().splitlines()[-1])
            ratio = found["estimate_gb"] / found["peak_gb"]
            print(
                f"| {cap:g} | {kind} | {found['tokens_per_second']:.0f} | {found['peak_gb']:.2f} | "
                f"{found['estimate_gb']:.2f} | {ratio:.2f} | {found['plan']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
