"""bfloat16, float16 or float32: in what a device computes best, and whether a model's numbers fit into
float16. It knows no training: which weights are frozen, and so may be in float16, the arguments say."""

import torch

PROBE_IDS = range(100, 120)  # ordinary tokens in every vocabulary here


def best_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it; else float16 on a GPU, for weights that are not
    trained, and float32 elsewhere."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        has_bf16 = device.type == "npu"
    if has_bf16:
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def require_range(model, path: str, for_training: bool) -> None:
    """Make a float16 model that is to be asked float32 where its numbers are too large. Raises SystemExit
    where it is to be trained: the dtype stands among the run's settings by then.

    float16 ends at 65,504, which is too little for Qwen2-1.5B (QwenLM/Qwen3#826).
    """
    # The largest numbers belong to the first token, whatever it is, and from there spoil all others.
    ids = torch.tensor([PROBE_IDS], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=1).logits
    if logits.isfinite().all():
        return
    problem = f"{path} 的中间结果超出 float16 的范围"
    if for_training:
        remedy = "请加 --fast_kernels false，用 float32 训练，或换一个模型"
        raise SystemExit(f"错误：{problem}；{remedy}。")
    print(f"提示：{problem}，改用 float32。", flush=True)
    model.float()
