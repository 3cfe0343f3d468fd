"""The documents of a corpus: its files read, decoded and cut into units of work.

A unit is a list of spans with about 2 MiB of text together. Workers read the spans of files that
can be entered in the middle (lines, plain text, Parquet's row groups). What must be read from its
beginning (compressed files, pipes, other encodings than UTF-8, JSON arrays, CSV, large row
groups) is read by the process that hands out units, and its spans carry the content. The units of a
source are the same every time, and from the end of any of them on, so that a preparation can go on
after a crash.

Sections: cutting, units of work, documents.
"""

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections import Counter

from tokens.content import (
    Content,
    csv_records,
    dataset_records,
    json_records,
    open_parquet,
    open_pipe,
    open_raw,
    row_batches,
)
from tokens.sources import SourceFile

UNIT = 2 << 20  # bytes of text in one unit of work
MAX_ROW_GROUP = 8 << 20  # bytes of text in a row group that a worker reads as a whole
HUGE = 10_000_000  # characters from which on a document is reported as huge

# --- Cutting --------------------------------------------------------------------------------------

BACK = 64  # bytes of context that the search for a cut may look back


def cutter(file: SourceFile, separator: str):
    """The function cut(data, least): the first place at or after `least` where `data` may be cut
    between documents, or between tokens of one; -1 if there is none."""
    if file.kind == "jsonl":
        separator = "\n"
    return functools.partial(cut_after, separator=separator) if separator else cut_before_space


@functools.cache
def separator_pattern(separator: str, at_cut: bool = False) -> re.Pattern[bytes]:
    """A separator in bytes; its line ends may be those of Windows.

    at_cut: not inside of a run of its characters, where pairs depend on the beginning of the run.
    """
    pattern = re.escape(separator.encode())
    pattern = pattern if "\r" in separator else pattern.replace(b"\\\n", b"\r?\n")
    if at_cut and overlaps(separator):
        first = re.escape(separator[:1].encode())
        pattern = b"(?<!%b)(?<!%b\r)" % (first, first) + pattern
    return re.compile(pattern)


def overlaps(separator: str) -> bool:
    """Does a separator end as it begins? Then where it stands depends on what was read before."""
    return any(separator[:i] == separator[-i:] for i in range(1, len(separator)))


def cut_after(data, least: int, separator: str) -> int:
    length = len(separator.encode())
    for found in separator_pattern(separator, True).finditer(data, max(0, least - 2 * length)):
        if found.end() >= least:
            return found.end()
    return -1


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
    lost: int = 0  # bytes of the file behind the damage
    digest: str = ""  # SHA-256 of a pipe up to here


def find_units(files: list[SourceFile], args, place: tuple[int, int], digest: str):
    """The corpus as lists of spans: the same at every start, and from the end of every unit on.

    args: text_key, separator, format, encoding. place: (index of the file, place in it) where to
    begin. digest: of what a pipe gave until there.
    """
    unit, size = [], 0
    for index in range(place[0], len(files)):
        file, skip = files[index], place[1] if index == place[0] else 0
        for span in find_spans(index, file, args, skip, digest if skip else ""):
            unit.append(span)
            size += span.text_bytes
            if size >= UNIT:
                yield unit
                unit, size = [], 0
        if unit and (index + 1 == len(files) or files[index + 1].split != file.split):
            yield unit
            unit, size = [], 0


def find_spans(index: int, file: SourceFile, args, place: int, digest: str):
    key = args.text_key
    raw = open_pipe(file, args) if file.pipe else None
    if file.kind == "parquet":
        return parquet_spans(index, file, key, place)
    if file.kind == "datasets":
        return record_spans(index, file, dataset_records(file, key, place), place, done=place)
    if file.kind == "json":
        content = Content(file, raw)
        values = (value_of(record, key) for record in json_records(content))
        return record_spans(index, file, values, place, content)
    if file.kind == "csv":
        content = Content(file, raw)
        return record_spans(index, file, csv_records(content, key), place, content)
    entered = not file.compression and not file.encoding and not overlaps(args.separator)
    if not entered or file.pipe or "://" in file.path:
        return stream_spans(index, file, Content(file, raw), args.separator, place, digest)
    return range_spans(index, file, place)


def check_columns(file: SourceFile, key: str) -> None:
    """ValueError if a file is damaged at its end or has no column `key`, without reading it all."""
    if file.kind == "parquet" and "://" not in file.path:
        open_parquet(file.path, file.size, key)
    elif file.kind == "csv" and not file.pipe:
        next(csv_records(Content(file), key), None)


def range_spans(index: int, file: SourceFile, place: int):
    """Plain lines and plain text, which a worker can enter anywhere. place: in bytes."""
    for start in range(place, max(1, file.size), UNIT):
        stop = min(start + UNIT, file.size)
        size = stop - start
        yield Span(file, (index, start + UNIT), size, size, start, stop, first=not start)


def stream_spans(
    index: int, file: SourceFile, content: Content, separator: str, place: int, digest: str
):
    """Lines and plain text read here, in blocks. place: blocks done."""
    sha256, before, blocks = hashlib.sha256(), 0, 0
    for data in itertools.chain(cut_stream(content, cutter(file, separator)), [b""]):
        if not data and blocks and not content.damage:
            break  # a last, empty block stands for an empty file or tells of the damage
        blocks += 1
        if file.pipe:
            sha256.update(data)
            after = before + len(data)
        else:
            after = content.position()
        if blocks == place and digest not in ("", sha256.hexdigest()):
            raise ValueError(
                "standard input is not what this preparation was begun with: give it the same "
                "input again, or another --out"
            )
        if blocks > place:
            span = Span(file, (index, blocks), len(data), after - before, data=data)
            span.first = blocks == 1
            span.digest = sha256.hexdigest() if file.pipe else ""
            if not data and content.damage:
                span.damage, span.lost = content.damage, content.lost()
            yield span
        before = after
    if blocks < place:
        raise ValueError("standard input ends before the place that was reached the last time")


def record_spans(
    index: int, file: SourceFile, values, place: int, content: Content | None = None, done: int = 0
):
    """Documents that come one by one, read here. place: documents done at the last start; done:
    those that `values` leaves out."""
    texts, size, before = [], 0, 0
    for value in itertools.chain(values, [END]):
        if value is not END:
            done += 1
            if done <= place:
                continue
            texts.append(value)
            size += len(value) if isinstance(value, str) else 1
        if size >= UNIT or (value is END and (texts or (content and content.damage))):
            after = content.position() if content else 0
            span = Span(file, (index, done), size, after - before, data=texts)
            if value is END and content and content.damage:
                span.damage, span.lost = content.damage, content.lost()
            yield span
            texts, size, before = [], 0, after


END = object()


def parquet_spans(index: int, file: SourceFile, key: str, place: int):
    """Row groups; large ones are read here, in pieces. place: rows done."""
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
                share = weight * batch.num_rows // info.num_rows
                yield Span(file, (index, done), batch.nbytes, share, data=packed(batch))


def packed(batch) -> bytes:
    """A record batch as bytes that a worker can read."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


# --- Documents ------------------------------------------------------------------------------------

SKIPPED = {  # documents that are not in the shards
    "not_text": "records without a text (key absent, null or not a string; skipped)",
    "broken_json": "lines that are not JSON (skipped; JSONL has a whole object on each line)",
}
COUNTS = {
    "empty": "empty documents (kept as a lone <|endoftext|>)",
    "invalid_utf8": "documents with bytes that are no UTF-8 (kept, U+FFFD in their place; "
    "--encoding cp1252, say, reads them as something else)",
    "with_nul": "documents with NUL characters (kept)",
    "huge": f"documents of more than {HUGE:,} characters (kept)",
    **SKIPPED,
    "blank": "blank lines or parts (skipped)",
    "eot_text": "times <|endoftext|> stands in plain text (kept as text; where it ends documents, "
    "give --separator '<|endoftext|>')",
    "cr_lines": "pieces of text whose lines end in a carriage return alone (kept; tr '\\r' '\\n' "
    "makes lines of them)",
}


class Tally(Counter):
    """What is odd about documents, by the keys of COUNTS; and documents, characters, replaced
    (characters, by U+FFFD)."""

    fields: tuple = ()  # of a record without the text key


def read_span(span: Span, options: dict, counts: Tally):
    """Lists of documents, or for plain text without a separator one string: a piece of a document,
    which begins with this span if `span.first`. Everything odd is counted."""
    file, key, separator = span.file, options["text_key"], options["separator"]
    if file.kind == "parquet":
        for batch in span_batches(span, key):
            yield arrow_texts(batch.column(0), counts)
        return
    if isinstance(span.data, list):
        yield checked(map(with_bad_bytes, span.data), counts)
        return
    data = span.data
    if data is None:
        with open_raw(file) as raw:
            data = read_range(raw, span.start, span.stop, cutter(file, separator))
        data = data.removeprefix(codecs.BOM_UTF8) if span.first else data
    if file.kind == "jsonl":
        yield json_texts(data, key, counts)
        return
    if separator:
        texts = checked(split_parts(data, separator, counts), counts)
        yield texts
    else:
        counts["empty"] += span.first and not data
        counts["huge"] += span.first and max(file.size, len(data)) > HUGE
        counts["with_nul"] += b"\0" in data
        text = decode(data, counts)
        counts["characters"] += len(text)
        counts["cr_lines"] += "\r" in text and "\n" not in text
        texts = [text]
        yield text
    counts["eot_text"] += sum(text.count("<|endoftext|>") for text in texts)


def span_batches(span: Span, key: str):
    if span.data is None:
        parquet = open_parquet(span.file.path, span.file.size, key)
        return row_batches(parquet, span.file, 4096, span.row_group, key)
    import pyarrow as pa

    return pa.ipc.open_stream(span.data)


def value_of(record, key: str):
    """The text of a record; a tuple, the names of its fields, if it has none."""
    return record.get(key, tuple(record)) if isinstance(record, dict) else None


def with_bad_bytes(text):
    """Bytes instead of a string in which bytes that are no UTF-8 stand as lone surrogates."""
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            with contextlib.suppress(UnicodeEncodeError):
                return text.encode("utf-8", "surrogateescape")
    return text


def checked(values, counts: Tally) -> list[str]:
    """The texts among `values` (strings or bytes), everything odd counted."""
    texts = []
    for text in values:
        if isinstance(text, bytes):
            text = decode(text, counts)
        if not isinstance(text, str):
            counts["not_text"] += 1
            if isinstance(text, tuple) and not counts.fields:
                counts.fields = text
            continue
        texts.append(text)
        counts["characters"] += len(text)
        if not text:
            counts["empty"] += 1
        if "\0" in text:
            counts["with_nul"] += 1
        if len(text) > HUGE:
            counts["huge"] += 1
    return texts


def decode(data: bytes, counts: Tally) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        counts["invalid_utf8"] += 1
        text = data.decode(errors="replace")
        counts["replaced"] += text.count("\ufffd") - data.count("\ufffd".encode())
        return text


def split_parts(data: bytes, separator: str, counts: Tally) -> list[str]:
    """The parts of `data` between separators, without the blank ones."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        texts = [decode(part, counts) for part in separator_pattern(separator).split(data)]
    else:
        if "\r" in text and "\r" not in separator:
            texts = re.split(separator_pattern(separator).pattern.decode(), text)
        else:
            texts = text.split(separator)
    if not texts[-1]:
        texts.pop()  # what is after the last separator is no part
    filled = [text for text in texts if text and not text.isspace()]
    counts["blank"] += len(texts) - len(filled)
    return filled


def json_texts(data: bytes, key: str, counts: Tally) -> list[str]:
    """The texts of a block of JSON lines."""
    values = []
    for line in split_parts(data, "\n", counts):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            try:
                record = json.loads(line.strip().strip("\ufeff,"))  # of files that were joined
            except (ValueError, RecursionError):
                counts["broken_json"] += 1
                continue
        values.append(value_of(record, key))
    return checked(values, counts)


def arrow_texts(column, counts: Tally) -> list[str]:
    """The texts of a column of Parquet, which does not promise that strings are UTF-8."""
    import pyarrow as pa

    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        values = column.cast(pa.large_binary()).to_pylist()
    return checked(values, counts)
