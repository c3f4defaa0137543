"""Training with DeepSpeed's engine (--deepspeed). Knows when the engine computes, adds up and steps, not what it
does."""

import contextlib

import torch

from parts import sharding, zero
from parts.sharded_trainer import ShardedTrainer, Whole


class WithLoss(Whole):
    """The loss is made inside of what the engine calls: so the output layer's weight is whole until the loss is there,
    and again in the backward pass when its gradient comes."""

    def __init__(self, model, losses):
        super().__init__(model)
        self.losses = losses

    def forward(self, inputs):
        return self.losses(self.module, inputs)


class ZeroTrainer(ShardedTrainer):
    """ShardedTrainer of a model after zero.shard, which gave `config`."""

    engine = None  # once there is something to compute
    groups: list[list]  # of the optimizer's parameters, as one process's has them; the engine puts its own there

    def __init__(self, *args, config: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.config = config

    def follow(self, plan) -> None:
        super().follow(plan)
        each = 2 * 4 + 4 * (plan.optimizer == "cpu")
        self.state_bytes = each * sum(p.ds_numel for p in sharding.trained_of(self.model).values())

    def trained_bytes(self) -> int:
        return sum(map(zero.size, sharding.trained_of(self.model).values()))

    def whole_bytes(self) -> int:
        return sum(map(zero.size, self.model.parameters()))

    # ---- passes -------------------------------------------------------------------------------------------------

    def begin(self):
        """The engine; all processes make it together."""
        if self.engine is None:
            deepspeed, optimizer = zero.start(self.args.device), self.create_optimizer()
            groups = list(optimizer.param_groups)
            self.groups = [list(group["params"]) for group in groups]
            whole = WithLoss(self.model, super().supervised_losses)
            deepspeed.zero.register_external_parameter(whole, self.model.get_output_embeddings().weight)
            self.engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=self.config)
            optimizer.param_groups[:] = groups  # those without parameters, which come last, were dropped
        return self.engine

    def _wrap_model(self, model, training=True, dataloader=None):
        return self.begin().module  # accelerate would ask the engine for what it does not do

    def supervised_losses(self, model, inputs):
        self.begin().train(self.model.training)
        return self.engine(inputs)

    @contextlib.contextmanager
    def between_passes(self, model):
        self.begin().set_gradient_accumulation_boundary(False)
        yield
        self.engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)

    def drop_gradients(self) -> None:
        super().drop_gradients()
        if self.engine is not None:
            self.engine.optimizer.zero_grad()  # the next pass does not add to theirs

    def _clip_grad_norm(self, model) -> None:
        """The engine does, as it steps."""

    def _get_grad_norm(self, model, grad_norm=None) -> float:
        """Of the step, which is taken here: the optimizer that Trainer steps is left without parameters."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else float("inf")

    # ---- parts --------------------------------------------------------------------------------------------------

    def reshard(self) -> None:
        """What an evaluation has left whole would not follow what is then loaded."""
        if self.engine is not None:
            self.engine.optimizer.empty_partition_cache()

    def local(self, p) -> torch.Tensor:
        return zero.local(p)

    def gather(self):
        return zero.gather(self.model, self.is_world_process_zero())

    def load(self, folder) -> None:
        zero.load(self.model, folder, self.engine is not None)

    def gather_states(self):
        return zero.gather_states(self.engine.optimizer.optimizer, self.groups, self.is_world_process_zero())

    def load_states(self, file: str) -> None:
        zero.load_states(self.engine, self.groups, file)
