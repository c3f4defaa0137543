"""Training of a model that is cut among the processes (--fsdp): what all of them must do together, and checkpoints that
are those of one process. Knows the Trainer, not how a model is cut."""

import contextlib
import os

import accelerate
import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from parts import memory, models, sharding
from parts.encoding import IGNORE_INDEX
from parts.packed_trainer import PackedTrainer
from parts.packing import split_batch, token_batches

ROOM = 1.2  # a model's bytes, to be asked: its weights, the cache of three replies


class Whole(torch.nn.Module):
    """Around a sharded model. What its `_wrap_model` gives back, Trainer neither moves, cuts nor wraps once more."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class ShardedTrainer(PackedTrainer):
    """PackedTrainer of a model after sharding.shard. Each forward and backward pass is one of all processes, which
    therefore take equally many; weights and states are gathered to be saved, so that a checkpoint can be asked, and
    continued from, with any number of processes, sharded or not."""

    def _move_model_to_device(self, model, device):
        """It is there."""

    def _wrap_model(self, model, training=True, dataloader=None):
        return model if isinstance(model, Whole) else Whole(model)

    def follow(self, plan) -> None:
        super().follow(plan)
        self.state_bytes = plan.parts["优化器"] * self.args.world_size  # a checkpoint has those of all

    # ---- passes -------------------------------------------------------------------------------------------------

    def between_passes(self, model):
        """Each pass reduces its gradients to this process's rows at once: whole ones would be as large as the model."""
        return contextlib.nullcontext()

    def parts_of(self, inputs) -> list[dict]:
        """As many as the process with the most has: the others add passes over two tokens of which none counts."""
        parts = split_batch(inputs, self.plan.batch_tokens)
        count = torch.tensor([len(parts)], device=self.args.device)
        missing = self.accelerator.gather(count).max().item() - len(parts)
        ids, positions = inputs["input_ids"][:, :2], inputs["position_ids"][:, :2]
        idle = {"input_ids": ids, "position_ids": positions, "lengths": (2,)}
        idle["labels"] = torch.full_like(ids, IGNORE_INDEX)
        return [idle] * missing + parts

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def evaluation_batches(self, dataset) -> list[list[int]]:
        """This process's share of the rows, and at its end as many empty batches as make all shares equally long."""
        world_size = self.args.world_size
        shares = [token_batches(dataset, rank, world_size, self.eval_tokens()) for rank in range(world_size)]
        mine = shares[self.args.process_index]
        return mine + [[]] * (max(map(len, shares)) - len(mine))

    def evaluate_rows(self, dataset, rows: list[int]) -> torch.Tensor:
        """Of no rows, [6, 0]; the forward pass is taken nevertheless."""
        found = super().evaluate_rows(dataset, rows or [0])
        return found if rows else found[:, :0]

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        self.reshard()
        return metrics

    def drop_gradients(self) -> None:
        self.reshard()
        super().drop_gradients()

    # ---- parts --------------------------------------------------------------------------------------------------

    def reshard(self) -> None:
        sharding.reshard(self.model)

    def local(self, p) -> torch.Tensor:
        return sharding.local(p)

    def gather(self) -> dict[str, torch.Tensor] | None:
        return sharding.gather(self.model, self.is_world_process_zero())

    def load(self, folder: str) -> None:
        sharding.load(self.model, folder)

    def gather_states(self) -> dict | None:
        return sharding.gather_states(self.optimizer, self.is_world_process_zero())

    def load_states(self, file: str) -> None:
        sharding.load_states(self.optimizer, file)

    def whole_bytes(self) -> int:
        return self.model.get_memory_footprint()

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def check_weights(self) -> None:
        sums = [self.local(p).sum(dtype=torch.float32) for p in self.model.parameters() if p.requires_grad]
        total = accelerate.utils.reduce(torch.stack(sums).sum())  # else only one process would stop
        self.check_finite({"weights": total.item()})

    def whole_model(self, base_path: str):
        """Read from the output folder, by one process, if its card has room for all of it."""
        args, size = self.args, self.whole_bytes()
        if size * (ROOM + 1 / args.world_size) > memory.free_here(args.device):  # beside this process's part
            print(f"示例回复：整个模型（{size / 1e9:.1f} GB）放不进一张卡，不生成；模型已经保存，可以分开来问。")
            return None
        if args.trains_adapter:
            return models.load(models.Trained(args.output_dir, args.model_name, base_path), args.device)[0]
        return models.load_weights(args.output_dir, args.device)

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        weights = self.gather()
        if self.args.should_save:
            self._save(output_dir, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = self.gather_states()
        if self.args.should_save:
            torch.save(states, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.load(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        self.load_states(os.path.join(checkpoint, OPTIMIZER_NAME))
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))
