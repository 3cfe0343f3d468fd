"""Data preparation: exact, restartable, from any source. What is expected is counted anew here, one
document at a time with tiktoken's encode_ordinary."""

import argparse
import gc
import gzip
import hashlib
import http.server
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from tokens import corpus, encoding, preparation, sources
from tokens import shards as token_shards
from tokens.tokenizer import EOT, get_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BOOKS = ROOT.parent / "shared" / "data" / "books_train.jsonl.gz"
BOOKS_VAL = BOOKS.with_name("books_val.jsonl.gz")
needs_books = pytest.mark.skipif(not BOOKS.exists(), reason="needs ../shared/data/books_*.jsonl.gz")
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there: refused at once


# --- Helpers --------------------------------------------------------------------------------------


def prose(seed: int, words: int) -> str:
    """Text of the kinds of pieces that GPT-2's pattern knows."""
    rng = random.Random(seed)
    some = "the of don't we'll 1999 3.14 naïve 日本語 — ... \t x\n\n y  \n I'M <|endoftext|>x 🙂"
    some = some.split(" ")
    return " ".join(rng.choice(some) for _ in range(words))


DOCUMENTS = [prose(i, random.Random(i).randint(0, 120)) for i in range(300)] + ["", " ", "\n", "<|"]


def recount(documents: list[str]) -> np.ndarray:
    """The slow way."""
    encode = get_tokenizer().encode_ordinary
    return np.array([token for text in documents for token in [EOT, *encode(text)]], np.uint16)


def lines(path: Path) -> list[bytes]:
    return gzip.decompress(path.read_bytes()).splitlines(keepends=True)


def stream(out: Path) -> np.ndarray:
    """All tokens of a folder, read from the bytes of its files."""
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    tokens = []
    for entry in shards:
        content = (out / entry["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert len(content) == entry["bytes"] == 1024 + 2 * entry["tokens"]
        assert np.frombuffer(content[:12], "<i4").tolist() == [20240520, 1, entry["tokens"]]
        tokens.append(np.frombuffer(content[1024:], "<u2"))
        assert entry["documents"] == (tokens[-1] == EOT).sum()
    return np.concatenate(tokens)


def content(out: Path) -> dict[str, str]:
    """Every file of a folder, the manifest without what differs between two runs."""
    files = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(data)
            manifest.update(command="", date="")
            data = json.dumps(manifest).encode()
        files[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return files


def command(*flags, **environment) -> dict:
    """Arguments for subprocess.run and Popen."""
    return {
        "args": [sys.executable, ROOT / "src" / "prepare_data.py", *map(str, flags)],
        "env": {**os.environ, **NO_HUB, **environment},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def prepare(*flags, input: bytes | None = None, **environment) -> str:
    done = subprocess.run(**command(*flags, **environment), input=input)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode() + done.stderr.decode()


def refused(capsys, *flags) -> str:
    """Run the command in this process; it must say one sentence and leave with 2."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert prepare_data.main([str(flag) for flag in flags]) == 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    return message


def jsonl(path: Path, documents, key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"id": 1, key: text}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parquet(path: Path, documents, rows: int) -> Path:
    """A file with FineWeb-Edu's columns."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(documents)
    columns = {"text": documents, "id": [f"<urn:uuid:{i}>" for i in range(n)]}
    for name in ("dump", "url", "file_path", "language"):
        columns[name] = [name] * n
    columns |= {"language_score": [0.9] * n, "token_count": [7] * n, "score": [3.2] * n}
    columns["int_score"] = [3] * n
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def fineweb_folder(folder: Path, documents, whole: bool) -> Path:
    """A folder in FineWeb-Edu's layout; not whole: a copy of sample-10BT alone."""
    middle = len(documents) // 3
    parquet(folder / "sample/10BT/000_00000.parquet", documents[:middle], 50)
    parquet(folder / "sample/10BT/001_00000.parquet", documents[middle:], 70)
    if whole:
        parquet(folder / "data/CC-MAIN-2013-20/train-00000-of-00001.parquet", ["other"], 1)
    (folder / "README.md").write_text(
        "---\nlicense: odc-by\nlanguage:\n- en\nconfigs:\n"
        "- config_name: default\n  default: true\n  data_files:\n"
        "  - split: train\n    path: data/*/*\n"
        "- config_name: sample-10BT\n  data_files:\n"
        "  - split: train\n    path: sample/10BT/*\n"
        "---\n# FineWeb-Edu\n"
    )
    return folder


FLAGS = ("source", "val_source", "name", "split", "val_split", "revision", "format", "encoding")


def read_here(tmp_path, *paths, place=(0, 0), **flags) -> tuple[np.ndarray, Counter, list]:
    """Tokens, counts and damage of sources, read and tokenized unit by unit in this process."""
    args = argparse.Namespace(**dict.fromkeys(FLAGS), text_key="text", separator="")
    args.source, args.val_source = [str(path) for path in paths], []
    vars(args).update(flags)
    tokens, seen = [], preparation.Part()
    for spans in corpus.find_units(sources.find_all(args, {}).files, args, place, ""):
        more, unit = preparation.tokenize_unit(spans, vars(args))
        tokens.append(more)
        seen += unit
        places.append((seen.next, seen.tokens))
    return np.concatenate(tokens), seen.counts, seen.damage


def test_no_source_is_left_open(tmp_path):
    documents = ["A few words.", "Some more."]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(documents))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        tokens, *_ = read_here(tmp_path, jsonl(tmp_path / "a.jsonl", documents), tmp_path / "a.csv")
        gc.collect()
    assert np.array_equal(tokens, recount(2 * documents)) and not seen


places: list = []  # where each unit of the last read_here() ended, and tokens until there


@pytest.fixture
def small_units(monkeypatch):
    """Hundreds of units in a few kilobytes: every way of cutting a file is taken."""
    monkeypatch.setattr(corpus, "UNIT", 997)
    monkeypatch.setattr(corpus, "MAX_ROW_GROUP", 4000)
    places.clear()


# --- Sources --------------------------------------------------------------------------------------


@needs_books
def test_the_books_recounted(tmp_path):
    flags = ("--source", BOOKS, "--val_source", BOOKS_VAL, "--shard_tokens", 700_000)
    said = prepare(*flags, "--out", tmp_path / "out")
    val, train = (recount([json.loads(x)["text"] for x in lines(p)]) for p in (BOOKS_VAL, BOOKS))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert np.array_equal(stream(tmp_path / "out"), np.concatenate([val, train]))
    assert manifest["val_tokens"] == len(val)
    assert manifest["documents"] == 1303 and f"{len(val) + len(train):,} tokens" in said
    assert [(s["split"], s["tokens"]) for s in manifest["shards"]] == [
        ("val", len(val)),
        *[("train", 700_000)] * (len(train) // 700_000),
        ("train", len(train) % 700_000),
    ]
    for key in ("tokenizer_fingerprint", "vocab_size", "source", "revision", "command", "date"):
        assert key in manifest
    assert token_shards.open_split(str(tmp_path / "out"), "train").num_tokens == len(train)


@pytest.mark.parametrize("whole", [True, False])
def test_folder_in_fineweb_edus_layout(tmp_path, whole):
    folder = fineweb_folder(tmp_path / "fineweb-edu", DOCUMENTS, whole)
    prepare("--source", folder, "--name", "sample-10BT", "--out", tmp_path / "out")
    assert np.array_equal(stream(tmp_path / "out"), recount(DOCUMENTS))
    assert (tmp_path / "out" / "fineweb-edu_val_000000.bin").exists()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "one_row_group.parquet", "a.csv"]
)
def test_every_format_gives_the_same_tokens(tmp_path, small_units, name):
    path, flags = tmp_path / "source" / name, {}
    documents = DOCUMENTS
    if name.endswith(".parquet"):
        parquet(path, DOCUMENTS, 1000 if name.startswith("one") else 9)
    elif name.endswith(".csv"):  # a format that is left to `datasets`
        pa_csv, pa = pytest.importorskip("pyarrow.csv"), pytest.importorskip("pyarrow")
        documents = [text for text in DOCUMENTS if text.strip()]  # CSV has no empty texts
        path.parent.mkdir()
        pa_csv.write_csv(pa.table({"text": documents}), path)
        path, flags = path.parent, {"split": "train"}
    else:
        jsonl(path, DOCUMENTS)
    if name.endswith(".zst"):
        path.write_bytes(pytest.importorskip("zstandard").compress(path.read_bytes()))
    expected = recount(documents)
    tokens, counts, damage = read_here(tmp_path, path, **flags)
    assert np.array_equal(tokens, expected)
    assert counts["documents"] == len(documents) and not damage
    ends = list(places)
    assert len(ends) > 20
    for place, done in random.Random(name).sample(ends[:-1], 5):  # from the middle on
        assert np.array_equal(read_here(tmp_path, path, place=place, **flags)[0], expected[done:])


def test_plain_text_is_cut_where_no_token_notices(tmp_path, small_units):
    texts = [
        prose(1, 5000),
        "",
        "中文字符，" * 3000,
        " \n" * 2000 + "x",
        "a" * 5000 + " b",
        "é\n" * 999,
    ]
    texts.append("x\u3000 y\u00a0 z\u2003\n" * 500)  # white space that is not ASCII before a space
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "README.md").write_text("no part of the corpus")
    (tmp_path / "out").mkdir()
    expected = recount(texts)
    tokens, counts, _ = read_here(tmp_path / "out", tmp_path)
    assert np.array_equal(tokens, expected)
    assert counts["documents"] == len(texts) and counts["empty"] == 1
    for place, done in places[:-1]:
        assert np.array_equal(
            read_here(tmp_path / "out", tmp_path, place=place)[0], expected[done:]
        )
        if done > len(expected) // 3:
            break
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").unlink()
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert np.array_equal(read_here(tmp_path / "out", tmp_path / "*.gz")[0], expected)


@pytest.mark.parametrize("separator", ["\n", "<|endoftext|>", "\r\n"])
def test_separator(tmp_path, small_units, separator):
    parts = [prose(i, 40).replace("<|endoftext|>", "").replace("\n", " ") for i in range(99)]
    parts = [part for part in parts if part.strip()]
    blanks = 3
    text = separator.join([parts[0], *[""] * (blanks - 1), " ", *parts[1:]]) + separator
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokens, counts, _ = read_here(tmp_path, tmp_path / "a.txt", separator=separator)
    assert np.array_equal(tokens, recount(parts))
    assert counts["blank"] == blanks and counts["documents"] == len(parts)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_separate(tmp_path, small_units, end):
    rng = random.Random(end)
    runs = [end * rng.choice([1, 2, 2, 3, 4, 5, 90]) for _ in range(600)]
    text = "".join(f"some words {i}{run}" for i, run in enumerate(runs))
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokens, _, _ = read_here(tmp_path, tmp_path / "a.txt", separator="\n\n")
    parts = [part for part in re.split("\r?\n\r?\n", text) if part.strip()]
    assert len(places) > 10 and 400 < len(parts) < 600
    assert np.array_equal(tokens, recount(parts))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "text"])
def test_standard_input(tmp_path, kind):
    if kind == "text":
        data, expected = DOCUMENTS[7].encode() * 99, recount([DOCUMENTS[7] * 99])
    else:
        data, expected = jsonl(tmp_path / f"a.{kind}", DOCUMENTS).read_bytes(), recount(DOCUMENTS)
    prepare("--source", "-", "--out", tmp_path / "out", input=data)
    assert np.array_equal(stream(tmp_path / "out"), expected)


# --- Exactness ------------------------------------------------------------------------------------


def random_texts(rng: random.Random, n: int) -> list[str]:
    """Texts out of what the two patterns and the search for white space could get wrong."""
    spaces = " \t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u200a\u200b\u2028\u2029\u202f"
    spaces += "\u205f\u3000\u180e\ufeff"
    words = [
        "'",
        "'s",
        "'ll",
        "’",
        "e\u0301",
        "ª",
        "ǅ",
        "٣²½",
        "👍🏽",
        "\u0378",
        "\0",
        "<|endoftext|>",
    ]
    pool = [*" " * 30, *"\n" * 10, *spaces, *"abcsdmtlvreXYZ0123!?.,-_<|>éñ日本🙂", *words]
    some = ["".join(rng.choices(pool, k=rng.choice([0, 1, 2, 3, 5, 10, 30]))) for _ in range(n)]
    kinds = [(0x21, 0x300), (0x21, 0x3100), (0x3100, 0xD800), (0xE000, 0x110000)]
    anything = ("".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(9)) for _ in range(n))
    return some + [text + rng.choice(spaces) * rng.randrange(3) for text in anything]


def test_the_faster_pattern_gives_the_same_tokens(monkeypatch):
    seed = int(os.environ.get("PREPARE_SEED", random.randrange(1 << 30)))
    print("PREPARE_SEED =", seed)
    texts = random_texts(random.Random(seed), 10_000)
    assert 0.2 < sum(map(encoding.is_simple, texts)) / len(texts) < 0.95
    assert np.array_equal(encoding.encode_documents(texts, Counter()), recount(texts))
    monkeypatch.setattr(encoding, "BATCH", 50)
    assert np.array_equal(encoding.encode_text("".join(texts)), recount(["".join(texts)])[1:])


@pytest.mark.parametrize(
    "unit", ["a", "ab", "the", "1", "!", "'", "=", " ", "\n", "日本", "🙂", "ÃÂ", 0]
)
def test_long_runs_in_windows_are_exact(monkeypatch, unit):
    monkeypatch.setattr(encoding, "LONG_RUN", 2048)
    monkeypatch.setattr(encoding, "SEAM", 16)
    rng = random.Random(0)
    run = (
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCD", k=20_000))
        if unit == 0
        else unit * 9000
    )
    text = f"He'll say: don't{run}'s {run} \n{run}x " + "ordinary words " * 300 + run
    assert len(list(encoding._window_ends(text))) > 20
    assert np.array_equal(encoding.encode_text(text), recount([text])[1:])


def test_a_million_spaces_before_a_word():
    """tiktoken itself fails here; its expression says: all spaces but the last are one piece."""
    text = "x" + " " * 1_500_000 + "word"
    with pytest.raises(ValueError, match="stack"):
        get_tokenizer().encode(text)
    tokens = encoding.encode_text(text)
    spaces = get_tokenizer().encode_ordinary("x" + " " * 1000)[1:]
    assert set(spaces) == {220}
    assert tokens.tolist() == [87, *[220] * 1_499_999, *get_tokenizer().encode_ordinary(" word")]


def hostile_lines() -> tuple[list[bytes], list[str], Counter]:
    """Lines of JSONL, the documents that are in them, and what should be counted."""
    good = [prose(i, 50) for i in range(40)]
    lines = [json.dumps({"text": text}).encode() for text in good]
    documents, counts = list(good), Counter()

    def add(line: bytes, kind: str, text: str | None = None):
        lines.append(line)
        if kind:
            counts[kind] += 1
        if text is not None:
            documents.append(text)

    add(b'{"text": "caf\xe9 \xff"}', "invalid_utf8", "caf\ufffd \ufffd")
    add(b'{"text": "lone \\ud800 surrogate"}', "invalid_utf8", "lone \ufffd surrogate")
    add(b'{"text": "pair \\ud83d\\ude42"}', "", "pair 🙂")
    add(b'{"text": "nul \\u0000 inside"}', "with_nul", "nul \0 inside")
    add(b'{"text": ""}', "empty", "")
    add(b'{"text": "<|endoftext|>"}', "", "<|endoftext|>")
    add(b'{"text": "a\\u2028b\\u0085c"}', "", "a\u2028b\u0085c")
    add(
        '{"text": "raw \u2028 and \x85 are no line ends"}'.encode(),
        "",
        "raw \u2028 and \x85 are no line ends",
    )
    add(b'{"text": "carriage return"}\r', "", "carriage return")
    add(b'{"text": null}', "not_text")
    add(b'{"text": 7}', "not_text")
    add(b'{"text": ["a"]}', "not_text")
    add(b'{"other": "a"}', "not_text")
    add(b'"a string"', "not_text")
    add(b"[1, 2]", "not_text")
    add(b"NaN", "not_text")
    add(b'{"text": "cut', "broken_json")
    add(b'{"text": "two"} {"text": "objects"}', "broken_json")
    add(b"[" * 100_000, "broken_json")
    add(b"\0\0\0\0", "broken_json")
    add(b"", "blank")
    add(b"   \t", "blank")
    for text in ("a" * 3_000_000, " " * 1_200_000 + "x", "word " * 500_000):
        add(json.dumps({"text": text}).encode(), "", text)
    counts["documents"] = len(documents)
    return lines, documents, counts


MOST = ("--allow_skipped", 0.9)


def test_hostile_corpus(tmp_path):
    lines, documents, counts = hostile_lines()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    said = prepare("--source", tmp_path / "a.jsonl", "--out", tmp_path / "out", *MOST)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    spaces = " " * 1_200_000 + "x"  # which tiktoken cannot encode
    at = documents.index(spaces)
    expected = [
        recount(documents[:at]),
        [EOT, *[220] * 1_199_999, 2124],
        recount(documents[at + 1 :]),
    ]
    assert np.array_equal(stream(tmp_path / "out"), np.concatenate(expected))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents"] == counts.pop("documents")
    assert {k: v for k, v in manifest["counts"].items() if v} == counts
    for kind in counts:
        assert corpus.COUNTS[kind] in said
    # the same in Parquet, whose strings may be any bytes
    raw = [b"caf\xe9", None, b"", b"good", b"nul \0"]
    offsets = np.cumsum([0, *(len(x or b"") for x in raw)]).astype(np.int32)
    buffers = [
        pa.py_buffer(b"\x1d"),
        pa.py_buffer(offsets),
        pa.py_buffer(b"".join(x or b"" for x in raw)),
    ]
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), 5, buffers)}), tmp_path / "a.parquet"
    )
    tokens, counts, _ = read_here(tmp_path, tmp_path / "a.parquet")
    assert np.array_equal(tokens, recount(["caf\ufffd", "", "good", "nul \0"]))
    odd = {"documents": 4, "invalid_utf8": 1, "not_text": 1, "empty": 1, "with_nul": 1}
    assert counts == odd | {"replaced": 1, "characters": 13}


def test_damaged_compressed_files_give_what_they_have(tmp_path):
    documents = [prose(i, 300) for i in range(300)]
    data = jsonl(tmp_path / "whole.jsonl", documents).read_bytes()
    noise = np.random.default_rng(0).bytes(300_000).hex().encode()  # does not shrink to one block
    data = b"".join(
        line + b"\n" + noise[i * 900 : i * 900 + 900] + b"\n"
        for i, line in enumerate(data.splitlines())
    )
    packed = gzip.compress(data)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    zst = pytest.importorskip("zstandard").compress(data)
    (tmp_path / "cut.jsonl.zst").write_bytes(zst[: len(zst) * 9 // 10])
    (tmp_path / "none.jsonl.gz").write_bytes(b"\x1f\x8bthis is no gzip")
    names = ("cut.jsonl.gz", "cut.jsonl.zst", "none.jsonl.gz", "whole.jsonl")
    for name in names[:2]:
        tokens, counts, damage = read_here(tmp_path, tmp_path / name)
        n = counts["documents"]
        assert 50 < n < 300 and len(damage) == 1 and name in damage[0]
        assert np.array_equal(tokens, recount(documents[:n]))
    said = prepare("--source", *(tmp_path / n for n in names), "--out", tmp_path / "out", *MOST)
    assert said.count("WARNING") == 3 and "none.jsonl.gz" in said
    damaged = json.loads((tmp_path / "out" / "manifest.json").read_text())["damaged"]
    assert [line.split(":")[0] for line in damaged] == list(names[:3])


# --- Validation -----------------------------------------------------------------------------------


def split_of(tmp_path, documents, *flags) -> tuple[int, dict]:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    prepare("--source", jsonl(tmp_path / "a.jsonl", documents), "--out", out, *flags)
    manifest = json.loads((out / "manifest.json").read_text())
    assert np.array_equal(stream(out), recount(documents))
    return manifest["val_tokens"], manifest


def test_validation_ends_between_documents(tmp_path):
    ends = np.cumsum([len(recount([text])) for text in DOCUMENTS])
    val, manifest = split_of(tmp_path, DOCUMENTS)  # a small corpus: 5%
    assert val == ends[ends <= int(ends[-1] * 0.05)][-1]
    assert len(manifest["shards"]) == 2
    val, _ = split_of(tmp_path, DOCUMENTS, "--shard_tokens", 400)  # 5% is more than a shard
    assert val == ends[ends <= 400][-1]
    val, manifest = split_of(tmp_path, DOCUMENTS, "--shard_tokens", 400, "--val_tokens", 1000)
    assert val == ends[ends <= 1000][-1]
    assert [s["tokens"] for s in manifest["shards"] if s["split"] == "val"] == [400, 400, val - 800]
    val, _ = split_of(tmp_path, ["word " * 500, "b"])  # the first document does not fit
    assert val == len(recount(["word " * 500]))


def test_a_single_document_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("A line of text.\n" * 500)
    said = prepare("--source", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert "single document" in said
    expected = recount(["A line of text.\n" * 500])
    assert np.array_equal(stream(tmp_path / "out"), expected)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["val_tokens"] == int(len(expected) * 0.05)


# --- Restart --------------------------------------------------------------------------------------


def finished_lines(out: Path) -> int:
    journal = out / ".prepare" / "journal"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def kill_after(lines: int, out: Path, flags, input: Path | None = None) -> bool:
    """Kill the command when its journal has so many lines more; False if it ended before that."""
    lines += finished_lines(out)
    with open(input or os.devnull, "rb") as stdin:
        process = subprocess.Popen(**command(*flags, "--out", out), stdin=stdin)
        while process.poll() is None and finished_lines(out) < lines:
            time.sleep(0.005)
        process.kill()
        process.communicate()
    return process.returncode == -signal.SIGKILL


@needs_books
def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    seed = int(os.environ.get("PREPARE_SEED", random.randrange(1 << 30)))
    print("PREPARE_SEED =", seed)
    rng = random.Random(seed)
    some = lines(BOOKS)[:450]
    sources = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"]
    sources[0].write_bytes(gzip.compress(b"".join(some[:200]), 1))
    sources[1].write_bytes(b"".join(some[200:]))
    texts = [json.loads(line)["text"] for line in some]
    flags = ("--source", *sources, "--shard_tokens", 60_000)
    whole = tmp_path / "whole"
    prepare(*flags, "--out", whole, "--workers", 1)
    assert np.array_equal(stream(whole), recount(texts))
    killed, kills = tmp_path / "killed", 0
    for _ in range(5):
        workers = ("--workers", rng.choice([1, 2, 3]))
        kills += kill_after(rng.randint(1, 10), killed, [*flags, *workers])
        (killed / ".tmp-a_train_000000.bin-1").write_bytes(b"of a killed writer")
    assert kills >= 2
    journal = killed / ".prepare" / "journal"
    journal.write_bytes(journal.read_bytes() + b'{"unit": 99, "tok')  # a line that was not finished
    with open(killed / ".prepare" / "head.bin", "ab") as f:  # tokens that no line tells of
        f.write(b"\0" * 1000)
    said = prepare(*flags, "--out", killed, "--workers", 2)
    assert "going on from" in said
    assert content(killed) == content(whole)
    assert "already" in prepare(*flags, "--out", killed)
    prepare("--verify", "--out", killed)


def test_standard_input_goes_on_and_must_be_the_same(tmp_path):
    documents = [prose(i, 4000) for i in range(300)]
    source = jsonl(tmp_path / "a.jsonl", documents)
    out, flags = tmp_path / "out", ("--source", "-", "--shard_tokens", 100_000)
    assert kill_after(3, out, flags, source)
    before = content(out)
    data = source.read_bytes()
    done = subprocess.run(**command(*flags, "--out", out), input=data[:1000] + b" " + data[1000:])
    assert done.returncode == 2 and b"standard input" in done.stderr
    for name in before.keys() - {".prepare/.lock", ".prepare/head.bin"}:
        if ".tmp-" not in name:  # what the killed one was writing is swept
            assert content(out)[name] == before[name]
    assert "going on from" in prepare(*flags, "--out", out, input=data)
    assert np.array_equal(stream(out), recount(documents))


SMALL_SHARDS = ("--shard_tokens", 200_000)


def waiting(out: Path, output=subprocess.PIPE) -> tuple[subprocess.Popen, bytes]:
    """The command in the middle of its work: it has finished units, and waits for more input."""
    flags = ("--source", "-", "--out", out, "--workers", 1, *SMALL_SHARDS)
    process = subprocess.Popen(
        **command(*flags) | {"stdout": output, "stderr": output}, stdin=subprocess.PIPE
    )
    data = json.dumps({"text": "Some words, no more. " * 5000}).encode() + b"\n"
    process.stdin.write(data * (6 * corpus.UNIT // len(data)))
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not finished_lines(out):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process, data


def test_a_worker_that_dies(tmp_path):
    """The out-of-memory killer takes one: a sentence, and the next start goes on."""
    process, data = waiting(tmp_path / "out")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, said = process.communicate(data)
    assert process.returncode == 1 and b"worker process was killed" in said
    assert b"Traceback" not in said
    data *= 6 * corpus.UNIT // len(data) + 1
    flags = ("--source", "-", "--out", tmp_path / "out", *SMALL_SHARDS)
    assert "going on" in prepare(*flags, input=data)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_with_a_signal(tmp_path, number):
    process, _ = waiting(tmp_path / "out")
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number and b"same command goes on" in said
    assert b"Traceback" not in said


def test_a_terminal_that_is_closed(tmp_path):
    """Its signal is in the test above; without it, as under nohup, the preparation finishes."""
    terminal, output = pty.openpty()
    process, data = waiting(tmp_path / "out", output)
    os.close(output)
    os.close(terminal)
    process.communicate(data)
    assert process.returncode == 0
    prepare("--verify", "--out", tmp_path / "out")


def test_workers_leave_when_the_command_is_killed(tmp_path):
    process, _ = waiting(tmp_path / "out")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_at_once(tmp_path):
    out = tmp_path / "out"
    first, data = waiting(out)
    flags = ("--source", "-", "--out", out, *SMALL_SHARDS)
    second = subprocess.run(**command(*flags), stdin=subprocess.DEVNULL)
    assert second.returncode == 2 and f"process {first.pid} on" in second.stderr.decode()
    first.communicate(data)
    assert first.returncode == 0
    data *= 6 * corpus.UNIT // len(data) + 1
    assert np.array_equal(
        stream(out), recount([json.loads(line)["text"] for line in data.splitlines()])
    )


def test_a_full_disk(tmp_path):
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", tmp_path], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        lines = b"".join(json.dumps({"text": prose(i, 4000)}).encode() + b"\n" for i in range(300))
        flags = ("--source", "-", "--out", tmp_path / "out", "--shard_tokens", 50_000)
        done = subprocess.run(**command(*flags), input=lines)
        assert done.returncode == 2, done.stderr
        assert b"No space left" in done.stderr and b"Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=100m", tmp_path], check=True)
        prepare(*flags, input=lines)
        assert np.array_equal(
            stream(tmp_path / "out"), recount([prose(i, 4000) for i in range(300)])
        )
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, list]:
    """A preparation that was killed, and its flags."""
    folder = tmp_path_factory.mktemp("begun")
    for i in range(3):
        jsonl(folder / "source" / f"{i}.jsonl", [prose(j, 4000) for j in range(i, 100 + i)])
    flags = ["--source", folder / "source", "--shard_tokens", 90_000]
    assert kill_after(2, folder / "out", flags)
    return folder, flags


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--shard_tokens", 80_000], "--shard_tokens was 90000 and is now 80000"),
        (["--text_key", "body"], "--text_key was 'text' and is now 'body'"),
        (["--val_tokens", 7], "--val_tokens was None and is now 7"),
        (["--separator", ";"], "--separator was '' and is now ';'"),
    ],
)
def test_another_option_is_refused(begun, capsys, more, reason):
    folder, flags = begun
    before = content(folder)
    assert reason in refused(capsys, *flags, "--out", folder / "out", *more)
    assert content(folder) == before


@pytest.mark.parametrize("change", ["content", "longer", "gone", "new", "mtime"])
def test_another_source_is_refused(begun, capsys, change, monkeypatch):
    folder, flags = begun
    path, extra = folder / "source" / "1.jsonl", folder / "source" / "9.jsonl"
    data, status = path.read_bytes(), path.stat()
    before = content(folder / "out")
    try:
        if change == "content":
            path.write_bytes(data[:5000] + b"X" + data[5001:])
        elif change == "longer":
            path.write_bytes(data + data[:100])
        elif change == "gone":
            path.unlink()
        elif change == "new":
            extra.write_bytes(data + b"\n")
        else:  # of a file too large to be read as a whole, any sign of a change counts
            monkeypatch.setattr(sources, "SAMPLE", 1 << 16)
            os.utime(path)
        message = refused(capsys, *flags, "--out", folder / "out")
        name = "9.jsonl is new" if change == "new" else "1.jsonl"
        assert name in message and "another preparation" in message
        assert content(folder / "out") == before
    finally:
        extra.unlink(missing_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_another_tokenizer_is_refused(begun, capsys, monkeypatch):
    folder, flags = begun
    monkeypatch.setattr(prepare_data, "fingerprint", lambda: "another")
    before = content(folder)
    assert "tokenizer was" in refused(capsys, *flags, "--out", folder / "out")
    assert content(folder) == before


def test_a_shard_that_vanished_is_noticed(tmp_path, capsys):
    source = jsonl(tmp_path / "a.jsonl", [prose(i, 4000) for i in range(300)])
    flags = ("--source", source, "--shard_tokens", 20_000)
    assert kill_after(12, tmp_path / "out", flags)
    next((tmp_path / "out").glob("*_val_*")).unlink()
    assert "missing" in refused(capsys, *flags, "--out", tmp_path / "out")


def test_bad_input(tmp_path, capsys):
    source, out = jsonl(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / "out"
    (tmp_path / "a.xyz").write_text("x")
    (tmp_path / "empty").mkdir()
    parquet(tmp_path / "a.parquet", DOCUMENTS[:20], 10)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    fineweb = fineweb_folder(tmp_path / "hub", DOCUMENTS[:9], True)
    refuse = partial(refused, capsys, "--out", out, "--source")
    assert "no such file or folder" in refuse(tmp_path / "missing")
    assert "no file has such a name" in refuse(tmp_path / "*.nothing")
    assert "--format" in refuse(tmp_path / "a.xyz")
    assert "holds no files" in refuse(tmp_path / "empty")
    assert "it has text, id, dump" in refuse(tmp_path / "a.parquet", "--text_key", "body")
    assert "no whole Parquet file" in refuse(cut)
    assert "nope" in refuse(fineweb, "--name", "nope")
    assert "--split valid" in refuse(fineweb, "--name", "sample-10BT", "--split", "valid")
    assert "--workers 0" in refuse(source, "--workers", 0)
    assert "--separator" in refuse(source, "--separator", "aba")
    assert "exclude each other" in refuse(source, "--val_source", source, "--val_tokens", 5)
    assert "name it once" in refuse("-", "-")
    assert not out.exists()
    assert "body" in refuse(source, "--text_key", "body")  # found out while reading
    assert "304 records without" in refuse(source, "--text_key", "body")
    assert not out.exists()
    assert "validation" in refuse(source, "--val_tokens", 10**9)
    assert not out.exists()
    out.mkdir()
    (out / "mine.bin").write_bytes(b"precious")
    assert "something else" in refuse(source)
    assert [p.name for p in out.iterdir()] == ["mine.bin"]
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "out"
    assert f"--out {below}: cannot write" in refused(capsys, "--source", source, "--out", below)


def test_dry_run_writes_nothing(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    said = prepare("--source", source, "--out", tmp_path / "out", "--dry_run")
    assert "free" in said and "workers" in said
    said = prepare("--out", tmp_path / "out", "--dry_run")  # of FineWeb-Edu, without a network
    assert "28.5 GB" in said and "19.9 GB" in said
    assert not (tmp_path / "out").exists()


def test_verify_names_the_bad_shard(tmp_path, capsys):
    source, out = jsonl(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / "out"
    prepare("--source", source, "--out", out, "--shard_tokens", 3000)
    path = out / "a_train_000001.bin"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    message = refused(capsys, "--verify", "--out", out)
    assert path.name in message and "a_train_000000" not in message


def test_the_plan_is_said_before_the_network_is_needed(tmp_path):
    for flags in ((), ("--source", "nobody/nothing")):
        done = subprocess.run(**command(*flags, "--out", tmp_path / "out"))
        assert done.returncode == 2 and b"cannot be reached" in done.stderr
        assert done.stderr.count(b"\n") == 1
        assert (b"28.5 GB" in done.stdout and b"19.9 GB" in done.stdout) == (not flags)
        assert not (tmp_path / "out").exists()


# --- Over the network -----------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub's HTTP as `datasets` asks for, and plain files. `cut`: of
    every so many answers with a part of a file only half is sent before the connection breaks."""

    protocol_version = "HTTP/1.1"
    folder: Path
    repository = prepare_data.FINEWEB
    commit = prepare_data.FINEWEB_REVISION
    cut = 7
    answers = 0

    def log_message(self, *_):
        pass

    def entry(self, path: Path) -> dict:
        name = path.relative_to(self.folder).as_posix()
        kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
        return {
            "type": kind,
            "oid": hashlib.sha1(name.encode()).hexdigest(),
            "size": size,
            "path": name,
        }

    def send(self, body: bytes, status: int = 200, **headers) -> None:
        self.send_response(status)
        for name, value in {
            "Content_Length": len(body),
            "X_Repo_Commit": self.commit,
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = (
            json.loads(body)["paths"] if body[:1] == "{" else urllib.parse.parse_qs(body)["paths"]
        )
        paths = [self.folder / name for name in names]
        self.send(json.dumps([self.entry(p) for p in paths if p.exists()]).encode())

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        api = f"/api/datasets/{self.repository}"
        if path.startswith(f"{api}/tree/"):
            folder = self.folder / path.removeprefix(f"{api}/tree/").partition("/")[2]
            found = sorted(
                folder.rglob("*") if "recursive=true" in url.query.lower() else folder.glob("*")
            )
            status = 200 if folder.is_dir() else 404
            self.send(json.dumps([self.entry(p) for p in found]).encode(), status)
        elif path.startswith(api):
            self.send(json.dumps({"id": self.repository, "sha": self.commit}).encode())
        else:
            at = f"/datasets/{self.repository}/resolve/{self.commit}/"
            self.send_file(self.folder / path.removeprefix(at).lstrip("/"))

    def send_file(self, path: Path):
        if not path.is_file():
            return self.send(b"", 404, X_Error_Code="EntryNotFound")
        data = path.read_bytes()
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.send(data, ETag=etag, Accept_Ranges="bytes")
        start = int(wanted[1])
        body = data[start : int(wanted[2] or len(data)) + 1]
        type(self).answers += 1
        if self.answers % self.cut == 0:
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return None
        stop = start + len(body)
        part = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.send(body, 206, ETag=etag, Accept_Ranges="bytes", Content_Range=part)


@pytest.fixture
def hub(tmp_path):
    handler = type("Handler", (Hub,), {"folder": tmp_path / "hub"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_fineweb_edu_from_a_hub_that_cuts_connections(tmp_path, hub):
    """The very command of the guide; only the address of the hub differs."""
    fineweb_folder(tmp_path / "hub", DOCUMENTS, True)
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")}
    flags = ("--out", tmp_path / "out", "--workers", 1)
    prepare(*flags, **environment)
    assert np.array_equal(stream(tmp_path / "out"), recount(DOCUMENTS))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["revision"] == prepare_data.FINEWEB_REVISION
    assert (tmp_path / "out" / "fineweb_edu_train_000000.bin").exists()
