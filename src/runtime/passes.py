"""The training pass as the machine can have it: compiled, in DDP, in the memory there is."""

import functools

import torch
import torch.nn as nn

from runtime import machine
from training import sharding


def prepare_pass(run, asked: bool | None) -> nn.Module:
    """Return what a step calls: the model, compiled if it can be, in DDP if there are others."""
    cfg, dist = run.cfg, run.dist
    if sharding.is_sharded(run.model):  # whose pieces leave holes in the heap: 0.9 GB of gpt2
        machine.keep_freed_memory(False)

    def wrap(model):
        alone = dist.world_size == 1 or sharding.is_sharded(run.model)
        return model if alone else sharding.replicate(model)

    if not cfg.compile:
        train_model = wrap(run.model)
        dist.work.watch(train_model, run.model)
        return train_model
    say = functools.partial(print, flush=True) if dist.is_main else lambda text: None
    while True:
        shape = cfg.micro_batch_size, cfg.seq_len + 1
        ids = torch.zeros(shape, dtype=torch.long, device=dist.device)
        try:
            passed = machine.compiled(run.model, ids, run.autocast, asked, wrap, say)
            break
        except RuntimeError as error:
            take_less_memory(run, error)
        machine.empty_cache(dist.device)
    run.optimizer.zero_grad(set_to_none=True)
    train_model, cfg.compile = passed
    dist.work.watch(train_model, run.model)
    return train_model


def take_less_memory(run, error: RuntimeError) -> None:
    """Go on with a smaller micro-batch after an out-of-memory; raise any other error again."""
    cfg, size = run.cfg, run.cfg.micro_batch_size
    if not machine.is_out_of_memory(error) or size == 1:
        raise error
    sequences = cfg.total_batch_size // cfg.seq_len // run.dist.world_size
    cfg.micro_batch_size = machine.smaller(size, sequences)
    asked = "micro_batch_size" in run.flags_ever_given
    run.config_to_save.setdefault("micro_batch_size", size if asked else None)
    machine.remember_shortage(run.model, run.dist.device, run.dtype, cfg.micro_batch_size)
    print(
        f"WARNING rank {run.dist.rank}: out of memory with --micro_batch_size {size}; "
        f"{cfg.micro_batch_size} from now on (same batch, same numbers)",
        flush=True,
    )
