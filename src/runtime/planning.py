"""From what was asked for to a plan that can begin: merged, checked, its folders claimed.

Everything here runs once, before step 0, and says in one sentence (ValueError) what the user has to
change. The defaults themselves are in train_improved.py.
"""

import os
import shlex
import sys
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

from basics import durable, inputs
from basics.words import marked
from checkpointing import files, pretrained, run_folders
from monitoring import summary
from monitoring.monitor import evaluation_due
from runtime import flags
from tokens import sample_text, shards, tokenizer
from tokens.stream import open_source
from training import scoring

# Seconds that a restart waits for an earlier attempt's rank 0: it may have been cut off, and be
# about to notice (peers.SILENCE and what it has to save then).
LOCK_PATIENCE = 150.0

SAMPLE_EPOCHS = 10  # of the sample corpus; beyond that a model learns it by heart

# --- Where to begin -------------------------------------------------------------------------------


@dataclass
class Start:
    """What a run goes on from."""

    run_name: str | None  # as far as it is known before the checkpoint is
    path: Path | None = None  # of the checkpoint; None: a fresh start
    rank: int = 0  # whose disk has it
    flag: tuple[str, str] | None = None  # (name, value) that says so
    branches_off: bool = False  # by --decay_from, now
    restarted: bool = False  # by torchrun, after an earlier attempt


def find_start(early, dist) -> Start:
    """Return what --resume, --decay_from, --run_name and a restart by torchrun mean together.

    early: the flags of this command, not merged yet. dist: Distributed.
    """
    folder = Path(early.checkpoint_dir)
    if early.run_name is not None:
        run_folders.validate_run_name(early.run_name)
    begun = dist.begun(folder)  # by an earlier attempt of this torchrun (--max-restarts)
    if early.run_name is not None and not early.decay_from and begun != early.run_name:
        begun = None  # an older run by the same --rdzv_id
    restarted = begun is not None
    name = begun or early.run_name
    if early.decay_from:
        if early.resume not in (None, "auto"):
            problem = "--decay_from says where to begin, give only that"
            raise inputs.wrong("resume", early.resume, problem)
        branched = Path(early.decay_from)
        source = branched.resolve().parent
        name = name or f"{source.name}-{branched.stem}-decayed"
        if (folder / name).resolve() == source:
            problem = "is the run itself, give the branch another name"
            raise inputs.wrong("run_name", name, problem)
    flag = ("resume", early.resume)
    with inputs.about(*flag):
        path, rank = newest(dist, lambda: find_checkpoint(early.resume, name, folder, restarted))
    if path is None and early.decay_from:
        flag = ("decay_from", early.decay_from)
        with inputs.about(*flag):
            path, rank = newest(dist, lambda: Path(early.decay_from))
        return Start(name, path, rank, flag, branches_off=True, restarted=restarted)
    return Start(name, path, rank, ("resume", early.resume or path), restarted=restarted)


def newest(dist, find) -> tuple[Path | None, int]:
    """Return which of the checkpoints that `find()` -> path finds on the disks of the machines,
    which may be one disk, was saved last, and a rank that can read it; (None, 0) if there is none.
    ValueError if that is what is wrong on all of them."""

    def look():
        try:
            path = find() if dist.is_node_main else None
            return path and (files.read_info(path).get("saved_at", 0.0), str(path)), None
        except ValueError as error:
            return None, str(error)

    looks = dist.everywhere(look)
    found = [(*file, -rank) for rank, (file, _) in enumerate(looks) if file is not None]
    if found:
        _, path, rank = max(found, key=lambda f: (f[0], f[2]))
        return Path(path), -rank
    for error in filter(None, (error for _, error in looks)):
        raise ValueError(error)
    return None, 0


def find_checkpoint(
    resume: str | None, run_name: str | None, checkpoint_dir: Path, restarted: bool
) -> Path | None:
    """Return the file that --resume means; None for auto, where there is nothing to resume.

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


def of_branch(start: Start, given: dict, saved, step: int, last_stable: int | None) -> dict:
    """Return the flags of this command with those that --decay_from decides."""
    if start.branches_off:
        return given | plan_decay(given, saved, step, last_stable)
    if "decay_from" in given:  # goes on with the branch, which was planned when it began
        return {k: v for k, v in given.items() if k not in ("max_steps", "decay_share")}
    return given


def plan_decay(given: dict, saved, step: int, last_stable: int | None) -> dict:
    """Return the flags that let a stable wsd run decay from a checkpoint on, in the same share.

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
    raise inputs.wrong("decay_from", given["decay_from"], f"is a checkpoint {what}")


# --- Flags and checkpoint -------------------------------------------------------------------------


def merge_config(
    config_class, presets: dict, given: dict, checkpoint: dict, device: str, world_size: int
):
    """Return (flags over checkpoint over defaults, names ever asked for).

    ValueError for a flag that asks for another model than the checkpoint holds.
    """
    saved, preset = checkpoint["config"], presets.get(given.get("model"), {})
    for name in ("recipe", "optimizer", "init_from", *presets["gpt2"]):
        there = saved.get(name, getattr(config_class, name))  # the default: older than the flag
        asked = given.get(name, preset.get(name, there))
        if asked != there:
            model = "--model and " if name in presets["gpt2"] else ""
            raise inputs.wrong(
                name,
                asked,
                f"does not fit the checkpoint, which has {name} {there}: leave {model}--{name} "
                "out to resume, or --resume to start anew",
            )
    same_machine = checkpoint["machine"] == {"device_type": device, "world_size": world_size}
    return flags.merge(config_class, given, saved, {*checkpoint["asked"]}, same_machine)


def validate(cfg, world_size: int) -> None:
    """Raise ValueError for what cannot work, a line each: flag, value and fix.

    None is not decided yet.
    """
    flags.check_ranges(cfg)
    problems = []

    def need(ok: bool, name: str, what: str):
        if not ok:
            problems.append(str(inputs.wrong(name, getattr(cfg, name), what)))

    for name in ("decay_share", "momentum", "beta1", "beta2"):
        need(getattr(cfg, name) < 1, name, "must be below 1")
    need(cfg.n_embd % cfg.n_head == 0, "n_embd", f"must be a multiple of --n_head {cfg.n_head}")
    whole = "has a matrix' scaling whole in each process: muon or adamw go with --shard"
    need(not (cfg.shard and cfg.optimizer == "soap_muon"), "optimizer", whole)
    need(cfg.min_lr <= cfg.max_lr, "min_lr", f"must not be above --max_lr {cfg.max_lr:g}")
    prompt = len(tokenizer.get_tokenizer().encode_ordinary(cfg.sample_prompt))
    need(prompt > 0, "sample_prompt", "must not be empty")
    need(
        prompt + cfg.sample_tokens <= cfg.seq_len or cfg.sample_freq == 0,
        "sample_tokens",
        f"with the {prompt} of --sample_prompt does not fit into --seq_len {cfg.seq_len}",
    )
    need(cfg.val_tokens >= cfg.seq_len, "val_tokens", f"is less than one --seq_len {cfg.seq_len}")
    micro = cfg.micro_batch_size or 1
    unit, one = cfg.seq_len * world_size * micro, cfg.seq_len * micro
    nearest = max(unit, round(cfg.total_batch_size / unit) * unit)
    counts = [n for n in range(1, 2 * world_size + 1) if cfg.total_batch_size % (one * n) == 0]
    processes = f", or start {' or '.join(map(str, counts[-3:]))} process(es)" if counts else ""
    need(
        cfg.total_batch_size % unit == 0,
        "total_batch_size",
        f"must be a multiple of {unit} = {cfg.seq_len} tokens x {world_size} process(es) x "
        f"micro-batch {micro}; the nearest is {nearest}{processes}",
    )
    if cfg.max_steps is not None and cfg.warmup_steps is not None:
        fits = cfg.warmup_steps <= cfg.max_steps
        need(fits, "warmup_steps", f"is more than the run's {cfg.max_steps} steps")
    if problems:
        raise ValueError("\n".join(problems))


def take_init(cfg, presets: dict, flags_now: dict, dist) -> dict:
    """Take the shape of --init_from; return its weights on rank 0, {} on the others."""
    weights = {}

    def read():
        preset = presets.get(flags_now.get("model"), {})
        with inputs.about("init_from", cfg.init_from):
            shape, found = pretrained.for_training(
                cfg.init_from, flags_now, preset, cfg.checkpoint_dir
            )
        weights.update(found)
        return shape

    shape = dist.on_main(read)
    vars(cfg).update(shape)
    alike = [m for m, p in presets.items() if p | {"seq_len": cfg.seq_len} == shape]
    cfg.model = cfg.model or (alike[0] if alike else None)  # and its learning rate
    return weights


# --- Data and folders -----------------------------------------------------------------------------


def steps_of_epochs(cfg, train_tokens: int, step: int, seen: int) -> int:
    """Return the last step of --epochs passes, of which `seen` tokens are behind `step`.

    Raise ValueError if the data is less than one step.
    """
    steps = cfg.epochs * (train_tokens // cfg.total_batch_size) - seen / cfg.total_batch_size
    max_steps = step + int(min(max(steps, 0), flags.BELOW / 2))
    if max_steps == 0:
        raise inputs.wrong(
            "epochs",
            f"{cfg.epochs:g}",
            f"{train_tokens:,} training tokens are less than one step of --total_batch_size "
            f"{cfg.total_batch_size}; use a smaller batch or more data",
        )
    return max_steps


def run_name(start: Start, checkpoint: dict | None, cfg, dist) -> str:
    """Return the name asked for, the checkpoint's, or a new one, the same on all ranks."""
    known = start.run_name or (checkpoint and checkpoint["run_name"])
    return known or dist.on_main(lambda: f"{cfg.model}-{datetime.now():%Y%m%d-%H%M%S}")


def open_data(cfg, dist) -> tuple:
    """Return (training windows, validation windows, HellaSwag items), from this machine's disk.

    The same on all machines, or ValueError names one that differs.
    """
    found = {}

    def open_here():
        with inputs.about("data_dir", cfg.data_dir):
            for split in ("train", "val"):
                found[split] = open_source(cfg.data_dir, split, cfg.seq_len, cfg.seed)
            if cfg.verify_data and dist.is_node_main:
                shards.verify(cfg.data_dir)
        with inputs.about("hellaswag_file", cfg.hellaswag_file):
            found["items"] = hellaswag_items(cfg)
        return {
            "--data_dir, training": found["train"].fingerprint,
            "--data_dir, validation": found["val"].fingerprint,
            "--hellaswag_file, items": len(found["items"]),
        }

    dist.agree(dist.everywhere(open_here))
    return found["train"], found["val"], found["items"]


def build_sample_corpus(folder: str, dist) -> None:
    """Say that training begins with the sample corpus, and make it where it is not there yet."""
    if dist.is_main:
        print(
            f"No data prepared: training on a small sample corpus in {folder}, one novel by "
            "Charles Dickens.\nFor the real run prepare FineWeb-Edu: python src/prepare_data.py "
            "(28 GB download; see QUICK_START.md)",
            flush=True,
        )

    def build():
        if dist.is_node_main and not Path(folder, "manifest.json").exists():
            sample_text.sample_corpus(folder)

    dist.on_main(build)
    dist.everywhere(build)  # on machines that have a disk of their own


def is_other_data(cfg, seen: dict, data) -> bool:
    """Return whether the data is not what the checkpoint saw; ValueError unless that is allowed."""
    if seen["fingerprint"] == data.fingerprint:
        return False
    if not cfg.allow_data_change:
        raise inputs.wrong(
            "data_dir",
            cfg.data_dir,
            f"{data.num_tokens:,} tokens with fingerprint {data.fingerprint}, but the checkpoint "
            f"saw {seen['tokens']:,} with {seen['fingerprint']}; give that folder, or "
            "--allow_data_change",
        )
    return True


def check_length(run, sample_dir: str) -> None:
    """Raise ValueError for a run that is over already, or too long for the sample corpus."""
    cfg, step = run.cfg, run.state.step
    if cfg.max_steps < step:
        raise ValueError(
            f"--max_steps {cfg.max_steps}: the checkpoint {run.resumed_from} is already at step "
            f"{step}; give a larger number"
        )
    elsewhere = run.resumed_from is not None and not run.resumes_own_name
    if elsewhere and cfg.max_steps == step and not evaluation_due(run.state, cfg):
        raise inputs.wrong(
            "run_name",
            cfg.run_name,
            f"{run.resumed_from} is the last step of its run, {step}, so nothing is left to do; "
            f"--max_steps {2 * step} trains it longer under this name",
        )
    epochs = cfg.max_steps * cfg.total_batch_size / run.train_data.num_tokens
    asked = [n for n in ("max_steps", "epochs", "total_batch_size") if n in run.flags_ever_given]
    small = cfg.data_dir == sample_dir and "data_dir" not in run.flags_ever_given
    if small and asked and epochs > SAMPLE_EPOCHS:
        raise inputs.wrong(
            asked[0],
            getattr(cfg, asked[0]),
            f"is {epochs:,.0f} times through the small sample corpus, which a model soon knows by "
            "heart: prepare real data (python src/prepare_data.py), or say --data_dir "
            f"{sample_dir} if that is meant",
        )


def hellaswag_items(cfg) -> list[scoring.Item]:
    """Return what there is to score on; [] where that is off or the file is not there."""
    there = cfg.hellaswag_freq and Path(cfg.hellaswag_file).exists()
    return scoring.load_items(cfg.hellaswag_file) if there else []


def say_changes(run, checkpoint: dict, given: dict) -> None:
    """Say where a run goes on and what is different now; keep what changes learning in the run."""
    state = run.state
    changes = flags.changes(run.cfg, checkpoint["config"], given)
    if checkpoint["data"]["fingerprint"] != run.train_data.fingerprint:
        text = "training data: another set (--allow_data_change), from its beginning; the best "
        changes.append((f"{text}validation loss begins anew", True))
    run.changes = [f"step {state.step}: {text}" for text, learned in changes if learned]
    if run.dist.is_main:
        print(f"resuming from {run.resumed_from}, step {state.step:,}: {summary.history(run)}")
        for change in state.changes:
            print(f"  changed earlier, at {change}")
        for text, _ in changes:
            print(f"  changed since the checkpoint: {text}")


def next_command(run, command: flags.CommandLine, finished: bool, last_stable: int | None) -> str:
    """Return what to type to go on: the same command, with --resume; "" if that cannot be said.

    last_stable: of a wsd run, the step whose checkpoint a longer run goes on from.
    """
    cfg, typed = run.cfg, dict(command.typed)
    if "config" in typed and not Path(typed["config"]).is_file():  # a pipe: it was read
        of_command = [f for f in fields(cfg) if f.metadata["resume"] == flags.COMMAND]
        in_file = command.in_file
        typed = {f.name: in_file[f.name] for f in of_command if f.name in in_file} | typed
        del typed["config"]
    typed |= {"resume": "auto" if "decay_from" in typed else "latest", "run_name": cfg.run_name}
    if finished:
        for name in ("decay_from", "decay_share", "epochs"):
            typed.pop(name, None)
        typed |= {"resume": "latest", "max_steps": 2 * cfg.max_steps}
        stable = files.step_path(run.checkpoint_folder, last_stable or 0)
        if last_stable and stable.exists():
            name = f"{cfg.run_name}-longer"
            typed |= {"resume": os.path.relpath(stable), "run_name": name}
    elif not run_folders.list_checkpoints(run.checkpoint_folder):
        return "the same command again, nothing is saved yet"
    script = Path(__file__).parents[1] / "train_improved.py"
    secret = [name for name in ("notify", "heartbeat") if "..." in typed.get(name, "")]
    typed = {name: value for name, value in typed.items() if name not in secret}
    typed = [os.path.relpath(script), *flags.words(typed, type(cfg))]
    once_more = f"  # and {' '.join(f'--{name}' for name in secret)} again: no address is stored"
    once_more = once_more if secret else ""
    commands = [shlex.join([*start, *typed]) + once_more for start in run.dist.starts]
    if len(commands) > 1:
        commands.insert(0, f"one of these on each of {len(commands)} machines:")
    return "\n".join(commands)


def check_unused(run) -> None:
    """Raise ValueError where there are checkpoints of the run's name, but of another run."""
    cfg, folder = run.cfg, run.checkpoint_folder
    existing = run_folders.list_checkpoints(folder)
    if existing and not run.resumes_own_name:
        problem = f"{folder} holds checkpoints up to step {existing[-1].step} already; go on with "
        problem += "--resume latest"
        if cfg.resume == "auto":
            problem = f"none of the checkpoints in {folder} is whole; move them away"
        raise inputs.wrong("run_name", cfg.run_name, f"{problem}, or choose another name")


def outlived(run) -> str | None:
    """Return a sentence that names who writes to the run's folders now, if it is not this run."""
    for lock in run.locks:
        if other := lock.lost_to():
            return f"{lock.path.parent} is now in use by {other}: this run has been given up"
    return None


def preflight(run, checkpoint: dict | None) -> None:
    """Claim the output folders and try them, before anything expensive. For rank 0."""
    cfg, folder = run.cfg, run.checkpoint_folder
    check_unused(run)
    log_folder = run_folders.run_folder(Path(cfg.tensorboard_dir), cfg.run_name)
    warnings = []
    for name, path in (("checkpoint_dir", folder), ("tensorboard_dir", log_folder)):
        with inputs.about(name, getattr(cfg, name)):
            warnings += [durable.check_writable(path)]
        if not any(lock.holds(path) for lock in run.locks):  # both may be the same folder
            patience = LOCK_PATIENCE if run.restarted else 0.0
            run.locks.append(run_folders.RunLock().acquire(path, patience))
            if not run.locks[-1].holds(path):
                warnings.append(f"{path}: a file system without locks keeps no second run out")
    run_folders.sweep(folder)
    for beyond in run_folders.list_checkpoints(folder) if run.resumes_own_name else ():
        if beyond.step > checkpoint["step"]:  # or the next --resume latest would pick it
            beyond.path.rename(beyond.path.with_name(f"set_aside_{beyond.path.name}"))
            print(f"{beyond.path} is beyond the resumed step: renamed to set_aside_...", flush=True)
    warnings += summary.disk_warnings(run, folder, log_folder)
    warnings += [summary.memory_warning(run), summary.store_config(run, log_folder)]
    for warning in filter(None, warnings):
        print(marked(f"WARNING {warning}"), flush=True)
