"""What is in a file of a corpus, from its beginning or a part of it: bytes, records, columns.

Sections: binary files, content, records, columns.
"""

import codecs
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import re
import sys

from tokens.sources import (
    DAMAGE,
    HEAD,
    TOO_LONG,
    SourceFile,
    long_window,
    look_inside,
    missing_key,
    unpacker,
)

MAX_RECORD = 256 << 20  # characters of one record of a JSON array, or of one field of CSV

# --- Binary files ---------------------------------------------------------------------------------


class RemoteFile(io.RawIOBase):
    """A file on the hub. `huggingface_hub` asks five times where a connection breaks."""

    def __init__(self, url: str):
        import fsspec

        filesystem, path = fsspec.url_to_fs(url)
        self.url = url
        # no read-ahead: it would fetch the other columns
        self.file = filesystem.open(path, "rb", cache_type="none")
        self.seek, self.tell = self.file.seek, self.file.tell

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self.file.read(len(buffer))
        except Exception as e:  # httpx, fsspec and the hub's client share no ancestor
            problem = f"{type(e).__name__}: {e}; the same command goes on later"
            raise ValueError(f"{self.url} cannot be read ({problem})") from None
        buffer[: len(data)] = data
        return len(data)


def open_raw(file: SourceFile):
    return RemoteFile(file.path) if "://" in file.path else open(file.path, "rb")


def open_pipe(file: SourceFile, args) -> io.BufferedReader:
    """Open a pipe, and find out what comes out of it."""
    raw = sys.stdin.buffer if file.path == "-" else open(file.path, "rb")  # noqa: SIM115
    head = raw.read(HEAD)
    look_inside(file, io.BytesIO(head), args)
    rest = iter(functools.partial(raw.read, 1 << 16), b"")
    return io.BufferedReader(Chunks(itertools.chain([head], rest)))


class Chunks(io.RawIOBase):
    """An iterator of bytes as a binary file."""

    def __init__(self, chunks):
        self.chunks, self.rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = chunk
        data = self.rest[: len(buffer)]
        self.rest = self.rest[len(data) :]
        buffer[: len(data)] = data
        return len(data)


# --- Content --------------------------------------------------------------------------------------


CUT = re.compile("(?i)truncated|not a gzip")  # not a checksum; something else behind the end


class Content:
    """The content of a file from its beginning, unpacked and as UTF-8, in chunks.

    Damage ends it: what stands before is given to the last byte, and `damage` says what it is.
    Where a file was cut that is exact; other damage shows only after garbage was unpacked.
    """

    def __init__(self, file: SourceFile, raw=None):
        self.file, self.damage, self.exact = file, "", True
        self.given = self.rest = 0  # bytes unpacked; of these, behind a damaged record
        self.raw = raw or open_raw(file)
        if isinstance(self.raw, io.RawIOBase):
            self.raw = io.BufferedReader(self.raw, 1 << 20)

    def position(self) -> int:
        """Return how many bytes of the file have been read."""
        if self.raw.closed:  # by Arrow, at the end
            return self.file.size
        if self.file.pipe:
            return 0
        if self.file.compression == "zst-long":  # whose program reads from the same descriptor
            return os.lseek(self.raw.fileno(), 0, os.SEEK_CUR)
        return min(self.raw.tell(), self.file.size or sys.maxsize)

    def lost(self) -> int:
        """Return how many bytes of the file are not read, or nothing is known of."""
        if not self.exact:
            return self.file.size or self.given
        rest = self.rest * self.position() // max(1, self.given)
        return max(1, self.file.size - self.position() + rest)

    def __iter__(self):
        return self.decoded(self.unpacked()) if self.file.encoding else self.unpacked()

    def unpacked(self):
        try:
            read = unpacker(self.raw, self.file.compression)
            while chunk := read(1 << 16):
                self.given += len(chunk)
                yield chunk
        except DAMAGE as e:
            if not self.file.compression or getattr(e, "errno", None):
                raise
            if TOO_LONG in str(e):  # a later frame of zstd than the first
                raise ValueError(long_window(self.file.path)) from None
            self.damage = str(e)
            self.exact = isinstance(e, EOFError) or bool(CUT.search(self.damage))
            if not self.file.pipe:
                yield self.rest_before_damage(self.given)

    def rest_before_damage(self, skip: int) -> bytes:
        """Come here again, and go on byte by byte: a read that fails loses what it had."""
        rest = bytearray()
        with contextlib.suppress(*DAMAGE), open_raw(self.file) as raw:
            read = unpacker(raw, self.file.compression)
            while skip and (chunk := read(min(skip, 1 << 16))):
                skip -= len(chunk)
            while byte := read(1):
                rest += byte
        return bytes(rest)

    def decoded(self, chunks):
        """Turn another encoding into UTF-8. What it does not know becomes a byte that is no UTF-8,
        which is counted later; UTF-16 and UTF-32 end there."""
        encoding = self.file.encoding
        errors = "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
        decode = codecs.getincrementaldecoder(encoding)(errors).decode
        for chunk in itertools.chain(chunks, [b""]):
            try:
                yield decode(chunk, not chunk).encode("utf-8", "surrogateescape")
            except UnicodeDecodeError as e:
                self.rest = len(e.object) - e.start
                self.damage = self.damage or f"{e.reason} in {encoding}"
                yield e.object[: e.start].decode(encoding).encode()
                return


# --- Records --------------------------------------------------------------------------------------


def value_of(record, key: str):
    """Return the text of a record; a tuple, the names of its fields, if it has none."""
    return record.get(key, tuple(record)) if isinstance(record, dict) else None


def json_records(content: Content, key: str):
    """Yield the texts of JSON arrays, or of JSON values that are spread over lines."""
    decode, scan = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode, JSON.raw_decode
    chunks, text, at, inside = iter(content), "", 0, False
    while True:
        at = BETWEEN_RECORDS.match(text, at).end()
        if at < len(text) and text[at] in "[]" and inside == (text[at] == "]"):
            at, inside = at + 1, not inside
            continue
        try:
            if at == len(text):
                raise ValueError("nothing is left")
            value, end = scan(text, at)
            if end == len(text) and not isinstance(value, dict | list | str):
                raise ValueError("a number may go on")
            yield value_of(value, key)
            at = end
            continue
        except RecursionError as e:
            content.damage = content.damage or f"{e}"
            return
        except ValueError as e:
            problem = e
        hopeless = isinstance(problem, json.JSONDecodeError) and not may_go_on(problem, text)
        pieces, more = [text[at:]], max(HEAD, len(text) - at)  # twice as much each time
        while not hopeless and more > 0 and (chunk := next(chunks, b"")):
            pieces.append(decode(chunk))
            more -= len(chunk)
        text, at = "".join(pieces), 0
        if len(pieces) == 1 or len(pieces[0]) > MAX_RECORD:
            if text.strip() or inside:
                content.damage = content.damage or f"a record is no JSON or not closed: {problem}"
                content.rest = len(text.encode(errors="ignore"))
            return


JSON = json.JSONDecoder()
BETWEEN_RECORDS = re.compile(r"[\s,\ufeff]*")


def may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Say if a record that is no JSON can become JSON with more text behind it."""
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16


def csv_records(content: Content, key: str):
    """Yield the texts of a column of CSV or TSV with a header; None for rows of another length."""
    csv.field_size_limit(MAX_RECORD)
    raw = io.BufferedReader(Chunks(iter(content)))
    lines = io.TextIOWrapper(raw, "utf-8", errors="surrogateescape", newline="")
    kept: list[str] = []  # the lines of a record

    def lines_kept():
        for line in lines:
            kept.append(line)
            yield line

    header = next(lines, "").removeprefix("\ufeff")
    separators = [s for s in "\t,;|" if key in next(csv.reader([header], delimiter=s), ())]
    if not header:
        return
    separator = (separators or ["\t" if "\t" in header else ","])[0]
    names = next(csv.reader([header], delimiter=separator))
    if not separators:
        raise ValueError(missing_key(content.file.path, key, names))
    column = names.index(key)
    rows = csv.reader(lines_kept(), delimiter=separator, strict=True)
    try:
        for row in rows:
            kept.clear()
            if row:
                yield row[column] if len(row) == len(names) else None
    except csv.Error as e:
        content.rest = sum(map(len, kept)) + sum(map(len, lines))
        content.damage = content.damage or f"line {rows.line_num + 1}: {e}"


def dataset_records(file: SourceFile, key: str, skip: int):
    """Yield the texts of whatever else `datasets` can read, and of what it saved."""
    import datasets

    if file.load.get("saved"):
        data = datasets.load_from_disk(file.path)
        data = data[file.load["split"]] if file.load["split"] else data
        for batch in data.select_columns(key).skip(skip).iter(1000):
            yield from batch[key]
        return
    for record in datasets.load_dataset(file.path, **file.load, streaming=True).skip(skip):
        if key not in record:
            raise ValueError(missing_key(file.path, key, record))
        yield record[key]


# --- Columns --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def open_parquet(path: str, key: str):
    """Open a Parquet file; raise ValueError if it is damaged or has no column `key`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if "://" in path:  # a column of a row group in one request
            parquet = pq.ParquetFile(RemoteFile(path), pre_buffer=True)
        else:  # page by page, however large a row group is
            named = path.isascii() or os.fsencode(path).decode(errors="replace") == path
            source = path if named else open(path, "rb")  # noqa: SIM115  pyarrow wants UTF-8
            parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, pa.ArrowException) as e:
        raise ValueError(f"{path} is no whole Parquet file ({e}): fetch it again") from None
    if key not in parquet.schema_arrow.names:
        raise ValueError(missing_key(path, key, parquet.schema_arrow.names))
    return parquet


def row_batches(parquet, file: SourceFile, rows: int, group: int, key: str):
    """Yield lists of up to `rows` texts of a row group, which is never in memory as a whole.

    Parquet does not promise that strings are UTF-8: where they are not, they come as bytes.
    """
    import pyarrow as pa

    try:
        for batch in parquet.iter_batches(rows, [group], [key], use_threads=False):
            column = batch.column(0)
            try:
                yield column.to_pylist()
            except UnicodeDecodeError:
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                yield column.cast(pa.large_binary()).to_pylist()
    except (OSError, pa.ArrowException) as e:
        where = f"{file.path}: row group {group} is damaged"
        raise ValueError(f"{where} ({e}): fetch the file again and remove --out") from None
