"""A handful of random kills; as many as you like with random_kills.py, whose text says what must be
true. The seed is in the output of a failure: give it to the script as --seed."""

import dataclasses
import os
import random
import subprocess
import sys

import pytest

import train_improved as ti
from conftest import ROOT

# Every optimizer that the script offers.
OPTIMIZERS = next(
    (f.metadata["choices"] for f in dataclasses.fields(ti.Config) if f.name == "optimizer"), (None,)
)


def kills(tmp_path, *flags) -> None:
    """Seeds are drawn, so every run of the tests tries other moments."""
    seed = random.SystemRandom().randrange(1 << 32)
    # In a process of its own: it forks, and the threads of the tests' PyTorch would be missing.
    command = [sys.executable, ROOT / "tests" / "random_kills.py", *flags]
    command += ["--seed", str(seed), "--work", tmp_path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_few_random_kills(tmp_path, optimizer):
    more = [f"--flags=--optimizer {optimizer}"] if optimizer else []
    kills(tmp_path, "--kills", "2", "--chain", "2", "--steps", "80", *more)


def test_a_few_random_kills_with_2_processes(tmp_path):
    """Of the optimizer that the processes share out most of, and which counts its updates."""
    more = ["--processes", "2", "--flags=--optimizer soap_muon"]
    kills(tmp_path, "--kills", "1", "--chain", "1", "--steps", "60", *more)


def test_a_few_random_kills_on_a_small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    subprocess.run(["umount", str(tmp_path)], check=True)
    kills(tmp_path, "--kills", "2", "--chain", "2", "--steps", "80", "--disk_mb", "9")
