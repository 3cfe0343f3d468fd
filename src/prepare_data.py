"""Any corpus -> shards of GPT-2 tokens; restartable, exact, on all cores.

    python src/prepare_data.py                                   FineWeb-Edu sample-10BT (28 GB)
    python src/prepare_data.py --source corpus.jsonl.zst         -> data/corpus
    python src/prepare_data.py --source 'books/*.txt' notes.txt --out data/books
    python src/prepare_data.py --source org/dataset --name subset --split train
    zcat *.gz | python src/prepare_data.py --source - --out data/mine
    python src/prepare_data.py --verify --out data/mine          recheck every shard's SHA-256

Sources: a data set of the Hugging Face hub; a local folder in the hub's layout (a README.md with
`configs`, or --name or --split given) or written by save_to_disk of `datasets`; files of Parquet,
JSON (.jsonl .ndjson .json: an object on each line, or an array of them), CSV (.csv .tsv, with a
header) and plain text (.txt .text); text also packed as .gz .zst .xz .bz2; folders of files (read
recursively, links are followed) and globs; - for standard input, and other pipes.

Text is UTF-8; UTF-16 and UTF-32 are known by their byte order mark, anything else by --encoding.

The token stream is `<|endoftext|>` followed by tiktoken's `encode_ordinary(text)` for each document
in the order of the source (files sorted by name). Text that spells a special token is text. The
first shard is validation, as in the common FineWeb recipe, but the cut lies between two documents:
whole documents go to validation as long as they fit into --val_tokens.

A document is a row or a record (its --text_key), or a file of plain text; with --separator each
part between two separators. Of a cut or corrupt file everything before the damage is kept; files of
a folder whose endings say nothing are left out; both are said. Nothing is published when more than
--allow_skipped of the documents, bytes or characters could not be used: exit code 2.

How it works. The main process cuts the source into units of about 2 MiB of text, always in the same
way. Worker processes tokenize them (and unpack Parquet's row groups) and send the tokens back; the
main process puts these in order and writes shards. A journal in DIR/.prepare says which shards are
finished: after kill -9 the same command goes on behind them, and the result does not depend on the
number of workers. Memory, however large the corpus: at most 0.3 GB in each process, three times a
shard (0.6 GB at the default size), and ten times the longest document.

Exit codes: 0 done; 2 wrong usage, bad input, disk full; 129/130/143 stopped by SIGHUP, SIGINT,
SIGTERM.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from basics import terminal  # says what is not installed

# isort: split
import argparse
import codecs
import dataclasses
import datetime
import glob
import json
import os
import re
import shlex
import shutil
import signal
import time
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from basics import durable, host, inputs, words
from checkpointing import run_folders
from tokens import corpus, sources
from tokens import shards as token_shards
from tokens.preparation import WORK, Part, Preparation, Unusable, odd_documents, tokenize_all
from tokens.sources import Found
from tokens.tokenizer import VOCAB_SIZE, fingerprint

# The reference data set: its state since July 2025. The bytes are those of sample/10BT's 14 files.
FINEWEB = "HuggingFaceFW/fineweb-edu"
FINEWEB_NAME = "sample-10BT"
FINEWEB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
FINEWEB_BYTES = 28_518_193_415
FINEWEB_TOKENS = 9_950_000_000
FINEWEB_OUT = Path("data/fineweb_edu_10B")

# --- Command --------------------------------------------------------------------------------------

# For the forecast: tokens per byte of FineWeb-Edu's Parquet and of English text; what gzip saves.
TOKENS_PER_BYTE = {"parquet": 0.35}
ELSE_PER_BYTE, COMPRESSED = 0.23, 3.0
TOKENS_PER_SECOND = 3.0e6  # of one core

PLAN = "plan.json"
PLAN_KEYS = "source val_source revision commits command date tokenizer_fingerprint options files"
OPTIONS = "prefix name split val_split text_key format separator val_tokens shard_tokens encoding"


def parse(argv: list[str] | None) -> argparse.Namespace:
    description, details = (__doc__ or "\n").split("\n", 1)  # none with python -OO
    counted = "".join(f"\n    {name:14}{what}" for name, what in corpus.COUNTS.items())
    parser = terminal.Parser(
        description=description,
        epilog=f"{details}\nCounted, said at the end, and kept in manifest.json:\n{counted}",
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
    formats = ["jsonl", "text", "csv", "parquet"]
    add("--format", choices=formats, help="for names that do not say it")
    add("--encoding", help="of text without a byte order mark, such as cp1252 or utf-16-le [utf-8]")
    add("--separator", default="", help=r"of documents in plain text, \n for one in each line")
    add("--val_source", nargs="+", default=[], help="validation; then --source is all training")
    add("--val_tokens", type=int, help="[one shard, but at most 5%% of the corpus]")
    add("--shard_tokens", type=int, default=100_000_000, help="[100000000]")
    add("--out", type=Path, help=f"folder of the shards [{FINEWEB_OUT}, or data/<from --source>]")
    share = "of documents, bytes or characters that may be left out or lost [0.01]"
    add("--allow_skipped", type=float, default=0.01, metavar="SHARE", help=share)
    add("--workers", type=int, default=host.cores(), help="processes [all cores]")
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
    args.out = Path(inputs.path(str(args.out or Path("data") / args.prefix)))
    args.separator = args.separator.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
    for name, least in (("workers", 1), ("shard_tokens", 1), ("val_tokens", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name} {value}: must be {least} or more")
    if args.val_source and args.val_tokens is not None:
        raise ValueError("--val_tokens and --val_source exclude each other: leave one out")
    if not 0 <= args.allow_skipped <= 1:
        raise ValueError(f"--allow_skipped {args.allow_skipped}: must be from 0 to 1")
    if (args.source + args.val_source).count("-") > 1:
        raise ValueError("--source -: standard input can be read once, name it once")
    try:
        "".encode(args.encoding or "utf-8")
        args.encoding = args.encoding and codecs.lookup(args.encoding).name
        args.encoding = None if args.encoding == "utf-8" else args.encoding
    except LookupError:
        raise ValueError(f"--encoding {args.encoding}: Python knows no such encoding") from None
    s = args.separator
    if (corpus.overlaps(s) and len(set(s)) > 1) or len(s.encode()) > corpus.BACK // 2:
        raise ValueError(
            f"--separator {s!r}: must be short and not end as it begins (like aba), or parts could "
            "be separated in more than one way"
        )
    return args


def source_name(source: str) -> str:
    """Return what shards and folder are called: a/b.gz -> b, hub/name -> name, a/*.txt -> a."""
    if source == "-":
        return "stdin"
    path = Path(os.path.expanduser(source))
    if sources.is_pipe(path):
        return "pipe"
    while glob.has_magic(path.name):
        path = path.parent
    name = path.resolve().name
    while os.path.splitext(name)[1].lower() in sources.FORMATS | sources.COMPRESSIONS:
        name = os.path.splitext(name)[0]
    return name


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP."""


def stop(number: int, _) -> None:
    raise Stopped(number)


@terminal.command
def main(argv: list[str] | None = None) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # of nohup
            signal.signal(number, stop)
    try:
        args = parse(argv)
        if args.verify:
            token_shards.verify(str(args.out))
            print(f"{args.out}: all shards are as the manifest says")
            return 0
        return prepare(args)
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        message = f"{e.strerror or e}{where}: the same command goes on once that is mended"
        code = 2
    except BrokenProcessPool:
        message, code = "a worker process was killed (out of memory?): fewer --workers", 1
    except Stopped as e:
        message, code = "stopped; the same command goes on from here", 128 + e.args[0]
    terminal.print_error(message)
    return code


def prepare(args: argparse.Namespace) -> int:
    """Find the source, compare with what the folder holds, run, write the manifest."""
    out, begun = args.out, read_plan(args.out)
    fineweb = args.source == [FINEWEB] and args.name == FINEWEB_NAME
    if fineweb:  # said before the network is asked for anything
        forecast(args, FINEWEB_BYTES, FINEWEB_TOKENS, exact=True)
        if args.dry_run:
            return 0
    found = sources.find_all(args, begun.get("commits", {}))
    files = found.files
    for note in found.notes[:9] + [f"and {len(found.notes) - 9} more"] * (len(found.notes) > 9):
        print(f"WARNING {note}", file=sys.stderr)
    say_left_out(args, found)
    plan = {
        "source": " ".join(args.source),
        "val_source": " ".join(args.val_source),
        "revision": " ".join(found.commits.values()),
        "commits": found.commits,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tokenizer_fingerprint": fingerprint(),
        "options": {name: getattr(args, name) for name in OPTIONS.split()},
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
        tokens = 0.0
        for file in files:
            ratio = TOKENS_PER_BYTE.get(file.kind, ELSE_PER_BYTE)
            tokens += file.size * ratio * (COMPRESSED if file.compression else 1)
        forecast(args, sum(f.size for f in files), tokens, exact=False)
    for file in files:  # a wrong column or a broken file is found now, not after hours
        corpus.check_columns(file, args.text_key)
    if args.dry_run:
        return 0
    with inputs.about("out", out):
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
        return fill(args, plan, found)
    finally:
        lock.release()


def say_left_out(args: argparse.Namespace, found: Found) -> None:
    """Name the files of folders that are not read; raise ValueError if they are too much of it."""
    if not found.left_out:
        return
    size, kept = sum(found.left_out.values()), sum(file.size for file in found.files)
    names = [os.path.basename(path) for path in sorted(found.left_out)]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    said = (
        f"{len(names)} file{'s' * (len(names) > 1)} left out, {words.size(size)} of "
        f"{words.size(size + kept)}: {', '.join(names[:5])}{more}: not one of {sources.KNOWN}"
    )
    if size > args.allow_skipped * (size + kept):
        raise ValueError(
            f"--allow_skipped {args.allow_skipped:g}: {said}; say what they are with --format, or "
            "name the files that you mean, or allow more"
        )
    print(f"WARNING {said}", file=sys.stderr)


def read_plan(out: Path) -> dict:
    """Return the plan of the preparation in a folder, finished or not; {} if there is none."""
    for path in (out / token_shards.MANIFEST, out / WORK / PLAN):
        if path.is_file():
            try:
                plan = json.loads(path.read_bytes())
                return {key: plan[key] for key in PLAN_KEYS.split()}
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"--out {out}: its {path.name} is not of this program") from None
    return {}


def refuse_changes(out: Path, old: dict, new: dict) -> None:
    """Raise ValueError if a restart has another source, tokenizer or option than it had first."""
    changes = [
        f"--{name} was {old['options'].get(name)!r} and is now {value!r}"
        for name, value in new["options"].items()
        if name != "prefix" and old["options"].get(name) != value
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
    """Say what is read and written and how long that takes; raise ValueError if it cannot fit."""
    about = "" if exact else "about "
    free = host.free_bytes(args.out)
    there = sum(p.stat().st_size for p in (args.out, args.out / WORK) for p in p.glob("*.bin"))
    need = max(0, 2 * tokens + 2 * min(tokens, 20 * args.shard_tokens) - there)  # .prepare/head.bin
    print(f"source  {' '.join(args.source)} {args.name or ''}".rstrip())
    if not size:
        print(f"size    not known beforehand; {words.size(free)} free in {args.out}", flush=True)
        return
    seconds = tokens / (args.workers * TOKENS_PER_SECOND)
    remote = "://" in args.source[0] or not os.path.exists(os.path.expanduser(args.source[0]))
    print(f"reads   {words.size(size)}" + (" over the network" if exact and remote else ""))
    print(f"writes  {about}{words.size(2 * tokens)} to {args.out} ({words.size(free)} free), "
          f"{about}{words.count(tokens)} tokens")  # fmt: skip
    print(f"time    about {words.duration(seconds)} with {args.workers} workers", end="")
    print(f"; the download {size / 1e8 / 60:.0f} min at 100 MB/s" if exact else "", flush=True)
    if free < need * (1 if exact else 0.5):  # the estimate may well be twice too large
        raise ValueError(
            f"--out {args.out}: needs {about}{words.size(need)}, {words.size(free)} are free; make "
            "room or give a folder on another disk"
        )


def fill(args: argparse.Namespace, plan: dict, found: Found) -> int:
    """Run the preparation in a folder that is ours, and end it with the manifest."""
    started, out, files = time.monotonic(), args.out, found.files
    size = 0 if any(file.pipe for file in files) else sum(file.size for file in files)
    preparation = Preparation(out, plan["options"], bool(args.val_source))
    preparation.resume()
    begun = preparation.place
    if begun.tokens:
        done = words.count(begun.tokens)
        print(f"going on from {done} tokens, {len(preparation.shards)} shards", flush=True)
    # Over a network half of the workers wait for an answer while the other half computes.
    local = all("://" not in f.path and f.kind != "datasets" for f in files)
    units = corpus.find_units(files, args, begun.next, begun.digest)
    # disable=None: no bar where standard error is no terminal, but a line every 10 seconds
    bar = tqdm(total=size or None, initial=begun.weight, unit="B", unit_scale=True, disable=None)
    shown = started
    try:
        workers = args.workers if local else 2 * args.workers
        for tokens, unit in tokenize_all(units, plan["options"], workers, local):
            preparation.take(tokens, unit)
            place, now = preparation.place, time.monotonic()
            speed = words.count((place.tokens - begun.tokens) / (now - started))
            said = f"{words.count(place.tokens)} tokens, {speed} tokens/s"
            bar.set_postfix_str(said, refresh=False)
            bar.update(unit.weight)
            if bar.disable and now - shown > 10:
                shown = now
                if size and place.weight > begun.weight:
                    left = (size - place.weight) / (place.weight - begun.weight) * (now - started)
                    said += f", {place.weight / size:.1%}, {words.duration(left)} left"
                print(f"  {said}", flush=True)
        for file in files:
            if file.sha256 and "://" not in file.path and file.kind != "datasets":
                again = sources.sign(dataclasses.replace(file, mtime_ns=0))
                if again.identity() != file.identity():
                    raise ValueError(f"{file.path} was changed while it was read: remove {out}")
        preparation.refuse_losses(args.allow_skipped, size, sum(found.left_out.values()))
        preparation.end()
    except Unusable:
        preparation.discard()
        raise
    finally:
        bar.close()
        preparation.close()
    place = preparation.place
    order = sorted(preparation.shards, key=lambda key: (key[0] == "train", key[1]))
    shards = [preparation.shards[key] for key in order]
    manifest = {
        "version": 1,
        "tokenizer": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "tokens": place.tokens,
        "val_tokens": preparation.val_end,
        "documents": place.counts["documents"],
        "counts": {name: place.counts[name] for name in corpus.COUNTS},
        "damaged": place.damage,
        "left_out": sorted(found.left_out),
        "split": "inside of the only document" if preparation.within else "between documents",
        **plan,
        "shards": shards,
    }
    token_shards.write_manifest(out, manifest)
    shutil.rmtree(out / WORK)
    report(out, manifest, place, place.tokens - begun.tokens, time.monotonic() - started)
    return 0


def report(out: Path, manifest: dict, place: Part, tokens: int, seconds: float) -> None:
    val, total = manifest["val_tokens"], manifest["tokens"]
    print(
        f"{out}: {len(manifest['shards'])} shards, {manifest['documents']:,} documents, "
        f"{total:,} tokens: {total - val:,} training, {val:,} ({val / total:.1%}) validation"
    )
    speed = words.count(tokens / seconds)
    print(f"{words.count(tokens)} tokens in {words.duration(seconds)}, {speed} tokens/s")
    if manifest["split"] != "between documents":
        print("The corpus is a single document: its beginning is validation, the rest training.")
    for line in odd_documents(place):
        print(f"  {line}")
    if place.counts["eot_text"]:
        print("WARNING <|endoftext|> stands in plain text: --separator", file=sys.stderr)
    for line in place.damage:
        print(f"WARNING damaged, only what comes before is in the shards: {line}", file=sys.stderr)
    print(
        f"next: python src/train_improved.py --data_dir {shlex.quote(str(out))} --use_tensorboard"
    )


if __name__ == "__main__":
    sys.exit(main())
