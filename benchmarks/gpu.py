"""What a GPU says about this program, in parts; each prints one JSON line at once.

    python benchmarks/gpu.py                        everything, at most 25 minutes
    python benchmarks/gpu.py --part speed waits     these parts alone
    python benchmarks/gpu.py --device cpu --model tiny --quick      the same on a CPU, for CI

Every part runs the training program as a user does and reads what it logged. A part that fails, or
takes more than 8 minutes, says so in its line, and the next one runs. Lines also go to --out.
"""

import argparse
import collections
import itertools
import json
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "src" / "train_improved.py"
PART_SECONDS, ALL_SECONDS = 480, 1500
SMALL = "--n_layer 2 --n_head 2 --n_embd 16 --seq_len 64 --total_batch_size 256".split()
QUIET = "--eval_freq 0 --histogram_freq 0 --checkpoint_freq 0 --hellaswag_freq 0 --sample_freq 0"


class Bench:
    def __init__(self, args):
        self.args, self.folder = args, Path(tempfile.mkdtemp())
        self.steps = 4 if args.quick else 20
        self.deadline = 0.0
        self.runs = 0

    def left(self) -> float:
        """Return the seconds that this part may still take."""
        return max(1.0, self.deadline - time.monotonic())

    def train(self, *flags, steps=None, torchrun=0, before=(), stop_after=None, **env) -> dict:
        """Run the training program -> exit code, seconds, output, logged steps, median speed.

        stop_after: seconds after the first step at which SIGTERM is sent.
        """
        flags = [str(flag) for flag in flags]
        if "--run_name" not in flags:
            self.runs += 1
            flags += ["--run_name", f"run{self.runs}"]
        name = flags[flags.index("--run_name") + 1]
        command = [sys.executable]
        if torchrun:
            launcher = "-m torch.distributed.run --standalone".split()
            command += [*launcher, f"--nproc_per_node={torchrun}"]
        command += [
            *(before or [str(SCRIPT)]), "--device", self.args.device, "--model", self.args.model,
            "--log_jsonl", "--max_steps", str(steps or self.steps),
            *(SMALL if self.args.quick else ()), *flags,
        ]  # fmt: skip
        caches = {"XDG_CACHE_HOME": str(self.folder / "cache"), "PYTHONUNBUFFERED": "1"}
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | caches | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        out, times, stopped = [], {}, []

        def stop():
            stopped.append(time.monotonic())
            process.send_signal(signal.SIGTERM)

        timers = [threading.Timer(self.left(), process.kill)]
        timers[0].start()
        for line in process.stdout:
            out.append(line)
            now = time.monotonic()
            if "compiling" in times:
                times.setdefault("compiled", now)
            elif line.startswith("compiling"):
                times["compiling"] = now
            if len(timers) == 1 and stop_after is not None and re.search(r"step +\d+/", line):
                timers.append(threading.Timer(stop_after, stop))
                timers[-1].start()
        process.wait()
        for timer in timers:
            timer.cancel()
        log = self.folder / "runs" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        lines = [line for line in lines if line.get("Loss/train") is not None]

        def median(tag):
            values = [line[tag] for line in lines[len(lines) // 2 :] if line.get(tag) is not None]
            return statistics.median(values) if values else None

        result = {
            "code": process.returncode,
            "seconds": round(time.monotonic() - start, 1),
            "lines": lines,
            "losses": [line["Loss/train"] for line in lines],
            "tokens_per_s": median("Performance/tokens_per_sec"),
            "mfu": median("Performance/mfu"),
            "memory_gb": median("Performance/memory_gb"),
            "out": "".join(out),
        }
        if "compiled" in times:
            result["compile_seconds"] = round(times["compiled"] - times["compiling"], 1)
        if stopped:
            result["stop_seconds"] = round(time.monotonic() - stopped[0], 1)
        return result

    def brief(self, result: dict) -> dict:
        """A result without its output, of which the end is kept where the program failed."""
        kept = {k: v for k, v in result.items() if k not in ("out", "lines")}
        kept["losses"] = kept["losses"][-1:]
        return kept if result["code"] == 0 else kept | {"end": result["out"][-1500:]}

    # --- Parts ------------------------------------------------------------------------------------

    def doctor(self) -> dict:
        """The doctor, and a first look as the README has it."""
        command = [sys.executable, str(SCRIPT), "--doctor", "--device", self.args.device]
        command += ["--model", self.args.model, *(SMALL if self.args.quick else ())]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=self.left()
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
        sizes = (2,) if self.args.quick else (8, 16, 32, 64)
        flags = [*QUIET.split()]
        if not self.args.quick:
            flags += ["--total_batch_size", "131072"]
        found = {n: self.train(*flags, "--micro_batch_size", n, steps=12) for n in sizes}
        found["chosen"] = self.train(*flags, steps=12)
        return {str(size): self.brief(result) for size, result in found.items()}

    def memory(self) -> dict:
        """The micro-batch that is chosen, with all of the memory, and with a third of it while
        another process holds the rest."""
        found = {}
        for share in (1.0,) if self.args.device == "cpu" else (1.0, 0.34):
            holds = (
                f"import torch; free, _ = torch.cuda.mem_get_info(); n = int({1 - share} * free)"
            )
            holds += "; held = torch.empty(n, dtype=torch.uint8, device='cuda'); print(); input()"
            other = subprocess.Popen(
                [sys.executable, "-c", holds if share < 1 else "print(); input()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            other.stdout.readline()
            cache, flags = str(self.folder / f"cache{share}"), QUIET.split()
            if not self.args.quick:
                flags += ["--total_batch_size", "131072"]  # as much as a pass may have, twice
            result = self.train(*flags, steps=3, XDG_CACHE_HOME=cache)
            other.communicate(b"\n")
            batch = re.search(r"micro-batch\(es\) x (\d+) sequences", result["out"])
            found[str(share)] = self.brief(result) | {"sequences": batch and int(batch[1])}
        return found

    def resume(self) -> dict:
        """SIGTERM in mid-run, then on: are the losses those of a run that was left alone?"""
        found = {}
        ways = {"as_is": (), "deterministic": [__file__, "--deterministic"]}
        if self.args.device == "cpu":
            del ways["as_is"]  # it is deterministic as it is
        for name, before in ways.items():
            env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
            flags = [*QUIET.split(), "--no-compile", "--micro_batch_size", "2"]
            steps, soon = (150, 0.3) if self.args.quick else (60, 2.0)
            whole = self.train(*flags, steps=steps, before=before, **env)
            again = [*flags, "--run_name", f"again_{name}"]
            first = self.train(*again, steps=steps, before=before, stop_after=soon, **env)
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
        """How long training stands still for each thing that is done now and then, and its rate."""
        count = 20 if self.args.quick else 400
        words = "the cat sat on a mat and looked at nothing in the end".split()
        with open(self.folder / "items.jsonl", "w") as file:
            for i in range(count):
                ends = [" ".join(words[i % 7 : i % 7 + n]) for n in (4, 5, 6, 3)]
                item = {"ind": i, "activity_label": "", "ctx": " ".join(words * 3), "label": i % 4}
                file.write(json.dumps(item | {"endings": ends}) + "\n")
        # At step numbers of their own: one kind of pause each.
        freqs = {"histogram": 5, "hellaswag": 7, "sample": 11, "eval": 13, "checkpoint": 17}
        flags = [f"--{kind}_freq={freq}" for kind, freq in freqs.items()]
        flags += ["--hellaswag_file", "items.jsonl", "--use_tensorboard"]
        flags += ["--num_samples", 2, "--sample_tokens", 32]
        tokens = 1024 if self.args.quick else 65_536
        result = self.train(*flags, "--val_tokens", tokens, steps=20)
        if result["code"] != 0:
            return self.brief(result)
        times = {line["step"]: line["time"] for line in result["lines"]}
        gaps = {a: times[b] - times[a] for a, b in itertools.pairwise(times) if a > 2}
        usual = statistics.median(gaps.values())
        stall = {kind: gaps[freq] - usual for kind, freq in freqs.items()}
        work = {"hellaswag": count, "sample": 2 * 32, "eval": tokens}
        rates = {kind: round(n / stall[kind]) for kind, n in work.items() if stall[kind] > 0}
        return self.brief(result) | {
            "usual_gap_s": round(usual, 4),
            "stall_s": {kind: round(seconds, 4) for kind, seconds in stall.items()},
            "items_or_tokens_per_s": rates,
        }

    def optimizers(self) -> dict:
        """Muon, without and with SOAP, beside AdamW, and float16."""
        kinds = ("adamw", "muon", "soap_muon")
        ways = {kind: ["--optimizer", kind] for kind in kinds} | {"float16": ["--dtype", "float16"]}
        if self.args.device == "cpu":
            del ways["float16"]  # there it is slow beyond use
        found = {way: self.train(*QUIET.split(), *more) for way, more in ways.items()}
        brief = {way: self.brief(result) for way, result in found.items()}
        rates = {kind: found[kind]["tokens_per_s"] for kind in kinds}
        if all(rates.values()):
            brief["share"] = {kind: 1 - rates[kind] / rates["adamw"] for kind in kinds[1:]}
        return brief

    def peers(self) -> dict:
        """Transformers' GPT-2 in the same minutes, eager and compiled (throughput.py)."""
        command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--rounds", "1"]
        command += ["--device", self.args.device, "--model", self.args.model]
        if self.args.quick:
            command += ["--steps", "1", "--micro_batch_size", "1", "--seq_len", "64"]
        else:
            command += ["--steps", "20", "--micro_batch_size", "16"]
        found = {}
        for way in ("eager",) if self.args.quick else ("eager", "compiled"):
            more = ["--compile"] if way == "compiled" else []
            done = subprocess.run(
                [*command, *more], capture_output=True, text=True, timeout=self.left()
            )
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
        ways = {"one": (0, []), "two": (2, []), "sharded": (2, ["--shard", "--no-compile"])}
        if self.args.quick:
            ways = {}  # other tests have them, and the run that is stopped has two
        brief = {
            way: self.brief(self.train(*flags, *more, torchrun=processes))
            for way, (processes, more) in ways.items()
        }
        flags += ["--data_dir", "data/sample"]  # said so, it may be read as often as that takes
        stopped = self.train(*flags, steps=100_000, torchrun=2, stop_after=3.0)
        saved = list((self.folder / "checkpoints" / f"run{self.runs}").glob("step_*.pt"))
        brief |= {"stop_seconds": stopped.get("stop_seconds"), "saved": len(saved)}
        return brief if saved else brief | {"end": stopped["out"][-1500:]}


PARTS = "doctor waits agree speed peers memory resume evaluation optimizers several".split()

# --- Inside the training program ------------------------------------------------------------------


def inside(how: str) -> None:
    """Become the training program, changed as a part wants it."""
    sys.argv = [str(SCRIPT), *sys.argv[2:]]
    sys.path.insert(0, str(SCRIPT.parent))
    import torch

    if how == "--deterministic":
        torch.use_deterministic_algorithms(True)
    elif how == "--watch_waits":
        import train_improved as ti

        step = ti.Training.step

        def watched(training):
            watching = training.run.state.step >= 3 and torch.cuda.is_available()  # all is warm
            if watching:
                torch.cuda.set_sync_debug_mode("warn")
                warnings.simplefilter("always")
                warnings.showwarning = lambda text, kind, file, line, *_: print(
                    f"WAIT {file}:{line} {text}", flush=True
                )
            step(training)
            if watching:
                torch.cuda.set_sync_debug_mode("default")

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
    begun = time.monotonic()
    for part in [None, *args.part]:
        if part is not None:
            start = time.monotonic()
            bench.deadline = min(start + PART_SECONDS, begun + ALL_SECONDS)
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
    if sys.argv[1:2] in (["--deterministic"], ["--watch_waits"]):
        inside(sys.argv[1])
    main()
