"""Where a model's weights are: whole in each process, or cut among them, by --fsdp or --deepspeed; and the Trainer that
goes with it."""

from functools import partial

from parts import sharding, zero
from parts.packed_trainer import PackedTrainer
from parts.sharded_trainer import ShardedTrainer
from parts.zero_trainer import ZeroTrainer


def place(model, args):
    """(what makes the Trainer, a model whose sizes are those of the whole one), once the model is where `args` want
    it."""
    if args.deepspeed:
        outline = zero.outline(model)
        return partial(ZeroTrainer, config=zero.shard(model, args.device, args.world_size, args.max_grad_norm)), outline
    if args.fsdp:
        sharding.shard(model, args.device, args.world_size)
        return ShardedTrainer, model
    return PackedTrainer, model
