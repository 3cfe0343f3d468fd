"""A corpus as documents: find its files, read them, cut them into units of work.

Made for prepare_data.py. Sources: data sets of the Hugging Face hub and folders laid out like one,
resolved by `datasets`; Parquet, JSONL and plain text, also as .gz or .zst; standard input.

A unit is a list of spans with about 2 MiB of text together. Workers read the spans of files that
can be entered in the middle (lines, plain text, Parquet's row groups). What must be read from its
beginning (compressed files, standard input, large row groups) is read by the process that hands
out units, and its spans carry the bytes. The units of a source are the same every time, and from
the end of any of them on, so that a preparation can go on after a crash.

Sections: files of a source, the hub, reading, units of work, documents.
"""

import dataclasses
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

UNIT = 2 << 20  # bytes of text in one unit of work
MAX_ROW_GROUP = 8 << 20  # bytes of text in a row group that a worker reads as a whole
HUGE = 10_000_000  # characters from which on a document is reported as huge

# --- Files of a source ----------------------------------------------------------------------------

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
FORMATS |= {".txt": "text", ".text": "text"}  # no .md: every folder has a README
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
KNOWN = f"{' '.join(FORMATS)} (all but the first also with .gz or .zst)"
SAMPLE = 8 << 20  # bytes of a file that its fingerprint covers


@dataclasses.dataclass
class SourceFile:
    """One file of the corpus (or standard input, or a data set that only `datasets` can read)."""

    path: str  # a local path, the hub's hf://..., "-" or the data set
    name: str  # the path below the source's folder: what is compared at a restart
    split: str  # "train" or "val"
    kind: str  # "parquet", "jsonl", "text", "datasets"; standard input: "auto" until it is read
    compression: str = ""  # "gz", "zst"
    size: int = 0  # bytes; 0 if unknown
    mtime_ns: int = 0  # 0 where sha256 covers the whole file
    sha256: str = ""  # of a file of up to 8 MiB, or of 128 parts of it; of a URL: the server's ETag
    load: dict = dataclasses.field(default_factory=dict)  # "datasets": arguments of load_dataset

    def identity(self) -> list:
        """What must not change until the preparation is finished."""
        return [self.split, self.name, self.kind, self.size, self.mtime_ns, self.sha256]


def find_files(source: str, split: str, args, commit: str) -> tuple[list[SourceFile], str]:
    """The files behind `source`, and the hub's commit ("" for what is not of the hub).

    split: what they become, "train" or "val". args: name, split, val_split, revision, format.
    commit: what an earlier start of this preparation found. ValueError if there is nothing to read.
    """
    path = Path(source).expanduser()
    if source == "-":
        return [SourceFile("-", "-", split, args.format or "auto")], ""
    if path.is_file():
        return [named_file(str(path), path.name, split, args)], ""
    if path.is_dir():
        if args.name or hub_split(split, args) or has_configs(path / "README.md"):
            return hub_files(str(path), split, args, None), ""
        return folder_files(path, split, args), ""
    if glob.has_magic(source):
        found = [p for p in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(p)]
        if not found:
            raise ValueError(f"--source {source}: no file has such a name")
        return below_common_folder(found, split, args), ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not classify(source)[0]:
        commit = hub_commit(source, args.revision or commit or None)
        return hub_files(source, split, args, commit), commit
    hint = " (download it first)" if "://" in source else ""
    raise ValueError(f"--source {source}: there is no such file or folder{hint}")


def classify(path: str) -> tuple[str, str]:
    """(kind, compression) by the name's endings; kind "" if they say nothing."""
    base, ending = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(base)[1]
    return FORMATS.get(ending, ""), compression


def named_file(path: str, name: str, split: str, args) -> SourceFile:
    kind, compression = classify(path)
    kind = args.format or kind
    if not kind:
        raise ValueError(f"{path}: not one of {KNOWN}; add --format jsonl, text or parquet")
    if kind == "parquet" and compression:
        raise ValueError(f"{path}: unpack it first; Parquet is compressed inside")
    return sign(SourceFile(path, name, split, kind, compression))


def folder_files(folder: Path, split: str, args) -> list[SourceFile]:
    below = ((p, p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file())
    files = [
        named_file(str(path), name.as_posix(), split, args)
        for path, name in below
        if classify(path.name)[0] and not any(part.startswith(".") for part in name.parts)
    ]
    if not files:
        raise ValueError(f"--source {folder}: this folder holds no files of {KNOWN}")
    return files


def below_common_folder(paths: list[str], split: str, args) -> list[SourceFile]:
    root = os.path.commonpath([os.path.dirname(p) for p in paths])
    return [named_file(p, p[len(root) :].lstrip("/"), split, args) for p in paths]


def sign(file: SourceFile) -> SourceFile:
    """Fill in what tells whether a file is still the same later on."""
    try:
        if "://" in file.path:
            import fsspec

            filesystem, path = fsspec.url_to_fs(file.path)
            info = filesystem.info(path)
            file.size, file.sha256 = int(info.get("size") or 0), str(info.get("ETag") or "")
            if not file.size:
                raise OSError("the server does not tell its size")
            return file
        with open(file.path, "rb") as f:
            status, sha256 = os.fstat(f.fileno()), hashlib.sha256()
            file.size = status.st_size
            if file.size <= SAMPLE:
                sha256.update(f.read())
            else:
                file.mtime_ns = status.st_mtime_ns
                for i in range(128):
                    f.seek(i * (file.size - SAMPLE // 128) // 127)
                    sha256.update(f.read(SAMPLE // 128))
            file.sha256 = sha256.hexdigest()
            return file
    except Exception as e:  # httpx, fsspec and the hub's client share no ancestor
        raise ValueError(
            f"{file.path} cannot be read: {getattr(e, 'strerror', None) or e}"
        ) from None


# --- The hub --------------------------------------------------------------------------------------


def has_configs(readme: Path) -> bool:
    """Is this a data set's card, that is, does a block of YAML with `configs:` open it?"""
    text = readme.read_text("utf-8", "replace") if readme.is_file() else ""
    return text.startswith("---") and "\nconfigs:" in text.split("\n---")[0]


def hub_split(split: str, args) -> str | None:
    return (args.val_split if split == "val" else None) or args.split


def hub_commit(repository: str, revision: str | None) -> str:
    """The commit that a branch, tag or commit of a hub data set stands for; one request."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    nothing_here = f"--source {repository}: there is no such folder here, and"
    try:
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision, timeout=30).sha
    except RevisionNotFoundError:
        raise ValueError(f"--revision {revision}: {repository} has no such revision") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{nothing_here} no public data set of this name on the hub") from None
    except Exception as e:
        raise ValueError(
            f"{nothing_here} the Hugging Face hub cannot be reached ({type(e).__name__}: {e}): "
            "connect this machine, or bring the data set here and give its folder as --source"
        ) from None


def hub_files(source: str, split: str, args, commit: str | None) -> list[SourceFile]:
    """What `datasets` resolves for a hub data set, or for a local folder laid out like one.

    It knows the README's configurations and the naming schemes of splits. The files are then read
    by the code below, which can enter them in the middle and reads the text column alone. What only
    `datasets` can read (CSV, Arrow, ...) is streamed through it, by the main process.
    """
    import datasets

    wanted = hub_split(split, args) or "train"
    try:
        try:
            builder = datasets.load_dataset_builder(source, args.name, revision=commit)
        except datasets.exceptions.DataFilesNotFoundError:
            # A copy of one configuration: `datasets` insists on files of the README's first one.
            patterns = card_patterns(Path(source) / "README.md", args.name)
            builder = datasets.load_dataset_builder(source, data_files=patterns)
    except (OSError, ValueError) as e:
        raise ValueError(f"--source {source}: {' '.join(str(e).split())}") from None
    splits = {str(k): [str(p) for p in v] for k, v in (builder.config.data_files or {}).items()}
    if splits and wanted not in splits:
        raise ValueError(f"--split {wanted}: {source} has {', '.join(splits)}")
    paths = splits.get(wanted, [])
    if paths and all(classify(p)[0] for p in paths):
        return below_common_folder(paths, split, args)
    file = SourceFile(source, source, split, "datasets")
    file.load = {"name": args.name, "split": wanted, "revision": commit}
    if commit is None:
        file.name = "the data set"
        signed = [sign(SourceFile(p, p, split, "datasets")).identity()[3:] for p in paths]
        file.sha256 = hashlib.sha256(repr(signed).encode()).hexdigest()
    return [file]


def card_patterns(readme: Path, name: str | None) -> dict:
    """{split: patterns of file names} of one configuration in a data set's README."""
    import datasets
    import huggingface_hub

    card = huggingface_hub.DatasetCard.load(readme).data.to_dict() if readme.is_file() else {}
    patterns = {c["config_name"]: c.get("data_files") for c in card.get("configs") or []}
    if not patterns.get(name):
        raise ValueError(f"no data files for --name {name}; README.md has {', '.join(patterns)}")
    return datasets.data_files.sanitize_patterns(patterns[name])


# --- Reading --------------------------------------------------------------------------------------

BACK = 64  # bytes of context that the search for a cut may look back


class RemoteFile(io.RawIOBase):
    """A file on the hub; where a connection breaks, it is opened again and read on."""

    WAITS = (0, 0.2, 1, 5, 15, 30, 60)  # seconds before each attempt

    def __init__(self, url: str, size: int):
        self.url, self.size, self.position, self.file = url, size, 0, None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer) -> int:
        import fsspec

        wanted, done = max(0, min(len(buffer), self.size - self.position)), 0
        for wait_s in self.WAITS:
            time.sleep(wait_s)
            try:
                while done < wanted:
                    if self.file is None:  # no read-ahead: it would fetch the other columns
                        filesystem, path = fsspec.url_to_fs(self.url)
                        self.file = filesystem.open(path, "rb", cache_type="none")
                    self.file.seek(self.position)
                    data = self.file.read(wanted - done)
                    if not data:
                        raise EOFError("the answer ended early")
                    buffer[done : done + len(data)] = data
                    done += len(data)
                    self.position += len(data)
                return done
            except Exception as e:  # httpx, fsspec and the hub's client share no ancestor
                problem, self.file = f"{type(e).__name__}: {e}", None
        raise ValueError(f"{self.url} cannot be read ({problem}); the same command goes on later")


class Sniffed(io.RawIOBase):
    """Standard input whose first bytes have been looked at."""

    def __init__(self, raw):
        self.raw = raw
        self.head = raw.read(1 << 16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.head[: len(buffer)] if self.head else self.raw.read(len(buffer))
        self.head = self.head[len(data) :]
        buffer[: len(data)] = data
        return len(data)

    def identify(self, file: SourceFile) -> None:
        """Compression by its magic number; what begins with a brace is JSONL, the rest text."""
        if self.head.startswith(b"\x1f\x8b"):
            file.compression = "gz"
        elif self.head.startswith(b"\x28\xb5\x2f\xfd"):
            file.compression = "zst"
        if file.kind == "auto":
            damage = []
            head = next(decompressed(io.BytesIO(self.head), file.compression, damage), b"")
            file.kind = "jsonl" if head.lstrip()[:1] in (b"{", b"") else "text"


def open_raw(file: SourceFile):
    return RemoteFile(file.path, file.size) if "://" in file.path else open(file.path, "rb")


@functools.lru_cache(maxsize=1)
def open_parquet(path: str, size: int, key: str):
    """A ParquetFile with the column `key`; ValueError if it is damaged or has no such column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if "://" in path:  # a column of a row group in one request
            parquet = pq.ParquetFile(RemoteFile(path, size), pre_buffer=True)
        else:  # page by page, however large a row group is
            parquet = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, pa.ArrowException) as e:
        raise ValueError(f"{path} is no whole Parquet file ({e}): fetch it again") from None
    if key not in parquet.schema_arrow.names:
        raise ValueError(missing_key(path, key, parquet.schema_arrow.names))
    return parquet


def row_batches(parquet, file: SourceFile, rows: int, group: int, key: str):
    """Record batches of up to `rows` of the text column; never the whole row group in memory."""
    import pyarrow as pa

    try:
        yield from parquet.iter_batches(rows, [group], [key], use_threads=False)
    except (OSError, pa.ArrowException) as e:
        where = f"{file.path}: row group {group} is damaged"
        raise ValueError(f"{where} ({e}): fetch the file again and remove --out") from None


def missing_key(path: str, key: str, keys) -> str:
    return f"--text_key {key}: {path} has no such column; it has {', '.join(map(str, keys))}"


def decompressed(raw, compression: str, damage: list[str]):
    """The content of a stream in chunks. Damage ends it: what comes before is given, and the reason
    is appended to `damage`."""
    try:
        if compression == "gz":
            read = gzip.GzipFile(fileobj=raw).read1
        elif compression == "zst":
            import pyarrow as pa

            read = pa.CompressedInputStream(raw, "zstd").read
        else:
            read = raw.read
        while chunk := read(1 << 16):  # small: what a read that fails had is lost with it
            yield chunk
    except (OSError, EOFError, zlib.error) as e:
        if not compression or getattr(e, "errno", None):
            raise
        damage.append(str(e))


def cutter(file: SourceFile, separator: bytes):
    """The function cut(data, least): the first place at or after `least` where `data` may be cut
    between documents, or between tokens of one; -1 if there is none."""
    if file.kind == "jsonl":
        return functools.partial(cut_after, separator=b"\n")
    return functools.partial(cut_after, separator=separator) if separator else cut_before_space


def cut_after(data, least: int, separator: bytes) -> int:
    found = data.find(separator, max(0, least - len(separator)))
    return found + len(separator) if found >= 0 else -1


# A character other than white space, before a space or a line feed. Left out: the lead bytes C2, E1
# and E2 and E3 80 80, among whose characters there is white space.
BEFORE_SPACE = re.compile(
    rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe4-\xef][\x80-\xbf]{2}|\xe3[\x81-\xbf][\x80-\xbf]"
    rb"|\xe3\x80[\x81-\xbf]|[\xf0-\xf4][\x80-\xbf]{3})(?=[ \n])"
)


def cut_before_space(data, least: int) -> int:
    """GPT-2's pattern has no piece in which white space follows something else, and never looks
    back: before such a space a piece always begins, so the tokens on both sides stay the same."""
    for match in BEFORE_SPACE.finditer(data, max(0, least - 4)):
        if match.end() >= least:
            return match.end()
    return -1


def cut_stream(chunks, cut):
    """Blocks of at least UNIT bytes; where they end depends on the content alone."""
    buffer, search = bytearray(), UNIT
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > search:
            end = cut(buffer, search)
            if end < 0:
                search = max(UNIT, len(buffer) - BACK)
                break
            yield bytes(buffer[:end])
            del buffer[:end]
            search = UNIT
    if buffer:
        yield bytes(buffer)


def read_range(raw, start: int, stop: int, cut) -> bytes:
    """The bytes from the first cut at or after `start` to the first at or after `stop`."""
    origin = max(0, start - BACK)
    raw.seek(origin)
    data = bytearray(raw.read(stop - origin))
    begin = cut(data, start - origin) if start else 0
    if begin < 0:
        return b""  # inside of a long document, which belongs to the range where it begins
    search = stop - origin
    while (end := cut(data, search)) < 0:
        search = max(search, len(data) - BACK)
        more = raw.read(UNIT // 4)
        if not more:
            end = len(data)
            break
        data += more
    return bytes(data[begin:end])


# --- Units of work --------------------------------------------------------------------------------


@dataclasses.dataclass
class Span:
    """A stretch of one file: where to read it or, where only the main process can, what it read."""

    file: SourceFile
    next: tuple[int, int]  # where the following span begins: (index of the file, place in it)
    text_bytes: int  # estimated: decides how many spans make a unit
    weight: int  # bytes of the file: measures progress
    start: int = 0  # bytes, of the file
    stop: int = 0
    row_group: int | None = None
    data: bytes | list | None = None
    first: bool = False  # of its file
    damage: str = ""
    digest: str = ""  # SHA-256 of standard input up to here


def find_units(files: list[SourceFile], options: dict, place: tuple[int, int], digest: str):
    """The corpus as lists of spans: the same at every start, and from the end of every unit on.

    place: (index of the file, place in it) where to begin. digest: of standard input until there.
    """
    unit, size = [], 0
    for index in range(place[0], len(files)):
        file, skip = files[index], place[1] if index == place[0] else 0
        for span in find_spans(index, file, options, skip, digest if skip else ""):
            unit.append(span)
            size += span.text_bytes
            if size >= UNIT:
                yield unit
                unit, size = [], 0
        if unit and (index + 1 == len(files) or files[index + 1].split != file.split):
            yield unit
            unit, size = [], 0


def find_spans(index: int, file: SourceFile, options: dict, place: int, digest: str):
    if file.kind == "parquet":
        return parquet_spans(index, file, options["text_key"], place)
    if file.kind == "datasets":
        return dataset_spans(index, file, options["text_key"], place)
    if file.compression or file.path == "-":
        return stream_spans(index, file, options["separator"].encode(), place, digest)
    return range_spans(index, file, place)


def range_spans(index: int, file: SourceFile, place: int):
    """Plain lines and plain text, which a worker can enter anywhere. place: in bytes."""
    for start in range(place, max(1, file.size), UNIT):
        stop = min(start + UNIT, file.size)
        size = stop - start
        yield Span(file, (index, start + UNIT), size, size, start, stop, first=not start)


def stream_spans(index: int, file: SourceFile, separator: bytes, place: int, digest: str):
    """Compressed files and standard input: read here, in blocks. place: blocks done."""
    if file.path == "-":
        raw = Sniffed(sys.stdin.buffer)
        raw.identify(file)
    else:
        raw = open_raw(file)
    raw = io.BufferedReader(raw, 1 << 20) if isinstance(raw, io.RawIOBase) else raw
    damage, sha256, before, blocks = [], hashlib.sha256(), 0, 0
    stream = cut_stream(decompressed(raw, file.compression, damage), cutter(file, separator))
    for data in itertools.chain(stream, [b""]):
        if not data and blocks and not damage:
            break  # a last, empty block stands for an empty file or tells of the damage
        blocks += 1
        if file.path == "-":
            sha256.update(data)
            after = before + len(data)
        else:
            after = file.size if raw.closed else min(raw.tell(), file.size)  # Arrow closes it
        if blocks == place and digest not in ("", sha256.hexdigest()):
            raise ValueError(
                "standard input is not what this preparation was begun with: give it the same "
                "input again, or another --out"
            )
        if blocks > place:
            yield Span(
                file, (index, blocks), len(data), after - before, data=data, first=blocks == 1,
                damage="" if data else "".join(damage), digest=sha256.hexdigest(),
            )  # fmt: skip
        before = after
    if blocks < place:
        raise ValueError("standard input ends before the place that was reached the last time")


def parquet_spans(index: int, file: SourceFile, key: str, place: int):
    """Row groups; large ones are read here, in pieces. place: rows done."""
    import pyarrow as pa

    parquet, row = open_parquet(file.path, file.size, key), 0
    for group in range(parquet.metadata.num_row_groups):
        info = parquet.metadata.row_group(group)
        row += info.num_rows
        if row <= place or not info.num_rows:
            continue
        columns = map(info.column, range(info.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == key)
        weight = file.size * info.num_rows // parquet.metadata.num_rows
        if size <= MAX_ROW_GROUP:
            yield Span(file, (index, row), size, weight, row_group=group)
            continue
        done, rows = row - info.num_rows, max(1, info.num_rows * UNIT // size)
        for batch in row_batches(parquet, file, rows, group, key):
            done += batch.num_rows
            if done > place:
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as writer:
                    writer.write_batch(batch)
                share = weight * batch.num_rows // info.num_rows
                data = sink.getvalue().to_pybytes()
                yield Span(file, (index, done), batch.nbytes, share, data=data)


def dataset_spans(index: int, file: SourceFile, key: str, place: int):
    """Whatever else `datasets` can read, document by document. place: documents done."""
    import datasets

    texts, size, done = [], 0, place
    stream = datasets.load_dataset(file.path, **file.load, streaming=True)
    for record in stream.skip(place):
        if key not in record:
            raise ValueError(missing_key(file.path, key, record))
        texts.append(record[key])
        size += len(record[key]) if isinstance(record[key], str) else 1
        done += 1
        if size >= UNIT:
            yield Span(file, (index, done), size, 0, data=texts)
            texts, size = [], 0
    if texts:
        yield Span(file, (index, done), size, 0, data=texts)


# --- Documents ------------------------------------------------------------------------------------

COUNTS = {
    "empty": "empty documents (kept as a lone <|endoftext|>)",
    "invalid_utf8": "documents with bytes that are no UTF-8 (kept, U+FFFD in their place)",
    "with_nul": "documents with NUL characters (kept)",
    "huge": f"documents of more than {HUGE:,} characters (kept)",
    "not_text": "records without a text (key absent, null or not a string; skipped)",
    "broken_json": "lines that are not JSON (skipped; JSONL has a whole object on each line)",
    "blank": "blank lines or parts (skipped)",
}


def read_span(span: Span, options: dict, counts: Counter):
    """Lists of documents, or for plain text without a separator one string: a piece of a document,
    which begins with this span if `span.first`. Everything odd is counted."""
    file, key, separator = span.file, options["text_key"], options["separator"].encode()
    if file.kind == "parquet":
        for batch in span_batches(span, key):
            yield arrow_texts(batch.column(0), counts)
        return
    data = span.data
    if data is None:
        with open_raw(file) as raw:
            data = read_range(raw, span.start, span.stop, cutter(file, separator))
    if file.kind == "datasets":
        yield checked(data, counts)
    elif file.kind == "jsonl":
        data = data.removeprefix(b"\xef\xbb\xbf") if span.first else data  # a byte order mark
        yield json_texts(data, key, counts)
    elif separator:
        yield checked(split_parts(data, separator, counts), counts)
    else:
        counts["empty"] += span.first and not data
        counts["huge"] += span.first and max(file.size, len(data)) > HUGE
        counts["with_nul"] += b"\0" in data
        yield decode(data, counts)


def span_batches(span: Span, key: str):
    if span.data is None:
        parquet = open_parquet(span.file.path, span.file.size, key)
        return row_batches(parquet, span.file, 4096, span.row_group, key)
    import pyarrow as pa

    return pa.ipc.open_stream(span.data)


def checked(values: list, counts: Counter) -> list[str]:
    """The texts among `values` (strings or bytes), everything odd counted."""
    texts = []
    for text in values:
        if isinstance(text, bytes):
            text = decode(text, counts)
        if not isinstance(text, str):
            counts["not_text"] += 1
            continue
        texts.append(text)
        if not text:
            counts["empty"] += 1
        if "\0" in text:
            counts["with_nul"] += 1
        if len(text) > HUGE:
            counts["huge"] += 1
    return texts


def decode(data: bytes, counts: Counter) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        counts["invalid_utf8"] += 1
        return data.decode(errors="replace")


def split_parts(data: bytes, separator: bytes, counts: Counter) -> list[str]:
    """The parts of `data` between separators, without the blank ones."""
    try:
        texts = data.decode().split(separator.decode())
    except UnicodeDecodeError:
        texts = [decode(part, counts) for part in data.split(separator)]
    if not texts[-1]:
        texts.pop()  # what is after the last separator is no part
    filled = [text for text in texts if text and not text.isspace()]
    counts["blank"] += len(texts) - len(filled)
    return filled


def json_texts(data: bytes, key: str, counts: Counter) -> list[str]:
    """The texts of a block of JSON lines."""
    values = []
    for line in split_parts(data, b"\n", counts):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            counts["broken_json"] += 1
        else:
            values.append(record.get(key) if isinstance(record, dict) else None)
    return checked(values, counts)


def arrow_texts(column, counts: Counter) -> list[str]:
    """The texts of a column of Parquet, which does not promise that strings are UTF-8."""
    import pyarrow as pa

    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        values = column.cast(pa.large_binary()).to_pylist()
    return checked(values, counts)
