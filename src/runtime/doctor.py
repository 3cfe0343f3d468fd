"""Is this machine ready for the planned run? Looks, measures, and says what to fix.

    python src/train_improved.py --doctor
    python src/train_improved.py --model gpt2-medium --doctor

Each line is ok, note (worth knowing) or PROBLEM (would stop the run, or lose its work). Takes about
a minute on a GPU, two on a CPU. Leaves nothing behind but, like --dry_run, the sample corpus where
no data is prepared.
"""

import contextlib
import importlib.metadata
import io
import os
import platform
import random
import re
import shutil
import socket
import statistics
import sys
import time
from pathlib import Path

import torch

from basics import host, words
from basics.words import tint
from monitoring import energy, notify, summary
from runtime import machine, planning
from runtime.instead import Program
from tokens import shards as token_shards
from tokens import tokenizer
from training.guard import LossScale

REFERENCE_STEPS = 95_365  # five epochs of 10 billion tokens
REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
DISK_TEST_BYTES = 256 << 20
CHECKSUMS_BELOW = 2e9  # bytes of shards whose SHA-256 are checked unasked: a few seconds
PORTS = {
    6006: ("TensorBoard's", "it may run already; else tensorboard --logdir=runs --port 6007"),
    29500: ("torchrun's", "torchrun --standalone finds a free one"),
}
MEASURE_SECONDS = 5.0
LONG_SECONDS = 100 * 86400  # beyond that nobody waits for a run
COLOURS = {"ok": "green", "note": "yellow", "PROBLEM": "red"}


class Report:
    """Prints the lines as they are found, and remembers the problems."""

    def __init__(self):
        self.problems = []

    def add(self, name: str, text: str, but: str = "", fix: str = "", level: str = "note") -> None:
        """Print what was found, at `level` and with a `fix` where there is a `but`, else as ok."""
        level = level if but else "ok"
        print(f"{tint(f'{level:>7}', COLOURS[level])}  {name:<10} {text}{but}", flush=True)
        if but and fix:
            print(f"{'':20} fix: {fix}", flush=True)
        if level == "PROBLEM":
            self.problems.append(name)

    def note(self, name: str, text: str, fix: str = "") -> None:
        self.add(name, "", text, fix)

    def problem(self, name: str, text: str, fix: str = "") -> None:
        self.add(name, "", text, fix, "PROBLEM")


def examine(program: Program, outside: notify.Outside = notify.NOBODY) -> int:
    """Look at everything -> exit code 0, or 2 if there is a problem."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        print("error: --doctor looks at one process: start it without torchrun", file=sys.stderr)
        return 2
    report, run = Report(), None
    cfg, device = program.flags, torch.device("cpu")
    check_versions(report, cfg.use_tensorboard)
    try:
        # What planning has to say beside errors, the lines below say too.
        with contextlib.redirect_stdout(io.StringIO()):
            run = program.plan()
        cfg, device = run.cfg, run.dist.device
        planning.check_unused(run)
    except (ValueError, OSError) as error:
        report.problem("plan", str(error))
        with contextlib.suppress(ValueError):  # the machine's lines are of the run's device anyway
            device = machine.choose_device(cfg.device)
    check_devices(report, device)
    check_products(report, device, run and run.dtype)
    check_compiler(report, device, cfg.compile)
    fits = run is not None and check_memory(report, run)
    check_disk(report, cfg, run)
    if run is not None:
        check_data(report, run, program.sample_dir)
        check_hellaswag(report, run)
    check_ports(report)
    check_messages(report, outside)
    if fits:  # else the attempt itself could bring the machine down
        check_speed(report, program, run)
    print()
    if report.problems:
        print(tint(f"to fix before the run: {', '.join(report.problems)}", "red"))
        return 2
    print(tint("nothing here stops the run", "green"))
    return 0


# --- What is installed ----------------------------------------------------------------------------


def check_versions(report: Report, use_tensorboard: bool) -> None:
    """Compare what is installed with requirements.txt."""
    found, others, missing = [f"Python {platform.python_version()}"], [], []
    for name, pinned in re.findall(r"^([\w-]+)==(\S+)", REQUIREMENTS.read_text(), re.M):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        found.append(f"{name} {version}")
        if version.split("+")[0] != pinned:  # torch's builds are 2.13.0+cpu, 2.13.0+cu130, ...
            others.append(f"{name} {version}, pinned is {pinned}")
    install = "pip install -r requirements.txt"
    report.add("versions", ", ".join(found))
    if others:
        report.note("versions", f"{'; '.join(others)}: numbers may differ a little", install)
    for name in missing:
        rarely = {"tensorboard": "for --use_tensorboard", "datasets": "to prepare hub data"}
        needed = name not in rarely or (name == "tensorboard" and use_tensorboard)
        text = f"{name} is not installed, needed {rarely.get(name, 'for training')}"
        report.add("versions", "", text, install, "PROBLEM" if needed else "note")


# --- The machine ----------------------------------------------------------------------------------


def check_devices(report: Report, device: torch.device) -> None:
    cores, load = host.cores(), os.getloadavg()[0]
    text = f"{cores} core(s) for this process, {torch.get_num_threads()} thread(s) of PyTorch"
    busy = f"; load {load:.1f}: something else is running, speeds below are too low"
    report.add("CPU", text, busy if load > 0.5 * cores else "")
    count = torch.cuda.device_count()
    if device.type == "cpu" and shutil.which("nvidia-smi"):
        build = f"PyTorch {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})"
        text = f"nvidia-smi is installed but the run uses the CPU: {build} sees {count} GPU(s)"
        fix = "a driver, or PyTorch's CUDA build: pip install torch==2.13.0"
        report.note("GPU", text, fix)
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        text = (
            f"{i}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free, CUDA {torch.version.cuda}"
        )
        taken = ": something else has memory there" if free < 0.9 * total else ""
        report.add("GPU", text, taken, "nvidia-smi")
    if device.type == "mps":
        report.add("GPU", "Apple's, through MPS")


def check_products(report: Report, device: torch.device, planned: torch.dtype | None) -> None:
    """Measure the speed of a matrix product in each precision."""
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if device.type == "cuda":
        wanted |= {"TF32": torch.float32, "float16": torch.float16}
    rates, missing = {}, []
    for name, dtype in wanted.items():
        torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
        try:
            rates[name] = machine.measure_peak_flops(device, dtype)
        except (RuntimeError, TypeError):
            missing.append(name)
    torch.set_float32_matmul_precision("highest")
    text = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items()) + " GFLOP/s"
    text += f"; not available: {', '.join(missing)}" if missing else ""
    bfloat16, but, better = rates.get("bfloat16", 0), "", ""
    if planned == torch.bfloat16 and bfloat16 < rates["float32"]:
        but, better = ": bfloat16 is slower than float32 here", "float32"
    elif planned == torch.float32 and bfloat16 > 1.5 * rates["float32"]:
        but, better = ": bfloat16 would be faster than the planned float32", "bfloat16"
    report.add("products", text, but, f"--dtype {better}")


def check_compiler(report: Report, device: torch.device, asked: bool | None) -> None:
    """Compile a small function for real: a new one each time, so that no cache answers."""
    if asked is False:
        report.add("compiler", "not needed with --no-compile")
        return
    number, x, start = random.random(), torch.ones(64, device=device), time.monotonic()

    def function(x):
        return torch.sin(x) * number + 1

    try:
        if not torch.allclose(torch.compile(function)(x), function(x), atol=1e-6):
            raise ValueError("the compiled function computes something else")
    except Exception as error:  # whatever a compiler can think of
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        text = f"torch.compile does not work: {reason}"
        text += "" if asked or device.type == "cuda" else " (this run does not use it)"
        fix = "install a C++ compiler (g++), on a GPU also Triton and Python's headers; "
        fix += "or --no-compile"
        report.add("compiler", "", text, fix, "PROBLEM" if asked else "note")
        return
    seconds = time.monotonic() - start
    report.add("compiler", f"torch.compile compiled a function in {seconds:.1f} s")


def check_memory(report: Report, run) -> bool:
    """Return whether training fits, by the estimate for it and the copy for saving."""
    if warning := summary.memory_warning(run):
        report.problem("memory", warning, "numbers stay the same with any --micro_batch_size")
        return False
    need, copy, there, where = summary.memory_needed(run)
    text = f"training needs about {words.size(need + copy)} of {where}"
    report.add("memory", text + (f", {words.size(there)} are free" if there is not None else ""))
    return True


# --- Disk, data, network --------------------------------------------------------------------------


def check_disk(report: Report, cfg, run) -> None:
    """Measure the checkpoints' disk, and compare its room with what the plan writes, if any."""
    for name in ("tensorboard_dir", "checkpoint_dir"):
        folder = host.existing(getattr(cfg, name))
        size = 4096 if name == "tensorboard_dir" else DISK_TEST_BYTES
        size = min(size, host.free_bytes(folder) // 4)
        try:
            rate = size / _write_seconds(folder, size)
        except OSError as error:
            text = f"--{name} {getattr(cfg, name)}: cannot write in {folder} ({error.strerror})"
            report.problem("disk", text, "another folder, or its permissions")
            return
    text = f"{cfg.checkpoint_dir} writes {rate / 1e6:,.0f} MB/s to the disk"
    if run is None:
        report.add("disk", text)
        return
    size = summary.checkpoint_bytes(run)
    text += f", a checkpoint of {words.size(size)} in {size / rate:.1f} s"
    long = ": longer than torchrun waits after a signal (30 s)" if size / rate > 25 else ""
    fix = "--max_hours, or a faster disk (QUICK_START.md, torchrun)"
    report.add("disk", text, long, fix)
    log_folder = Path(cfg.tensorboard_dir, cfg.run_name)
    warnings = summary.disk_warnings(run, run.checkpoint_folder, log_folder)
    for warning in warnings:
        fix = "make room, a smaller --keep_checkpoints, or another --checkpoint_dir"
        report.problem("space", warning, fix)
    if not warnings:
        kept, logs = summary.checkpoints_kept(cfg) * size, summary.log_bytes(run)
        text = f"the run writes up to {words.size(kept)} of checkpoints, {words.size(logs)} of logs"
        free = host.free_bytes(run.checkpoint_folder)
        report.add("space", f"{text}; {words.size(free)} are free for checkpoints")


def _write_seconds(folder: Path, size: int) -> float:
    """Return how long it takes to have `size` bytes that do not compress on the disk."""
    block = random.Random(0).randbytes(1 << 20)
    path = folder / f".tmp-disk-test-{os.getpid()}"
    start = time.monotonic()
    try:
        with open(path, "xb", buffering=0) as file:
            for begin in range(0, size, len(block)):
                file.write(block[: size - begin])
            os.fsync(file.fileno())
        return time.monotonic() - start
    finally:
        path.unlink(missing_ok=True)


def check_data(report: Report, run, sample_dir: str) -> None:
    """Say what the shards hold, which planning has opened and compared with their manifest; check
    their checksums where that is quick or --verify_data asks for it."""
    cfg = run.cfg
    folders = [Path(folder) for folder, _ in token_shards.parse_data_dir(cfg.data_dir)]
    splits = [token_shards.list_shards(f, split) for f in folders for split in ("train", "val")]
    size = sum(path.stat().st_size for shards in splits for path, _ in shards)
    text = (
        f"{cfg.data_dir}: {run.train_data.num_tokens:,} training tokens in {words.size(size)}, "
        f"{run.val_data.num_tokens:,} of validation"
    )
    listed = all(token_shards.read_manifest(folder) is not None for folder in folders)
    if cfg.verify_data or size < CHECKSUMS_BELOW:
        try:
            token_shards.verify(cfg.data_dir)
        except ValueError as error:
            report.problem("data", f"{text}: {error}")
            return
        text += ", checksums as in the manifest" if listed else ", no manifest to check against"
    else:
        text += ", sizes as in the manifest (checksums: --verify_data)" if listed else ""
    but, fix = "", ""
    if cfg.data_dir == sample_dir:
        free = words.size(host.free_bytes(sample_dir))
        but = f". A sample to try the program with: FineWeb-Edu takes 20 GB, {free} are free"
        fix = "python src/prepare_data.py, or --data_dir"
    elif cfg.max_steps * cfg.total_batch_size > 20 * run.train_data.num_tokens:
        but = ": the plan sees them more than 20 times"
        fix = "a smaller --epochs or --max_steps, or more data"
    report.add("data", text, but, fix)


def check_hellaswag(report: Report, run) -> None:
    path = run.cfg.hellaswag_file
    if run.hellaswag_items:
        report.add("HellaSwag", f"{path}: {len(run.hellaswag_items):,} questions")
    elif run.cfg.hellaswag_freq:
        text = f"{path} is not there: training goes on without the score"
        report.note("HellaSwag", text, "python src/hellaswag.py --download (12 MB)")


def check_messages(report: Report, outside: notify.Outside) -> None:
    """Send a test message to every --notify."""
    test = notify.Message("training", "test", "A test: this is how the run will speak to you.")
    for name, send in outside.targets:
        try:
            send(test)
            report.add("notify", f"{name} took a test message: did it arrive?")
        except Exception as error:  # whatever a service, or its library, can think of
            text = f"--notify {name}: the test message was not taken ({type(error).__name__})"
            report.problem("notify", text, "the address, and the network from here")


def check_ports(report: Report) -> None:
    taken = False
    for port, (whose, fix) in PORTS.items():
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            taken = True
            report.note("ports", f"{port}, {whose}, is taken", fix)
    if not taken:
        names = " and ".join(f"{port} ({whose})" for port, (whose, _) in PORTS.items())
        report.add("ports", f"{names} are free")


# --- How long it will take ------------------------------------------------------------------------


def check_speed(report: Report, program: Program, run) -> None:
    """Measure training steps; say what the plan takes and, with GPT-2 124M, the reference run."""
    cfg, speed = run.cfg, measure(report, program, run)
    if speed is None:
        return
    report_duration(report, "this plan", run, *speed)
    shape = {name: getattr(cfg, name) for name in ("n_layer", "n_embd", "seq_len")}
    if shape.items() <= program.reference.items():
        cfg.max_steps = REFERENCE_STEPS
        cfg.total_batch_size = program.reference["total_batch_size"]
        report_duration(report, "reference", run, *speed)


def measure(report: Report, program: Program, run) -> tuple[float, float] | None:
    """Measure and report tokens/s without evaluation, logging and saving. Return them and the watts
    meanwhile (0 if nothing says), or None where a step fails."""
    cfg, device = run.cfg, run.dist.device
    torch.set_float32_matmul_precision("highest" if run.dtype == torch.float32 else "high")
    torch.manual_seed(cfg.seed)
    try:
        with device:
            run.model, run.optimizer = program.new_model(cfg)
            ids = torch.randint(tokenizer.VOCAB_SIZE, (cfg.micro_batch_size, cfg.seq_len + 1))
        run.loss_scale = LossScale(run.dtype, device)
        if cfg.compile is None:
            cfg.compile = device.type == "cuda"
        train_model = program.prepare_pass(run, None)

        def micro_batch():
            program.forward_backward(run, train_model, ids, lambda waiting=False: None)

        def update():
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()

        for work in (micro_batch, update):  # memory is allocated, kernels are chosen
            work()
        meter, start = energy.EnergyMeter(device, every=0.25), time.monotonic()
        seconds = _seconds(micro_batch, device)
        watts = meter.take() / (time.monotonic() - start)
        meter.close()
        seconds *= cfg.total_batch_size // (cfg.seq_len * len(ids))
        seconds += _seconds(update, device)
    except RuntimeError as error:  # most of all: out of memory
        reason = str(error).splitlines()[0][:200]
        report.problem("speed", f"a training step failed: {reason}", "--micro_batch_size 1")
        return None
    finally:
        run.model = run.optimizer = None
    rate = cfg.total_batch_size / seconds
    text = (
        f"{cfg.model} ({cfg.n_layer} layers, width {cfg.n_embd}, context {cfg.seq_len}): "
        f"{rate:,.0f} tokens/s in {cfg.dtype}, measured with {len(ids)} sequence(s) a pass"
    )
    report.add("speed", text)
    return rate, watts


def _seconds(work, device: torch.device) -> float:
    """Return the median time of a call, of as many as fit into MEASURE_SECONDS, at least one."""
    times = []
    while not times or (sum(times) < MEASURE_SECONDS and len(times) < 50):
        machine.wait_for(device)
        start = time.monotonic()
        work()
        machine.wait_for(device)
        times.append(time.monotonic() - start)
    return statistics.median(times)


def report_duration(report: Report, name: str, run, rate: float, watts: float) -> None:
    """Say what time and energy a run takes at `rate` tokens per second and `watts`."""
    cfg = run.cfg
    seconds = cfg.max_steps * cfg.total_batch_size / rate
    text = f"{cfg.max_steps:,} steps of {cfg.total_batch_size:,} tokens: {words.duration(seconds)} "
    text += "without evaluation and saving"
    if run.dist.device.type == "cuda":
        text += f", {seconds / 3600:,.1f} GPU-hours"
        if (gpus := torch.cuda.device_count()) > 1:
            text += f"; on {gpus} GPUs at best {words.duration(seconds / gpus)}"
    if watts:
        text += f", {watts * seconds / 3.6e6:,.1f} kWh at the measured {watts:,.0f} W"
    too_long = ": this machine is not made for it" if seconds > LONG_SECONDS else ""
    report.add(name, text, too_long, "a GPU, or a smaller --model")
