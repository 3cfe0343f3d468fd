"""What the tests of the training program share: a small corpus, a small model, real processes."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from basics import durable
from checkpointing import files, run_folders
from tokens import shards, tokenizer

torch.set_num_threads(1)  # threads of several test processes wait for each other: 14 times slower
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "src" / "train_improved.py"
# Small enough for a step of about 20 ms, in fp32 so that numbers can be compared closely.
SMALL = (
    "--n_layer 2 --n_head 2 --n_embd 16 --seq_len 32 --total_batch_size 256 --dtype float32 "
    "--device cpu --max_lr 1e-2 --val_tokens 512 --sample_tokens 4 --num_samples 1"
).split()
CACHE = tempfile.mkdtemp()  # nothing that another run remembers, nothing left in the user's


def pytest_configure():
    """Have programs begin with the usual signals. Not on import: tests/faulty.py imports this."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or in the background of a script


def environment() -> dict:
    """One thread each: the machine has few cores and runs several processes at a time."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": CACHE}


def start(
    *flags, cwd, data=None, script=SCRIPT, before=(), nproc=None, torchrun=(), small=True
):  # fmt: skip
    """The training program as a real process; its output is in .stdout and .stderr.

    before: the script's own arguments, before the flags. nproc: under torchrun, with its options.
    """
    command = [sys.executable]
    if nproc is not None:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command += [*torchrun, script, *before, *(SMALL if small else ())]
    command += ["--data_dir", data] if data is not None else []
    process = subprocess.Popen(
        [str(word) for word in [*command, *flags]],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started.append(process)
    return process


started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """What a test that failed has started. (torchrun's workers notice its end.)"""
    yield
    while started:
        process = started.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def run(*flags, expect=0, timeout=300, **options):
    """Run to the end -> (stdout, stderr); fails with both if the exit code is another one."""
    process = start(*flags, **options)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def write_data(folder: Path, train=20_000, val=2_000, seed=0) -> Path:
    """A folder of shards with tokens that a model can learn something from."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val)):
        # a walk over 300 common tokens: the next one is near the last one
        walk = np.cumsum(rng.integers(-3, 4, count)) % 300 + 256
        walk[::100] = tokenizer.EOT
        shards.write_shard(folder / f"walk_{split}_000000.bin", walk.astype(np.uint16))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "walk")


def die_at_call(n: int) -> None:
    """From here on this process dies before its n-th call to the file system in a save."""
    dying = DyingOs(n)
    for module in (durable, files, run_folders):
        module.os = dying


class DyingOs:
    """Stands for the module `os`: passes every call on and kills the process before the n-th.

    Everything the module does to the file system goes through `os`. A write that is to die first
    does half of its work, as a crash may.
    """

    def __init__(self, n: int):
        self.n, self.count, self.calls = n, 0, []

    def __getattr__(self, name):
        real = getattr(os, name)
        if not callable(real) or name in ("getpid", "fspath"):
            return real

        def call(*args, **kwargs):
            self.count += 1
            self.calls.append((name, args))
            if self.count == self.n:
                if name == "write":
                    os.write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call


def read_scalars(folder) -> dict[str, list[tuple[int, float, float]]]:
    """Every scalar of a run as TensorBoard's own reader sees it: tag -> [(step, value, time)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 1}).Reload()
    return {
        tag: [(p.step, p.value, p.wall_time) for p in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }
