"""What a folder of runs says: which runs there are, their curves, texts and configuration.

A run may still be going on, and may come from another program: what it has not logged is left out.
"""

import contextlib
import difflib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from basics.words import plain
from checkpointing.run_folders import list_checkpoints
from monitoring.event_files import RunReader, from_code

# What a chart shows, and the tags that have it: ours, then Hugging Face Trainer's, torchtitan's,
# Megatron-LM's and the usual ones in Lightning.
TAGS = {
    "train": (
        "Loss/train", "train/loss", "loss_metrics/global_avg_loss", "lm loss", "train_loss", "loss",
    ),
    "validation": (
        "Loss/validation", "eval/loss", "validation_metrics/loss", "lm loss validation", "val_loss",
    ),
    "lr": ("Learning_Rate/lr", "train/learning_rate", "learning-rate", "learning_rate", "lr"),
    "norm": (
        "Gradient/norm_unclipped", "train/grad_norm", "grad_norm", "grad-norm", "Gradient/norm",
    ),
    "hellaswag": ("Evaluation/hellaswag_accuracy",),
    "rate": ("Performance/tokens_per_sec",),
    "mfu": ("Performance/mfu", "mfu(%)"),
    "tokens": ("Training/tokens", "n_tokens_seen", "train/num_input_tokens_seen"),
    "step_ms": ("Performance/step_time_ms",),
    "skips": ("Training/skipped_updates",),
    "rollbacks": ("Training/rollbacks",),
    "goodput": ("Performance/goodput",),
}  # fmt: skip
SAMPLES_TAG = "Generated_Samples/text"
SAMPLE_RULE = "\n\n---\n\n"  # between the samples of one evaluation
WARNING_TAGS = ("Health/warnings", "Performance/warnings")


@dataclass(eq=False)
class Curve:
    """Holds the points of one tag in the order of their steps; of a step written twice the last."""

    steps: np.ndarray  # int64
    values: np.ndarray  # float64, may hold NaN and infinity
    times: np.ndarray  # unix seconds

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Curve":
        keep = np.isfinite(self.values)
        return Curve(self.steps[keep], self.values[keep], self.times[keep])


@dataclass(eq=False)
class Run:
    """Answers from what a run's folder says now."""

    name: str
    folder: Path
    events: RunReader
    record: dict  # config.json, {} without one
    curves: dict[str, Curve] = field(default_factory=dict)  # by tag
    params: dict = field(default_factory=dict)  # hyperparameters
    label: str = ""  # in legends
    style: int | None = None  # None: not in the charts

    def __post_init__(self):
        for tag, series in self.events.scalars.items():
            steps = np.frombuffer(series.steps, np.int64)
            _, last = np.unique(steps[::-1], return_index=True)
            keep = len(steps) - 1 - last  # of each step the point written last
            values, times = np.frombuffer(series.values), np.frombuffer(series.times)
            values = values / 100 if tag == "mfu(%)" else values  # torchtitan's
            if len(steps):
                self.curves[tag] = Curve(steps[keep], values[keep], times[keep])
        self.params = self.record.get("config") or {
            name: None if value != value else value  # NaN is how None was stored
            for name, value in self.events.hparams.items()
        }

    def tag(self, what: str) -> str | None:
        return next((tag for tag in TAGS[what] if tag in self.curves), None)

    def curve(self, what: str) -> Curve | None:
        """Return the finite points of what TAGS names; None if there are none."""
        curve = self.curves[self.tag(what)].finite() if self.tag(what) else None
        return curve if curve else None

    @cached_property
    def first_step(self) -> int:
        return min(int(curve.steps[0]) for curve in self.curves.values())

    @cached_property
    def last_step(self) -> int:
        return max(int(curve.steps[-1]) for curve in self.curves.values())

    @cached_property
    def last_time(self) -> float:
        return max(float(curve.times[-1]) for curve in self.curves.values())

    @cached_property
    def clock(self) -> tuple[np.ndarray, np.ndarray, str]:
        """Return (steps, seconds of training up to each of them, how that was found), without
        pauses between restarts and work that a crash undid."""
        steps_ms = self.curve("step_ms")
        if steps_ms:
            past = np.diff(steps_ms.steps, prepend=steps_ms.steps[0] - 1)  # > 1: some not logged
            seconds = np.cumsum(steps_ms.values * past) / 1000
            return steps_ms.steps, seconds, "the sum of the step times, without evaluations"
        longest = max(self.curves.values(), key=len)
        passed = np.maximum(np.diff(longest.times, prepend=longest.times[0]), 0)
        past = np.diff(longest.steps, prepend=longest.steps[0])
        usual = np.median(passed[1:] / past[1:]) * past if len(longest) > 1 else passed
        passed = np.where(passed > np.maximum(10 * usual, 60), usual, passed)
        return longest.steps, np.cumsum(passed), "by the clock, without long pauses"

    def tokens_at(self, steps):
        """Return the tokens trained on up to these steps; None if nothing says so."""
        curve = self.curve("tokens")
        if curve:
            later = curve.steps > 0
            known = np.append(0, curve.steps[later]), np.append(0, curve.values[later])
            return np.interp(steps, *known)
        batch = self.params.get("total_batch_size")
        return steps * float(batch) if isinstance(batch, int | float) else None

    @property
    def tokens(self) -> float | None:
        """Return the tokens trained on so far, if anything says so."""
        tokens = self.tokens_at(np.array([self.last_step]))
        return None if tokens is None else float(tokens[0])

    def seconds_at(self, steps):
        known, seconds, _ = self.clock
        if known[0] == 1:
            known, seconds = np.append(0, known), np.append(0, seconds)
        return np.interp(steps, known, seconds)

    def along(self, by: str, steps):
        """Return where these steps are on an axis of "steps", "tokens" or "time" (seconds)."""
        if by == "tokens":
            return self.tokens_at(steps)
        return self.seconds_at(steps) if by == "time" else steps.astype(float)

    @property
    def is_fineweb_edu(self) -> bool:
        """Tell if all of its data is FineWeb-Edu, as the names of its folders say."""
        data = self.record.get("config", {}).get("data_dir") or ""
        folders = data if isinstance(data, list) else data.split()
        return bool(folders) and all(re.search(r"fineweb[-_]?edu", f.lower()) for f in folders)

    def increases(self, what: str):
        """Return the steps at which a counter went up."""
        curve = self.curve(what)
        if curve is None:
            return np.array([], np.int64)
        before = 0 if curve.steps[0] <= 1 else curve.values[0]
        return curve.steps[np.diff(curve.values, prepend=before) > 0]

    def last(self, what: str) -> float | None:
        curve = self.curve(what)
        return float(curve.values[-1]) if curve else None

    @property
    def best(self) -> tuple[float, int] | None:
        """Return (lowest validation loss, its step)."""
        curve = self.curve("validation")
        if curve is None:
            return None
        i = int(np.argmin(curve.values))
        return float(curve.values[i]), int(curve.steps[i])

    @property
    def goal(self) -> int | None:
        """Return the step it is to end with."""
        steps = self.params.get("max_steps")
        return int(steps) if isinstance(steps, int | float) and math.isfinite(steps) else None

    def samples(self) -> dict[str, list[str]]:
        """Return {heading: texts}: the newest, and those at the lowest validation loss."""
        steps, found = self.events.texts.get(SAMPLES_TAG) or {}, {}
        chosen = {max(steps): ""} if steps else {}
        if steps and self.best:
            best = max((s for s in steps if s <= self.best[1]), default=min(steps))
            chosen[best] = ", the lowest" if best == self.best[1] else ", up to the lowest"
        validation = self.curve("validation")
        for step, words in chosen.items():
            heading = f"step {step:,}"
            if validation and step in validation.steps:
                loss = validation.values[validation.steps == step][0]
                heading += f", validation loss {loss:.4f}{words}"
            found[heading] = [plain(t) for t in from_code(steps[step]).split(SAMPLE_RULE)]
        return found

    def warnings(self) -> list[str]:
        """Return the warnings that are on, in the program's words."""
        texts = [self.events.texts.get(tag, {}) for tag in WARNING_TAGS]
        on: dict[str, str] = {}
        for _, text in sorted(item for tag in texts for item in tag.items()):
            for line in plain(from_code(text)).splitlines():
                if begins := re.match(r"WARNING (step \d+: ([^:]+): .*)", line):
                    on[begins[2]] = begins[1]
                elif ends := re.match(r"step +\d+: over, since step \d+: ([^:]+): ", line):
                    on.pop(ends[1], None)
        return list(on.values())

    def checkpoint(self) -> tuple[int, float] | None:
        """Return (step, unix time) of the newest checkpoint where config.json says they are."""
        there = self.params.get("checkpoint_dir")
        if not isinstance(there, str):
            return None
        here, logs = self.folder.resolve(), Path(str(self.params.get("tensorboard_dir") or "."))
        above = here.parents[len(logs.parts)] if len(here.parents) > len(logs.parts) else here
        for base in (above, Path()):  # the folder in which the run was started, or this one
            with contextlib.suppress(OSError, ValueError):
                if found := list_checkpoints(base / there / here.name):
                    newest = max(found, key=lambda checkpoint: checkpoint.mtime)
                    return newest.step, newest.mtime
        return None


def event_folders(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the folders with event files from here on downwards, as TensorBoard finds them: links
    are followed, but not in a circle."""
    real = folder.resolve()
    if real in above:
        return
    with contextlib.suppress(OSError):
        inside = sorted(folder.iterdir())
        if any("tfevents" in path.name for path in inside):
            yield folder
        for path in inside:
            if path.is_dir():
                yield from event_folders(path, (*above, real))


def find_runs(words: list[str], tensorboard_dir: str) -> dict[str, Path]:
    """Return name -> folder for what the command line names; ValueError for what is not there."""
    found: list[tuple[str, Path]] = []
    seen: set[Path] = set()
    for word in words or [tensorboard_dir]:
        places = (Path(word).expanduser(), Path(tensorboard_dir).expanduser() / word)
        candidates = [path for path in places if path.is_dir()]
        top = next((path for path in candidates if any(event_folders(path))), None)
        if top is None and candidates:
            raise ValueError(f"{word}: no TensorBoard event files there, nor in any folder in it")
        if top is None:
            here = Path(tensorboard_dir).expanduser()
            names = sorted(p.name for p in here.iterdir() if p.is_dir()) if here.is_dir() else []
            near = difflib.get_close_matches(word, names, n=3) or names[-3:]
            hint = f"; there: {', '.join(near)}" if near else ""
            raise ValueError(
                f"{word}: no such folder, and no such run in --tensorboard_dir {tensorboard_dir}"
                + hint
            )
        folders = [folder for folder in event_folders(top) if folder.resolve() not in seen]
        seen |= {folder.resolve() for folder in folders}
        for folder in folders:
            name = folder.relative_to(top).as_posix() if folder != top else top.resolve().name
            found.append((" ".join(plain(name).split()), folder))
    names = [name for name, _ in found]
    return {
        name if names.count(name) == 1 else plain(os.path.relpath(folder)): folder
        for name, folder in found
    }


def read_record(folder: Path) -> dict:
    """Return config.json beside the event files; {} where there is none that can be read."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(record, dict) and isinstance(record.get("config", {}), dict)
    return record if good else {}
