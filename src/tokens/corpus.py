"""The documents of a corpus: its files read, decoded and cut into units of work.

A unit is a list of spans with about 2 MiB of text together. Parquet's row groups, which take long
to unpack, are read by the workers; everything else by the process that hands out units, at some
hundred megabytes a second. The units of a source are the same every time, and from the end of any
of them on, so that a preparation can go on after a crash.

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
    value_of,
)
from tokens.sources import SourceFile

UNIT = 2 << 20  # bytes of text in one unit of work
MAX_ROW_GROUP = 8 << 20  # bytes of text in a row group that a worker reads as a whole
HUGE = 10_000_000  # characters from which on a document is reported as huge

# --- Cutting --------------------------------------------------------------------------------------

BACK = 64  # bytes of context that the search for a cut may look back


def cutter(file: SourceFile, separator: str):
    """Return the function cut(data, least): the first place at or after `least` where `data` may be
    cut between documents, or between tokens of one; -1 if there is none."""
    if file.kind == "jsonl":
        separator = "\n"
    return functools.partial(cut_after, separator=separator) if separator else cut_before_space


@functools.cache
def separator_pattern(separator: str, at_cut: bool = False) -> re.Pattern[bytes]:
    """Return a separator as bytes to be found; its line ends may be those of Windows.

    at_cut: not inside of a run of its characters, where pairs depend on the beginning of the run.
    """
    pattern = re.escape(separator.encode())
    pattern = pattern if "\r" in separator else pattern.replace(b"\\\n", b"\r?\n")
    if at_cut and overlaps(separator):
        first = re.escape(separator[:1].encode())
        pattern = b"(?<!%b)(?<!%b\r)" % (first, first) + pattern
    return re.compile(pattern)


def overlaps(separator: str) -> bool:
    """Say if a separator ends as it begins: then where it stands depends on what was before."""
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
    """Find a place before white space. GPT-2's pattern has no piece in which white space follows
    something else, and never looks back: a piece always begins there, the tokens stay the same."""
    for match in BEFORE_SPACE.finditer(data, max(0, least - 4)):
        if match.end() >= least:
            return match.end()
    return -1


def cut_stream(chunks, cut):
    """Yield blocks of at least UNIT bytes; where they end depends on the content alone."""
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


# --- Units of work --------------------------------------------------------------------------------


@dataclasses.dataclass
class Span:
    """A stretch of one file: the row group to read, or what was read."""

    file: SourceFile
    next: tuple[int, int]  # where the following span begins: (index of the file, place in it)
    text_bytes: int  # estimated: decides how many spans make a unit
    weight: int  # bytes of the file: measures progress
    row_group: int | None = None
    data: bytes | list | None = None
    first: bool = False  # of its file
    damage: str = ""
    lost: int = 0  # bytes of the file behind the damage
    digest: str = ""  # SHA-256 of a pipe up to here


def find_units(files: list[SourceFile], args, place: tuple[int, int], digest: str):
    """Yield the corpus as lists of spans: the same at every start, and from every unit's end on.

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


def find_spans(index: int, file: SourceFile, args, done: int, digest: str):
    """Yield the spans of a file. done: bytes of its text, or records, that are behind us."""
    key = args.text_key
    raw = open_pipe(file, args) if file.pipe else None
    if file.kind == "parquet":
        yield from parquet_spans(index, file, key, done)
        return
    content = None if file.kind == "datasets" else Content(file, raw)
    if file.kind in ("jsonl", "text"):
        chunks, sha256 = skip(content, done, digest)
        blocks = text_blocks(chunks, cutter(file, args.separator), done, sha256 if raw else None)
    elif file.kind == "datasets":
        blocks = record_blocks(dataset_records(file, key, done), done)
    else:
        values = json_records(content, key) if file.kind == "json" else csv_records(content, key)
        for _ in itertools.islice(values, done):
            pass
        blocks = record_blocks(values, done)
    before = content.position() if content else 0
    for data, size, place, digest in blocks:
        weight = content.position() - before if content else 0
        span = Span(file, (index, place), size, weight, data=data, first=not done, digest=digest)
        before, done = before + weight, place
        yield span
    if content and (content.damage or not done):  # an empty file is an empty document
        end = Span(file, (index + 1, 0), 0, content.position() - before, data=b"", first=not done)
        end.damage, end.lost = content.damage, content.lost() if content.damage else 0
        yield end
    if content:
        content.raw.close()


def skip(content: Content, done: int, digest: str):
    """Go behind the first bytes of a text; return the chunks from there, and the SHA-256 so far.

    Raise ValueError if these are not the bytes with this `digest`.
    """
    chunks, sha256 = iter(content), hashlib.sha256()
    if not (content.file.pipe or content.file.compression or content.file.encoding):
        content.raw.seek(done)
        return chunks, sha256
    chunk = b""
    while done and (chunk := next(chunks, b"")):
        if content.file.pipe:
            sha256.update(chunk[:done])
        chunk, done = chunk[done:], max(0, done - len(chunk))
    if done:
        raise ValueError("standard input ends before the place that was reached the last time")
    if digest not in ("", sha256.hexdigest()):
        raise ValueError(
            "standard input is not what this preparation was begun with: give it the same input "
            "again, or another --out"
        )
    return itertools.chain([chunk], chunks), sha256


def text_blocks(chunks, cut, done: int, sha256):
    """Yield (bytes, their number, bytes done, SHA-256 until there) of lines or plain text.

    sha256: of what is behind us, for what comes out of a pipe.
    """
    for data in cut_stream(chunks, cut):
        text = data if done else data.removeprefix(codecs.BOM_UTF8)
        done += len(data)
        if sha256:
            sha256.update(data)
        yield text, len(data), done, sha256.hexdigest() if sha256 else ""


def record_blocks(values, done: int):
    """Yield (documents, their size, documents done, "") of documents that come one by one."""
    texts, size = [], 0
    for value in values:
        texts.append(value)
        size += len(value) if isinstance(value, str) else 1
        if size >= UNIT:
            done += len(texts)
            yield texts, size, done, ""
            texts, size = [], 0
    if texts:
        yield texts, size, done + len(texts), ""


def parquet_spans(index: int, file: SourceFile, key: str, done: int):
    """Yield row groups; the rows of large ones are read here, some at a time. done: in rows."""
    parquet, row = open_parquet(file.path, key), 0
    for group in range(parquet.metadata.num_row_groups):
        info = parquet.metadata.row_group(group)
        begin, row = row, row + info.num_rows
        if row <= max(begin, done):
            continue
        columns = map(info.column, range(info.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == key)
        weight = file.size * info.num_rows // parquet.metadata.num_rows
        if size <= MAX_ROW_GROUP:
            yield Span(file, (index, row), size, weight, row_group=group)
            continue
        for texts in row_batches(parquet, file, max(1, info.num_rows * UNIT // size), group, key):
            begin += len(texts)
            share = len(texts) / info.num_rows
            if begin > done:
                place = (index, begin)
                yield Span(file, place, int(size * share), int(weight * share), data=texts)


def check_columns(file: SourceFile, key: str) -> None:
    """Raise ValueError if a file has a damaged end or no column `key`; without reading it all."""
    if file.kind == "parquet" and "://" not in file.path:
        open_parquet(file.path, key)
    elif file.kind == "csv" and not file.pipe:
        with open_raw(file) as raw:
            next(csv_records(Content(file, raw), key), None)


# --- Documents ------------------------------------------------------------------------------------

SKIPPED = {  # documents that are not in the shards
    "not_text": "records without a text (key absent, null or not a string, in CSV more or fewer "
    "fields than its header; skipped)",
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
    """Yield lists of documents, or for plain text without a separator one string: a piece of a
    document, which begins with this span if `span.first`. Everything odd is counted."""
    file, data, key = span.file, span.data, options["text_key"]
    if span.row_group is not None:
        parquet = open_parquet(file.path, key)
        for values in row_batches(parquet, file, 4096, span.row_group, key):
            yield checked(values, counts)
    elif isinstance(data, list):
        yield checked(map(with_bad_bytes, data), counts)
    elif file.kind == "jsonl":
        yield json_texts(data, key, counts)
    elif file.kind == "text":
        if options["separator"]:
            texts = yielded = checked(split_parts(data, options["separator"], counts), counts)
        else:
            counts["empty"] += span.first and not data
            counts["huge"] += span.first and max(file.size, len(data)) > HUGE
            counts["with_nul"] += b"\0" in data
            yielded = decode(data, counts)
            texts = [yielded]
            counts["characters"] += len(yielded)
            counts["cr_lines"] += "\r" in yielded and "\n" not in yielded
        counts["eot_text"] += sum(text.count("<|endoftext|>") for text in texts)
        yield yielded


def with_bad_bytes(text):
    """Return bytes for a string in which bytes that are no UTF-8 stand as lone surrogates."""
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            with contextlib.suppress(UnicodeEncodeError):
                return text.encode("utf-8", "surrogateescape")
    return text


def checked(values, counts: Tally) -> list[str]:
    """Return the texts among `values` (strings or bytes), and count everything odd."""
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
        counts["empty"] += not text
        counts["with_nul"] += "\0" in text
        counts["huge"] += len(text) > HUGE
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
    """Return the parts of `data` between separators, without the blank ones."""
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
    """Return the texts of a block of JSON lines."""
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
