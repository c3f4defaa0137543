"""Decoding speed, side by side: transformers' plain generate, and our loop, for one and for many questions.

    python tests/benchmarks/decode_speed.py                  # Qwen3-1.7B's shape with random weights; wants a GPU
    python tests/benchmarks/decode_speed.py --small          # a small model: a check on a CPU that it works

Each arm runs in a process of its own, the arms in turn and the whole round --rounds times; the table has medians over
the rounds. A process decodes --tokens new tokens a row once to warm up, then again, timed; the share of the limit is
the weights read per step x steps/s / --bandwidth, so the cache that many rows read is not in it. A capture of one step
is timed apart; the timed run has one for each 512 tokens by which the cache grows. On a CPU there is none.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from train_speed import build_model, in_turn  # noqa: E402

PROMPT_TOKENS = 64  # about the published rows'
WEIGHT_GB = 3.44  # of Qwen3-1.7B in bfloat16, all of it read at each step
BANDWIDTH = 4300  # GB/s of an H200, measured
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}  # Qwen3's while thinking

ARMS = {  # name -> (rows, our loop, fused layers)
    "generate, 1 question": (1, False, False),
    "generate, 1 question, fused layers": (1, False, True),
    "ours without fused layers, 1 question": (1, True, False),
    "ours, 1 question": (1, True, True),
    "generate, 64 questions": (64, False, False),
    "ours, 64 questions": (64, True, True),
}


def run_arm(name: str, small: bool, tokens: int) -> dict[str, float]:
    """Seconds of the first and the timed run, steps a second, seconds of a capture, peak GB of one arm."""
    import torch

    from parts.model import generate

    rows, ours, fuse = ARMS[name]
    model = build_model(small).eval()
    device = model.device
    if fuse:
        generate.fuse(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 150_000, (rows, PROMPT_TOKENS), generator=generator).to(device)

    def decode() -> float:
        begin = time.perf_counter()
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=0,  # and no stop token: every reply is as long
            custom_generate=generate.decode if ours else None,
            **SAMPLING,
        )
        assert output.shape == (rows, PROMPT_TOKENS + tokens), output.shape
        output.cpu()  # waits
        return time.perf_counter() - begin

    with torch.inference_mode():
        first, seconds = decode(), decode()
        capture = capture_seconds(model, ids) if ours and device.type == "cuda" else 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return {"first": first, "seconds": seconds, "steps": tokens / seconds, "capture": capture, "peak_gb": peak}


def capture_seconds(model, ids) -> float:
    """Seconds that it takes to capture one step; fails when it cannot be captured."""
    import torch

    from parts.model import generate

    decoder = generate.Decoder(model, ids, torch.arange(ids.shape[1], device=ids.device)[None])
    for _ in range(generate.WARM_UP):
        decoder.advance(ids[:, 0])
    torch.cuda.synchronize()
    begin = time.perf_counter()
    decoder.capture()
    torch.cuda.synchronize()
    assert decoder.graph, "no graph was captured: see above"
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a two-layer model, and fewer tokens")
    parser.add_argument("--tokens", type=int, help="new tokens a row (default: 768, with --small 8)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arm, in turn (default: %(default)s)")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="of the memory, GB/s (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--one_arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tokens = args.tokens or (8 if args.small else 768)
    if args.one_arm:
        print(json.dumps(run_arm(args.one_arm, args.small, tokens)))
        return
    options = ["--tokens", str(tokens)] + ["--small"] * args.small
    results = in_turn(
        {name: [sys.executable, __file__, "--one_arm", name, *options] for name in args.arms}, args.rounds
    )
    print("| arm | tokens/s | x plain | % of the limit | first run s | timed run s | capture s | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    plain: dict[int, float] = {}
    for name, runs in results.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows = ARMS[name][0]
        speed = rows * median["steps"]
        ratio = speed / plain.setdefault(rows, speed)
        limit = "-" if args.small else f"{100 * WEIGHT_GB * median['steps'] / args.bandwidth:.0f}"
        print(
            f"| {name} | {speed:.0f} | {ratio:.2f} | {limit} | {median['first']:.2f} | {median['seconds']:.2f} | "
            f"{median['capture']:.2f} | {median['peak_gb']:.1f} |"
        )


if __name__ == "__main__":
    main()
