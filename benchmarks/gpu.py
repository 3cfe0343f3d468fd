"""What a GPU says about this program, in parts; each prints one JSON line at once.

    python benchmarks/gpu.py                        everything, at most 25 minutes
    python benchmarks/gpu.py --part speed waits     these parts alone
    python benchmarks/gpu.py --device cpu --model tiny --quick      the same on a CPU, for CI

Every part runs the training program as a user does and reads what it logged. A part that fails says
so in its line, and the next one runs. Lines also go to --out.
"""

import argparse
import collections
import json
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "src" / "train_improved.py"
PART_SECONDS = 480
QUIET = "--eval_freq 0 --histogram_freq 0 --checkpoint_freq 0 --hellaswag_freq 0 --sample_freq 0"


class Bench:
    def __init__(self, args):
        self.args, self.folder = args, Path(tempfile.mkdtemp())
        self.steps = 4 if args.quick else 20
        self.deadline = 0.0
        self.runs = 0

    def train(self, *flags, steps=None, torchrun=0, before=(), stop_after=None, **env) -> dict:
        """Run the training program -> exit code, seconds, output, logged steps, median speed.

        stop_after: seconds after the first step at which SIGTERM is sent.
        """
        flags = [str(flag) for flag in flags]
        if "--run_name" not in flags:
            self.runs += 1
            flags += ["--run_name", f"run{self.runs}"]
        name = flags[flags.index("--run_name") + 1]
        command = [sys.executable, *before]
        if torchrun:
            launcher = "-m torch.distributed.run --standalone".split()
            command += [*launcher, f"--nproc_per_node={torchrun}"]
        if not before:
            command += [str(SCRIPT)]
        command += [
            "--device", self.args.device, "--model", self.args.model, "--log_jsonl",
            "--max_steps", str(steps or self.steps), *flags,
        ]  # fmt: skip
        if "--total_batch_size" not in flags and self.args.quick:
            command += ["--total_batch_size", "2048"]
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | {"XDG_CACHE_HOME": str(self.folder / "cache")} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines, stopped = [], None
        log = self.folder / "runs" / name / "metrics.jsonl"
        try:
            if stop_after is not None:
                while process.poll() is None and not (log.exists() and log.stat().st_size):
                    time.sleep(0.2)
                time.sleep(stop_after)
                process.send_signal(signal.SIGTERM)
                stopped = time.monotonic()
            out, _ = process.communicate(timeout=max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out = process.communicate()[0] + "\n(ended: out of time)"
        if log.exists():
            lines = [json.loads(line) for line in log.read_text().splitlines()]
        lines = [line for line in lines if line.get("Loss/train") is not None]
        warm = lines[len(lines) // 2 :]

        def median(tag):
            values = [line[tag] for line in warm if line.get(tag) is not None]
            return statistics.median(values) if values else None

        result = {
            "code": process.returncode,
            "seconds": round(time.monotonic() - start, 1),
            "losses": [line["Loss/train"] for line in lines],
            "tokens_per_s": median("Performance/tokens_per_sec"),
            "mfu": median("Performance/mfu"),
            "memory_gb": median("Performance/memory_gb"),
            "out": out,
        }
        if stopped is not None:
            result["stop_seconds"] = round(time.monotonic() - stopped, 1)
        return result

    def brief(self, result: dict) -> dict:
        """A result without its output, of which the end is kept where the program failed."""
        kept = {k: v for k, v in result.items() if k != "out"}
        kept["losses"] = kept["losses"][-1:]
        return kept if result["code"] == 0 else kept | {"end": result["out"][-1500:]}

    # --- Parts ------------------------------------------------------------------------------------

    def doctor(self) -> dict:
        """The doctor, and a first look as the README has it."""
        command = [sys.executable, str(SCRIPT), "--doctor", "--device", self.args.device]
        done = subprocess.run(
            [*command, "--model", self.args.model], cwd=self.folder, capture_output=True, text=True
        )
        return {"doctor": done.stdout[-4000:], "first": self.brief(self.train())}

    def agree(self) -> dict:
        """Losses of eager, compiled and float32 training; memory against the plan's estimate."""
        flags = [*QUIET.split(), "--micro_batch_size", "2"]
        ways = {
            "eager": ["--no-compile"],
            "compiled": ["--compile"],
            "float32": ["--no-compile", "--dtype", "float32"],
        }
        if self.args.quick:
            del ways["compiled"]  # minutes on a CPU
        found = {way: self.train(*flags, *more) for way, more in ways.items()}
        exact = found["float32"]["losses"]
        apart = {
            way: max((abs(a - b) for a, b in zip(r["losses"], exact, strict=False)), default=None)
            for way, r in found.items()
        }
        planned = {
            way: float(m[1]) if (m := re.search(r"about ([\d.]+) GB of memory", r["out"])) else None
            for way, r in found.items()
        }
        brief = {way: self.brief(r) for way, r in found.items()}
        return brief | {"apart_from_float32": apart, "planned_gb": planned}

    def waits(self) -> dict:
        """Where a step waits for the device, and the shares of its kernels."""
        me = [__file__, "--watch_waits"]
        watched = self.train(*QUIET.split(), before=me)
        found = re.findall(r"^WAIT (.*)$", watched["out"], re.M)
        profiled = self.train(*QUIET.split(), "--profile", "--run_name", "profiled")
        shares = {}
        for trace in (self.folder / "runs" / "profiled").glob("*.pt.trace.json"):
            kinds = collections.Counter()
            for event in json.loads(trace.read_text())["traceEvents"]:
                if event.get("cat") == "kernel":
                    kinds[event["name"][:60]] += event["dur"]
            total = sum(kinds.values())
            shares = {name: round(t / total, 4) for name, t in kinds.most_common(15)}
        return {"waits": found, "kernels": shares, "code": [watched["code"], profiled["code"]]}

    def speed(self) -> dict:
        """Speed and MFU over micro-batches, and of the size that is chosen."""
        sizes = (1, 2) if self.args.quick else (4, 8, 16, 32, 64)
        flags = [*QUIET.split()]
        if not self.args.quick:
            flags += ["--total_batch_size", "131072"]
        found = {n: self.train(*flags, "--micro_batch_size", n, steps=12) for n in sizes}
        found["chosen"] = self.train(*flags, steps=12)
        return {str(size): self.brief(result) for size, result in found.items()}

    def memory(self) -> dict:
        """The micro-batch that is chosen, with all of the memory and with a third of it."""
        found = {}
        for share in (1.0, 0.34):
            os.environ["GPU_BENCH_SHARE"] = str(share)
            cache = str(self.folder / f"cache{share}")
            result = self.train(
                *QUIET.split(), before=[__file__, "--less_memory"], steps=3, XDG_CACHE_HOME=cache
            )
            batch = re.search(r"micro-batch\(es\) x (\d+) sequences", result["out"])
            found[str(share)] = self.brief(result) | {"sequences": batch and int(batch[1])}
        return found

    def resume(self) -> dict:
        """SIGTERM in mid-run, then on: are the losses those of a run that was left alone?"""
        found = {}
        for name, before in (("as_is", ()), ("deterministic", [__file__, "--deterministic"])):
            env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
            flags = [*QUIET.split(), "--no-compile", "--micro_batch_size", "2"]
            steps = 400 if self.args.quick else 60
            whole = self.train(*flags, steps=steps, before=before, **env)
            again = [*flags, "--run_name", f"again_{name}"]
            first = self.train(*again, steps=steps, before=before, stop_after=2.0, **env)
            second = self.train(*again, "--resume", "latest", steps=steps, before=before, **env)
            found[name] = {
                "codes": [whole["code"], first["code"], second["code"]],
                "stop_seconds": first.get("stop_seconds"),
                "stopped_after": len(first["losses"]),
                "equal": second["losses"] == whole["losses"],
                "apart": max(
                    (abs(a - b) for a, b in zip(whole["losses"], second["losses"], strict=False)),
                    default=None,
                ),
            }
        return found

    def evaluation(self) -> dict:
        """Seconds of evaluation, HellaSwag where it is, samples, histograms; what a save costs."""
        each = f"--eval_freq {self.steps} --histogram_freq {self.steps} --use_tensorboard"
        result = self.train(*each.split(), "--checkpoint_freq", self.steps)
        seconds = re.findall(r"step +\d+: .*\(([\d.]+) s\)", result["out"])
        return self.brief(result) | {"evaluation_seconds": [float(s) for s in seconds]}

    def optimizers(self) -> dict:
        """Muon beside AdamW, and float16."""
        ways = {"adamw": [], "muon": ["--optimizer", "muon"], "float16": ["--dtype", "float16"]}
        if self.args.device == "cpu":
            del ways["float16"]  # there it is slow beyond use
        found = {way: self.train(*QUIET.split(), *more) for way, more in ways.items()}
        brief = {way: self.brief(result) for way, result in found.items()}
        rates = [found[way]["tokens_per_s"] for way in ("adamw", "muon")]
        if all(rates):
            brief["muon_share"] = 1 - rates[1] / rates[0]
        return brief

    def peers(self) -> dict:
        """Transformers' GPT-2 in the same minutes, eager and compiled (throughput.py)."""
        command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--rounds", "1"]
        command += ["--device", self.args.device, "--model", self.args.model]
        if self.args.quick:
            command += ["--steps", "1", "--micro_batch_size", "1", "--seq_len", "64"]
        found = {}
        for way in ("eager",) if self.args.quick else ("eager", "compiled"):
            more = ["--compile"] if way == "compiled" else []
            done = subprocess.run([*command, *more], capture_output=True, text=True)
            ratio = re.search(r"ratio to transformers: ([\d.]+)", done.stdout)
            found[way] = {"ratio": ratio and float(ratio[1]), "out": done.stdout[-1500:]}
            if done.returncode:
                found[way]["error"] = done.stderr[-1500:]
        return found

    def several(self) -> dict:
        """Two processes: speed beside one, SIGTERM within torchrun's 30 seconds."""
        import torch

        if self.args.device != "cpu" and torch.cuda.device_count() < 2:
            return {"skipped": "needs two GPUs"}
        flags = QUIET.split()
        one, two = self.train(*flags), self.train(*flags, torchrun=2)
        stopped = self.train(*flags, steps=100_000, torchrun=2, stop_after=3.0)
        saved = list((self.folder / "checkpoints" / f"run{self.runs}").glob("step_*.pt"))
        return {
            "one": self.brief(one),
            "two": self.brief(two),
            "stop_seconds": stopped["stop_seconds"],
            "saved": len(saved),
        }


PARTS = ("doctor agree waits speed memory resume evaluation optimizers peers several").split()

# --- Inside the training program ------------------------------------------------------------------


def inside(how: str) -> None:
    """Become the training program, changed as a part wants it."""
    sys.argv = [str(SCRIPT), *sys.argv[2:]]
    sys.path.insert(0, str(SCRIPT.parent))
    import torch

    if how == "--deterministic":
        torch.use_deterministic_algorithms(True)
    elif how == "--less_memory" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        taken = int((1 - float(os.environ["GPU_BENCH_SHARE"])) * free)
        global ballast  # outside PyTorch's allocator's accounts, as another program's would be
        _, ballast = torch.cuda.cudart(), torch.cuda.caching_allocator_alloc(max(1, taken))
    elif how == "--watch_waits":
        import train_improved as ti

        step = ti.Training.step

        def watched(training):
            if training.run.state.step == 3 and torch.cuda.is_available():  # all is warm by then
                torch.cuda.set_sync_debug_mode("warn")
                warnings.simplefilter("always")
                warnings.showwarning = lambda text, kind, file, line, *_: print(
                    f"WAIT {file}:{line} {text}", flush=True
                )
            step(training)

        ti.Training.step = watched
        sys.exit(ti.main())
    runpy.run_path(str(SCRIPT), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="[all]")
    parser.add_argument("--device", help="cuda, cpu or mps [the best there is]")
    parser.add_argument("--model", default="gpt2", help="size [gpt2]")
    parser.add_argument("--quick", action="store_true", help="few steps of few tokens")
    parser.add_argument("--out", help="also write the lines to this file")
    args = parser.parse_args()

    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(args)
    on_gpu = args.device.startswith("cuda")
    line = {
        "part": "machine",
        "device": torch.cuda.get_device_name() if on_gpu else args.device,
        "torch": torch.__version__,
        "model": args.model,
    }
    for part in [None, *args.part]:
        if part is not None:
            start = time.monotonic()
            bench.deadline = start + PART_SECONDS
            try:
                line = {"part": part} | getattr(bench, part)()
            except Exception as error:  # the next part may work
                line = {"part": part, "error": f"{type(error).__name__}: {error}"}
            line["part_seconds"] = round(time.monotonic() - start, 1)
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] in (["--deterministic"], ["--less_memory"], ["--watch_waits"]):
        inside(sys.argv[1])
    main()
