"""Fully sharded data parallelism: parameters, gradients and moments shared out over the processes, by PyTorch's FSDP2.

A parameter is then a DTensor, of which each rank holds some of the rows in fp32. Forward and backward gather a unit's in the
compute dtype (each block is one, what remains of the model another) and drop it again; the sum of the micro-steps' gradients,
in fp32, is averaged and shared out by the last one. Outside of forward and backward there is nothing but the parts.
"""

import warnings
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.distributed import World

if TYPE_CHECKING:
    from nanogpt.model import GPT


def shard(model: "GPT", world: World, dtype: torch.dtype) -> None:
    """Leaves each rank its part of the parameters of rank 0, in place; ``model`` and its ``token_losses`` then are calls that
    all ranks make together.

    Args:
        model: on the device, its parameters frozen or not.
        world: of several processes.
        dtype: that of the model.

    Raises:
        ValueError: for a parameter with too few rows to give every rank some.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    for name, p in model.named_parameters():
        rows = -(-p.shape[0] // world.size)  # of a rank; the last one has what is left
        if rows * (world.size - 1) >= p.shape[0]:
            raise ValueError(f"fsdp=True: {name} of shape {tuple(p.shape)} cannot be shared out over {world.size} processes")
    for p in model.parameters():
        dist.broadcast(p.detach(), 0)
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for unit in (*model.transformer.h, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(model, "token_losses")
    set_training(model, True)
    # For the sake of what might change such a view in place, which nothing in the model does
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPBlock\) returned a view")


def set_training(model: "GPT", training: bool) -> None:
    """``model.train(training)``, sharded or not.

    In training, what the model gathers for itself, such as the embeddings, stays from forward to backward, which begins with
    it. An evaluation has no backward that drops it, and a save after that would find gathered weights in the compute dtype.
    """
    model.train(training)
    if hasattr(model, "set_reshard_after_forward"):
        model.set_reshard_after_forward(not training, recurse=False)


def is_sharded(t: Tensor) -> bool:
    return hasattr(t, "full_tensor")  # a DTensor, whose class takes a second to import


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in its memory; any other tensor as it is."""
    return t.to_local() if is_sharded(t) else t


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """All of a sharded tensor, on the device, which every rank must ask for together; any other tensor as it is."""
    return t.full_tensor() if is_sharded(t) else t


@torch.no_grad()
def assign(t: Tensor, values: Tensor) -> None:
    """Copies a whole tensor, from any device, into one that may be sharded."""
    if is_sharded(t):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(t.device), t.device_mesh, t.placements, src_data_rank=None)  # no communication
    t.copy_(values)
