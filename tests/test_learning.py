"""benchmarks/learning.py: fits that find what is known, runs that go on, data sets kept apart."""

import itertools
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_improved as ti
from conftest import ROOT, environment, write_data
from tokens import shards, tokenizer
from tokens.stream import WindowSource
from training import muon

sys.path.insert(0, str(ROOT / "benchmarks"))
import learning
import optimizers

TOKENS = 1024 * np.array([150, 300, 600, 1200, 2400, 4800])


def law(E, A, alpha, D):
    return E + A * np.asarray(D, float) ** -alpha


def lines(data: str, arm: str, losses, seeds=(1,), noise=None) -> list[dict]:
    """Finished runs as they stand in the file."""
    found = []
    for seed in seeds:
        for tokens, loss in zip(TOKENS, losses, strict=True):
            setting = learning.Setting(data, "4x128", arm, arm, 1e-3, seed, int(tokens) // 1024)
            more = noise.normal(0, 0.01) if noise else 0.0
            found.append(vars(setting) | {"loss": loss + more, "cpu_seconds": 10.0})
    return [learning.load(run) for run in found]


# --- Fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("E", "A", "alpha"), [(2.0, 40.0, 0.25), (0.5, 12.0, 0.1), (3.0, 9e3, 0.7)]
)
def test_a_fit_finds_the_numbers_that_made_the_curve(E, A, alpha):
    found, ((found_A, found_alpha),) = learning.fit(
        [np.column_stack([TOKENS, law(E, A, alpha, TOKENS)])]
    )
    assert found == pytest.approx(E, abs=0.02)
    assert found_alpha == pytest.approx(alpha, rel=0.03)
    assert law(found, found_A, found_alpha, 1e7) == pytest.approx(law(E, A, alpha, 1e7), abs=0.01)


def test_two_curves_share_their_limit_and_the_share_is_the_one_that_was_put_in():
    reference = np.column_stack([TOKENS, law(2.0, 40.0, 0.25, TOKENS)])
    fast = np.column_stack([TOKENS, law(2.0, 40.0, 0.25, TOKENS / 0.4)])
    E, (a, b) = learning.fit([reference, fast])
    assert pytest.approx(2.0, abs=0.02) == E
    for D in (1e6, 1e10):
        assert learning.share_at(D, (E, a), (E, b)) == pytest.approx(0.4, rel=0.02)
    assert learning.share_at(1e12, (1.0, a), (3.0, b)) == math.inf, "it never gets there"


def test_intervals_hold_the_truth_as_often_as_they_say():
    held, rng = 0, np.random.default_rng(1)
    D = np.repeat(TOKENS, 2)
    for _ in range(20):
        noisy = [np.column_stack([D, law(2.0, 40.0, 0.25, D) + rng.normal(0, 0.02, len(D))])]
        fits = learning.bootstrap(noisy, draws=60)
        low, high = learning.interval([alpha for _, ((_, alpha),) in fits])
        held += low <= 0.25 <= high
    assert 14 <= held <= 20, "90% of 20 are 18"


def test_tuning_walks_until_both_neighbours_are_worse():
    tried = []

    def loss(rate):
        tried.append(rate)
        return abs(math.log2(rate) - 5)

    assert learning.tune(loss, 1.0) == 32.0
    assert sorted(tried) == [0.5, 1, 2, 4, 8, 16, 32, 64] and len(tried) == len(set(tried))


# --- The table ------------------------------------------------------------------------------------


def test_shares_and_spread_of_runs_whose_shares_are_known(capsys):
    noise = np.random.default_rng(0)
    runs = lines("d", "reference", law(2.0, 40.0, 0.25, TOKENS), (1, 2), noise)
    runs += lines("d", "fast", law(2.0, 40.0, 0.25, TOKENS / 0.4), (1, 2), noise)
    (group,) = learning.groups(runs)
    assert group.spread() == pytest.approx(0.01, rel=0.5)
    inside = [group.share(point) for point in group.arms["fast"]]
    assert [row[-1] for row in inside] == [True] * 4 + [False] * 2, "the last two are extrapolated"
    for share, low, high, _ in inside[:4]:
        assert low < share < high and share == pytest.approx(0.4, rel=0.1)
    learning.print_table(group)
    learning.print_fits(group, "fast")
    printed = capsys.readouterr().out
    assert "| fast | 0.15 | 150 | 0.001 |" in printed
    assert "124M at 10B tokens, 80 tokens a parameter (0.68 here)" in printed


def test_two_data_sets_do_not_mix(tmp_path):
    a, b = write_data(tmp_path / "a"), write_data(tmp_path / "b", seed=1)
    assert learning.identity(a) != learning.identity(b)
    assert learning.identity(a) == learning.identity(a.rename(tmp_path / "moved")), (
        "the tokens count"
    )
    runs = learning.Runs(tmp_path / "out")
    runs.finished = lines("a", "reference", law(2, 40, 0.25, TOKENS))
    setting = runs.finished[0]["setting"]
    assert runs.find(setting)
    for changed in ({"data": "b"}, {"seed": 2}, {"steps": 151}, {"flags": "x"}, {"seq_len": 64}):
        assert not runs.find(learning.Setting(**(vars(setting) | changed))), changed
    runs.finished += lines("b", "reference", law(1, 40, 0.25, TOKENS))
    assert [(g.data, len(g.arms)) for g in learning.groups(runs.finished)] == [("a", 1), ("b", 1)]


# --- Real runs ------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_and_a_finished_one_is_not_run_again(data, tmp_path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    flags = "--dtype float32 --device cpu --recipe fast --experiment ema,lookahead,soap10,momentum"
    setting = learning.Setting(
        learning.identity(data), "1x16", "tried", flags, 1e-2, 1, 64, 128, 32, 512
    )
    alone = learning.Runs(tmp_path / "alone", data).loss(setting)

    runs = learning.Runs(tmp_path / "stopped", data)
    ended = []

    def work():
        with pytest.raises(KeyboardInterrupt):
            runs.loss(setting)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    checkpoints = tmp_path / "stopped" / "work" / setting.key() / "checkpoints" / "run"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_*")) and thread.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    runs.stop()
    thread.join()
    assert ended and not runs.finished, "it was fast enough to stop it"

    again = learning.Runs(tmp_path / "stopped", data)
    assert again.loss(setting) == alone
    log = list((tmp_path / "stopped").rglob("learning.jsonl"))
    assert len(log[0].read_text().splitlines()) == 1
    there = learning.Runs(tmp_path / "stopped", data_dir=None)  # with which nothing can be trained
    assert there.loss(setting) == alone


# --- The experiments ------------------------------------------------------------------------------


@pytest.fixture
def switch_on(monkeypatch):
    """optimizers.switch_on, undone at the end."""
    for owner, name in (
        (muon, "orthogonalized"),
        (muon, "MuonAdamW"),
        (ti, "learning_rate"),
        (ti.GPT, "features"),
        (WindowSource, "windows"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(optimizers, "NOW", {"step": 0, "steps": 1, "max_lr": 1.0})
    yield optimizers.switch_on
    optimizers.ON.clear()


def after(updates: int, halfway: bool = False) -> list[torch.Tensor]:
    """Weights of a small model after some updates; halfway: saved and loaded in between."""
    torch.manual_seed(0)
    cfg = ti.Config(optimizer="muon", schedule="linear", max_lr=1e-3, min_lr=0.0)
    cfg.max_steps, cfg.warmup_steps = updates, 1
    model = ti.GPT(1, 2, 16, 8)
    optimizer = ti.make_optimizer(model, cfg)
    gradients = torch.Generator().manual_seed(1)
    for step in range(1, updates + 1):
        if halfway and step == updates // 2:
            saved = optimizer.state_dict()
            optimizer = ti.make_optimizer(model, cfg)
            optimizer.load_state_dict(saved)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=gradients)
        for group in optimizer.param_groups:
            group["lr"] = ti.learning_rate(step, cfg)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_each_experiment_does_something_and_resumes_exactly(switch_on, monkeypatch):
    monkeypatch.setattr(ti, "VOCAB_SIZE", 64)
    plain = after(12)
    switch_on("")
    assert all(map(torch.equal, after(12), plain)), "none of them: the program as it is"
    for name in optimizers.EXPERIMENTS.keys() - optimizers.DOCUMENTS:
        switch_on(name)
        tried = after(12)
        assert not all(map(torch.equal, tried, plain)), name
        assert all(map(torch.equal, after(12, halfway=True), tried)), name
    with pytest.raises(ValueError, match="cautious"):
        switch_on("nothing")


def test_polar_express_is_nearer_to_orthogonal():
    x = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    worst = [
        (torch.linalg.svdvals(way(x, torch.float32)) - 1).abs().max()
        for way in (muon.orthogonalized, optimizers.polar_express)
    ]
    assert worst[1] < 0.2 < worst[0]


def documents(folder: Path, vocabulary: int) -> Path:
    """Cut shards with a thousand tokens into documents of about ten."""
    tokens = np.random.default_rng(0).integers(0, vocabulary - 1, 1000).astype(np.uint16)
    for split in ("train", "val"):
        shards.write_shard(folder / f"x_{split}_000000.bin", tokens)
    optimizers.cut(folder, folder / "cut", 10, vocabulary - 1)
    cut = shards.open_split(folder / "cut", "train")
    assert sorted(t for t in cut.read(0, cut.num_tokens) if t < vocabulary - 1) == sorted(tokens)
    return folder / "cut"


def test_a_document_apart_is_as_if_it_were_alone(switch_on, monkeypatch, tmp_path):
    monkeypatch.setattr(ti, "VOCAB_SIZE", 64)
    stream = shards.open_split(documents(tmp_path, 64), "train")
    ids = torch.from_numpy(stream.windows(np.arange(4), 32)[:, :-1].astype(np.int64))
    torch.manual_seed(0)
    model = ti.GPT(2, 2, 16, 32)
    packed = model.features(ids)

    def apart() -> torch.Tensor:
        rows = []
        for row in ids:
            begins = [0, *(i for i in range(1, 32) if row[i] == 63), 32]
            pieces = [row[None, a:b] for a, b in itertools.pairwise(begins)]
            rows.append(torch.cat([model.features(piece) for piece in pieces], 1))
        return torch.cat(rows)

    expected = apart()
    assert not torch.allclose(packed, expected, atol=1e-3)
    for name, alike in (
        ("apart", False),
        ("starts", False),
        ("masked", False),
        ("restarted", True),
    ):
        switch_on(name)
        assert torch.allclose(model.features(ids), expected, atol=1e-5) == alike, name
        with torch.no_grad():
            assert torch.allclose(model.features(ids), expected, atol=1e-5), name
    switch_on("masked")
    changed = ids.clone()
    last = int((ids[0] == 63).nonzero()[-1])
    changed[0, :last] = 5
    before, after = model.features(ids)[0, last:], model.features(changed)[0, last:]
    assert torch.allclose(before, after, atol=1e-6)


def test_windows_begin_where_documents_do(switch_on, tmp_path):
    source = WindowSource([shards.open_split(documents(tmp_path, ti.VOCAB_SIZE), "train")], 16, 0)
    plain = source.windows(np.arange(40))
    assert not (plain[:, 0] == tokenizer.EOT).all()
    switch_on("starts")
    assert (source.windows(np.arange(40))[:, 0] == tokenizer.EOT).all()


def test_a_smaller_vocabulary_spells_the_same_text(tmp_path):
    text = tokenizer.get_tokenizer()
    ids = np.array([tokenizer.EOT, *text.encode("The antidisestablishmentarian’s tale, 1859")] * 9)
    for split in ("train", "val"):
        shards.write_shard(tmp_path / f"x_{split}_000000.bin", ids.astype(np.uint16))
    optimizers.convert(tmp_path, tmp_path / "few", 1024)
    stream = shards.open_split(tmp_path / "few", "train")
    few = stream.read(0, stream.num_tokens)
    assert few.max() == 1023 and len(few) > len(ids)
    few = [tokenizer.EOT if i == 1023 else int(i) for i in few]
    assert text.decode(few) == text.decode(ids.tolist())
