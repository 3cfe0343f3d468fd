"""A small fuzzer: whatever a checkpoint, a shard or a manifest has become: one sentence, exit code
2, nothing on disk touched and nothing run from the file. Each test prints its seed."""

import copy
import gzip
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train_improved as ti
from checkpointing import files as checkpoint_files
from checkpointing import run_folders
from conftest import SMALL, run, write_data
from test_bad_input import refused, snapshot
from test_checkpoint_files import fork
from tokens import shards

D = ("--data_dir", "data/walk")


@pytest.fixture
def draw():
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("trained")
    write_data(cwd / "data" / "walk")
    run(*D, "--max_steps", "2", "--eval_freq", "0", "--run_name", "a", cwd=cwd)
    return cwd


# --- Bytes ----------------------------------------------------------------------------------------


def cut(draw, content):
    return content[: draw.choice([0, 1, 21, 22, 100, draw.randrange(len(content))])]


def flip(draw, content):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 50])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def zero(draw, content):
    """A hole of a few blocks, or everything from some place on, as after a power cut."""
    begin = draw.randrange(len(content)) // 512 * 512
    length = draw.choice([1, 8, 10**6]) * 512
    hole = min(length, len(content) - begin)
    return content[:begin] + bytes(hole) + content[begin + hole :]


def shuffle(draw, content):
    """Blocks in the wrong places, or twice."""
    size = draw.choice([512, 4096, 65536])
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    for _ in range(draw.randrange(1, 4)):
        pieces[draw.randrange(len(pieces))] = draw.choice(pieces)
    return b"".join(pieces) + draw.choice([b"", pieces[0], b"\0"])


def add(draw, content):
    more = draw.randbytes(draw.choice([1, 22, 5000]))
    at = draw.choice([0, len(content), draw.randrange(len(content))])
    return content[:at] + more + content[at:]


DAMAGES = [cut, flip, zero, shuffle, add]


def damaged(draw, content: bytes) -> bytes:
    while True:
        other = content
        for _ in range(draw.choice([1, 1, 2])):
            other = draw.choice(DAMAGES)(draw, other) if other else other
        if other != content:
            return other


def test_damaged_checkpoints_are_refused_by_path_and_skipped_by_latest(
    capsys, monkeypatch, trained, tmp_path, draw
):
    good = (trained / "checkpoints" / "a" / "step_00000002.pt").read_bytes()
    folder = tmp_path / "checkpoints" / "a"
    folder.mkdir(parents=True)
    (folder / "step_00000002.pt").write_bytes(good)
    for _ in range(60):
        bad = folder / "step_00000003.pt"
        bad.write_bytes(damaged(draw, good))
        sentence = refused(capsys, monkeypatch, tmp_path, "--resume", bad, small=False)
        assert str(bad) in sentence
        path, skipped = run_folders.find_latest(folder)
        assert path.name == "step_00000002.pt" and [p for p, _ in skipped] == [bad]
    bad.unlink()


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


def foreign_files(folder: Path, good: bytes):
    """Things that a checkpoint's path may lead to, each made at the path that is yielded."""
    path = folder / "step_00000009.pt"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"model": Attack()}, protocol=protocol))
        yield path
    for new_format in (True, False):
        torch.save({"model": Attack()}, path, _use_new_zipfile_serialization=new_format)
        yield path
        torch.save({"model": torch.zeros(3)}, path, _use_new_zipfile_serialization=new_format)
        yield path
    path.write_bytes(gzip.compress(good[:100_000]))
    yield path
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("../../escaped")
        archive.addfile(entry, io.BytesIO())
    yield path
    for comment in (b"", b"gpt2-checkpoint 1 {} sha256 " + b"0" * 64, b"\xff" * 200):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../../escaped", b"x")
            archive.writestr("archive/data.pkl", pickle.dumps(Attack()))
            archive.comment = comment
        yield path
    np.save(folder / "array.npy", np.array([Attack()], dtype=object), allow_pickle=True)
    yield folder / "array.npy"
    for target in ("/dev/zero", "/dev/null", "nowhere", "loop"):
        link = folder / "loop"
        link.symlink_to(target)
        yield link
        link.unlink()
    os.mkfifo(folder / "pipe")
    yield folder / "pipe"
    yield folder
    yield folder / ("x" * 300)
    yield "a\nb.pt"


def test_foreign_files_are_refused_and_nothing_in_them_runs(capsys, monkeypatch, trained, tmp_path):
    good = (trained / "checkpoints" / "a" / "step_00000002.pt").read_bytes()
    count = 0
    for path in foreign_files(tmp_path, good):
        count += 1
        sentence = refused(capsys, monkeypatch, trained, "--resume", path, small=False)
        assert str(path).splitlines()[-1] in sentence, sentence
        assert not (trained / "owned").exists() and not (tmp_path.parent / "escaped").exists()
    assert count > 15


# --- Forgeries: the file is whole and its checksum right, what it says is nonsense ----------------

JUNK = [None, -1, 10**30, float("nan"), "x", b"x", [], {}, [[1]], {"a": 1}, True, 2.5, "../../x"]
JUNK += [torch.zeros(0), torch.zeros(3, 5), torch.tensor(1.0), torch.zeros(2, dtype=torch.int64)]


def places(tree, at=()):
    """Every place in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


def forged(draw, state: dict) -> tuple[dict, str]:
    state = copy.deepcopy(state)
    *way, last = draw.choice(list(places(state)))
    parent = state
    for key in way:
        parent = parent[key]
    if draw.random() < 0.3:
        del parent[last]
        return state, f"without {way} {last}"
    parent[last] = draw.choice(JUNK)
    return state, f"{way} {last} is {parent[last]!r}"


def test_forged_checkpoints_end_in_a_sentence(monkeypatch, trained, tmp_path, draw):
    state = checkpoint_files.load(trained / "checkpoints" / "a" / "step_00000002.pt")
    monkeypatch.chdir(trained)
    before = snapshot(trained / "checkpoints")
    bad, said = tmp_path / "step_00000002.pt", tmp_path / "said.txt"
    codes = set()
    for number in range(20):
        forgery, what = forged(draw, state)
        checkpoint_files.save(bad, forgery, {"step": 2})

        def resume(number=number):
            fd = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            flags = ["--resume", str(bad), "--run_name", f"f{number}", "--max_steps", "2"]
            monkeypatch.setattr("sys.argv", ["train_improved.py", *flags])
            monkeypatch.setattr("sys.stdout", os.fdopen(1, "w", closefd=False))
            monkeypatch.setattr("sys.stderr", os.fdopen(2, "w", closefd=False))
            code = ti.main()
            monkeypatch.undo()
            os._exit(code)

        code = os.waitstatus_to_exitcode(os.waitpid(fork(resume), 0)[1])
        assert code in (0, 2), f"{code}: {what}\n{said.read_text()}"
        assert "Traceback" not in said.read_text(), what
        assert code == 0 or said.read_text().strip().splitlines()[-1].startswith("error: "), what
        codes.add(code)
    after = snapshot(trained / "checkpoints")
    assert 2 in codes and {k: after[k] for k in before} == before


# --- Data -----------------------------------------------------------------------------------------


def small_data(folder: Path) -> dict:
    """Shards and a manifest; returns {name: content}."""
    write_data(folder, train=3000, val=600)
    entries = []
    for path in sorted(folder.iterdir()):
        shard = shards.open_shard(path)
        tokens = np.fromfile(path, "<u2", offset=1024)
        entry = shards.write_shard(path, tokens)
        assert shard.tokens == entry["tokens"]
        entries.append(entry | {"split": "train" if "train" in path.name else "val"})
    manifest = {"version": 1, "tokenizer_fingerprint": ti.tokenizer.fingerprint()}
    manifest |= {"vocab_size": 50257, "shards": entries}
    shards.write_manifest(folder, manifest)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged_header(draw, content: bytes) -> bytes:
    header = np.frombuffer(content[:1024], "<i4").copy()
    values = [0, 1, 2, -1, 2**31 - 1, -(2**31), 20240520, 20240801, draw.randrange(2**31)]
    header[draw.randrange(3)] = draw.choice(values)
    return header.tobytes() + content[1024:]


def damaged_manifest(draw, content: bytes) -> bytes:
    if draw.random() < 0.5:
        return damaged(draw, content)
    manifest = json.loads(content)
    *way, last = draw.choice(list(places(manifest)))
    parent = manifest
    for key in way:
        parent = parent[key]
    junk = [j for j in JUNK if not isinstance(j, torch.Tensor | bytes)]
    parent[last] = draw.choice([*junk, "../../etc/passwd", "/dev/zero", "a\nb", "x" * 5000, 2**70])
    return json.dumps(manifest).encode()


def test_damaged_data_is_refused_or_sound(capsys, monkeypatch, tmp_path, draw):
    """With --dry_run and --verify_data: what is accepted is whole, all else is one sentence."""
    files = small_data(tmp_path / "data" / "walk")
    monkeypatch.chdir(tmp_path)
    refusals = 0
    for _ in range(80):
        shutil.rmtree(tmp_path / "data" / "walk")
        (tmp_path / "data" / "walk").mkdir()
        name = draw.choice(sorted(files))
        damage = damaged_manifest if name == "manifest.json" else damaged
        if name != "manifest.json" and draw.random() < 0.4:
            damage = damaged_header
        keep_manifest = draw.random() < 0.7 or name == "manifest.json"
        for other, content in files.items():
            if keep_manifest or other != "manifest.json":
                content = damage(draw, content) if other == name else content
                (tmp_path / "data" / "walk" / other).write_bytes(content)
        flags = [*SMALL, *D, "--max_steps", "2", "--dry_run", "--verify_data"]
        monkeypatch.setattr("sys.argv", ["train_improved.py", *flags])
        code = ti.main()
        out = capsys.readouterr()
        assert code in (0, 2) and "Traceback" not in out.err, (name, out)
        assert sorted(os.listdir(tmp_path)) == ["data"], "something was written"
        if code == 2:
            refusals += 1
            assert out.err.startswith("error: ") and out.err.count("\n") == 1, out.err
        elif keep_manifest and name != "manifest.json":
            assert (tmp_path / "data" / "walk" / name).read_bytes() == files[name], (name, damage)
    assert refusals > 40


@pytest.mark.parametrize("kind", ["edited", "added", "removed"])
def test_data_changed_since_the_checkpoint_is_refused(capsys, monkeypatch, trained, kind):
    folder = trained / "data" / "changed"
    shutil.copytree(trained / "data" / "walk", folder, dirs_exist_ok=True)
    shard = folder / "walk_train_000000.bin"
    tokens = np.fromfile(shard, "<u2", offset=1024)
    if kind == "edited":
        tokens[5] += 1
        shards.write_shard(shard, tokens)
    elif kind == "added":
        shards.write_shard(folder / "walk_train_000001.bin", tokens[:500])
    else:
        shards.write_shard(folder / "walk_train_000001.bin", tokens[:9000])
        shards.write_shard(folder / "walk_train_000002.bin", tokens[9000:])
        shard.unlink()  # the same tokens but the last ones, in other files
        shards.write_shard(folder / "walk_train_000002.bin", tokens[9000:-1])
    flags = ("--resume", "latest", "--data_dir", folder, "--max_steps", "6", "--run_name", kind)
    sentence = refused(capsys, monkeypatch, trained, *flags, small=False)
    assert "--allow_data_change" in sentence and "fingerprint" in sentence
    shutil.rmtree(folder)
