"""A model of which each process holds a part, by DeepSpeed's ZeRO-3: cut, gathered, read and written as if it were
whole, and the states of its optimizer with it, which lie in the CPU's memory. Knows deepspeed and the files of a
checkpoint; no Trainer and no loss."""

import copy
import itertools
import logging
import os
import warnings

import psutil
import torch

from parts import memory, sharding

CPU_BYTES = 18  # of the CPU's memory for each trained weight: float32 weight, gradient and two states, summed gradient
SAVED_BYTES = 12  # and, in the first process, while a checkpoint is written: weight and states, gathered
STATES = ("exp_avg", "exp_avg_sq")
MASTER = "master"  # the float32 weight in a checkpoint, where the model's is of fewer bits


def start(device: torch.device):
    """The package, quiet. The processes are a group already, which it joins."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import has set it
    # torch has other names for what it calls, and says so at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(verbose=False)
    return deepspeed


def configure(model, max_grad_norm: float, pin: bool) -> dict:
    """What is whole at once on a card is what sharding.shard keeps whole: the output layer, one decoder layer as it is
    computed and one on its way, and as much of gradients. Of a model that is not cut yet."""
    output = model.get_output_embeddings().weight
    layer = max(1, sum(p.numel() for p in memory.inner_weights(model)) // model.config.num_hidden_layers)
    return {
        "train_micro_batch_size_per_gpu": 1,  # not looked at: a step ends where it is told
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": None,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "zero_force_ds_cpu_optimizer": False,  # its own would be compiled; torch's fused AdamW runs on CPUs, too
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": pin},
            "overlap_comm": pin,
            "reduce_bucket_size": layer,
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": output.numel() + 2 * layer,
            "stage3_max_reuse_distance": 0,  # given up as soon as it is computed
            "stage3_param_persistence_threshold": 0,
        },
    }


def shard(model, device: torch.device, world_size: int, max_grad_norm: float) -> dict:
    """Let each process keep its part of every weight of `model`, on `device`; one weight at a time is moved there whole
    and cut. The configuration for the engine. Raises SystemExit where the CPU's memory does not hold the optimizer."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = CPU_BYTES * trained / world_size * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed += SAVED_BYTES * trained * (os.environ.get("GROUP_RANK", "0") == "0")
    if needed > (free := psutil.virtual_memory().available):
        raise SystemExit(
            f"错误：--deepspeed 把优化器放在 CPU 的内存里，这台机器上要 {needed / 1e9:.1f} GB，空闲的只有 "
            f"{free / 1e9:.1f} GB；请用更多的机器，或改用 --fsdp true。"
        )
    config = configure(model, max_grad_norm, pin=device.type == "cuda")
    start(device).zero.Init(module=model, config_dict_or_path=config, dtype=model.dtype)
    model.to(device)  # its buffers
    return config


def outline(model):
    """A copy without weights, for which a cut model's sizes can be asked."""
    empty = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def size(p) -> int:
    """Bytes of the whole weight, which torch takes for empty."""
    return p.ds_numel * p.itemsize


def local(p) -> torch.Tensor:
    """This process's numbers of a weight, without those that make all parts equally long."""
    part = p.ds_tensor.numel()
    return p.ds_tensor[: max(0, min(part, p.ds_numel - torch.distributed.get_rank() * part))]


def cut(p, whole: torch.Tensor) -> torch.Tensor:
    """Those of `whole`, as long as every other process's, in their own memory."""
    part, rank = p.ds_tensor.numel(), torch.distributed.get_rank()
    mine = whole.flatten()[rank * part : (rank + 1) * part]
    return torch.nn.functional.pad(mine, (0, part - len(mine))).clone()


def gather(model, first: bool) -> dict[str, torch.Tensor] | None:
    """{name: trained weight} in the CPU's memory of the `first` process, one weight after another; None elsewhere."""
    import deepspeed

    found = {}
    for name, p in sharding.trained_of(model).items():
        with deepspeed.zero.GatheredParameters([p]):
            found[name] = p.detach().to("cpu", copy=True) if first else None
    return found if first else None


def load(model, folder, begun: bool) -> None:
    """Put the trained weights of a saved model or adapter into the parts, and where the engine has `begun` into its
    optimizer."""
    from deepspeed.utils import safe_set_local_fp32_param

    for p, whole in sharding.saved_weights(model, folder):
        p.ds_tensor.copy_(mine := cut(p, whole[:]))
        if begun:
            safe_set_local_fp32_param(p, mine.float())


def gather_states(optimizer, groups: list[list], first: bool) -> dict | None:
    """The state_dict of one process's AdamW, whose parameters were in these `groups`, in the CPU's memory of the
    `first` process; None elsewhere. Where the model's weights are of fewer bits than float32, those are there too."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states, step = {}, next(iter(optimizer.state.values()))["step"]
    for i, p in enumerate(p for group in groups for p in group):
        state = {name: safe_get_full_optimizer_state(p, name) for name in STATES}
        state |= {} if p.dtype == torch.float32 else {MASTER: safe_get_full_fp32_param(p)}
        if first:
            states[i] = {"step": step.clone()} | {name: value.to("cpu", copy=True) for name, value in state.items()}
    numbers = iter(range(len(states)))
    param_groups = [
        options | {"params": list(itertools.islice(numbers, len(group)))}
        for group, options in zip(groups, optimizer.param_groups, strict=True)
    ]
    return {"state": states, "param_groups": param_groups} if first else None


def load_states(engine, groups: list[list], file: str) -> None:
    """Put the states of a file, which are those of whole weights, into the engine's optimizer."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    states = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    optimizer = engine.optimizer.optimizer
    for group, saved in zip(optimizer.param_groups, states["param_groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})
    step = next(iter(states["state"].values()))["step"]
    for flat in engine.optimizer.fp32_partitioned_groups_flat:  # of which AdamW makes states at its first step only
        optimizer.state[flat] = {"step": step.clone()} | {name: torch.zeros_like(flat) for name in STATES}
    for i, p in enumerate(p for group in groups for p in group):
        for name in STATES:
            safe_set_local_optimizer_state(p, cut(p, states["state"][i][name]), name)
        if MASTER in states["state"][i]:
            safe_set_local_fp32_param(p, cut(p, states["state"][i][MASTER]))
