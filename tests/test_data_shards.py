"""Token shards: files of every format, the stream, the shuffle, mixtures, the loader, the summary.

The order of training is recomputed here from its description, with plain Python integers and whole
shards in memory, and compared window by window.
"""

import ast
import gc
import hashlib
import json
import math
import os
import shlex
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import data_shards
from tokens import shards as token_shards
from tokens import stream as token_stream
from tokens.loader import StepLoader
from tokens.sample_text import sample_corpus
from tokens.shards import open_split, parse_data_dir, verify, write_manifest, write_shard
from tokens.stream import epoch_order, open_source
from tokens.tokenizer import EOT, fingerprint, get_tokenizer

SRC = Path(data_shards.__file__).parent
T = 16


def random_tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, EOT + 1, n).astype(np.uint16)


def make_folder(folder: Path, train=(700, 301, 1200), val=(150,), manifest=True, seed=0) -> Path:
    """A folder of small shards of the given sizes; tokens are random."""
    folder.mkdir(parents=True)
    shards = []
    for split, sizes in (("train", train), ("val", val)):
        for k, size in enumerate(sizes):
            tokens = random_tokens(size, 1000 * seed + 500 * (split == "val") + k)
            entry = write_shard(folder / f"x_{split}_{k:06d}.bin", tokens)
            shards.append(entry | {"split": split, "documents": int((tokens == EOT).sum())})
    if manifest:
        write_manifest(
            folder, {"version": 1, "tokenizer_fingerprint": fingerprint(), "shards": shards}
        )
    return folder


def whole(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split, read in the plainest way."""
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    return np.concatenate([np.frombuffer(p.read_bytes()[1024:], "<u2") for p in paths])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture
def own_folder(tmp_path) -> Path:
    """One that a test may damage."""
    return make_folder(tmp_path / "data")


# --- Files ----------------------------------------------------------------------------------------


def test_shard_file_is_llm_c_s_format(tmp_path):
    tokens = np.array([EOT, 15496, 11, 0], np.uint16)
    entry = write_shard(tmp_path / "n_train_000000.bin", tokens)
    data = (tmp_path / "n_train_000000.bin").read_bytes()
    assert struct.unpack("<256i", data[:1024]) == (20240520, 1, 4, *[0] * 253)
    assert data[1024:] == struct.pack("<4H", EOT, 15496, 11, 0)
    assert entry == {
        "name": "n_train_000000.bin",
        "tokens": 4,
        "bytes": 1032,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert [p.name for p in tmp_path.iterdir()] == ["n_train_000000.bin"]


@pytest.mark.parametrize("tokens", [[], [[1, 2]], [1, 50257], [-1, 2]])
def test_write_shard_refuses_what_is_no_shard(tmp_path, tokens):
    with pytest.raises(ValueError, match=r"shard|token ids"):
        write_shard(tmp_path / "x_train_000000.bin", np.array(tokens, np.int64))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_shard_and_no_temporary(tmp_path):
    path = tmp_path / "x_train_000000.bin"
    write_shard(path, random_tokens(100))
    before = path.read_bytes()
    code = (  # a limit on file size stands for a full disk
        "import resource, signal, sys, numpy as np; from tokens import shards\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: shards.write_shard(sys.argv[1], np.zeros(100_000, np.uint16))\n"
        "except OSError: print('refused')\n"
    )
    run = subprocess.run([sys.executable, "-c", code, path], cwd=SRC, capture_output=True)
    assert run.stdout == b"refused\n", run.stderr
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_no_file_is_left_open(folder):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        split = open_split(folder, "train")
        split.read(0, 10)
        del split
        gc.collect()
    assert not seen


def test_reading_crosses_shard_borders(folder):
    stream, tokens = open_split(folder, "train"), whole(folder, "train")
    assert stream.num_tokens == len(tokens) == 2201
    assert [shard.tokens for shard in stream.shards] == [700, 301, 1200]
    assert [p.name for p in stream.paths] == [f"x_train_00000{k}.bin" for k in range(3)]
    for start, n in ((0, 2201), (699, 2), (690, 400), (0, 0), (2200, 1), (700, 301), (1001, 5)):
        assert np.array_equal(stream.read(start, n), tokens[start : start + n])
    assert stream.read(0, 5).dtype == np.uint16


def save_npy(folder, split, k, tokens):
    np.save(folder / f"edufineweb_{split}_{k:06d}.npy", tokens)


def save_llm_c(folder, split, k, tokens):
    header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    (folder / f"fineweb_{split}_{k:06d}.bin").write_bytes(header + tokens.tobytes())


def save_nanogpt(folder, split, k, tokens):
    tokens.tofile(folder / f"{split}.bin")


@pytest.mark.parametrize("save, shards", [(save_npy, 3), (save_llm_c, 3), (save_nanogpt, 1)])
def test_foreign_formats_are_read_as_they_are(tmp_path, save, shards):
    parts = [random_tokens(500 + k, k) for k in range(shards)]
    for k, tokens in enumerate(parts):
        save(tmp_path, "train", k, tokens)
    save(tmp_path, "val", 0, random_tokens(77, 9))
    (tmp_path / "README.md").write_text("other files do not matter")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    stream, tokens = open_split(tmp_path, "train"), np.concatenate(parts)
    assert np.array_equal(stream.read(0, stream.num_tokens), tokens)
    assert np.array_equal(open_split(tmp_path, "val").read(0, 77), random_tokens(77, 9))
    source = open_source(str(tmp_path), "train", T, 0)
    assert np.array_equal(source.windows_in_order(np.array([2]))[0], tokens[2 * T : 3 * T + 1])
    assert data_shards.main([str(tmp_path), "--verify"]) == 0
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "name, split",
    [
        ("x_train_000000.bin", "train"),
        ("my_validation_data_train_1.npy", "train"),
        ("train_eval_val_3.bin", "val"),
        ("Validation.bin", "val"),
        ("valid-00001-of-2.bin", "val"),
        ("training.bin", "train"),
        ("constrained_val.bin", "val"),
    ],
)
def test_split_is_the_last_word_that_names_one(tmp_path, name, split):
    tokens = random_tokens(50)
    if name.endswith("npy"):
        np.save(tmp_path / name, tokens)
    else:
        tokens.tofile(tmp_path / name)
    assert open_split(tmp_path, split).paths == [tmp_path / name]


# --- Errors ---------------------------------------------------------------------------------------


def refused(folder, *words, split="train", T=T):
    """Opening must fail with one sentence that holds all words."""
    with pytest.raises(ValueError) as error:
        open_source(str(folder), split, T, 0)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_missing_empty_and_half_folders(tmp_path, own_folder):
    refused(tmp_path / "nowhere", "nowhere", "does not exist", "prepare_data.py")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty", "holds no shards", "prepare_data.py")
    make_folder(tmp_path / "half", val=(), manifest=False)
    refused(tmp_path / "half", "half", "no validation split", split="val")
    assert open_source(str(tmp_path / "half"), "train", T, 0).num_tokens == 2201
    (tmp_path / "half" / ".prepare").mkdir()
    refused(tmp_path / "half", "not finished", "same prepare_data.py command")
    (own_folder / "manifest.json").unlink()
    (own_folder / "meta.pkl").write_bytes(b"")
    refused(own_folder, "characters", "meta.pkl")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda p: p.write_bytes(b""), ["empty"]),
        (lambda p: p.write_bytes(p.read_bytes()[:-2]), ["1,624 bytes", "cut short"]),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), ["1,625 bytes", "cut short"]),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0\0"), ["1,628 bytes"]),
        (lambda p: p.write_bytes(p.read_bytes()[:700]), ["700 bytes"]),
        (lambda p: p.write_bytes(struct.pack("<256i", 20240520, 1, *[0] * 254)), ["no tokens"]),
        (lambda p: p.write_bytes(struct.pack("<256i", 20240520, 2, *[0] * 254)), ["version 2"]),
        (lambda p: p.write_bytes(struct.pack("<256i", 20240801, 7, *[0] * 254)), ["Llama 3"]),
        (lambda p: p.write_bytes(b"\1\0\2"), ["odd number"]),
        (lambda p: p.write_bytes(b"\x93NUMPY\1\0junk"), ["damaged .npy"]),
        (lambda p: np.save(open(p, "wb"), np.zeros(9, np.int32)), ["int32", "uint16"]),  # noqa: SIM115
        (lambda p: np.save(open(p, "wb"), np.zeros((3, 3), np.uint16)), ["(3, 3)"]),  # noqa: SIM115
    ],
)
def test_damaged_shards_are_named(own_folder, damage, words):
    path = own_folder / "x_train_000001.bin"
    (own_folder / "manifest.json").unlink()
    damage(path)
    refused(own_folder, str(path), *words)
    assert open_source(str(own_folder), "val", T, 0).num_windows == 9


def test_size_is_compared_with_the_manifest(own_folder):
    path = own_folder / "x_train_000001.bin"
    write_shard(path, random_tokens(300))
    refused(own_folder, str(path), "1,624 bytes", "manifest says 1,626")
    path.unlink()
    refused(own_folder, str(path), "cannot be read")


def test_a_shard_that_the_manifest_does_not_know(own_folder):
    write_shard(own_folder / "x_train_000003.bin", random_tokens(50))
    refused(own_folder, "x_train_000003.bin is not in its manifest.json")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: "{", ["not a manifest"]),
        (lambda m: "[]", ["not a manifest"]),
        (lambda m: "[" * 100_000, ["not a manifest"]),
        (lambda m: m["shards"][0].update(name="../../etc/passwd"), ["bad shard name"]),
        (lambda m: m["shards"][0].update(name=""), ["bad shard name"]),
        (lambda m: m["shards"][0].update(name=".."), ["bad shard name"]),
        (lambda m: m["shards"][0].update(name=7), ["not a manifest"]),
        (lambda m: m["shards"][0].update(split="test"), ["bad split"]),
        (lambda m: m["shards"][0].update(tokens="700"), ["bad size"]),
        (lambda m: m["shards"][0].update(sha256="0"), ["bad sha256"]),
        (lambda m: m["shards"][0].pop("bytes"), ["not a manifest", "bytes"]),
        (lambda m: m["shards"].append(m["shards"][0]), ["bad shard name"]),
        (lambda m: m.update(tokenizer_fingerprint="llama"), ["llama", fingerprint()]),
    ],
)
def test_a_manifest_is_not_trusted(own_folder, change, words):
    path = own_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    text = change(manifest)
    path.write_text(text if isinstance(text, str) else json.dumps(manifest))
    refused(own_folder, str(path), *words)


def test_too_few_tokens_for_one_window(tmp_path):
    for tokens in (1, T, T + 1):
        folder = make_folder(tmp_path / str(tokens), train=(tokens,))
        if tokens < T + 1:
            refused(folder, str(folder), f"has {tokens} tokens", "fewer than one window of 16 + 1")
        else:
            assert open_source(str(folder), "train", T, 0).num_windows == 1


def test_ids_beyond_the_vocabulary(tmp_path, monkeypatch):
    """Found at opening in a small set; in a large one, when a window with it is read."""
    folder = make_folder(tmp_path / "data", train=(20_000, 20_000), manifest=False)
    path = folder / "x_train_000001.bin"
    data = bytearray(path.read_bytes())
    data[1024 + 2 * 4321 : 1024 + 2 * 4321 + 2] = struct.pack("<H", 50257)
    path.write_bytes(data)
    refused(folder, str(path), "token 4,321 is 50257", "50256")
    monkeypatch.setattr(token_shards, "SMALL", 1000)
    source = open_source(str(folder), "train", T, 0)
    for read in (source.windows_in_order, source.windows):
        with pytest.raises(ValueError, match=r"x_train_000001.bin: token 4,321 is 50257"):
            read(np.arange(source.num_windows))
    with pytest.raises(ValueError, match="token 4,321 is beyond"):
        verify(str(folder))


def test_a_shard_that_shrinks_during_training(own_folder):
    source = open_source(str(own_folder), "train", T, 0)
    os.truncate(own_folder / "x_train_000002.bin", 1200)
    with pytest.raises(ValueError, match=r"x_train_000002.bin became shorter"):
        source.windows(np.arange(source.num_windows))


def test_verify_finds_one_flipped_bit(own_folder):
    verify(str(own_folder))
    path = own_folder / "x_train_000001.bin"
    data = bytearray(path.read_bytes())
    data[1024 + 300] ^= 1  # the id stays below 50,257
    path.write_bytes(data)
    open_source(str(own_folder), "train", T, 0)  # no size has changed
    with pytest.raises(ValueError, match=r"x_train_000001.bin: SHA-256 differs") as error:
        verify(str(own_folder))
    assert "000000" not in str(error.value) and "val" not in str(error.value)
    (own_folder / "x_val_000000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x_val_000000.bin .*x_train_000001.bin: SHA-256"):
        verify([str(own_folder)])


# --- Fingerprint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", [True, False])
def test_fingerprint_follows_the_data(tmp_path, manifest):
    def of(name, **options):
        data = make_folder(tmp_path / name, manifest=manifest, **options)
        return open_source(str(data), "train", T, 0).fingerprint

    first = of("a")
    assert first == of("b"), "the same data elsewhere"
    assert first == of("c", val=(99,)), "another validation split"
    others = [
        of("d", seed=1),  # other tokens
        of("e", train=(700, 301)),
        of("f", train=(700, 301, 1200, 40)),
        of("g", train=(301, 700, 1200)),
    ]
    assert len({first, *others}) == 5


def test_fingerprint_without_manifest_sees_an_edit(own_folder):
    (own_folder / "manifest.json").unlink()
    before = open_split(own_folder, "train").fingerprint
    path = own_folder / "x_train_000002.bin"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\1\1" if data[-2:] != b"\1\1" else b"\2\2"
    path.write_bytes(data)
    assert open_split(own_folder, "train").fingerprint != before


# --- Order ----------------------------------------------------------------------------------------

M64 = 2**64 - 1


def slow_mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & M64
    return x ^ (x >> 31)


def slow_order(seed: int, epoch: int, n: int, position: int) -> int:
    """The permutation as its description says, in Python integers."""
    golden = 0x9E3779B97F4A7C15
    a = math.ceil(math.sqrt(n))
    b = math.ceil(n / a)
    start = slow_mix(slow_mix((seed + golden) & M64) + epoch * golden & M64)
    while True:
        left, right, key = position // b, position % b, start
        for number in range(8):
            key = key + golden & M64
            if number % 2 == 0:
                left = (left + (slow_mix(slow_mix(key) + right & M64) >> 32) * a // 2**32) % a
            else:
                right = (right + (slow_mix(slow_mix(key) + left & M64) >> 32) * b // 2**32) % b
        position = left * b + right
        if position < n:
            return position


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 1000, 65537])
def test_every_window_once_per_epoch(n):
    orders = [epoch_order(1234, e, n, np.arange(n)) for e in range(5)]
    for order in orders:
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(n))
    if n >= 1000:
        for a in range(5):
            for b in range(a):
                assert (orders[a] == orders[b]).sum() < 12  # chance: 1 on average


def test_order_agrees_with_the_slow_computation():
    for seed in (0, 1, 1337, 2**63 + 5, -3):
        for n in (1, 2, 3, 7, 1000, 9_765_624):
            some = np.unique(np.linspace(0, n - 1, 9).astype(np.int64))
            for epoch in (0, 1, 4, 10**9):
                slow = [slow_order(seed, epoch, n, p) for p in some.tolist()]
                assert epoch_order(seed, epoch, n, some).tolist() == slow
    # for ever: a resumed run must see the same order with any version of this code
    assert epoch_order(1337, 2, 1000, np.arange(5)).tolist() == [379, 386, 480, 951, 327]


def test_order_depends_on_seed_and_epoch_alone():
    positions = np.arange(1000)
    reference = epoch_order(5, 3, 1000, positions)
    assert np.array_equal(epoch_order(5, np.full(1000, 3), 1000, positions), reference)
    assert np.array_equal(epoch_order(5, 3, 1000, positions[::-1])[::-1], reference)
    assert not np.array_equal(epoch_order(6, 3, 1000, positions), reference)
    # "seed + epoch" would make the second epoch of one seed the first of the next
    assert not np.array_equal(epoch_order(6, 2, 1000, positions), reference)


def test_order_is_a_decent_shuffle():
    def many(n, epochs):
        """Permutations of `epochs` epochs, one in a row."""
        positions = np.tile(np.arange(n), epochs)
        order = epoch_order(0, np.repeat(np.arange(epochs), n), n, positions)
        return order.reshape(epochs, n)

    for n in (2, 3, 4):  # every permutation of few windows, equally often
        trials = 20_000
        seen = Counter(map(tuple, many(n, trials).tolist()))
        expected = trials / math.factorial(n)
        assert len(seen) == math.factorial(n)
        chi2 = sum((count - expected) ** 2 / expected for count in seen.values())
        assert chi2 < {2: 11, 3: 21, 4: 50}[n]  # 99.9% of chance
    n, epochs = 12, 20_000  # where an element goes, over epochs
    where = np.zeros((n, n))
    np.add.at(where, (np.arange(n), many(n, epochs)), 1)
    assert ((where - epochs / n) ** 2 / (epochs / n)).sum() < 193  # chi-square, 121 freedoms, 1e-5
    n = 65_536
    order = epoch_order(7, 1, n, np.arange(n)).astype(float)
    for lag in (1, 2, 3, 255, 256, 257, 512):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / math.sqrt(n)
    assert abs((np.diff(order) > 0).mean() - 0.5) < 0.01
    for chunk in order.reshape(64, 1024):  # each stretch of an epoch sees the whole corpus
        counts = np.histogram(chunk, 16, (0, n))[0]
        assert ((counts - 64) ** 2 / 64).sum() < 50


def slow_windows(folder: Path, seed: int, positions) -> np.ndarray:
    """Windows of the endless sequence, from the description of it."""
    tokens = whole(folder, "train")
    n = (len(tokens) - 1) // T
    index = [slow_order(seed, p // n, n, p % n) for p in positions]
    return np.stack([tokens[i * T : i * T + T + 1] for i in index])


def test_windows_agree_with_the_slow_computation(folder):
    source = open_source(str(folder), "train", T, 3)
    assert source.num_windows == 137 and source.num_tokens == 2201
    positions = np.arange(3 * 137)
    assert np.array_equal(source.windows(positions), slow_windows(folder, 3, positions.tolist()))
    far = np.array([10**12 + 7, 5, 10**6])
    assert np.array_equal(source.windows(far), slow_windows(folder, 3, far.tolist()))
    assert source.windows(np.arange(0)).shape == (0, T + 1)


def test_no_token_is_lost_and_edges_are_shared(folder):
    source, tokens = open_source(str(folder), "train", T, 0), whole(folder, "train")
    rows = source.windows_in_order(np.arange(source.num_windows))
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])
    assert np.array_equal(np.concatenate([rows[0, :1], rows[:, 1:].ravel()]), tokens[: 137 * T + 1])
    assert len(tokens) - (137 * T + 1) < T  # only what is no whole window stays out


# --- Mixtures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    base = tmp_path_factory.mktemp("mixture")
    a = make_folder(base / "a", train=(3000,), val=(400,), seed=1)
    b = make_folder(base / "b", train=(1000, 400), val=(200,), seed=2)
    return a, b


def origin(rows: np.ndarray, folder: Path, split="train") -> list[int | None]:
    """Which window of a folder each row is; None for another folder's."""
    tokens = whole(folder, split)
    windows = [tokens[i * T : i * T + T + 1].tobytes() for i in range((len(tokens) - 1) // T)]
    number = {window: i for i, window in enumerate(windows)}
    return [number.get(row.tobytes()) for row in rows]


def test_mixture_holds_its_shares_exactly(mixture):
    a, b = mixture
    source = open_source(f"{a}:0.7 {b}:0.3", "train", T, 11)
    assert source.num_windows == 187 + 87
    rows = source.windows(np.arange(1000))
    from_a, from_b = origin(rows, a), origin(rows, b)
    for start in range(0, 1000, 10):  # seven and three of every ten
        assert sum(x is not None for x in from_a[start : start + 10]) == 7
        assert sum(x is not None for x in from_b[start : start + 10]) == 3
        for own, n in ((from_a, 187), (from_b, 87)):  # each goes through all of its own windows
            taken = Counter(x for x in own[: start + 10] if x is not None)
            assert max(taken.values()) - min((taken[i] for i in range(n)), default=0) <= 1
    patterns = {tuple(x is None for x in from_a[s : s + 10]) for s in range(0, 1000, 10)}
    assert len(patterns) > 40  # of 120 orders; not the same ten again and again
    for position in range(0, 1000, 7):  # and from the description, for good
        block, r = position // 10, position % 10
        slot = slow_order(11 ^ 0x9E3779B97F4A7C15, block, 10, r)
        own = block * 7 + slot if slot < 7 else block * 3 + slot - 7
        n = 187 if slot < 7 else 87
        assert (from_a if slot < 7 else from_b)[position] == slow_order(11, own // n, n, own % n)
    assert len({source.fingerprint, *(s.fingerprint for s in source.streams)}) == 3


def test_mixture_is_a_function_of_the_position(mixture):
    a, b = mixture
    source = open_source([f"{a}:2", f"{b}:1"], "train", T, 11)
    rows = source.windows(np.arange(500))
    again = open_source(f"{a}:2 {b}:1", "train", T, 11)
    order = np.random.default_rng(0).permutation(500)
    assert np.array_equal(again.windows(order), rows[order])
    assert sum(x is not None for x in origin(rows[:300], a)) == 200
    other = open_source(f"{a}:1 {b}:2", "train", T, 11)
    assert other.fingerprint != source.fingerprint == again.fingerprint


def test_mixed_validation_is_in_order_and_in_proportion(mixture):
    a, b = mixture
    source = open_source(f"{a}:0.5 {b}:0.5", "val", T, 0)
    rows = source.windows_in_order(np.arange(30))
    assert [x for x in origin(rows, a, "val") if x is not None] == list(range(15))
    small = [x for x in origin(rows, b, "val") if x is not None]
    assert small == [*range(12), 0, 1, 2]  # 12 windows, then round again
    assert np.array_equal(source.windows_in_order(np.array([7])), rows[7:8])


@pytest.mark.parametrize(
    "text, shares",
    [
        ("a:0.7 b:0.3", [7, 3]),
        ("a:7 b:3", [7, 3]),
        ("a:1 b:1 c:1", [1, 1, 1]),
        ("a:0.125 b:.875", [1, 7]),
        ("a:0.33333 b:0.66667", [3333, 6667]),
    ],
)
def test_shares_become_the_smallest_whole_block(text, shares):
    parsed = parse_data_dir(text)
    assert sum(share for _, share in parsed) == 1
    slots = token_stream._block_of([share for _, share in parsed])
    assert np.bincount(slots).tolist() == shares


def test_data_dir_words(tmp_path):
    assert parse_data_dir("data/x") == [("data/x", 1)]
    assert parse_data_dir(["data/x"]) == [("data/x", 1)]
    assert parse_data_dir("data/x:2") == [("data/x", 1)]
    assert parse_data_dir("my data/x") == [("my data/x", 1)]  # a folder that is not there yet
    (tmp_path / "a:0.7 b:0.3").mkdir()
    assert parse_data_dir(str(tmp_path / "a:0.7 b:0.3")) == [(str(tmp_path / "a:0.7 b:0.3"), 1)]
    assert parse_data_dir("c:/x:1 d:/x:3") == [("c:/x", Fraction(1, 4)), ("d:/x", Fraction(3, 4))]
    blank, colon = str(tmp_path / "my books"), str(tmp_path / "a:b")
    text = shlex.join([f"{blank}:0.25", f"{colon}:0.75", "bob's:1"])  # as flags.py does a list
    assert parse_data_dir(text) == [
        (blank, Fraction(1, 8)),
        (colon, Fraction(3, 8)),
        ("bob's", Fraction(1, 2)),
    ]
    Path(blank).mkdir()
    assert parse_data_dir(f"{blank}:0.25") == [(blank, 1)]
    home = str(Path.home())
    assert parse_data_dir("~/a:1 ~/b:1") == [(f"{home}/{c}", Fraction(1, 2)) for c in "ab"]
    for text, words in (
        ("a:0.7 b", "'b' needs a positive share"),
        ("a:0 b:1", "'a:0' needs a positive share"),
        ("a:0.5 a:0.5", "a is given twice"),
        (["a", "b"], "'a' needs a positive share"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_data_dir(text)
    with pytest.raises(ValueError, match="below 1 in 10,000"):
        token_stream._block_of([Fraction(1, 100_001), Fraction(100_000, 100_001)])


# --- Loader ---------------------------------------------------------------------------------------


def batches(source, steps, windows=8, rank=0, world_size=1, **options) -> list[torch.Tensor]:
    loader = StepLoader(source, windows, rank, world_size, "cpu", **options)
    result = [loader.next_batch() for _ in range(steps)]
    loader.close()
    return result


def test_ranks_share_the_same_steps(folder):
    source = open_source(str(folder), "train", T, 5)
    steps = 50  # 400 windows: almost three epochs, two batches straddle a border
    reference = batches(source, steps)
    for batch in reference:
        assert batch.shape == (8, T + 1) and batch.dtype == torch.int64
    expected = slow_windows(folder, 5, range(8 * steps))
    assert np.array_equal(torch.cat(reference).numpy(), expected)
    for world_size in (2, 4):
        ranks = [batches(source, steps, rank=r, world_size=world_size) for r in range(world_size)]
        for step in range(steps):
            slices = [rank[step] for rank in ranks]
            assert all(len(s) == 8 // world_size for s in slices)
            assert torch.equal(torch.cat(slices), reference[step])
    with pytest.raises(ValueError, match=r"8 windows .* 3 processes"):
        StepLoader(source, 8, 0, 3, "cpu")


def test_resume_and_seek_give_the_same_batches(folder):
    source = open_source(str(folder), "train", T, 5)
    reference = batches(source, 40)
    loader = StepLoader(source, 8, 0, 1, "cpu", position=17 * 8)
    assert loader.position == 136
    assert torch.equal(loader.next_batch(), reference[17])
    assert loader.position == 144
    loader.seek(3 * 8)
    assert torch.equal(loader.next_batch(), reference[3]) and loader.position == 32
    loader.seek(loader.position)
    assert torch.equal(loader.next_batch(), reference[4])
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_batch()


def test_more_windows_in_a_step_than_in_the_data(tmp_path):
    folder = make_folder(tmp_path / "data", train=(3 * T + 1,))
    source = open_source(str(folder), "train", T, 5)
    (batch,) = batches(source, 1, windows=16)
    assert np.array_equal(batch.numpy(), slow_windows(folder, 5, range(16)))
    assert all(n in (5, 6) for n in Counter(map(str, batch.tolist())).values())


class Gate:
    """A real source whose reads wait until they are let through."""

    def __init__(self, source):
        self.source, self.T, self.open = source, source.T, threading.Event()
        self.reads = 0

    def windows(self, positions):
        assert self.open.wait(30)
        self.reads += 1
        return self.source.windows(positions)


def loader_threads():
    return [t for t in threading.enumerate() if t.name == "data loader"]


def test_reads_ahead_but_not_without_bound(folder):
    source = Gate(open_source(str(folder), "train", T, 5))
    source.open.set()
    loader = StepLoader(source, 8, 0, 1, "cpu")
    deadline = time.monotonic() + 30
    while source.reads < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert source.reads == 3  # two waiting, one in the thread's hand
    loader.next_batch()
    loader.close()
    assert not loader_threads()


def test_waiting_calls_poll_which_may_raise(folder):
    source = Gate(open_source(str(folder), "train", T, 5))
    loader = StepLoader(source, 8, 0, 1, "cpu")
    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loader.next_batch(poll)
    assert loader.position == 0
    source.open.set()
    assert torch.equal(loader.next_batch(poll), batches(source, 1)[0])  # nothing was lost
    loader.close()


def test_trouble_in_the_thread_is_raised_from_next(own_folder):
    source = open_source(str(own_folder), "train", T, 0)
    path = own_folder / "x_train_000002.bin"
    path.write_bytes(path.read_bytes()[:1024] + b"\xff" * 2400)
    loader = StepLoader(source, 8, 0, 1, "cpu")
    with pytest.raises(ValueError, match=r"x_train_000002.bin: token .* is 65535"):
        for _ in range(30):
            loader.next_batch()
    with pytest.raises(ValueError, match="65535"):  # and again, not a hang
        loader.next_batch()
    loader.close()


def test_a_forgotten_loader_ends_its_thread(folder):
    loader = StepLoader(open_source(str(folder), "train", T, 0), 8, 0, 1, "cpu")
    loader.next_batch()
    del loader
    assert not loader_threads()


def test_a_program_ends_while_its_loader_reads(folder):
    code = (
        "import sys; from tokens.loader import StepLoader; from tokens.stream import open_source\n"
        f"source = open_source({str(folder)!r}, 'train', {T}, 0)\n"
        "loader = StepLoader(source, 8, 0, 1, 'cpu')\n"
        "loader.next_batch()\n"
        "sys.exit(7)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=SRC, capture_output=True, timeout=60)
    assert (run.returncode, run.stderr) == (7, b"")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loader_on_cuda(folder):
    source = open_source(str(folder), "train", T, 5)
    loader = StepLoader(source, 8, 0, 1, "cuda")
    for batch in batches(source, 60):
        mine = loader.next_batch()
        assert mine.is_cuda and mine.dtype == torch.int64
        assert torch.equal(mine.cpu(), batch)
    loader.close()


# --- At scale -------------------------------------------------------------------------------------


def test_ten_billion_tokens(tmp_path):
    """Sparse files. Opening reads little, however much there is; a step late in the run reads what
    the first does; memory stays bounded."""
    size = 100_000_000
    header = struct.pack("<256i", 20240520, 1, size, *[0] * 253)
    for k in range(101):
        path = tmp_path / f"sparse_{'train' if k else 'val'}_{k:06d}.bin"
        path.write_bytes(header)
        os.truncate(path, 1024 + 2 * size)
    code = """
import sys, numpy as np
from tokens.stream import open_source
assert 'torch' not in sys.modules
def proc(file, key):
    return next(int(l.split()[1]) for l in open(f'/proc/self/{file}') if l.startswith(key))
before = proc('io', 'rchar'), proc('io', 'syscr')
source = open_source(sys.argv[1], 'train', 1024, 1337)
print(source.num_windows, *(proc('io', k) - b for k, b in zip(('rchar', 'syscr'), before)))
memory = proc('status', 'VmRSS')
for step in (0, 90_000):
    before = proc('io', 'rchar'), proc('io', 'syscr')
    source.windows(np.arange(step * 512, step * 512 + 512))
    print(*(proc('io', k) - b for k, b in zip(('rchar', 'syscr'), before)))
for step in range(100):
    source.windows(np.arange(step * 512, step * 512 + 512))
print(proc('status', 'VmRSS') - memory)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=SRC, capture_output=True, text=True
    )
    lines = [list(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(lines) == 4, run.stderr
    (windows, opened, _), first, late, (grown,) = lines
    assert windows == (100 * size - 1) // 1024 == 9_765_624  # 19,073 steps of 512 an epoch
    assert windows // 512 == 19_073
    assert opened < 10e6
    assert abs(first[0] - late[0]) < 8192 and abs(first[1] - late[1]) < 8
    assert 512 * 2050 <= late[0] < 512 * 2050 + 8192
    assert grown < 50_000  # kB; a hundred steps read 105 MB


def test_many_shards_need_few_open_files(tmp_path):
    folder = make_folder(tmp_path / "data", train=[40] * 300)
    source = open_source(str(folder), "train", T, 0)
    open_before = len(os.listdir("/proc/self/fd"))
    index = np.arange(source.num_windows)
    expected = source.windows(index)
    assert len(os.listdir("/proc/self/fd")) - open_before <= 64
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(source.windows(index))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(r, expected) for r in results) and len(results) == 4


# --- Sample corpus --------------------------------------------------------------------------------


def test_sample_corpus(tmp_path):
    folder = tmp_path / "deep" / "sample"
    sample_corpus(folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert sorted(p.name for p in folder.parent.iterdir()) == ["sample"]
    verify(str(folder))
    decode = get_tokenizer().decode
    train, val = (open_split(folder, s) for s in ("train", "val"))
    texts = [decode(s.read(0, s.num_tokens).tolist()) for s in (train, val)]
    chapters, held_out = (text.split("<|endoftext|>")[1:] for text in texts)
    assert train.num_tokens > 400_000 and val.num_tokens > 16_384
    assert len(chapters) == 60 and len(held_out) == 4 and not set(chapters) & set(held_out)
    assert "I Am Born" in chapters[0] and "I Make Another Beginning" in held_out[0]
    words = texts[0].lower().split()
    assert words.count("the") > len(words) / 40  # English
    sample_corpus(folder)  # another process was faster: that is kept
    sample_corpus(tmp_path / "again")
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()}


def test_sample_corpus_built_by_two_at_once(tmp_path):
    errors = []

    def build():
        try:
            sample_corpus(tmp_path / "data" / "sample")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["sample"]
    verify(str(tmp_path / "data" / "sample"))


def test_sample_corpus_says_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        sample_corpus(tmp_path / "file" / "sample")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="taken"):
        sample_corpus(tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine.txt"]


# --- The command ----------------------------------------------------------------------------------


def write_text(folder: Path, documents: list[str], split="train", k=0) -> None:
    encode = get_tokenizer().encode_ordinary
    tokens = [t for document in documents for t in (EOT, *encode(document))]
    folder.mkdir(exist_ok=True)
    write_shard(folder / f"t_{split}_{k:06d}.bin", np.array(tokens))


def test_summary(tmp_path, capsys):
    folder = tmp_path / "text"
    documents = ["one two three four " * k for k in range(1, 101)]
    write_text(folder, documents[:60])
    write_text(folder, documents[60:], k=1)
    write_text(folder, ["An \x1b[31mescape\x07 and a \u202e mark.\n" * 30], "val")
    assert data_shards.main([str(folder)]) == 0
    out = capsys.readouterr().out
    lengths = [len(get_tokenizer().encode_ordinary(d)) for d in documents]
    tokens = sum(lengths) + 100
    assert f"train: {tokens:,} tokens in 2 shards" in out
    assert "documents   100;" in out and f"longest {max(lengths)}" in out
    low, middle, high = np.quantile(lengths, (0.05, 0.5, 0.95)).astype(int)
    assert f"median {middle}, from {low} (5%) to {high} (95%)" in out
    ids = {t for d in documents for t in get_tokenizer().encode_ordinary(d)} | {EOT}
    assert f"{len(ids)} of 50,257 ids" in out and "' two' 2" in out
    assert "one two three four one two" in out and "no problem found" in out
    # a corpus must not speak to the terminal
    assert "\\x1b[31mescape\\x07 and a \\u202e mark.\\n" in out
    assert all(c == "\n" or c.isprintable() for c in out)
    assert not list(folder.glob("manifest*"))


def test_summary_counts_every_problem(own_folder, capsys):
    (own_folder / "x_train_000000.bin").write_bytes(b"")
    path = own_folder / "x_train_000001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\xff\xff")
    assert data_shards.main([str(own_folder)]) == 1
    out = capsys.readouterr().out
    problems = [line for line in out.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 2, out
    assert "x_train_000000.bin has 0 bytes" in problems[0]
    assert "x_train_000001.bin: token 300 is 65535" in problems[1]
    assert "val: 150 tokens" in out


def test_summary_sees_zeros_and_copies(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    tokens = random_tokens(20_000)
    np.save(folder / "x_val_000000.npy", tokens)
    tokens[12_000:] = 0  # what a power cut leaves behind
    np.save(folder / "x_train_000000.npy", tokens)
    assert data_shards.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "x_train_000000.npy: nothing but zeros from token 12,288 on" in out
    twins = make_folder(tmp_path / "twins", train=(500,))
    manifest = json.loads((twins / "manifest.json").read_text())
    (twins / "x_train_000001.bin").write_bytes((twins / "x_train_000000.bin").read_bytes())
    manifest["shards"].append(manifest["shards"][0] | {"name": "x_train_000001.bin"})
    (twins / "manifest.json").write_text(json.dumps(manifest))
    assert data_shards.main([str(twins)]) == 1
    assert "have the same content" in capsys.readouterr().out


def test_summary_verifies_when_asked(own_folder, capsys):
    path = own_folder / "x_train_000002.bin"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    assert data_shards.main([str(own_folder)]) == 0
    assert data_shards.main([str(own_folder), "--verify"]) == 1
    assert "x_train_000002.bin: SHA-256 differs" in capsys.readouterr().out


def test_command_line(own_folder, tmp_path):
    def run(*args):
        command = [sys.executable, SRC / "data_shards.py", *args]
        return subprocess.run(command, capture_output=True, text=True)

    result = run(own_folder, "--verify")
    assert result.returncode == 0 and result.stdout.endswith("no problem found\n"), result.stderr
    assert "every shard has the SHA-256" in result.stdout
    result = run(tmp_path / "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "nowhere does not exist" in result.stderr
    assert run().returncode == 2
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty")
    assert result.returncode == 1 and result.stdout.count("PROBLEM") == 1


def test_summary_of_much_data_samples_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_shards, "LOOK_BLOCK", 1000)
    folder = tmp_path / "data"
    write_text(folder, ["a b c d e f g h i"] * 50_000)
    write_text(folder, ["a b c"] * 9, "val")
    assert data_shards.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "sampled     64 pieces of 1,000 tokens, 12.8% of the split" in out
    assert "about 50,000" in out and "median 9, from 9 (5%) to 9 (95%), longest 9" in out


def test_nothing_here_imports_torch_at_the_top():
    tree = ast.parse((SRC / "data_shards.py").read_text())
    names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    assert "numpy" in names and "torch" not in names
