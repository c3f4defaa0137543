"""A model of which each process holds a part (FSDP2): cut, gathered, read and written as if it were whole, and the
states of its optimizer with it. Knows torch's DTensors and the files of a checkpoint; no Trainer and no loss."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from parts import checkpoints

ADAPTER = ".default."  # in the name of an adapter's weight; peft's files leave it out


def shard(model, device: torch.device, world_size: int) -> None:
    """Let each of `world_size` processes keep its rows of every weight of `model`, on `device`; of a weight with
    few rows, some keep none. The model lies in the CPU's memory: one layer at a time is moved and cut, so that no
    device ever holds all of it.

    A layer is whole only while it is computed. What is no layer's, the last norm and the output layer, stays whole from
    the forward pass to the end of the backward one: the loss is made outside of the model, and takes the output layer's
    weight as it then stands there. So its gradient is added to where the embedding's is, if they are one weight, and is
    averaged over the processes with all others. An embedding of its own is whole only while it is looked up.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert layers, model._no_split_modules
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    for module in layers if embedding.weight is output.weight else (*layers, embedding):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def reshard(model) -> None:
    """Give up the weights that are still whole after a forward pass without a backward one: they would not follow what
    is then written into the parts, and are not what the functions below look for."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(p: torch.Tensor) -> torch.Tensor:
    """This process's rows of a weight or of its gradient; they share their memory with it."""
    return p.detach().to_local() if isinstance(p, DTensor) else p.detach()


def rows_of(p: DTensor, whole):
    """Those of `whole`, a tensor or a slice of a file of the shape of `p`, that this process has of `p`."""
    first = min(p.shape[0], p.device_mesh.get_local_rank() * -(-p.shape[0] // p.device_mesh.size()))
    return whole[first : first + len(local(p))]


def distribute(p: DTensor, rows: torch.Tensor) -> DTensor:
    """The tensor like `p` of which this process has these rows."""
    return DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def trained_of(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def collect(value, first: bool):
    """A DTensor whole and in the CPU's memory, where this is the `first` process; all call this together. Anything else
    as it is."""
    if not isinstance(value, DTensor):
        return value
    whole = value.detach().full_tensor()
    return whole.cpu() if first else None


def gather(model, first: bool) -> dict[str, torch.Tensor] | None:
    """{name: trained weight} in the CPU's memory of the `first` process, one weight after another; None elsewhere."""
    found = {name: collect(p, first) for name, p in trained_of(model).items()}
    return found if first else None


def saved_weights(model, folder: str | Path):
    """(trained weight, slice of a file that has it) of a saved model or adapter."""
    adapter = Path(folder, "adapter_model.safetensors")
    files = [adapter] if adapter.is_file() else [Path(folder, name) for name in checkpoints.weight_files(Path(folder))]
    missing = {name.replace(ADAPTER, "."): p for name, p in trained_of(model).items()}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in missing.keys() & set(weights.keys()):
                yield missing.pop(name), weights.get_slice(name)
    assert not missing, (folder, sorted(missing))


def load(model, folder: str | Path) -> None:
    """Put the trained weights of a saved model or adapter into the parts: each process reads its own rows."""
    for p, saved in saved_weights(model, folder):
        local(p).copy_(rows_of(p, saved))


def gather_states(optimizer, first: bool) -> dict | None:
    """The optimizer's state_dict as one process would have it, in the CPU's memory of the `first` one; None elsewhere.
    So any number of processes can go on from it, sharded or not."""
    states = optimizer.state_dict()
    whole = {i: {name: collect(value, first) for name, value in state.items()} for i, state in states["state"].items()}
    return states | {"state": whole} if first else None


def load_states(optimizer, file: str | Path) -> None:
    """Put the states of a file, which are those of whole weights, into the optimizer of the parts: what is as large as
    its weight is cut as the weight is, and only these rows are read."""
    states = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in states["state"].items():
        p = weights[i]
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if isinstance(p, DTensor) and value.shape == p.shape:
                state[name] = distribute(p, rows_of(p, value).to(p.device, copy=True))
            else:  # a copy, too: the file is mapped, and would stay on the disk when it is deleted
                state[name] = value.clone()
    optimizer.load_state_dict(states)
