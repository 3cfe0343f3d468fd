"""Do two checkouts of this project compute the same numbers? For before and after a rebuilding.

    git worktree add ../old COMMIT
    python benchmarks/same_numbers.py ../old .                        all parts, a few minutes
    python benchmarks/same_numbers.py ../old . --only shards --all    every book

Prints a line for each comparison, "same" or "DIFFERS" and where. Only commands and file formats
are used, and nothing of either checkout is imported, so their modules may lie anywhere. The parts:

    training    40 steps of a tiny model, with a kill -9 after the checkpoint of step 20 and a
                resume from it: AdamW and Muon, float32 and bfloat16, 1 and 2 processes; then OLD's
                checkpoint of step 20, resumed by NEW. Weights, optimizer and random numbers, bit
                for bit
    tags        TensorBoard of two of these runs: the same tags, at the same steps, with the same
                values; not values of time and speed (Performance/*)
    shards      from books as JSONL, gzipped JSONL, Parquet and plain text, and from lines that are
                wrong or strange: byte for byte, and what the manifest says of them
    export      a checkpoint of OLD's as a Hugging Face folder, its weights byte for byte
    hellaswag   the same checkpoint's result for each of 60 items
    sample      the same checkpoint's text for a seed, spoken and from a file of prompts

Both run with this Python, one thread a process, on the CPU. Exit codes: 0 all the same, 1 something
differs (its files are kept, the last line says where), 2 wrong usage.
"""

import argparse
import functools
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY = (
    "--n_layer 2 --n_head 2 --n_embd 8 --seq_len 32 --total_batch_size 128 --micro_batch_size 1 "
    "--max_lr 1e-2 --max_steps 40 --checkpoint_freq 10 --keep_checkpoints 9 --eval_freq 20 "
    "--histogram_freq 20 --val_tokens 256 --sample_tokens 8 --use_tensorboard --device cpu "
    "--data_dir ../data --hellaswag_file ../few_items.jsonl"
).split()
KILLED_AT, LAST = "step_00000020.pt", "step_00000040.pt"


# --- Running a checkout's commands ----------------------------------------------------------------


class CommandFailed(Exception):
    """A command of a checkout did not do what both must do."""


@dataclass(frozen=True)
class Side:
    """A checkout and the folder that its commands run in."""

    name: str
    root: Path
    folder: Path

    def start(self, script: str, *words, nproc: int = 1) -> subprocess.Popen:
        command = [sys.executable]
        if nproc > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        command += [self.root / "src" / script, *words]
        drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")
        env = {k: v for k, v in os.environ.items() if k not in drop} | {
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(self.folder / "cache"),  # nothing an earlier run remembers
            "PYTHONPYCACHEPREFIX": str(self.folder / "pycache"),  # nothing left in the checkouts
        }
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *words, nproc: int = 1) -> str:
        """Return the command's standard output; raise CommandFailed for an exit code but 0."""
        process = self.start(script, *words, nproc=nproc)
        out, err = process.communicate()
        if process.returncode:
            last = (err or out).strip().splitlines() or ["no output"]
            raise CommandFailed(f"{self.name}'s {script}: exit {process.returncode}, {last[-1]}")
        return out


def kill_with_children(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started with -9 (torchrun's workers lead own groups)."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in table.stdout.splitlines()]
    family = [process.pid]
    for member in family:  # grows while it is walked
        family += [pid for pid, parent in pairs if parent == member]
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself meanwhile
    process.communicate()  # to the end of what the last of them could write


@functools.cache
def trained(side: Side, optimizer: str, dtype: str, nproc: int) -> str:
    """Train, kill, resume from step 20 to the end; return the run's name."""
    name = f"{optimizer}-{dtype}-{nproc}"
    flags = [*TINY, "--optimizer", optimizer, "--dtype", dtype, "--run_name", name]
    checkpoints = side.folder / "checkpoints" / name
    process = side.start("train_improved.py", *flags, nproc=nproc)
    while not (checkpoints / KILLED_AT).exists() and process.poll() is None:
        time.sleep(0.01)
    if process.poll() is not None:
        raise CommandFailed(
            f"{side.name}'s train_improved.py ended before it could be killed: exit "
            f"{process.returncode}, {process.communicate()[1].strip()[-300:]}"
        )
    kill_with_children(process)
    for path in checkpoints.glob("step_*.pt"):  # how far it came after step 20 is chance
        if path.name > KILLED_AT:
            path.unlink()
    flags += ["--resume", "latest"]
    side.run("train_improved.py", *flags, nproc=nproc)
    return name


# --- Comparing ------------------------------------------------------------------------------------
# What a side made is a dict of names and values: tensors, bytes, or whatever repr() tells apart.


def flat(value, name: str = "") -> dict:
    """Return nested dicts and lists as one dict, {"optimizer.state.0.exp_avg": tensor, ...}."""
    if not isinstance(value, (dict, list)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [flat(v, f"{name}.{k}" if name else str(k)) for k, v in items]
    return {k: v for part in parts for k, v in part.items()}


def bits(value):
    """Return what is equal only where every bit is: NaN equals itself, 0 does not equal -0."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return value.dtype, value.shape, data
    return value if isinstance(value, bytes) else repr(value)


def distance(old, new) -> str:
    """Say in words how two values differ."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.shape == new.shape:
        apart = (old.double() - new.double()).abs()
        return f"{int((apart > 0).sum())} of {apart.numel()} numbers, at most {apart.max():.2g}"
    if isinstance(old, bytes):
        return f"{len(old)} and {len(new)} bytes"
    return f"{old!s:.60} -> {new!s:.60}"


def difference(old: dict, new: dict) -> str | None:
    """Say where two sides differ; None if nowhere."""
    for name, one, other in (("OLD", old, new), ("NEW", new, old)):
        if only := [key for key in one if key not in other]:
            return f"only in {name}: {', '.join(only[:3])}" + (" ..." if only[3:] else "")
    where = [key for key in old if bits(old[key]) != bits(new[key])]
    if not where:
        return None if old else "nothing there to compare"
    more = f" ({len(where)} of {len(old)} differ)" if where[1:] else ""
    return f"{where[0]}: {distance(old[where[0]], new[where[0]])}{more}"


# --- The parts ------------------------------------------------------------------------------------
# Each yields (what is compared, what a side makes of it); `compare` asks both sides at a time.


def weights(path: Path) -> dict:
    checkpoint = torch.load(path, weights_only=True)
    return flat({key: checkpoint[key] for key in ("model", "optimizer", "rng", "step")})


def training(args) -> Iterator:
    for case in itertools.product(("adamw", "muon"), ("float32", "bfloat16"), (1, 2)):

        def result(side, case=case):
            return weights(side.folder / "checkpoints" / trained(side, *case) / LAST)

        yield "{} {} on {} process(es)".format(*case), result
    for optimizer in ("adamw", "muon"):
        olds = args.old.folder / "checkpoints" / trained(args.old, optimizer, "float32", 1)

        def resumed(side, olds=olds):
            if side is args.old:
                return weights(olds / LAST)
            name = f"from-old-{olds.name}"
            flags = ["--resume", olds / KILLED_AT, "--run_name", name]
            side.run("train_improved.py", *TINY, *flags)
            return weights(side.folder / "checkpoints" / name / LAST)

        yield f"{optimizer}, OLD's step 20 resumed by NEW", resumed


def events(log: EventAccumulator) -> dict:
    """Return {tag and step: values} of all that TensorBoard shows of a run; of speed no values."""
    shown = [
        (tag, event.step, None if tag.startswith("Performance/") else event.value)
        for tag in log.Tags()["scalars"]
        for event in log.Scalars(tag)
    ]
    for tag in log.Tags()["histograms"]:
        shown += [(tag, event.step, event.histogram_value) for event in log.Histograms(tag)]
    for tag in log.Tags()["tensors"]:  # text, and which curves share a chart
        shown += [(tag, event.step, event.tensor_proto) for event in log.Tensors(tag)]
    result = {}
    for tag, step, value in shown:
        result.setdefault(f"{tag} at step {step}", []).append(value)
    return result


def hyperparameters(log: EventAccumulator) -> dict:
    """Return {name: value} of what the HParams tab shows, without times."""
    result = {}
    for tag, content in log.PluginTagToContent("hparams").items():
        data = HParamsPluginData.FromString(content)
        for part in (data.experiment, data.session_start_info, data.session_end_info):
            for field, value in part.ListFields():
                if field.name == "hparams":
                    result |= {f"{tag} {key}": value[key] for key in value}
                elif not field.name.endswith("_secs"):
                    result[f"{tag} {field.name}"] = value
    return result


def tags(args) -> Iterator:
    for case in (("adamw", "float32", 1), ("muon", "bfloat16", 2)):
        for what in (events, hyperparameters):

            def result(side, case=case, what=what):
                folder = str(side.folder / "runs" / trained(side, *case))
                everything = dict.fromkeys(("scalars", "histograms", "tensors"), 0)
                return what(EventAccumulator(folder, everything).Reload())

            yield "{} of {} {} on {} process(es)".format(what.__name__, *case), result


# A line of everything that may be wrong or strange in a corpus, between two that are right.
STRANGE = [
    b'{"text": "It was a bright cold day in April."}',
    b'{"text": ""}',
    b'{"text": "<|endoftext|> is text here"}',
    b'{"text": "not \xff UTF-8, a NUL \\u0000, half a pair \\ud83d, a whole one \\ud83d\\ude00"}',
    b'{"text": "cut off',
    b'{"text": 3}',
    b'{"other": "key"}',
    b"[1, 2]",
    b" \t",
    b'{"text": "Windows ends lines so.\\r\\n"}\r',
    b'{"text": "and the clocks were striking thirteen."}',
]


def write_sources(args, folder: Path) -> dict[str, list]:
    """Write the corpora that `shards` reads; return {what it is: the command's words}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (gzip.open if args.books.suffix == ".gz" else open)(args.books, "rb") as file:
        lines = list(itertools.islice(file, 60))
    texts = [json.loads(line)["text"] for line in lines]
    (folder / "books.jsonl").write_bytes(b"".join(lines))
    (folder / "books.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    (folder / "strange.jsonl").write_bytes(b"\n".join(STRANGE * 50))
    pq.write_table(pa.table({"text": texts}), folder / "books.parquet", row_group_size=20)
    (folder / "books.txt").write_text("\n==".join(texts))
    (folder / "texts").mkdir()
    for i, text in enumerate(texts):
        (folder / "texts" / f"{i:03}.txt").write_text(text)
    names = ("books.jsonl", "books.jsonl.gz", "books.parquet", "strange.jsonl", "texts")
    sources = {name: ["--source", folder / name] for name in names}
    sources["books.txt in parts"] = ["--source", folder / "books.txt", "--separator", r"\n=="]
    if args.all:
        sources["every book"] = ["--source", args.books]
    return sources


def prepare(side: Side, out: Path, words: list) -> dict:
    """Return the bytes of the shards that prepare_data.py makes, and what the manifest says."""
    side.run("prepare_data.py", *words, "--shard_tokens", 100_000, "--workers", 2, "--out", out)
    manifest = json.loads((side.folder / out / "manifest.json").read_bytes())
    told = ("tokens", "val_tokens", "documents", "counts", "shards")
    files = {path.name: path.read_bytes() for path in (side.folder / out).glob("*.bin")}
    return files | flat({key: manifest.get(key) for key in told})


def shards(args) -> Iterator:
    for number, (name, words) in enumerate(args.sources.items()):
        yield name, functools.partial(prepare, out=Path(f"shards{number}"), words=words)


def checkpoint_of_old(args) -> Path:
    return args.old.folder / "checkpoints" / trained(args.old, "adamw", "float32", 1) / LAST


def export(args) -> Iterator:
    checkpoint = checkpoint_of_old(args)

    def files(side):
        side.run("export.py", checkpoint, "exported")
        files = {path.name: path.read_bytes() for path in (side.folder / "exported").iterdir()}
        about = {"README.md", "export.json"}  # for people, with times and places
        return {name: content for name, content in files.items() if name not in about}

    yield "model.safetensors and what transformers reads beside it", files


def hellaswag(args) -> Iterator:
    words = ["--checkpoint", checkpoint_of_old(args), "--file", "../items.jsonl"]
    words += ["--limit", 60, "--out", "results.jsonl", "--device", "cpu", "--dtype", "float32"]

    def items(side):
        side.run("hellaswag.py", *words)
        return flat([json.loads(line) for line in open(side.folder / "results.jsonl")], "item")

    yield "results of each of 60 items", items


def sample(args) -> Iterator:
    words = ["--checkpoint", checkpoint_of_old(args), "--device", "cpu", "--dtype", "float32"]
    words += ["--num_samples", 3, "--max_tokens", 20, "--seed", 7]

    def spoken(side):
        return {"standard output": side.run("sample.py", *words, "--prompt", "It was", "The")}

    def written(side):
        side.run("sample.py", *words, "--file", "../prompts.txt", "--out", "texts.jsonl")
        return flat([json.loads(line) for line in open(side.folder / "texts.jsonl")], "text")

    yield "spoken for --prompt", spoken
    yield "written for --file", written


PARTS = (training, tags, shards, export, hellaswag, sample)


def compare(part, args) -> bool:
    """Print a line for each comparison of a part; return True if all are the same."""
    same = True

    def tell(name: str, where: str | None):
        nonlocal same
        same = same and where is None
        print(f"{'DIFFERS' if where else 'same':8}{part.__name__:10} {name}", end="")
        print(f": {where}" if where else "", flush=True)

    try:
        for name, result in part(args):
            with ThreadPoolExecutor(2) as pool:
                try:
                    tell(name, difference(*pool.map(result, (args.old, args.new))))
                except CommandFailed as error:
                    tell(name, str(error))
    except CommandFailed as error:
        tell("could not begin", str(error))
    return same


def parse() -> argparse.Namespace:
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.__name__ for part in PARTS]
    parser.add_argument("old", type=Path, help="a checkout")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("--only", default=",".join(names), help="these parts, as in training,tags")
    parser.add_argument("--all", action="store_true", help="shards of the whole file of books, too")
    parser.add_argument("--books", type=Path, default=DATA / "books_train.jsonl.gz")
    parser.add_argument("--items", type=Path, default=DATA / "hellaswag_val_1k.jsonl")
    args = parser.parse_args()
    for checkout in (args.old, args.new):
        if not (checkout / "src" / "train_improved.py").exists():
            parser.error(
                f"{checkout}: no checkout of this project, src/train_improved.py is missing"
            )
    for flag, path in (("--books", args.books), ("--items", args.items)):
        if not path.is_file():
            parser.error(f"{flag} {path}: no such file; JSON lines, of texts or HellaSwag items")
    args.only = args.only.split(",")
    if unknown := [name for name in args.only if name not in names]:
        parser.error(f"--only {','.join(unknown)}: the parts are {', '.join(names)}")
    return args


def main() -> int:
    args = parse()
    args.work = Path(tempfile.mkdtemp(prefix="same_numbers-"))
    same = True
    try:
        for name in ("old", "new"):
            side = Side(name.upper(), getattr(args, name).resolve(), args.work / name)
            side.folder.mkdir()
            setattr(args, name, side)
        items = args.items.read_text().splitlines(keepends=True)
        (args.work / "items.jsonl").write_text("".join(items[:60]))
        (args.work / "few_items.jsonl").write_text("".join(items[:4]))  # scored while training
        (args.work / "prompts.txt").write_text("It was\nThe meaning of life is\n")
        (args.work / "sources").mkdir()
        args.sources = write_sources(args, args.work / "sources")
        prepare(args.old, args.work / "data", args.sources["books.jsonl"])  # what both train on
        for part in PARTS:
            same &= part.__name__ not in args.only or compare(part, args)
    except CommandFailed as error:
        sys.exit(f"nothing to train on: {error}")
    finally:
        if same:
            shutil.rmtree(args.work)
        else:
            print(f"the files of both: {args.work}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
