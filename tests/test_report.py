"""report.py on real runs and on event files of every awkward kind; TensorBoard's reader agrees."""

import csv
import html.parser
import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import report
from conftest import ROOT, run
from monitoring import charts
from monitoring.tensorboard_log import TensorBoardLog, read_run, read_scalars

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


def load(folder: Path, style: int | None = None) -> report.Run:
    found = report.Run(folder.name, folder, read_run(folder), report.read_record(folder))
    found.style = None if style is None else charts.style(style)
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
    return report.make_report(report.find_runs([str(f) for f in folders], "runs"), out, window)


@pytest.fixture
def words_in_svg():
    """SVG files hold their words as words, so that a test can read them."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield lambda path: [
            "".join(element.itertext()).strip()
            for element in xml.etree.ElementTree.parse(path).iter()
            if element.tag.endswith("}text")
        ]


class Links(html.parser.HTMLParser):
    """What a page loads, links to, and which tags it has."""

    def __init__(self, page: str):
        super().__init__()
        self.sources, self.links, self.tags = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []


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


def test_the_folder_is_complete_and_stands_alone(real):
    out = real / "report"
    drawn = set(charts.NAMES) - {"other"}
    files = {f"{name}.{e}" for name in drawn for e in ("png", "svg")}
    there = {path.name for path in out.iterdir()}
    assert files | {"index.html", "report.md", "scalars.csv"} <= there
    assert not any(name.endswith(".partial") for name in there)
    for name in drawn:
        height, width, _ = matplotlib.image.imread(out / f"{name}.png").shape
        assert width == 1280 and 400 < height < 1300
        assert len(np.unique(matplotlib.image.imread(out / f"{name}.png"))) > 50  # not empty
        xml.etree.ElementTree.parse(out / f"{name}.svg")
        assert (out / f"{name}.svg").stat().st_size < 200_000

    page = (out / "index.html").read_text(encoding="utf-8")
    found = Links(page)
    assert "script" not in found.tags and "link" not in found.tags
    assert len(found.sources) >= len(drawn)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in found.sources)
    assert all((out / link).is_file() for link in found.links)
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (out / "report.md").read_text())
    assert {f"{name}.png" for name in drawn} <= set(pictures) <= there


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
    lines = (real / "report" / "report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    heads, _, first, second = ([c.strip() for c in line.strip("|").split("|")] for line in table)
    assert heads[:2] == ["run", "max_lr"]  # the one thing that was asked for and differs
    first, second = dict(zip(heads, first, strict=True)), dict(zip(heads, second, strict=True))
    assert (first["run"], second["run"]) == ("lr-1e-2", "lr-1e-3")
    assert first["max_lr"] == "0.01" and first["step"] == "24 of 24"
    assert first["best validation loss"] == f"{best['lr-1e-2']:.4f}"
    assert second["best validation loss"] == f"{best['lr-1e-3']:.4f}"
    assert first["tokens"] == f"{24 * 256:,}" and "best HellaSwag" in heads
    stdout = (real / "stdout").read_text().splitlines()
    charts = len(list((real / "report").glob("*.svg")))
    assert charts >= 7 and stdout[:4] == table
    assert stdout[-1].startswith(f"report/index.html: {charts} charts, ")


def test_best_samples_are_shown(real):
    found = load(real / "runs" / "lr-1e-2")
    step, texts = report.best_samples(found)
    assert step == found.best[1] and len(texts) == 1
    assert texts[0].startswith("Hello, I'm a language model,")
    page = (real / "report" / "index.html").read_text(encoding="utf-8")
    assert f"lr-1e-2, step {step}, validation loss {found.best[0]:.4f}" in page
    assert page.count("Hello, I&#x27;m a language model,") >= 2


def test_legend_names_only_what_differs(real):
    runs = [load(real / "runs" / name) for name in ("lr-1e-3", "lr-1e-2")]
    assert report.label_and_style(runs) == ["max_lr"]  # not min_lr, which follows from it
    assert [found.label for found in runs] == ["max_lr 0.001", "max_lr 0.01"]
    for older in runs:  # a config.json that does not say what was asked for
        del older.record["asked"]
    assert report.label_and_style(runs) == ["max_lr"]


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
        assert last <= count <= last + 2 and not events.damage
        last = count
    assert last >= 28
    path.write_bytes(whole[: len(whole) // 2])
    assert "charts" in make([folder], tmp_path / "report")


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
    curve = report.Curve(steps, 5 - steps / 300 + rng.normal(0, 0.1, 1000), steps * 1.0)
    places, values = charts.smooth(curve, 100)
    assert (places == np.arange(1000)).all()
    naive = [  # symmetric at the beginning, over what there is at the end
        curve.values[max(0, i - (half := min(50, i))) : i + half + 1].mean() for i in range(1000)
    ]
    np.testing.assert_allclose(values, naive)
    curve.values[500] = 1e6
    assert charts.smooth(curve, 100, np.median)[1].max() < 10
    assert not charts.is_noisy(curve, 1) and charts.is_noisy(curve, 10)
    few = report.Curve(steps[::100], curve.values[::100], steps[::100])
    assert not charts.is_noisy(few, 50)


def test_drawing_thins_out_but_keeps_each_spike():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[[17, 54_321, 99_999]] = 1, -1, 2
    thin_x, thin_y = charts.extremes(x, y)
    assert len(thin_x) == 2 * charts.PIXELS
    assert {17.0, 54_321.0, 99_999.0} <= set(thin_x[thin_y != 0])
    assert (np.diff(thin_x) >= 0).all()


def test_long_runs_make_small_files(tmp_path):
    rng = np.random.default_rng(0)

    def noise(step):
        return {"Gradient/norm_unclipped": rng.gamma(2.0)}

    folder = write_log(tmp_path / "long", range(8001), extra=noise, validate=10)
    make([folder], tmp_path / "report")
    for path in (tmp_path / "report").glob("*.svg"):
        assert path.stat().st_size < 150_000, path.name


# --- Charts ---------------------------------------------------------------------------------------


def test_gpt2s_loss_is_drawn_for_fineweb_edu_alone(tmp_path, words_in_svg):
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
        runs = [load(tmp_path / name, style) for style, name in enumerate(names)]
        with matplotlib.rc_context(charts.LOOKS):
            chart = charts.loss_chart(runs, "steps", "Loss", 1)
        assert (b"3.292" in chart.svg) is applies, names


def test_charts_say_what_they_show(tmp_path, words_in_svg):
    def extra(step):
        norm = math.nan if step in (40, 41, 70) else 1 + math.sin(step)
        return {
            "Gradient/norm_unclipped": norm,
            "Training/skipped_updates": sum(step >= s for s in (40, 41, 70)),
            "Training/rollbacks": float(step >= 50),
            "Performance/tokens_per_sec": 1000.0 + step % 7,
            "Performance/mfu": 0.4,
            "Evaluation/hellaswag_accuracy": 0.25,
            "Cost/kwh": step / 100,  # no chart knows it
        }

    folder = write_log(tmp_path / "run", range(101), FINEWEB, extra, validate=10)
    said = make([folder], tmp_path / "report", window=10)
    assert "Gradient/norm_unclipped (3)" in said
    words = {
        path.stem: " ".join(words_in_svg(path)) for path in (tmp_path / "report").glob("*.svg")
    }
    assert words.keys() == set(charts.NAMES) - {"loss_tokens"}
    for part in ("training, mean of 10 steps", "training, as logged", "validation",
                 "update skipped", "roll-back", "GPT-2 124M", "loss (nats per token)"):  # fmt: skip
        assert part in words["loss_steps"], part
    assert "training time (seconds)" in words["loss_hours"]
    for part in ("clipped", "at 1", "median of 10 steps", "update skipped", "roll-back"):
        assert part in words["gradient_norm"], part
    for part in ("chance", "0.25", "GPT-2 124M", "0.2955"):
        assert part in words["hellaswag"], part
    for part in ("tokens per second", "MFU", "1,000"):
        assert part in words["throughput"], part
    assert "Cost/kwh" in words["other"]
    captions = (tmp_path / "report" / "report.md").read_text()
    clipped = sum(1 + math.sin(s) > 1 for s in range(1, 101) if s not in (40, 41, 70)) / 97
    assert f"Clipped: {clipped:.1%} of updates" in captions
    assert "updates skipped: 3, roll-backs: 1" in captions
    assert "Lines: centred mean of 10 steps" in captions


def test_looks_differ_in_colour_and_in_grey():
    looks = [charts.style(i) for i in range(28)]
    assert len({(s.color, str(s.dash), s.marker) for s in looks}) == 28
    for a, b in itertools.pairwise(looks):
        assert a.color != b.color and a.dash != b.dash and a.marker != b.marker
    okabe_ito = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
    assert {s.color for s in looks} < set(okabe_ito)


def test_many_runs(tmp_path, words_in_svg):
    for i in range(report.IN_CHARTS + 2):
        config = {"max_lr": (i + 1) / 1000, "min_lr": (i + 1) / 10_000}
        write_log(tmp_path / "runs" / f"run{i:02}", range(6), config, validate=5)
    (tmp_path / "runs" / "run00" / "config.json").unlink()
    said = make([tmp_path / "runs"], tmp_path / "report")
    assert "The charts show the best 14 runs" in said and said.count("\n| run") == 16
    words = words_in_svg(tmp_path / "report" / "loss_steps.svg")
    labels = [word for word in words if word.startswith(("max_lr", "run"))]
    assert len(labels) == 14 and {"run00", "max_lr 0.002"} <= set(labels)


# --- Whatever there is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "validate", "drawn"),
    [
        ([0], 1, set()),  # just begun: nothing but the evaluation of step 0
        ([1], 0, {"loss_steps", "loss_hours", "learning_rate"}),
        (range(4), 100, {"loss_steps", "loss_hours", "learning_rate"}),
        (range(50), 0, {"loss_steps", "loss_hours", "learning_rate"}),  # no validation
    ],
)
def test_little_is_enough(tmp_path, steps, validate, drawn):
    folder = write_log(tmp_path / "run", steps, validate=validate)
    make([folder], tmp_path / "report")
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == drawn


def test_runs_with_other_tags_side_by_side(tmp_path, words_in_svg):
    with SummaryWriter(tmp_path / "runs" / "trainer") as writer:
        for step in range(10, 500, 10):
            writer.add_scalar("train/loss", 3.0, step)
            writer.add_scalar("train/grad_norm", 1.0, step)
            writer.add_scalar("train/odd_$tag", step, step)
    write_log(tmp_path / "runs" / "ours", range(101), FINEWEB, validate=10)
    TensorBoardLog(tmp_path / "runs" / "silent", 0).close()
    said = make([tmp_path / "runs"], tmp_path / "report")
    assert "Nothing logged yet: silent." in said
    words = " ".join(words_in_svg(tmp_path / "report" / "loss_steps.svg"))
    assert "trainer" in words and "ours" in words and "3.292" not in words
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("Not logged by ours.") == 1  # the gradient norm
    assert "train/odd_$tag" in " ".join(words_in_svg(tmp_path / "report" / "other.svg"))


def test_text_is_escaped(tmp_path):
    name = "a<b>&|`c"
    log = TensorBoardLog(tmp_path / name, 0)
    log.scalars({"Loss/train": 1.0, "Loss/validation": 1.0}, 1)
    evil = "<script>alert(1)</script>\n\n# head ![x](http://x)\x1b[31m</pre>"
    log.text("Generated_Samples/text", f"{evil}{report.SAMPLE_RULE}second", 1)
    log.close()
    (tmp_path / name / "config.json").write_text(json.dumps({"config": {"x": "<img src=y>"}}))
    make([tmp_path / name], tmp_path / "report")
    found = Links(page := (tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "script" not in found.tags and "b" not in found.tags and "\x1b" not in page
    assert all(source.startswith("data:") for source in found.sources)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and page.count("<pre>") == 3
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "    <script>alert(1)</script>\n    \n    # head ![x](http://x)" in text
    assert r"a\<b>&\|\`c" in text


def test_any_name_fits_into_a_legend(tmp_path, words_in_svg):
    names = ("_hidden", "a$b$c^{", "long" * 60)
    for name in names:
        write_log(tmp_path / "runs" / name, range(30), validate=10)
    make([tmp_path / "runs"], tmp_path / "report")
    words = words_in_svg(tmp_path / "report" / "loss_steps.svg")
    assert "_hidden" in words and "a$b$c^{" in words
    assert any(word.startswith("longlong") and len(word) < 100 for word in words)
    height, width, _ = matplotlib.image.imread(tmp_path / "report" / "loss_steps.png").shape
    assert width == 1280 and height < 900


def test_other_files_stay_and_old_charts_go(tmp_path):
    out = tmp_path / "report"
    folder = write_log(tmp_path / "run", range(101), FINEWEB, validate=10)
    make([folder], out)
    (out / "notes.txt").write_text("mine")
    assert (out / "learning_rate.svg").exists()
    with SummaryWriter(tmp_path / "other") as writer:
        for step in range(30):
            writer.add_scalar("loss", 1.0, step)
    make([tmp_path / "other"], out)
    assert (out / "notes.txt").read_text() == "mine" and (out / "loss_steps.svg").exists()
    assert not (out / "learning_rate.svg").exists()


def test_different_data_is_said(tmp_path):
    for name, folder in (("a", "data/a"), ("b", "data/b")):
        write_log(tmp_path / name, range(6), {"data_dir": folder}, validate=5)
    runs = [load(tmp_path / name, 0) for name in "ab"]
    assert any("different data" in sentence for sentence in report.remarks(runs, []))
    for found in runs:  # the same data in another place
        found.record["data_fingerprint"] = "f"
    assert report.remarks(runs, []) == []


# --- The command ----------------------------------------------------------------------------------


def test_runs_are_found_by_folder_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one", "runs/two", "elsewhere/deep/one"):
        write_log(tmp_path / name, [1])
    find = report.find_runs
    assert list(find(["one"], "runs")) == ["one"]
    assert list(find(["runs"], "runs")) == ["one", "two"]
    assert find(["elsewhere"], "runs") == {"deep/one": tmp_path / "elsewhere/deep/one"}
    assert list(find(["one", "runs/one", "runs"], "runs")) == ["one", "two"]
    assert list(find(["one", "elsewhere/deep/one"], "runs")) == ["runs/one", "elsewhere/deep/one"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "my_rnu",
            "my_rnu: no such folder, and no such run in --tensorboard_dir runs; there: my_run",
        ),
        ("empty", "empty has no TensorBoard event files"),
        ("silent", "silent: no scalars logged yet"),
        ("my_run --smooth 0", "--smooth 0: give 1 (none) or more steps"),
        ("my_run --out file", "--out file: cannot write there"),
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
    assert err.startswith(f"report.py: {sentence}") and err.count("\n") == 1 and not out
    assert (tmp_path / "file").read_text() == "mine"


def test_help_loads_nothing_heavy():
    program = (
        "import sys, report\n"
        "try: report.main(['--help'])\n"
        "except SystemExit: print({'torch', 'matplotlib', 'tensorboard'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "src", capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "set()" and "--smooth STEPS" in done.stdout
