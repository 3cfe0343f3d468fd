"""From what was asked for to a plan that can begin: merged, checked, its folders claimed.

Everything here runs once, before step 0, and says in one sentence (ValueError) what the user has to
change. The defaults themselves are in train_improved.py.
"""

import sys
from pathlib import Path

from basics import durable
from basics.words import marked
from checkpointing import files, run_folders
from monitoring import summary
from runtime.flags import check_ranges, merge
from tokens import sample_text, tokenizer

# Seconds that a restart waits for an earlier attempt's rank 0: it may have been cut off, and be
# about to notice (peers.SILENCE and what it has to save then).
LOCK_PATIENCE = 150.0

# --- Flags and checkpoint -------------------------------------------------------------------------


def merge_config(
    config_class, presets: dict, given: dict, checkpoint: dict | None, device: str, world_size: int
):
    """Flags over checkpoint over defaults -> (config_class, sentences that say what changed).

    ValueError for a flag that asks for another model than the checkpoint holds.
    """
    if checkpoint is None:
        return merge(config_class, given, None, False, set())
    saved, made_on = checkpoint["config"], checkpoint["machine"]
    saved = {"optimizer": "adamw", "recipe": "reference"} | saved
    if given.get("recipe", saved["recipe"]) != saved["recipe"]:
        raise ValueError(
            f"--recipe {given['recipe']}: the checkpoint's run was planned by --recipe "
            f"{saved['recipe']}; leave --recipe out and give what should change, or start anew"
        )
    if given.get("optimizer", saved["optimizer"]) != saved["optimizer"]:
        raise ValueError(
            f"--optimizer {given['optimizer']} does not fit the checkpoint, which holds the state "
            f"of {saved['optimizer']}: leave --optimizer out, or start anew"
        )
    preset = presets.get(given.get("model"), saved)
    for name in ("n_layer", "n_head", "n_embd", "seq_len"):
        if given.get(name, preset[name]) != saved[name]:
            raise ValueError(
                f"--{name} {given.get(name, preset[name])} does not fit the checkpoint, whose "
                f"model has {name} {saved[name]}: leave --model and --{name} out, or start anew"
            )
    if given.get("init_from", saved.get("init_from")) != saved.get("init_from"):
        raise ValueError(
            f"--init_from {given['init_from']}: the checkpoint to resume began with "
            f"{saved.get('init_from') or 'random weights'} and has its own by now; leave out "
            "--init_from to resume, --resume to start anew"
        )
    # A value that was derived is derived again when what it came from is given anew.
    derived_from = {
        "max_steps": {"epochs", "total_batch_size", "data_dir"},
        "min_lr": {"max_lr", "schedule"},
    }
    asked = set(checkpoint["asked"])
    stale = {n for n, sources in derived_from.items() if n not in asked and sources & set(given)}
    same_machine = made_on == {"device_type": device, "world_size": world_size}
    return merge(config_class, given, saved, same_machine, stale)


def validate(cfg, world_size: int) -> None:
    """ValueError for what cannot work: the flag, its value and the fix. None is not decided yet."""
    check_ranges(cfg)

    def need(ok: bool, name: str, what: str):
        if not ok:
            raise ValueError(f"--{name} {getattr(cfg, name)}: {what}")

    need(cfg.decay_share < 1, "decay_share", "must be below 1")
    need(cfg.momentum < 1, "momentum", "must be below 1")
    need(cfg.beta1 < 1, "beta1", "must be below 1")
    need(cfg.beta2 < 1, "beta2", "must be below 1")
    need(cfg.n_embd % cfg.n_head == 0, "n_embd", f"must be a multiple of --n_head {cfg.n_head}")
    need(cfg.min_lr <= cfg.max_lr, "min_lr", f"must not be above --max_lr {cfg.max_lr:g}")
    prompt = len(tokenizer.get_tokenizer().encode_ordinary(cfg.sample_prompt))
    need(prompt > 0, "sample_prompt", "must not be empty")
    need(
        prompt + cfg.sample_tokens <= cfg.seq_len or cfg.sample_freq == 0,
        "sample_tokens",
        f"with the prompt's {prompt} does not fit into --seq_len {cfg.seq_len}",
    )
    need(cfg.val_tokens >= cfg.seq_len, "val_tokens", f"is less than one --seq_len {cfg.seq_len}")
    micro = cfg.micro_batch_size or 1
    unit = cfg.seq_len * world_size * micro
    nearest = max(unit, round(cfg.total_batch_size / unit) * unit)
    need(
        cfg.total_batch_size % unit == 0,
        "total_batch_size",
        f"must be a multiple of {unit} = {cfg.seq_len} tokens x {world_size} process(es) x "
        f"micro-batch {micro}; the nearest is {nearest}",
    )
    if cfg.max_steps is not None and cfg.warmup_steps is not None:
        fits = cfg.warmup_steps <= cfg.max_steps
        need(fits, "warmup_steps", f"is more than the run's {cfg.max_steps} steps")


def find_checkpoint(
    resume: str | None, run_name: str | None, checkpoint_dir: Path, restarted: bool
) -> Path | None:
    """The file that --resume means; None: for auto, where there is nothing to resume.

    restarted: run_name is what an earlier attempt of this torchrun began. Its newest checkpoint
    counts then, unless --resume names a file that is further.
    """
    by_path = resume not in (None, "latest", "auto")
    path, skipped = None, []
    if run_name is not None and (restarted or resume in ("latest", "auto")):
        path, skipped = run_folders.find_latest(checkpoint_dir / run_name)
    # Under auto a named run that has no checkpoint yet starts fresh: a restart is not a transfer.
    if path is None and (resume == "latest" or (resume == "auto" and run_name is None)):
        path, more = run_folders.find_latest_anywhere(checkpoint_dir)
        skipped += [entry for entry in more if entry not in skipped]
    for bad, reason in skipped:
        print(f"skipped {bad}: {reason}", file=sys.stderr)
    if path is None and resume == "latest":
        raise ValueError(
            f"--resume latest: no valid checkpoint under {checkpoint_dir}; leave --resume out to "
            "start a new run, or use --resume auto in scripts"
        )
    if by_path and path is not None:
        came_to, named = (files.read_info(p).get("step", 0) for p in (path, resume))
        return path if came_to > named else Path(resume)
    return Path(resume) if by_path else path


def plan_decay(given: dict, saved, step: int, last_stable: int | None) -> dict:
    """Flags that let a stable wsd run decay from a checkpoint on, in the same share of the run.

    saved: the checkpoint's Config. ValueError if `step` is not in the stable part of such a run.
    """
    for name in ("epochs", "recipe", "schedule", "warmup_steps"):
        if name in given and given[name] != getattr(saved, name):
            raise ValueError(
                f"--{name} {given[name]}: a branch is a straight line down from the checkpoint; "
                "--max_steps or --decay_share says how long"
            )
    if {"max_steps", "decay_share"} <= given.keys():
        raise ValueError("--max_steps and --decay_share: each says where a branch ends, give one")
    if not 0 < given.get("decay_share", saved.decay_share) < 1:
        raise ValueError(f"--decay_share {given['decay_share']}: must be above 0 and below 1")
    if saved.schedule != "wsd":
        what = f"of --schedule {saved.schedule}, and only wsd has a stable part to decay from"
    elif not saved.warmup_steps <= step <= last_stable:
        what = f"of step {step}; the run was stable from step {saved.warmup_steps} to {last_stable}"
    else:
        share = given.get("decay_share", saved.decay_share)
        max_steps = given.get("max_steps") or round(step / (1 - share))
        if max_steps <= step:
            raise ValueError(f"--max_steps {max_steps}: the decay begins at step {step}, give more")
        return {"max_steps": max_steps, "decay_share": (max_steps - step) / max_steps}
    raise ValueError(f"--decay_from {given['decay_from']}: is a checkpoint {what}")


# --- Data and folders -----------------------------------------------------------------------------


def build_sample_corpus(folder: str) -> None:
    """Say that training begins with the sample corpus, and make it if it is not there yet."""
    print(
        f"No data prepared: training on a small sample corpus in {folder}, one novel by Charles "
        "Dickens.\nFor the real run prepare FineWeb-Edu: python src/prepare_data.py (28 GB "
        "download; see QUICK_START.md)",
        flush=True,
    )
    if not Path(folder, "manifest.json").exists():
        sample_text.sample_corpus(folder)


def preflight(run, checkpoint: dict | None) -> None:
    """Rank 0: claim the output folders and try them, before anything expensive."""
    cfg = run.cfg
    folder = run.checkpoint_folder
    log_folder = run_folders.run_folder(Path(cfg.tensorboard_dir), cfg.run_name)
    existing = run_folders.list_checkpoints(folder)
    if existing and not run.resumes_own_name:
        problem = f"{folder} holds checkpoints up to step {existing[-1].step} already; go on with "
        problem += "--resume latest"
        if cfg.resume == "auto":
            problem = f"none of the checkpoints in {folder} is whole; move them away"
        raise ValueError(f"--run_name {cfg.run_name}: {problem}, or choose another name")
    warnings = []
    for name, path in (("checkpoint_dir", folder), ("tensorboard_dir", log_folder)):
        try:
            warnings += [durable.check_writable(path)]
        except ValueError as error:
            raise ValueError(f"--{name} {getattr(cfg, name)}: {error}") from None
        if not any(lock.holds(path) for lock in run.locks):  # both may be the same folder
            patience = LOCK_PATIENCE if run.restarted else 0.0
            run.locks.append(run_folders.RunLock().acquire(path, patience))
    run_folders.sweep(folder)
    for beyond in run_folders.list_checkpoints(folder) if run.resumes_own_name else ():
        if beyond.step > checkpoint["step"]:  # or the next --resume latest would pick it
            beyond.path.rename(beyond.path.with_name(f"set_aside_{beyond.path.name}"))
            print(f"{beyond.path} is beyond the resumed step: renamed to set_aside_...", flush=True)
    step = checkpoint["step"] if checkpoint else 0
    warnings += summary.disk_warnings(run, step, folder, log_folder)
    warnings += [summary.memory_warning(run), summary.store_config(run, log_folder)]
    for warning in filter(None, warnings):
        print(marked(f"WARNING {warning}"), flush=True)
