"""One model over several processes: every process has all of it (DDP), or a share (FSDP2).

The one place where the two differ. A sharded tensor is a DTensor: rows of it are here, the rest is
in the other processes. `local` is what is here, `whole` puts it together, and every process must
call that; both leave a plain tensor as it is, so that who calls them need not know which it has.
"""

import contextlib

import torch
import torch.distributed
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def replicate(model: nn.Module) -> nn.Module:
    """A training pass whose gradients are averaged over all processes while it runs."""
    # No static_graph: it cannot begin inside no_sync (gradient accumulation), LAB_NOTES.md.
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard(model: nn.Module) -> None:
    """Leave this process its share of every tensor of a GPT: weights, and what the optimizer and
    the backward pass make of them. A block is put together when its turn comes. Rank 0's weights
    count."""
    for p in model.parameters():
        torch.distributed.broadcast(p.data, src=0)
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model, reshard_after_forward=False)  # its backward pass begins at once
    # For who calls it from outside. From `forward` it would let go of the root's weights too early,
    # and the backward pass would gather them again.
    register_fsdp_forward_method(model, "features")


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def synchronising(train_model: nn.Module, last: bool):
    """Gradients of the passes within are summed over processes in the last one only."""
    if isinstance(train_model, FSDPModule):
        train_model.set_requires_gradient_sync(last)
        yield
    elif last or not isinstance(train_model, nn.parallel.DistributedDataParallel):
        yield
    else:
        with train_model.no_sync():
            yield


@contextlib.contextmanager
def put_together(model: nn.Module):
    """All of the model's weights are here: each process may run it alone, as often as it likes."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of it is in this process; changed in place, the tensor is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_part_of(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, laid out as `like` is, of which `tensor` is what is in this process."""
    if not isinstance(like, DTensor):
        return tensor
    return DTensor.from_local(
        tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def shared_out(tensor: torch.Tensor, like: torch.Tensor, source: int) -> torch.Tensor:
    """The tensor that rank `source` has, on all ranks and laid out as `like` is; elsewhere only its
    shape and dtype count."""
    if torch.distributed.get_rank() == source:
        tensor = tensor.to(like.device).contiguous()
    else:
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=like.device)
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=source)
    torch.distributed.broadcast(tensor, src=source)
    return tensor


def gathered(model: nn.Module, optimizer: dict, keep: bool) -> tuple[dict, dict]:
    """The state dicts of a sharded model and its optimizer with whole tensors, in the memory of the
    host; every process must call it, those that do not `keep` them get None for each tensor."""

    def on_host(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = whole(value.detach())
        return value.cpu() if keep else None

    by_id = {id(p): on_host(p) for p in model.parameters()}  # tied ones once
    weights = {n: by_id[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    moments = {
        i: {name: on_host(value) for name, value in of_one.items()}
        for i, of_one in optimizer["state"].items()
    }
    return weights, optimizer | {"state": moments}


def all_finite(params, dist) -> bool:
    """Return whether all weights are finite, on all ranks if they are sharded: all must ask."""
    bad = not all(local(p).isfinite().all() for p in params)
    sharded = any(isinstance(p, DTensor) for p in params)
    return not (dist.any(bad) if sharded else bad)
