"""A model of which each process holds a part (FSDP2, --fsdp), and its Trainer: what all processes do
together, and checkpoints that are those of one process. It knows torch's DTensors and the files of a
checkpoint, not how a loss is made."""

from pathlib import Path

import accelerate
import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from parts.model.encoding import IGNORE_INDEX
from parts.training.trainer import PackedTrainer


def shard(model, device: torch.device, world_size: int) -> None:
    """Let each of `world_size` processes keep its rows of every weight of `model`, on `device`; of a weight
    with few rows, some keep none. The model lies in the CPU's memory: one layer at a time is moved and cut,
    so that no device ever holds all of it.

    A layer is complete only while it is computed. What is no layer's, the last norm and the output layer,
    stays complete from the forward pass to the end of the backward one: the loss is made outside of the
    model, and takes the output layer's weight as it then stands there. So its gradient is added to where the
    embedding's is, if they are one weight, and is averaged over the processes with all others. An embedding
    of its own is complete only while it is looked up.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    names = model._no_split_modules  # of the layers' classes; transformers 5 has no public list
    layers = [module for module in model.modules() if type(module).__name__ in names]
    assert layers, names
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    # An embedding that is the output layer too has to last until the loss.
    if embedding.weight is not output.weight:
        layers.append(embedding)
    for module in layers:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def reshard(model) -> None:
    """Give up the weights that are still complete after a forward pass without a backward one: they would not
    follow what is then written into the parts, and are not what the functions below look for."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def cut(p: DTensor, tensor: torch.Tensor) -> DTensor:
    """Return `tensor`, which each process has and which has the shape of `p`, cut as `p` is, in memory of its
    own."""
    # Without a src_data_rank nothing is sent: each process takes its rows of what it has.
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def trained_of(model) -> dict[str, torch.nn.Parameter]:
    """Return the weights that are trained, by their names."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def collect(tensors: dict, first: bool) -> dict:
    """Return {name: tensor} with each DTensor as a complete one in the CPU's memory of the `first` process,
    and as None in the others; all call this together. Anything else stays as it is."""
    collected = dict(tensors)
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            # One after another, so that a device holds one complete tensor at a time.
            complete = value.detach().full_tensor()
            collected[name] = complete.cpu() if first else None
    return collected


def load(model, folder: str | Path) -> None:
    """Put the trained weights of a saved model or adapter into the parts, one weight after another. Raise
    AssertionError where one is missing."""
    # peft's files leave this part of an adapter's names out.
    missing = {name.replace(".default.", "."): p for name, p in trained_of(model).items()}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as saved:
            for name in missing.keys() & set(saved.keys()):
                p = missing.pop(name)
                p.detach().copy_(cut(p, saved.get_tensor(name)))
    assert not missing, (folder, sorted(missing))


def step_on_rows(optimizer) -> list[DTensor]:
    """Let `optimizer`, which has no states yet, step on this process's rows of its weights as plain tensors
    in the same memory. Return the weights, as its state_dict numbers them: through all groups.

    The arithmetic is the same. But each operation on a DTensor costs some 20 us of Python, and optimizers'
    kernels do not know them.
    """
    weights, rows = [], []
    for group in optimizer.param_groups:
        weights += group["params"]
        group["params"] = [torch.nn.Parameter(p.detach().to_local()) for p in group["params"]]
        rows += group["params"]

    def lend_gradients(*_) -> None:
        for weight, own in zip(weights, rows):
            own.grad = None if weight.grad is None else weight.grad.to_local()

    optimizer.register_step_pre_hook(lend_gradients)
    # Else they would live on when the weights' gradients are dropped.
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    return weights


def gather_states(optimizer, weights: list[DTensor], first: bool) -> dict:
    """Return the optimizer's state_dict as one process would have it, in the CPU's memory of the `first` one;
    without tensors elsewhere. So any number of processes can go on from it, sharded or not. `weights` are
    those that `step_on_rows` returned."""
    states = optimizer.state_dict()
    gathered = {}
    for i, state in states["state"].items():
        p, state = weights[i], dict(state)
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == p.to_local().shape:
                cut_as = (p.device_mesh, p.placements)
                state[name] = DTensor.from_local(value, *cut_as, shape=p.shape, stride=p.stride())
        gathered[i] = collect(state, first)
    return states | {"state": gathered}  # a new dict: state_dict() gives the optimizer's own


def load_states(optimizer, weights: list[DTensor], file: str | Path) -> None:
    """Put the states of a file, which are those of complete weights, into the optimizer of the parts: what
    has the shape of its weight is cut as the weight is. `weights` are those that `step_on_rows` returned."""
    # Mapped, as all states together are larger than the model.
    states = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    for i, state in states["state"].items():
        for name, value in state.items():
            # A copy in any case: a mapped file would stay on the disk when it is deleted.
            if isinstance(value, torch.Tensor):
                whole = value.shape == weights[i].shape
                state[name] = cut(weights[i], value).to_local() if whole else value.clone()
    optimizer.load_state_dict(states)


class Unwrapped(torch.nn.Module):
    """It stands around a sharded model where Trainer expects DistributedDataParallel: what `_wrap_model`
    gives back Trainer neither moves, cuts nor wraps once more. It has no `no_sync`: each pass reduces its
    gradients to this process's rows at once, as complete ones would be as large as the model."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class ShardedTrainer(PackedTrainer):
    """It is the PackedTrainer of a model after `shard`. Each forward and backward pass is one of all
    processes, which therefore take equally many; weights and states are gathered to be saved, so that a
    checkpoint can be asked, and continued from, with any number of processes, sharded or not."""

    def _move_model_to_device(self, model, device):
        """Do nothing: `shard` has moved it."""

    def _wrap_model(self, model, training=True, dataloader=None):
        return model if isinstance(model, Unwrapped) else Unwrapped(model)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.weights = step_on_rows(super().create_optimizer(model))
        return self.optimizer

    def passes_of(self, inputs) -> list[dict]:
        """Split the batch into as many passes as the process with the most has: the others add passes over
        two tokens of which none counts."""
        passes = super().passes_of(inputs)
        count = torch.tensor([len(passes)], device=self.args.device)
        missing = self.accelerator.gather(count).max().item() - len(passes)
        # Two, as a token's label is looked for at the token before it.
        input_ids, position_ids = inputs["input_ids"][:, :2], inputs["position_ids"][:, :2]
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        idle = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "lengths": (2,)}
        return [idle] * missing + passes

    def drop_gradients(self) -> None:
        reshard(self.model)
        super().drop_gradients()

    def evaluation_batches(self, dataset) -> list[list[int]]:
        """Return this process's share of the rows, and at its end as many empty batches as make all shares
        equally long."""
        own = super().evaluation_batches(dataset)
        counts = accelerate.utils.gather_object([len(own)])
        return own + [[]] * (max(counts) - len(own))

    def evaluate_rows(self, dataset, rows: list[int]) -> torch.Tensor:
        """Return [6, rows] as PackedTrainer does. For an empty batch the forward pass of row 0 is taken
        nevertheless, as all processes take it together, and [6, 0] returned."""
        sums = super().evaluate_rows(dataset, rows or [0])
        reshard(self.model)
        return sums[:, : len(rows)]

    def parts(self) -> list[torch.Tensor]:
        return [p.detach().to_local() for p in trained_of(self.model).values()]

    def gather(self) -> dict[str, torch.Tensor | None]:
        return collect(trained_of(self.model), self.is_world_process_zero())

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        weights = self.gather()
        if self.args.should_save:
            self._save(output_dir, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = gather_states(self.optimizer, self.weights, self.is_world_process_zero())
        if self.args.should_save:
            torch.save(states, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        load(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint:
            load_states(self.optimizer, self.weights, Path(checkpoint, OPTIMIZER_NAME))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
