"""From documents to shards: worker processes tokenize units, one process puts them in order.

The tokens of the units, in order, are the stream. Until it is known where validation ends they are
kept in DIR/.prepare/head.bin; then shards are cut off the stream, and a journal says for each where
the source has to be read on. After kill -9 the same command loses no more than the shard that was
being made, and the result depends on nothing but the source.

    DIR/.prepare/plan.json     source and options, which a restart must find unchanged
    DIR/.prepare/journal       a line for each finished shard, and for what was decided
    DIR/.prepare/head.bin      the stream's first tokens, bare uint16
"""

import collections
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tokens import corpus, shards
from tokens.corpus import Span, Tally
from tokens.encoding import NO_TOKENS, encode_documents, encode_text, encoders
from tokens.tokenizer import EOT

VAL_SHARE = 0.05  # what a small corpus gives to validation, instead of a whole shard
WORK = ".prepare"  # folder inside DIR for everything that a restart needs
PATIENCE = 32  # units without any document, after which it is no use to read on


@dataclasses.dataclass
class Part:
    """What is known of a part of the source: of a unit, or of all of them so far."""

    split: str = "val"  # of its last file
    next: tuple[int, int] = (0, 0)  # where the following unit begins: (index of the file, place)
    digest: str = ""  # SHA-256 of a pipe, until there
    tokens: int = 0
    weight: int = 0  # bytes of the source's files
    lost: int = 0  # more of these, behind damage
    damage: list[str] = dataclasses.field(default_factory=list)
    counts: Tally = dataclasses.field(default_factory=Tally)
    fields: tuple = ()  # of the first record without a text

    def __add__(self, unit: "Part") -> "Part":
        return dataclasses.replace(
            unit,
            tokens=self.tokens + unit.tokens,
            weight=self.weight + unit.weight,
            lost=self.lost + unit.lost,
            damage=self.damage + unit.damage,
            counts=Tally(self.counts + unit.counts),
            fields=self.fields or unit.fields,
        )


# --- Workers --------------------------------------------------------------------------------------


def start_worker(parent: int) -> None:
    """Begin a worker process. Ctrl-C is its parent's business; when that is killed, leave."""
    encoders()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def leave_with_parent():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def tokenize_unit(spans: list[Span], options: dict) -> tuple[np.ndarray, Part]:
    """Return the tokens of a unit, and what is to be known of it."""
    counts = Tally()
    arrays = [array for span in spans for array in span_tokens(span, options, counts)]
    tokens = np.concatenate(arrays) if arrays else NO_TOKENS
    return tokens, Part(
        split=spans[-1].file.split,
        next=spans[-1].next,
        digest=spans[-1].digest,
        tokens=len(tokens),
        weight=sum(span.weight for span in spans),
        lost=sum(span.lost for span in spans),
        damage=[f"{span.file.name}: {span.damage}" for span in spans if span.damage],
        counts=counts,
        fields=counts.fields,
    )


def span_tokens(span: Span, options: dict, counts: Tally):
    """Yield the tokens of a span, in arrays of uint16."""
    for content in corpus.read_span(span, options, counts):
        if isinstance(content, list):
            yield encode_documents(content, counts)
            continue
        if span.first:
            counts["documents"] += 1
            yield np.array([EOT], np.uint16)
        yield encode_text(content)


def tokenize_all(units, options: dict, workers: int, local: bool):
    """Yield the units' tokens in order, made by `workers` processes."""
    encoders()  # before the workers are forked, which then have them
    # Forked workers start at once, but must not inherit network connections.
    context = multiprocessing.get_context("fork" if local and sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (os.getpid(),))
    jobs = collections.deque()
    try:
        for spans in units:
            jobs.append(pool.submit(tokenize_unit, spans, options))
            if len(jobs) > 3 * workers:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()
    except BaseException:
        for process in multiprocessing.active_children():  # one may wait for a network
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# --- Preparation ----------------------------------------------------------------------------------


class Unusable(ValueError):
    """Nothing can be made of this corpus with these options."""


def odd_documents(place: Part, keys=tuple(corpus.COUNTS)) -> list[str]:
    """Return sentences with what was odd about documents, and its count."""
    odd = [f"{n:,} {corpus.COUNTS[key]}" for key in keys if (n := place.counts[key])]
    if place.fields:
        odd.append(f"records have {', '.join(map(str, place.fields[:9]))} (--text_key)")
    return odd


class Preparation:
    """One run into one folder: takes units, cuts the stream into shards, keeps the journal."""

    def __init__(self, out: Path, options: dict, has_val_source: bool):
        self.out, self.options, self.folder = out, options, out / WORK
        self.has_val_source = has_val_source
        self.place = self.before = Part()  # where the source is read on; before the last unit
        self.skip = 0  # tokens of the next unit that are in shards already
        self.units, self.ended = 0, False
        self.head = 0  # tokens in head.bin
        self.pending = [NO_TOKENS]  # the stream's tokens behind head.bin that are in no shard yet
        self.shards = {}  # (split, number) -> entry in the manifest
        self.position = 0  # tokens in shards, written or being written
        self.val_end = None  # tokens of validation, once decided
        self.within = False  # the corpus is a single document, and validation ends inside of it
        self.searched = 0  # tokens in which no start of a document was found beyond the target
        self.writer = ThreadPoolExecutor(1)  # writes a shard while the next one is filled
        self.writing = None
        self.opened = contextlib.ExitStack()

    # The journal

    def resume(self) -> None:
        """Take up what an interrupted run left in the folder, and sweep what it did not finish."""
        path, whole = self.folder / "journal", 0
        self.journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.opened.callback(os.close, self.journal)
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break  # half a line, or NULs after a power cut
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            if record.keys() & {"unit", "place"}:
                raise ValueError(
                    f"--out {self.out}: was begun by an earlier version of this program: remove it"
                )
            self.take_record(record)
        os.ftruncate(self.journal, whole)
        os.lseek(self.journal, 0, os.SEEK_END)
        for entry in self.shards.values():
            shard = self.out / entry["name"]
            if not shard.is_file() or shard.stat().st_size != entry["bytes"]:
                raise ValueError(f"{shard} was finished, and is missing or cut: remove {self.out}")
        head = open(self.folder / "head.bin", "ab")  # noqa: SIM115
        self.head_file = self.opened.enter_context(head)
        self.head_file.truncate(2 * self.head)
        for folder, names in ((self.folder, ".tmp-*"), (self.out, ".tmp-*_*.bin-*")):
            for temporary in folder.glob(names):
                temporary.unlink()
        self.before = self.place
        self.skip = max(0, self.position - self.place.tokens)

    def take_record(self, record: dict) -> None:
        if "head" in record:
            self.head = record["head"]
        if "val_end" in record:
            self.val_end, self.within = record["val_end"], record["within"]
        if "shard" in record:
            self.shards[record["split"], record["number"]] = record["shard"]
            self.position += record["shard"]["tokens"]
        if "part" in record:
            self.place = Part(**record["part"])
            self.place.next, self.place.counts = tuple(self.place.next), Tally(self.place.counts)

    def note(self, record: dict, place: Part | None = None) -> None:
        if place is not None:
            record["part"] = vars(place)
        os.write(self.journal, json.dumps(record).encode() + b"\n")
        os.fsync(self.journal)

    # Units

    def take(self, tokens: np.ndarray, unit: Part) -> None:
        """Add a unit to the stream, and cut off it what can be cut."""
        self.before, self.place = self.place, self.place + unit
        self.units += 1
        if not self.place.tokens and self.units >= PATIENCE:
            raise Unusable(self.nothing_found())
        if self.val_end is None and self.has_val_source and unit.split == "train":
            self.decide(self.before.tokens, self.before)
        tokens, self.skip = tokens[self.skip :], 0
        if self.val_end is None:
            self.head_file.write(tokens)
            self.save_head(self.place, self.options["shard_tokens"])
            self.decide_val_end()
        else:
            self.pending.append(tokens)
        self.cut_shards()

    def save_head(self, place: Part, least: int = 1) -> None:
        """Make head.bin, which reaches to `place`, durable if it has grown by `least` tokens."""
        self.head_file.flush()
        if place.tokens - self.head >= least:
            os.fsync(self.head_file.fileno())
            self.head = place.tokens
            self.note({"head": self.head}, place)

    def end(self) -> None:
        """Cut what is left into shards: all units are there. Wait until they are written."""
        self.ended = True
        if not self.place.tokens:
            raise Unusable(self.nothing_found())
        if self.val_end is None:
            self.save_head(self.place)
            self.decide_val_end()
        if self.has_val_source and self.val_end in (None, self.place.tokens):
            raise Unusable("no document was found in --source")
        self.cut_shards()
        self.wait()

    def nothing_found(self) -> str:
        odd = "; ".join(odd_documents(self.place) + self.place.damage) or "no data"
        return f"no document was found with --text_key {self.options['text_key']}: {odd}"

    def refuse_losses(self, allowed: float, size: int, left_out: int) -> None:
        """Raise ValueError if more of the source than the share `allowed` is not in the shards.

        size: bytes of all files, 0 if unknown. left_out: bytes of those that were not read.
        """
        place, counts = self.place, self.place.counts
        skipped = sum(counts[key] for key in corpus.SKIPPED)
        lost, size = place.lost + left_out, (size or place.weight + place.lost) + left_out
        losses = (
            (skipped, counts["documents"] + skipped, "documents", corpus.SKIPPED),
            (lost, size, "bytes", ()),
            (counts["replaced"], counts["characters"], "characters", ("invalid_utf8",)),
        )
        losses = [loss for loss in losses if loss[0] > allowed * loss[1]]
        if not losses or not place.tokens:
            return
        what = " and ".join(f"{n:,} of {total:,} {name}" for n, total, name, _ in losses)
        reasons = odd_documents(place, [key for *_, keys in losses for key in keys])
        reasons += place.damage if any(name == "bytes" for *_, name, _ in losses) else []
        said = f"--allow_skipped {allowed:g}: {what} cannot be used: {'; '.join(reasons)}"
        if not self.shards:
            raise Unusable(f"{said}; mend that, or allow more")
        raise ValueError(
            f"{said}; {self.out} is whole but for its manifest: the same command with a larger "
            "--allow_skipped goes on from here; to mend the source remove the folder first"
        )

    def discard(self) -> None:
        """Remove everything that was written."""
        self.writer.shutdown()
        for entry in self.shards.values():
            (self.out / entry["name"]).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):
            self.out.rmdir()  # unless something is in it

    def close(self) -> None:
        self.writer.shutdown()
        self.opened.close()

    # Validation

    def decide_val_end(self) -> None:
        """Set `val_end`, unless too little has been read to tell."""
        total, size = self.place.tokens, self.options["shard_tokens"]
        target = self.options["val_tokens"]
        if self.has_val_source:  # it ends where the first unit of --source begins
            return
        if target is None and (total * VAL_SHARE >= size or self.ended):
            target = max(1, min(size, int(total * VAL_SHARE)))
        if target is None or (target >= total and not self.ended):
            return
        if target >= total:
            raise Unusable(f"{total:,} tokens are no corpus to cut {target:,} for validation off")
        end = self.document_start(target)
        if end is not None:
            self.decide(end, self.place)

    def decide(self, val_end: int, place: Part) -> None:
        """Let validation end with token `val_end`, and head.bin at `place`."""
        if not val_end:
            raise Unusable("no document was found in --val_source")
        self.val_end = val_end
        self.save_head(place)
        self.note({"val_end": val_end, "within": self.within})

    def document_start(self, target: int) -> int | None:
        """Return the last start of a document up to token `target`, but not the corpus' first;
        failing that the first one beyond; None if that has not been read yet."""
        stream = np.memmap(self.folder / "head.bin", np.uint16, "r")
        step = 1 << 20
        for stop in range(target + 1, 1, -step) if not self.searched else ():
            begin = max(1, stop - step)
            found = np.flatnonzero(stream[begin:stop] == EOT)
            if len(found):
                return begin + int(found[-1])
        for begin in range(max(target + 1, self.searched), len(stream), step):
            found = np.flatnonzero(stream[begin : begin + step] == EOT)
            if len(found):
                return begin + int(found[0])
        self.searched = len(stream)
        self.within = self.ended
        return target if self.within else None

    # Shards

    def cut_shards(self) -> None:
        """Have those shards written whose tokens are all there."""
        while self.val_end is not None and self.position < self.place.tokens:
            key, stop = self.shard_at(self.position)
            if stop > self.place.tokens:
                break
            tokens = self.cut(stop)
            # Behind head.bin the source is read on at the unit in which the shard ends.
            place = self.before if stop >= max(self.head, self.before.tokens) else None
            self.wait()
            self.writing = self.writer.submit(self.write, key, tokens, place)

    def shard_at(self, start: int) -> tuple[tuple[str, int], int]:
        """Return ((split, number), end) of the shard that begins with token `start`."""
        size, end = self.options["shard_tokens"], self.place.tokens if self.ended else math.inf
        if start < self.val_end:
            return ("val", start // size), min(start + size, self.val_end)
        return ("train", (start - self.val_end) // size), min(start + size, end)

    def cut(self, stop: int) -> np.ndarray:
        """Take tokens `position`..stop off the stream."""
        count, pieces = stop - self.position, []
        if self.position < self.head:
            with open(self.folder / "head.bin", "rb") as f:
                f.seek(2 * self.position)
                pieces.append(np.fromfile(f, np.uint16, min(stop, self.head) - self.position))
            count -= len(pieces[0])
        if count:
            rest = self.pending[0] if len(self.pending) == 1 else np.concatenate(self.pending)
            pieces.append(rest[:count])
            self.pending = [rest[count:]]
        self.position = stop
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def write(self, key: tuple[str, int], tokens: np.ndarray, place: Part | None) -> None:
        path = self.out / f"{self.options['prefix']}_{key[0]}_{key[1]:06d}.bin"
        entry = shards.write_shard(path, tokens)
        documents = int(np.count_nonzero(tokens == EOT))  # which no document's text can contain
        entry = {"name": entry["name"], "split": key[0], **entry, "documents": documents}
        self.shards[key] = entry
        self.note({"split": key[0], "number": key[1], "shard": entry}, place)

    def wait(self) -> None:
        if self.writing is not None:
            self.writing.result()
