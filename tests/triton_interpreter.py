"""Triton's kernels on a CPU: Liger's layers and optimi's step, which training and replies take on a GPU, run by
Triton's interpreter (3.7.1 and 3.9.0 were tried) through the very probes that choose them there. It prints
{probe: [it agrees, why]}.

    python tests/triton_interpreter.py             # 20 seconds; tests/machine/test_triton.py runs it

Triton reads TRITON_INTERPRET when kernels are defined: this is a process of its own.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

LENGTHS = (37, 91)  # tokens of the examples
# The interpreter knows no function of CUDA's library, and hands numbers on as Python's, which have no `.to`.
SUBSTITUTIONS = {
    r"= rsqrt\(": "= tl.math.rsqrt(",
    r"\b(eps|offset|gate_multiplier)\.to\(tl\.float32\)": r"\1",
}


# ---- bfloat16, which the interpreter holds as its 16 bits and would compute with as integers -----------------------


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, and to even between two, as a GPU does."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded).astype(np.uint16)


def mend_bfloat16() -> None:
    builder = interpreter.InterpreterBuilder
    cast_before, binary_before, unary_before = builder.cast_impl, builder.binary_op, builder.unary_op

    def values(handle) -> np.ndarray:
        data = np.asarray(handle.data)
        return to_float32(data) if handle.dtype.scalar == tl.bfloat16 else data

    def cast(self, source, dtype):
        kinds = (source.dtype.scalar == tl.bfloat16, dtype.scalar == tl.bfloat16)
        if kinds == (True, False):
            data = values(source).astype(interpreter._get_np_dtype(dtype))
        elif kinds == (False, True):
            data = to_bfloat16(values(source).astype(np.float32))
        else:
            return cast_before(self, source, dtype)
        return interpreter.TensorHandle(data, dtype.scalar)

    def binary(self, left, right, operation):
        if tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar):
            return binary_before(self, left, right, operation)
        result = operation(values(left), values(right))
        if result.dtype == bool:
            return interpreter.TensorHandle(result, tl.int1)
        return interpreter.TensorHandle(to_bfloat16(result), tl.bfloat16)

    def unary(self, handle, operation):
        if handle.dtype.scalar != tl.bfloat16:
            return unary_before(self, handle, operation)
        return interpreter.TensorHandle(to_bfloat16(operation(values(handle))), tl.bfloat16)

    builder.cast_impl, builder.binary_op, builder.unary_op = cast, binary, unary
    builder.create_fp_to_fp = lambda self, source, dtype, mode: cast(self, source, dtype)


# ---- the kernels ---------------------------------------------------------------------------------------------------


def copy_liger(folder: str) -> None:
    """Put a copy of Liger with SUBSTITUTIONS before the one that is installed."""
    installed = Path(importlib.util.find_spec("liger_kernel").origin).parent
    copy = shutil.copytree(installed, Path(folder, "liger_kernel"))
    for name in ("rms_norm.py", "swiglu.py"):
        text = (copy / "ops" / name).read_text(encoding="utf-8")
        for pattern, replacement in SUBSTITUTIONS.items():
            text = re.sub(pattern, replacement, text)
        (copy / "ops" / name).write_text(text, encoding="utf-8")
    sys.path.insert(0, folder)


def main() -> None:
    from helpers import SMALL, build_model

    from parts.model import fused, generate
    from parts.training import optimizers

    model = build_model(layers=1, shape=SMALL)  # in bfloat16
    probe = fused.shrink(model)
    run = partial(fused.outcome, probe, LENGTHS, lengths=LENGTHS)
    verdicts = {"layers in training": fused.try_layers(probe, run(), run)}

    model.set_attn_implementation("sdpa")
    probe = fused.shrink(model).eval()
    run = partial(generate.take_steps, probe)
    with torch.inference_mode():
        verdicts["layers in replies"] = fused.try_layers(probe, run(), run, norms=False)

    deviation = optimizers.deviation("kahan", torch.device("cpu"), triton=True)
    verdicts["the optimizer's step"] = (deviation < 0.005, f"{deviation:.2%}")
    print(json.dumps({name: verdict[:2] for name, verdict in verdicts.items()}, ensure_ascii=False))


if __name__ == "__main__":
    mend_bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        copy_liger(folder)
        main()
