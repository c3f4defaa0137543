"""AdamW for weights of few bits: Kahan sums, 8-bit states, and the step inside the backward pass. Knows bytes and
gradients, not when which optimizer is worth it."""

OPTIMIZERS = {  # of bfloat16 weights: bytes of state for each trained one, and what the plan says of it
    "kahan": (6, "AdamW，Kahan 求和"),
    "8bit": (2.04, "8 位 AdamW，随机舍入"),
    "8bit_in_backward": (2.04, "8 位 AdamW，随机舍入，在反向传播中更新，不存也不裁剪梯度"),
    "optim": (None, "由 --optim 指定，默认 AdamW"),  # of AdamW two states, each as large as the weight
}


def state_bytes(trained: list, optimizer: str) -> float:
    """Bytes of the optimizer's states for the trained weights."""
    each, _ = OPTIMIZERS[optimizer]
    return sum(2 * p.nbytes for p in trained) if each is None else each * sum(p.numel() for p in trained)


def pick(name: str, args, triton: bool):
    """(optimizer class, its arguments) by its name, or None: what --optim says. `triton`: whether Triton runs here.
    Raises SystemExit without torchao.

    A bfloat16 weight has 8 significant bits: added to it, an update smaller than 1/512 of it is rounded away, and at a
    learning rate of 1e-5 nearly all are. Kahan summation keeps the lost part, 2 bytes a parameter, for later steps;
    stochastic rounding rounds up as often as the lost part is large, so that on average nothing is lost.
    """
    if name == "optim":
        return None
    common = dict(lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    if name == "kahan":
        import optimi

        # Without its kernel one tensor at a time: foreach would hold copies of all weights and states at once.
        return optimi.AdamW, common | {"foreach": False, "triton": triton}
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise SystemExit(f"错误：--optimizer {name} 要用 torchao；请先运行 pip install torchao") from None
    return AdamW8bit, common | {"bf16_stochastic_round": True}


def step_in_backward(optimizer) -> list:
    """Update each weight as soon as its gradient is there, and drop the gradient: they never exist all at once.

    Only one weight has a gradient whenever the optimizer steps, so it is that one's step; Trainer's own finds none.
    Clipping by the norm of all gradients is not possible, nor is a step of several backward passes. Returns the hooks.
    """

    def step(weight) -> None:
        optimizer.step()
        weight.grad = None

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [weight.register_post_accumulate_grad_hook(step) for weight in weights]
