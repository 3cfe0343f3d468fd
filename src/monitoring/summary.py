"""What a run says about itself: the plan before it, its record on disk, the last words.

`run` is train_improved.Run, with every default of its configuration decided.
"""

import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from basics import durable, host, words
from checkpointing import run_folders
from monitoring import notify
from training import memory as step_memory


def watching(cfg) -> str:
    """Return how to see the charts as they are. Smoothing, 0.6 unless an address says otherwise,
    averages over points: a validation loss, which has few, would be drawn above its values."""
    address = "http://localhost:6006/#custom_scalars&_smoothingWeight=0"
    return f"tensorboard --logdir={shlex.quote(cfg.tensorboard_dir)} and {address}"


PINNED_TORCH = "2.13.0"  # as in requirements.txt


def plan(run) -> str:
    """Return the start-up summary: what will happen, in the order in which one would check it."""
    cfg, dist, data = run.cfg, run.dist, run.train_data
    epoch_steps = data.num_tokens // cfg.total_batch_size
    rest = (cfg.max_steps - run.state.step) * cfg.total_batch_size
    epochs = (run.state.position * cfg.seq_len + rest) / data.num_tokens
    accumulation = cfg.total_batch_size // (cfg.seq_len * dist.world_size * cfg.micro_batch_size)
    val_windows = min(cfg.val_tokens // cfg.seq_len, run.val_data.num_windows)
    memory, several = step_memory.of_run(run), dist.world_size > 1
    on_cpu = dist.device.type == "cpu"
    files = checkpoints_kept(cfg)
    file_bytes = checkpoint_bytes(run)
    compiled = dist.device.type == "cuda" if cfg.compile is None else cfg.compile
    mode = "compiled" if compiled else "eager"
    rows = {
        "run": cfg.run_name,
        "model": f"{cfg.model}: {cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, "
        f"context {cfg.seq_len}; {run.model.num_params():,} parameters"
        + (f", first weights from {cfg.init_from}" if cfg.init_from else ""),
        "data": f"{cfg.data_dir}: {data.num_tokens:,} training tokens; validation on the first "
        f"{val_windows * cfg.seq_len:,} of {run.val_data.num_tokens:,}",
        "batch": f"{cfg.total_batch_size:,} tokens a step = {dist.world_size} process(es) x "
        f"{accumulation} micro-batch(es) x {cfg.micro_batch_size} sequences x {cfg.seq_len} tokens",
        "length": f"{cfg.max_steps:,} steps = {run.state.tokens + rest:,} tokens = "
        f"{epochs:.2f} epochs ({epoch_steps:,} steps each)",
        "schedule": f"warm-up {cfg.warmup_steps:,} steps to {cfg.max_lr:g}, then "
        f"{decay(cfg)} to {cfg.min_lr:g}",
        "optimizer": f"{optimizer(cfg)}, weight decay {cfg.weight_decay} on matrices, "
        f"gradient norm clipped at {cfg.grad_clip:g}, seed {cfg.seed}",
        "machine": f"{dist.world_size} x {device_name(dist.device)}, {cfg.dtype}, {mode}, "
        f"PyTorch {torch.__version__}{other_torch()}; "
        f"about {memory / 1e9:.1f} GB of memory per process"
        + (f" and {file_bytes / 1e9:.1f} GB for the copy that is saved" if on_cpu else "")
        + (f" ({step_memory.of_run(run, not cfg.shard) / 1e9:.1f} GB " if several else "")
        + (f"{'without' if cfg.shard else 'with'} --shard)" if several else "")
        + ("; --shard changes nothing, one process has all" if cfg.shard and not several else ""),
        "every": f"evaluation {cfg.eval_freq or 'off'}, HellaSwag "
        f"{cfg.hellaswag_freq if run.hellaswag_items else 'off'}, "
        f"samples {cfg.sample_freq or 'off'}, "
        f"histograms {cfg.histogram_freq if cfg.use_tensorboard else 'off'}, checkpoints "
        f"{cfg.checkpoint_freq or 'at the end only'} (steps)",
        "output": f"{Path(cfg.checkpoint_dir, cfg.run_name)} (up to {files} files of "
        f"{file_bytes / 1e6:,.0f} MB = {files * file_bytes / 1e9:.1f} GB), "
        f"{Path(cfg.tensorboard_dir, cfg.run_name)}"
        + (f" (about {log_bytes(run) / 1e6:,.1f} MB)" if cfg.use_tensorboard else ""),
    }
    if cfg.use_tensorboard:
        rows["watch"] = watching(cfg)
    return "\n".join(f"{name:>10}  {text}" for name, text in rows.items())


def other_torch() -> str:
    """Return what to know of another PyTorch than the pinned one, else nothing."""
    found = torch.__version__.split("+")[0]
    if found == PINNED_TORCH:
        return ""
    return f" (pinned is {PINNED_TORCH}: numbers may differ in rounding)"


def decay(cfg) -> str:
    if cfg.schedule == "wsd":
        return f"stable, in the last {cfg.decay_share * cfg.max_steps:,.0f} steps a straight line"
    return "cosine" if cfg.schedule == "cosine" else "a straight line"


def optimizer(cfg) -> str:
    adamw = f"AdamW, betas {cfg.beta1} and {cfg.beta2}"
    if cfg.optimizer == "adamw":
        return adamw
    before = "SOAP's scaling and " if cfg.optimizer == "soap_muon" else ""
    muon = f"{before}Muon, momentum {cfg.momentum}"
    return f"{muon}, for the matrices of the blocks; for the rest {adamw}"


def recipes(plans: dict) -> str:
    """Return a table of plans side by side: {name: (config, hours)}."""
    columns = {
        name: [
            {"adamw": "AdamW", "muon": "Muon", "soap_muon": "SOAP + Muon"}[cfg.optimizer],
            f"{cfg.schedule} to {cfg.min_lr:g}",
            f"{cfg.max_lr:g}",
            f"{cfg.max_steps:,}",
            f"{cfg.max_steps * cfg.total_batch_size:,}",
            f"{hours:,.1f}" if hours < 1000 else f"{hours / 24:,.0f} days",
        ]
        for name, (cfg, hours) in plans.items()
    }
    titles = ["optimizer", "schedule", "max_lr", "steps", "tokens", "hours"]
    lines = [f"{'--recipe':>10}  " + "".join(f"{name:>18}" for name in columns)]
    for i, title in enumerate(titles):
        lines.append(f"{title:>10}  " + "".join(f"{column[i]:>18}" for column in columns.values()))
    lines.append(
        "hours at the speed of a few passes measured now, not compiled; that fast reaches the loss "
        "of reference is a prediction (LAB_NOTES.md)"
    )
    return "\n".join(lines)


def every_flag(cfg, given: dict) -> str:
    """Return one line a flag, with those marked that the command line gave."""
    return "\n".join(
        f"  --{name} {value}" + ("   (given)" if name in given else "")
        for name, value in dataclasses.asdict(cfg).items()
    )


def checkpoint_bytes(run) -> int:
    """Return the bytes of weights and moments, in float32."""
    return step_memory.state_bytes(run.model, run.cfg.optimizer)


def checkpoints_kept(cfg) -> int:
    """Return how many files there are at most: the newest, the best, the one being written, and
    those of --keep_every."""
    files = cfg.keep_checkpoints + 2
    if cfg.keep_every:
        files += cfg.max_steps // cfg.keep_every
    return files


def log_bytes(run, from_step: int = 0) -> int:
    """Estimate the bytes by which the log folder grows until the end (sizes: LAB_NOTES.md)."""
    cfg = run.cfg
    steps = cfg.max_steps - from_step
    lines = 550 * steps if cfg.log_jsonl else 0
    if not cfg.use_tensorboard:
        return lines
    tensors = 2 * len(list(run.model.parameters()))
    sizes = {"eval_freq": 110, "hellaswag_freq": 40, "sample_freq": 20 + 6 * cfg.sample_tokens}
    sizes["sample_freq"] *= cfg.num_samples
    sizes["histogram_freq"] = 1150 * tensors
    dumps = {name: steps // freq + 1 if (freq := getattr(cfg, name)) else 0 for name in sizes}
    return lines + 3000 + 400 * steps + sum(dumps[name] * sizes[name] for name in sizes)


def disk_warnings(run, folder: Path, log_folder: Path) -> list[str]:
    """Return what the output folders lack for the rest of the run, as sentences."""
    size, files = checkpoint_bytes(run), checkpoints_kept(run.cfg)
    there = sum(c.bytes for c in run_folders.list_checkpoints(folder))
    need, logs = max(2 * size, files * size - there), log_bytes(run, run.state.step)
    free, log_free = (host.free_bytes(f) for f in (folder, log_folder))
    what = f"the run needs up to {need / 1e9:.2f} GB more ({files} files in all)"
    disks = {os.stat(host.existing(f)).st_dev for f in (folder, log_folder)}
    same_disk = len(disks) == 1
    if same_disk:
        need += logs
        what += f" and {logs / 1e9:.2f} GB for logs" if logs else ""
    found = []
    if free < need:
        found.append(
            f"{folder} has {free / 1e9:.2f} GB free and a checkpoint takes {size / 1e9:.2f} GB "
            f"(two while one is replaced); {what}: saving fails when the disk is full, make room"
        )
    if not same_disk and log_free < logs:
        found.append(
            f"{log_folder} has {log_free / 1e6:.1f} MB free, the run's logs need about "
            f"{logs / 1e6:.1f} MB: logging stops when the disk is full, make room"
        )
    return found


def memory_needed(run) -> tuple[int, int, int | None, str]:
    """Estimate (bytes to train, of the copy for checkpoints, free or None if unknown; where)."""
    need = step_memory.of_run(run)
    if run.dist.device.type == "cuda":
        return need, 0, torch.cuda.mem_get_info(run.dist.device)[0], "GPU memory"
    need *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return need, checkpoint_bytes(run), host.available_bytes(), "memory"


def memory_warning(run) -> str | None:
    """Return what to say where the estimate for the micro-batch, with the copy, does not fit."""
    need, copy, available, where = memory_needed(run)
    if available is None or need + copy <= available:
        return None
    ways = ["a smaller one"] if run.cfg.micro_batch_size > 1 else []
    ways += ["--activation_checkpointing"] * (not run.cfg.activation_checkpointing)
    if run.dist.world_size > 1 and not run.cfg.shard and copy < available:
        sharded = step_memory.of_run(run, sharded=True)
        ways.append(f"--shard ({sharded / 1e9:.1f} GB a process)")
    return (
        f"--micro_batch_size {run.cfg.micro_batch_size} needs about {need / 1e9:.1f} GB of {where}"
        + (f" and the copy for checkpoints {copy / 1e9:.1f} GB" if copy else "")
        + f", {available / 1e9:.1f} GB are free: use {', '.join(ways)} or a smaller model"
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} thread(s)" if device.type == "cpu" else "Apple GPU"


def speed_depends_on(run) -> str:
    """Return what must be the same where step times of two runs are compared."""
    cfg, dist = run.cfg, run.dist
    return (
        f"{platform.node()}: {dist.world_size} x {device_name(dist.device)}, {run.dtype}, "
        f"{cfg.total_batch_size} tokens in micro-batches of {cfg.micro_batch_size}"
    )


def store_config(run, folder: Path) -> str | None:
    """Write FOLDER/config.json: everything that was decided, and by which versions of what. On a
    full disk return a sentence instead."""
    git = None
    if shutil.which("git"):
        here = str(Path(__file__).parents[1])
        command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    record = {
        "config": dataclasses.asdict(run.cfg),
        "asked": sorted(run.flags_ever_given),
        "changes": run.state.changes + run.changes,  # by resumes, that changed learning
        "command": notify.redact_words(sys.argv),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_revision": git,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "packages": {d.name: d.version for d in metadata.distributions()},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": device_name(run.dist.device),
        "world_size": run.dist.world_size,
        "parameters": run.model.num_params(),
        "train_tokens": run.train_data.num_tokens,
        "data_fingerprint": run.train_data.fingerprint,
    }
    try:
        durable.write(folder / "config.json", json.dumps(record, indent=2).encode() + b"\n")
    except OSError as error:
        if error.errno not in durable.DISK_FULL:
            raise
        return f"{folder / 'config.json'} could not be written: {error.strerror}"
    return None


def history(run) -> str:
    """Say what a run has behind it."""
    state, parts = run.state, []
    epochs = state.position / run.train_data.num_windows
    parts.append(f"{state.tokens:,} tokens ({epochs:.2f} epochs of this data)")
    parts.append(f"{words.duration(state.train_seconds)} of training")
    if state.watt_seconds:
        parts.append(f"{state.watt_seconds / 3.6e6:.3g} kWh")
    if math.isfinite(state.best_loss):
        parts.append(f"best validation loss {state.best_loss:.4f}")
    return ", ".join(parts)


def farewell(run, finished: bool, command: str) -> str:
    """Say how far the run came, where everything is, and what to type next."""
    cfg, state = run.cfg, run.state
    loss = ""
    if math.isfinite(state.validation_loss):
        loss = f"; validation loss {state.validation_loss:.4f}"
    energy = f", {state.watt_seconds / 3.6e6:.3g} kWh" if state.watt_seconds else ""
    rows = [
        f"{'finished' if finished else 'stopped'} at step {state.step:,} of {cfg.max_steps:,}, "
        f"after {words.duration(state.train_seconds)} of training{energy}{loss}",
        f"checkpoints   {run.checkpoint_folder}",
    ]
    if cfg.use_tensorboard:
        rows.append(f"TensorBoard   {Path(cfg.tensorboard_dir, cfg.run_name)}")
        rows.append(f"watch         {watching(cfg)}")
    command = command.replace("\n", f"\n{'':<14}")  # one a machine
    rows.append(f"{'train longer' if finished else 'go on':<13} {command}")
    return "\n".join(rows)
