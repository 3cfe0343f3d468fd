"""Data preparation against the usual recipe and against its own limit, in one run on one machine.

    python benchmarks/prepare.py [--copies 8] [--rounds 3] [--format jsonl.gz]

The usual recipe (build-nanogpt's fineweb.py, written anew here): the main process reads documents
and hands them to a pool of one process per two cores, `imap` with chunks of 16; each worker makes a
NumPy array of `[EOT] + encode_ordinary(text)` of each document; the main process fills shards and
saves them. Ours: `prepare_data.py` as a user calls it, start-up and manifest included. The limit:
documents already in memory, one process per core doing nothing but `encode_ordinary`, or what
prepare_data.py does, joined documents and `encode_to_numpy`.

The corpus is that of ../shared/data, repeated. The kinds are run in turns, so that what else the
machine does hits all of them; the best of the rounds counts. Tokens are compared at the end.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import prepare_data  # noqa: E402
from tokens import encoding, shards  # noqa: E402
from tokens.tokenizer import EOT, get_tokenizer  # noqa: E402

BOOKS = ROOT.parent / "shared" / "data" / "books_train.jsonl.gz"
SHARD_TOKENS = 10_000_000


def read(path: Path):
    """The documents of a file, one after the other."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
            yield from batch.column(0).to_pylist()
        return
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as f:
        for line in f:
            yield json.loads(line)["text"]


def write(path: Path, copies: int) -> None:
    documents = list(read(BOOKS))
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"text": documents})
        with pq.ParquetWriter(path, table.schema) as writer:
            for _ in range(copies):
                writer.write_table(table, row_group_size=250)
        return
    with gzip.open(path, "wt", 6) if path.suffix == ".gz" else open(path, "w") as f:
        for _ in range(copies):
            f.writelines(json.dumps({"text": text}) + "\n" for text in documents)


# --- The usual recipe -----------------------------------------------------------------------------


def tokenize(text: str) -> np.ndarray:
    return np.array([EOT, *get_tokenizer().encode_ordinary(text)]).astype(np.uint16)


def usual_recipe(path: Path, out: Path) -> int:
    shard, filled, number, total = np.empty(SHARD_TOKENS, np.uint16), 0, 0, 0
    with multiprocessing.Pool(max(1, cores() // 2)) as pool:
        for tokens in pool.imap(tokenize, read(path), chunksize=16):
            total += len(tokens)
            while filled + len(tokens) >= SHARD_TOKENS:
                room = SHARD_TOKENS - filled
                shard[filled:] = tokens[:room]
                np.save(out / f"{number:06d}", shard)
                tokens, filled, number = tokens[room:], 0, number + 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    np.save(out / f"{number:06d}", shard[:filled])
    return total


# --- The tokenizer alone --------------------------------------------------------------------------


def encode_share(texts: list[str], joined: bool, barrier, queue) -> None:
    encoder, _ = encoding.encoders()
    barrier.wait()
    started, total = time.perf_counter(), 0
    if joined:
        for i in range(0, len(texts), 100):
            total += len(encoding.encode_documents(texts[i : i + 100], Counter()))
    else:
        total = sum(len(encoder.encode_ordinary(text)) for text in texts) + len(texts)
    queue.put((total, time.perf_counter() - started))


def tokenizer_alone(texts: list[str], joined: bool) -> float:
    """Tokens per second of one process per core: what they did over the time of the slowest."""
    n = cores()
    barrier, queue = multiprocessing.Barrier(n), multiprocessing.Queue()
    processes = [
        multiprocessing.Process(target=encode_share, args=(texts[i::n], joined, barrier, queue))
        for i in range(n)
    ]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(total for total, _ in results) / max(seconds for _, seconds in results)


# --- Comparison -----------------------------------------------------------------------------------


def cores() -> int:
    return prepare_data.cores()


def cpu_seconds() -> float:
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def measure(function) -> tuple[int, float, float]:
    """(tokens, seconds, seconds of CPU)"""
    cpu, started = cpu_seconds(), time.perf_counter()
    tokens = function()
    return tokens, time.perf_counter() - started, cpu_seconds() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--copies", type=int, default=8, help="of the books corpus [8]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", default="jsonl.gz", choices=["jsonl.gz", "jsonl", "parquet"])
    args = parser.parse_args()
    if not BOOKS.exists():
        sys.exit(f"benchmarks/prepare.py: {BOOKS} is needed")
    get_tokenizer()
    work = Path(tempfile.mkdtemp(prefix="prepare-benchmark-"))
    try:
        path = work / f"books.{args.format}"
        write(path, args.copies)
        size = path.stat().st_size / 1e6
        print(f"{args.copies} x books as {args.format}: {size:.0f} MB, {cores()} cores", flush=True)
        compare(path, work, args.rounds)
    finally:
        shutil.rmtree(work)


def compare(path: Path, work: Path, rounds: int) -> None:
    usual, ours = work / "usual", work / "ours"
    command = [sys.executable, ROOT / "src" / "prepare_data.py", "--source", path, "--out", ours]
    command += ["--shard_tokens", str(SHARD_TOKENS), "--val_tokens", "100000"]

    def run_usual() -> int:
        shutil.rmtree(usual, ignore_errors=True)
        usual.mkdir()
        return usual_recipe(path, usual)

    def run_ours() -> int:
        shutil.rmtree(ours, ignore_errors=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((ours / "manifest.json").read_text())["tokens"]

    texts = list(read(path))[: 4 * 1250]
    best: dict[str, tuple] = {}
    limits = {True: 0.0, False: 0.0}
    for _ in range(rounds):
        for name, function in (("usual recipe", run_usual), ("prepare_data.py", run_ours)):
            result = measure(function)
            print(f"  {name:16} {result[1]:6.1f} s {result[2]:6.1f} s of CPU", flush=True)
            best[name] = min(best.get(name, result), result, key=lambda r: r[1])
        for joined in limits:
            limits[joined] = max(limits[joined], tokenizer_alone(texts, joined))
    rates = {name: tokens / seconds for name, (tokens, seconds, _) in best.items()}
    for name, (tokens, seconds, cpu) in best.items():
        print(
            f"{name:16} {rates[name] / 1e6:6.2f} M tokens/s, "
            f"{tokens / cpu / 1e6:.2f} M tokens per second of CPU ({seconds:.1f} s)"
        )
    for joined, name in ((False, "encode_ordinary"), (True, "joined documents")):
        print(f"{'tokenizer alone':16} {limits[joined] / 1e6:6.2f} M tokens/s, {name}, all cores")
    print(f"ratio to the usual recipe {rates['prepare_data.py'] / rates['usual recipe']:.2f}")
    print(f"share of the tokenizer alone {rates['prepare_data.py'] / limits[True]:.0%}")
    left = np.concatenate([np.load(f) for f in sorted(usual.iterdir())])
    streams = [shards.open_split(str(ours), split) for split in ("val", "train")]
    right = np.concatenate([s.read(0, s.num_tokens) for s in streams])
    print("same tokens:", np.array_equal(left, right))
    print("load of the machine:", os.getloadavg())


if __name__ == "__main__":
    main()
