"""TensorBoard's event files: records, as bytes and as what they say of a run. Loads no torch.

An event file is a row of records: uint64 length, masked CRC-32C of it, the Event's bytes, masked
CRC-32C of those (TensorFlow's TFRecord format). TensorBoard reads the files of a folder in the
order of their names, which begin with ten digits of unix time.

Sections: Records · Text · Reading
"""

import contextlib
import functools
import os
import re
import socket
import struct
import time
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import (
    CRC_TABLE,
    crc_update,
    masked_crc32c,
)
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from basics.words import plain

# --- Records --------------------------------------------------------------------------------------

CRC_TABLE_NUMPY = np.array(CRC_TABLE, np.uint32)
BATCH_BYTES = 4 << 20  # how much of a file is in memory at a time


def crc32c_of_many(records: Sequence[bytes]) -> list[int]:
    """Return the masked CRC-32C of each record, byte column by byte column over all at once.

    TensorBoard's own function takes 0.2 µs a byte: 0.1 s for one dump of histograms, 20 s for the
    file of a long run. This is 10 to 100 times faster for many records of similar length.
    """
    order = sorted(range(len(records)), key=lambda i: -len(records[i]))
    lengths = np.array([len(records[i]) for i in order])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    flat = np.frombuffer(b"".join(records[i] for i in order), np.uint8)
    crc = np.full(len(records), 0xFFFFFFFF, np.uint32)
    longer = len(records) - np.searchsorted(np.sort(lengths), np.arange(max(lengths)), "right")
    columns = np.count_nonzero(longer >= 16)  # fewer at a time: TensorBoard's function is faster
    for column in range(columns):
        n = longer[column]
        byte = flat[starts[:n] + column]
        crc[:n] = CRC_TABLE_NUMPY[(crc[:n] ^ byte) & 0xFF] ^ (crc[:n] >> 8)
    crc ^= 0xFFFFFFFF
    masked = [0] * len(records)
    for i, value in zip(order, crc.tolist(), strict=True):
        if len(records[i]) > columns:
            value = crc_update(value, records[i][columns:])
        masked[i] = (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    return masked


@functools.lru_cache(maxsize=4096)
def header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + struct.pack("<I", masked_crc32c(packed))


def frame(events: Iterable[bytes]) -> bytes:
    """Return the bytes of an event file that hold these serialized events."""
    events = list(events)
    crcs = crc32c_of_many(events) if len(events) >= 16 else map(masked_crc32c, events)
    return b"".join(
        header(len(e)) + e + struct.pack("<I", c) for e, c in zip(events, crcs, strict=True)
    )


@dataclass
class Place:
    """Says how far a file has been read, and what of it could not be."""

    end: int = 0  # bytes up to the last whole record
    bad: int = 0  # whole records with a wrong checksum or no Event inside
    tail: int = 0  # bytes from the first place where no record begins, to the end
    cut: bool = True  # that tail is the beginning of a record: a writer was killed, or is at it


def read_records(path: Path, place: Place) -> Iterator[list[bytes]]:
    """Yield batches of the whole records behind `place`, about BATCH_BYTES each, and move it on.
    The event in a record is record[12:-4]."""
    batch: list[bytes] = []
    place.tail, place.cut = 0, True

    def good() -> list[bytes]:
        crcs = crc32c_of_many([record[12:-4] for record in batch])
        ok = [r for r, crc in zip(batch, crcs, strict=True) if r[-4:] == struct.pack("<I", crc)]
        place.bad += len(batch) - len(ok)
        place.end += sum(map(len, batch))
        batch.clear()
        return ok

    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - place.end
        file.seek(place.end)
        size = 0
        while left > 0:
            start = file.read(12)
            length = struct.unpack_from("<Q", start)[0] if len(start) == 12 else 0
            place.cut = len(start) < 12 or start == header(length)
            if len(start) < 12 or not place.cut or 16 + length > left:
                place.tail = left
                break
            batch.append(start + file.read(length + 4))
            left -= len(batch[-1])
            size += len(batch[-1])
            if size > BATCH_BYTES:
                yield good()
                size = 0
        if batch:
            yield good()


def event_files(folder: Path) -> list[Path]:
    """Return the event files directly in the folder, in the order in which TensorBoard reads."""
    return sorted(p for p in folder.iterdir() if "tfevents" in p.name and p.is_file())


def next_path(folder: Path) -> Path:
    """Return a new event file's path. It sorts behind every older one, whatever the clock says:
    TensorBoard hides a file that sorts before one that it has already read."""
    seconds = int(time.time())
    for path in event_files(folder):
        if match := re.match(r"events\.out\.tfevents\.(\d{10})(?!\d)", path.name):
            seconds = max(seconds, int(match[1]) + 1)
    host = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())
    return folder / f"events.out.tfevents.{seconds:010d}.{host}.{os.getpid()}"


# --- Text -----------------------------------------------------------------------------------------

WRAP = 72  # columns; TensorBoard shows a code block unwrapped, and a phone has room for 74


def as_code(text: str) -> str:
    """Return Markdown that shows `text` as it is. TensorBoard renders text as Markdown in which
    links and pictures live: what a model writes must not reach it. Each line is indented by four
    spaces (a code block) behind every kind of line break; control characters, some of which the
    Markdown library uses as its own marks, become �.

    Lines are wrapped behind a space, which stays: only a line that goes on in the next one ends
    with a space (spaces at the ends of the text's own lines are dropped). A longer word stays
    whole. from_code takes it back."""
    lines = [plain(line).rstrip(" ") for line in text.splitlines() or [""]]
    return "\n".join("    " + part for line in lines for part in _wrapped(line))


def _wrapped(line: str) -> Iterator[str]:
    """Yield the line in pieces of up to WRAP characters; each but the last ends with a space."""
    while len(line) > WRAP:
        # Behind the last space that fits, else behind the first; never within a line's indent.
        indent = len(line) - len(line.lstrip(" "))
        cut = line.rfind(" ", indent, WRAP) + 1 or line.find(" ", indent) + 1
        if not cut:
            break
        yield line[:cut]
        line = line[cut:]
    yield line


def from_code(markdown: str) -> str:
    """Return what as_code was given, but for control characters and spaces at ends of lines."""
    lines = [line.removeprefix("    ") for line in markdown.split("\n")]
    return "".join(line if line.endswith(" ") else f"{line}\n" for line in lines)[:-1]


# --- Reading --------------------------------------------------------------------------------------


@dataclass
class Series:
    """Holds the points of one scalar, in the order in which they were written."""

    steps: array = field(default_factory=lambda: array("q"))
    values: array = field(default_factory=lambda: array("d"))
    times: array = field(default_factory=lambda: array("d"))  # unix seconds

    def append(self, step: int, value: float, time: float) -> None:
        self.steps.append(step)
        self.values.append(value)
        self.times.append(time)

    def drop_from(self, step: int) -> None:
        keep = [i for i, s in enumerate(self.steps) if s < step]
        for name in ("steps", "values", "times"):
            old = getattr(self, name)
            setattr(self, name, array(old.typecode, (old[i] for i in keep)))


class RunReader:
    """Reads scalars, texts and hyperparameters of a run, whoever writes them, also meanwhile.

    8 times as fast as TensorBoard's EventAccumulator, because checksums are computed over many
    records at once and no point becomes an object; and `update` reads only what is new. The half
    record at the end of a file that is being written is not damage. Histograms are passed over.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._forget()

    def _forget(self) -> None:
        self.scalars: dict[str, Series] = defaultdict(Series)  # by tag
        self.texts: dict[str, dict[int, str]] = defaultdict(dict)  # tag -> step -> text
        self.hparams: dict[str, object] = {}
        self.finished = False  # as the HParams tab says
        self._places: dict[Path, Place] = {}
        self._kinds: dict[str, str] = {}  # plugin of a tag: some writers say it only once

    def update(self) -> bool:
        """Read what was written since the last call -> whether there was anything."""
        news = False
        for _ in range(5):  # a resume may put all files into one new file meanwhile: then again
            with contextlib.suppress(FileNotFoundError):
                files = event_files(self.folder)
                sizes = {path: path.stat().st_size for path in files}
                if any(sizes.get(path, -1) < place.end for path, place in self._places.items()):
                    self._forget()
                    news = True
                for path in files:
                    place = self._places.setdefault(path, Place())
                    if sizes[path] > place.end + place.tail:
                        news = True
                        self._read(path, place)
                if files == event_files(self.folder):
                    break
        return news

    def damage(self) -> list[str]:
        """Return one phrase for each file that is not whole."""
        return [
            f"{path.name}: {place.bad} damaged records and {0 if place.cut else place.tail} "
            "unreadable bytes are left out"
            for path, place in self._places.items()
            if place.bad or not place.cut
        ]

    def _read(self, path: Path, place: Place) -> None:
        for batch in read_records(path, place):
            for record in batch:
                try:
                    event = Event.FromString(record[12:-4])
                except DecodeError:
                    place.bad += 1
                else:
                    self._take(event)

    def _take(self, event: Event) -> None:
        if event.session_log.status == SessionLog.START:  # what stands from its step on is void
            self.finished = False
            for series in self.scalars.values():
                series.drop_from(event.step)
            for tag, texts in self.texts.items():
                self.texts[tag] = {s: text for s, text in texts.items() if s < event.step}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                self.scalars[value.tag].append(event.step, value.simple_value, event.wall_time)
                continue
            plugin = value.metadata.plugin_data
            kind = self._kinds.setdefault(value.tag, plugin.plugin_name)
            if kind == "scalars" and value.HasField("tensor"):
                number = float(make_ndarray(value.tensor).reshape(-1)[0])
                self.scalars[value.tag].append(event.step, number, event.wall_time)
            elif kind == "text" and value.tensor.string_val:
                text = b"\n".join(value.tensor.string_val).decode("utf-8", "replace")
                self.texts[value.tag.removesuffix("/text_summary")][event.step] = text
            elif value.tag == hparams_metadata.SESSION_END_INFO_TAG:
                self.finished = True
            elif value.tag == hparams_metadata.SESSION_START_INFO_TAG:
                start = HParamsPluginData.FromString(plugin.content).session_start_info
                for key, item in start.hparams.items():
                    self.hparams[key] = getattr(item, item.WhichOneof("kind") or "string_value")
