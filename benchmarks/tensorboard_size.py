"""A run of 95,365 steps with every tag: its size on disk, and how soon TensorBoard shows it.

    python benchmarks/tensorboard_size.py FOLDER [--steps 95365] [--samples_per_plugin X=N]

The program's own Monitor writes FOLDER/runs/reference with the defaults of the reference run (GPT-2
124M on a GPU: scalars each step, evaluations, samples and HellaSwag every 250, histograms of 148
weights and 148 gradients every 1000); numbers and texts are made up. Nothing is trained. What is
there already is not written again. Prints bytes by kind of record; then starts TensorBoard as
people do and says when the last step can be asked for; then, where Chromium and playwright are
installed, when Time Series and Scalars show their first curve.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from tensorboard.compat.proto.event_pb2 import Event

import train_improved as ti
from monitoring import event_files, health, notify

WORDS = "the of and a to in is was that it for on with as his they be at one have this from by hot"
SECONDS = 20.5  # of a step, as planned for a DGX Spark
VALUES = 20_000  # of a tensor, at most: its histogram has about 60 bins however many it has


# --- A long run in a minute -----------------------------------------------------------------------


class MadeUpModel:
    """Names and shapes of a model; tensors of up to VALUES values that stand for its weights."""

    def __init__(self, cfg: ti.Config):
        with torch.device("meta"):
            model = ti.GPT(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len)
        self.flops = model.flops_per_token()
        generator = torch.Generator().manual_seed(1)
        self.tensors = {}
        for name, p in model.named_parameters():
            noise = torch.randn(min(p.numel(), VALUES), generator=generator)
            spread = torch.randn(noise.shape, generator=generator).mul_(1.5).exp_().mul_(1e-5)
            self.tensors[name] = tensor = noise * 0.02 + ("ln_" in name and "weight" in name)
            tensor.grad = noise * spread
        self.shapes = [p.shape for p in model.parameters()]

    def flops_per_token(self) -> int:
        return self.flops

    def named_parameters(self):
        return self.tensors.items()

    def parameters(self):
        return (torch.empty(shape, device="meta") for shape in self.shapes)


def reference_config(**changes) -> ti.Config:
    """All defaults of GPT-2 124M on FineWeb-Edu 10B, decided as on a GPU."""
    cfg = ti.Config(model="gpt2", data_dir=ti.FINEWEB_DIR, use_tensorboard=True, **changes)
    ti.resolve_model(cfg, "cuda")
    ti.resolve_length(cfg, 10_000_000_000)
    return cfg


def write_run(cfg: ti.Config, floor: float = 2.9, histograms_of: MadeUpModel | None = None) -> None:
    """The event files of a whole healthy run whose loss falls towards `floor`, in nats."""
    noise, state = random.Random(cfg.run_name), ti.TrainState()
    model = histograms_of or MadeUpModel(cfg)
    run = SimpleNamespace(
        cfg=cfg, state=state, model=model, hellaswag_items=range(10_042), asked=set(),
        dist=SimpleNamespace(is_main=True, world_size=1, device=torch.device("cpu"), peers=None),
        train_data=SimpleNamespace(num_windows=10_000_000_000 // cfg.seq_len),
        dtype=torch.bfloat16, resumed_from=None, resumes_own_name=False,
    )  # fmt: skip
    monitor = ti.Monitor(run, 1e14, notify.NOBODY)
    monitor.meter.works, run.dist.device = True, torch.device("cuda")  # with energy and memory
    weights = [1.0] * len(model.tensors)
    loss = math.nan
    while True:
        if ti.evaluation_due(state, cfg):
            by_position, texts = None, []
            if ti.due(cfg.eval_freq, state, cfg):
                state.validation_loss = floor + 7.9 * (1 + state.step / 120) ** -0.6
                state.best_loss = min(state.best_loss, state.validation_loss)
                by_position = state.validation_loss + torch.linspace(0.5, -0.1, cfg.seq_len)
            if ti.due(cfg.hellaswag_freq, state, cfg):
                tokens = state.step * cfg.total_batch_size
                chance = 0.25 + 0.01 * math.log2(1 + tokens / 1e9)
                state.hellaswag = chance + noise.gauss(0, 0.002)
            if ti.due(cfg.sample_freq, state, cfg):
                words = [noise.choices(WORDS.split(), k=64) for _ in range(cfg.num_samples)]
                texts = [f"{cfg.sample_prompt} {' '.join(sample)}" for sample in words]
            monitor.evaluation(run, by_position, texts, 60.0)
            state.evaluated_step = state.step
            state.total_seconds += 60.0
        if state.step >= cfg.max_steps:
            break
        state.step += 1
        state.tokens += cfg.total_batch_size
        state.position = state.tokens // cfg.seq_len
        seconds = SECONDS * (1 + 0.02 * noise.random())
        state.train_seconds += seconds
        state.total_seconds += seconds
        state.device_seconds += seconds
        state.watt_seconds += 100 * seconds
        loss = floor + 7.9 * (1 + state.step / 120) ** -0.6 + noise.gauss(0, 0.03)
        norm = 3.0 if state.step < cfg.warmup_steps else 0.3 * noise.lognormvariate(0, 0.3)
        lr = ti.learning_rate(state.step, cfg)
        norms = []
        if health.check_due(state.step):
            norms = [2e-3 * lr / cfg.max_lr * noise.uniform(0.5, 1) for _ in weights] + weights
        monitor.step(run, loss, norm, False, lr, seconds, norms)
        if ti.due(cfg.histogram_freq, state, cfg) or (cfg.histogram_freq and state.step == 1):
            monitor.histograms(model, state.step)
            for tensor in model.tensors.values():
                tensor.mul_(1.01)
    monitor.close(finished=True)


# --- What it takes --------------------------------------------------------------------------------


def bytes_by_kind(folder: Path) -> tuple[Counter, Counter]:
    """Kind of record -> bytes in the event files, and how many records."""
    sizes, records = Counter(), Counter()
    for path in event_files.event_files(folder):
        place = event_files.Place()
        for batch in event_files.read_records(path, place):
            for record in batch:
                event = Event.FromString(record[12:-4])
                kind = "HParams, dashboard, marks"
                if values := event.summary.value:
                    names = {value.metadata.plugin_data.plugin_name for value in values}
                    if values[0].HasField("histo") or "histograms" in names:
                        kind = "histograms"
                    elif "text" in names:
                        kind = "text"
                    elif values[0].HasField("simple_value"):
                        evaluated = any(v.tag == "Loss/validation" for v in values)
                        looked = any(v.tag == "Health/warnings" for v in values)
                        kind = "scalars of an evaluation" if evaluated else "scalars of a step"
                        kind += " with update ratios" if looked and not evaluated else ""
                sizes[kind] += len(record)
                records[kind] += 1
        assert (place.bad, place.tail) == (0, 0)
    return sizes, records


@contextlib.contextmanager
def tensorboard(logdir: Path, options: list[str]):
    """A `tensorboard` process on a free port -> its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", f"--port={port}"]
    with open(os.devnull, "w") as nowhere:
        server = subprocess.Popen([*command, *options], stdout=nowhere, stderr=nowhere)
    try:
        yield f"http://localhost:{port}/"
    finally:
        server.terminate()
        server.wait()


def wait_for_step(address: str, run: str, step: int) -> int:
    """Until the server knows that step of Loss/train -> how many points of it there are to see."""
    query = urllib.parse.urlencode({"run": run, "tag": "Loss/train"})
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            url = f"{address}data/plugin/scalars/scalars?{query}&format=csv"
            with urllib.request.urlopen(url, timeout=60) as reply:
                lines = reply.read().decode().splitlines()
            if int(lines[-1].split(",")[1]) == step:
                return len(lines) - 1
        time.sleep(0.1)


def seconds_in_browser(address: str) -> dict[str, float]:
    """Page -> seconds from asking for it to its first curve; empty without a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return {}
    pages = {
        "Time Series": ("#timeseries", "scalar-card tb-data-table-content-row"),
        "Scalars": ("#scalars", "tf-scalar-card .line-plot path.line[d]"),
        "Custom Scalars": ("#custom_scalars", ".line-plot path.line[d]"),
        "Histograms": ("#histograms", "g.histogram path.outline"),
        "Text": ("#text", "tf-text-loader pre"),
    }
    seconds = {}
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        for name, (where, curve) in pages.items():
            page.goto("about:blank")
            begin = time.perf_counter()
            page.goto(address + where)
            page.locator(curve).first.wait_for(timeout=120_000)
            seconds[name] = time.perf_counter() - begin
        browser.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the run is written, or was")
    parser.add_argument("--steps", type=int, default=95_365, help="of the run (95365)")
    parser.add_argument("--samples_per_plugin", help="passed on to TensorBoard (its default)")
    args = parser.parse_args()
    runs = args.folder / "runs"
    folder = runs / "reference"
    if not folder.exists():
        begin = time.process_time()
        cfg = reference_config(run_name="reference", tensorboard_dir=str(runs))
        with contextlib.redirect_stdout(io.StringIO()):
            write_run(dataclasses.replace(cfg, max_steps=args.steps))
        print(f"written in {time.process_time() - begin:.0f} s of processor time")
    sizes, records = bytes_by_kind(folder)
    for kind, size in sizes.most_common():
        each = size / records[kind]
        print(f"{kind:41s} {size / 1e6:7.2f} MB {records[kind]:7,} records of {each:9,.0f} bytes")
    print(f"{'together':41s} {sum(sizes.values()) / 1e6:7.2f} MB (the old estimate: 150)")

    options = [f"--samples_per_plugin={args.samples_per_plugin}"] if args.samples_per_plugin else []
    begin = time.perf_counter()
    with tensorboard(runs, options) as address:
        points = wait_for_step(address, "reference", args.steps)
        ready = time.perf_counter() - begin
        print(f"TensorBoard has it after {ready:.1f} s, start included: {points:,} points a curve")
        seconds = seconds_in_browser(address)
        for page, value in seconds.items():
            print(f"{page:15s} {value:6.1f} s until its first curve or text is there")
        if not seconds:
            print("no Chromium or no playwright here: pages not timed")


if __name__ == "__main__":
    main()
