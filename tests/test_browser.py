"""TensorBoard as people use it: a real server, looked at in a real Chromium.

Three short runs as the program's Monitor writes them (numbers made up, nothing trained), one of the
writer alone with hostile text, one that grows while the page is open. Three views: a window of 1280
pixels, one of 390, and a phone of 390, which lays the page out 980 pixels wide, since TensorBoard
does not say that it suits phones.
"""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from conftest import ROOT, read_scalars
from monitoring import summary
from monitoring.tensorboard_log import TensorBoardLog

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    pytest.skip("needs playwright: pip install -r tests/requirements.txt", allow_module_level=True)
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip(f"needs a browser, one of {', '.join(NAMES)}", allow_module_level=True)

sys.path.insert(0, str(ROOT / "benchmarks"))
from tensorboard_size import reference_config, write_run  # noqa: E402

pytestmark = pytest.mark.xdist_group("browser")  # one server and one browser for all
STEPS = 100
FLOORS = {"a": 3.2, "b": 2.9, "c": 3.5}  # nats that the loss falls towards
BY_LOSS = ["b", "a", "c"]
HTML_PROMPT = "<img src=x onerror=hacked=1>"
HOSTILE = """<script>hacked = 2</script><img src="x" onerror="hacked = 3">
[here](javascript:hacked=4) ![p](http://evil.example/p.png) <a href="http://evil.example">x</a>"""
LONG = "It was the best of times, it was the worst of times, " * 8
VIEWS = {
    "wide": {"viewport": {"width": 1280, "height": 900}},
    "narrow": {"viewport": {"width": 390, "height": 844}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}


# --- A server with runs, a browser ----------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Three runs with all kinds of charts, and one with hostile text."""
    folder = tmp_path_factory.mktemp("browser") / "runs"
    reference = reference_config(tensorboard_dir=str(folder))
    every = {"eval_freq": 20, "hellaswag_freq": 50, "sample_freq": 50, "histogram_freq": 50}
    short = {"max_steps": STEPS, "warmup_steps": 10, "n_layer": 1, "n_embd": 24} | every
    for name, floor in FLOORS.items():
        prompt = {"sample_prompt": HTML_PROMPT} if name == "a" else {}
        write_run(dataclasses.replace(reference, run_name=name, **short, **prompt), floor)
    log = TensorBoardLog(folder / "hostile", 0)
    log.text("Generated_Samples/text", f"{HOSTILE}\n\n---\n\n{LONG}", 1)
    log.close()
    return folder


@pytest.fixture(scope="module")
def address(runs) -> str:
    """Of `tensorboard --logdir=runs`, as people start it, but looking for news each second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={runs}", f"--port={port}"]
    command += ["--reload_interval=1"]
    with open(runs.parent / "server.txt", "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield f"http://localhost:{port}/"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(address):
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, as whom containers run tests.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = chromium.new_page()
        for _ in range(240):  # until the server is up and has read all the runs
            try:
                with urllib.request.urlopen(f"{address}data/runs", timeout=5) as reply:
                    if {*FLOORS, "hostile"} <= set(json.load(reply)):
                        break
            except (urllib.error.URLError, ConnectionError):
                pass
            page.wait_for_timeout(250)
        page.close()
        yield chromium
        chromium.close()


@pytest.fixture(params=["wide", "phone"])
def view(request) -> str:
    return request.param


@pytest.fixture
def show(browser, address, view):
    """show("#text") -> that page, in the view; nothing may come from another host or execute."""
    context = browser.new_context(**VIEWS[view])
    context.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))

    def show(where: str):
        page.goto("about:blank")  # or a new fragment would be no new page
        page.goto(address + where)
        return page

    yield show
    assert page.evaluate("typeof hacked") == "undefined"
    local = (address, "about:", "data:", "blob:")
    assert [url for url in asked if not url.startswith(local)] == []
    assert errors == []
    context.close()


@pytest.fixture
def report_page(browser, tmp_path):
    """report_page(view, scheme, RUN ...) -> (page of `report.py RUN ... --serve`, its process)."""
    processes, contexts, errors = [], [], []

    def open_page(view: str, scheme: str, *words):
        command = [sys.executable, ROOT / "src" / "report.py", *words, "--serve", "0"]
        process = subprocess.Popen(
            list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        line = next(line for line in process.stdout if "http://" in line)
        context = browser.new_context(color_scheme=scheme, **VIEWS[view])
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if "Content Security" in m.text else 0)
        page.goto(line.split()[0])
        return page, process

    yield open_page
    assert errors == []
    for context in contexts:
        context.close()
    for process in processes:
        process.kill()
        process.communicate()


def card(page, kind: str, title: str):
    """The card with this title; `kind` is its element."""
    heading = page.locator(".heading").get_by_text(title, exact=True)
    if kind != "scalar-card":
        heading = page.locator(".heading-label.name").get_by_text(title, exact=True)
    else:  # "Loss" and "/train" are two elements
        heading = page.locator(".tag").filter(has_text=re.compile(f"^{title}$"))
    return page.locator(kind).filter(has=heading)


def assert_fits(page, chart) -> None:
    """A phone shows the whole chart at once: nothing sticks out at the right."""
    width = page.evaluate("innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = chart.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > width / 4


def shown_by_run(series) -> dict[str, list[str]]:
    """Run -> smoothed, value, step, as the table below a chart of Time Series says."""
    rows = series.locator("tb-data-table-content-row").all()
    cells = [row.locator("tb-data-table-content-cell").all_inner_texts() for row in rows]
    return {name.strip(): [text.strip() for text in rest] for _, name, *rest in cells}


# --- Charts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS, indirect=True)
def test_time_series(show, runs, view):
    page = show("?tagFilter=Loss/#timeseries")
    for tag in ("Loss/train", "Loss/validation"):
        series = card(page, "scalar-card", tag)
        expect(series).to_be_visible()
        expect(series.locator("tb-data-table-content-row")).to_have_count(len(FLOORS))
        found = shown_by_run(series)
        for name in FLOORS:
            _, value, step, *_ = found[name]
            last_step, last_value, _ = read_scalars(runs / name)[tag][-1]
            assert int(step) == last_step == STEPS
            assert float(value) == pytest.approx(last_value, abs=1e-3)
        if view == "phone":
            assert_fits(page, series)


def test_scalars(show, view):
    page = show("#scalars")
    for group in ("Loss", "Gradient", "Performance", "Evaluation", "Update_Ratio"):
        name = page.locator("tf-category-paginated-view .category-name")
        expect(name.get_by_text(group, exact=True)).to_be_attached()
    chart = card(page, "tf-scalar-card", "Gradient/norm")
    expect(chart.locator(".line-plot:not(.ghost) path.line")).to_have_count(len(FLOORS))
    if view == "phone":
        assert_fits(page, chart)


@pytest.mark.parametrize("view", VIEWS, indirect=True)
def test_both_losses_are_on_one_chart_of_the_dashboard(show, view):
    page = show("#custom_scalars")
    groups = page.locator("tf-category-paginated-view .category-name")
    expect(groups).to_have_text(["Training", "Stability", "Speed", "Evaluation"])
    loss = card(page, "tf-custom-scalar-multi-line-chart-card", "Loss")
    curves = loss.locator(".line-plot:not(.ghost) path.line")
    expect(curves).to_have_count(2 * len(FLOORS))
    loss.locator(".toggle-matches-button").click()
    for name in FLOORS:
        for tag in ("Loss/train", "Loss/validation"):
            expect(loss.locator("#matches-container")).to_contain_text(f"{tag} ({name})")
    for title in ("Gradient norm", "Tokens per second", "HellaSwag", "Update-to-weight ratio"):
        expect(card(page, "tf-custom-scalar-multi-line-chart-card", title)).to_have_count(1)
    if view == "phone":
        assert_fits(page, loss)
    if view != "narrow":  # there the curves are 90 pixels wide
        loss.locator("#chartdiv").hover()
        rows = page.locator("vz-line-chart-tooltip").filter(visible=True).locator("tbody tr")
        expect(rows).to_have_count(2 * len(FLOORS))
        expect(rows.nth(1)).to_contain_text(re.compile(r"Loss/train \(\w\)"))
        expect(rows.last).to_contain_text(re.compile(r"Loss/validation \(\w\)"))


@pytest.mark.parametrize("view", ["wide"], indirect=True)
def test_the_printed_address_shows_losses_unsmoothed(show):
    printed = summary.watching(reference_config(tensorboard_dir="runs")).split("localhost:6006/")[1]
    page = show(printed)
    expect(page.locator("tf-custom-scalar-dashboard input[type=number]")).to_have_value("0")
    expect(card(page, "tf-custom-scalar-multi-line-chart-card", "Loss")).to_be_visible()


@pytest.mark.parametrize("view", ["wide"], indirect=True)
def test_the_guides_address_pins_both_losses(show):
    guide = (ROOT / "TENSORBOARD_GUIDE.md").read_text(encoding="utf-8")
    page = show(re.search(r"localhost:6006/(\?pinnedCards=\S+)", guide)[1])
    pinned = page.locator("metrics-pinned-view")
    expect(pinned.locator("scalar-card")).to_have_count(2)
    expect(pinned.locator(".tag")).to_have_text(["Loss/train", "Loss/validation"])
    expect(page.locator(".slider-row input.slider-input")).to_have_value("0")


@pytest.mark.parametrize(
    "tab, element, curves",
    [
        ("histograms", "tf-histogram-loader", "g.histogram path.outline"),
        ("distributions", "tf-distribution-loader", "path.area"),
    ],
)
def test_histograms_and_distributions(show, view, tab, element, curves):
    tag = "Gradients/transformer.h.0.attn.c_attn.weight"
    page = show(f"?tagFilter=h.0.attn.c_attn.weight#{tab}")
    cards = card(page, element, tag)
    expect(cards).to_have_count(len(FLOORS))
    expect(cards.first.locator(curves).first).to_be_visible()
    if tab == "histograms":
        expect(cards.first.locator(curves)).to_have_count(3)
        expect(cards.first.locator("g.axis.y:not(.slice) text").last).to_have_text("100")
    if view == "phone":
        assert_fits(page, cards.first)


# --- Text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS, indirect=True)
def test_samples_are_readable_and_nothing_in_them_executes(show, view):
    page = show("#text")
    texts = page.locator("tf-text-loader")
    expect(texts).to_have_count(len(FLOORS) + 1)
    first = texts.filter(has=page.locator("#heading-run").get_by_text("a", exact=True))
    expect(first.locator(".step-value")).to_have_text(["100", "50", "0"])
    expect(first.locator("pre").first).to_contain_text(HTML_PROMPT)
    hostile = texts.filter(has=page.locator("#heading-run").get_by_text("hostile", exact=True))
    for line in HOSTILE.splitlines():
        expect(hostile.locator("pre")).to_contain_text(line)
    assert texts.locator("#markdown").locator("img, a, script").count() == 0
    if view != "narrow":  # long lines are wrapped: all of them is in sight
        box = hostile.locator("#steps-container")
        assert box.evaluate("box => box.scrollWidth <= box.clientWidth")


# --- HParams --------------------------------------------------------------------------------------


def rows_from_top(page) -> list[str]:
    """The names in the table's first column, by where they are on the screen."""
    where = "cells => cells.map(cell => [cell.getBoundingClientRect().y, cell.innerText.trim()])"
    cells = page.locator("tf-hparams-table-view .table-cell").evaluate_all(where)
    return [text for _, text in sorted(cells) if text in FLOORS]


def test_runs_are_sorted_by_validation_loss(show, runs):
    page = show("#hparams")
    table = page.locator("tf-hparams-table-view")
    heads = ["max_lr", "max_steps", "model", "optimizer", "total_batch_size"]
    heads += ["Loss/validation", "Loss/validation_best", "Evaluation/hellaswag_accuracy"]
    for head in ("Trial ID", *heads):
        expect(table.locator(".table-header").get_by_text(head, exact=True)).to_be_attached()
    for direction, order in (("Ascending", BY_LOSS), ("Descending", BY_LOSS[::-1])):
        for label, choice in (("Sort by", "Loss/validation"), ("Direction", direction)):
            menu = page.locator("tf-hparams-query-pane paper-dropdown-menu")
            menu = menu.filter(has=page.get_by_text(label, exact=True))
            menu.click()
            menu.locator("paper-item").get_by_text(choice, exact=True).click()
        for _ in range(100):
            if rows_from_top(page) == order:
                break
            page.wait_for_timeout(50)
        assert rows_from_top(page) == order
    losses = {name: read_scalars(runs / name)["Loss/validation"][-1][1] for name in FLOORS}
    assert sorted(losses, key=losses.get) == BY_LOSS
    for loss in losses.values():
        expect(table).to_contain_text(f"{loss:.5g}")


# --- While a run writes ---------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["wide"], indirect=True)
def test_a_run_that_grows_is_seen_by_the_reload_button_and_by_automatic_reload(show, runs):
    def write(step):
        log.scalars({"Live/loss": 9.0 / step}, step)

    log = TensorBoardLog(runs / "live", 0)
    write(1)
    page = show("about:blank")
    page.clock.install()  # to let half a minute pass without waiting for it
    page = show("?tagFilter=Live#timeseries")
    reload = page.locator("app-header-reload button")
    series = card(page, "scalar-card", "Live/loss")

    def wait_until_shown(step, look_again):
        for _ in range(60):  # the server reads anew once a second
            rows = shown_by_run(series)
            if "live" in rows and rows["live"][2] == str(step):
                return
            look_again()
            page.wait_for_timeout(250)
        raise AssertionError(f"step {step} is not shown but {rows}")

    wait_until_shown(1, reload.click)
    write(2)
    wait_until_shown(2, reload.click)

    page.locator("settings-button button").click()
    page.get_by_text("Reload data", exact=True).click()
    page.keyboard.press("Escape")
    write(3)
    wait_until_shown(3, lambda: page.clock.fast_forward(30_000))
    log.close()


# --- The report's own page ------------------------------------------------------------------------


@pytest.mark.parametrize("view, scheme", [("phone", "light"), ("phone", "dark"), ("wide", "dark")])
def test_the_report_fits_the_screen_in_light_and_dark(report_page, runs, view, scheme):
    """What matters first is in sight without scrolling, and nothing sticks out at the side."""
    page, _ = report_page(view, scheme, *(runs / name for name in FLOORS))
    width, height = VIEWS[view]["viewport"].values()
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    for name in ("training loss", "validation loss", "warnings", "trained"):
        box = page.locator("dt").get_by_text(name, exact=True).bounding_box()
        assert box["y"] + box["height"] < height, name
    plot = page.locator("figure").first.locator(".plot")
    box = plot.bounding_box()
    assert box["width"] > 0.7 * min(width, 900) and box["x"] + box["width"] <= width
    size = plot.locator("span").first.evaluate(
        "span => parseFloat(getComputedStyle(span).fontSize)"
    )
    assert size >= 11  # words keep their size however narrow the chart is
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    lightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ground, ink)]
    assert (lightness[0] > lightness[1]) == (scheme == "light")
    colors = (
        page.locator("figure")
        .first.locator("path:not(.grid, .faint)")
        .evaluate_all("paths => paths.map(path => getComputedStyle(path).color)")
    )
    assert len(set(colors)) >= len(FLOORS) and ground not in colors
    hidden = page.locator("main").evaluate(
        "main => [...main.querySelectorAll('p, dd, figcaption, .legend')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML)"
    )
    assert hidden == []


def test_the_report_is_renewed_where_it_is(report_page, tmp_path):
    log = TensorBoardLog(tmp_path / "runs" / "live", 0)
    for step in range(1, 4):
        log.scalars({"Loss/train": 9.0}, step)
    page, process = report_page("phone", "light", "live")
    expect(page.locator("main > p").first).to_contain_text("step 3")
    page.locator("summary", has_text="configuration").click()
    page.evaluate("scrollTo(0, 20)")
    log.scalars({"Loss/train": 2.25}, 4)
    expect(page.locator("main > p").first).to_contain_text("step 4", timeout=30_000)
    assert page.evaluate("scrollY") == 20
    expect(page.locator("details[open]")).to_have_count(1)
    age = page.locator("time").first
    before = age.inner_text()
    page.wait_for_timeout(2500)
    assert re.fullmatch(r"[\d.]+ s ago", before) and age.inner_text() != before
    process.kill()
    expect(page.locator("body")).to_have_class("lost", timeout=30_000)
    expect(page.locator("main > p").first).to_contain_text("step 4")  # still there
