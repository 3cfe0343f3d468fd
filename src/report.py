"""Charts, table and samples of runs on one page, from their TensorBoard event files.

    python src/report.py my_run                            a run in --tensorboard_dir, by its name
    python src/report.py lr-1e-3 lr-3e-3 --out lr_report   several, in the same charts
    python src/report.py path/to/folder                    any folder: all runs below it
    python src/report.py my_run --serve                    the page while it trains, for a phone

Writes index.html (one file with everything in it) and scalars.csv. Runs may still be going on, and
may come from other programs: what a run has not logged is left out.

Sections: Comparison · Table · Page · Report · The command
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from basics import terminal  # before anything that opens files

# isort: split
import argparse
import contextlib
import csv
import dataclasses
import html
import io
import itertools
import math
import re
import socket
import time
from datetime import datetime

import numpy as np

from basics.durable import replacing
from basics.words import count, duration, plain
from monitoring import charts, serving
from monitoring.event_files import RunReader
from monitoring.runs import WARNING_TAGS, Run, find_runs, read_record

# --- Comparison -----------------------------------------------------------------------------------

IN_LEGEND = 4  # hyperparameters
IN_CHARTS = charts.COLORS  # runs: more are only in the table and the CSV


def show(value) -> str:
    """Return a hyperparameter as one would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list | tuple):
        return " ".join(map(show, value))
    return str(value)


def differing(runs: list[Run]) -> list[str]:
    """Return the hyperparameters that differ between the runs and change what is learned: of these
    the ones that somebody asked for, if the runs say."""
    known = [run for run in runs if run.params]
    names = list(dict.fromkeys(name for run in known for name in run.params))
    names = [n for n in names if len({show(run.params.get(n)) for run in known}) > 1]
    if names:
        from train_improved import Config

        idle = {f.name for f in dataclasses.fields(Config) if not f.metadata["learned"]}
        names = [name for name in names if name not in idle]
    asked = {"model"}.union(*(run.record.get("asked", ()) for run in known))
    return [name for name in names if name in asked] or names


def label_and_style(runs: list[Run]) -> list[str]:
    """Set each run's legend label and colour; return the differing hyperparameters."""
    names = differing(runs) if len(runs) > 1 else []
    for run in runs:
        parts = [f"{n} {show(run.params[n])}" for n in names if n in run.params]
        run.label = ", ".join(parts[:IN_LEGEND]) + (", …" if len(parts) > IN_LEGEND else "")
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = f"{run.label} ({run.name})" if run.label else run.name
        run.label = run.label or run.name
    charted = sorted(runs, key=rank)[:IN_CHARTS]
    for i, run in enumerate(run for run in runs if run in charted):
        run.style = i
    return names


def rank(run: Run) -> tuple:
    """Return a key that sorts runs by their lowest validation loss; runs without one come last, by
    their training loss."""
    best = run.best or (0.0, 0)
    return run.best is None, best[0], run.last("train") or math.inf, run.name


def auto_window(runs: list[Run]) -> int:
    """Return how many steps to average over: a fiftieth of the longest run, or five points where
    few are logged; the nearest of 1, 2, 5, 10, 20, 50 … (in ratio)."""
    points = [charts.spacing(curve) for run in runs if (curve := run.curve("train"))]
    least = max([run.last_step / 50 for run in runs] + [5 * steps for steps in points])
    round_ones = [m * 10**e for e in range(9) for m in (1, 2, 5)]
    return min(round_ones, key=lambda s: abs(math.log(s / max(least, 1))))


# --- Table ----------------------------------------------------------------------------------------


def number(value: float | None, form: str = ".4f") -> str:
    """Format a value; nothing stands for None."""
    return "" if value is None else format(value, form)


def recent_loss(run: Run, window: int) -> float | None:
    train = run.curve("train")
    return train and float(train.values[train.steps > train.steps[-1] - window].mean())


def run_table(runs: list[Run], names: list[str], window: int) -> dict[str, list[str]]:
    """Return column -> a cell per run, the run with the lowest validation loss first. Columns in
    which no run has anything are left out."""
    rows = [table_row(run, names, window) for run in sorted(runs, key=rank)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: cells for name, cells in columns.items() if any(cells)}


def table_row(run: Run, names: list[str], window: int) -> dict[str, str]:
    hellaswag, rate, mfu = run.curve("hellaswag"), run.curve("rate"), run.curve("mfu")
    of_window = f" (of {window:,} steps)" if window > 1 else ""
    return {
        "run": run.name,
        **{name: show(run.params[name]) if name in run.params else "" for name in names},
        "step": f"{run.last_step:,}" + (f" of {run.goal:,}" if run.goal else ""),
        "tokens": "" if run.tokens is None else count(run.tokens),
        "training time": duration(float(run.clock[1][-1])) if run.last_step else "",
        "best validation loss": number(run.best and run.best[0]),
        "at step": number(run.best and run.best[1], ",d"),
        "last validation loss": number(run.last("validation")),
        f"last training loss{of_window}": number(recent_loss(run, window)),
        "best HellaSwag": number(hellaswag and hellaswag.values.max()),
        "tokens/s (median)": number(rate and np.median(rate.values), ",.0f"),
        "MFU (median)": number(mfu and np.median(mfu.values), ".1%"),
        "goodput": number(run.last("goodput"), ".1%"),
        "updates skipped": number(run.last("skips") or None, ".0f"),
    }


def text_table(columns: dict[str, list[str]]) -> str:
    """Return the table for a terminal, also Markdown. Numbers are flush right."""
    lines = []
    for name, column in columns.items():
        width = max(map(len, [name, *column, "---"]))
        right = all(re.match(r"[\d.,]|$", cell) for cell in column) and name != "run"
        rule = "-" * (width - 1) + ":" if right else "-" * width
        padded = [c.rjust(width) if right else c.ljust(width) for c in (name, *column)]
        lines.append([padded[0], rule, *padded[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*lines, strict=True))


def write_csv(file, runs: list[Run]) -> int:
    """Write every point of every run as it was logged; return how many."""
    rows = 0
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
    """Return what a reader of the numbers should know."""
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
        bad = [f"{tag} ({number})" for tag, number in bad.items() if number]
        if bad:
            found.append(f"{run.name}: values that are not finite are not drawn: {', '.join(bad)}.")
        found += [f"{run.name}: {phrase}." for phrase in run.events.damage()]
    if silent:
        found.append(f"Nothing logged yet: {', '.join(silent)}.")
    return found


# --- Page -----------------------------------------------------------------------------------------

CSS = Path(charts.__file__).with_name("page.css").read_text(encoding="utf-8")
SILENT_SECONDS = 600  # at least; evaluations and large checkpoints take minutes
esc = html.escape


def ago(when: float, now: float) -> str:
    """Return an age that goes on in a page that is looked at."""
    return f'<time data-at="{when:.0f}">{duration(now - when)} ago</time>'


def state_of(run: Run, now: float) -> str:
    """Return one line: is it alive, where is it."""
    passed, train = now - run.last_time, run.curve("train")
    usual = float(np.median(np.diff(train.times[-100:]))) if train and len(train) > 1 else 0.0
    if run.events.finished or (run.goal and run.last_step >= run.goal):
        word = '<b class="good">finished</b>'
    elif passed > max(SILENT_SECONDS, 20 * usual):
        word = '<b class="bad">silent</b>'
    else:
        word = '<b class="good">training</b>'
    of = f" of {run.goal:,} ({run.last_step / run.goal:.0%})" if run.goal else ""
    return f"{word} · step {run.last_step:,}{of} · last value {ago(run.last_time, now)}"


def seconds_left(run: Run) -> float | None:
    """Return what the steps to come take at the usual speed of the last 100; None at the end."""
    steps, seconds, _ = run.clock
    if not run.goal or len(steps) < 2 or run.last_step >= run.goal:
        return None
    recent = np.diff(seconds[-100:]) / np.diff(steps[-100:])
    return float((run.goal - run.last_step) * np.median(recent))


def headline(run: Run, window: int, now: float) -> str:
    """Say what one wants to know of a run at a glance; what it has not logged is left out."""
    best = f"lowest {run.best[0]:.4f} at step {run.best[1]:,}" if run.best else ""
    left, until = seconds_left(run), ""
    with contextlib.suppress(OverflowError, ValueError, OSError):
        until = f"{datetime.fromtimestamp(now + (left or 0)):until about %a %d %b, %H:%M}"
    warnings = run.warnings()
    incidents = [
        f"{times:.0f} {name}"
        for what, name in (("skips", "updates skipped"), ("rollbacks", "roll-backs"))
        if (times := run.last(what))
    ]
    watched = incidents or any(tag in run.curves for tag in WARNING_TAGS)
    saved = run.checkpoint()
    rate, mfu = run.curve("rate"), run.curve("mfu")
    used = np.median(mfu.values[-100:]) if mfu else 0.0
    busy = ", of a peak measured under load" if used > 1 else ""
    hours, kwh = run.curves.get("Performance/device_hours"), run.curves.get("Performance/kwh")
    device, several = run.record.get("device"), run.record.get("world_size")
    device = f"{several} × {device}" if several not in (None, 1) else device
    dtype = f"{show(run.params.get('dtype', ''))}, torch {run.record.get('torch')}"
    cards = [  # name, value, more: HTML
        ("training loss", number(recent_loss(run, window)), f"mean of {window:,} steps"),
        ("validation loss", number(run.last("validation")), best),
        ("remaining", left and duration(left), until),
        ("warnings", watched and (str(len(warnings) or "none")), ", ".join(incidents)),
        ("last checkpoint", saved and ago(saved[1], now), saved and f"step {saved[0]:,}"),
        ("trained", run.last_step and duration(float(run.clock[1][-1])),
         "" if run.tokens is None else f"{count(run.tokens)} tokens"),
        ("tokens per second", rate and f"{np.median(rate.values[-100:]):,.0f}",
         f"MFU {used:.1%}{busy}" if mfu else ""),
        ("HellaSwag", number(run.last("hellaswag")), "chance is 0.25"),
        ("cost, device-hours", hours and f"{hours.values[-1]:.3g}",
         f"{kwh.values[-1]:.3g} kWh" if kwh else ""),
        ("machine", device and f"<small>{esc(device)}</small>", esc(dtype)),
    ]  # fmt: skip
    rows = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>"
        for name, value, more in cards
        if value
    )
    done = f"{min(100, 100 * run.last_step / run.goal):.1f}" if run.goal else ""
    bar = f'<div class="bar"><i style="width:{done}%"></i></div>' if done else ""
    notes = "".join(f'<p class="warning">{esc(text)}</p>' for text in warnings)
    return f'<p>{state_of(run, now)}</p>{bar}<dl class="cards">{rows}</dl>{notes}'


def html_table(table: dict[str, list[str]], runs: list[Run]) -> str:
    styles = {run.name: run.style for run in runs if len(runs) > 1}

    def cell(column: str, text: str) -> str:
        style = styles.get(text) if column == "run" else None
        mark = f'<span class="swatch c{style}"></span>' if style is not None else ""
        return f"<td>{mark}{esc(text)}</td>"

    rows = "\n".join(
        "<tr>" + "".join(cell(name, column[i]) for name, column in table.items()) + "</tr>"
        for i in range(len(table["run"]))
    )
    head = "".join(f"<th>{esc(name)}</th>" for name in table)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{rows}</table></div>\n'


def samples_of(run: Run) -> str:
    parts = []
    for heading, texts in run.samples().items():
        parts.append(f'<p class="soft">{esc(heading)}</p>')
        parts += [f"<pre>{esc(text)}</pre>" for text in texts]
    return "".join(parts)


def facts(run: Run) -> str:
    """Return a run's configuration as text, from config.json or the HParams record."""
    hidden = ("config", "asked", "packages")
    rows = {name: value for name, value in run.record.items() if name not in hidden}
    asked = run.record.get("asked", ())
    lines = [f"{name:<18} {show(value)}" for name, value in rows.items()]
    flags = [f"--{n} {show(v)}" + ("   (asked for)" if n in asked else "")
             for n, v in run.params.items()]  # fmt: skip
    return plain("\n".join([*lines, *([""] if lines and flags else []), *flags]))


def html_page(title: str, main: str, live: bool) -> str:
    """Return the file, which loads nothing from anywhere, whatever a run wrote. live: it renews
    itself."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    script = ""
    if live:
        policy += f"; script-src 'sha256-{serving.SCRIPT_HASH}'; connect-src 'self'"
        script = f"<script>{serving.SCRIPT}</script>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)}</title><style>{CSS}</style></head>\n"
        f'<body data-now="{time.time():.0f}" data-every="{serving.EVERY}">'
        f"<main>{main}</main>{script}</body></html>\n"
    )


# --- Report ---------------------------------------------------------------------------------------


class Report:
    """Reads runs as they are now, and makes the page of them."""

    def __init__(self, words: list[str], tensorboard_dir: str, window: int | None):
        """Take the command's words. window: steps to average over; None: chosen."""
        self.words, self.tensorboard_dir, self.asked_window = words, tensorboard_dir, window
        self.readers: dict[Path, RunReader] = {}
        self.folders: dict[str, Path] = {}
        self.checkpoints: list = []
        self.runs: list[Run] = []
        self.silent: list[str] = []  # names of runs without any point
        self.table: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def update(self) -> bool:
        """Read what is new; return if anything is. Raise ValueError if there is no such run."""
        before = self.folders, self.checkpoints
        self.folders = find_runs(self.words, self.tensorboard_dir)
        changed = False
        for folder in self.folders.values():
            changed |= self.readers.setdefault(folder, RunReader(folder)).update()
        if changed or self.folders != before[0]:
            runs = [Run(n, f, self.readers[f], read_record(f)) for n, f in self.folders.items()]
            self.runs = [run for run in runs if run.curves]
            self.silent = [run.name for run in runs if not run.curves]
        self.checkpoints = [run.checkpoint() for run in self.runs]
        return changed or (self.folders, self.checkpoints) != before

    @property
    def title(self) -> str:
        return f"Run {self.runs[0].name}" if len(self.runs) == 1 else f"{len(self.runs)} runs"

    def main(self) -> str:
        """Lay out what is there: set the table and notes; return the page's content."""
        names = label_and_style(self.runs)
        charted = [run for run in self.runs if run.style is not None]
        window = self.asked_window or auto_window(charted)
        self.table = run_table(self.runs, names, window)
        self.notes = remarks(self.runs, self.silent)
        now, single = time.time(), len(self.runs) == 1
        newest = max(self.runs, key=lambda run: run.last_time)
        made = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
        table = html_table(self.table, self.runs)
        parts = [f"<h1>{esc(self.title)}</h1>"]
        parts += [] if single else [f"<h2>{esc(newest.name)}</h2>"]
        parts.append(headline(newest, window, now))
        if text := samples_of(newest):
            parts.append(f"<h2>Samples</h2>{text}")
        parts += [] if single else [f"<h2>All runs</h2>{table}"]
        parts += [f"<p>{esc(note)}</p>" for note in self.notes]
        parts.append(charts.all_charts(charted, window))
        parts += [f"<h2>Table</h2>{table}"] if single else []
        others = [run for run in sorted(self.runs, key=rank) if run is not newest]
        folds = [("samples of ", run, samples_of(run)) for run in others]
        folds += [("configuration of ", run, f"<pre>{esc(facts(run))}</pre>") for run in self.runs]
        parts.append("<h2>More</h2>")
        parts += [
            f'<details id="d{i}"><summary>{what}{esc(run.name)}</summary>{text}</details>'
            for i, (what, run, text) in enumerate(folds)
            if text
        ]
        parts.append(
            '<p><a href="scalars.csv">scalars.csv</a>: every point, as run, tag, step, wall time '
            f'(unix seconds), value</p><p class="soft">Made {made}.</p>'
        )
        return "\n".join(parts)

    def page(self) -> str | None:
        """Return the page for a browser that asks now; None: as before."""
        try:
            if not self.update():
                return None
        except (ValueError, OSError) as error:
            self.folders, self.runs, self.silent = {}, [], [str(error)]
        if not self.runs:
            text = f"<h1>Nothing logged yet</h1><p>{esc(', '.join(self.silent))}</p>"
            text += f'<p class="soft">Looked for again every {serving.EVERY} seconds.</p>'
            return html_page("Nothing logged yet", text, live=True)
        return html_page(self.title, self.main(), live=True)

    def write_csv(self, file) -> None:
        """Write scalars.csv to a browser."""
        text = io.TextIOWrapper(file, "utf-8", "replace", newline="")
        write_csv(text, self.runs)
        text.detach()

    def write(self, out: Path) -> str:
        """Write the folder; return what to print. Raise ValueError where that cannot be done."""
        start = time.monotonic()
        self.update()
        if not self.runs:
            raise ValueError(
                f"{', '.join(self.silent)}: no scalars logged yet; try again in a moment"
            )
        page = html_page(self.title, self.main(), live=False)
        try:
            out.mkdir(parents=True, exist_ok=True)
            with replacing(out / "scalars.csv", "w") as file:
                rows = write_csv(file, self.runs)
            with replacing(out / "index.html", "w") as file:
                file.write(page)
        except OSError as error:
            raise ValueError(
                f"--out {out}: cannot write there ({error.strerror or error}); name another folder"
            ) from None
        seconds = time.monotonic() - start
        last = f"{out / 'index.html'}: {page.count('<figure')} charts, {rows:,} points in "
        last += f"{out / 'scalars.csv'}, {seconds:.1f} s"
        return "\n".join([text_table(self.table), *self.notes, last])


# --- The command ----------------------------------------------------------------------------------

PORT = 6060


def port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port: write RUN before --serve")
    return int(text)


@terminal.command
def main(argv: list[str] | None = None) -> int:
    parser = terminal.Parser(description=(__doc__ or "").rsplit("\n\n", 1)[0])
    # fmt: off
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder, a folder of runs, or a run's name in --tensorboard_dir [all that are there]")  # noqa: E501
    parser.add_argument("--tensorboard_dir", default="runs", metavar="FOLDER", help="where runs are looked for by name [runs]")  # noqa: E501
    parser.add_argument("--out", metavar="FOLDER", help="folder to write the page and the CSV to [report]")  # noqa: E501
    parser.add_argument("--smooth", type=int, metavar="STEPS", help="how many steps lines are averages of, 1 = none [a fiftieth of the longest run]")  # noqa: E501
    parser.add_argument("--serve", type=port, nargs="?", const=PORT, metavar="PORT", help=f"show the page at http://localhost:PORT, renewed while the runs go on [{PORT}]")  # noqa: E501
    parser.add_argument("--host", default="localhost", help="address to serve at [localhost: this computer alone]")  # noqa: E501
    parser.add_argument("--bind_all", action="store_true", help="serve at all addresses: everyone who can reach the port can read")  # noqa: E501
    # fmt: on
    args = parser.parse_args(argv)
    if args.smooth is not None and args.smooth < 1:
        raise ValueError(f"--smooth {args.smooth}: give 1 (none) or more steps")
    report = Report(args.runs, args.tensorboard_dir, args.smooth)
    if args.serve is None:
        print(report.write(Path(args.out or "report").expanduser()))
        return 0
    if args.out:
        raise ValueError(f"--out {args.out}: --serve writes no folder, give one of them")
    return serve(report, "" if args.bind_all else args.host, args.serve)


def serve(report: Report, host: str, port: int) -> int:
    """Show the report until Ctrl-C."""
    try:
        server = serving.PageServer(host, port, report.page, report.write_csv)
    except OSError as error:
        raise ValueError(
            f"--serve {port}: {host or 'this address'} cannot be used "
            f"({error.strerror or error}); give another port"
        ) from None
    with server:
        try:
            find_runs(report.words, report.tensorboard_dir)
        except ValueError as error:
            print(f"{error}; waiting for it", flush=True)
        names = [socket.gethostname()] if not host else [host]
        print(f"http://{names[0]}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
