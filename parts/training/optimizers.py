"""AdamW for weights of few bits: Kahan sums, 8-bit states, and the step inside the backward pass. It knows
bytes and gradients, not when which optimizer is worth it."""

import torch

# For bfloat16 weights: bytes of state for each trained weight, and the plan's name for it. With Kahan sums
# these are two moments and the lost part, 2 bytes each; with 8 bits two moments of one byte each, and their
# scales.
OPTIMIZERS = {
    "kahan": (6, "AdamW，Kahan 求和"),
    "8bit": (2.04, "8 位 AdamW，随机舍入"),
    "8bit_in_backward": (2.04, "8 位 AdamW，随机舍入，在反向传播中更新，不存也不裁剪梯度"),
    "adamw": (None, "torch 自带的 AdamW"),  # two moments, each as large as the weight
}


def state_bytes(trained: list, optimizer: str) -> float:
    """Return the bytes of the optimizer's states for the trained weights."""
    bytes_per_weight, _ = OPTIMIZERS[optimizer]
    if bytes_per_weight is None:
        return 2 * sum(p.nbytes for p in trained)
    return bytes_per_weight * sum(p.numel() for p in trained)


def pick(name: str, triton: bool, **common):
    """Return (optimizer class, its arguments) by its name, or None for torch's own. `triton` asks for its
    kernel, where there is one; `common` has lr, betas and eps, which all of them take.

    A bfloat16 weight has 8 significant bits: added to it, an update smaller than 1/512 of it is rounded away,
    and at a learning rate of 1e-5 nearly all are. Kahan summation keeps the lost part, 2 bytes a parameter,
    for later steps; stochastic rounding rounds up as often as the lost part is large, so that on average
    nothing is lost.
    """
    if name == "adamw":
        return None
    if name == "kahan":
        import optimi

        # Without its kernel it steps one tensor at a time: foreach would hold copies of all at once.
        return optimi.AdamW, common | {"foreach": False, "triton": triton}
    assert name.startswith("8bit"), name
    # Imported here: it is optional, and its import starts CUDA.
    from torchao.optim import AdamW8bit

    return AdamW8bit, common | {"bf16_stochastic_round": True}


def deviation(name: str, device: torch.device, triton: bool) -> float:
    """Return how far from AdamW's way 16 steps with constant gradients end, relative to it: by its formula
    each is lr long. What Kahan sums keep for later steps counts. It is some 0.2 where bfloat16 rounds what
    is lost away, as its numbers from 1 to 2 stand 0.0078 apart."""
    lr, steps = 0.01, 16
    generator = torch.Generator().manual_seed(0)
    start = (1 + torch.rand(64, 256, generator=generator)).to(device, torch.bfloat16)
    gradient = torch.rand(64, 256, generator=generator) + 0.5
    gradient *= torch.randint(2, gradient.shape, generator=generator) * 2 - 1
    weight, gradient = torch.nn.Parameter(start.clone()), gradient.to(start)
    cls, options = pick(name, triton, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    optimizer = cls([weight], weight_decay=0.0, **options)
    for _ in range(steps):
        weight.grad = gradient.clone()
        optimizer.step()
    end = weight.detach().float() + optimizer.state[weight].get("kahan_comp", 0.0)
    missing = 1 - (start.float() - end) * gradient.sign() / (steps * lr)  # of each weight's way
    # What is rounded at random is right on the average only.
    return missing.square().mean().sqrt().item() if name == "kahan" else abs(missing.mean().item())


def step_in_backward(model, get_optimizer) -> list:
    """Update each trained weight as soon as its gradient is there, and drop the gradient: they never exist
    all at once. Return the hooks that do so. Where `get_optimizer()` is None, in a rehearsal, they only drop
    gradients.

    Only one weight has a gradient whenever the optimizer steps, so it is that one's step; Trainer's own step
    finds no gradient. Clipping by the norm of all gradients is not possible, nor is a step of several
    backward passes.
    """

    def step(weight) -> None:
        optimizer = get_optimizer()
        if optimizer is not None:
            # accelerate's wrapper around it would look for a package on the disk at each step.
            getattr(optimizer, "optimizer", optimizer).step()
        weight.grad = None

    return [p.register_post_accumulate_grad_hook(step) for p in model.parameters() if p.requires_grad]
