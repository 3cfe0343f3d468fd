"""report.py on real runs and on event files of every awkward kind; TensorBoard's reader agrees."""

import csv
import html.parser
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import report
from conftest import ROOT, environment, read_scalars, run
from monitoring import charts, runs, serving
from monitoring.event_files import RunReader
from monitoring.tensorboard_log import TensorBoardLog

STEP = {"Loss/train": 3.0, "Learning_Rate/lr": 1e-3, "Performance/step_time_ms": 50.0}
HELLASWAG = [
    {"ind": i, "activity_label": "x", "ctx": "A dog", "endings": list("abcd"), "label": i % 4}
    for i in range(4)
]
FINEWEB = {"data_dir": "data/fineweb_edu_10B", "max_steps": 100, "grad_clip": 1.0}


# --- Helpers --------------------------------------------------------------------------------------


def write_log(folder: Path, steps, config=None, extra=None, validate=0) -> Path:
    """A run's event file by the project's own writer; extra(step) adds tags."""
    log = TensorBoardLog(folder, 0)
    for step in steps:
        if step:
            values = STEP | {"Loss/train": 2 + 8 * math.exp(-step / 50)}
            log.scalars(values | (extra(step) if extra else {}), step)
        if validate and step % validate == 0:
            log.scalars({"Loss/validation": 2.1 + 8 * math.exp(-step / 50)}, step)
    log.close()
    if config is not None:
        record = {"config": config, "asked": list(config)}
        (folder / "config.json").write_text(json.dumps(record))
    return folder


def read_run(folder: Path) -> RunReader:
    reader = RunReader(folder)
    reader.update()
    return reader


def load(folder: Path, style: int | None = None) -> runs.Run:
    found = runs.Run(folder.name, folder, read_run(folder), runs.read_record(folder))
    found.style = style
    return found


def command(*words, cwd, expect=0) -> tuple[str, str]:
    """report.py as a person runs it -> (stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, ROOT / "src" / "report.py", *map(str, words)],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def make(folders, out: Path, window=None) -> str:
    """The same in this process -> what it prints."""
    return report.Report([str(f) for f in folders], "runs", window).write(out)


class Page(html.parser.HTMLParser):
    """What a page loads, links to, which tags it has, and the words of each figure."""

    def __init__(self, path: Path | str):
        super().__init__()
        self.text = path if isinstance(path, str) else path.read_text(encoding="utf-8")
        self.sources, self.links, self.tags, self.words = [], [], [], {}
        self.figure, self.in_title = None, False
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.in_title = tag == "figcaption"

    def handle_data(self, data):
        if self.in_title:
            self.figure = data
            self.words[data] = ""
            self.in_title = False
        elif self.figure is not None:
            self.words[self.figure] += f"{data} | "

    def handle_endtag(self, tag):
        self.figure = None if tag == "figure" else self.figure


DRAWN = {
    "Loss by step", "Loss by tokens", "Loss by time", "Learning rate",
    "Gradient norm before clipping", "HellaSwag accuracy", "Tokens per second",
}  # fmt: skip


# --- Real runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(data, tmp_path_factory) -> Path:
    """A folder with runs/ of two real runs and report/ made from them by the command."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, HELLASWAG)))
    for lr in ("1e-2", "1e-3"):
        run(
            *f"--run_name lr-{lr} --max_lr {lr} --max_steps 24 --eval_freq 12 --use_tensorboard "
            "--hellaswag_file items.jsonl --histogram_freq 0".split(),
            cwd=folder,
            data=data,
            timeout=900,
        )
    (folder / "stdout").write_text(command("lr-1e-3", "runs/lr-1e-2", cwd=folder)[0])
    return folder


def test_the_page_is_complete_and_stands_alone(real):
    out = real / "report"
    assert {path.name for path in out.iterdir()} == {"index.html", "scalars.csv"}
    page = Page(out / "index.html")
    assert set(page.words) >= DRAWN
    assert not {"script", "link", "img"} & set(page.tags) and page.sources == []
    assert page.links == ["scalars.csv"]
    assert "default-src 'none'" in page.text
    assert "url(" not in page.text and "@import" not in page.text
    assert len(page.text) < 300_000
    paths = re.findall(r' d="([^"]*)"', page.text)
    assert len(paths) > 50 and not any("nan" in path for path in paths)


def test_csv_holds_every_scalar_exactly(real):
    with open(real / "report" / "scalars.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "tag", "step", "wall_time", "value"]
    seen = {(r["run"], r["tag"], int(r["step"])): r for r in rows}
    count = 0
    for name in ("lr-1e-2", "lr-1e-3"):
        for tag, points in read_scalars(real / "runs" / name).items():
            for step, value, when in points:
                row = seen[name, tag, step]
                assert np.float32(row["value"]) == np.float32(value)
                assert float(row["wall_time"]) == pytest.approx(when, abs=1e-3)
                count += 1
    assert count == len(rows) > 600


def test_table_is_sorted_by_validation_loss(real):
    best = {}
    for name in ("lr-1e-2", "lr-1e-3"):
        points = read_scalars(real / "runs" / name)["Loss/validation"]
        best[name] = min(value for _, value, _ in points)
    assert best["lr-1e-2"] < best["lr-1e-3"]
    stdout = (real / "stdout").read_text().splitlines()
    table = [line for line in stdout if line.startswith("|")]
    heads, _, first, second = ([c.strip() for c in line.strip("|").split("|")] for line in table)
    assert heads[:2] == ["run", "max_lr"]  # the one thing that was asked for and differs
    first, second = dict(zip(heads, first, strict=True)), dict(zip(heads, second, strict=True))
    assert (first["run"], second["run"]) == ("lr-1e-2", "lr-1e-3")
    assert first["max_lr"] == "0.01" and first["step"] == "24 of 24"
    assert first["best validation loss"] == f"{best['lr-1e-2']:.4f}"
    assert second["best validation loss"] == f"{best['lr-1e-3']:.4f}"
    assert first["tokens"] == "6.14k" and "best HellaSwag" in heads
    figures = Page(real / "report" / "index.html").tags.count("figure")
    assert figures >= 7 and stdout[:4] == table
    assert stdout[-1].startswith(f"report/index.html: {figures} charts, ")


def test_samples_are_the_newest_and_the_best(tmp_path):
    log = TensorBoardLog(tmp_path / "run", 0)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5)):
        log.scalars({"Loss/validation": loss}, step)
        log.text("Generated_Samples/text", f"sample of {step}", step)
    log.close()
    assert load(tmp_path / "run").samples() == {
        "step 30, validation loss 2.5000": ["sample of 30"],
        "step 20, validation loss 2.0000, the lowest": ["sample of 20"],
    }


def test_headline_of_a_real_run(real):
    """Loss, progress, checkpoint, machine and cost, as the run's own files say."""
    found = load(real / "runs" / "lr-1e-2")
    assert found.events.finished
    checkpoint = found.checkpoint()  # found from config.json, in another folder than ours
    assert checkpoint is not None and checkpoint[0] == 24
    assert abs(checkpoint[1] - found.last_time) < 120
    text = report.headline(found, 5, found.last_time + 90)
    for part in ("finished", "step 24 of 24 (100%)", "1.5 min ago", "training loss",
                 f"{found.best[0]:.4f}", "step 24</small>", "warnings", "none", "machine", "CPU",
                 "HellaSwag", "device-hours", "tokens per second", "6.14k tokens"):  # fmt: skip
        assert part in text, part
    assert "remaining" not in text


def test_headline_of_a_run_that_goes_on(tmp_path):
    folder = tmp_path / "run"
    log = TensorBoardLog(folder, 0)
    more = {"Performance/tokens_per_sec": 1000.0, "Performance/mfu": 1.19}
    for step in range(1, 51):
        log.scalars(STEP | more | {"Health/warnings": 1.0, "Training/skipped_updates": 2.0}, step)
    texts = [
        "WARNING step 10: loss flat: fall = 0.0 nats; begins below 0.010. Lower --max_lr.",
        "WARNING step 20: gradient clipped nearly always: share = 99%; begins above 95%. See.",
        "step    30: over, since step 10: loss flat: fall = 0.03 nats",
    ]
    for step, text in zip((10, 20, 30), texts, strict=True):
        log.text("Health/warnings", text, step)
    log.close()
    (folder / "config.json").write_text(json.dumps({"config": {"max_steps": 1050}}))
    found = load(folder)
    assert found.warnings() == [texts[1].removeprefix("WARNING ")]
    text = report.headline(found, 5, found.last_time + 5)
    for part in ("training</b>", "step 50 of 1,050 (5%)", "remaining", "50 s", "2 updates skipped",
                 "MFU 119.0%, of a peak measured under load"):  # fmt: skip
        assert part in text, part
    assert "silent" in report.state_of(found, found.last_time + 3600)


def test_legend_names_only_what_differs(real):
    both = [load(real / "runs" / name) for name in ("lr-1e-3", "lr-1e-2")]
    both[0].params |= {"log_jsonl": True, "device": "cuda", "profile": True}  # learns the same
    both[0].record["asked"] += ["log_jsonl", "device", "profile"]
    assert report.label_and_style(both) == ["max_lr"]  # not min_lr, which follows from it
    assert [found.label for found in both] == ["max_lr 0.001", "max_lr 0.01"]
    for older in both:  # a config.json that does not say what was asked for
        del older.record["asked"]
    assert report.label_and_style(both) == ["max_lr", "min_lr"]


# --- Reading --------------------------------------------------------------------------------------


def same(folder: Path) -> dict:
    """read_run's scalars, after comparing them with TensorBoard's own reader."""
    found = {
        tag: list(zip(series.steps, series.values, series.times, strict=True))
        for tag, series in read_run(folder).scalars.items()
        if series.steps
    }
    reader = {tag: [tuple(p) for p in points] for tag, points in read_scalars(folder).items()}
    assert found.keys() >= reader.keys()
    for tag, points in reader.items():
        np.testing.assert_array_equal(found[tag], points, err_msg=tag)
    return found


def test_reads_what_tensorboard_reads(real, tmp_path):
    assert len(same(real / "runs" / "lr-1e-2")["Loss/train"]) == 24
    write_log(tmp_path / "resumed", range(101), validate=10)
    log = TensorBoardLog(tmp_path / "resumed", 61)
    for step in range(61, 81):
        log.scalars({"Loss/train": float(step)}, step)
    log.close()
    found = same(tmp_path / "resumed")
    assert [p[0] for p in found["Loss/train"]] == [*range(1, 81)]
    assert [p[0] for p in found["Loss/validation"]] == [*range(0, 61, 10)]


def test_reads_other_programs_files(tmp_path):
    with SummaryWriter(tmp_path / "other") as writer:
        for step in range(5):
            writer.add_scalar("train/loss", 1 / 3, step)
            writer.add_scalar("eval/loss", step / 3, step, new_style=True)
            writer.add_scalar("exact", 1 / 3, step, new_style=True, double_precision=True)
        writer.add_text("note", "two\nlines", 3)
        writer.add_histogram("weights", torch.arange(9.0), 3)
    events = read_run(tmp_path / "other")
    assert list(events.scalars["train/loss"].values) == [np.float32(1 / 3)] * 5
    assert events.scalars["eval/loss"].values[4] == np.float32(4 / 3)
    assert events.scalars["exact"].values[0] == 1 / 3
    assert events.texts["note"] == {3: "two\nlines"}
    assert set(events.scalars) == {"train/loss", "eval/loss", "exact"}
    with SummaryWriter(tmp_path / "other", purge_step=2) as writer:  # a restart at step 2
        writer.add_scalar("train/loss", 7.0, 2)
    assert list(read_run(tmp_path / "other").scalars["train/loss"].steps) == [0, 1, 2]
    found = load(tmp_path / "other")
    assert found.tag("train") == "train/loss" and len(found.curve("validation")) == 2


def test_hyperparameters_from_the_event_file(tmp_path):
    log = TensorBoardLog(tmp_path / "run", 0)
    log.hparams({"max_lr": 1e-3, "compile": True, "max_hours": None}, ["Loss/validation"],
                numeric=["max_hours"])  # fmt: skip
    log.close()
    found = load(tmp_path / "run")
    assert found.params == {"max_lr": 1e-3, "compile": "true", "max_hours": None}


def test_a_file_that_is_being_written(tmp_path):
    """Cut anywhere: whole records are read, nothing is said to be damaged."""
    folder = write_log(tmp_path / "run", range(1, 30))
    (path,) = folder.glob("*tfevents*")
    whole = path.read_bytes()
    last = 0
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        events = read_run(folder)
        count = len(events.scalars["Loss/train"].steps)
        assert last <= count <= last + 2 and not events.damage()
        last = count
    assert last >= 28
    path.write_bytes(whole[: len(whole) // 2])
    assert "charts" in make([folder], tmp_path / "report")


def test_only_what_is_new_is_read(tmp_path):
    """Also a resume, which puts all files into a new one, and a run that is removed."""
    folder = tmp_path / "run"
    log = TensorBoardLog(folder, 0)
    log.scalars({"a": 1.0}, 1)
    reader = RunReader(folder)
    assert reader.update() and not reader.update()
    (path,) = folder.glob("*tfevents*")
    log.scalars({"a": 2.0}, 2)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(path.read_bytes()[:20])  # half a record: the writer is at it
    assert reader.update() and list(reader.scalars["a"].values) == [1.0, 2.0]
    assert reader._places[path].end == size and not reader.update()
    log = TensorBoardLog(folder, 2)  # resumes: cleans the folder
    log.scalars({"a": 3.0}, 2)
    assert reader.update() and list(reader.scalars["a"].values) == [1.0, 3.0]
    log.scalars({"a": 4.0}, 3)
    assert reader.update() and list(reader.scalars["a"].values) == [1.0, 3.0, 4.0]
    assert not reader.damage()
    shutil.rmtree(folder)
    reader.update()
    log = TensorBoardLog(folder, 0)
    log.scalars({"a": 5.0}, 1)
    assert reader.update() and list(reader.scalars["a"].values) == [5.0]


def test_damage_is_said(tmp_path):
    folder = write_log(tmp_path / "run", range(1, 30))
    (path,) = folder.glob("*tfevents*")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    said = make([folder], tmp_path / "report")
    assert re.search(rf"run: {path.name}: \d damaged records and \d+ unreadable bytes", said)


# --- Axes -----------------------------------------------------------------------------------------


def test_hours_are_training_time_without_pauses(tmp_path):
    """Sums of step times: neither a pause, nor what a crash undid, nor unlogged steps distort."""
    log = TensorBoardLog(tmp_path / "run", 0)
    for step in range(1, 81):
        log.scalars({"Performance/step_time_ms": 1000.0}, step)
    log.close()
    log = TensorBoardLog(tmp_path / "run", 51)  # steps 51 to 80 are done again, on a slower machine
    for step in range(51, 101):
        if step != 60:  # as after a full disk
            log.scalars({"Performance/step_time_ms": 2000.0}, step)
    log.close()
    found = load(tmp_path / "run")
    seconds = found.seconds_at(np.array([0, 25, 50, 75, 100]))
    np.testing.assert_allclose(seconds, [0, 25, 50, 100, 150])


def test_hours_by_the_clock_leave_out_long_pauses(tmp_path):
    with SummaryWriter(tmp_path / "run") as writer:
        for step in range(100):
            when = 1e9 + 30 * step + (86_400 if step >= 50 else 0)
            writer.add_scalar("train/loss", 1.0, step * 10, walltime=when)
    found = load(tmp_path / "run")
    assert found.seconds_at(np.array([990]))[0] == pytest.approx(99 * 30)


def test_tokens(tmp_path):
    def tokens(step):
        return {"Training/tokens": step * 512.0}

    own = load(write_log(tmp_path / "own", range(1, 11), extra=tokens))
    np.testing.assert_allclose(own.tokens_at(np.array([0, 5, 10])), [0, 2560, 5120])
    config = load(write_log(tmp_path / "config", range(1, 11), {"total_batch_size": 100}))
    np.testing.assert_allclose(config.tokens_at(np.array([0, 5])), [0, 500])
    assert load(write_log(tmp_path / "none", range(1, 11))).tokens_at(np.array([5])) is None


def test_smoothing():
    steps = np.arange(1, 1001)
    rng = np.random.default_rng(0)
    curve = runs.Curve(steps, 5 - steps / 300 + rng.normal(0, 0.1, 1000), steps * 1.0)
    places, values = charts.smooth(curve, 100)
    assert len(places) == charts.PLACES and places[0] == 0 and places[-1] == 999
    naive = [  # symmetric at the beginning, over what there is at the end
        curve.values[max(0, i - (half := min(50, i))) : i + half + 1].mean() for i in range(1000)
    ]
    np.testing.assert_allclose(values, np.array(naive)[places])
    curve.values[500] = 1e6
    assert charts.smooth(curve, 100, np.median)[1].max() < 10
    assert not charts.is_noisy(curve, 1) and charts.is_noisy(curve, 10)
    few = runs.Curve(steps[::100], curve.values[::100], steps[::100])
    assert not charts.is_noisy(few, 50)


def test_drawing_thins_out_but_keeps_each_spike():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[[17, 54_321, 99_999]] = 1, -1, 2
    thin_x, thin_y = charts.extremes(x, y)
    assert len(thin_x) == 2 * charts.PLACES
    assert {17.0, 54_321.0, 99_999.0} <= set(thin_x[thin_y != 0])
    assert (np.diff(thin_x) >= 0).all()


def test_long_runs_make_small_files(tmp_path):
    rng = np.random.default_rng(0)

    def noise(step):
        return {"Gradient/norm_unclipped": rng.gamma(2.0)}

    folder = write_log(tmp_path / "long", range(8001), extra=noise, validate=10)
    make([folder], tmp_path / "report")
    assert (tmp_path / "report" / "index.html").stat().st_size < 150_000


# --- Charts ---------------------------------------------------------------------------------------


def test_gpt2s_loss_is_drawn_for_fineweb_edu_alone(tmp_path):
    data = {
        "edu": ("data/fineweb_edu_10B", True),
        "path": (["/disk/FineWeb-Edu"], True),
        "mixed": (["data/fineweb_edu_10B:0.9", "data/books:0.1"], False),
        "fineweb": ("data/fineweb_10B", False),
        "unknown": (None, False),
    }
    for name, (folder, applies) in data.items():
        config = None if folder is None else FINEWEB | {"data_dir": folder}
        path = write_log(tmp_path / name, range(101), config, validate=10)
        assert load(path).is_fineweb_edu is applies, name
    for names, applies in ((["edu"], True), (["fineweb"], False), (["edu", "mixed"], False)):
        shown = [load(tmp_path / name, style) for style, name in enumerate(names)]
        assert ("3.292" in charts.loss_chart(shown, 1, "steps", "Loss")) is applies, names


def test_charts_say_what_they_show(tmp_path):
    def extra(step):
        norm = math.nan if step in (40, 41, 70) else 1 + math.sin(step)
        return {
            "Gradient/norm_unclipped": norm,
            "Training/skipped_updates": sum(step >= s for s in (40, 41, 70)),
            "Training/rollbacks": float(step >= 50),
            "Performance/tokens_per_sec": 1000.0 + step % 7,
            "Performance/mfu": 0.4,
            "Evaluation/hellaswag_accuracy": 0.25,
        }

    for name in ("run", "second"):
        folder = write_log(tmp_path / name, range(101), FINEWEB, extra, validate=10)
    said = make([folder], tmp_path / "report", window=10)
    assert "Gradient/norm_unclipped (3)" in said
    words = Page(tmp_path / "report" / "index.html").words
    names = {"Loss", "Learning rate", "Gradient norm before clipping", "HellaSwag accuracy"}
    assert words.keys() == names | {"Tokens per second"}
    for part in ("training, mean of 10 steps", "as logged", "validation", "updates skipped: 3",
                 "roll-backs: 1", "GPT-2 124M: 3.292", "| step |"):  # fmt: skip
        assert part in words["Loss"], part
    norm = words["Gradient norm before clipping"]
    clipped = sum(1 + math.sin(s) > 1 for s in range(1, 101) if s not in (40, 41, 70)) / 97
    for part in ("clipped at 1", "median of 10 steps", "updates skipped: 3", "roll-backs: 1",
                 f"Clipped: {clipped:.1%} of updates"):  # fmt: skip
        assert part in norm, part
    for part in ("chance", "0.25", "GPT-2 124M: 0.2955"):
        assert part in words["HellaSwag accuracy"], part
    assert "1,000" in words["Tokens per second"]
    make([tmp_path / "run", tmp_path / "second"], tmp_path / "report")
    words = Page(tmp_path / "report" / "index.html").words
    assert "seconds of training" in words["Loss by time"]
    assert words["Loss by step"].startswith("run | second | training, mean of 5 steps | as logged")


def test_a_curve_is_drawn_where_its_numbers_are(tmp_path):
    """The path of a straight line, from corner to corner of its own range."""
    with SummaryWriter(tmp_path / "line") as writer:
        for step in range(101):
            writer.add_scalar("lr", step, step)
    figure = charts.chart_of([load(tmp_path / "line", 0)], 1, "lr", "Learning rate")
    (path,) = re.findall(r'class="c0" d="M([^"]*)"', figure)
    points = [tuple(map(int, point.split())) for point in path.split("L")]
    assert len(points) == 101 and points[0][0] == 0 and points[-1][0] == charts.UNITS
    across, down = zip(*points, strict=True)
    share = 100 / 106  # 6% of room above
    np.testing.assert_allclose(across, np.linspace(0, charts.UNITS, 101), atol=1)
    top = charts.UNITS * (1 - share)
    np.testing.assert_allclose(down, np.linspace(charts.UNITS, top, 101), atol=1)
    assert re.findall(r'class="y" style="bottom:([\d.]+)%">([^<]*)<', figure) == [
        (f"{100 * v / 106:.2f}", str(v)) for v in range(0, 101, 20)
    ]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 1, 6, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (2.9, 11.2, 6, [4, 6, 8, 10]),
        (-0.06, 0.06, 3, [-0.05, 0, 0.05]),
        (0, 95_365, 5, [0, 20_000, 40_000, 60_000, 80_000]),
        (3.1, 3.1001, 6, [3.1, 3.10002, 3.10004, 3.10006, 3.10008, 3.1001]),
    ],
)
def test_ticks_are_round(low, high, most, expected):
    np.testing.assert_allclose(charts.ticks(low, high, most), expected, atol=1e-12)


def test_each_run_in_a_chart_has_a_colour_of_its_own_and_neighbours_another_dash(tmp_path):
    assert report.IN_CHARTS >= 9
    colors = re.findall(r"\.c(\d+) { color: light-dark\((.*), (.*)\)", report.CSS)
    assert [int(number) for number, *_ in colors] == list(range(report.IN_CHARTS))
    assert len({color for _, *pair in colors for color in pair}) == 2 * report.IN_CHARTS
    for i in range(report.IN_CHARTS + 2):
        config = {"max_lr": (i + 1) / 1000}
        write_log(tmp_path / "runs" / f"run{i:02}", range(6), config, validate=5)
    (tmp_path / "runs" / "run00" / "config.json").unlink()
    said = make([tmp_path / "runs"], tmp_path / "report")
    assert "The charts show the best 12 runs" in said and said.count("\n| run") == 14
    page = Page(tmp_path / "report" / "index.html")
    labels = [word.strip() for word in page.words["Loss by step"].split("|")]
    labels = [word for word in labels if word.startswith(("max_lr", "run"))]
    assert len(labels) == 12 and {"run00", "max_lr 0.002"} <= set(labels)
    looks = set(re.findall(r'swatch (c\d+)"', page.text))
    assert len(looks) == 12


# --- Whatever there is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "validate", "drawn"),
    [
        ([0], 1, set()),  # just begun: nothing but the evaluation of step 0
        ([1], 0, {"Loss", "Learning rate"}),
        (range(4), 100, {"Loss", "Learning rate"}),
        (range(50), 0, {"Loss", "Learning rate"}),  # no validation
    ],
)
def test_little_is_enough(tmp_path, steps, validate, drawn):
    folder = write_log(tmp_path / "run", steps, validate=validate)
    make([folder], tmp_path / "report")
    assert set(Page(tmp_path / "report" / "index.html").words) == drawn


def test_runs_with_other_tags_side_by_side(tmp_path):
    with SummaryWriter(tmp_path / "runs" / "trainer") as writer:
        for step in range(10, 500, 10):
            writer.add_scalar("train/loss", 3.0, step)
            writer.add_scalar("train/grad_norm", 1.0, step)
    write_log(tmp_path / "runs" / "ours", range(101), FINEWEB, validate=10)
    TensorBoardLog(tmp_path / "runs" / "silent", 0).close()
    said = make([tmp_path / "runs"], tmp_path / "report")
    assert "Nothing logged yet: silent." in said
    words = Page(tmp_path / "report" / "index.html").words
    loss = words["Loss by step"]
    assert "trainer" in loss and "ours" in loss and "3.292" not in loss
    assert "ours" not in words["Gradient norm before clipping"]


def test_text_is_escaped(tmp_path):
    name = "a<b>&|`c"
    log = TensorBoardLog(tmp_path / name, 0)
    log.scalars({"Loss/train": 1.0, "Loss/validation": 1.0}, 1)
    evil = "<script>alert(1)</script>\n\n# head ![x](http://x)\x1b[31m</pre>"
    log.text("Generated_Samples/text", f"{evil}{runs.SAMPLE_RULE}second", 1)
    log.close()
    (tmp_path / name / "config.json").write_text(json.dumps({"config": {"x": "<img src=y>"}}))
    make([tmp_path / name], tmp_path / "report")
    page = Page(tmp_path / "report" / "index.html")
    assert not {"script", "b<b", "img"} & set(page.tags) and "\x1b" not in page.text
    assert page.sources == [] and page.links == ["scalars.csv"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text and page.tags.count("pre") == 3


def test_any_name_fits_into_a_legend(tmp_path):
    names = ("_hidden", "a$b$c^{", "long" * 60)
    for name in names:
        write_log(tmp_path / "runs" / name, range(30), validate=10)
    make([tmp_path / "runs"], tmp_path / "report")
    loss = Page(tmp_path / "report" / "index.html").words["Loss by step"]
    assert all(f"| {name} |" in f"| {loss}" for name in names)


def test_other_files_stay(tmp_path):
    out = tmp_path / "report"
    folder = write_log(tmp_path / "run", range(101), FINEWEB, validate=10)
    make([folder], out)
    (out / "notes.txt").write_text("mine")
    make([folder], out)
    assert (out / "notes.txt").read_text() == "mine"
    assert {path.name for path in out.iterdir()} == {"index.html", "scalars.csv", "notes.txt"}


def test_different_data_is_said(tmp_path):
    for name, folder in (("a", "data/a"), ("b", "data/b")):
        write_log(tmp_path / name, range(6), {"data_dir": folder}, validate=5)
    both = [load(tmp_path / name, 0) for name in "ab"]
    assert any("different data" in sentence for sentence in report.remarks(both, []))
    for found in both:  # the same data in another place
        found.record["data_fingerprint"] = "f"
    assert report.remarks(both, []) == []


# --- The command ----------------------------------------------------------------------------------


def test_runs_are_found_by_folder_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one", "runs/two", "elsewhere/deep/one"):
        write_log(tmp_path / name, [1])
    find = runs.find_runs
    assert list(find(["one"], "runs")) == ["one"]
    assert list(find(["runs"], "runs")) == ["one", "two"]
    assert find(["elsewhere"], "runs") == {"deep/one": Path("elsewhere/deep/one")}
    assert list(find(["one", "runs/one", "runs"], "runs")) == ["one", "two"]
    assert list(find(["one", "elsewhere/deep/one"], "runs")) == ["runs/one", "elsewhere/deep/one"]


def test_the_report_sees_the_runs_that_tensorboard_sees(tmp_path, monkeypatch):
    """Event files in the folder of runs itself, linked folders, sub-runs, links in a circle."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b", "elsewhere/c/d"):
        write_log(tmp_path / name, range(4))
    with SummaryWriter("runs") as writer:
        writer.add_scalar("Loss/train", 1.0, 1)
    with SummaryWriter("runs/exp") as writer:
        writer.add_scalar("train_loss", 1.0, 1)
        writer.add_scalars("acc", {"A": 0.1, "B": 0.2}, 1)
        writer.add_hparams({"lr": 0.1}, {"hp": 0.5}, run_name="trial")
    (tmp_path / "runs" / "link").symlink_to("../elsewhere/c")
    (tmp_path / "runs" / "a" / "circle").symlink_to("..")
    found = runs.find_runs(["runs"], "runs")
    names = {"a", "b", "exp", "exp/acc_A", "exp/acc_B", "exp/trial", "link/d"}
    assert found.keys() == names | {"runs"}
    theirs = EventMultiplexer().AddRunsFromDirectory("elsewhere").Reload().Runs()
    assert runs.find_runs(["elsewhere"], "runs").keys() == theirs.keys() == {"c/d"}
    (tmp_path / "view").mkdir()
    for link in ("first", "second", "again"):
        (tmp_path / "view" / link).symlink_to(f"../runs/{'b' if link == 'second' else 'exp'}")
    (tmp_path / "runs" / "a" / "circle").unlink()
    assert {"first", "second", "again", "again/trial"} <= runs.find_runs(["view"], "runs").keys()
    said = make(["runs"], tmp_path / "report")
    assert all(f"\n| {name} " in said for name in names | {"runs"})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "my_rnu",
            "my_rnu: no such folder, and no such run in --tensorboard_dir runs; there: my_run",
        ),
        ("empty", "empty: no TensorBoard event files there"),
        ("silent", "silent: no scalars logged yet"),
        ("my_run --smooth 0", "--smooth 0: give 1 (none) or more steps"),
        ("my_run --out file", "--out file: cannot write there"),
        ("my_run --serve --out x", "--out x: --serve writes no folder"),
        ("my_run --serve 1 --host 203.0.113.1", "--serve 1: 203.0.113.1 cannot be used"),
    ],
)
def test_wrong_input(tmp_path, words, sentence, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "runs" / "my_run", range(5))
    TensorBoardLog(tmp_path / "runs" / "silent", 0).close()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    assert report.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1 and not out
    assert (tmp_path / "file").read_text() == "mine"


def test_help_loads_nothing_heavy():
    program = (
        "import sys, report\n"
        "try: report.main(['--help'])\n"
        "except SystemExit: print({'torch', 'train_improved'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "src", capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "set()" and "--smooth STEPS" in done.stdout


# --- The page that renews itself ------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path):
    """serve(*words) -> (process, its address); `report.py --serve` as people start it."""
    started = []

    def serve(*words):
        command = [sys.executable, ROOT / "src" / "report.py", *words, "--serve", "0"]
        process = subprocess.Popen(
            [str(word) for word in command], cwd=tmp_path, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        for line in process.stdout:
            if found := re.search(r"http://localhost:(\d+)/", line):
                return process, found[0]
        raise AssertionError(f"it ended: {process.wait()}")

    yield serve
    for process in started:
        process.kill()
        process.communicate()


def get(address: str, **headers) -> tuple[int, str, str]:
    """(status, body, entity tag)"""
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode(), reply.headers.get("ETag", "")
    except urllib.error.HTTPError as error:
        return error.code, "", error.headers.get("ETag", "")


def test_the_page_goes_with_the_run(tmp_path, serve):
    """No run yet, a half-written file, growth, a finished run; Ctrl-C ends it quietly."""
    process, address = serve("mine")
    status, body, _ = get(address)
    assert status == 200 and "Nothing logged yet" in body and "mine: no such folder" in body
    log = TensorBoardLog(tmp_path / "runs" / "mine", 0)
    log.scalars(STEP, 1)
    (path,) = (tmp_path / "runs" / "mine").glob("*tfevents*")
    with path.open("ab") as file:
        file.write(path.read_bytes()[:20])
    status, body, _ = get(address)
    assert "Nothing logged yet" in body  # not read again so soon
    time.sleep(serving.EVERY)
    status, body, tag = get(address)
    assert "step 1 " in body and "http-equiv" in body and "script-src" in body
    assert get(address, **{"If-None-Match": tag})[0] == 304
    status, rows, _ = get(address + "scalars.csv")
    assert rows.startswith("run,tag,step,wall_time,value\nmine,") and rows.count("\n") == 4
    assert get(address + "../etc/passwd")[0] == get(address + "index")[0] == 404
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130 and "Traceback" not in process.stdout.read()


def test_the_page_is_made_once_for_all_who_look(tmp_path):
    made = []

    def page():
        made.append(1)
        return "page" if len(made) == 1 else None

    server = serving.PageServer("localhost", 0, page, lambda file: None)
    try:
        first = server.current()
        assert [server.current() for _ in range(5)] == [first] * 5 and len(made) == 1
        server.looked -= serving.EVERY
        assert server.current() == first and len(made) == 2  # nothing new: the same page
        assert server.server_address[0] == "127.0.0.1"
    finally:
        server.server_close()
