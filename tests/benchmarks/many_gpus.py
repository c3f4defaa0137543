"""Which model trains on how many cards, by arithmetic: memory of a card, traffic between cards, least time of a step. A
model, not a measurement.

    python tests/benchmarks/many_gpus.py                       # Qwen3 of 1.7, 4, 8 and 32 B on H100s
    python tests/benchmarks/many_gpus.py --examples 4          # four examples a card and step, not one

Memory is what the training itself would plan, of examples of 2,048 tokens. Traffic is what
a card receives in a step at least: with DDP the sum of all gradients (2 (n - 1) / n of their bytes), with --fsdp each
layer's weights twice, the output layer's once, and its rows of the gradients ((n - 1) / n each). Of two machines the
links between them count too: half of all that is gathered has to come in. The least time is the longest of three that
can run at once: FLOPs at the card's peak (6 for each weight and token; 4 with LoRA, whose frozen weights have no
gradient; 2 more where all layers are recomputed; attention's), traffic within a machine, traffic into it. No real step
reaches it.
"""

import argparse
import contextlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

MODELS = ("Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-32B")
SETUPS = ((1, 1, False), (1, 8, False), (1, 8, True), (2, 8, True))  # machines, cards of each, --fsdp
CARD, PEAK = 80e9, 989e12  # H100 SXM: bytes, dense bfloat16 FLOP/s (data sheet)
NVLINK, NETWORK = 450e9, 50e9  # bytes/s into a card: half of NVLink's 900e9 (data sheet); 400 Gb/s, as in a DGX H100
WORST, MEAN = 2048, 788  # tokens of an example: at most, and of the published ones on average


def build(name: str, lora: bool, args):
    """The model of that shape, on the meta device."""
    import torch
    import transformers

    import train_lora
    from parts import models

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(models.shape_of(name), dtype=torch.bfloat16)
    with contextlib.redirect_stdout(sys.stderr):  # peft's line is no row of the table
        return train_lora.add_adapter(model, args) if lora else model


def traffic(model, machines: int, cards: int, fsdp: bool) -> tuple[float, float]:
    """Bytes that come into a card, and into a machine, in a step of one pass."""
    count = machines * cards
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    if not fsdp:
        return 2 * (count - 1) / count * gradients, (machines > 1) * gradients
    output = model.get_output_embeddings().weight.nbytes
    gathered = 2 * (sum(p.nbytes for p in model.parameters()) - output) + output
    outside = (machines - 1) / machines * (gathered + gradients)
    return (count - 1) / count * (gathered + gradients), outside


def flops(model, lora: bool, every: int, tokens: int, length: int) -> float:
    """Of a step on one card: forward, backward and what is recomputed, over `tokens` of examples of this length."""
    config, embedding = model.config, model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters())
    if embedding is not model.get_output_embeddings().weight:
        weights -= embedding.numel()  # it is looked up
    recomputed = 1 / every if every else 0
    # Of a token, forward, two products of 2 FLOPs a number, of which the causal mask leaves one half.
    attention = 2 * length * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return tokens * ((6 - 2 * lora + 2 * recomputed) * weights + (3 + recomputed) * attention)


def row(name: str, lora: bool, machines: int, cards: int, fsdp: bool, examples: int) -> str:
    """One of the table."""
    import memory_budget

    import train
    import train_lora
    from parts import memory_plan

    args = memory_budget.card_arguments(train_lora.arguments if lora else train.arguments)
    args.sharded = "fsdp" if fsdp else None
    args.world_size, args.per_device_train_batch_size = machines * cards, examples
    model = build(name, lora, args)
    plan, *_ = memory_plan.choose(args, model, [WORST] * examples, True, CARD - 0.5e9)
    what = f"{machines} x {cards}{' --fsdp' if fsdp else ''}" if machines * cards > 1 else "1"
    start = f"| {name.removeprefix('Qwen3-')} | {'LoRA' if lora else 'full'} | {what} | {plan.total / 1e9:.1f} "
    if not plan.fits:
        return f"{start}(does not fit) | | | | |"
    inside, outside = traffic(model, machines, cards, fsdp)
    times = [
        flops(model, lora, plan.checkpoint_every, MEAN * examples, MEAN) / PEAK,
        inside / NVLINK,
        outside / (NETWORK * cards),
    ]
    tokens = MEAN * examples * machines * cards / max(times)
    return (
        f"{start}| {inside / 1e9:.1f} | {outside / 1e9:.1f} | {' / '.join(f'{1000 * time:.0f}' for time in times)} "
        f"| {tokens:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1, help="of a card in a step (default: %(default)s)")
    args = parser.parse_args()
    print("| model | training | machines x cards | GB a card | GB into a card a step | GB into a machine | ", end="")
    print("ms at least: FLOPs / within / between | tokens/s at most |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in MODELS:
        for lora in (False, True):
            for setup in SETUPS:
                print(row(name, lora, *setup, args.examples), flush=True)


if __name__ == "__main__":
    main()
