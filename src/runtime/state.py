"""What survives a stop: the train state, what is in a checkpoint, and how it comes back.

`run` is train_improved.Run.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpointing import files
from monitoring import health
from tokens import tokenizer
from training import sharding


@dataclass
class TrainState:
    """All that a resume needs beside weights, optimizer and random numbers; plain values only."""

    step: int = 0  # finished updates
    position: int = 0  # windows of this training data consumed
    tokens: int = 0  # in the finished updates, of whatever batch size and data
    evaluated_step: int = -1  # last step whose evaluation is complete and logged
    validation_loss: float = math.inf  # of the last evaluation
    best_loss: float = math.inf
    hellaswag: float = -1.0  # accuracy at the last evaluation, -1 = never scored
    recent_losses: list = dataclasses.field(default_factory=list)  # the guard's window
    consecutive_skips: int = 0
    skipped_updates: int = 0
    rollbacks: int = 0
    train_seconds: float = 0.0  # in training steps, over all restarts
    total_seconds: float = 0.0  # since the very first start, while a process was running
    device_seconds: float = 0.0  # the same times the number of processes
    watt_seconds: float = 0.0  # energy of the devices, where they report it
    changes: list = dataclasses.field(default_factory=list)  # by resumes, that changed learning
    health_memory: dict = dataclasses.field(default_factory=health.new_memory)
    health_seconds: dict = dataclasses.field(default_factory=health.new_time_memory)


def checkpoint_of(run) -> dict:
    """Return what a checkpoint file holds: tensors and plain values, for weights_only=True.

    Of a sharded model every rank must ask for it, and rank 0 gets it.
    """
    weights, optimizer = run.model.state_dict(), run.optimizer.state_dict()
    if sharding.is_sharded(run.model):
        weights, optimizer = sharding.gathered(run.model, optimizer, run.dist.is_main)
    rng = {"cpu": torch.get_rng_state()}
    if run.dist.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state()
    return {
        "model": weights,
        "optimizer": optimizer,
        "step": run.state.step,
        "config": dataclasses.asdict(run.cfg) | run.config_to_save,
        "asked": sorted(run.flags_ever_given),
        "state": dataclasses.asdict(run.state),
        "rng": rng,
        "loss_scale": [run.loss_scale.scale, run.loss_scale.good_steps],
        "data": {"fingerprint": run.train_data.fingerprint, "tokens": run.train_data.num_tokens},
        "tokenizer": tokenizer.fingerprint(),
        "machine": {"device_type": run.dist.device.type, "world_size": run.dist.world_size},
        "run_name": run.cfg.run_name,
    }


def info_of(run, evaluated: bool) -> dict:
    """Return what a list of checkpoints shows of one, without reading its tensors."""
    return {
        "step": run.state.step,
        "val_loss": run.state.validation_loss if evaluated else None,
        "data": f"{run.train_data.fingerprint} {run.cfg.val_tokens}",  # the loss is of
    }


def restore(run, checkpoint: dict) -> None:
    """Put a loaded checkpoint into the model, optimizer, random numbers and state of the run.

    Raise ValueError if it does not fit.
    """
    try:
        _restore(run, checkpoint)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{run.resumed_from} does not fit this program: {reason}") from None


def _restore(run, checkpoint: dict) -> None:
    vars(run.state).update(vars(state_of(checkpoint, run.cfg, run.train_data)))
    run.state.changes += [change for change in run.changes if change not in run.state.changes]

    def here(tensor, like):
        if run.dist.world_size == 1 or not isinstance(tensor, torch.Tensor):
            return tensor
        return sharding.shared_out(tensor, like, checkpoint["read_by"])

    names = dict(run.model.named_parameters(remove_duplicate=False))
    weights = {name: here(t, names.get(name)) for name, t in checkpoint["model"].items()}
    run.model.load_state_dict(weights)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups]
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    moments = {
        i: {name: here(t, params[i]) for name, t in of_one.items()}
        for i, of_one in checkpoint["optimizer"]["state"].items()
    }
    run.optimizer.load_state_dict(checkpoint["optimizer"] | {"state": moments})
    for group, ours in zip(run.optimizer.param_groups, groups, strict=True):
        counted = {name: group[name] for name in ("lr", "updates") if name in group}
        group |= ours | counted  # flags of this command win over what was saved
    device = run.dist.device
    run.loss_scale.scale, run.loss_scale.good_steps = (
        t.to(device, copy=True) for t in checkpoint["loss_scale"]
    )
    # Copies, here too: a tensor of the mapped file would hold its disk space until we end.
    for of_one in run.optimizer.state.values() if device.type == "cpu" else ():
        of_one |= {k: v.clone() for k, v in of_one.items() if isinstance(v, torch.Tensor)}
    torch.set_rng_state(checkpoint["rng"]["cpu"].cpu())
    if device.type == "cuda" and "cuda" in checkpoint["rng"]:
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"].cpu())


def state_of(checkpoint: dict, cfg, train_data) -> TrainState:
    """Return what is past. What was found on other data than this run's begins anew."""
    saved = {"tokens": checkpoint["step"] * checkpoint["config"]["total_batch_size"]}
    saved |= checkpoint["state"]  # in older ones without "tokens"
    state = TrainState()
    for name, value in vars(state).items():
        if name.startswith("health_"):  # of another version, or forged: what is known counts
            setattr(state, name, value | saved.get(name, {}))
        else:
            setattr(state, name, saved.get(name, value))
    if checkpoint["config"]["val_tokens"] != cfg.val_tokens:
        state.best_loss = math.inf
    if checkpoint["data"]["fingerprint"] != train_data.fingerprint:
        state.position, state.recent_losses = 0, []
        state.validation_loss = state.best_loss = math.inf
        state.health_memory = health.new_memory()
    return state


def make_moments(run) -> None:
    """Let the optimizer make its moments, by an update that is skipped on the device: what a
    checkpoint will hold is known before the first step."""
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.found_inf = torch.ones((), device=run.dist.device)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


CHECKPOINT_LAYOUT = {
    **{"model": dict, "optimizer": dict, "step": int, "run_name": str, "tokenizer": str},
    **{"asked": [str], "state": TrainState, "loss_scale": [torch.Tensor]},
    "rng": {"cpu": torch.Tensor},
    "data": {"fingerprint": str, "tokens": int},
    "machine": {"device_type": str, "world_size": int},
}


def load_checkpoint(path: Path, config_class: type) -> dict:
    """Return a verified checkpoint of this program, on the CPU, or raise ValueError."""
    checkpoint = files.load(path)
    files.check_layout(path, checkpoint, CHECKPOINT_LAYOUT | {"config": config_class})
    # Before a model of that size is built: the weights are what the configuration says.
    weights, config = checkpoint["model"], checkpoint["config"]
    shapes = [getattr(weights.get(f"transformer.{n}.weight"), "shape", ()) for n in ("wte", "wpe")]
    layers = sum(str(name).endswith(".ln_1.weight") for name in weights)
    there = [*shapes[0][1:], *shapes[1][:1], layers]
    if there != [config.get(name) for name in ("n_embd", "seq_len", "n_layer")]:
        raise ValueError(f"{path} is no checkpoint of this program: its weights have other shapes")
    if checkpoint["tokenizer"] != tokenizer.fingerprint():
        raise ValueError(
            f"{path} was trained with tokenizer {checkpoint['tokenizer']}, this installation has "
            f"{tokenizer.fingerprint()}: its token ids would mean other text"
        )
    return checkpoint


def read_checkpoint(dist, path: Path, rank: int, config_class: type) -> dict:
    """Return what is in a checkpoint, on all ranks. `rank` reads it; on the others the large
    tensors, which they get from it when they are restored, are but shapes (`meta`)."""
    checkpoint = {}

    def read():
        checkpoint.update(load_checkpoint(path, config_class))
        large = ("model", "optimizer") if dist.world_size > 1 else ()
        shapes = {k: files.map_tensors(checkpoint[k], lambda t, _: t.to("meta")) for k in large}
        return checkpoint | shapes

    everyones = dist.on_rank(rank, read)
    return everyones | checkpoint | {"read_by": rank}
