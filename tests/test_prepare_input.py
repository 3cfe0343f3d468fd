"""What people bring to prepare_data.py: small inputs grouped by kind, each with the documents that
are in it, or with what must be said. Tokens are compared with a count of our own.

A new report is a new line in one of the tables.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from tokens.tokenizer import EOT, get_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [f"Document {i}: Die Straße führt über den Fluß, schöne Grüße. 日本" for i in range(400)]
ENGLISH = [f"document number {i} speaks of rivers and of mountains" for i in range(400)]


def records(texts, key="text") -> list[dict]:
    return [{"id": i, key: text} for i, text in enumerate(texts)]


def lines(texts, key="text", end="\n") -> bytes:
    rows = (json.dumps(r, ensure_ascii=False) for r in records(texts, key))
    return "".join(row + end for row in rows).encode()


def pretty(rows) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def run(*flags) -> int:
    """The command in this process."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        return prepare_data.main([str(flag) for flag in flags] + ["--workers", "1"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stream(out: Path) -> np.ndarray:
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    return np.concatenate([np.fromfile(out / e["name"], "<u2", offset=1024) for e in shards])


def expect(out: Path, texts) -> None:
    """The folder holds these documents, token for token."""
    encode = get_tokenizer().encode_ordinary
    expected = [token for text in texts for token in (EOT, *encode(text))]
    assert stream(out).tolist() == expected


def is_refused(capsys, out: Path, *words) -> None:
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said
    assert all(str(word) in errors[0] for word in words), errors[0]
    assert not out.exists()  # nothing published, nothing left behind


def write(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# --- Encodings ------------------------------------------------------------------------------------

GERMAN = "\n".join(TEXTS)
LATIN = GERMAN.replace(" 日本", "")
ENCODINGS = {
    "utf8_with_mark.txt": (codecs.BOM_UTF8 + GERMAN.encode(), [], [GERMAN]),
    "utf16.txt": (GERMAN.encode("utf-16"), [], [GERMAN]),
    "utf16be.txt": (codecs.BOM_UTF16_BE + GERMAN.encode("utf-16-be"), [], [GERMAN]),
    "utf32.txt": (GERMAN.encode("utf-32"), [], [GERMAN]),
    "utf32be.txt": (codecs.BOM_UTF32_BE + GERMAN.encode("utf-32-be"), [], [GERMAN]),
    "utf16.txt.gz": (gzip.compress(GERMAN.encode("utf-16")), [], [GERMAN]),
    "utf16_lines.txt": (GERMAN.encode("utf-16"), ["--separator", r"\n"], TEXTS),
    "utf16.jsonl": (lines(TEXTS).decode().encode("utf-16"), [], TEXTS),
    "mark.jsonl": (codecs.BOM_UTF8 + lines(TEXTS, end="\r\n"), [], TEXTS),
    "mark.jsonl.xz": (lzma.compress(codecs.BOM_UTF8 + lines(TEXTS)), [], TEXTS),
    "mark.json": (codecs.BOM_UTF8 + json.dumps(records(TEXTS)).encode(), [], TEXTS),
    "utf16.csv": (("text\n" + "\n".join(ENGLISH)).encode("utf-16"), [], ENGLISH),
    "mark_lines.txt": (codecs.BOM_UTF8 + GERMAN.encode(), ["--separator", r"\n"], TEXTS),
    "crlf_lines.txt": (GERMAN.replace("\n", "\r\n").encode(), ["--separator", r"\n"], TEXTS),
    "mixed_ends.txt": (b"a\r\nb\nc\r\n\r\nd" * 2, ["--separator", r"\n"], "a b c da b c d".split()),
    "cp1252.txt": (LATIN.encode("cp1252"), ["--encoding", "cp1252"], [LATIN]),
    "no_cp1252.txt": (b"a\x81b" + b" x" * 99, ["--encoding", "cp1252"], ["a\ufffdb" + " x" * 99]),
    "unmarked.txt": (GERMAN.encode("utf-16-le"), ["--encoding", "utf-16-le"], [GERMAN]),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings(tmp_path, name):
    content, flags, texts = ENCODINGS[name]
    write(tmp_path, {name: content})
    assert run("--source", tmp_path / name, "--out", tmp_path / "out", *flags) == 0
    expect(tmp_path / "out", texts)


GOOD_ROWS = b'7,"a ""b"", c"\n' * 10
ESCAPED = b"id,text\n" + GOOD_ROWS + rb'7,"a \"b\", c"' + b"\n" + GOOD_ROWS
TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as tar:
    tar.add(__file__, "book.txt")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("latin1.txt", LATIN.encode("latin-1"), ["characters", "no UTF-8", "--encoding"]),
        ("unmarked.txt", GERMAN.encode("utf-16-le"), ["NUL", "--encoding utf-16-le"]),
        ("nul.jsonl", bytes(5000), ["NUL"]),
        ("cr.jsonl", lines(TEXTS, end="\r"), ["no document"]),
        ("half.jsonl", lines(TEXTS) + lines(TEXTS, "body"), ["400 of 800 documents", "id, body"]),
        ("wrapped.json", pretty({"data": records(TEXTS)}), ["records have data"]),
        ("repr.jsonl", b"{'text': 'a'}\n" * 9, ["9 lines that are not JSON"]),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid 1\n", ["git lfs pull"]),
        ("empty.jsonl", b"", ["no data"]),
        ("blank.txt.gz", gzip.compress(b"", mtime=0), ["no corpus to cut"]),
        ("lines.txt", lines(TEXTS), ["holds JSON", "--format jsonl"]),
        ("table.csv", b"name;body\na;b\n", ["--text_key text", "it has name;body"]),
        (
            "commas.csv",
            b"id,text\n" + b"7,one, two\n" * 99,
            ["99 records", "than its header"],
        ),
        ("escaped.csv", ESCAPED, ["bytes", "line 12: ", "expected after"]),
        ("books.tar", TAR.getvalue(), ["unpack an archive"]),
        ("books.txt.gz", gzip.compress(TAR.getvalue()), ["is an archive", "unpack it"]),
        ("books.jsonl", b"PK\3\4" + bytes(range(256)), ["is an archive", "unpack it"]),
        ("fields.json", json.dumps(records(TEXTS, "story")).encode(), ["id, story", "--text_key"]),
    ],
)
def test_what_is_not_text_is_said(tmp_path, capsys, name, content, words):
    write(tmp_path, {name: content})
    assert run("--source", tmp_path / name, "--out", tmp_path / "out") == 2
    is_refused(capsys, tmp_path / "out", *words)


def test_line_ends_and_separators_that_were_meant(tmp_path, capsys):
    write(tmp_path, {"cr.txt": GERMAN.replace("\n", "\r").encode()})
    assert run("--source", tmp_path / "cr.txt", "--out", tmp_path / "out") == 0
    assert "carriage return" in capsys.readouterr().out
    stories = "".join(f"Story {i} was short.\n<|endoftext|>\n" for i in range(300))
    write(tmp_path, {"TinyStories-train.txt": stories.encode()})
    assert run("--source", tmp_path / "TinyStories-train.txt", "--out", tmp_path / "out2") == 0
    said = capsys.readouterr()
    assert "300 times" in said.out and "--separator '<|endoftext|>'" in said.out
    assert "WARNING" in said.err and "--separator" in said.err


# --- Containers -----------------------------------------------------------------------------------


def members(data: bytes) -> bytes:
    return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])


LONG = "x y " * 60_000
QUOTED = [f'He said "{i}",\nand left' for i in range(99)]
CSV = "id,text\n" + "".join(
    '{},"{}"\n'.format(i, t.replace('"', '""')) for i, t in enumerate(QUOTED)
)
CONTAINERS = {
    "oneline.json": (json.dumps(records(TEXTS)).encode(), TEXTS),
    "perline.json": (b"[\n" + b",\n".join(lines(TEXTS).splitlines()) + b"\n]\n", TEXTS),
    "pretty.json": (pretty(records(TEXTS)), TEXTS),
    "pretty.jsonl": (pretty(records(TEXTS)), TEXTS),
    "pretty_objects.json": (b"\n".join(map(pretty, records(TEXTS))), TEXTS),
    "array.json.bz2": (bz2.compress(pretty(records(TEXTS))), TEXTS),
    "long_records.json": (json.dumps(records([LONG] * 5)).encode(), [LONG] * 5),
    "one_object.json": (pretty({"text": "only one. " * 9}), ["only one. " * 9]),
    "commas.jsonl": (lines(TEXTS, end=",\n"), TEXTS),
    "joined.jsonl": (2 * (codecs.BOM_UTF8 + lines(TEXTS)), 2 * TEXTS),
    "padded.jsonl.gz": (gzip.compress(lines(TEXTS)) + bytes(512), TEXTS),
    "LINES.JSONL": (lines(TEXTS), TEXTS),
    "no_newline_at_end.jsonl": (lines(TEXTS).rstrip(), TEXTS),
    "xz.jsonl.xz": (lzma.compress(lines(TEXTS)), TEXTS),
    "streams.jsonl.bz2": (bz2.compress(lines(TEXTS[:9])) + bz2.compress(lines(TEXTS[9:])), TEXTS),
    "members.jsonl.gz": (members(lines(TEXTS)), TEXTS),
    "not_packed.jsonl.gz": (lines(TEXTS), TEXTS),
    "packed.jsonl": (gzip.compress(lines(TEXTS)), TEXTS),
    "quoted.csv": (CSV.encode(), QUOTED),
    "crlf.csv": (CSV.replace("\n", "\r\n").encode(), [t.replace("\n", "\r\n") for t in QUOTED]),
    "semicolons.csv": (b"n;text\n" + b"".join(b"%d;a, b\n" % i for i in range(99)), ["a, b"] * 99),
    "table.tsv": (b"text\tn\n" + b"t, u\t7\n" * 99, ["t, u"] * 99),
    "table.csv.gz": (gzip.compress(CSV.encode()), QUOTED),
    "NOTES.TXT": (b"upper case. " * 99, ["upper case. " * 99]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(tmp_path, name):
    content, texts = CONTAINERS[name]
    write(tmp_path, {name: content})
    assert run("--source", tmp_path / name, "--out", tmp_path / "out") == 0
    expect(tmp_path / "out", texts)


@pytest.mark.parametrize("long", [27, 28, 31])
def test_zstd_with_a_long_window(tmp_path, monkeypatch, capsys, long):
    program = ["zstd", "-qc", f"--long={long}"]
    try:
        packed = subprocess.run(program, input=lines(TEXTS), capture_output=True, check=True).stdout
    except OSError:
        pytest.skip("needs the program zstd")
    write(tmp_path, {"a.jsonl.zst": packed, "b.jsonl": lines(ENGLISH)})
    assert run("--source", tmp_path, "--out", tmp_path / "out") == 0
    expect(tmp_path / "out", TEXTS + ENGLISH)
    if long > 27:
        monkeypatch.setenv("PATH", "/nowhere")
        assert run("--source", tmp_path / "a.jsonl.zst", "--out", tmp_path / "out2") == 2
        is_refused(capsys, tmp_path / "out2", "install the program zstd", "zstd -d --long=31")


def arrow_table(texts):
    import pyarrow as pa

    return pa.table({"id": list(range(len(texts))), "text": texts})


@pytest.mark.parametrize("kind", ["plain", "large_string", "dictionary", "nulls", "view"])
def test_parquet_columns(tmp_path, capsys, kind):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [None if kind == "nulls" and i % 3 == 0 else text for i, text in enumerate(TEXTS)]
    types = {"large_string": pa.large_string(), "view": pa.string_view()}
    column = pa.array(texts, types.get(kind, pa.string()))
    column = column.dictionary_encode() if kind == "dictionary" else column
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=90)
    flags = ("--source", tmp_path / "a.parquet", "--out", tmp_path / "out")
    if kind == "nulls":
        assert run(*flags) == 2
        is_refused(capsys, tmp_path / "out", "134 of 400 documents", "records without a text")
        assert run(*flags, "--allow_skipped", 0.5) == 0
    else:
        assert run(*flags) == 0
    expect(tmp_path / "out", [text for text in texts if text is not None])


def test_a_column_of_lists_is_no_text(tmp_path, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": [["a", "b"]] * 50}), tmp_path / "a.parquet")
    assert run("--source", tmp_path / "a.parquet", "--out", tmp_path / "out") == 2
    is_refused(capsys, tmp_path / "out", "50 records without a text")


def test_folders_of_save_to_disk(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    data.select(range(300)).save_to_disk(tmp_path / "one", num_shards=3)
    assert run("--source", tmp_path / "one", "--out", tmp_path / "out") == 0
    expect(tmp_path / "out", TEXTS[:300])
    splits = {"train": data.select(range(300)), "validation": data.select(range(300, 400))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    flags = ("--source", tmp_path / "both", "--val_source", tmp_path / "both")
    assert run(*flags, "--val_split", "validation", "--out", tmp_path / "out2") == 0
    expect(tmp_path / "out2", TEXTS[300:] + TEXTS[:300])
    assert run("--source", tmp_path / "both", "--split", "test", "--out", tmp_path / "out3") == 2
    is_refused(capsys, tmp_path / "out3", "--split test", "train, validation")


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["gz", "xz", "bz2", "zst"])
def test_a_cut_file_gives_every_whole_line(tmp_path, capsys, ending):
    rng = np.random.default_rng(0)
    texts = [f"{i} {rng.bytes(300).hex()}" for i in range(2500)]
    if ending == "zst":
        pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    else:
        pack = {"gz": gzip, "xz": lzma, "bz2": bz2}[ending].compress
    data = pack(lines(texts))
    cut = data[: len(data) * 2 // 3]
    write(tmp_path, {f"a.jsonl.{ending}": cut})
    readers = {"gz": "gzip", "xz": "xz", "bz2": "bzip2", "zst": "zstd"}
    try:
        shown = subprocess.run([readers[ending], "-dc"], input=cut, capture_output=True).stdout
    except OSError:
        pytest.skip(f"needs {readers[ending]}")
    whole = [json.loads(line)["text"] for line in shown.splitlines(True) if line.endswith(b"\n")]
    assert run("--source", tmp_path / f"a.jsonl.{ending}", "--out", tmp_path / "out") == 0
    assert "WARNING damaged" in capsys.readouterr().err
    got = stream(tmp_path / "out")
    assert len(whole) > 500 and (got == EOT).sum() >= len(whole)
    expect(tmp_path / "out", texts[: int((got == EOT).sum())])


def test_other_damage_is_refused(tmp_path, capsys):
    data = bytearray(gzip.compress(lines(TEXTS * 20)))
    data[len(data) // 2] ^= 0xFF
    write(tmp_path, {"flipped.jsonl.gz": bytes(data), "good.jsonl": lines(ENGLISH)})
    assert run("--source", tmp_path, "--out", tmp_path / "out") == 2
    is_refused(capsys, tmp_path / "out", "bytes", "flipped.jsonl.gz")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(bytes(data),), daemon=True).start()
    assert run("--source", pipe, "--out", tmp_path / "out") == 2
    is_refused(capsys, tmp_path / "out", "bytes", "pipe 0")


@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("open_array.json", json.dumps(records(ENGLISH))[:-1].encode(), ENGLISH),
        ("cut_array.json", json.dumps(records(ENGLISH))[:-9].encode(), ENGLISH[:-1]),
        ("cut.csv", CSV[:-4].encode(), QUOTED[:-1]),
        ("odd.txt", GERMAN.encode("utf-16")[:-1], [GERMAN[:-1]]),
    ],
)
def test_cut_records(tmp_path, capsys, name, content, texts):
    write(tmp_path, {name: content})
    assert run("--source", tmp_path / name, "--out", tmp_path / "out", "--allow_skipped", 0.1) == 0
    expect(tmp_path / "out", texts)
    assert "WARNING damaged" in capsys.readouterr().err


def test_a_broken_record_in_an_array(tmp_path, capsys):
    rows = json.dumps(records(ENGLISH)).replace('"document number 200', '"docu"ment number 200')
    write(tmp_path, {"a.json": rows.encode()})
    assert run("--source", tmp_path / "a.json", "--out", tmp_path / "out") == 2
    is_refused(capsys, tmp_path / "out", "bytes cannot be used", "a record is no JSON")
    flags = ("--source", tmp_path / "a.json", "--out", tmp_path / "out", "--allow_skipped", 1)
    assert run(*flags) == 0
    expect(tmp_path / "out", ENGLISH[:200])


def test_skipped_documents_up_to_a_share(tmp_path, capsys):
    some = ENGLISH * 5
    write(tmp_path, {"a.jsonl": lines(some[:1500]) + b"{broken\n" * 15 + lines(some[1500:])})
    flags = ("--source", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert run(*flags, "--allow_skipped", 0.005) == 2
    is_refused(
        capsys, tmp_path / "out", "--allow_skipped 0.005", "15 of 2,015 documents", "15 lines"
    )
    assert run(*flags) == 0
    expect(tmp_path / "out", some)
    assert "15 lines that are not JSON" in capsys.readouterr().out


def test_work_is_kept_when_shards_were_written(tmp_path, capsys):
    write(tmp_path, {"a.jsonl": lines(ENGLISH * 20) + b"{broken\n" * 2000})
    out = tmp_path / "out"
    flags = ("--source", tmp_path / "a.jsonl", "--out", out, "--shard_tokens", 3000)
    assert run(*flags, "--val_tokens", 1000) == 2
    assert "goes on from here" in capsys.readouterr().err and not (out / "manifest.json").exists()
    assert run(*flags, "--val_tokens", 1000, "--allow_skipped", 0.5) == 0
    assert "going on from" in capsys.readouterr().out
    expect(out, ENGLISH * 20)


# --- Names and folders ----------------------------------------------------------------------------


def test_links_are_followed_and_circles_cut(tmp_path, capsys):
    corpus = write(tmp_path / "corpus", {"a.jsonl": lines(TEXTS), "in/c.txt": b"third"})
    write(tmp_path / "elsewhere", {"b.jsonl": lines(ENGLISH)})
    (corpus / "part2").symlink_to("../elsewhere")
    (corpus / "in" / "circle").symlink_to("..")
    (tmp_path / "elsewhere" / "again.jsonl").symlink_to("b.jsonl")
    assert run("--source", corpus, "--out", tmp_path / "out") == 0
    expect(tmp_path / "out", [*TEXTS, "third", *ENGLISH])
    assert "named twice, and read once" in capsys.readouterr().err
    (corpus / "in" / "circle").unlink()
    assert run("--source", corpus / "**" / "*.jsonl", "--out", tmp_path / "out2") == 0
    expect(tmp_path / "out2", TEXTS + ENGLISH)
    (corpus / "gone.jsonl").symlink_to("../nowhere")
    assert run("--source", corpus, "--out", tmp_path / "out3") == 2
    is_refused(capsys, tmp_path / "out3", "link to nothing", "gone.jsonl")


def test_unknown_endings_are_named(tmp_path, capsys):
    folder = write(tmp_path / "in", {"a.jsonl": lines(TEXTS), "part-00000": lines(ENGLISH)})
    write(folder, {"README.md": b"x" * 9999, ".cache/x.bin": b"x" * 9999, "LICENSE": b"x" * 9999})
    assert run("--source", folder, "--out", tmp_path / "out") == 2
    is_refused(capsys, tmp_path / "out", "1 file left out", "part-00000", "--format")
    assert run("--source", folder, "--out", tmp_path / "out", "--allow_skipped", 0.5) == 0
    assert "part-00000" in capsys.readouterr().err
    expect(tmp_path / "out", TEXTS)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [Path(path).name for path in manifest["left_out"]] == ["part-00000"]
    assert run("--source", folder, "--format", "jsonl", "--out", tmp_path / "out2") == 0
    expect(tmp_path / "out2", TEXTS + ENGLISH)
    (folder / "part-00000").unlink()
    for _ in range(2):  # the second time its own shards are there, which are no source
        assert run("--source", folder, "--out", folder / "shards") == 0
    assert "holds this data already" in capsys.readouterr().out
    shutil.rmtree(folder / "shards")
    write(folder, {"part-00000": b"x"})
    (folder / "a.jsonl").unlink()
    assert run("--source", folder, "--out", tmp_path / "out3") == 2
    is_refused(capsys, tmp_path / "out3", "holds no files", "part-00000")
    write(tmp_path / "packed", {"a.tar.gz": b"\x1f\x8b" + b"x" * 99, "b.txt": b"text"})
    assert run("--source", tmp_path / "packed", "--out", tmp_path / "out3") == 2
    is_refused(capsys, tmp_path / "out3", "a.tar.gz")


def test_the_same_file_in_both_splits(tmp_path, capsys):
    write(tmp_path, {"a.jsonl": lines(TEXTS), "v.jsonl": lines(ENGLISH), "e.jsonl": b""})
    flags = ("--source", tmp_path / "*.jsonl", "--val_source", tmp_path / "v.jsonl")
    assert run(*flags, "--out", tmp_path / "out") == 0
    expect(tmp_path / "out", ENGLISH + TEXTS)
    assert "v.jsonl is validation, and left out of training" in capsys.readouterr().err
    write(tmp_path, {"copies/1.jsonl": lines(TEXTS), "copies/2.jsonl": lines(TEXTS)})
    assert run("--source", tmp_path / "copies", "--out", tmp_path / "out1") == 0
    expect(tmp_path / "out1", TEXTS + TEXTS)
    assert "2.jsonl holds the same as" in capsys.readouterr().err
    flags = ("--source", tmp_path / "v.jsonl", "--val_source", tmp_path / "v.jsonl")
    assert run(*flags, "--out", tmp_path / "out2") == 2
    is_refused(capsys, tmp_path / "out2", "--source: nothing is left")


def test_splits_in_names_are_noticed(tmp_path, capsys):
    parts = {f"data/{s}-00000.jsonl": lines([s]) for s in ("train", "test", "validation")}
    write(tmp_path, parts | {"data/more.jsonl": lines(["trainer attested"])})
    assert run("--source", tmp_path / "data", "--out", tmp_path / "out") == 0
    assert "test, train, validation are all read as training" in capsys.readouterr().err
    flags = ("--source", tmp_path / "data", "--val_source", tmp_path / "data", "--split", "train")
    assert run(*flags, "--val_split", "validation", "--out", tmp_path / "out2") == 0
    expect(tmp_path / "out2", ["validation", "train"])


def test_paths_as_people_write_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"B\xfccher: 100% da\xc3\x9f")  # not UTF-8, and blanks and signs
    write(tmp_path / name, {"a b.jsonl": lines(TEXTS)})
    assert run("--source", f"~/{name}", "--out", "~/my out") == 0
    expect(tmp_path / "my out", TEXTS)
    said = capsys.readouterr().out
    assert "--data_dir '" in said and "my out' --use_tensorboard" in said
    assert not (tmp_path / "~").exists()
    (tmp_path / "x.jsonl").mkdir()
    write(tmp_path / "x.jsonl", {"real.jsonl": lines(ENGLISH)})
    assert run("--source", tmp_path / "*.jsonl", "--out", tmp_path / "out2") == 0
    expect(tmp_path / "out2", ENGLISH)


def test_parquet_with_a_name_that_is_not_utf_8(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(arrow_table(TEXTS), tmp_path / "a.parquet")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfc.parquet"))
    (tmp_path / "a.parquet").rename(path)
    assert run("--source", path, "--out", tmp_path / "out") == 0
    expect(tmp_path / "out", TEXTS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path, capsys):
    write(tmp_path, {"a.jsonl": lines(TEXTS)})
    (tmp_path / "a.jsonl").chmod(0)
    assert run("--source", tmp_path / "a.jsonl", "--out", tmp_path / "out") == 2
    is_refused(capsys, tmp_path / "out", "Permission denied")


# --- Pipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "bom", "array", "gz", "utf16", "csv", "text"])
def test_pipes_are_read_once(tmp_path, kind):
    data = {
        "jsonl": lines(TEXTS),
        "bom": codecs.BOM_UTF8 + lines(TEXTS),
        "array": pretty(records(TEXTS)),
        "gz": gzip.compress(lines(TEXTS)),
        "utf16": lines(TEXTS).decode().encode("utf-16"),
        "csv": ('"id";"text"\n' + "".join(f"1;{text}\n" for text in TEXTS)).encode(),
        "text": GERMAN.encode(),
    }[kind]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(data,), daemon=True).start()
    assert run("--source", pipe, "--out", tmp_path / "out") == 0
    expect(tmp_path / "out", [GERMAN] if kind == "text" else TEXTS)


def test_two_pipes_of_a_shell(tmp_path):
    write(tmp_path, {"a.jsonl": lines(TEXTS), "v.jsonl": lines(ENGLISH)})
    command = f"{sys.executable} {ROOT}/src/prepare_data.py --out out --workers 1"
    command += " --source <(cat a.jsonl) --val_source <(cat v.jsonl)"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    expect(tmp_path / "out", ENGLISH + TEXTS)


# --- Environments ---------------------------------------------------------------------------------


def command(*flags) -> list[str]:
    return [sys.executable, ROOT / "src" / "prepare_data.py", *map(str, flags), "--workers", "1"]


def test_python_O_gives_the_same_bytes(tmp_path):
    write(tmp_path, {"a.jsonl": lines(TEXTS), "v.jsonl": lines(ENGLISH)})
    flags = ("--source", "a.jsonl", "--val_source", "v.jsonl", "--out", "out")
    environment = os.environ | {"PYTHONOPTIMIZE": "1", "LC_ALL": "C"}
    environment.pop("HOME", None)
    subprocess.run(command(*flags), cwd=tmp_path, env=environment, check=True, capture_output=True)
    expect(tmp_path / "out", ENGLISH + TEXTS)


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path):
    write(tmp_path, {"a.jsonl": lines(TEXTS)})
    flags = command("--source", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    process = subprocess.Popen(flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    expect(tmp_path / "out", TEXTS)
