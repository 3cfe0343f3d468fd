"""TensorBoardLog against TensorBoard itself: its server (default loader), its Python loader, its
EventAccumulator; real crashes, a real full disk, real Markdown."""

import errno
import html.parser
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util

from conftest import read_scalars
from monitoring import event_files, tensorboard_log
from monitoring.event_files import as_code, from_code
from monitoring.monitor import indented
from monitoring.tensorboard_log import TensorBoardLog

METRICS = ["Loss/validation", "Loss/validation_best", "Evaluation/hellaswag_accuracy"]
LAYOUT = {
    "training": {"loss": ["Multiline", ["Loss/train", "Loss/validation"]]},
    "stability": {"gradient": ["Multiline", ["Gradient/norm", "Gradient/norm_unclipped"]]},
}
EVIL = [
    "# heading\n\n[link](https://evil.example) ![picture](https://evil.example/x.png)",
    "<img src=x onerror=alert(1)> <a href='https://evil.example'>x</a><script>alert(1)</script>",
    "a\rb\r\n[c](http://c)\x0b[d](http://d)\x0c[e](http://e)\x1c[f](http://f)\x1d\x1e[g](http://g)",
    "a\x85[h](http://h)\u2028[i](http://i)\u2029[j](http://j)\n\n\n\n<a href=http://k>k</a>",
    "```\ncode\n```\n[l](http://l)\n~~~\n[m]: http://m\n\n[m]\n<http://n> http://o",
    "a | b\n--|--\n[p](http://p) | q\n\n1. one\n2. two\n\n> quote\n\n***\n\n- [r](http://r)",
    "\x02wzxhzdk:0\x03 \x02amp\x03 \x00\x01\x1b[31m \x7f\x9f <!-- x --> <?php ?> <![CDATA[x]]>",
    "</code></pre></td></tr></table><img src=http://s>\n</code></pre>\n\n<div>\n\n[t](http://t)",
    "\n\n\n<p>\n\n[u](http://u)\n\n</p>\n\t[v](http://v)\n \n  \n   [w](http://w)",
    "\ud800 lone surrogate \udfff, \ufffe, 日本語 🙂 naïve — “quotes” & &amp; &lt;",
]


# --- Helpers --------------------------------------------------------------------------------------


def steps(points) -> list[int]:
    return [point[0] for point in points]


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def python_loader(folder: Path) -> EventMultiplexer:
    """What `tensorboard --load_fast=false` reads with."""
    loader = EventMultiplexer(tensor_size_guidance={"scalars": 0})
    loader.AddRunsFromDirectory(str(folder))
    return loader.Reload()


def tensor_steps(loader: EventMultiplexer, run: str, tag: str) -> list[int]:
    return [event.step for event in loader.Tensors(run, tag)]


def killed_with_9(log_dir: Path, body) -> None:
    """Runs body(log) in a forked process that then dies without closing anything."""
    pid = os.fork()
    if pid == 0:
        try:
            body(TensorBoardLog(log_dir, 0))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


class Server:
    """A real `tensorboard` process on a free local port."""

    def __init__(self, logdir: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--reload_interval", "1"]
        self.output = open(logdir.parent / "server.txt", "w+")  # noqa: SIM115 (closed in stop)
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT)

    def get(self, path: str, post: dict | None = None, **query):
        url = f"http://127.0.0.1:{self.port}/data/{path}"
        if query:
            url += "?" + urllib.parse.urlencode(query)
        request = urllib.request.Request(url)
        if post is not None:
            request = urllib.request.Request(url, json.dumps(post).encode())
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def scalars(self, run: str, tag: str) -> list[tuple[int, float]]:
        reply = self.get("plugin/scalars/scalars", run=run, tag=tag)
        return [(step, value) for _, step, value in reply]

    def wait_for(self, condition):
        """The first true value of condition(); the server reloads once a second."""
        last = None
        for _ in range(240):
            assert self.process.poll() is None, Path(self.output.name).read_text()
            try:
                if value := condition():
                    return value
            except (urllib.error.URLError, ConnectionError) as error:  # not up yet, or no data yet
                last = error
            time.sleep(0.25)
        raise AssertionError(f"the server never got there; last error: {last}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        self.output.close()


def write_until_killed(log: TensorBoardLog) -> None:
    """The first part of a run: steps 1 to 450, dies long after its checkpoint of step 400."""
    config = {"max_lr": 6e-4, "compile": True, "max_steps": None, "hellaswag_file": None}
    log.hparams(config | {"betas": (0.9, 0.95)}, METRICS, numeric=["max_steps"])
    log.layout(LAYOUT)
    log.scalars({"Loss/validation": 11.0}, 0)  # the untrained model
    for step in range(1, 451):
        log.scalars({"Loss/train": 10 / step, "Gradient/norm": 1.0}, step)
        if step % 50 == 0:
            log.scalars({"Loss/validation": 11 / step, "Loss/validation_best": 11 / step}, step)
            log.histograms({"Parameters/wte": torch.arange(100.0) + step}, step)
            log.text("Generated_Samples/text", f"sample of step {step}", step)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server that watches: the crashed run is read by it before its resume, all else after."""
    root = tmp_path_factory.mktemp("tensorboard") / "runs"
    crashed = root / "crashed"
    killed_with_9(crashed, write_until_killed)
    # The clock was wrong and is put right: the old file's name is two months in the future.
    (old,) = crashed.iterdir()
    future = re.sub(r"\d{10}", str(int(time.time()) + 5_000_000), old.name, count=1)
    old = old.rename(crashed / future)
    with open(old, "ab") as file:  # died within a write
        file.write(old.read_bytes()[:20])
    python_live = python_loader(root)
    server = Server(root)
    try:
        seen = server.wait_for(lambda: steps(server.scalars("crashed", "Loss/train")))
        assert seen == list(range(1, 451))

        log = TensorBoardLog(crashed, 401)
        changed = {"max_lr": 6e-4, "compile": True, "max_steps": 500, "hellaswag_file": None}
        log.hparams(changed | {"betas": (0.9, 0.95)}, METRICS, numeric=["max_steps"])
        log.layout(LAYOUT)
        for step in range(401, 421):
            log.scalars({"Loss/train": 20 / step, "Gradient/norm": 1.0}, step)
        log.flush()

        other = TensorBoardLog(root / "other", 0)
        config = {"max_lr": 3e-4, "compile": False, "max_steps": None, "hellaswag_file": "h.jsonl"}
        other.hparams(config | {"betas": (0.9, 0.98)}, METRICS, ["max_steps"], first=["max_lr"])
        for step, loss in ((10, 3.0), (20, 3.5)):
            other.scalars({"Loss/validation": loss, "Loss/validation_best": 3.0}, step)
            other.scalars({"Evaluation/hellaswag_accuracy": 0.3, "Loss/train": loss}, step)
        other.hparams_end()
        for i, text in enumerate(EVIL):
            other.text(f"Generated_Samples/{i}", text, 20)
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(40_000, generator=generator)
        values *= torch.randn(40_000, generator=generator).exp()
        other.histograms({"Gradients/wte": values, "Parameters/ln": torch.ones(768)}, 20)
        other.close()
        shutil.copytree(crashed, root / "copied")  # as a server started only now reads it
        server.wait_for(lambda: server.scalars("copied", "Loss/train"))
        server.wait_for(lambda: len(server.scalars("other", "Loss/train")) == 2)
        server.wait_for(lambda: server.scalars("crashed", "Loss/train")[-1][0] == 420)
        yield {"root": root, "server": server, "python_live": python_live, "values": values}
        log.close()
    finally:
        server.stop()


# --- The timeline as the three readers see it -----------------------------------------------------


@pytest.mark.parametrize("run", ["crashed", "copied"])
def test_server_shows_one_clean_timeline_after_crash_resume_and_clock_jump(served, run):
    server = served["server"]
    train = server.scalars(run, "Loss/train")
    assert steps(train) == list(range(1, 421))
    assert [v for _, v in train] == pytest.approx(
        [(10 if s <= 400 else 20) / s for s in range(1, 421)]
    )
    # Written every 50 steps, and not since the resume: the point of 450 must be gone all the same.
    assert steps(server.scalars(run, "Loss/validation")) == list(range(0, 401, 50))
    histograms = server.get("plugin/histograms/histograms", run=run, tag="Parameters/wte")
    assert [step for _, step, _ in histograms] == list(range(50, 401, 50))
    tag = "Generated_Samples/text/text_summary"
    texts = server.get("plugin/text/text", run=run, tag=tag, markdown="true")
    assert [text["step"] for text in texts] == list(range(50, 401, 50))
    assert "sample of step 400" in texts[-1]["text"]


def test_python_loaders_show_one_clean_timeline(served):
    fresh = python_loader(served["root"])
    for loader in (fresh, served["python_live"].Reload()):
        assert tensor_steps(loader, "crashed", "Loss/train") == list(range(1, 421))
        assert tensor_steps(loader, "crashed", "Loss/validation") == list(range(0, 401, 50))
    points = read_scalars(served["root"] / "crashed")
    assert steps(points["Loss/train"]) == list(range(1, 421))
    assert steps(points["Loss/validation"]) == list(range(0, 401, 50))
    times = [wall_time for _, _, wall_time in points["Loss/train"]]
    assert times == sorted(times) and abs(times[-1] - time.time()) < 600  # real ones


def session_groups(server: Server, **column) -> list[dict]:
    request = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
        "colParams": [{**column, "order": "ORDER_ASC"}] if column else [],
        "startIndex": 0,
        "sliceSize": 100,
    }
    return server.get("plugin/hparams/session_groups", post=request)["sessionGroups"]


def test_server_shows_hparams_of_the_runs_themselves_with_metrics(served):
    server = served["server"]
    experiment = server.get("plugin/hparams/experiment", post={"experimentName": ""})
    assert [m["name"]["tag"] for m in experiment["metricInfos"]] == METRICS
    assert {h["name"]: h["type"] for h in experiment["hparamInfos"]} == {
        "max_lr": "DATA_TYPE_FLOAT64",
        "compile": "DATA_TYPE_STRING",
        "max_steps": "DATA_TYPE_FLOAT64",  # though None in the first run
        "hellaswag_file": "DATA_TYPE_STRING",
        "betas": "DATA_TYPE_STRING",
    }
    rows = {group["name"]: group for group in session_groups(server)}
    assert set(rows) == {"crashed", "other", "copied"}  # no sub-runs named by the time
    assert rows["other"]["hparams"] == {
        "max_lr": 3e-4,
        "compile": "false",
        "hellaswag_file": "h.jsonl",
        "betas": "0.9, 0.98",
    }
    assert rows["copied"]["hparams"] == {  # what it was resumed with
        "max_lr": 6e-4,
        "compile": "true",
        "max_steps": 500,
        "hellaswag_file": "none",
        "betas": "0.9, 0.95",
    }
    metrics = {m["name"]["tag"]: m["value"] for m in rows["other"]["metricValues"]}
    assert metrics == pytest.approx(dict(zip(METRICS, [3.5, 3.0, 0.3], strict=True)))
    assert rows["other"]["sessions"][0]["status"] == "STATUS_SUCCESS"
    assert rows["copied"]["sessions"][0]["status"] == "STATUS_UNKNOWN"


@pytest.mark.parametrize("column", ["max_lr", "max_steps", "compile"])
def test_server_sorts_hparams_columns_also_where_a_value_is_none(served, column):
    assert len(session_groups(served["server"], hparam=column)) == 3


def test_server_sorts_runs_by_validation_loss(served):
    groups = session_groups(served["server"], metric={"tag": "Loss/validation"})
    assert [g["name"] for g in groups][-1] == "other"


def test_server_has_the_layout_with_both_losses_on_one_chart(served):
    layout = served["server"].get("plugin/custom_scalars/layout")
    charts = {g["title"]: {c["title"]: c for c in g["chart"]} for g in layout["category"]}
    assert list(charts) == list(LAYOUT)
    assert charts["training"]["loss"]["multiline"]["tag"] == ["Loss/train", "Loss/validation"]


# --- Text -----------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Elements and visible text of a piece of HTML."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text = set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        assert not attributes, (tag, attributes)

    def handle_data(self, data):
        self.text += data


def visible(text: str) -> list[str]:
    """The lines that must be readable: control characters replaced, spaces at ends apart."""
    lines = [
        re.sub(r"[^\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "�", x) for x in text.splitlines()
    ]
    return [line.expandtabs(4).rstrip() for line in lines if line.strip()]


def test_server_renders_generated_text_as_code_whatever_it_holds(served):
    for i, text in enumerate(EVIL):
        tag = f"Generated_Samples/{i}/text_summary"
        (reply,) = served["server"].get("plugin/text/text", run="other", tag=tag, markdown="true")
        page = Page(reply["text"])
        assert page.elements <= {"table", "tbody", "tr", "td", "pre", "code"}, text
        whole = page.text.replace(" \n", " ")  # lines that were wrapped
        shown = [line.rstrip() for line in whole.splitlines() if line.strip()]
        assert shown == visible(text)


def test_random_markdown_stays_code():
    """TensorBoard's own renderer on 400 texts of dangerous pieces."""
    pieces = [p for text in EVIL for p in re.split(r"(\s|[<>\[\]()`|])", text)]
    pieces += ["\n", "\n\n", "    ", "\t", "\r", "\u2028", "\x02", "\x03", "- ", "> ", "1. ", "```"]
    pieces += [
        "http://x.example",
        "<a href=x>",
        "![i](x)",
        "&#60;a&#62;",
        "*b*",
        "---",
        "<div>\n\n",
    ]
    choose = random.Random(5)
    for _ in range(400):
        text = "".join(choose.choices(pieces, k=choose.randrange(1, 40)))
        page = Page(plugin_util.markdown_to_safe_html(as_code(text)))
        assert page.elements <= {"pre", "code"}, repr(text)


def test_harmless_text_is_shown_word_for_word():
    text = 'def f(x):\n    return x  # naïve — "日本"\n\nEnd.'
    assert Page(plugin_util.markdown_to_safe_html(as_code(text))).text.strip("\n") == text


def test_no_control_character_of_a_sample_reaches_the_screen():
    assert indented("a \x00b\x1b[2J\n\tc\n") == "    a �b�[2J\n    \tc"


def test_long_lines_are_wrapped_for_the_page_and_whole_again_for_a_reader():
    """TensorBoard shows a sample of 300 characters as one line, two thirds of it out of sight."""
    pieces = ["a", "word", " ", "  ", "    ", "\n", "\n\n", "-", "x" * 100, "naïve,", "日本"]
    choose = random.Random(6)
    for _ in range(500):
        text = "".join(choose.choices(pieces, k=choose.randrange(1, 120)))
        code = as_code(text)
        words = text.split()
        for line in code.splitlines():
            assert len(line) <= 4 + 72 or len(line.split()) == 1, repr(text)
        assert code.split() == words
        assert from_code(code) == "\n".join(line.rstrip(" ") for line in text.splitlines())
    page = Page(plugin_util.markdown_to_safe_html(as_code("one two " * 50)))
    assert page.elements == {"pre", "code"} and len(page.text.strip().splitlines()) == 6


# --- Histograms -----------------------------------------------------------------------------------


def distributions() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(200_000, generator=generator)
    lognormal = torch.randn(200_000, generator=generator).mul(2.0).exp()
    sparse = normal * 1e-3
    sparse[:120_000] = 0
    outlier = normal * 1e-4
    outlier[7] = 100.0
    return {
        "normal": normal * 0.02,
        "heavy tails": normal * lognormal * 1e-6,
        "LayerNorm": 1 + normal[:20_000] * 1e-3,
        "nearly constant": 1 + torch.randint(-3, 4, (1000,), generator=generator) * 2**-23,
        "mostly zero": sparse,
        "one outlier": outlier,
        "uniform": torch.rand(50_000, generator=generator) * 7 + 3,
        "two lumps": torch.cat([normal[:30_000] * 0.1, normal[:20_000] * 0.1 + 10]),
        "bfloat16": (normal * 0.02).bfloat16(),
        "strided": torch.randn(300, 200, generator=generator).T,
        "few": torch.tensor([3.0, 1.0, 2.0]),
        "negative": -lognormal,
        "tiny": normal * 1e-38,
        "large": normal.clamp(-3, 3) * 1e38,
    }


@pytest.mark.parametrize("name", distributions())
def test_histogram_has_the_exact_quantiles_within_a_small_part_of_their_spread(name, tmp_path):
    x = distributions()[name]
    log = TensorBoardLog(tmp_path, 0)
    before = folder_bytes(tmp_path)
    log.histograms({f"Gradients/h.11.mlp.c_proj.weight.{name}": x}, 1000)
    assert folder_bytes(tmp_path) - before <= 500_000 / 296  # 148 + 148 fit in 0.5 MB
    log.close()
    reader = EventAccumulator(str(tmp_path)).Reload()
    (tag,) = reader.Tags()["histograms"]
    histogram = reader.Histograms(tag)[0].histogram_value
    values = x.float().reshape(-1).double().sort().values.numpy()
    assert histogram.num == len(values) == sum(histogram.bucket)
    assert (histogram.min, histogram.max) == (values[0], values[-1])
    # A value is at most half a fine bin from the middle of its bin.
    assert histogram.sum == pytest.approx(values.sum(), abs=np.abs(values).sum() / 32)
    assert histogram.sum_squares == pytest.approx((values**2).sum(), rel=1 / 16)
    assert all(np.diff([histogram.min, *histogram.bucket_limit]) >= 0)
    assert histogram.bucket_limit[-1] == histogram.max
    # The Distributions tab. "Within a small part": 2% of the distance that the middle 87% span; and
    # what counts for few or equal values: a share of values off by at most 1%.
    spread = np.quantile(values, 0.9332) - np.quantile(values, 0.0668)
    for share, value in reader.CompressedHistograms(tag)[0].compressed_histogram_values:
        exact = np.quantile(values, share / 10_000)
        at = np.searchsorted(values, [value - 1e-9 * spread, value + 1e-9 * spread]) / len(values)
        near = at[0] - 0.01 <= share / 10_000 <= at[1] + 0.01
        assert abs(value - exact) <= 0.02 * spread or near, (share, value, exact)
    # The Histograms tab: 30 equal bins into which TensorBoard spreads our bins evenly. The shares
    # must be those of the values but for what lies in the same fine bin as an edge.
    edges = np.linspace(values[0], values[-1], 31)
    below = np.concatenate([[0], np.cumsum(histogram.bucket)]) / len(values)
    drawn = np.interp(edges, [histogram.min, *histogram.bucket_limit], below)
    fine = np.abs(edges - np.median(values)) / 16
    low = np.searchsorted(values, edges - fine, "left") / len(values)
    high = np.searchsorted(values, edges + fine, "right") / len(values)
    assert np.all(drawn >= low - 0.03) and np.all(drawn <= high + 0.03)
    # Tails are drawn where they are: no bin is much wider than one of those 30.
    farthest = np.abs(values - np.median(values)).max()
    widest = max(np.diff([histogram.min, *histogram.bucket_limit]))
    assert widest <= edges[1] - edges[0] + 1.1 * farthest / 16


@pytest.mark.parametrize(
    ("tensor", "finite", "nonfinite"),
    [
        (torch.full((5,), math.nan), None, 5),
        (torch.tensor([1.0, math.inf, -math.inf, math.nan, 3.0]), (1.0, 3.0, 2), 3),
        (torch.full((3, 4), -math.inf, dtype=torch.bfloat16), None, 12),
        (torch.zeros(1000), (0.0, 0.0, 1000), None),
        (torch.full((70_000,), 2.5), (2.5, 2.5, 70_000), None),
        (torch.tensor(-0.0), (0.0, 0.0, 1), None),
        (torch.tensor([3.4e38, -3.4e38, 3.4e38]), (-3.4e38, 3.4e38, 3), None),
        (torch.tensor([1e-45, -1e-45]), (-1e-45, 1e-45, 2), None),
        (torch.tensor([1, 2, 3]), (1.0, 3.0, 3), None),
        (torch.tensor([True, False]), (0.0, 1.0, 2), None),
        (torch.empty(0, 5), None, None),
    ],
)
def test_histogram_of_strange_tensors(tensor, finite, nonfinite, tmp_path):
    log = TensorBoardLog(tmp_path, 0)
    log.histograms({"x": tensor, "y": torch.arange(10.0)}, 1)
    log.histograms({"empty": torch.empty(0)}, 2)
    log.close()
    reader = EventAccumulator(str(tmp_path)).Reload()
    assert sum(reader.Histograms("y")[0].histogram_value.bucket) == 10
    assert ("x" in reader.Tags()["histograms"]) == (finite is not None)
    if finite:
        value = reader.Histograms("x")[0].histogram_value
        # With non-finite values around, the ends are known to a bin: 1/16 of the magnitude.
        exact = nonfinite is None
        assert (value.min, value.max) == pytest.approx(finite[:2], rel=1e-6 if exact else 1 / 16)
        assert sum(value.bucket) == value.num == finite[2]
        for share, quantile in reader.CompressedHistograms("x")[0].compressed_histogram_values:
            assert value.min <= quantile <= value.max, share
    counted = read_scalars(tmp_path).get("x_nonfinite")
    assert (counted[0][:2] if counted else None) == ((1, nonfinite) if nonfinite else None)


def test_server_shows_the_shape_of_a_histogram(served):
    server, values = served["server"], served["values"].double().numpy()
    query = {"run": "other", "tag": "Gradients/wte"}
    ((_, step, bins),) = server.get("plugin/histograms/histograms", **query)
    assert step == 20 and sum(count for _, _, count in bins) == len(values)
    # Equal bins; the server spreads our bins evenly over them (so a spike loses a little height).
    for left, right, count in bins:
        assert count == pytest.approx(((values >= left) & (values < right)).sum(), abs=800)
    ((_, _, points),) = server.get("plugin/distributions/distributions", **query)
    spread = np.quantile(values, 0.9332) - np.quantile(values, 0.0668)
    for share, value in points:
        assert value == pytest.approx(np.quantile(values, share / 10_000), abs=0.01 * spread)
    constant = {"run": "other", "tag": "Parameters/ln"}
    ((_, _, bins),) = server.get("plugin/histograms/histograms", **constant)
    assert sum(count for _, _, count in bins) == 768
    assert all(0.5 <= left <= right <= 1.5 for left, right, count in bins if count)


# --- Cost and order -------------------------------------------------------------------------------


def test_a_step_of_scalars_is_one_small_record_that_all_readers_take(tmp_path):
    log = TensorBoardLog(tmp_path / "run", 0)
    tags = [f"Performance/a_rather_long_name_{i:02d}" for i in range(15)]
    before = folder_bytes(tmp_path / "run")
    log.scalars(dict.fromkeys(tags, 0.5), 95_365)
    assert folder_bytes(tmp_path / "run") - before <= 1024
    log.scalars({"odd": math.nan, "odder": -math.inf, "tensor": torch.tensor(3.0)}, 95_365)
    log.close()
    points = read_scalars(tmp_path / "run")
    assert all(points[tag][0][:2] == (95_365, 0.5) for tag in tags)
    assert math.isnan(points["odd"][0][1]) and points["odder"][0][1] == -math.inf
    assert points["tensor"][0][1] == 3.0
    loader = python_loader(tmp_path)
    (event,) = loader.Tensors("run", tags[3])
    assert (event.step, tensor_util.make_ndarray(event.tensor_proto)) == (95_365, 0.5)


def test_checksums_are_those_of_tensorboard():
    choose = random.Random(2)
    records = [choose.randbytes(choose.choice([0, 1, 7, 300, 301, 5000])) for _ in range(200)]
    records.append(choose.randbytes(40_000))
    expected = [masked_crc32c(record) for record in records]
    assert event_files.crc32c_of_many(records) == expected
    assert event_files.crc32c_of_many(records[:3]) == expected[:3]
    assert event_files.crc32c_of_many([b""]) == [masked_crc32c(b"")]


def test_files_sort_in_the_order_of_writing_within_one_second(tmp_path):
    for first in range(1, 6):
        log = TensorBoardLog(tmp_path, first)
        log.scalars({"x": float(first)}, first)
        log.close()
    files = sorted(tmp_path.iterdir(), key=lambda path: path.name)
    found = [EventAccumulator(str(path)).Reload().Scalars("x")[0].step for path in files]
    assert found == [1, 2, 3, 4, 5]


# --- Resume ---------------------------------------------------------------------------------------


def write_steps(log_dir: Path, first: int, last: int, value: float, **options) -> TensorBoardLog:
    log = TensorBoardLog(log_dir, first, **options)
    for step in range(max(first, 1), last + 1):
        log.scalars({"Loss/train": value}, step)
        if step % 10 == 0:
            log.scalars({"Loss/validation": value}, step)
    return log


def test_nothing_is_touched_where_nothing_is_stale(tmp_path):
    write_steps(tmp_path, 0, 20, 1.0).close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_steps(tmp_path, 21, 30, 2.0).close()
    assert all(path.read_bytes() == data for path, data in before.items())
    assert len(list(tmp_path.iterdir())) == 2
    assert steps(read_scalars(tmp_path)["Loss/train"]) == list(range(1, 31))


def test_an_evaluation_repeated_after_a_resume_is_there_once(tmp_path):
    """A checkpoint saved within the evaluation of step 10, which was then completed, logged in
    part or in whole, and lost in a crash: the resume evaluates step 10 again."""

    def evaluation(log, step):
        log.scalars({"Loss/validation": 3.0, "Evaluation/hellaswag_accuracy": 0.25}, step)
        log.text("Generated_Samples/text", "sample", step)

    def first(log):
        log.hparams({"max_lr": 1.0}, METRICS)
        for step in (9, 10):
            log.scalars({"Loss/train": 1.0}, step)
        log.scalars({"Loss/validation": 3.0}, 10)  # the text is not there yet
        log.scalars({"Loss/train": 1.0}, 11)

    folder = tmp_path / "run"
    killed_with_9(folder, first)
    for lr in (1.0, 2.0, 2.0):  # crashes again and again; the changed row rewrites the folder
        log = TensorBoardLog(folder, 11)
        log.hparams({"max_lr": lr}, METRICS)
        evaluation(log, 10)
        log.scalars({"Loss/train": 1.0}, 11)
        log.close()
    evaluation(TensorBoardLog(folder, 21), 20)
    points = read_scalars(folder)
    assert steps(points["Loss/train"]) == [9, 10, 11]
    for tag in ("Loss/validation", "Evaluation/hellaswag_accuracy"):
        assert steps(points[tag]) == [10, 20], tag
    loader = python_loader(tmp_path)
    assert tensor_steps(loader, folder.name, "Generated_Samples/text/text_summary") == [10, 20]


def test_many_crashes_leave_one_timeline_and_few_files(tmp_path):
    expected = {}
    first = 0
    for attempt, (last, checkpoint) in enumerate(
        [(25, 20), (47, 30), (55, 10), (12, 11), (60, 60)]
    ):
        write_steps(tmp_path, first, last, float(attempt))  # never closed
        for step in range(max(first, 1), checkpoint + 1):
            expected[step] = float(attempt)
        expected = {s: v for s, v in expected.items() if s <= checkpoint}
        first = checkpoint + 1
    TensorBoardLog(tmp_path, first).close()
    points = read_scalars(tmp_path)
    assert {step: value for step, value, _ in points["Loss/train"]} == expected
    assert steps(points["Loss/train"]) == list(range(1, 61))
    assert steps(points["Loss/validation"]) == [10, 20, 30, 40, 50, 60]
    files = list(tmp_path.iterdir())
    assert sum(path.stat().st_size > 0 for path in files) <= 3
    for path in files:  # the empty ones go when no running TensorBoard can be at them any more
        os.utime(path, (0, 0))
    write_steps(tmp_path, 51, 51, 9.0).close()
    assert sum(path.stat().st_size == 0 for path in tmp_path.iterdir()) <= 3
    assert steps(read_scalars(tmp_path)["Loss/train"]) == list(range(1, 52))


def test_crash_within_the_cleaning_is_repaired_by_the_next_one(tmp_path):
    write_steps(tmp_path, 0, 25, 1.0)
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_steps(tmp_path, 21, 21, 2.0).close()
    for path, data in old.items():  # as if killed after the rename, before the old file was removed
        path.write_bytes(data)
    (tmp_path / tensorboard_log.MERGE_NAME).write_bytes(b"killed in a still earlier cleaning")
    assert steps(read_scalars(tmp_path)["Loss/train"]) == list(range(1, 22))
    write_steps(tmp_path, 22, 30, 3.0).close()
    points = read_scalars(tmp_path)
    assert steps(points["Loss/train"]) == list(range(1, 31))
    assert steps(points["Loss/validation"]) == [10, 20, 30]
    assert not (tmp_path / tensorboard_log.MERGE_NAME).exists()


@pytest.mark.parametrize(
    "damage", ["cut", "half a header", "zeros", "flipped value", "flipped length"]
)
def test_damaged_event_files_lose_only_what_is_damaged(tmp_path, damage):
    write_steps(tmp_path, 0, 40, 1.0).close()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    record = data.index(b"Loss/train", len(data) // 2)  # somewhere in the middle
    if damage == "cut":
        del data[-5:]
    elif damage == "half a header":
        data += data[:7]
    elif damage == "zeros":
        data += bytes(4096)
    elif damage == "flipped value":
        data[record + 12] ^= 1
    else:
        start = data.rindex(event_files.header(40)[1:8], 0, record) - 1
        data[start + 9] ^= 1
    path.write_bytes(data)
    said = []
    write_steps(tmp_path, 41, 45, 2.0, announce=said.append).close()
    found = steps(read_scalars(tmp_path)["Loss/train"])
    assert found[-5:] == [41, 42, 43, 44, 45] and found == sorted(set(found))
    if damage != "flipped length":
        assert len(found) >= 44
    assert len(said) == 1 and path.name in said[0]
    kept = [p for p in tmp_path.iterdir() if p.name.startswith("damaged.")]
    if damage in ("cut", "half a header"):
        assert not kept
    else:
        assert kept[0].read_bytes() == data and "tfevents" not in kept[0].name


def test_fresh_run_sets_an_earlier_attempt_aside(tmp_path):
    said = []
    run = tmp_path / "run"
    write_steps(run, 0, 15, 1.0, announce=said.append).close()
    running = python_loader(tmp_path)
    for _ in range(2):
        write_steps(run, 0, 10, 1.0, announce=said.append).close()
    assert len(said) == 2 and str(run) in said[0]
    aside = [p for p in run.iterdir() if p.name.startswith("earlier.")]
    assert len(aside) == 2 and not any("tfevents" in p.name for p in aside)
    assert all(p.stat().st_size > 300 for p in aside)
    assert steps(read_scalars(run)["Loss/train"]) == list(range(1, 11))
    assert tensor_steps(running.Reload(), "run", "Loss/train") == list(range(1, 11))


def test_new_timeline_from_another_runs_checkpoint(tmp_path):
    write_steps(tmp_path, 0, 10, 1.0, announce=[].append).close()
    write_steps(tmp_path, 5001, 5005, 2.0, announce=[].append, new_timeline=True).close()
    assert steps(read_scalars(tmp_path)["Loss/train"]) == list(range(5001, 5006))
    write_steps(tmp_path, 5004, 5010, 3.0).close()
    assert steps(read_scalars(tmp_path)["Loss/train"]) == list(range(5001, 5011))


def hparams_shown(folder: Path) -> dict:
    """Tag -> what the Python loader gives the HParams tab."""
    content = python_loader(folder).PluginRunToTagToContent("hparams")
    return {  # maps have no order in a protocol buffer
        tag: HParamsPluginData.FromString(data).SerializeToString(deterministic=True)
        for tag, data in content["run"].items()
    }


def test_hparams_across_resumes(tmp_path):
    run = tmp_path / "run"
    log = TensorBoardLog(run, 0)
    log.hparams({"lr": 1e-3, "steps": None}, METRICS, numeric=["steps"])
    log.scalars({"Loss/train": 1.0}, 1)
    log.hparams_end()
    log.close()
    first = hparams_shown(tmp_path)
    assert len(first) == 3
    log = TensorBoardLog(run, 2)  # a finished run goes on: it is no longer finished
    log.hparams({"lr": 1e-3, "steps": None}, METRICS, numeric=["steps"])
    log.scalars({"Loss/train": 1.0}, 2)
    log.close()
    again = hparams_shown(tmp_path)
    assert again == {tag: data for tag, data in first.items() if "end" not in tag}
    log = TensorBoardLog(run, 3)
    log.hparams({"lr": 2e-3, "steps": 7}, METRICS, numeric=["steps"])
    log.scalars({"Loss/train": 1.0}, 3)
    log.close()
    changed = hparams_shown(tmp_path)
    start = "_hparams_/session_start_info"
    assert changed[start] != first[start] and len(changed) == 2
    assert steps(read_scalars(run)["Loss/train"]) == [1, 2, 3]


def test_a_roll_back_keeps_the_row_and_the_layout(tmp_path):
    run = tmp_path / "run"
    log = TensorBoardLog(run, 0)
    log.hparams({"lr": 1e-3}, METRICS)
    log.layout(LAYOUT)
    before = hparams_shown(tmp_path)
    for first_step in (3, 2):  # back, and back again
        log.scalars({"Loss/train": 1.0}, first_step - 1)
        log.scalars({"Loss/train": 1.0}, first_step)
        log.rewind(first_step)
    log.close()
    assert steps(read_scalars(run)["Loss/train"]) == [1]
    assert hparams_shown(tmp_path) == before and len(before) == 2
    loader = python_loader(tmp_path)
    (layout,) = loader.PluginRunToTagToContent("custom_scalars").values()
    assert len(layout) == 1


# --- Disk trouble ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs here (needs root): {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return ballast


def test_full_disk_stops_logging_once_and_it_comes_back(small_disk):
    said = []
    run = small_disk / "run"
    log = write_steps(run, 0, 10, 1.0, announce=said.append, retry_every=0.0)
    ballast = fill(small_disk)
    for step in range(11, 201):  # the last page of the file still takes some
        log.scalars({"Loss/train": 2.0, "Gradient/norm": 2.0}, step)
        log.text("sample", "text " * 50, step)
    log.histograms({"w": torch.randn(100)}, 200)
    log.layout(LAYOUT)
    log.flush()
    assert len(said) == 1 and "stopped" in said[0] and "No space left" in said[0]
    written = steps(read_scalars(run)["Loss/train"])[-1]
    assert 10 <= written < 200
    ballast.unlink()
    for step in range(201, 211):
        log.scalars({"Loss/train": 3.0}, step)
    assert len(said) == 2 and "back at step 201" in said[1]
    lost, first, last = map(
        int, re.search(r"(\d+) values of steps (\d+) to (\d+)", said[1]).groups()
    )
    assert last == 200 and first in (written, written + 1)
    texts = len(EventAccumulator(str(run), {"tensors": 0}).Reload().Tensors("sample/text_summary"))
    assert lost == (200 - written) * 2 + (190 - texts) + 1
    log.close()
    expected = [*range(1, written + 1), *range(201, 211)]
    assert steps(read_scalars(run)["Loss/train"]) == expected
    loader = python_loader(small_disk)
    assert tensor_steps(loader, "run", "Loss/train") == expected
    assert "custom_scalars" in loader.PluginRunToTagToContent("custom_scalars")["run"].popitem()[0]
    for path in event_files.event_files(run):  # no half record anywhere
        place = event_files.Place()
        assert list(event_files.read_records(path, place))
        assert (place.bad, place.tail) == (0, 0)


def test_full_disk_until_the_end(small_disk):
    said = []
    log = write_steps(small_disk / "run", 0, 10, 1.0, announce=said.append, retry_every=0.0)
    fill(small_disk)
    for step in range(11, 400):
        log.scalars({"Loss/train": 2.0}, step)
    log.hparams_end()
    log.close()
    log.close()
    assert len(said) == 2 and re.search(r"[1-9]\d* values were not recorded", said[1])


def test_full_disk_at_a_resume(small_disk):
    said = []
    run = small_disk / "run"
    write_steps(run, 0, 300, 1.0)
    ballast = fill(small_disk)
    log = TensorBoardLog(
        run, 201, announce=said.append, retry_every=0.0
    )  # can neither clean nor open
    log.hparams({"lr": 1.0}, METRICS)
    assert len(said) == 2 and "stale" in said[0] and "stopped" in said[1]
    assert len(read_scalars(run)["Loss/train"]) == 300  # nothing lost
    assert not (run / tensorboard_log.MERGE_NAME).exists()
    ballast.unlink()
    log.scalars({"Loss/train": 2.0}, 201)
    log.close()
    # Python's loaders obey the start record at once, and the next resume cleans for all.
    assert steps(read_scalars(run)["Loss/train"]) == list(range(1, 202))
    assert tensor_steps(python_loader(small_disk), "run", "Loss/validation") == list(
        range(10, 201, 10)
    )
    assert len(hparams_shown(small_disk)) == 2  # what could not be written waited
    TensorBoardLog(run, 202).close()
    points = EventAccumulator(str(run), {"scalars": 0}, purge_orphaned_data=False).Reload()
    assert [e.step for e in points.Scalars("Loss/train")] == list(range(1, 202))


def test_retries_are_no_more_often_than_asked(small_disk):
    log = write_steps(small_disk / "run", 0, 10, 1.0, announce=[].append, retry_every=3600.0)
    ballast = fill(small_disk)
    for step in range(11, 400):
        log.scalars({"Loss/train": 2.0}, step)
    ballast.unlink()
    log.scalars({"Loss/train": 3.0}, 400)
    assert steps(read_scalars(small_disk / "run")["Loss/train"])[-1] < 400
    log.close()


def test_deleted_folder_comes_back(tmp_path):
    said = []
    run = tmp_path / "run"
    log = write_steps(run, 0, 10, 1.0, announce=said.append, retry_every=0.0)
    shutil.rmtree(run)
    log.flush()
    log.scalars({"Loss/train": 2.0}, 11)
    assert len(said) == 2 and "deleted" in said[0] and "back" in said[1]
    log.close()
    assert steps(read_scalars(run)["Loss/train"]) == [11]


@pytest.mark.parametrize("below", ["", "run", "runs/run"])
def test_unwritable_folder_is_refused_by_name_and_reason(tmp_path, below):
    blocker = tmp_path / "file"
    blocker.write_text("a regular file")
    target = blocker / below
    with pytest.raises(
        ValueError, match=r"cannot write TensorBoard events to .*(exists|directory)"
    ) as e:
        TensorBoardLog(target, 0)
    assert str(target) in str(e.value)
    assert blocker.read_text() == "a regular file"
