"""Any corpus -> shards of GPT-2 tokens; restartable, exact, on all cores.

    python src/prepare_data.py                                   FineWeb-Edu sample-10BT (28 GB)
    python src/prepare_data.py --source corpus.jsonl.zst         -> data/corpus
    python src/prepare_data.py --source 'books/*.txt' notes.txt --out data/books
    python src/prepare_data.py --source org/dataset --name subset --split train
    zcat *.gz | python src/prepare_data.py --source - --out data/mine
    python src/prepare_data.py --verify --out data/mine          recheck every shard's SHA-256

Sources: a data set of the Hugging Face hub; a local folder in the hub's layout (a README.md with
`configs`, or --name or --split given); Parquet, JSONL (.jsonl .ndjson .json) and plain text (.txt
.text) files, also as .gz or .zst, folders of them (read recursively) and globs; - for standard
input.

The token stream is `<|endoftext|>` followed by tiktoken's `encode_ordinary(text)` for each document
in the order of the source (files sorted by name). Text that spells a special token is text. The
first shard is validation, as in the common FineWeb recipe, but the cut lies between two documents:
whole documents go to validation as long as they fit into --val_tokens.

What is a document, and what becomes of a bad one (counted, reported at the end and in manifest.json
under "counts", never fatal):

    Parquet, JSONL    a row, a line: its --text_key
    plain text        a file; with --separator each part between two separators
    empty             the text is "": kept, a lone <|endoftext|>, as the usual scripts do
    invalid_utf8      bad bytes and lone surrogates: kept, U+FFFD in their place
    with_nul          contains U+0000: kept as it is
    huge              more than 10 million characters: kept as it is
    not_text          the key is absent, null or not a string: skipped
    broken_json       the line is not JSON: skipped
    blank             a line or part of nothing but white space is no document
    damaged files     a cut or corrupt .gz/.zst: everything before the damage is kept, and said

How it works. The source is cut into units of about 2 MiB of text, always in the same way. Worker
processes read and tokenize units (where a file cannot be entered in the middle, the main process
reads and hands them the bytes) and leave each one's tokens in DIR/.prepare. Shards are cut out of
these in order, by workers again, so that nothing waits for one writer. A journal there says which
units and shards are finished: after kill -9 the same command goes on from it, and the result does
not depend on the number of workers. Memory, however large the corpus: at most 0.3 GB in each
process, two shards that are being written (0.4 GB at the default size), and ten times the longest
document.

Exit codes: 0 done; 2 wrong usage, bad input, disk full; 130/143 stopped by SIGINT/SIGTERM.
"""

import argparse
import bisect
import contextlib
import dataclasses
import datetime
import errno
import glob
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from basics import durable, host
from checkpointing import run_folders
from tokens import corpus
from tokens import shards as token_shards
from tokens.corpus import SourceFile, Span
from tokens.encoding import NO_TOKENS, encode_documents, encode_text, encoders
from tokens.tokenizer import EOT, VOCAB_SIZE, fingerprint

# The reference data set: its state since July 2025. The bytes are those of sample/10BT's 14 files.
FINEWEB = "HuggingFaceFW/fineweb-edu"
FINEWEB_NAME = "sample-10BT"
FINEWEB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
FINEWEB_BYTES = 28_518_193_415
FINEWEB_TOKENS = 9_950_000_000
FINEWEB_OUT = Path("data/fineweb_edu_10B")

VAL_SHARE = 0.05  # what a small corpus gives to validation, instead of a whole shard
SHARD_JOBS = 2  # shards written at a time: bounds memory; two writers outrun 100 tokenizers

# --- Workers --------------------------------------------------------------------------------------


def start_worker(parent: int) -> None:
    """In each worker process. Ctrl-C is the parent's business; when it is killed, leave at once."""
    encoders()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave_with_parent():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def part_path(folder: Path, unit: int) -> Path:
    return folder / f"part_{unit:08d}.bin"


def tokenize_unit(unit: int, spans: list[Span], folder: Path, options: dict) -> dict:
    """Write the tokens of a unit as bare uint16; return what the journal says of it."""
    counts, crc, tokens = Counter(), 0, 0
    path = part_path(folder, unit)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            for span in spans:
                for array in span_tokens(span, options, counts):
                    f.write(array)
                    crc, tokens = zlib.crc32(array, crc), tokens + len(array)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk
        raise
    last = spans[-1]
    return {
        "unit": unit,
        "split": last.file.split,
        "tokens": tokens,
        "crc": crc,
        "weight": sum(s.weight for s in spans),
        "next": last.next,
        "digest": last.digest if last.file.path == "-" else "",
        "damage": [f"{s.file.name}: {s.damage}" for s in spans if s.damage],
        "counts": counts,
    }


def span_tokens(span: Span, options: dict, counts: Counter):
    """The tokens of a span, in arrays of uint16."""
    for content in corpus.read_span(span, options, counts):
        if isinstance(content, list):
            yield encode_documents(content, counts)
            continue
        if span.first:
            counts["documents"] += 1
            yield np.array([EOT], np.uint16)
        yield encode_text(content)


def cut_shard(path: Path, split: str, pieces: list[tuple[int, int, int]], folder: Path) -> dict:
    """Write a shard of [start, stop) of some units' tokens; return its entry in the manifest."""
    tokens = np.empty(sum(stop - start for _, start, stop in pieces), np.uint16)
    filled = documents = 0
    for unit, start, stop in pieces:
        piece = tokens[filled : filled + stop - start]
        with open(part_path(folder, unit), "rb") as f:
            f.seek(start * 2)
            assert f.readinto(piece) == piece.nbytes
        filled += len(piece)
        documents += int(np.count_nonzero(piece == EOT))  # which no document's text can contain
    entry = token_shards.write_shard(path, tokens)
    return {"name": entry["name"], "split": split, **entry, "documents": documents}


# --- Preparation ----------------------------------------------------------------------------------

WORK = ".prepare"  # folder inside DIR for everything that a restart needs
PATIENCE = 32  # units without any document, after which it is no use to read on


class Unusable(ValueError):
    """Nothing can be made of this corpus with these options; no shard has been written."""


class Preparation:
    """One run into one folder: hands out units, keeps the journal, has shards cut in order.

    DIR/.prepare/plan.json     source and options, which a restart must find unchanged
    DIR/.prepare/journal       a line for each finished unit and shard, and for what was decided
    DIR/.prepare/part_*.bin    tokens of units that are not yet in a finished shard
    """

    def __init__(self, out: Path, plan: dict, files: list[SourceFile]):
        self.out, self.files = out, files
        self.folder, self.options = out / WORK, plan["options"]
        self.jobs = {}  # future -> unit, or (split, number) of a shard
        # units: `records` has what is finished and not yet swept; those finished without a gap
        # are counted in `offsets` (tokens before each unit), `counts`, `damage` and `place`
        self.records, self.offsets = {}, [0]
        self.counts, self.damage = Counter(), []
        self.place, self.digest = (0, 0), ""  # where the next unit begins in the source
        self.units = None  # how many there are, once the source has been read to its end
        # shards
        self.shards = {}  # finished ones: (split, number) -> entry in the manifest
        self.val_end = None  # tokens of validation, once decided
        self.within = False  # the corpus is a single document, and validation ends inside of it
        self.cut = 0  # tokens in shards that are finished or being written
        self.finished = 0  # tokens in shards that are finished without a gap
        self.swept = 0  # units that lie in those
        self.tokens = self.weight = 0  # of all finished units, for the progress

    def known(self) -> int:
        return len(self.offsets) - 1

    def ended(self) -> bool:
        return self.known() == self.units

    # The journal

    def resume(self) -> None:
        """Take up what an interrupted run left in the folder, and sweep what it did not finish."""
        path, whole = self.folder / "journal", 0
        self.journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break  # half a line, or NULs after a power cut
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            if "unit" in record:
                self.records[record["unit"]] = record
            elif "shard" in record:
                self.shards[record["split"], record["number"]] = record["shard"]
            elif "val_end" in record:
                self.val_end, self.within = record["val_end"], record["within"]
            else:
                self.units = record["units"]
        os.ftruncate(self.journal, whole)
        os.lseek(self.journal, 0, os.SEEK_END)
        for entry in self.shards.values():
            shard = self.out / entry["name"]
            if not shard.is_file() or shard.stat().st_size != entry["bytes"]:
                raise ValueError(f"{shard} was finished, and is missing or cut: remove {self.out}")
        finished, end = self.end_of_finished(), 0
        for unit in sorted(self.records):
            end += self.records[unit]["tokens"]
            if end > finished and not self.is_intact(unit):
                del self.records[unit]
                end = float("inf")  # what comes after is checked too
        self.count()
        kept = {part_path(self.folder, unit) for unit in self.records}
        for path in self.folder.iterdir():
            if path.name.startswith(".tmp-") or (path.suffix == ".bin" and path not in kept):
                path.unlink()
        for path in self.out.glob(f".tmp-{self.options['prefix']}_*"):  # of tokens/shards
            path.unlink()
        self.tokens = sum(r["tokens"] for r in self.records.values())
        self.weight = sum(r["weight"] for r in self.records.values())
        self.sweep()

    def is_intact(self, unit: int) -> bool:
        path, record = part_path(self.folder, unit), self.records[unit]
        return path.is_file() and zlib.crc32(path.read_bytes()) == record["crc"]

    def note(self, record: dict, durable: bool = True) -> None:
        os.write(self.journal, json.dumps(record).encode() + b"\n")
        if durable:
            os.fsync(self.journal)

    # Units

    def run(self, pool: ProcessPoolExecutor, most: int, show: Callable) -> None:
        """Hand out units, `most` at a time, and wait until all shards are written."""
        units = () if self.ended() else corpus.find_units(
            self.files, self.options, self.place, self.digest
        )  # fmt: skip
        unit = self.known()
        for spans in units:
            while len(self.jobs) >= most:
                self.step(pool, show)
            if unit not in self.records:
                job = pool.submit(tokenize_unit, unit, spans, self.folder, self.options)
                self.jobs[job] = unit
            unit += 1
        if self.units is None:
            self.units = unit
            self.note({"units": unit})
        self.count()
        self.cut_shards(pool)
        while self.jobs:
            self.step(pool, show)
        assert self.ended() and self.finished == self.offsets[-1]

    def step(self, pool: ProcessPoolExecutor, show: Callable) -> None:
        """Wait until some job is finished, note it, and start what has become possible."""
        for job in wait(self.jobs, timeout=1, return_when=FIRST_COMPLETED).done:
            key, result = self.jobs.pop(job), job.result()
            if isinstance(key, int):
                self.note(result, durable=False)
                self.records[key] = result
                self.tokens += result["tokens"]
                self.weight += result["weight"]
                self.count()
            else:
                self.shards[key] = result
                self.note({"split": key[0], "number": key[1], "shard": result})
                self.sweep()
            self.cut_shards(pool)
        show()

    def count(self) -> None:
        """Take in the units that are finished without a gap."""
        while record := self.records.get(self.known()):
            self.offsets.append(self.offsets[-1] + record["tokens"])
            self.counts.update(record["counts"])
            self.damage += record["damage"]
            self.place, self.digest = tuple(record["next"]), record["digest"]
        if not self.offsets[-1] and (self.ended() or self.known() >= PATIENCE):
            odd = ", ".join(f"{n:,} {corpus.COUNTS[k]}" for k, n in self.counts.items() if n)
            key = self.options["text_key"]
            raise Unusable(f"no document was found with --text_key {key}: {odd or 'no data'}")

    # Shards

    def cut_shards(self, pool: ProcessPoolExecutor) -> None:
        """Have those shards written whose tokens are all there."""
        if self.val_end is None:
            self.decide_val_end()
        while self.val_end is not None and self.cut < self.offsets[-1]:
            key, stop = self.shard_at(self.cut)
            writing = sum(isinstance(k, tuple) for k in self.jobs.values())
            if stop > self.offsets[-1] or writing >= SHARD_JOBS:
                break
            if key not in self.shards:
                path = self.out / f"{self.options['prefix']}_{key[0]}_{key[1]:06d}.bin"
                job = pool.submit(cut_shard, path, key[0], self.pieces(stop), self.folder)
                self.jobs[job] = key
            self.cut = stop

    def shard_at(self, start: int) -> tuple[tuple[str, int], int]:
        """((split, number), end) of the shard that begins with token `start`."""
        size, end = self.options["shard_tokens"], self.offsets[-1] if self.ended() else math.inf
        if start < self.val_end:
            return ("val", start // size), min(start + size, self.val_end)
        return ("train", (start - self.val_end) // size), min(start + size, end)

    def pieces(self, stop: int) -> list[tuple[int, int, int]]:
        """Tokens self.cut..stop of the stream as (unit, start, stop) within units."""
        pieces, unit = [], bisect.bisect_right(self.offsets, self.cut) - 1
        while self.offsets[unit] < stop:
            low, high = self.offsets[unit], self.offsets[unit + 1]
            if low < high:
                pieces.append((unit, max(self.cut, low) - low, min(stop, high) - low))
            unit += 1
        return pieces

    def end_of_finished(self) -> int:
        """Tokens in the shards that are finished without a gap."""
        end = 0
        for split in ("val", "train"):
            for number in itertools.count():
                if (split, number) not in self.shards:
                    break
                end += self.shards[split, number]["tokens"]
            if self.val_end is None or end < self.val_end:
                break
        return end

    def sweep(self) -> None:
        """Remove the parts that lie in finished shards."""
        self.finished = self.end_of_finished()
        self.cut = max(self.cut, self.finished)
        while self.swept < self.known() and self.offsets[self.swept + 1] <= self.finished:
            part_path(self.folder, self.swept).unlink(missing_ok=True)
            del self.records[self.swept]
            self.swept += 1

    # Validation

    def decide_val_end(self) -> None:
        """Set `val_end`, unless too little has been read to tell."""
        total, size = self.offsets[-1], self.options["shard_tokens"]
        target = self.options["val_tokens"]
        if self.files[0].split == "val":  # --val_source
            val_units = [u for u in range(self.known()) if self.records[u]["split"] == "val"]
            if len(val_units) == self.known() and not self.ended():
                return
            self.val_end = self.offsets[len(val_units)]
            if self.val_end in (0, total):
                where = "--source" if self.val_end else "--val_source"
                raise Unusable(f"no document was found in {where}")
        else:
            if target is None and (total * VAL_SHARE >= size or self.ended()):
                target = max(1, min(size, int(total * VAL_SHARE)))
            if target is None or (target >= total and not self.ended()):
                return
            if target >= total:
                raise Unusable(
                    f"{total:,} tokens are no corpus to cut {target:,} for validation off"
                )
            self.val_end = self.document_start(target)
        if self.val_end is not None:
            self.note({"val_end": self.val_end, "within": self.within})

    def document_start(self, target: int) -> int | None:
        """The last start of a document up to token `target`, but not the corpus' first; failing
        that the first one beyond; None if that has not been read yet."""

        def starts(unit: int) -> np.ndarray:
            if not self.records[unit]["counts"].get("documents"):
                return NO_TOKENS  # inside of a long text
            tokens = np.fromfile(part_path(self.folder, unit), np.uint16)
            return np.flatnonzero(tokens == EOT) + self.offsets[unit]

        middle = bisect.bisect_right(self.offsets, target) - 1
        for unit in range(middle, -1, -1):
            found = starts(unit)
            found = found[(found > 0) & (found <= target)]
            if len(found):
                return int(found[-1])
        for unit in range(middle, self.known()):
            found = starts(unit)
            found = found[found > target]
            if len(found):
                return int(found[0])
        self.within = self.ended()
        return target if self.within else None


# --- Progress -------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal; in a log a line every 10 seconds."""

    def __init__(self, preparation: Preparation):
        self.preparation = preparation
        self.tokens, self.weight = preparation.tokens, preparation.weight  # of earlier starts
        self.total = sum(file.size for file in preparation.files)  # 0: not known
        self.started = self.shown = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            total = self.total or None
            self.bar = tqdm(total=total, initial=self.weight, unit="B", unit_scale=True)

    def show(self) -> None:
        now, p = time.monotonic(), self.preparation
        if now - self.shown < (0.5 if self.bar is not None else 10):
            return
        self.shown = now
        speed = (p.tokens - self.tokens) / (now - self.started)
        written = sum(entry["bytes"] for entry in p.shards.values()) + 2 * (p.tokens - p.finished)
        text = f"{short(p.tokens)} tokens, {short(speed)} tokens/s, {short(written)}B written"
        if self.bar is not None:
            self.bar.n = p.weight
            self.bar.set_postfix_str(text)
        else:
            if self.total and p.weight > self.weight:
                share = (self.total - p.weight) / (p.weight - self.weight)
                remaining = datetime.timedelta(seconds=int(share * (now - self.started)))
                text += f", {p.weight / self.total:.1%}, {remaining} remaining"
            print(f"  {text}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.n = self.preparation.weight
            self.bar.close()


def short(number: float) -> str:
    """1234567 -> 1.23M"""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}T"


# --- Command --------------------------------------------------------------------------------------

# For the forecast: tokens per byte of FineWeb-Edu's Parquet and of English text; what gzip saves.
TOKENS_PER_BYTE = {"parquet": 0.35, "jsonl": 0.23, "text": 0.23, "datasets": 0.25}
COMPRESSED = 3.0
TOKENS_PER_SECOND = 3.0e6  # of one core

PLAN = "plan.json"
PLAN_KEYS = ("source", "val_source", "revision", "commits", "command", "date")
PLAN_KEYS += ("tokenizer_fingerprint", "options", "files")
OPTIONS = ("prefix", "name", "split", "val_split", "text_key", "format", "separator", "val_tokens")
OPTIONS += ("shard_tokens",)


def parse(argv: list[str] | None) -> argparse.Namespace:
    description, details = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--FLAG VALUE ...]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--source", nargs="+", default=[FINEWEB], help=f"what to read [{FINEWEB}]")
    add("--name", help=f"the data set's configuration [{FINEWEB_NAME} for {FINEWEB}]")
    add("--split", help="the data set's split [train]")
    add("--val_split", help="the split of --val_source, if it is another")
    add("--revision", help=f"branch, tag or commit on the hub [{FINEWEB} is pinned; else main]")
    add("--text_key", default="text", help="column or JSON key of the text [text]")
    add("--format", choices=["jsonl", "text", "parquet"], help="for names that do not say it")
    add("--separator", default="", help=r"of documents in plain text, \n for one in each line")
    add("--val_source", nargs="+", default=[], help="validation; then --source is all training")
    add("--val_tokens", type=int, help="[one shard, but at most 5%% of the corpus]")
    add("--shard_tokens", type=int, default=100_000_000, help="[100000000]")
    add("--out", type=Path, help=f"folder of the shards [{FINEWEB_OUT}, or data/<from --source>]")
    add("--workers", type=int, default=cores(), help="processes [all cores]")
    add("--dry_run", action="store_true", help="say what would be done, and stop")
    add("--verify", action="store_true", help="only recheck the shards in --out")
    args = parser.parse_args(argv)
    args.prefix = re.sub(r"[^A-Za-z0-9_.-]+", "_", source_name(args.source[0])).strip("_.-")
    args.prefix = args.prefix or "data"
    if args.source == [FINEWEB]:
        args.revision = args.revision or FINEWEB_REVISION
        args.name, args.prefix = args.name or FINEWEB_NAME, "fineweb_edu"
        if args.name == FINEWEB_NAME:
            args.out = args.out or FINEWEB_OUT
    args.out = args.out or Path("data") / args.prefix
    args.separator = args.separator.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
    for name, least in (("workers", 1), ("shard_tokens", 1), ("val_tokens", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name} {value}: must be {least} or more")
    if args.val_source and args.val_tokens is not None:
        raise ValueError("--val_tokens and --val_source exclude each other: leave one out")
    if "-" in args.source + args.val_source and len(args.source + args.val_source) > 1:
        raise ValueError("--source -: standard input must be the only source")
    s = args.separator
    if any(s[:i] == s[-i:] for i in range(1, len(s))) or len(s.encode()) > corpus.BACK // 2:
        raise ValueError(
            f"--separator {s!r}: must be short and not end as it begins (like \\n\\n or aba), "
            "or parts could be separated in more than one way"
        )
    return args


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_name(source: str) -> str:
    """What shards and folder are called: hub/name -> name, a/b.jsonl.gz -> b, a/*.txt -> a."""
    if source == "-":
        return "stdin"
    path = Path(source).expanduser()
    while glob.has_magic(path.name):
        path = path.parent
    name = path.resolve().name
    while os.path.splitext(name)[1].lower() in corpus.FORMATS | corpus.COMPRESSIONS:
        name = os.path.splitext(name)[0]
    return name


class Stopped(BaseException):
    """SIGINT or SIGTERM."""


def stop(number: int, _) -> None:
    raise Stopped(number)


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        args = parse(argv)
        if args.verify:
            return verify(args.out)
        return prepare(args)
    except ValueError as e:
        message, code = str(e), 2
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
            raise
        where = f" ({e.filename})" if e.filename else ""
        message = f"{e.strerror}{where}: the same command goes on once that is mended"
        code = 2
    except BrokenProcessPool:
        message, code = "a worker process was killed (out of memory?): fewer --workers", 1
    except Stopped as e:
        message, code = "stopped; the same command goes on from here", 128 + e.args[0]
    print(f"prepare_data.py: {message}", file=sys.stderr)
    return code


def verify(out: Path) -> int:
    """Recompute the SHA-256 of every shard; ValueError names the bad ones."""
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        token_shards.verify(str(out), progress)
    print(f"{out}: all shards are as the manifest says")
    return 0


def prepare(args: argparse.Namespace) -> int:
    """Find the source, compare with what the folder holds, run, write the manifest."""
    out, begun = args.out, read_plan(args.out)
    fineweb = args.source == [FINEWEB] and args.name == FINEWEB_NAME
    if fineweb:  # said before the network is asked for anything
        forecast(args, FINEWEB_BYTES, FINEWEB_TOKENS, exact=True)
        if args.dry_run:
            return 0
    files, commits = [], {}
    for split, sources in (("val", args.val_source), ("train", args.source)):
        for source in sources:
            known = begun.get("commits", {}).get(source, "")
            found, commit = corpus.find_files(source, split, args, known)
            files += found
            commits |= {source: commit} if commit else {}
    plan = {
        "source": " ".join(args.source),
        "val_source": " ".join(args.val_source),
        "revision": " ".join(commits.values()),
        "commits": commits,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tokenizer_fingerprint": fingerprint(),
        "options": {name: getattr(args, name) for name in OPTIONS},
        "files": [file.identity() for file in files],
    }
    if begun:
        refuse_changes(out, begun, plan)
        plan = begun  # with command and date of the first start
        if (out / token_shards.MANIFEST).exists():
            shutil.rmtree(out / WORK, ignore_errors=True)
            print(f"{out} holds this data already (--verify rechecks it)")
            return 0
    elif out.exists() and (not out.is_dir() or any(out.glob("*.bin")) or any(out.glob("*.npy"))):
        raise ValueError(f"--out {out}: something else is there already; give another folder")
    if not fineweb:
        tokens = sum(
            f.size * TOKENS_PER_BYTE.get(f.kind, 0) * (COMPRESSED if f.compression else 1)
            for f in files
        )
        forecast(args, sum(f.size for f in files), tokens, exact=False)
    for file in files:  # a wrong column or a broken file is found now, not after hours
        if file.kind == "parquet" and "://" not in file.path:
            corpus.open_parquet(file.path, file.size, args.text_key)
    if args.dry_run:
        return 0
    durable.check_writable(out / WORK)
    lock = run_folders.RunLock()
    try:
        lock.acquire(out / WORK)
    except ValueError as e:
        raise ValueError(str(e).replace("--run_name", "--out")) from None
    try:
        if read_plan(out) != begun or (out / token_shards.MANIFEST).exists():
            raise ValueError(f"{out}: another process was at work here just now; try again")
        if not begun:
            text = json.dumps(plan, indent=1)
            durable.write(out / WORK / PLAN, text.encode())
        return fill(out, plan, files, args.workers)
    except Unusable:
        shutil.rmtree(out / WORK)
        with contextlib.suppress(OSError):
            out.rmdir()  # unless something is in it
        raise
    finally:
        lock.release()


def read_plan(out: Path) -> dict:
    """The plan of the preparation that a folder holds, finished or not; {} if it holds none."""
    for path in (out / token_shards.MANIFEST, out / WORK / PLAN):
        if path.is_file():
            try:
                plan = json.loads(path.read_bytes())
                return {key: plan[key] for key in PLAN_KEYS}
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"--out {out}: its {path.name} is not of this program") from None
    return {}


def refuse_changes(out: Path, old: dict, new: dict) -> None:
    """ValueError if a restart has another source, tokenizer or option than the first start."""
    changes = [
        f"--{name} was {old['options'][name]!r} and is now {value!r}"
        for name, value in new["options"].items()
        if name != "prefix" and old["options"][name] != value
    ]
    if old["tokenizer_fingerprint"] != new["tokenizer_fingerprint"]:
        changes.append(
            f"the tokenizer was {old['tokenizer_fingerprint']} and is now "
            f"{new['tokenizer_fingerprint']}"
        )
    if old["commits"] != new["commits"]:
        changes.append(f"the data set's commit was {old['revision']} and is now {new['revision']}")
    before, after = ({(f[0], f[1]): f for f in plan["files"]} for plan in (old, new))
    changes += [f"{name} is no longer in the source" for _, name in before.keys() - after.keys()]
    changes += [f"{name} is new in the source" for _, name in after.keys() - before.keys()]
    changes += [
        f"{key[1]} has changed" for key in before.keys() & after.keys() if before[key] != after[key]
    ]
    if not changes and old["files"] != new["files"]:
        changes = ["the files come in another order"]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            f"--out {out} holds another preparation: {'; '.join(sorted(changes)[:3])}{more}. Give "
            "the command it was begun with, or another --out, or remove the folder"
        )


def forecast(args: argparse.Namespace, size: int, tokens: float, exact: bool) -> None:
    """Say what will be read and written and how long it takes; ValueError if it cannot fit."""
    about = "" if exact else "about "
    free = host.free_bytes(args.out)
    there = sum(p.stat().st_size for p in (args.out, args.out / WORK) for p in p.glob("*.bin"))
    need = max(0, 2 * tokens + 4 * min(tokens, args.shard_tokens) - there)
    print(f"source  {' '.join(args.source)} {args.name or ''}".rstrip())
    if not size:
        print(f"size    not known beforehand; {short(free)}B free in {args.out}")
        return
    seconds = tokens / (args.workers * TOKENS_PER_SECOND)
    duration = datetime.timedelta(seconds=round(seconds, 0 if seconds < 600 else -2))
    remote = "://" in args.source[0] or not Path(args.source[0]).expanduser().exists()
    print(f"reads   {short(size)}B" + (" over the network" if exact and remote else ""))
    print(f"writes  {about}{short(2 * tokens)}B to {args.out} ({short(free)}B free), "
          f"{about}{short(tokens)} tokens")  # fmt: skip
    print(f"time    about {duration} with {args.workers} workers", end="")
    print(f"; the download {size / 1e8 / 60:.0f} min at 100 MB/s" if exact else "", flush=True)
    if free < need * (1 if exact else 0.5):  # the estimate may well be twice too large
        raise ValueError(
            f"--out {args.out}: needs {about}{short(need)}B, {short(free)}B are free; make room or "
            "give a folder on another disk"
        )


def fill(out: Path, plan: dict, files: list[SourceFile], workers: int) -> int:
    """Run the preparation in a folder that is ours, and end it with the manifest."""
    started = time.monotonic()
    encoders()  # before the workers are forked, which then have them
    preparation = Preparation(out, plan, files)
    preparation.resume()
    before = preparation.tokens
    if before:
        print(f"going on from {short(before)} tokens, {len(preparation.shards)} shards", flush=True)
    # Forked workers start at once, but must not inherit network connections. Over a network half of
    # the workers wait for an answer while the other half computes.
    local = all("://" not in f.path and f.kind != "datasets" for f in files)
    context = multiprocessing.get_context("fork" if local and sys.platform == "linux" else "spawn")
    workers = workers if local else 2 * workers
    pool = ProcessPoolExecutor(workers, context, start_worker, (os.getpid(),))
    progress = Progress(preparation)
    try:
        preparation.run(pool, workers + 2, progress.show)
    finally:
        progress.close()
        pool.shutdown(cancel_futures=True)
    for file in files:
        if file.sha256 and "://" not in file.path and file.kind != "datasets":
            again = dataclasses.replace(file, mtime_ns=0)
            if corpus.sign(again) != file:
                raise ValueError(f"{file.path} was changed while it was read: remove {out}")
    order = sorted(preparation.shards, key=lambda key: (key[0] == "train", key[1]))
    shards = [preparation.shards[key] for key in order]
    manifest = {
        "version": 1,
        "tokenizer": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "tokens": preparation.offsets[-1],
        "val_tokens": preparation.val_end,
        "documents": preparation.counts.pop("documents"),
        "counts": {name: preparation.counts[name] for name in corpus.COUNTS},
        "damaged": preparation.damage,
        "split": "inside of the only document" if preparation.within else "between documents",
        **plan,
        "shards": shards,
    }
    token_shards.write_manifest(out, manifest)
    shutil.rmtree(out / WORK)
    report(out, manifest, preparation.tokens - before, time.monotonic() - started)
    return 0


def report(out: Path, manifest: dict, tokens: int, seconds: float) -> None:
    val, total = manifest["val_tokens"], manifest["tokens"]
    print(
        f"{out}: {len(manifest['shards'])} shards, {manifest['documents']:,} documents, "
        f"{total:,} tokens: {total - val:,} training, {val:,} ({val / total:.1%}) validation"
    )
    print(f"{short(tokens)} tokens in {seconds:.1f} s, {short(tokens / seconds)} tokens/s")
    if manifest["split"] != "between documents":
        print("The corpus is a single document: its beginning is validation, the rest training.")
    for name, text in corpus.COUNTS.items():
        if manifest["counts"][name]:
            print(f"  {manifest['counts'][name]:,} {text}")
    for line in manifest["damaged"]:
        print(f"WARNING: damaged, only what comes before is in the shards: {line}", file=sys.stderr)
    print(f"next: python src/train_improved.py --data_dir {out} --use_tensorboard")


if __name__ == "__main__":
    sys.exit(main())
