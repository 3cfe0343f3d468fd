"""Kill training at random moments, resume it, again and again; compare with a run left alone.

    python tests/random_kills.py --seed 1 --kills 200
    python tests/random_kills.py --seed 2 --kills 100 --processes 2
    python tests/random_kills.py --seed 3 --kills 50 --disk_mb 9      (mounts a tmpfs: needs root)
    python tests/random_kills.py --seed 4 --minutes 30 --steps 5000 --every 30       (a soak)

A chain is one run that is ended again and again, at moments drawn from the seed: while it starts,
trains, evaluates or saves, with kill -9, SIGTERM, SIGINT, SIGINT twice or SIGHUP, by dying at a
file-system call of a save or in an evaluation; with 2 processes also by kill -9 of torchrun, of one
rank or SIGSTOP of one rank; SIGUSR1 and a full disk come in between. Each end is followed by
`--resume auto` or `latest` until the run is complete. What must be true, every time:

  * the exit code is the documented one, all processes end within LIMIT seconds, and nobody prints
    a traceback (of ours: torchrun prints one of its own after signals);
  * every file with a checkpoint's name is whole; the newest is at most one interval old, and after
    a signal it is the last finished step; the resume begins there, never further back;
  * in the end weights, moments, random numbers and state are bit for bit those of a run that
    nothing interrupted, and so is everything in TensorBoard that is not a time, in all its readers;
  * nothing is left in the folders but what belongs there.

Prints the seed and one line per chain; ends with 1 and the folder, kept, at the first violation.
"""

import argparse
import collections
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
os.environ["OMP_NUM_THREADS"] = "1"  # no threads here, or a fork would miss them

from checkpointing import files as checkpoint_files
from checkpointing import run_folders
from conftest import ROOT, SCRIPT, environment, write_data

LIMIT = 150  # seconds in which every process must have ended; generous, since machines are busy
SAVE_EVERY = 7  # steps; not a divisor of EVAL_EVERY, so that evaluations and saves fall apart
EVAL_EVERY = 10
HANG_TIMEOUT = 15
# 0.2M parameters, checkpoints of 2.4 MB, some 10 ms a step.
MODEL = (
    "--n_layer 1 --n_head 1 --n_embd 4 --seq_len 8 --total_batch_size 32 --dtype float32 "
    "--device cpu --max_lr 1e-2 --val_tokens 128 --sample_tokens 1 --num_samples 1 "
    f"--eval_freq {EVAL_EVERY} --sample_freq 20 --histogram_freq 50 --sample_prompt Hello "
    f"--checkpoint_freq {SAVE_EVERY} --keep_checkpoints 2 --warmup_steps 9"
).split()


class Violation(Exception):
    """Something that must be true was not."""


def need(condition, what: str) -> None:
    if not condition:
        raise Violation(what)


class Clock:
    """Seconds in which this script ran: a laptop that slept, or somebody's SIGSTOP of everything,
    is no hang. To be asked often."""

    def __init__(self):
        self.last, self.paused, self.pauses = time.monotonic(), 0.0, 0

    def now(self) -> float:
        now = time.monotonic()
        if now - self.last > 3:
            self.paused += now - self.last
            self.pauses += 1
        self.last = now
        return now - self.paused


clock = Clock()


# --- One process, or one torchrun -----------------------------------------------------------------


class Fork:
    """A program run in a fork of this process, which has imported PyTorch already: for most of what
    happens in training the same as a new process, at a tenth of the time. A Popen in small."""

    def __init__(self, words: list[str], cwd: Path, out, err):
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        os.chdir(cwd)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False, buffering=1) for n in (1, 2))
        os.environ.update(environment())
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")  # ends with sys.exit, which ends the fork
        os._exit(77)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


class Attempt:
    """The training program from a start to its end, with its output in files."""

    def __init__(
        self, folder: Path, number: int, flags: list, processes=1, restarts=0, fault=(), fork=False
    ):
        self.folder, self.processes = folder, processes
        self.name = folder / f"attempt_{number:03d}"
        self.pauses, self.forked = clock.pauses, fork
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
        words = [ROOT / "tests" / "faulty.py", *fault] if fault else [SCRIPT]
        words = [str(word) for word in [*words, *flags]]
        said = " ".join([*launch, *words]) + f"{'  (a fork)' * fork}\n"
        self.name.with_suffix(".command").write_text(said)
        with open(f"{self.name}.out", "w") as out, open(f"{self.name}.err", "w") as err:
            if fork:
                self.process = Fork(words, folder, out, err)
            else:
                self.process = subprocess.Popen(
                    [*launch, *words], cwd=folder, env=environment(), stdout=out, stderr=err,
                    start_new_session=True,
                )  # fmt: skip

    def out(self) -> str:
        return Path(f"{self.name}.out").read_text()

    def err(self) -> str:
        return Path(f"{self.name}.err").read_text()

    def step(self) -> int:
        """The last step that it has printed (it prints the first three, then every tenth)."""
        steps = re.findall(r"^(?:\S+ \S+  )?step +(\d+)/", self.out(), re.M)
        return int(steps[-1]) if steps else -1

    def pids(self) -> list[int]:
        """All its processes: those that have the chain's folder as working directory."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "cwd") == str(self.folder):
                    state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                    found += [int(entry.name)] * (state != "Z")
            except OSError:
                pass
        return sorted(found)

    def ranks(self) -> dict[int, int]:
        """{rank: process id} of torchrun's workers."""
        found = {}
        for pid in self.pids():
            try:
                env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found |= {int(v[5:]): pid for v in env if v.startswith(b"RANK=")}
        return found

    def disturbed(self) -> bool:
        """Whether all of this was stopped for a while: timeouts may have expired."""
        return clock.pauses > self.pauses

    def running(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, condition, limit: float = LIMIT) -> bool:
        """Whether the condition came true while the program ran."""
        deadline = clock.now() + limit
        while self.running():
            if condition():
                return True
            need(clock.now() < deadline, f"{self.name}: nothing for {limit} s")
            time.sleep(0.004)
        return False

    def wait_for_end(self) -> int:
        """The exit code, once all processes are gone."""
        deadline = clock.now() + LIMIT
        while self.running() or self.pids():
            if clock.now() > deadline:
                for pid in self.pids():
                    os.kill(pid, signal.SIGKILL)
                raise Violation(f"{self.name}: did not end within {LIMIT} s")
            time.sleep(0.02)
        return self.process.returncode


def send(pid: int | None, number: signal.Signals) -> None:
    try:
        if pid is not None:
            os.kill(pid, number)
    except ProcessLookupError:
        pass


# --- A chain --------------------------------------------------------------------------------------


class Chain:
    """One run, ended `kills` times and resumed until it is complete."""

    def __init__(self, folder: Path, options, draw: random.Random, whole: Path):
        self.folder, self.options, self.draw, self.whole = folder, options, draw, whole
        self.checkpoints = folder / "checkpoints" / "a"
        self.kinds = collections.Counter()
        self.newest = -1  # step of the newest checkpoint when last looked at
        self.disk_trouble = False
        self.attempts = 0
        folder.mkdir()
        if options.disk_mb:
            (folder / "checkpoints").mkdir()
            size = f"size={options.disk_mb}m"
            mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder / "checkpoints")]
            subprocess.run(mount, check=True)

    def flags(self) -> list[str]:
        """Whole at the first start; for a resume mostly those that a checkpoint does not hold."""
        whole = [*MODEL, "--max_steps", self.options.steps, "--data_dir", self.options.data]
        whole += self.options.flags.split()
        same = ["--use_tensorboard", "--run_name", "a", "--hang_timeout", HANG_TIMEOUT]
        if self.newest >= 0 and self.draw.random() < 0.7:
            return [*same, "--resume", self.draw.choice(["latest", "auto"])]
        return [*whole, *same, "--resume", "auto"]

    def start(self, **options) -> Attempt:
        self.attempts += 1
        options["fork"] = self.options.processes == 1 and self.draw.random() < 0.8
        flags, processes = self.flags(), self.options.processes
        return Attempt(self.folder, self.attempts, flags, processes, **options)

    # -- moments and ends ------------------------------------------------------------------------

    def wait_for_a_moment(self, attempt: Attempt, step: int) -> str:
        """Wait: while it starts, until some steps are done, or for the next save -> which."""
        draw = self.draw
        if self.options.every:
            seconds = draw.uniform(0.3, 1.7) * self.options.every
            deadline = clock.now() + seconds
            attempt.wait_until(lambda: clock.now() > deadline, seconds + LIMIT)
        kind = draw.choices(["start", "train", "save"], [1, 5, 3])[0]
        if kind == "start" and not self.options.every:
            longest = 12 if attempt.processes > 1 else 1.5 if attempt.forked else 6
            deadline = clock.now() + draw.uniform(0.5, longest)
            attempt.wait_until(lambda: clock.now() > deadline)
            return kind
        target = max(step, attempt.step(), self.newest, 0) + draw.randrange(1, 30)
        attempt.wait_until(lambda: attempt.step() >= target)
        if kind == "save":
            attempt.wait_until(lambda: any(self.checkpoints.glob(".tmp-step_*")))
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, 0.4))
        return kind

    def fault(self) -> tuple:
        """Arguments of faulty.py for an attempt that dies by itself, sooner or later."""
        if self.draw.random() < 0.5:
            return ("crash", max(self.newest, 0) + self.draw.randrange(1, 30), 0)
        return ("save", self.draw.randrange(1, 4), self.draw.randrange(1, 60))

    def one_kill(self) -> None:
        """Start or resume, end it somehow, look at what it left behind."""
        draw, processes = self.draw, self.options.processes
        before = self.newest
        if draw.random() < 0.2:
            attempt = self.start(fault=self.fault())
            kind, moment = "dies by itself", "any"
            attempt.wait_until(lambda: attempt.step() >= before + 60)
            send(attempt.process.pid, signal.SIGKILL)
            allowed = None
        else:
            restarts = 3 if processes > 1 and draw.random() < 0.3 else 0
            attempt = self.start(restarts=restarts)
            if draw.random() < 0.2:
                self.wait_for_a_moment(attempt, before)
                self.save_now(attempt)
            if self.options.disk_mb and draw.random() < 0.5:
                self.fill_the_disk(attempt)
            if restarts:
                self.lose_a_rank(attempt)
            moment = self.wait_for_a_moment(attempt, attempt.step())
            kind, allowed = (self.end_torchrun if processes > 1 else self.end)(attempt)
        self.kinds[f"{kind} ({moment})"] += 1
        code = attempt.wait_for_end()
        self.look(attempt, code, allowed, before)

    def end(self, attempt: Attempt) -> tuple[str, set]:
        """End a single process -> what was done, exit codes that are right."""
        number = self.draw.choice(["KILL", "KILL", "TERM", "TERM", "INT", "INT INT", "HUP"])
        first = signal.Signals[f"SIG{number.split()[0]}"]
        send(attempt.process.pid, first)
        if " " in number:
            time.sleep(self.draw.uniform(0, 1.5))
            send(attempt.process.pid, first)
        return number, {-9} if number == "KILL" else {128 + first}

    def end_torchrun(self, attempt: Attempt) -> tuple[str, None]:
        """End torchrun or one of its workers; it returns what it likes, but not 0."""
        draw = self.draw
        whom, number = draw.choice(
            [("torchrun", "KILL"), ("torchrun", "TERM"), ("torchrun", "INT"), ("torchrun", "HUP")]
            + [("rank", "KILL"), ("rank", "KILL"), ("rank", "TERM"), ("rank", "INT")] * 2
            + [("rank", "STOP")] * (draw.random() < 0.3)
        )
        pid = attempt.process.pid
        if whom == "rank":
            whom = draw.randrange(attempt.processes)
            pid = attempt.ranks().get(whom)
            if pid is None:  # not there yet
                whom, number, pid = "torchrun", "KILL", attempt.process.pid
            else:
                whom = f"rank {whom}"
        send(pid, signal.Signals[f"SIG{number}"])
        return f"{number} {whom}", None

    # -- what does not end a run -------------------------------------------------------------------

    def save_now(self, attempt: Attempt) -> None:
        ranks = attempt.ranks() if attempt.processes > 1 else {0: attempt.process.pid}
        if ranks and attempt.running():
            send(ranks[self.draw.choice(list(ranks))], signal.SIGUSR1)
            self.kinds["USR1"] += 1
            time.sleep(self.draw.uniform(0, 0.5))

    def fill_the_disk(self, attempt: Attempt) -> None:
        """Somebody else takes all the space for a while."""
        ballast, seen = self.folder / "checkpoints" / "ballast", attempt.step()
        if not attempt.wait_until(lambda: attempt.step() > seen):
            return
        self.kinds["full disk"] += 1
        self.disk_trouble = True
        try:
            with open(ballast, "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        except OSError:
            pass
        seen = attempt.step()
        attempt.wait_until(lambda: attempt.step() > seen + 25)
        if self.draw.random() < 0.7:  # else still full at the kill and at the resume
            ballast.unlink()

    def lose_a_rank(self, attempt: Attempt) -> None:
        """kill -9 of a worker: torchrun brings the run back by itself."""
        seen = attempt.step()
        if attempt.wait_until(lambda: attempt.step() > seen) and attempt.ranks():
            ranks = attempt.ranks()
            send(ranks[self.draw.choice(list(ranks))], signal.SIGKILL)
            self.kinds["KILL rank, --max-restarts"] += 1
            attempt.wait_until(lambda: attempt.out().count("resuming from") > 1 or len(
                re.findall(r"^ +run  ", attempt.out(), re.M)) > 1)  # fmt: skip

    # -- judgement ---------------------------------------------------------------------------------

    def look(self, attempt: Attempt, code: int, allowed: set | None, before: int) -> None:
        """After an attempt: exit code, words, what is on disk."""
        out, err, name = attempt.out(), attempt.err(), attempt.name
        finished = "finished at step" in out
        if "NOT SAVED" in out:  # on the full disk
            need(self.disk_trouble, f"{name}: not saved")
            allowed = allowed and {1}
        if attempt.disturbed():
            allowed = None
        if allowed is not None and not (finished and code == 0):
            need(code in allowed, f"{name}: exit code {code}, expected {allowed}\n{err}")
        if allowed is None and not finished:
            need(code != 0, f"{name}: exit code 0, not finished")
        self.check_words(attempt)
        resumed = re.findall(r"^resuming from .*step_(\d+)\.pt", out, re.M)
        if resumed and before >= 0:
            need(int(resumed[0]) == before, f"{name}: resumed at {resumed[0]}, had {before}")
        path, skipped = run_folders.find_latest(self.checkpoints)
        need(not skipped, f"{name}: {skipped}")
        self.newest = int(path.stem.removeprefix("step_")) if path else -1
        need(self.newest >= before, f"{name}: newest {self.newest}, was {before}")
        if not self.disk_trouble:
            due = (attempt.step() // SAVE_EVERY - 1) * SAVE_EVERY  # the one after it may be amid
            need(self.newest >= due, f"{name}: at {attempt.step()}, newest {self.newest}")
        stopped = re.findall(r"^stopped at step ([\d,]+) of", out, re.M)
        if stopped and code not in (0, -9) and "NOT SAVED" not in out:
            last = int(stopped[-1].replace(",", ""))
            need(self.newest == last, f"{name}: stopped at {last}, saved {self.newest}")

    def check_words(self, attempt: Attempt) -> None:
        text = attempt.out() + attempt.err()
        if attempt.processes == 1:
            need("Traceback" not in text, f"{attempt.name}: a traceback")
        else:  # torchrun's own is not ours to prevent; "most recent call first" are a hang's stacks
            ours = re.search(r'most recent call last(?:\n.*)*?\n.*File ".*src/\w+\.py"', text)
            need(not ours, f"{attempt.name}: a traceback of ours")
        need("Exception ignored" not in text, f"{attempt.name}: an ignored exception")

    def finish(self) -> None:
        """Resume without any fault and compare."""
        (self.folder / "checkpoints" / "ballast").unlink(missing_ok=True)
        code, attempt = None, None
        while code is None or (code != 0 and attempt.disturbed()):
            before, attempt = self.newest, self.start()
            attempt.wait_until(lambda: False, LIMIT + self.options.steps)
            code = attempt.wait_for_end()
            self.look(attempt, code, {0}, before)
        need(code == 0, f"{attempt.name}: exit code {code}\n{attempt.err()}")
        need(self.newest == self.options.steps, f"{attempt.name}: ended at {self.newest}")
        compare(self.whole, self.folder, self.options.steps)
        names = sorted(p.name for p in self.checkpoints.iterdir())
        stray = [n for n in names if not re.fullmatch(r"\.lock|step_\d{8}\.pt", n)]
        need(not stray and len(names) <= 4, f"{self.checkpoints}: {names}")
        logs = [p.name for p in (self.folder / "runs" / "a").iterdir()]
        known = r"\.lock|config\.json|events\.out\.tfevents\..*|earlier\..*"
        stray = [n for n in logs if not re.fullmatch(known, n)]
        need(not stray, f"{self.folder / 'runs' / 'a'}: {stray}")

    def clean(self) -> None:
        if self.options.disk_mb:
            subprocess.run(["umount", "-l", str(self.folder / "checkpoints")], check=True)


# --- Comparing ------------------------------------------------------------------------------------


def compare(whole: Path, chain: Path, step: int) -> None:
    """Two folders of a run: the same final checkpoint, the same logs."""
    from test_training import assert_same_training

    files = [checkpoint_files.step_path(f / "checkpoints" / "a", step) for f in (whole, chain)]
    try:
        assert_same_training(*files)
    except AssertionError as error:
        raise Violation(f"{chain}: another result than {whole}: {error}") from None
    expected, got = (everything_logged(f / "runs" / "a") for f in (whole, chain))
    need(expected.keys() == got.keys(), f"{chain}: tags {expected.keys() ^ got.keys()}")
    for tag in expected:
        need(expected[tag] == got[tag], f"{chain}: {tag} differs: {expected[tag]} {got[tag]}")


def everything_logged(folder: Path) -> dict:
    """{tag: [(step, value), ...]} of all scalars, texts and histograms that are not times, as
    EventAccumulator reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guidance = {"scalars": 0, "tensors": 0, "histograms": 0}
    events = EventAccumulator(str(folder), size_guidance=guidance).Reload()
    tags, found = events.Tags(), {}
    for tag in tags["scalars"]:
        if not tag.startswith("Performance/"):
            found[tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    for tag in tags["histograms"]:
        found[tag] = [(e.step, str(e.histogram_value)) for e in events.Histograms(tag)]
    for tag in tags["tensors"]:
        if "text_summary" in tag:
            found[tag] = [(e.step, e.tensor_proto.SerializeToString()) for e in events.Tensors(tag)]
    return found


def compare_in_servers(root: Path, steps: int) -> None:
    """All runs under `root` as TensorBoard's default reader and its Python one show them."""
    from test_tensorboard_log import Server, python_loader, tensor_steps

    runs = sorted(str(p.relative_to(root)) for p in root.glob("*/runs/a"))
    loader = python_loader(root)
    server = Server(root)
    try:
        for run in runs:
            for tag, expected in (
                ("Loss/train", list(range(1, steps + 1))),
                ("Loss/validation", [*range(0, steps, EVAL_EVERY), steps]),
            ):
                server.wait_for(lambda run=run, tag=tag: len(server.scalars(run, tag)))
                for kind, got in (
                    ("server", [step for step, _ in server.scalars(run, tag)]),
                    ("Python loader", tensor_steps(loader, run, tag)),
                ):
                    if len(expected) > 1000 and kind == "server":
                        need(got == sorted(set(got)), f"{run}: {tag} goes backward in the {kind}")
                    else:
                        need(got == expected, f"{run}: {tag} in the {kind}: {got}")
    finally:
        server.stop()


# --- All of it ------------------------------------------------------------------------------------


def uninterrupted(work: Path, options) -> Path:
    """The run that nothing interrupts."""
    folder = work / "whole"
    folder.mkdir()
    flags = [*MODEL, "--max_steps", options.steps, "--data_dir", options.data]
    flags += [*options.flags.split(), "--use_tensorboard", "--run_name", "a"]
    attempt = Attempt(folder, 0, flags, options.processes)
    attempt.wait_until(lambda: False, LIMIT + options.steps)
    code = attempt.wait_for_end()
    need(code == 0, f"the uninterrupted run ended with {code}\n{attempt.err()}")
    return folder


def parse(argv: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--kills", type=int, default=20, help="in all [20]")
    parser.add_argument("--minutes", type=float, help="go on for so long, however many kills")
    parser.add_argument("--processes", type=int, default=1, help="under torchrun if more than 1")
    parser.add_argument("--steps", type=int, default=300, help="of the run [300]")
    parser.add_argument("--every", type=float, default=0, help="seconds between kills, about [0]")
    parser.add_argument("--chain", type=int, default=10, help="most kills of one run [10]")
    parser.add_argument("--disk_mb", type=int, help="checkpoints on a tmpfs of that size, in MiB")
    parser.add_argument("--flags", default="", help="more flags of train_improved.py, as one word")
    parser.add_argument("--work", type=Path, help="folder to work in [a new temporary one]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    print(f"seed {options.seed}", flush=True)
    draw = random.Random(options.seed)
    if options.processes == 1:  # what forks need not import again
        pass
        import train_improved  # noqa: F401
    work = Path(tempfile.mkdtemp(prefix="random_kills_", dir=options.work)).resolve()
    options.data = write_data(work / "data", train=100_000)
    began, kills, kinds, runs = clock.now(), 0, collections.Counter(), 0
    chain = None
    try:
        whole = uninterrupted(work, options)
        print(f"{options.steps} steps alone: {clock.now() - began:.0f} s", flush=True)
        while (
            kills < options.kills
            if options.minutes is None
            else clock.now() - began < 60 * options.minutes
        ):
            chain = Chain(work / f"chain_{runs:03d}", options, draw, whole)
            most, mine = draw.randrange(1, options.chain + 1), 0
            while mine < most and chain.newest < options.steps:
                chain.one_kill()
                mine += 1
            chain.finish()
            runs, kills, kinds = runs + 1, kills + mine, kinds + chain.kinds
            print(
                f"chain {runs}: {mine} kills, {kills} in all, {clock.now() - began:.0f} s; "
                + ", ".join(f"{n} {kind}" for kind, n in sorted(chain.kinds.items())),
                flush=True,
            )
            chain.clean()
            chain = None
        compare_in_servers(work, options.steps)
    except Violation as violation:
        print(f"VIOLATION after {kills} kills: {violation}\nseed {options.seed}, see {work}")
        if chain is not None:
            print(f"this chain: {dict(chain.kinds)}")
            keep_evidence(chain)
        return 1
    print(f"{kills} kills in {runs} runs, no violation: {dict(sorted(kinds.items()))}")
    shutil.rmtree(work)
    return 0


def keep_evidence(chain: Chain) -> None:
    """A copy of what was on the small disk, and no mount left behind."""
    if chain.options.disk_mb:
        shutil.copytree(chain.folder / "checkpoints", chain.folder / "checkpoints_copy")
        chain.clean()


if __name__ == "__main__":
    sys.exit(main())
