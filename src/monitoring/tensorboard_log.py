"""TensorBoard event files of one run: written live, never in training's way, whole after a crash.

    log = TensorBoardLog("runs/my_run", first_step=0)  # on a resume: the checkpoint's step + 1
    log.hparams({"max_lr": 6e-4, "compile": True}, metrics=["Loss/validation"])
    log.layout({"training": {"loss": ["Multiline", ["Loss/train", "Loss/validation"]]}})
    log.scalars({"Loss/train": 3.2, "Gradient/norm": 0.8}, step=1)
    log.text("Generated_Samples/text", "Once upon", step=1)
    log.histograms({"Parameters/wte": p, "Gradients/wte": g}, step=1)
    log.flush()  # at checkpoints
    log.hparams_end(), log.close()  # at the end

The records are TensorBoard's own: its protocol buffers, built by torch.utils.tensorboard.summary
where that has a function for it. The file is written here and not by SummaryWriter, because that
  * names its file by the clock: after a clock jump a resumed file sorts before the old one, and
    TensorBoard hides its points;
  * writes in a thread that dies at the first full disk, leaves half a record, and raises in every
    later add, flush and close, even after there is space again;
  * keeps up to a queue of records in memory, which kill -9 loses.
Here a record is one unbuffered write: in the file when the method returns, or known to be lost.

Sections: Records · Cleaning · Histograms · Text · Log · Reading
"""

import contextlib
import errno
import functools
import os
import re
import socket
import struct
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import (
    CRC_TABLE,
    crc_update,
    masked_crc32c,
)
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor
from torch.utils.tensorboard import summary as torch_summary

from basics.durable import DISK_FULL, flush_folder

# --- Records --------------------------------------------------------------------------------------
# An event file is a row of records: uint64 length, masked CRC-32C of it, the Event's bytes, masked
# CRC-32C of those (TensorFlow's TFRecord format). TensorBoard reads the files of a folder in the
# order of their names, which begin with ten digits of unix time.

FILE_VERSION = "brain.Event:2"  # "purge by session start records", as opposed to by step order
CRC_TABLE_NUMPY = np.array(CRC_TABLE, np.uint32)
BATCH_BYTES = 4 << 20  # how much of an old event file is in memory at a time


def _crc32c_of_many(records: Sequence[bytes]) -> list[int]:
    """Masked CRC-32C of each record, byte column by byte column over all records at once.

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
def _header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + struct.pack("<I", masked_crc32c(packed))


def _frame(events: Iterable[bytes]) -> bytes:
    """The bytes of an event file that hold these serialized events."""
    events = list(events)
    crcs = _crc32c_of_many(events) if len(events) >= 16 else map(masked_crc32c, events)
    return b"".join(
        _header(len(e)) + e + struct.pack("<I", c) for e, c in zip(events, crcs, strict=True)
    )


@dataclass
class _Damage:
    """What could not be read of an event file."""

    records: int = 0  # whole records with a wrong checksum or no Event inside
    tail: int = 0  # bytes from the first place where no record begins, to the end
    cut: bool = True  # that tail is the beginning of a record: a writer was killed


def _read(path: Path, damage: _Damage) -> Iterator[list[bytes]]:
    """Batches of whole records of a file, about BATCH_BYTES each; adds to `damage`. The event in a
    record is record[12:-4]."""
    batch: list[bytes] = []

    def good() -> list[bytes]:
        crcs = _crc32c_of_many([record[12:-4] for record in batch])
        ok = [r for r, crc in zip(batch, crcs, strict=True) if r[-4:] == struct.pack("<I", crc)]
        damage.records += len(batch) - len(ok)
        batch.clear()
        return ok

    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size
        size = 0
        while left:
            header = file.read(12)
            if len(header) < 12:
                damage.tail = left
                break
            (length,) = struct.unpack_from("<Q", header)
            if header != _header(length):
                damage.tail, damage.cut = left, False
                break
            if 12 + length + 4 > left:
                damage.tail = left
                break
            batch.append(header + file.read(length + 4))
            left -= len(batch[-1])
            size += len(batch[-1])
            if size > BATCH_BYTES:
                yield good()
                size = 0
        if batch:
            yield good()


def _event_files(log_dir: Path) -> list[Path]:
    """The event files directly in the folder, in the order in which TensorBoard reads them."""
    return sorted(p for p in log_dir.iterdir() if "tfevents" in p.name and p.is_file())


def _next_path(log_dir: Path) -> Path:
    """A new event file's path. It sorts behind every older one, whatever the clock says:
    TensorBoard hides a file that sorts before one that it has already read."""
    seconds = int(time.time())
    for path in _event_files(log_dir):
        if match := re.match(r"events\.out\.tfevents\.(\d{10})(?!\d)", path.name):
            seconds = max(seconds, int(match[1]) + 1)
    host = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())
    return log_dir / f"events.out.tfevents.{seconds:010d}.{host}.{os.getpid()}"


def _version_record() -> bytes:
    """What begins every file."""
    return Event(wall_time=time.time(), file_version=FILE_VERSION).SerializeToString()


def _start_record(step: int) -> bytes:
    """Says: what older files say at or behind `step` is void."""
    session = SessionLog(status=SessionLog.START)
    return Event(wall_time=time.time(), step=step, session_log=session).SerializeToString()


# --- Cleaning -------------------------------------------------------------------------------------
# A crash leaves points behind the checkpoint that the run resumes from. Start records alone do not
# hide them: the default loader of TensorBoard ignores start records, and drops a stale point only
# when its tag is next written, which for a validation loss can be hours later. So the points are
# removed.

EMPTY_SECONDS = 600  # how long a TensorBoard may take to notice that a file is empty
MERGE_NAME = "merging.tmp"  # no "tfevents" in it: TensorBoard does not look inside


@dataclass
class _Merged:
    """What _clean did and found."""

    stale: int = 0  # events dropped
    damage: list[str] = field(default_factory=list)  # one phrase per damaged file
    hparams: dict[str, bytes] = field(default_factory=dict)  # what was kept, by tag
    layout: bytes = b""  # the last custom scalars layout that was kept
    last: set[tuple[int, str]] = field(default_factory=set)  # (step, tag) kept of the last step


def _canonical(hparams: bytes) -> bytes:
    """The same bytes for the same content: maps have no order in a protocol buffer."""
    return HParamsPluginData.FromString(hparams).SerializeToString(deterministic=True)


def _start_step(path: Path) -> float:
    """The step of a file's start record, from which on it replaces older files; inf without one."""
    for batch in _read(path, _Damage()):
        for record in batch[:3]:
            with contextlib.suppress(DecodeError):
                event = Event.FromString(record[12:-4])
                if event.session_log.status == SessionLog.START:
                    return event.step
        break
    return float("inf")


def _keep(
    record: bytes, limit: float, drop_tags: set[str], merged: _Merged, damage: _Damage
) -> bool:
    """Whether a record stays; notes in `merged` and `damage` what was seen."""
    try:
        event = Event.FromString(record[12:-4])
    except DecodeError:
        damage.records += 1
        return False
    if event.HasField("session_log") or event.HasField("file_version"):
        return False  # the new file has its own
    tags = {value.tag for value in event.summary.value}
    if event.step >= limit or (tags and tags <= drop_tags):
        merged.stale += 1
        return False
    if event.step == limit - 1:
        merged.last |= {(event.step, tag) for tag in tags}
    for value in event.summary.value:
        plugin = value.metadata.plugin_data
        if plugin.plugin_name == hparams_metadata.PLUGIN_NAME:
            merged.hparams.setdefault(value.tag, _canonical(plugin.content))
        elif plugin.plugin_name == "custom_scalars":
            merged.layout = value.tensor.string_val[0]
    return True


def _clean(log_dir: Path, first_step: float, drop_tags: Iterable[str]) -> _Merged:
    """Removes what is stale from the folder's event files: events at or behind `first_step`, events
    at or behind the start of a later file (an earlier cleaning that could not be done), damaged
    records, and the summaries in `drop_tags`. Raises OSError; then nothing is lost and the old
    files stand.

    If there is anything to remove, all files become one new file *with a new name* that begins with
    a start record of step 0: so all loaders, also of a TensorBoard that is running and has the
    stale points in memory, read the timeline afresh. A crash at any point leaves a readable folder:
    the new file voids the old ones, and the next cleaning drops them.
    """
    merged = _Merged()
    drop_tags = set(drop_tags)
    old = _event_files(log_dir)
    if not old:
        return merged
    starts = [_start_step(path) for path in old]
    temporary = log_dir / MERGE_NAME
    broken = []
    try:
        with open(temporary, "wb") as out:
            out.write(_frame([_version_record(), _start_record(0)]))
            for i, path in enumerate(old):
                limit = min([first_step, *starts[i + 1 :]])
                damage = _Damage()
                for batch in _read(path, damage):
                    keep = (r for r in batch if _keep(r, limit, drop_tags, merged, damage))
                    out.write(b"".join(keep))
                if damage.records or damage.tail:
                    merged.damage.append(
                        f"{path.name}: {damage.records} damaged records, "
                        f"{damage.tail} unreadable bytes at its end"
                    )
                    if damage.records or not damage.cut:
                        broken.append(path)
            out.flush()
            os.fsync(out.fileno())
        if not merged.stale and not merged.damage:
            temporary.unlink()
            return merged
        os.rename(temporary, _next_path(log_dir))
        flush_folder(log_dir)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):
        for path in broken:  # more than a killed writer's half record: somebody may want to look
            _set_aside(path, "damaged")
        for path in old:
            # Emptied, and removed by a later cleaning: if the file vanishes that the Python loader
            # of a running TensorBoard is at, it never gets on to the next one.
            if not path.exists() or path.stat().st_size:
                path.write_bytes(b"")
            elif time.time() - path.stat().st_mtime > EMPTY_SECONDS:
                path.unlink()
    return merged


def _set_aside(path: Path, why: str) -> None:
    """Renames an event file so that TensorBoard no longer reads it; overwrites nothing."""
    base = f"{why}.{path.name.replace('tfevents', 'events')}"
    n = 0
    while (target := path.with_name(f"{base}.{n}" if n else base)).exists():
        n += 1
    os.rename(path, target)


# --- Histograms -----------------------------------------------------------------------------------
# One pass over each tensor on its own device: subtract the median (of 4,096 values), and count the
# differences by the top 13 bits of their float32 pattern (sign, exponent, 4 bits of mantissa). So
# bins are as narrow as 3–6% of the distance from the median, at any scale: gradients with far
# outliers and LayerNorm weights within 1 ± 0.001 are both resolved, no range has to be known
# beforehand, NaN and inf have bins of their own. The host merges the 8,192 bins to about 60.

PATTERN_BITS = 13
PATTERN_SHIFT = 32 - PATTERN_BITS
FINITE = 255 << (23 - PATTERN_SHIFT)  # patterns per sign below the exponent of inf and NaN
HALF = 1 << (PATTERN_BITS - 1)  # the pattern of the sign bit
POSITIVE_EDGES = np.append(
    (np.arange(FINITE, dtype=np.uint32) << PATTERN_SHIFT).view(np.float32).astype(np.float64),
    2.0**128,
)
EDGES = np.concatenate([-POSITIVE_EDGES[:0:-1], POSITIVE_EDGES])
UNIFORM_BINS = 30  # what TensorBoard's Histograms tab draws
# Edges at equal shares of the values, and at the quantiles that the Distributions tab draws.
SHARES = np.union1d(np.arange(1, 32) / 32, [0.0668, 0.1587, 0.3085, 0.6915, 0.8413, 0.9332])


@torch.no_grad()
def _count(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Pattern counts (8192, int32) and min, max, centre (3, float32) of a tensor, left on its
    device without waiting for it. min and max are NaN where there is a NaN."""
    x = tensor.detach().reshape(-1)
    on_cpu = x.device.type == "cpu"
    # CPU: pieces that stay in the cache, and so small that torch gives them to one thread: on a
    # busy machine the threads' waiting for each other took ten times the work. Elsewhere 2**24
    # values: histc counts in float32.
    size = 1 << 15 if on_cpu else 1 << 24
    # bincount is 5 times faster than histc on a CPU, would wait for the device on a GPU, and is the
    # only one that counts as deterministic.
    bincount = on_cpu or torch.are_deterministic_algorithms_enabled()
    middle = x[:: -(-x.numel() // 4096)].float().median()  # outliers do not shift it
    centre = torch.where(middle.abs() < 1e30, middle, 0.0)  # also 0 for NaN, inf
    counts = torch.zeros(2 * HALF, dtype=torch.int32, device=x.device)
    ends = []
    for piece in x.split(size):
        values = piece.float()
        ends += torch.aminmax(values)
        pattern = (values - centre).view(torch.int32) >> PATTERN_SHIFT & (2 * HALF - 1)
        if bincount:
            counts += torch.bincount(pattern, minlength=2 * HALF)
        else:
            counts += torch.histc(pattern.float(), 2 * HALF, min=0, max=2 * HALF).int()
    low, high = torch.aminmax(torch.stack(ends))
    return counts, torch.stack([low, high, centre])


def _merge_bins(counts: np.ndarray, stats: np.ndarray) -> tuple[Summary.Value | None, int]:
    """One tensor's histogram (None without finite values) and its number of non-finite values."""
    nonfinite = int(counts[FINITE:HALF].sum() + counts[HALF + FINITE :].sum())
    fine = np.concatenate([counts[HALF : HALF + FINITE][::-1], counts[:FINITE]]).astype(np.int64)
    used = np.flatnonzero(fine)
    if not len(used):
        return None, nonfinite
    fine = fine[used[0] : used[-1] + 1]
    low, high, centre = stats.tolist()
    edges = EDGES[used[0] : used[-1] + 2] + centre
    if nonfinite:  # low and high are NaN or inf: the bins know them well enough
        low, high = edges[0], edges[-1]
    edges[0], edges[-1] = low, high
    edges = np.clip(edges, low, high)
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.concatenate([[0], np.cumsum(fine)])
    number = int(below[-1])
    crowded = np.flatnonzero(fine > number / 16)  # many equal values: a spike of its own
    cuts = [
        [0, len(fine)],
        np.searchsorted(below, SHARES * number),
        np.searchsorted(edges, np.linspace(low, high, UNIFORM_BINS + 1)[1:-1]),
        crowded,
        crowded + 1,
    ]
    cuts = np.unique(np.clip(np.concatenate(cuts), 0, len(fine)))
    value = torch_summary.histogram_raw(
        "", low, high, number, fine @ middle, fine @ middle**2,
        edges[cuts[1:]].tolist(), np.diff(below[cuts]).tolist(),
    ).value[0]  # fmt: skip
    return value, nonfinite


# --- Text -----------------------------------------------------------------------------------------


WRAP = 72  # columns; TensorBoard shows a code block unwrapped, and a phone has room for 74


def as_code(text: str) -> str:
    """Markdown that shows `text` as it is. TensorBoard renders text as Markdown in which links and
    pictures live: what a model writes must not reach it. Each line is indented by four spaces (a
    code block) behind every kind of line break; control characters, some of which the Markdown
    library uses as its own marks, become �.

    Lines are wrapped behind a space, which stays: only a line that goes on in the next one ends
    with a space (spaces at the ends of the text's own lines are dropped). A longer word stays
    whole. from_code takes it back."""
    lines = text.splitlines() or [""]
    lines = [re.sub(r"[^\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "�", line) for line in lines]
    return "\n".join("    " + part for line in lines for part in _wrapped(line.rstrip(" ")))


def _wrapped(line: str) -> Iterator[str]:
    """The line in pieces of up to WRAP characters; each but the last ends with a space."""
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
    """The text that as_code was given, but for control characters and spaces at ends of lines."""
    lines = [line.removeprefix("    ") for line in markdown.split("\n")]
    return "".join(line if line.endswith(" ") else f"{line}\n" for line in lines)[:-1]


# --- Log ------------------------------------------------------------------------------------------


class TensorBoardLog:
    """The event files of one run folder. One object, in one process, from one thread.

    After construction no method raises for what the disk does: logging stops with one announcement,
    is tried again every `retry_every` seconds, and says what is missing when it is back.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike,
        first_step: int,
        announce: Callable[[str], None] = print,
        retry_every: float = 30.0,
        new_timeline: bool = False,
    ):
        """first_step: 0 for a fresh run: event files of an earlier attempt in the folder are set
        aside under names that TensorBoard does not read. Else the first step that will be logged,
        checkpoint step + 1: what the folder says at or behind that step is removed.
        new_timeline: treat the folder as for a fresh run although first_step is not 0.
        announce: called with one sentence now and then. retry_every: seconds.
        Raises ValueError if the folder cannot be written to (a full disk: announced instead)."""
        self.log_dir = Path(log_dir)
        self.first_step = first_step
        self.announce = announce
        self.retry_every = retry_every
        self.bytes_written = 0
        self._file = None  # unbuffered; None while logging is stopped
        self._size = 0  # bytes of whole records in it
        self._retry_at = 0.0  # monotonic clock
        self._stopped = False  # and said so
        self._lost = 0  # values since then
        self._lost_steps = [0, 0]
        self._step = first_step  # the last one seen
        self._pending: list[bytes] = []  # records that are written once (HParams, layout), not lost
        self._kept = _Merged()
        self._closed = False
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            if first_step == 0 or new_timeline:
                self._set_earlier_attempt_aside()
            else:
                self._resume()
            self._open([_version_record(), _start_record(first_step)])
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise ValueError(
                    f"cannot write TensorBoard events to {self.log_dir} "
                    f"({error.strerror or error}): choose another --tensorboard_dir, "
                    "or make this one writable"
                ) from None
            self._pending = [_start_record(first_step)]
            self._stop(error)

    def rewind(self, first_step: int) -> None:
        """Go on at first_step, after a roll-back: points of that step and later disappear."""
        self.close()
        self.__init__(self.log_dir, first_step, self.announce, self.retry_every)

    def _set_earlier_attempt_aside(self) -> None:
        earlier = [path for path in _event_files(self.log_dir) if path.stat().st_size]
        for path in earlier:
            _set_aside(path, "earlier")
            path.touch()  # empty, for a running TensorBoard: see _clean
        if earlier:
            self.announce(
                f"{self.log_dir} held {len(earlier)} event files of an earlier attempt: kept as "
                "earlier.*, which TensorBoard does not read"
            )

    def _resume(self) -> None:
        try:
            # A finished run that goes on is running again; TensorBoard would keep the first end
            # record.
            done = [hparams_metadata.SESSION_END_INFO_TAG]
            self._kept = _clean(self.log_dir, self.first_step, done)
        except OSError as error:
            self.announce(
                f"stale points from step {self.first_step} on could not be removed from "
                f"{self.log_dir} ({error.strerror or error}): they show until written again"
            )
        for phrase in self._kept.damage:
            self.announce(f"repaired the TensorBoard event file {phrase}")

    # -- the file: one record or none -----------------------------------------------------------

    def _open(self, records: list[bytes]) -> None:
        """Begins a new event file with these records. Raises OSError and then leaves none."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        path = _next_path(self.log_dir)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed in _stop and close)
        self._size = 0
        try:
            self._append(_frame(records))
            flush_folder(self.log_dir)
        except OSError:
            self._abandon()
            with contextlib.suppress(OSError):
                path.unlink()
            raise

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # a full disk takes a part, and raises at the next call
            view = view[self._file.write(view) :]
        self._size += len(data)
        self.bytes_written += len(data)

    def _abandon(self) -> None:
        """Closes the file at its last whole record: readers stop at a half one."""
        with contextlib.suppress(OSError):
            self._file.truncate(self._size)
        with contextlib.suppress(OSError):
            self._file.close()
        self._file = None

    def _stop(self, error: OSError) -> None:
        if self._file is not None:
            self._abandon()
        self._retry_at = time.monotonic() + self.retry_every
        if self._stopped:
            return
        self._stopped = True
        self.announce(
            f"TensorBoard logging to {self.log_dir} stopped ({error.strerror or error}); training "
            f"goes on, logging is tried again every {self.retry_every:g} s"
        )

    def _come_back(self) -> bool:
        """Tries to log again, in a new file: a running TensorBoard may be amid the old one."""
        if time.monotonic() < self._retry_at:
            return False
        try:
            self._open([_version_record(), *self._pending])
        except OSError:
            self._retry_at = time.monotonic() + self.retry_every
            return False
        self._pending.clear()
        missing = ""
        if self._lost:
            first, last = self._lost_steps
            missing = f"; {self._lost} values of steps {first} to {last} are missing in the charts"
        self.announce(
            f"TensorBoard logging to {self.log_dir} is back at step {self._step}{missing}"
        )
        self._stopped, self._lost = False, 0
        return True

    def _write(self, step: int, summaries: Iterable[Summary], once: bool = False) -> None:
        """Appends an event for each summary. `once`: if that cannot be done, keep them for when
        logging is back; else their points are lost, and counted."""
        assert not self._closed, "TensorBoardLog is closed"
        now = time.time()  # shown; nothing is computed from it
        events = [Event(wall_time=now, step=step, summary=summary) for summary in summaries]
        records = [event.SerializeToString() for event in events]
        self._step = max(step, self._step)
        if self._file is not None or self._come_back():
            try:
                self._append(_frame(records))
                return
            except OSError as error:
                self._stop(error)
        if once:
            self._pending += records
        else:
            if not self._lost:
                self._lost_steps[0] = step
            self._lost_steps[1] = step
            self._lost += sum(len(event.summary.value) for event in events)

    # -- what is logged ---------------------------------------------------------------------------

    # A checkpoint may have been saved in the middle of an evaluation, which was then completed and
    # logged before the crash. The resume repeats it: what the timeline has of that step stays.

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One point for each tag, all in one record: about 30 bytes a tag. NaN and inf are fine."""
        points = [
            Summary.Value(tag=tag, simple_value=float(v))
            for tag, v in values.items()
            if (step, tag) not in self._kept.last
        ]
        if points:
            self._write(step, [Summary(value=points)])

    def text(self, tag: str, text: str, step: int) -> None:
        """Text exactly as it is, whatever is in it; nothing in it is rendered (see as_code)."""
        if (step, f"{tag}/text_summary") not in self._kept.last:
            self._write(step, [torch_summary.text(tag, as_code(text))])

    def histograms(self, tensors: dict[str, Tensor], step: int) -> None:
        """The distribution of each tensor's finite values, about 1.2 KB each; one copy to the host
        for all. Where there are non-finite values a scalar TAG_nonfinite counts them. Counts are
        exact, min and max too as long as all values are finite; sums are added up from the bins."""
        tensors = {tag: tensor for tag, tensor in tensors.items() if tensor.numel()}
        if not tensors:
            return
        counts, stats = zip(*map(_count, tensors.values()), strict=True)
        device = counts[0].device
        counts = torch.stack([c.to(device) for c in counts]).cpu().numpy()
        stats = torch.stack([s.to(device) for s in stats]).cpu().double().numpy()
        summaries = []
        for tag, tensor_counts, tensor_stats in zip(tensors, counts, stats, strict=True):
            value, nonfinite = _merge_bins(tensor_counts, tensor_stats)
            values = []
            if value is not None:
                value.tag = tag
                values.append(value)
            if nonfinite:
                values.append(Summary.Value(tag=f"{tag}_nonfinite", simple_value=nonfinite))
            summaries.append(Summary(value=values))
        self._write(step, summaries)

    def hparams(
        self,
        values: dict[str, object],
        metrics: Sequence[str],
        numeric: Iterable[str] = (),
        first: Iterable[str] = (),
    ) -> None:
        """The run's row in the HParams tab, in the run itself. Call it after every start and
        resume: after a resume nothing is written if nothing changed, else the row is replaced.

        metrics: tags of scalars shown as columns; the same in all runs (TensorBoard takes the
        columns of the first run it finds). numeric: names that are numbers in some runs and None in
        others: None leaves their cell empty. (Sorting or filtering by a column of numbers and words
        is an error of the server.) Other None values become "none", booleans "true"/"false" with
        tick boxes, lists and everything else text. first: names that come before the others, in the
        order of the alphabet; TensorBoard shows the first five columns until others are ticked."""
        numeric, first = set(numeric), set(first)
        row: dict[str, float | str] = {}
        ticks = {}
        for name, value in values.items():
            if isinstance(value, bool):
                row[name] = str(value).lower()
                ticks[name] = ["false", "true"]
            elif value is None and name in numeric:
                row[name] = float("nan")  # declares the column; TensorBoard leaves the cell empty
            elif isinstance(value, int | float) and np.isfinite(value):
                row[name] = value
            elif value is None:
                row[name] = "none"
            elif isinstance(value, list | tuple):
                row[name] = ", ".join(map(str, value))
            else:
                row[name] = str(value)
        experiment, start, _ = torch_summary.hparams(row, dict.fromkeys(metrics, 0.0), ticks)
        plugin_data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin_data.content)
        for info in content.experiment.hparam_infos:
            info.differs = info.name in first  # what TensorBoard sorts by, before the name
        plugin_data.content = content.SerializeToString()
        records = {s.value[0].tag: s for s in (experiment, start)}
        if self._kept.hparams:
            new = {
                tag: _canonical(summary.value[0].metadata.plugin_data.content)
                for tag, summary in records.items()
            }
            if new == self._kept.hparams:
                return
            self._forget_hparams(list(records))
        self._write(0, records.values(), once=True)

    def _forget_hparams(self, tags: list[str]) -> None:
        """Takes the row out of the older files: the first record of a tag wins for good."""
        was_open = self._file is not None
        try:
            if was_open:
                self._abandon()
            last = self._kept.last
            self._kept = _clean(self.log_dir, float("inf"), tags)
            self._kept.last = last
            if was_open:
                self._open([_version_record()])
        except OSError as error:
            self._stop(error)

    def hparams_end(self) -> None:
        """Marks the run as finished in the HParams tab. Only at true completion."""
        _, _, end = torch_summary.hparams({}, {})
        self._write(0, [end], once=True)

    def layout(self, layout: dict[str, dict[str, list]]) -> None:
        """The Custom Scalars tab: {group: {chart: ["Multiline", [regular expression, ...]]}}."""
        summary = torch_summary.custom_scalars(layout)
        if summary.value[0].tensor.string_val[0] != self._kept.layout:  # the last one counts
            self._write(0, [summary], once=True)

    def flush(self) -> None:
        """Waits until the disk holds everything: a power cut after it loses nothing. (A killed
        process loses nothing that was logged, without this.)"""
        if self._file is None:
            return
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "the event file was deleted")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._stop(error)
            if isinstance(error, FileNotFoundError):
                self._retry_at = 0.0  # a new file may well be possible at once

    def close(self) -> None:
        if self._closed:
            return
        if self._file is not None:
            self.flush()
        if self._file is not None:
            self._abandon()
        if self._lost:
            self.announce(f"{self._lost} values were not recorded in {self.log_dir}")
        self._closed = True


# --- Reading --------------------------------------------------------------------------------------


def read_scalars(log_dir: str | os.PathLike) -> dict[str, list[tuple[int, float, float]]]:
    """Every scalar of a run as TensorBoard's reader sees it: tag -> [(step, value, unix time)]."""
    reader = EventAccumulator(str(log_dir), size_guidance={"scalars": 0, "tensors": 1}).Reload()
    return {
        tag: [(p.step, p.value, p.wall_time) for p in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


@dataclass
class Series:
    """The points of one scalar, in the order in which they were written."""

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


@dataclass
class RunEvents:
    """What read_run found in a run's event files."""

    scalars: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))  # by tag
    texts: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))  # by step
    hparams: dict[str, object] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)  # one phrase per file that is not whole


def read_run(log_dir: str | os.PathLike) -> RunEvents:
    """Scalars, texts and hyperparameters of a run, whoever wrote them, also while it is written.

    For whole histories: 8 times as fast as TensorBoard's EventAccumulator (read_scalars), because
    checksums are computed over many records at once, and no point becomes an object. The half
    record at the end of a file that is being written is not damage. Histograms are passed over.
    """
    log_dir = Path(log_dir)
    for _ in range(5):  # a resume may put all files into one new file meanwhile: then once more
        files = _event_files(log_dir)
        run = RunEvents()
        with contextlib.suppress(FileNotFoundError):
            for path in files:
                _read_into(run, path)
        if files == _event_files(log_dir):
            break
    return run


def _read_into(run: RunEvents, path: Path) -> None:
    damage, plugins = _Damage(), {}  # plugins: what kind a tag is; some writers say it only once
    for batch in _read(path, damage):
        for record in batch:
            try:
                event = Event.FromString(record[12:-4])
            except DecodeError:
                damage.records += 1
                continue
            if event.session_log.status == SessionLog.START:
                for series in run.scalars.values():
                    series.drop_from(event.step)
                for tag, texts in run.texts.items():
                    run.texts[tag] = {s: text for s, text in texts.items() if s < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    run.scalars[value.tag].append(event.step, value.simple_value, event.wall_time)
                    continue
                plugin = value.metadata.plugin_data
                name = plugins.setdefault(value.tag, plugin.plugin_name)
                if name == "scalars" and value.HasField("tensor"):
                    number = float(make_ndarray(value.tensor).reshape(-1)[0])
                    run.scalars[value.tag].append(event.step, number, event.wall_time)
                elif name == "text" and value.tensor.string_val:
                    text = b"\n".join(value.tensor.string_val).decode("utf-8", "replace")
                    run.texts[value.tag.removesuffix("/text_summary")][event.step] = text
                elif value.tag == hparams_metadata.SESSION_START_INFO_TAG:
                    start = HParamsPluginData.FromString(plugin.content).session_start_info
                    for key, item in start.hparams.items():
                        run.hparams[key] = getattr(item, item.WhichOneof("kind") or "string_value")
    if damage.records or (damage.tail and not damage.cut):
        run.damage.append(
            f"{path.name}: {damage.records} damaged records and {damage.tail} unreadable bytes "
            "are left out"
        )
