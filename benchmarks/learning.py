"""How much each token teaches: optimizers, schedules and recipes against a tuned reference.

    python benchmarks/learning.py --data_dir data/books --size 4x128
    python benchmarks/learning.py --data_dir data/books --size 4x256 --arms adamw muon --seeds 1 2 3
    python benchmarks/learning.py --data_dir data/books --arm "mine: --optimizer muon --beta2 0.99"
    python benchmarks/learning.py --summary                     tables and plots of what is there

An arm is a named set of flags of src/train_improved.py, which does the training. For each arm:

1. Its peak learning rate is tuned, the reference's at full length, the others' at the longest of
   --shares: factors of two from --max_lr, in both directions until the best one has a worse
   neighbour on both sides.
2. With that rate it runs with every seed, at each share of the reference's steps with a schedule
   planned for exactly that length: a curve that passes the reference's final loss in
   mid-schedule, at a high rate, would tell less.

Tokens to the reference's loss is where the straight line through (log tokens, final loss) of an
arm's lengths crosses the final loss of the reference with the same seed; it is printed as a share
of the reference's tokens, as the mean over seeds and their range. The same seed means the same
data in the same order and, at equal shapes, the same initial weights.

Everything is in --out: a JSON-lines file for each run (its first line the flags, then the
validation curve, then the time), summary.json and a picture for each size. What is finished is not
run again, what was interrupted goes on from its last checkpoint: stop and start it as you like.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
SCRIPT = ROOT / "src" / "train_improved.py"

REFERENCE = "adamw"
ARMS = {
    REFERENCE: "",
    "muon": "--optimizer muon",
    "adamw-linear": "--schedule linear",
    "muon-linear": "--optimizer muon --schedule linear",
    "muon-wsd": "--optimizer muon --schedule wsd",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", help="folder of prepared shards")
    add("--size", default="4x128", help="layers x width")
    add("--seq_len", type=int, default=128, help="context, in tokens")
    add("--total_batch_size", type=int, default=2048, help="tokens a step")
    add("--steps", type=int, default=600, help="of the reference")
    add("--max_lr", type=float, default=2e-3, help="where tuning begins")
    add("--shares", type=float, nargs="+", default=[0.3, 0.4, 0.5], help="lengths, of --steps")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the first one also tunes")
    add("--arms", nargs="+", help=f"which [all]: {', '.join(ARMS)}")
    add("--arm", action="append", default=[], help="another one: 'name: flags'; may be repeated")
    add("--flags", default="", help="flags for all arms, e.g. '--dtype float32'")
    add("--threads", type=int, default=1, help="of each run")
    add("--out", type=Path, default=Path("learning"), help="folder of results")
    add("--summary", action="store_true", help="only summarise what is in --out")
    args = parser.parse_args()
    args.all_arms = dict(ARMS)
    for text in args.arm:
        name, colon, flags = text.partition(":")
        if not colon:
            parser.error(f"--arm {text!r}: write a name, a colon and the flags")
        args.all_arms[name.strip()] = flags.strip()
    args.arms = args.arms or [name for name in args.all_arms if name != REFERENCE]
    unknown = [name for name in args.arms if name not in args.all_arms]
    if unknown:
        parser.error(f"--arms {unknown[0]}: there are {', '.join(args.all_arms)}")
    if not args.summary and not args.data_dir:
        parser.error("--data_dir: give a folder of shards (src/prepare_data.py makes them)")
    return args


# --- One run --------------------------------------------------------------------------------------


def run_flags(args, arm: str, max_lr: float, seed: int, steps: int) -> list[str]:
    """The training program's flags for this run."""
    layers, width = (int(n) for n in args.size.split("x"))
    flags = {
        "n_layer": layers,
        "n_head": max(1, width // 64),
        "n_embd": width,
        "seq_len": args.seq_len,
        "total_batch_size": args.total_batch_size,
        "max_steps": steps,
        "max_lr": f"{max_lr:g}",
        "seed": seed,
        "eval_freq": max(1, steps // 6),
        "val_tokens": 65_536,
        "data_dir": args.data_dir,
    }
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return given + shlex.split(args.flags) + shlex.split(args.all_arms[arm])


def train(args, arm: str, max_lr: float, seed: int, steps: int) -> dict:
    """One run, or what is on disk of it -> {"arm", "flags", "curve": [[step, loss]], ...}."""
    flags = run_flags(args, arm, max_lr, seed, steps)
    digest = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
    name = f"{args.size}_{arm}_{max_lr:.3g}_seed{seed}_{steps}_{digest}"
    path = args.out / f"{name}.jsonl"
    if path.exists():
        return load(path)
    work = args.out / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SCRIPT), *flags, "--run_name", "run", "--resume", "auto"]
    command += ["--checkpoint_freq", str(max(1, steps // 4)), "--keep_checkpoints", "1"]
    command += ["--use_tensorboard", "--histogram_freq", "0"]
    command += ["--sample_freq", "0", "--hellaswag_freq", "0"]
    i = command.index("--data_dir") + 1
    command[i] = os.path.abspath(command[i])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        cwd=work,
        env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode in (-2, 130):
        raise KeyboardInterrupt
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\nexit {done.returncode}\n{done.stderr}")
    from monitoring.event_files import RunReader

    reader = RunReader(work / "runs" / "run")
    reader.update()
    validation = reader.scalars["Loss/validation"]
    header = {"arm": arm, "size": args.size, "max_lr": max_lr, "seed": seed, "steps": steps}
    header |= {"tokens_per_step": args.total_batch_size, "flags": " ".join(flags)}
    header["shape"] = f"{args.size}, T={args.seq_len}, {args.total_batch_size} tokens a step"
    lines = [header]
    points = zip(validation.steps, validation.values, strict=True)
    lines += [{"step": step, "loss": loss} for step, loss in points]
    # of this process only: less than the whole if the run was interrupted
    lines += [{"cpu_seconds": after.ru_utime - before.ru_utime}]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(path)
    shutil.rmtree(work)
    return load(path)


def load(path: Path) -> dict:
    header, *rows, end = (json.loads(line) for line in path.read_text().splitlines())
    run = header | end | {"curve": [[row["step"], row["loss"]] for row in rows]}
    run["loss"] = run["curve"][-1][1]
    if not math.isfinite(run["loss"]):
        run["loss"] = math.inf
    return run


def report(run: dict) -> dict:
    print(
        f"{run['size']:>6} {run['arm']:<14} max_lr {run['max_lr']:<8.3g} seed {run['seed']} "
        f"{run['steps']:>6} steps: loss {run['loss']:.4f}, "
        f"{run['cpu_seconds']:.0f} s of processor time",
        flush=True,
    )
    return run


# --- An arm ---------------------------------------------------------------------------------------


def tune(args, arm: str, steps: int, start: float) -> float:
    """The power of two times `start` with the lowest final loss, with a worse one on each side."""

    @functools.cache
    def loss(power: int) -> float:
        return report(train(args, arm, start * 2.0**power, args.seeds[0], steps))["loss"]

    best = 0
    while True:
        better = [p for p in (best - 1, best + 1) if loss(p) < loss(best)]
        if not better:
            return start * 2.0**best
        best = min(better, key=loss)


def experiment(args) -> None:
    """All runs of all arms at one size; the reference first."""
    reference_lr = tune(args, REFERENCE, args.steps, args.max_lr)
    for seed in args.seeds:
        report(train(args, REFERENCE, reference_lr, seed, args.steps))
    for arm in args.arms:
        lengths = sorted(round(share * args.steps) for share in args.shares)
        max_lr = tune(args, arm, lengths[-1], reference_lr)
        for seed in args.seeds:
            for steps in lengths:
                report(train(args, arm, max_lr, seed, steps))


# --- Summary --------------------------------------------------------------------------------------


def crossing(points: list[tuple[float, float]], target: float) -> float:
    """Share of tokens at which the line through (log share, loss) reaches target.

    points: (share, loss), at least two. Least squares; beyond the points it is an extrapolation.
    Infinite if more tokens do not help.
    """
    x = [math.log(share) for share, _ in points]
    y = [loss for _, loss in points]
    slope, intercept = statistics.linear_regression(x, y)
    return math.exp((target - intercept) / slope) if slope < 0 else math.inf


def summarise(runs: list[dict]) -> dict:
    """Runs of one size and shape -> {arm: tuned rate, final losses, share of tokens and spread}."""
    length = max(r["steps"] for r in runs if r["arm"] == REFERENCE)
    table = {}
    reference = {}
    for arm in sorted({r["arm"] for r in runs}, key=lambda a: (a != REFERENCE, a)):
        mine = [r for r in runs if r["arm"] == arm]
        longest = max(r["steps"] for r in mine)
        best = min((r for r in mine if r["steps"] == longest), key=lambda r: r["loss"])
        tuned = [r for r in mine if r["max_lr"] == best["max_lr"]]
        finals = {r["seed"]: r["loss"] for r in tuned if r["steps"] == longest}
        of_seed = {r["seed"]: [] for r in mine}  # the one that tuned has seen the most rates
        for r in mine:
            if r["steps"] == longest:
                of_seed[r["seed"]].append(r)
        tuning = max(of_seed.values(), key=lambda some: len({r["max_lr"] for r in some}))
        row = {
            "max_lr": best["max_lr"],
            "share": longest / length,
            "loss": statistics.mean(finals.values()),
            "range": max(finals.values()) - min(finals.values()),
            "seeds": len(finals),
            "cpu_seconds_per_step": statistics.median(r["cpu_seconds"] / r["steps"] for r in mine),
            "rates": {
                f"{r['max_lr']:.3g}": r["loss"] for r in sorted(tuning, key=lambda r: r["max_lr"])
            },
        }
        if arm == REFERENCE:
            reference = finals
        shares = []
        for seed in finals if arm != REFERENCE else ():
            points = [(r["steps"] / length, r["loss"]) for r in tuned if r["seed"] == seed]
            if len(points) > 1 and seed in reference:
                shares.append(crossing(points, reference[seed]))
        if shares:
            row |= {"tokens": statistics.mean(shares), "tokens_range": [min(shares), max(shares)]}
            row["shortest"] = min(r["steps"] for r in tuned) / length
        table[arm] = row
    return table


def print_table(title: str, table: dict) -> None:
    base = table[REFERENCE]
    print(f"\n{title}; reference: final loss {base['loss']:.4f}")
    print("| arm | max_lr | at share | final loss | range over seeds | tokens to reference's loss "
          "| processor time a step |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for arm, row in table.items():
        tokens = "1" if arm == REFERENCE else "-"
        if "tokens" in row:
            low, high = row["tokens_range"]
            tokens = f"{row['tokens']:.2f} ({low:.2f} to {high:.2f})"
            if not row["shortest"] <= row["tokens"] <= row["share"]:
                tokens += ", extrapolated"
        spread = f"{row['range']:.4f} ({row['seeds']})" if row["seeds"] > 1 else "one seed"
        cost = row["cpu_seconds_per_step"] / base["cpu_seconds_per_step"]
        print(
            f"| {arm} | {row['max_lr']:.3g} | {row['share']:.2f} | {row['loss']:.4f} | {spread} "
            f"| {tokens} | {cost:.2f} |"
        )
    print("learning rates tried, with one seed:")
    for arm, row in table.items():
        print(f"  {arm}: " + ", ".join(f"{lr} {loss:.4f}" for lr, loss in row["rates"].items()))


def plot(path: Path, title: str, runs: list[dict], table: dict) -> None:
    """Validation loss over tokens: each arm at its tuned rate and longest length, first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    length = max(r["steps"] for r in runs if r["arm"] == REFERENCE)
    for arm, row in table.items():
        curves = [
            r["curve"]
            for r in runs
            if r["arm"] == arm
            and r["max_lr"] == row["max_lr"]
            and r["steps"] == round(row["share"] * length)
        ]
        steps = [step for step, _ in curves[0] if step > 0]
        losses = [[loss for step, loss in curve if step > 0] for curve in curves]
        mean = [statistics.mean(values) for values in zip(*losses, strict=True)]
        million = [step * runs[0]["tokens_per_step"] / 1e6 for step in steps]
        axes.plot(million, mean, label=f"{arm}, max_lr {row['max_lr']:.2g}", marker=".")
    axes.axhline(table[REFERENCE]["loss"], color="grey", linestyle=":")
    axes.set(xlabel="million tokens", ylabel="validation loss (nats)", title=title)
    last = [row["loss"] for row in table.values()]
    axes.set_ylim(min(last) - 0.1, max(last) + 1.2)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def summary(out: Path) -> None:
    """Table and picture for each size in the folder, then the trend over sizes."""
    runs = [load(path) for path in sorted(out.glob("*.jsonl"))]
    if not any(r["arm"] == REFERENCE for r in runs):
        raise SystemExit(f"{out}: no finished run of the reference there yet")
    tables = {}
    for shape in sorted({r["shape"] for r in runs}):
        group = [r for r in runs if r["shape"] == shape]
        if not any(r["arm"] == REFERENCE for r in group):
            continue
        tables[shape] = summarise(group)
        print_table(shape, tables[shape])
        picture = out / f"{shape.replace(', ', '_').replace(' ', '-')}.png"
        plot(picture, shape, group, tables[shape])
        print(f"plot: {picture}")
    if len(tables) > 1:
        print("\ntokens to the reference's loss, by size:")
        for arm in sorted({arm for table in tables.values() for arm in table} - {REFERENCE}):
            cells = [
                f"{shape.split(',')[0]} {table[arm]['tokens']:.2f}"
                for shape, table in tables.items()
                if "tokens" in table.get(arm, {})
            ]
            print(f"  {arm}: {', '.join(cells)}")
    (out / "summary.json").write_text(json.dumps(tables, indent=2) + "\n")


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if not args.summary:
            experiment(args)
        summary(args.out)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None


if __name__ == "__main__":
    main()
