"""What a run says about itself: the plan before it, its record on disk, the last words.

`run` is train_improved.Run, with every default of its configuration decided.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from basics import durable, host, words
from checkpointing import files as checkpoint_files
from checkpointing import run_folders
from training import memory as step_memory


def plan(run) -> str:
    """The start-up summary: what will happen, in the order in which a person would check it."""
    cfg, dist, data = run.cfg, run.dist, run.train_data
    epoch_steps = data.num_tokens // cfg.total_batch_size
    total_tokens = cfg.max_steps * cfg.total_batch_size
    accumulation = cfg.total_batch_size // (cfg.seq_len * dist.world_size * cfg.micro_batch_size)
    val_windows = min(cfg.val_tokens // cfg.seq_len, run.val_data.num_windows)
    memory = step_memory.of_run(run)
    files = checkpoints_kept(cfg)
    file_bytes = checkpoint_bytes(run)
    if cfg.compile is None:
        mode = "compiled" if dist.device.type == "cuda" else "eager"
    else:
        mode = "compiled" if cfg.compile else "eager"
    rows = {
        "run": cfg.run_name,
        "model": f"{cfg.model}: {cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, "
        f"context {cfg.seq_len}; {run.model.num_params():,} parameters"
        + (f", first weights from {cfg.init_from}" if cfg.init_from else ""),
        "data": f"{cfg.data_dir}: {data.num_tokens:,} training tokens; validation on the first "
        f"{val_windows * cfg.seq_len:,} of {run.val_data.num_tokens:,}",
        "batch": f"{cfg.total_batch_size:,} tokens a step = {dist.world_size} process(es) x "
        f"{accumulation} micro-batch(es) x {cfg.micro_batch_size} sequences x {cfg.seq_len} tokens",
        "length": f"{cfg.max_steps:,} steps = {total_tokens:,} tokens = "
        f"{total_tokens / data.num_tokens:.2f} epochs ({epoch_steps:,} steps each)",
        "schedule": f"warm-up {cfg.warmup_steps:,} steps to {cfg.max_lr:g}, then "
        f"{decay(cfg)} to {cfg.min_lr:g}",
        "optimizer": f"{optimizer(cfg)}, weight decay {cfg.weight_decay} on matrices, "
        f"gradient norm clipped at {cfg.grad_clip:g}, seed {cfg.seed}",
        "machine": f"{dist.world_size} x {device_name(dist.device)}, {cfg.dtype}, {mode}; "
        f"about {memory / 1e9:.1f} GB of memory per process",
        "every": f"evaluation {cfg.eval_freq}, HellaSwag "
        f"{cfg.hellaswag_freq if run.hellaswag_items else 'off'}, samples {cfg.sample_freq}, "
        f"histograms {cfg.histogram_freq if cfg.use_tensorboard else 'off'}, checkpoints "
        f"{cfg.checkpoint_freq or 'at the end only'} (steps)",
        "output": f"{Path(cfg.checkpoint_dir, cfg.run_name)} (up to {files} files of "
        f"{file_bytes / 1e6:,.0f} MB = {files * file_bytes / 1e9:.1f} GB), "
        f"{Path(cfg.tensorboard_dir, cfg.run_name)}"
        + (f" (about {log_bytes(run) / 1e6:,.1f} MB)" if cfg.use_tensorboard else ""),
    }
    return "\n".join(f"{name:>10}  {text}" for name, text in rows.items())


def decay(cfg) -> str:
    if cfg.schedule == "wsd":
        return f"stable, in the last {cfg.decay_share * cfg.max_steps:,.0f} steps a straight line"
    return {"cosine": "cosine", "linear": "a straight line"}[cfg.schedule]


def optimizer(cfg) -> str:
    adamw = f"AdamW, betas {cfg.beta1} and {cfg.beta2}"
    if cfg.optimizer == "adamw":
        return adamw
    return f"Muon, momentum {cfg.momentum}, for the matrices of the blocks; for the rest {adamw}"


def recipes(plans: dict) -> str:
    """Plans side by side: {name: (config, hours)}, as a table."""
    columns = {
        name: [
            {"adamw": "AdamW", "muon": "Muon"}[cfg.optimizer],
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
    """The whole configuration, one flag a line, with those that the command line gave marked."""
    return "\n".join(
        f"  --{name} {value}" + ("   (given)" if name in given else "")
        for name, value in dataclasses.asdict(cfg).items()
    )


def checkpoint_bytes(run) -> int:
    """Return the bytes of weights and moments, in float32."""
    return step_memory.state_bytes(run.model, run.cfg.optimizer)


def checkpoints_kept(cfg) -> int:
    """Most files at a time: the newest, the best, the one being written, and --keep_every's."""
    files = cfg.keep_checkpoints + 2
    if cfg.keep_every:
        files += cfg.max_steps // cfg.keep_every
    return files


def log_bytes(run, from_step: int = 0) -> int:
    """Estimate of what the log folder grows by until the end, from sizes in LAB_NOTES.md."""
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


def disk_warnings(run, step: int, folder: Path, log_folder: Path) -> list[str]:
    """What the output folders lack for the rest of the run from `step` on, as sentences."""
    size, files = checkpoint_bytes(run), checkpoints_kept(run.cfg)
    there = sum(c.bytes for c in run_folders.list_checkpoints(folder))
    need, logs = max(2 * size, files * size - there), log_bytes(run, step)
    free, log_free = (host.free_bytes(f) for f in (folder, log_folder))
    what = f"the run needs up to {need / 1e9:.2f} GB more ({files} files in all)"
    same_disk = os.stat(folder).st_dev == os.stat(log_folder).st_dev
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


def memory_warning(run) -> str | None:
    """Said where the estimate for the micro-batch, with the copy for checkpoints, does not fit."""
    cfg, device = run.cfg, run.dist.device
    need, copy = step_memory.of_run(run), 0
    if device.type == "cuda":
        available, where = torch.cuda.mem_get_info(device)[0], "GPU memory"
    else:
        available, where = host.available_bytes(), "memory"
        need *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        copy = checkpoint_bytes(run)
    if available is None or need + copy <= available:
        return None
    return (
        f"--micro_batch_size {cfg.micro_batch_size} needs about {need / 1e9:.1f} GB of {where}"
        + (f" and the copy for checkpoints {copy / 1e9:.1f} GB" if copy else "")
        + f", {available / 1e9:.1f} GB are free: use a smaller one, or a smaller model"
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} thread(s)" if device.type == "cpu" else "Apple GPU"


def speed_depends_on(run) -> str:
    """Step times of two runs can be compared where this is the same."""
    cfg, dist = run.cfg, run.dist
    return (
        f"{platform.node()}: {dist.world_size} x {device_name(dist.device)}, {run.dtype}, "
        f"{cfg.total_batch_size} tokens in micro-batches of {cfg.micro_batch_size}"
    )


def store_config(run, folder: Path) -> str | None:
    """FOLDER/config.json: everything that was decided, and by which versions of what. On a full
    disk that is no error but the sentence that is returned."""
    git = None
    if shutil.which("git"):
        here = str(Path(__file__).parents[1])
        command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    record = {
        "config": dataclasses.asdict(run.cfg),
        "asked": sorted(run.asked),  # flags given now or when the run began
        "command": sys.argv,
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


def farewell(run, finished: bool, last_stable: int | None = None) -> str:
    """How far the run came, where everything is, and what to type next.

    last_stable: of a wsd run, the step whose checkpoint a longer run goes on from.
    """
    cfg, state = run.cfg, run.state
    loss = f"; validation loss {state.validation_loss:.4f}" if state.evaluated_step >= 0 else ""
    energy = f", {state.watt_seconds / 3.6e6:.3g} kWh" if state.watt_seconds else ""
    command = "python"
    if run.dist.world_size > 1:
        command = f"torchrun --standalone --nproc_per_node={run.dist.world_size}"
    command += f" {os.path.relpath(Path(__file__).parents[1] / 'train_improved.py')}"
    stable = checkpoint_files.step_path(run.checkpoint_folder, last_stable or 0)
    if finished and last_stable and stable.exists():
        command += f" --resume {os.path.relpath(stable)} --run_name {cfg.run_name}-longer"
    else:
        command += f" --resume latest --run_name {cfg.run_name}"
    command += " --use_tensorboard" * cfg.use_tensorboard + " --log_jsonl" * cfg.log_jsonl
    for name, default in (("checkpoint_dir", "checkpoints"), ("tensorboard_dir", "runs")):
        if getattr(cfg, name) != default:
            command += f" --{name} {getattr(cfg, name)}"
    if finished:
        command += f" --max_steps {2 * cfg.max_steps}"
    elif not run_folders.list_checkpoints(run.checkpoint_folder):
        command = "the same command again, nothing is saved yet"
    rows = [
        f"{'finished' if finished else 'stopped'} at step {state.step:,} of {cfg.max_steps:,}, "
        f"after {words.duration(state.train_seconds)} of training{energy}{loss}",
        f"checkpoints   {Path(cfg.checkpoint_dir, cfg.run_name)}",
    ]
    if cfg.use_tensorboard:
        rows.append(f"TensorBoard   {Path(cfg.tensorboard_dir, cfg.run_name)}")
        rows.append(f"watch         tensorboard --logdir={cfg.tensorboard_dir}")
    rows.append(f"{'train longer' if finished else 'go on':<13} {command}")
    return "\n".join(rows)
