"""Warnings on synthetic series the length of real runs, and in real runs; what a run costs."""

import dataclasses
import io
import math
import os
import random
import re
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_improved as ti
from conftest import ROOT, read_scalars, run, start
from monitoring import energy, event_files, health, summary
from test_faults import workers_of
from test_training import assert_same_training, checkpoint, logged, wait_for_step
from tokens import stream

# --- Synthetic series -----------------------------------------------------------------------------


class Series:
    """A run whose numbers are made up: those of a healthy run, with a little noise."""

    def __init__(self, cfg: ti.Config | None = None, items=10_042, state=None):
        with torch.device("meta"):
            model = ti.GPT(2, 2, 16, 32)
        if cfg is None:
            cfg = ti.Config(model="gpt2", data_dir=ti.FINEWEB_DIR)
            ti.resolve_model(cfg, "cuda")
            ti.resolve_length(cfg, 10_000_000_000)
        self.run = SimpleNamespace(
            cfg=cfg, state=state or ti.TrainState(), model=model, hellaswag_items=[None] * items
        )
        self.run.train_data = SimpleNamespace(num_windows=10_000_000_000 // cfg.seq_len)
        self.health = health.Health(self.run, "here")
        self.random = random.Random(self.run.state.step)
        self.weights = [1.0] * len(self.health.names)

    def loss(self, step):
        """10.8 at first, 3.45 at 10,000 and 3.04 at 95,365: slower at the end than a cosine's."""
        return 2.9 + 7.9 * (1 + step / 120) ** -0.6

    def norm(self, step):
        warmup = self.run.cfg.warmup_steps
        return 3.0 if step <= warmup else 0.3 + 2 * (step % 97 == 0)

    def steps(self, last, loss=None, norm=None, seconds=1.0, ratio=2e-3, bad=False):
        """Updates up to step `last`, an evaluation each --eval_freq -> what was said."""
        state, cfg, said = self.run.state, self.run.cfg, []
        while state.step < last:
            state.step += 1
            step, noise = state.step, self.random.gauss(0, 1)
            state.position += cfg.total_batch_size // cfg.seq_len
            lr = ti.learning_rate(step, cfg)
            # in warm-up an update is as much smaller as the rate
            updates = [ratio * max(lr / cfg.max_lr, 1e-3)] * len(self.weights)
            said += self.health.step(
                (self.loss(step) if loss is None else loss(step)) + 0.03 * noise,
                self.norm(step) * (1 + 0.1 * noise) if norm is None else norm(step),
                bad,
                lr,
                seconds * (1 + 0.05 * noise),
                [*updates, *self.weights] if health.check_due(step) else [],
            )
            if step % cfg.eval_freq == 0:
                said += self.evaluate()
        return said

    def evaluate(self, gap=0.02, accuracy=None):
        tokens = self.run.state.step * self.run.cfg.total_batch_size
        if accuracy is None:
            accuracy = 0.25 + 0.01 * math.log2(1 + tokens / 1e9) + self.random.gauss(0, 0.002)
        return self.health.evaluation(self.loss(self.run.state.step) + gap, accuracy)


def names(said):
    return [("over: " if "over, since" in text else "") + check.name for check, text in said]


def test_a_healthy_reference_run_says_nothing():
    series = Series()
    assert series.run.cfg.max_steps == 95_365 and series.run.cfg.warmup_steps == 715
    assert series.steps(95_365) == []
    assert len(series.run.state.health_memory["marks"]) <= health.MARKS
    assert len(repr(series.run.state.health_memory)) < 5000, "it is in every checkpoint"


def test_a_healthy_tiny_run_says_nothing():
    cfg = ti.Config(model="tiny")
    ti.resolve_model(cfg, "cpu")
    ti.resolve_length(cfg, 1_279_529)
    assert (cfg.max_steps, cfg.warmup_steps) == (600, 60)
    series = Series(cfg, items=1005)  # at chance for so few tokens, as every model
    for step in range(50, 601, 50):
        assert series.steps(step, seconds=0.4) == []
        assert series.evaluate(accuracy=0.23) == []


def test_validation_far_above_train():
    series = Series()
    series.steps(1000)
    assert names(series.evaluate(gap=0.6)) == [], "nothing was seen twice yet"
    series.run.state.position = series.run.train_data.num_windows
    assert names(series.evaluate(gap=0.25)) == [], "between the thresholds nothing begins"
    assert names(series.evaluate(gap=0.6)) == ["validation far above train"]
    assert names(series.evaluate(gap=0.7)) == [], "said once"
    assert names(series.evaluate(gap=0.32)) == [], "between the thresholds nothing ends"
    assert names(series.evaluate(gap=0.1)) == ["over: validation far above train"]
    assert names(series.evaluate(gap=0.1)) == []


@pytest.mark.parametrize("onset", [0, 20_000])
def test_loss_flat(onset):
    series = Series()
    flat = series.loss(onset)
    assert series.steps(onset) == []
    said = series.steps(int(1.6 * onset) + 900, loss=lambda step: flat)
    assert names(said) == ["loss flat"]
    falling = series.steps(2 * series.run.state.step + 1000, loss=lambda step: flat - 0.5)
    assert names(falling)[:1] == ["over: loss flat"]


def test_a_diverging_loss_is_noticed_within_some_hundred_steps():
    series = Series()
    assert series.steps(20_000) == []
    said = series.steps(20_200, loss=lambda step: 7.0)
    assert names(said) == ["loss flat"] and "= -3." in said[0][1]


def test_one_spike_is_no_trend():
    series = Series()
    for last in (2000, 2020, 3000):
        loss = (lambda step: 4000.0) if last == 2020 else None
        assert series.steps(last, loss) == []


def test_a_constant_rate_of_zero_at_the_end_is_not_frozen():
    series = Series()
    series.run.cfg.min_lr = 0.0
    series.run.state.step = 94_000
    assert ti.learning_rate(95_365, series.run.cfg) == 0
    assert series.steps(95_365, ratio=1e-9) == []


def test_gradient_clipped_nearly_always():
    series = Series()
    assert series.steps(1000) == [], "in warm-up all are clipped"
    assert names(series.steps(2000, norm=lambda s: 1.5)) == ["gradient clipped nearly always"]
    assert names(series.steps(3000, norm=lambda s: 1.5 if s % 10 else 0.5)) == [], "90%: not over"
    assert names(series.steps(4000)) == ["over: gradient clipped nearly always"]
    series.run.cfg.grad_clip = 0.0
    assert series.steps(5000, norm=lambda s: 1.5) == [], "no clipping asked for"


def test_throughput_dropping():
    series = Series()
    assert series.steps(500, seconds=0.5) == [], "the first ten minutes do not count"
    assert series.steps(3000, seconds=1.0) == []
    assert series.steps(3010, seconds=60.0) == [], "ten slow steps are no trend"
    assert series.steps(4000, seconds=1.15) == [], "13% slower is not said"
    assert names(series.steps(5000, seconds=1.5)) == ["throughput dropping"]
    assert series.health.active(timed=True) == 1 and series.health.active(timed=False) == 0
    assert names(series.steps(6000, seconds=1.2)) == [], "17% slower is not over"
    assert names(series.steps(7000)) == ["over: throughput dropping"]


def test_throughput_is_compared_on_one_machine_only():
    series = Series()
    series.steps(3000)
    series.health = health.Health(series.run, "here")
    assert names(series.steps(4000, seconds=2.0)) == ["throughput dropping"]
    series.health = health.Health(series.run, "a slower machine")
    assert names(series.steps(6000, seconds=2.0)) == ["over: throughput dropping"]


def test_hellaswag_flat():
    series = Series()
    series.steps(9000)
    for _ in range(8):
        assert series.evaluate(accuracy=0.24) == [], "below 5 billion tokens everyone is at chance"
    series.run.state.step, series.run.state.tokens = 9600, 9600 * 524_288
    assert [names(series.evaluate(accuracy=0.25)) for _ in range(5)] == [
        [], [], [], ["HellaSwag flat"], [],
    ]  # fmt: skip
    assert [names(series.evaluate(accuracy=0.29)) for _ in range(4)] == [
        [], ["over: HellaSwag flat"], [], [],
    ]  # fmt: skip


def test_layers_not_updating():
    series = Series()
    series.steps(1000)
    dead = series.health.names.index("transformer.h.1.mlp.c_fc.weight")
    series.weights[dead] = 1e6  # its ratio becomes 2e-9
    said = series.steps(2000)
    assert names(said) == ["layers not updating"]
    assert "transformer.h.1.mlp.c_fc.weight" in said[0][1]
    series.weights[dead] = 1.0
    assert names(series.steps(3000)) == ["over: layers not updating"]
    assert series.steps(3200, bad=True, ratio=0.0) == [], "skipped updates are no evidence"


def test_numbers_that_are_not_finite_say_nothing():
    series = Series()
    series.steps(3000)
    nan = float("nan")
    said = series.steps(3500, loss=lambda s: nan, norm=lambda s: nan, ratio=nan, bad=False)
    assert said == [] and series.health.evaluation(nan, None) == []


def test_a_resume_at_any_step_says_the_same():
    """Two sick stretches; in one run the state goes through a checkpoint every 130 steps."""

    def sick(series, every):
        said = []
        for last in range(every, 3120 + 1, every):
            middle = 1040 < last <= 2080  # both step sizes meet these
            norm = (lambda s: 2.0) if middle else (lambda s: 0.2)
            said += series.steps(last, norm=norm, ratio=1e-9 if middle else 1e-3)
            if every == 130:
                state = ti.TrainState(**torch_round_trip(dataclasses.asdict(series.run.state)))
                resumed = Series(series.run.cfg, state=state)
                resumed.random = series.random
                series = resumed
        return said, series.run.state

    cfg = Series().run.cfg
    one, state = sick(Series(cfg), 26)
    two, state_ = sick(Series(cfg), 130)
    assert [text for _, text in one] == [text for _, text in two]
    assert sorted(names(one)) == sorted(
        prefix + name
        for prefix in ("", "over: ")
        for name in ("gradient clipped nearly always", "layers not updating")
    )
    assert state == state_


def torch_round_trip(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- The table ------------------------------------------------------------------------------------


def test_the_guide_has_the_table_in_the_same_words():
    guide = (ROOT / "TENSORBOARD_GUIDE.md").read_text(encoding="utf-8")
    section = guide.split("\n## Warnings\n")[1].split("\n## ")[0]
    table = section.split("\n\n")[1].splitlines()
    assert table[0].startswith("| warning | what is compared | over how many steps | begins |")
    assert [row[2:-2] for row in table[2:]] == [
        " | ".join((c.name, c.compared, c.over, c.begins, c.ends, c.advice))
        for c in health.CHECKS.values()
    ]


def test_thresholds_leave_room_for_noise():
    for check in health.CHECKS.values():
        assert check.begin != check.end
        assert check.begins.split()[0] != check.ends.split()[0]


# --- Update-to-weight ratio -----------------------------------------------------------------------


def test_update_norms_are_those_of_the_update_without_decay():
    torch.manual_seed(0)
    model = ti.GPT(2, 2, 16, 32)
    cfg = ti.Config(max_lr=1e-3, weight_decay=0.1)
    optimizer = ti.make_optimizer(model, cfg)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    ids = torch.randint(0, 1000, (2, 33))
    dead = "transformer.h.1.mlp.c_proj.weight"
    for _ in range(2):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        dict(model.named_parameters())[dead].grad.zero_()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        norms = health.UpdateNorms(model, optimizer)
        optimizer.step()
        measured = norms.measure()
    assert measured.shape == (2 * len(before),)
    pairs = measured.view(2, -1).T.tolist()
    for (name, p), (update, weight) in zip(model.named_parameters(), pairs, strict=True):
        decayed = before[name] * (1 - 1e-3 * 0.1 * (p.dim() >= 2))
        assert update == pytest.approx((p - decayed).norm().item(), rel=1e-4, abs=1e-7), name
        assert weight == pytest.approx(p.norm().item(), rel=1e-5), name
    run_ = SimpleNamespace(cfg=cfg, state=ti.TrainState(), model=model, hellaswag_items=[])
    run_.train_data = SimpleNamespace(num_windows=1000)
    watcher = health.Health(run_, "here")
    ratio, slowest = min(watcher._matrix_ratios(measured.tolist()))
    assert slowest == dead and ratio < health.CHECKS["frozen"].begin, "though it decays"
    layers = watcher.layer_ratios(measured.tolist())
    assert list(layers) == ["wte", "wpe", "h00", "h01", "ln_f"]
    of_block = [pair for name, pair in zip(before, pairs, strict=True) if ".h.0." in name]
    expected = math.sqrt(sum(u * u for u, _ in of_block) / sum(w * w for _, w in of_block))
    assert layers["h00"] == pytest.approx(expected) and 1e-4 < layers["h00"] < 1e-1


# --- Real runs ------------------------------------------------------------------------------------

QUICK = "--total_batch_size 64 --sample_freq 0 --histogram_freq 0 --use_tensorboard --run_name a"
QUICK = [*QUICK.split(), "--warmup_steps", "40"]


def texts(folder, tag) -> list[tuple[int, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    if f"{tag}/text_summary" not in events.Tags()["tensors"]:
        return []
    points = events.Tensors(f"{tag}/text_summary")
    return [(p.step, p.tensor_proto.string_val[0].decode()) for p in points]


def warnings_in(out: str) -> list[str]:
    """What a run said, but for speed, which is the machine's."""
    what = r"WARNING step \d+|step +\d+: over, since step \d+"
    found = re.findall(rf"^(?:\S+ \S+  )?((?:{what}): .*)$", out, re.M)
    return [text for text in found if "throughput" not in text]


def test_a_healthy_run_says_nothing_and_shows_what_there_is_to_see(tmp_path, data):
    flags = [*QUICK, "--max_steps", "420", "--eval_freq", "70", "--max_lr", "3e-3"]
    flags += ["--grad_clip", "10"]  # two sequences of 32 tokens: noisy gradients, norms of 2 to 4
    out, _ = run(*flags, cwd=tmp_path, data=data)
    assert warnings_in(out) == []
    folder = tmp_path / "runs" / "a"
    scalars = logged(folder)
    steps = sorted({0, *range(100, 401, 100), *range(70, 421, 70)})
    assert scalars["Health/warnings"] == [(step, 0) for step in steps]
    for layer in ("wte", "wpe", "h00", "h01", "ln_f"):
        points = scalars[f"Update_Ratio/{layer}"]
        assert [step for step, _ in points] == [100, 200, 300, 400]
        assert all(1e-5 < ratio < 0.2 for _, ratio in points), layer
    assert texts(folder, "Health/warnings") == []

    # what it cost goes on after a resume
    flags = ["--use_tensorboard", "--resume", "latest", "--run_name", "a", "--max_steps", "440"]
    run(*flags, cwd=tmp_path, small=False)
    points = read_scalars(folder)["Performance/device_hours"]
    assert [step for step, *_ in points] == [*steps, 440]
    values = [value for _, value, _ in points]
    assert values == sorted(values) and values[0] > 0
    state = torch.load(checkpoint(tmp_path, 440), weights_only=True)["state"]
    assert state["device_seconds"] == pytest.approx(state["total_seconds"]), "one process"
    assert state["device_seconds"] >= 3600 * values[-1] * 0.999 > state["train_seconds"] * 0.999


@pytest.fixture(scope="module")
def short(tmp_path_factory, data):
    """A run of three steps, evaluated before and after them."""
    cwd = tmp_path_factory.mktemp("short")
    run(*QUICK, "--max_steps", "3", "--warmup_steps", "1", cwd=cwd, data=data)
    return cwd


def test_loss_by_position_is_the_mean_loss_there(short, data):
    scalars = logged(short / "runs" / "a")
    parts = {tag: points for tag, points in scalars.items() if tag.startswith("Loss_by_Position/")}
    assert sorted(parts) == [f"Loss_by_Position/{i:04d}-{i + 3:04d}" for i in range(0, 32, 4)]
    model = ti.GPT(2, 2, 16, 32)
    model.load_state_dict(torch.load(checkpoint(short, 3), weights_only=True)["model"])
    windows = stream.open_source(str(data), "val", 32, 1337).windows_in_order(np.arange(16))
    ids = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        logits = model.logits(model.features(ids[:, :-1]))
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    for i, tag in enumerate(sorted(parts)):
        step, value = parts[tag][-1]
        assert step == 3 and value == pytest.approx(float(losses[:, 4 * i : 4 * i + 4].mean()))
    assert scalars["Loss/validation"][-1][1] == pytest.approx(float(losses.mean()))


def test_a_sick_run_and_its_resume_say_the_same_once(tmp_path, data):
    sick = [*QUICK, "--max_steps", "420", "--eval_freq", "0", "--checkpoint_freq", "90"]
    sick += ["--max_lr", "1e-9", "--grad_clip", "0.01"]
    outs = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    out, _ = run(*sick, cwd=tmp_path / "whole", data=data)
    process = start(*sick, cwd=tmp_path / "killed", data=data)
    outs += wait_for_step(process, 350)
    process.send_signal(signal.SIGTERM)
    outs.append(process.communicate(timeout=60)[0])
    assert process.returncode == 143
    flags = ["--use_tensorboard", "--resume", "latest", "--run_name", "a"]
    outs.append(run(*flags, cwd=tmp_path / "killed", small=False)[0])

    said = warnings_in(out)
    assert [re.match(r"WARNING step (\d+): ([^:]*)", text).groups() for text in said] == [
        ("200", "layers not updating"),
        ("300", "loss flat"),
        ("400", "gradient clipped nearly always"),
    ]
    assert warnings_in("".join(outs)) == said, "neither repeated nor lost"
    folders = [tmp_path / name / "runs" / "a" for name in ("whole", "killed")]
    assert logged(folders[0]) == logged(folders[1])
    assert_same_training(*(checkpoint(tmp_path / n, 420) for n in ("whole", "killed")))
    in_tensorboard = texts(folders[1], "Health/warnings")
    assert [step for step, _ in in_tensorboard] == [200, 300, 400]
    assert in_tensorboard == texts(folders[0], "Health/warnings")
    assert [event_files.from_code(text) for _, text in in_tensorboard] == said
    assert dict(logged(folders[1])["Health/warnings"]) == {100: 0, 200: 1, 300: 2, 400: 3}

    # healed: each is over, once
    flags += ["--max_steps", "820", "--max_lr", "1e-2", "--grad_clip", "100"]
    out, _ = run(*flags, cwd=tmp_path / "killed", small=False)
    said = warnings_in(out)
    assert sorted(re.search(r"over, since step \d+: ([^:]*)", text)[1] for text in said) == [
        "gradient clipped nearly always",
        "layers not updating",
        "loss flat",
    ]
    assert logged(folders[1])["Health/warnings"][-1] == (800, 0)


@pytest.mark.parametrize("mode", ["--no-compile", "--shard"])
def test_a_process_that_holds_up_the_others_is_named(tmp_path, data, mode):
    """One of two is stopped for most of the time."""
    flags = "--max_steps 5000 --eval_freq 0 --sample_freq 0 --checkpoint_freq 0 --run_name a"
    flags = [*flags.split(), "--total_batch_size", 64, mode]
    process = start(*flags, cwd=tmp_path, data=data, nproc=2)
    wait_for_step(process, 1)
    worker, over = workers_of(process)[1], threading.Event()

    def slow():
        while not over.wait(0.02):
            os.kill(worker, signal.SIGSTOP)
            time.sleep(0.06)
            os.kill(worker, signal.SIGCONT)

    slowing = threading.Thread(target=slow)
    slowing.start()
    lines = iter(process.stdout.readline, "")
    warning = next((line for line in lines if "one process lags" in line), "")
    over.set()
    slowing.join()
    process.terminate()
    process.communicate(timeout=100)
    assert re.search(r"WARNING step \d+: .* = \d+\.\d+ \(rank 1 on \S+: ", warning)


# --- Cost -----------------------------------------------------------------------------------------


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def energy_thread_ended():
    return not any(thread.name == "energy" for thread in threading.enumerate())


def zone(folder, name, energy, maximum=1_000_000_000):
    folder.mkdir(exist_ok=True)
    for file, value in (
        ("name", name),
        ("energy_uj", energy),
        ("max_energy_range_uj", maximum),
    ):
        (folder / file).write_text(f"{value}\n")


def test_energy_of_cpu_packages(tmp_path):
    """The files as Linux's powercap documentation describes them."""
    zone(tmp_path / "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path / "intel-rapl:1", "package-1", 999_000_000)
    zone(tmp_path / "intel-rapl:0:0", "core", 7)
    zone(tmp_path / "intel-rapl:2", "psys", 7)
    meter = energy.EnergyMeter(torch.device("cpu"), every=0.01, powercap=tmp_path)
    try:
        wait_until(lambda: meter.works)
        assert meter.take() == 0, "counters run since the machine was started"
        zone(tmp_path / "intel-rapl:0:0", "core", 100_000_000)
        zone(tmp_path / "intel-rapl:2", "psys", 100_000_000)
        for file, value in (("intel-rapl:0", 8_000_000), ("intel-rapl:1", 1_000_000)):
            os.replace(
                write(tmp_path / "new", value), tmp_path / file / "energy_uj"
            )  # whole at once: the thread reads meanwhile
        wait_until(lambda: meter._used > 4.9)
        assert meter.take() == pytest.approx(3 + 2), "one counter went on, one started over"
        assert meter.take() == 0
    finally:
        meter.close()


def write(path, value):
    path.write_text(f"{value}\n")
    return path


def test_no_energy_where_nobody_reports_it(tmp_path, monkeypatch):
    (tmp_path / "intel-rapl:0").mkdir()
    zone(tmp_path / "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # as for a user who is not root
    meter = energy.EnergyMeter(torch.device("cpu"), every=0.01, powercap=tmp_path)
    wait_until(energy_thread_ended)
    assert not meter.works and meter.take() == 0
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    assert energy._gpu_joules({"a1"})(1.0) is None


def test_energy_of_gpus_from_what_nvidia_smi_prints(tmp_path, monkeypatch):
    """A program that prints what the real one does: there may be no GPU here."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def prints(text):
        program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\ncat <<'END'\n{text}\nEND\n")
        program.chmod(0o755)

    prints("GPU-aa-11, 250.50\nGPU-bb-22, 100.00\nGPU-cc-33, 70.00")
    assert energy._gpu_joules({"aa-11", "bb-22"})(10.0) == pytest.approx(3505)
    assert "--query-gpu=uuid,power.draw" in (tmp_path / "asked").read_text()
    prints("GPU-aa-11, [N/A]")
    assert energy._gpu_joules({"aa-11"})(10.0) is None
    prints("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    assert energy._gpu_joules({"aa-11"})(10.0) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_energy_of_this_gpu():
    meter = energy.EnergyMeter(torch.device("cuda", 0), every=0.2)
    wait_until(lambda: meter.works)
    wait_until(lambda: meter._used > 0)
    meter.close()
    assert 1 < meter.take() < 10_000


def test_energy_is_in_the_last_words_and_in_the_charts_only_if_there_is_any(short):
    tags = read_scalars(short / "runs" / "a").keys()
    readable = energy._package_joules("/sys/class/powercap")(0.0) is not None
    assert ("Performance/kwh" in tags) == readable
    state = SimpleNamespace(
        step=5, train_seconds=60.0, watt_seconds=7.2e6, validation_loss=math.inf
    )
    cfg = ti.Config(max_steps=10, run_name="a")
    run_ = SimpleNamespace(cfg=cfg, state=state, dist=SimpleNamespace(world_size=1))
    run_.checkpoint_folder = short / "checkpoints" / "a"
    words = summary.farewell(run_, False, "the same command again")
    assert "after 1.0 min of training, 2 kWh\n" in words and words.endswith("again")
