"""Charts and tables of runs without clicking: TensorBoard event files become one folder to show.

    python src/report.py my_run                            a run in --tensorboard_dir, by its name
    python src/report.py lr-1e-3 lr-3e-3 --out lr_report   several, in the same charts
    python src/report.py path/to/folder                    any folder: all runs below it

The folder holds index.html (one file with everything in it), report.md, each chart as PNG and SVG,
and scalars.csv. Runs may still be going on, and may come from other programs: what a run has not
logged is left out. How curves are drawn is in charts.py.

Sections: Runs · Comparison · Tables and samples · Pages · The command
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import difflib
import html
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np

from monitoring import charts

# tensorboard_log, which loads torch, is imported where it is needed: --help and a mistyped name
# answer at once.

# --- Runs -----------------------------------------------------------------------------------------

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
# Tags without a chart of their own that the remaining charts need not repeat.
FAMILIAR = {"Loss/validation_best", "Gradient/norm", "Training/epoch", "Performance/eta_hours"}
SAMPLES_TAG = "Generated_Samples/text"
SAMPLE_RULE = "\n\n---\n\n"  # between the samples of one evaluation


@dataclass(eq=False)
class Curve:
    """The points of one tag in the order of their steps; a step written twice counts once."""

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
    """One run's folder, read."""

    name: str
    folder: Path
    events: object  # tensorboard_log.RunEvents
    record: dict  # config.json, {} without one
    curves: dict[str, Curve] = field(default_factory=dict)  # by tag
    params: dict = field(default_factory=dict)  # hyperparameters
    label: str = ""  # in legends
    style: charts.Style | None = None  # None: not in the charts

    def __post_init__(self):
        for tag, series in self.events.scalars.items():
            steps = np.frombuffer(series.steps, np.int64)
            _, last = np.unique(steps[::-1], return_index=True)
            keep = len(steps) - 1 - last  # of each step the point written last
            values, times = np.frombuffer(series.values), np.frombuffer(series.times)
            if len(steps):
                self.curves[tag] = Curve(steps[keep], values[keep], times[keep])
        self.params = self.record.get("config") or {
            name: None if value != value else value  # NaN is how None was stored
            for name, value in self.events.hparams.items()
        }

    def tag(self, what: str) -> str | None:
        return next((tag for tag in TAGS[what] if tag in self.curves), None)

    def curve(self, what: str) -> Curve | None:
        """The finite points of what TAGS names; None if there are none."""
        curve = self.curves[self.tag(what)].finite() if self.tag(what) else None
        return curve if curve else None

    @property
    def last_step(self) -> int:
        return max(int(curve.steps[-1]) for curve in self.curves.values())

    @cached_property
    def clock(self) -> tuple[np.ndarray, np.ndarray, str]:
        """(steps, seconds of training up to each of them, how that was found). Pauses between
        restarts are not in it, nor is work that a crash undid."""
        steps_ms = self.curve("step_ms")
        if steps_ms:
            past = np.diff(steps_ms.steps, prepend=steps_ms.steps[0] - 1)  # > 1: some not logged
            seconds = np.cumsum(steps_ms.values * past) / 1000
            return (
                steps_ms.steps,
                seconds,
                "the sum of the step times, without evaluations, saving and pauses",
            )
        longest = max(self.curves.values(), key=len)
        passed = np.maximum(np.diff(longest.times, prepend=longest.times[0]), 0)
        past = np.diff(longest.steps, prepend=longest.steps[0])
        usual = np.median(passed[1:] / past[1:]) * past if len(longest) > 1 else passed
        passed = np.where(passed > np.maximum(10 * usual, 60), usual, passed)
        return longest.steps, np.cumsum(passed), "by the clock, without long pauses"

    def tokens_at(self, steps):
        """Tokens trained on up to these steps; None if nothing says so."""
        curve = self.curve("tokens")
        if curve:
            return np.interp(
                steps, np.append(0, curve.steps[curve.steps > 0]),
                np.append(0, curve.values[curve.steps > 0]),
            )  # fmt: skip
        batch = self.params.get("total_batch_size")
        return steps * float(batch) if isinstance(batch, int | float) else None

    def seconds_at(self, steps):
        known, seconds, _ = self.clock
        if known[0] == 1:
            known, seconds = np.append(0, known), np.append(0, seconds)
        return np.interp(steps, known, seconds)

    @property
    def is_fineweb_edu(self) -> bool:
        """Whether all of its data is FineWeb-Edu, as the names of its folders say."""
        data = self.record.get("config", {}).get("data_dir") or ""
        folders = data if isinstance(data, list) else data.split()
        return bool(folders) and all(re.search(r"fineweb[-_]?edu", f.lower()) for f in folders)

    @property
    def other_tags(self) -> set[str]:
        """What no chart knows."""
        tags = {tag for tag, curve in self.curves.items() if len(curve.finite()) > 1}
        return tags.difference(FAMILIAR, *TAGS.values())

    def increases(self, what: str):
        """Steps at which a counter went up."""
        curve = self.curve(what)
        if curve is None:
            return np.array([], np.int64)
        before = 0 if curve.steps[0] <= 1 else curve.values[0]
        return curve.steps[np.diff(curve.values, prepend=before) > 0]

    @property
    def best(self) -> tuple[float, int] | None:
        """(lowest validation loss, its step)"""
        curve = self.curve("validation")
        if curve is None:
            return None
        i = int(np.argmin(curve.values))
        return float(curve.values[i]), int(curve.steps[i])


def plain(text: str) -> str:
    """Without control characters, whoever wrote it."""
    return re.sub(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "�", text)


def has_events(folder: Path) -> bool:
    return next(folder.rglob("*tfevents*"), None) is not None


def find_runs(words: list[str], tensorboard_dir: str) -> dict[str, Path]:
    """Name -> folder for what the command line names; ValueError for what is not there."""
    found: dict[Path, str] = {}  # folder -> name
    for word in words:
        candidates = [path for path in (Path(word), Path(tensorboard_dir, word)) if path.is_dir()]
        top = next(filter(has_events, candidates), None)
        if top is None and candidates:
            raise ValueError(
                f"{candidates[0]} has no TensorBoard event files, nor any folder in it"
            )
        if top is None:
            here = Path(tensorboard_dir)
            names = sorted(p.name for p in here.iterdir() if p.is_dir()) if here.is_dir() else []
            near = difflib.get_close_matches(word, names, n=3) or names[-3:]
            hint = f"; there: {', '.join(near)}" if near else ""
            raise ValueError(
                f"{word}: no such folder, and no such run in --tensorboard_dir {here}{hint}"
            )
        direct = any("tfevents" in path.name for path in top.iterdir())
        folders = [top] if direct else sorted({path.parent for path in top.rglob("*tfevents*")})
        for folder in folders:
            name = top.resolve().name if direct else folder.relative_to(top).as_posix()
            name = " ".join(plain(name).split())
            found.setdefault(folder.resolve(), name)
    names = list(found.values())
    return {
        name if names.count(name) == 1 else os.path.relpath(folder): folder
        for folder, name in found.items()
    }


def read_record(folder: Path) -> dict:
    """config.json beside the event files; {} where there is none that can be read."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(record, dict) and isinstance(record.get("config", {}), dict)
    return record if good else {}


# --- Comparison -----------------------------------------------------------------------------------

IN_LEGEND = 4  # hyperparameters
IN_CHARTS = 14  # runs: more are only in tables and CSV


def show(value) -> str:
    """A hyperparameter as one would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(show, value))
    return str(value)


def differing(runs: list[Run]) -> list[str]:
    """Names of the hyperparameters that differ between the runs, without those that follow from
    others: what somebody asked for, if the runs say what that was."""
    from train_improved import Config  # loads torch, as reading the events has

    not_hyper = {f.name for f in dataclasses.fields(Config) if not f.metadata["learned"]}
    known = [run for run in runs if run.params]
    names = list(dict.fromkeys(name for run in known for name in run.params))
    names = [
        name
        for name in names
        if name not in not_hyper and len({show(run.params.get(name)) for run in known}) > 1
    ]
    asked = {"model"}.union(*(run.record.get("asked", ()) for run in known))
    names = [name for name in names if name in asked] or names
    rates = [(run.params.get("max_lr"), run.params.get("min_lr")) for run in known]
    numbers = all(isinstance(rate, int | float) for pair in rates for rate in pair)
    if "min_lr" in names and numbers and all(math.isclose(low, 0.1 * top) for top, low in rates):
        names.remove("min_lr")  # the default, which follows from max_lr
    return names


def label_and_style(runs: list[Run]) -> list[str]:
    """Sets each run's legend label and looks; returns the differing hyperparameters."""
    names = differing(runs) if len(runs) > 1 else []
    for run in runs:
        parts = [f"{n} {show(run.params[n])}" for n in names if n in run.params]
        run.label = ", ".join(parts[:IN_LEGEND]) + (", …" if len(parts) > IN_LEGEND else "")
    labels = [run.label for run in runs]
    for run in runs:
        if not run.label:
            run.label = run.name
        elif labels.count(run.label) > 1:
            run.label = f"{run.label} ({run.name})"
    charted = sorted(runs, key=rank)[:IN_CHARTS]
    for i, run in enumerate(run for run in runs if run in charted):
        run.style = charts.style(i)
    return names


def rank(run: Run) -> tuple:
    """Lowest validation loss first; runs without one behind, by their last training loss."""
    train = run.curve("train")
    return (
        run.best is None,
        run.best[0] if run.best else 0.0,
        train.values[-1] if train else math.inf,
        run.name,
    )


def nice(number: float) -> int:
    """The nearest of 1, 2, 5, 10, 20, 50 … (in ratio)."""
    steps = [m * 10**e for e in range(9) for m in (1, 2, 5)]
    return min(steps, key=lambda s: abs(math.log(s / max(number, 1))))


def auto_window(runs: list[Run]) -> int:
    """Steps to average over: a fiftieth of the longest run, or five points where few are logged."""
    points = [charts.spacing(curve) for run in runs if (curve := run.curve("train"))]
    return nice(max([run.last_step / 50 for run in runs] + [5 * steps for steps in points]))


# --- Tables and samples ---------------------------------------------------------------------------


def number(value: float | None, form: str = ".4f") -> str:
    """Formatted; nothing for None."""
    return "" if value is None else format(value, form)


def run_table(runs: list[Run], names: list[str], window: int) -> dict[str, list[str]]:
    """Column -> a cell per run, the run with the lowest validation loss first. Columns in which no
    run has anything are left out."""
    runs = sorted(runs, key=rank)
    columns: dict[str, list[str]] = {"run": [run.name for run in runs]}
    for name in names:
        columns[name] = [show(r.params[name]) if name in r.params else "" for r in runs]
    rows = [table_row(run, window) for run in runs]
    for name in rows[0]:
        columns[name] = [row[name] for row in rows]
    return {name: cells for name, cells in columns.items() if any(cells)}


def table_row(run: Run, window: int) -> dict[str, str]:
    goal = run.params.get("max_steps")
    tokens = run.tokens_at(np.array([run.last_step]))
    validation, train = run.curve("validation"), run.curve("train")
    hellaswag, rate = run.curve("hellaswag"), run.curve("rate")
    goodput, skips = run.curve("goodput"), run.curve("skips")
    recent = train and train.values[train.steps > train.steps[-1] - window].mean()
    return {
        "step": f"{run.last_step:,}"
        + (f" of {int(goal):,}" if isinstance(goal, int | float) else ""),
        "tokens": amount(float(tokens[0])) if tokens is not None else "",
        "training time": duration(float(run.clock[1][-1])) if run.last_step else "",
        "best validation loss": number(run.best and run.best[0]),
        "at step": number(run.best and run.best[1], ",d"),
        "last validation loss": number(validation and validation.values[-1]),
        "last training loss" + (f" (of {window:,} steps)" if window > 1 else ""): number(recent),
        "best HellaSwag": number(hellaswag and hellaswag.values.max()),
        "tokens/s (median)": number(rate and np.median(rate.values), ",.0f"),
        "goodput": number(goodput and goodput.values[-1], ".1%"),
        "updates skipped": number((skips and skips.values[-1]) or None, ".0f"),
    }


def amount(tokens: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{letter}"
    return f"{tokens:,.0f}"


def duration(seconds: float) -> str:
    unit, letter = next((u for u in ((3600, "h"), (60, "min")) if seconds >= u[0]), (1, "s"))
    return f"{seconds / unit:.1f} {letter}"


def markdown_cell(text: str) -> str:
    return re.sub(r"([\\`*\[\]|<])", r"\\\1", " ".join(text.split()))


def markdown_table(columns: dict[str, list[str]], clean=markdown_cell) -> str:
    """With columns padded, so that it can be read as it is. Numbers are flush right."""
    lines = []
    cells = {clean(name): [clean(cell) for cell in column] for name, column in columns.items()}
    for name, column in cells.items():
        width = max(map(len, [name, *column, "---"]))
        right = all(re.match(r"[\d.,]|$", cell) for cell in column) and name != "run"
        rule = "-" * (width - 1) + ":" if right else "-" * width
        padded = [c.rjust(width) if right else c.ljust(width) for c in (name, *column)]
        lines.append([padded[0], rule, *padded[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*lines, strict=True))


def best_samples(run: Run) -> tuple[int, list[str]] | None:
    """(step, texts) that the run wrote when its validation loss was lowest: those of the last step
    up to there that has any; without validation the newest."""
    from monitoring.tensorboard_log import from_code

    texts = run.events.texts.get(SAMPLES_TAG)
    if not texts:
        return None
    best = run.best[1] if run.best else math.inf
    step = max((s for s in texts if s <= best), default=min(texts))
    return step, [plain(part) for part in from_code(texts[step]).split(SAMPLE_RULE)]


def write_csv(path: Path, runs: list[Run]) -> int:
    """Every point of every run as it was logged -> rows written."""
    rows = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", "tag", "step", "wall_time", "value"))
        for run in runs:
            for tag, series in sorted(run.events.scalars.items()):
                values = np.frombuffer(series.values)
                with np.errstate(over="ignore"):
                    single = values.astype(np.float32)
                # Event files hold 32-bit numbers mostly: then not with more digits than they have.
                same = np.array_equal(single.astype(np.float64), values, equal_nan=True)
                times = (f"{t:.3f}" for t in series.times)
                writer.writerows(
                    zip(itertools.repeat(run.name), itertools.repeat(tag), series.steps, times,
                        (single if same else values).astype(str).tolist())
                )  # fmt: skip
                rows += len(values)
    return rows


def remarks(runs: list[Run], silent: list[str]) -> list[str]:
    """What a reader of the numbers should know."""
    found = []
    data = (r.record.get("data_fingerprint") or r.params.get("data_dir") for r in runs)
    if len({show(d) for d in data if d}) > 1:
        found.append("The runs have different data: their losses are not comparable as they stand.")
    if len({show(n) for r in runs if (n := r.params.get("val_tokens"))}) > 1:
        found.append("The runs were validated on different numbers of tokens (--val_tokens).")
    hidden = [run.name for run in runs if run.style is None]
    if hidden:
        found.append(
            f"The charts show the best {IN_CHARTS} runs; only in the table and in scalars.csv: "
            f"{', '.join(hidden)}."
        )
    for run in runs:
        bad = {tag: len(c) - len(c.finite()) for tag, c in run.curves.items()}
        bad = [f"{tag} ({count})" for tag, count in bad.items() if count]
        if bad:
            found.append(f"{run.name}: values that are not finite are not drawn: {', '.join(bad)}.")
        found += [f"{run.name}: {phrase}." for phrase in run.events.damage]
    if silent:
        found.append(f"Nothing logged yet: {', '.join(silent)}.")
    return found


# --- Pages ----------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #ddd; }
.made, figcaption { color: #555; font-size: .85rem; }
figure { margin: 0 0 1rem; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; vertical-align: bottom;
         border-bottom: 1px solid #e3e3e3; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1.5px solid #333; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f6f6f6; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere;
      font-size: .82rem; break-inside: avoid; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
"""


def facts(run: Run) -> str:
    """A run's configuration as text, from config.json or the HParams record."""
    rows = {name: value for name, value in run.record.items() if name not in ("config", "asked")}
    asked = run.record.get("asked", ())
    lines = [f"{name:<18} {show(value)}" for name, value in rows.items()]
    flags = [f"--{n} {show(v)}" + ("   (asked for)" if n in asked else "")
             for n, v in run.params.items()]  # fmt: skip
    return plain("\n".join([*lines, *([""] if lines and flags else []), *flags]))


@dataclass
class Page:
    """What both pages show."""

    title: str
    made: str
    runs: list[Run]
    table: dict[str, list[str]]
    notes: list[str]
    charts: list[charts.Chart]
    csv_note: str

    def samples(self) -> Iterator[tuple[str, list[str]]]:
        """(heading, texts) of each run that wrote any, the best run first."""
        for run in sorted(self.runs, key=rank):
            if (found := best_samples(run)) is not None:
                step, texts = found
                heading = f"{run.name}, step {step:,}"
                if run.best and run.best[1] == step:
                    heading += f", validation loss {run.best[0]:.4f}"
                yield heading, texts


def html_page(page: Page) -> str:
    """One file without scripts; nothing is loaded from anywhere, whatever a run wrote."""
    esc = html.escape
    styles = {run.name: run.style for run in page.runs}

    def cell(column: str, text: str) -> str:
        style = styles.get(text) if column == "run" and len(page.runs) > 1 else None
        mark = f'<span class="swatch" style="background:{style.color}"></span>' if style else ""
        return f"<td>{mark}{esc(text)}</td>"

    table = page.table
    rows = "\n".join(
        "<tr>" + "".join(cell(name, column[i]) for name, column in table.items()) + "</tr>"
        for i in range(len(table["run"]))
    )
    head = "".join(f"<th>{esc(name)}</th>" for name in table)
    parts = [f'<div class="scroll"><table><tr>{head}</tr>\n{rows}</table></div>']
    parts += [f"<p>{esc(note)}</p>" for note in page.notes]
    for chart in page.charts:
        data = base64.b64encode(chart.svg).decode()
        links = " · ".join(f'<a href="{chart.name}.{e}">{e.upper()}</a>' for e in ("png", "svg"))
        parts.append(
            f"<h2>{esc(chart.title)}</h2>\n<figure>"
            f'<img alt="{esc(chart.title)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{esc(chart.caption)} {links}</figcaption></figure>"
        )
    samples = list(page.samples())
    parts += ["<h2>Samples at the lowest validation loss</h2>"] if samples else []
    for heading, texts in samples:
        parts.append(f"<h3>{esc(heading)}</h3>")
        parts += [f"<pre>{esc(text)}</pre>" for text in texts]
    parts.append("<h2>Configuration</h2>")
    for run in page.runs:
        text = facts(run) or "no config.json and no HParams record"
        parts.append(f"<details><summary>{esc(run.name)}</summary><pre>{esc(text)}</pre></details>")
    parts.append(f'<h2>Data</h2><p><a href="scalars.csv">scalars.csv</a>: {esc(page.csv_note)}</p>')
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(page.title)}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{esc(page.title)}</h1><p class="made">{esc(page.made)}</p>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def markdown_page(page: Page) -> str:
    from monitoring.tensorboard_log import as_code

    parts = [f"# {markdown_cell(page.title)}", page.made, markdown_table(page.table)]
    parts += [markdown_cell(note) for note in page.notes]
    for chart in page.charts:
        image = f"![{chart.title}]({chart.name}.png)"
        parts += [f"## {chart.title}", image, markdown_cell(chart.caption)]
    samples = list(page.samples())
    parts += ["## Samples at the lowest validation loss"] if samples else []
    for heading, texts in samples:
        parts.append(f"### {markdown_cell(heading)}")
        for i, text in enumerate(texts, 1):
            parts += [f"Sample {i}:", as_code(text)]
    parts += ["## Data", f"[scalars.csv](scalars.csv): {page.csv_note}"]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- The command ----------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`: a browser that looks at an older
    report never sees half of a new file."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_report(runs: list[Run], silent: list[str], out: Path, window: int | None) -> str:
    """The folder; returns what to print. silent: names of runs without any point."""
    names = label_and_style(runs)
    charted = [run for run in runs if run.style]
    window = auto_window(charted) if window is None else window
    table, notes = run_table(runs, names, window), remarks(runs, silent)
    drawn = charts.all_charts(charted, window)

    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "scalars.csv") as path:
        rows = write_csv(path, runs)
        size = path.stat().st_size
    for name, extension in itertools.product(charts.NAMES, ("png", "svg")):
        (out / f"{name}.{extension}").unlink(missing_ok=True)  # an earlier report's, say
    page = Page(
        title=f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs",
        made=f"Made on {datetime.now().astimezone():%Y-%m-%d at %H:%M %Z}.",
        runs=runs,
        table=table,
        notes=notes,
        charts=drawn,
        csv_note=f"all {rows:,} points ({size / 1e6:,.1f} MB): run, tag, step, wall time (unix "
        "seconds), value.",
    )
    files = {f"{c.name}.{e}": getattr(c, e) for c in drawn for e in ("png", "svg")}
    files |= {"report.md": markdown_page(page).encode(), "index.html": html_page(page).encode()}
    for name, content in files.items():
        with replacing(out / name) as path:
            path.write_bytes(content)
    last = f"{out / 'index.html'}: {len(drawn)} charts, {rows:,} points"
    return "\n".join([markdown_table(table, clean=lambda text: text), *notes, last])


def make_report(folders: dict[str, Path], out: Path, window: int | None) -> str:
    """Reads the runs, writes the folder, returns what to print. ValueError for what the user has to
    change."""
    from monitoring import tensorboard_log

    start = time.monotonic()
    runs = [
        Run(name, folder, tensorboard_log.read_run(folder), read_record(folder))
        for name, folder in folders.items()
    ]
    silent = [run.name for run in runs if not run.curves]
    runs = [run for run in runs if run.curves]
    if not runs:
        raise ValueError(f"{', '.join(silent)}: no scalars logged yet; try again in a moment")
    try:
        said = write_report(runs, silent, out, window)
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot write there ({error.strerror or error}); name another folder"
        ) from None
    return f"{said}, {time.monotonic() - start:.1f} s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.rsplit("\n\n", 1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # fmt: off
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, a folder of runs, or a run's name in --tensorboard_dir")  # noqa: E501
    parser.add_argument("--tensorboard_dir", default="runs", metavar="FOLDER", help="where runs are looked for by name [runs]")  # noqa: E501
    parser.add_argument("--out", default="report", metavar="FOLDER", help="folder to write charts, tables and pages to [report]")  # noqa: E501
    parser.add_argument("--smooth", type=int, metavar="STEPS", help="how many steps lines are averages of, 1 = none [a fiftieth of the longest run]")  # noqa: E501
    # fmt: on
    args = parser.parse_args(argv)
    try:
        if args.smooth is not None and args.smooth < 1:
            raise ValueError(f"--smooth {args.smooth}: give 1 (none) or more steps")
        print(make_report(find_runs(args.runs, args.tensorboard_dir), Path(args.out), args.smooth))
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
