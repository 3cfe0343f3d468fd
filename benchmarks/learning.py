"""How much each token teaches: recipes and optimizers against a tuned reference, over the length.

    python benchmarks/learning.py --data_dir data/books --steps 300 600 1200 2400 4800 --seeds 1 2
    python benchmarks/learning.py --data_dir data/books --sizes 4x128 6x384 --max_lr 2e-3 8e-3
    python benchmarks/learning.py --data_dir data/books --arm "mine: --recipe fast --beta2 0.99"
    python benchmarks/learning.py --data_dir data/books --arms fast+cautious fast+power
    python benchmarks/learning.py --summary             table, fits and plot of what is there

An arm is a named set of flags of src/train_improved.py, which does the training; fast+NAME is fast
with one of the experiments of benchmarks/optimizers.py. For each size and arm:

1. The peak learning rate is tuned with the first seed at the shortest length (--tune_steps):
   factors of two from --max_lr, until the best one has a worse neighbour on both sides.
2. With that rate the arm runs at each of --steps with each seed. Every run has a schedule planned
   for exactly its length: a curve in mid-schedule, at a high rate, would tell less.

The share of tokens that an arm needs is D / (the tokens after which the reference has the same
final loss), read off the straight lines between the reference's own lengths, over log tokens. The
fits are L = E + A / D^alpha, by least squares. All intervals hold 90%: of a share from the spread
over seeds, of a fit by parametric bootstrap, whose noise is the scatter of the runs around the fit.
They know nothing of rates that would have suited a length better, nor of other sizes and texts.

Results are lines of learning.jsonl in --out, one for each finished run, with all its settings: what
is there is not run again. The identity of the data set is among them, so two never mix. A
run that was stopped goes on from its last checkpoint: stop it and start it as you like.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
SCRIPT = ROOT / "src" / "train_improved.py"
EXPERIMENTS = ROOT / "benchmarks" / "optimizers.py"

REFERENCE = "reference"
ARMS = {REFERENCE: "", "fast": "--recipe fast"}
TOKENS_PER_STEP, SEQ_LEN, VAL_TOKENS = 1024, 128, 32_768
VOCABULARY = 50_257
REAL_RUNS = {"124M at 10B tokens": 10e9 / 124.4e6, "124M at 50B tokens": 50e9 / 124.4e6}


def parse_arguments(words=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", help="folder of prepared shards")
    add("--sizes", nargs="+", default=["4x128"], help="layers x width")
    add("--steps", type=int, nargs="+", default=[300, 600, 1200], help="lengths of the runs")
    add("--seeds", type=int, nargs="+", default=[1, 2], help="the first one also tunes")
    add("--arms", nargs="+", default=[REFERENCE, "fast"], help="of these, --arm and fast+NAME")
    add("--arm", action="append", default=[], help="another one: 'name: flags'; may be repeated")
    add(
        "--max_lr", type=float, nargs="+", default=[2e-3, 8e-3], help="one for each arm, or for all"
    )
    add("--tune", action=argparse.BooleanOptionalAction, default=True, help="or take them as given")
    add("--tune_steps", type=int, help="length at which to tune [the shortest]")
    add("--total_batch_size", type=int, default=TOKENS_PER_STEP, help="tokens a step")
    add("--seq_len", type=int, default=SEQ_LEN, help="context, in tokens")
    add("--vocabulary", type=int, default=VOCABULARY, help="tokens, see benchmarks/optimizers.py")
    add("--flags", default="", help="flags for all arms, e.g. '--dtype float32'")
    add("--jobs", type=int, default=1, help="runs at a time, one thread each")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results")
    add("--summary", action="store_true", help="only summarise what is in --out")
    args = parser.parse_args(words)
    args.known = dict(ARMS)
    for text in args.arm:
        name, colon, flags = text.partition(":")
        if not colon:
            parser.error(f"--arm {text!r}: write a name, a colon and the flags")
        args.known[name.strip()] = flags.strip()
        if name.strip() not in args.arms:
            args.arms.append(name.strip())
    for name in args.arms:
        base, plus, experiment = name.partition("+")
        if base not in args.known:
            parser.error(f"--arms {name}: there are {', '.join(args.known)}, and fast+NAME")
        if plus:
            args.known[name] = f"{args.known[base]} --experiment {experiment}"
    if len(args.max_lr) == 1:
        args.max_lr *= len(args.arms)
    if len(args.max_lr) != len(args.arms):
        parser.error(f"--max_lr: {len(args.max_lr)} rates for {len(args.arms)} arms, or give one")
    if not args.summary and not args.data_dir:
        parser.error("--data_dir: give a folder of shards (src/prepare_data.py makes them)")
    return args


# --- One run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """All that decides a run's numbers."""

    data: str  # identity of training and validation tokens, whatever the folder is called
    size: str
    arm: str
    flags: str
    max_lr: float
    seed: int
    steps: int
    tokens_per_step: int = TOKENS_PER_STEP
    seq_len: int = SEQ_LEN
    val_tokens: int = VAL_TOKENS
    vocabulary: int = VOCABULARY

    def key(self) -> str:
        """Return a name for it; the arm's name is not part of it, its flags are."""
        fields = dataclasses.asdict(self) | {"arm": None}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.size}_{self.arm}_{self.max_lr:.3g}_seed{self.seed}_{self.steps}_{digest}"

    def command(self, data_dir: str) -> list[str]:
        """Return the training program's command line, which resumes what is already there."""
        layers, width = (int(n) for n in self.size.split("x"))
        flags = {
            "n_layer": layers,
            "n_head": max(1, width // 64),
            "n_embd": width,
            "seq_len": self.seq_len,
            "total_batch_size": self.tokens_per_step,
            "max_steps": self.steps,
            "max_lr": f"{self.max_lr:g}",
            "seed": self.seed,
            "val_tokens": self.val_tokens,
            "eval_freq": self.steps,
            "sample_freq": 0,
            "hellaswag_freq": 0,
            "checkpoint_freq": max(1, self.steps // 8),
            "keep_checkpoints": 1,
            "data_dir": os.path.abspath(data_dir),
            "run_name": "run",
            "resume": "auto",
        }
        given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        own = shlex.split(self.flags)
        if self.vocabulary != VOCABULARY:
            own += ["--vocabulary", str(self.vocabulary)]
        script = EXPERIMENTS if {"--experiment", "--vocabulary"} & set(own) else SCRIPT
        return [sys.executable, str(script), *given, "--log_jsonl", *own]


def identity(data_dir: str) -> str:
    """Return what distinguishes this data set from another, training and validation tokens."""
    from tokens.stream import open_source

    return "-".join(open_source(data_dir, s, SEQ_LEN, 0).fingerprint for s in ("train", "val"))


class Runs:
    """The finished runs of a folder, and the way to make more of them."""

    def __init__(self, out: Path, data_dir: str | None = None):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.data_dir, self.file = out, data_dir, out / "learning.jsonl"
        self.lock, self.children, self.stopped = threading.Lock(), set(), False
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.finished = [load(json.loads(line)) for line in lines]

    def find(self, setting: Setting) -> dict | None:
        """Return the finished run with these settings."""
        key = setting.key()
        return next((run for run in self.finished if run["setting"].key() == key), None)

    def loss(self, setting: Setting) -> float:
        """Return the final validation loss, from the file or by training."""
        return (self.find(setting) or self.train(setting))["loss"]

    def train(self, setting: Setting) -> dict:
        """Run the training program, or let it go on, and write the line. KeyboardInterrupt if
        stopped, SystemExit with its last words if it fails."""
        work = self.out / "work" / setting.key()
        work.mkdir(parents=True, exist_ok=True)
        log, spent = work / "log", work / "cpu_seconds"
        command = setting.command(self.data_dir)
        with log.open("a") as output, self.lock:
            if self.stopped:
                raise KeyboardInterrupt
            child = subprocess.Popen(
                command,
                cwd=work,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us, who hand it on once
            )
            self.children.add(child)
        _, status, usage = os.wait4(child.pid, 0)  # what this child alone has used
        child.returncode = os.waitstatus_to_exitcode(status)
        self.children.discard(child)
        before = float(spent.read_text()) if spent.exists() else 0.0
        spent.write_text(f"{before + usage.ru_utime:.1f}")
        if self.stopped:
            raise KeyboardInterrupt
        if child.returncode:
            said = "\n".join(log.read_text().splitlines()[-20:])
            raise SystemExit(f"{shlex.join(command)}\n{said}")
        metrics = (work / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
        values = [json.loads(line).get("Loss/validation") for line in metrics]
        loss = [value for value in values if value is not None][-1]
        run = dataclasses.asdict(setting) | {
            "loss": loss if math.isfinite(loss) else None,
            "cpu_seconds": float(spent.read_text()),
        }
        with self.lock, self.file.open("a") as lines:
            lines.write(json.dumps(run) + "\n")
            self.finished.append(load(run))
        shutil.rmtree(work)
        print(
            f"{setting.size:>6} {setting.arm:<14} max_lr {setting.max_lr:<8.3g} seed "
            f"{setting.seed} {setting.steps:>6} steps: loss {loss:.4f}",
            flush=True,
        )
        return load(run)

    def stop(self, *_):
        """Let the children save, as SIGTERM makes them, and begin no other."""
        with self.lock:
            self.stopped = True
            for child in self.children:
                child.terminate()


def load(run: dict) -> dict:
    names = [field.name for field in dataclasses.fields(Setting)]
    loss = math.inf if run["loss"] is None else run["loss"]
    return {"setting": Setting(**{n: run[n] for n in names}), **run, "loss": loss}


# --- The grid -------------------------------------------------------------------------------------


def tune(loss, start: float) -> float:
    """Return the power of two times `start` with the lowest loss(rate), neighbours being worse."""
    known = functools.cache(lambda power: loss(start * 2.0**power))
    best = 0
    while better := [p for p in (best - 1, best + 1) if known(p) < known(best)]:
        best = min(better, key=known)
    return start * 2.0**best


def grid(args, runs: Runs) -> None:
    """Tune each arm at each size, then every length and seed, the short ones first."""
    data = identity(args.data_dir)
    signal.signal(signal.SIGTERM, runs.stop)
    signal.signal(signal.SIGINT, runs.stop)

    def setting(size: str, arm: str, max_lr: float, seed: int, steps: int) -> Setting:
        flags = f"{args.flags} {args.known[arm]}".strip()
        shape = args.total_batch_size, args.seq_len, VAL_TOKENS, args.vocabulary
        return Setting(data, size, arm, flags, float(f"{max_lr:g}"), seed, steps, *shape)

    def rate(pair) -> float:
        size, (arm, start) = pair
        if not args.tune:
            return start
        steps = args.tune_steps or min(args.steps)
        return tune(lambda lr: runs.loss(setting(size, arm, lr, args.seeds[0], steps)), start)

    pairs = [(size, arm) for size in args.sizes for arm in zip(args.arms, args.max_lr, strict=True)]
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            rates = list(pool.map(rate, pairs))
            work = [
                setting(size, arm, max_lr, seed, steps)
                for steps in sorted(args.steps)
                for seed in args.seeds
                for (size, (arm, _)), max_lr in zip(pairs, rates, strict=True)
            ]
            list(pool.map(runs.loss, work))
        except BaseException:
            runs.stop()  # the other jobs, too
            raise


# --- Fits -----------------------------------------------------------------------------------------


def fit(curves: list[np.ndarray]) -> tuple[float, list[tuple[float, float]]]:
    """Fit L = E + A / D^alpha, with one E for all curves -> E, [(A, alpha) of each].

    curves: arrays (runs, 2) of tokens D and loss L, at least three lengths each. For a given E each
    is a straight line in logarithms; E is the one of 1,000 between 0 and the lowest loss that
    leaves the smallest squares of L.
    """
    E = np.linspace(0, min(curve[:, 1].min() for curve in curves), 1000, endpoint=False)
    squares, lines = np.zeros(len(E)), []
    for D, L in (curve.T for curve in curves):
        x, y = np.log(D), np.log(L - E[:, None])  # (runs,), (candidates, runs)
        dx = x - x.mean()
        alpha = np.maximum(-(y * dx).sum(1) / (dx**2).sum(), 1e-6)
        A = np.exp(y.mean(1) + alpha * x.mean())
        squares += ((E[:, None] + A[:, None] * D ** -alpha[:, None] - L) ** 2).sum(1)
        lines.append((A, alpha))
    best = int(squares.argmin())
    return float(E[best]), [(float(A[best]), float(alpha[best])) for A, alpha in lines]


def predicted(E: float, line: tuple[float, float], D):
    A, alpha = line
    return E + A * D**-alpha


def bootstrap(curves: list[np.ndarray], draws: int = 300, seed: int = 0) -> list:
    """Return fits of losses drawn around the fit: normal, with the variance that the fit leaves."""
    E, lines = fit(curves)
    truth = [predicted(E, line, curve[:, 0]) for line, curve in zip(lines, curves, strict=True)]
    left = sum(len(curve) for curve in curves) - 1 - 2 * len(curves)
    squares = sum(((curve[:, 1] - t) ** 2).sum() for curve, t in zip(curves, truth, strict=True))
    sigma, generator = math.sqrt(squares / max(1, left)), np.random.default_rng(seed)
    return [
        fit(
            [
                np.column_stack([curve[:, 0], t + generator.normal(0, sigma, len(t))])
                for curve, t in zip(curves, truth, strict=True)
            ]
        )
        for _ in range(draws)
    ]


def fits_of_two(curves: list[np.ndarray], one_limit: bool) -> list:
    """Return [((E, (A, alpha)) of the first, the same of the second)]: the fit, then its draws."""
    if one_limit:
        fits = [fit(curves), *bootstrap(curves)]
        return [((E, first), (E, second)) for E, (first, second) in fits]
    each = [[fit([curve]), *bootstrap([curve], seed=i)] for i, curve in enumerate(curves)]
    return [((E, a), (F, b)) for (E, (a,)), (F, (b,)) in zip(*each, strict=True)]


def share_at(D: float, reference, arm) -> float:
    """Tokens of an arm for the reference's loss after D, as a share of D; each (E, (A, alpha))."""
    target, (E, (A, alpha)) = predicted(*reference, D), arm
    if target <= E:
        return math.inf
    return math.exp(min(700.0, math.log(A / (target - E)) / alpha)) / D


def interval(values) -> tuple[float, float]:
    """Return the 5th and 95th percentile; infinities are large."""
    low, high = np.percentile(np.minimum(values, 1e9), [5, 95])
    return float(low), float(high)


# --- Summary --------------------------------------------------------------------------------------


@dataclass
class Point:
    """An arm at one length, at the rate that is best there."""

    tokens: int
    max_lr: float
    losses: list[float]  # one for each seed
    cpu_seconds: float  # a step, evaluation and start-up included

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)


def points(runs: list[dict]) -> list[Point]:
    """Return one for each length: of the rates with most seeds the one with the least loss.

    Runs that diverged are left out.
    """
    found = []
    runs = [run for run in runs if math.isfinite(run["loss"])]
    for steps in sorted({run["steps"] for run in runs}):
        rates = {}
        for run in runs:
            if run["steps"] == steps:
                rates.setdefault(run["max_lr"], []).append(run)
        max_lr, best = min(
            rates.items(), key=lambda r: (-len(r[1]), statistics.mean(run["loss"] for run in r[1]))
        )
        seconds = statistics.median(run["cpu_seconds"] / steps for run in best)
        losses = [run["loss"] for run in best]
        found.append(Point(steps * best[0]["tokens_per_step"], max_lr, losses, seconds))
    return found


def tokens_to(curve: list[Point], loss: float) -> float:
    """Return where the line through the curve's points, over log tokens, is at `loss`.

    Beyond the points the nearest two are extended.
    """
    pairs = list(itertools.pairwise(curve))
    outside = pairs[0] if loss > curve[0].loss else pairs[-1]
    a, b = next((p for p in pairs if p[0].loss >= loss >= p[1].loss), outside)
    slope = (b.loss - a.loss) / math.log(b.tokens / a.tokens)
    return a.tokens * math.exp((loss - a.loss) / slope) if slope < 0 else math.inf


def parameters(size: str, seq_len: int, vocabulary: int) -> int:
    layers, C = (int(n) for n in size.split("x"))
    return (vocabulary + seq_len) * C + layers * (12 * C * C + 13 * C) + 2 * C


@dataclass
class Group:
    """The runs of one data set, size and shape of batch."""

    data: str
    size: str
    seq_len: int
    vocabulary: int
    tokens_per_step: int
    val_tokens: int
    arms: dict[str, list[Point]]

    def __str__(self):
        return (
            f"{self.size}, {self.vocabulary:,} tokens known, T={self.seq_len}, "
            f"{self.tokens_per_step} a step"
        )

    def spread(self) -> float:
        """Standard deviation over seeds, pooled over all lengths that have several; or nan."""
        sets = [p.losses for curve in self.arms.values() for p in curve if len(p.losses) > 1]
        degrees = sum(len(losses) - 1 for losses in sets)
        squares = sum((len(losses) - 1) * statistics.variance(losses) for losses in sets)
        return math.sqrt(squares / degrees) if degrees else math.nan

    def share(self, point: Point, of: str = REFERENCE) -> tuple[float, float, float, bool]:
        """Tokens of a point as a share of what `of` needs for its loss: (share, low, high, inside).

        low and high: 90%, from the seeds' spread alone, nan without one. inside: not extrapolated.
        """
        curve = self.arms[of]
        seeds = statistics.mean(len(p.losses) for p in curve)
        error = 1.645 * self.spread() * math.sqrt(1 / len(point.losses) + 1 / seeds)
        share = point.tokens / tokens_to(curve, point.loss)
        low = high = math.nan
        if math.isfinite(error):
            low, high = (point.tokens / tokens_to(curve, point.loss + e) for e in (-error, error))
        return share, low, high, curve[0].loss >= point.loss >= curve[-1].loss

    def curve(self, arm: str) -> np.ndarray:
        return np.array([[p.tokens, loss] for p in self.arms[arm] for loss in p.losses])


def groups(finished: list[dict]) -> list[Group]:
    """Sort runs; sizes in order, arms with the reference first."""
    found = {}
    for run in finished:
        names = "data", "size", "seq_len", "vocabulary", "tokens_per_step", "val_tokens"
        arms = found.setdefault(tuple(run[name] for name in names), {})
        arms.setdefault((run["arm"], run["flags"]), []).append(run)
    result = []
    for place in sorted(found, key=lambda p: (p[0], parameters(*p[1:4]), p)):
        arms = sorted(found[place].items(), key=lambda item: (item[0][0] != REFERENCE, item[0]))
        called = [arm for (arm, _), _ in arms]
        result.append(
            Group(
                *place,
                {
                    arm if called.count(arm) == 1 else f"{arm}, {flags or 'no flags'}": points(runs)
                    for (arm, flags), runs in arms
                },
            )
        )
    return result


def print_table(group: Group) -> None:
    first = group.arms[next(iter(group.arms))]
    print(f"\n{group}; seeds' standard deviation {group.spread():.4f}\n")
    heads = "arm", "million tokens", "steps", "max_lr", "final loss (seeds)"
    heads += "share of the reference's tokens", "of fast's", "processor time a step"
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for arm, curve in group.arms.items():
        for point in curve:
            cells = []
            for of in (REFERENCE, "fast"):
                cell = ""
                if arm not in (of, REFERENCE) and len(group.arms.get(of, [])) > 1:
                    share, low, high, inside = group.share(point, of)
                    cell = f"{share:.2f}" + ("" if inside else " *")
                    if math.isfinite(low):
                        cell += f" ({low:.2f} to {high:.2f})"
                cells.append(cell)
            print(
                f"| {arm} | {point.tokens / 1e6:.2f} | {point.tokens // group.tokens_per_step} | "
                f"{point.max_lr:.2g} | {point.loss:.4f} ({len(point.losses)}) | {cells[0]} | "
                f"{cells[1]} | {point.cpu_seconds / first[0].cpu_seconds:.2f} |"
            )


def print_fits(group: Group, arm: str) -> None:
    """Fits of the reference and an arm, and what they say far beyond the runs.

    A run of another size is taken to stand where this one has as many tokens for each parameter.
    """
    curves = [group.curve(REFERENCE), group.curve(arm)]
    per_parameter = parameters(group.size, group.seq_len, group.vocabulary)
    end = curves[0][:, 0].max() / per_parameter
    for one_limit in (False, True):
        pairs = fits_of_two(curves, one_limit)
        print(f"\n{group}: L = E + A / D^alpha, {'one E' if one_limit else 'an E for each'} (90%)")
        for name, fits in zip((REFERENCE, arm), zip(*pairs, strict=True), strict=True):
            cells = []
            for label, (value, *draws) in zip(
                ("E", "A", "alpha"),
                zip(*((E, *line) for E, line in fits), strict=True),
                strict=True,
            ):
                low, high = interval(draws)
                cells.append(f"{label} {value:.3g} ({low:.3g} to {high:.3g})")
            print(f"  {name}: {', '.join(cells)}")
        for label, ratio in REAL_RUNS.items():
            share, *draws = (share_at(ratio * per_parameter, *pair) for pair in pairs)
            low, high = interval(draws)
            verdict = "" if high < 1.5 * low else "; these data do not decide it"
            print(
                f"  {label}, {ratio:.0f} tokens a parameter ({end:.2g} here): share {share:.2g} "
                f"({low:.2g} to {high:.2g}){verdict}"
            )


def plot(path: Path, found: list[Group]) -> None:
    """Left: final loss over tokens with the fits. Right: the share that fast needs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    for i, group in enumerate(found):
        for arm, line, marker in ((REFERENCE, "--", "x"), ("fast", "-", "o")):
            D, L = group.curve(arm).T
            left.scatter(D / 1e6, L, 14, f"C{i}", marker=marker)
            if len(group.arms[arm]) > 2:
                E, (fitted,) = fit([group.curve(arm)])
                D = np.geomspace(D.min(), D.max())
                style = {"color": f"C{i}", "label": f"{arm}, {group.size}"}
                left.plot(D / 1e6, predicted(E, fitted, D), line, **style)
        there = [(p, *group.share(p)) for p in group.arms["fast"]]
        there = [row for row in there if row[-1]]  # within the reference's lengths
        x = [p.tokens / share / 1e6 for p, share, *_ in there]
        y = [share for _, share, *_ in there]
        error = [[s - low for _, s, low, *_ in there], [high - s for _, s, _, high, _ in there]]
        style = {"color": f"C{i}", "label": group.size, "marker": "o", "capsize": 3}
        right.errorbar(x, y, np.nan_to_num(error), **style)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.legend()
    right.axhline(0.6, color="grey", linestyle=":")
    left.set(xlabel="million tokens of the run", ylabel="final validation loss (nats)")
    right.set(xlabel="million tokens of the reference", ylabel="share of them that fast needs")
    right.set_ylim(0, 1)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def summary(runs: Runs) -> None:
    """Table and fits for each data set and shape, one plot for each data set."""
    found = groups(runs.finished)
    for data in sorted({group.data for group in found}):
        print(f"\ndata set {data}" if found[0].data != found[-1].data else "")
        mine = [group for group in found if group.data == data]
        for group in mine:
            print_table(group)
            for arm in group.arms:
                lengths = [len(group.arms.get(name, [])) for name in (REFERENCE, arm)]
                if arm != REFERENCE and "+" not in arm and min(lengths) > 3:
                    print_fits(group, arm)
        drawn = [g for g in mine if min(len(g.arms.get(a, [])) for a in (REFERENCE, "fast")) > 1]
        if drawn:
            path = runs.out / f"learning-{data}.png"
            plot(path, drawn)
            print(f"\nplot: {path}")


def main() -> None:
    args = parse_arguments()
    runs = Runs(args.out, args.data_dir)
    try:
        if not args.summary:
            grid(args, runs)
        summary(runs)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None


if __name__ == "__main__":
    main()
