"""Slurm's environment in torchrun's words, so that srun alone starts the processes of a run.

srun --ntasks-per-node=4 --gpus-per-node=4 python src/train_improved.py ...
"""

import os
import re
import shutil
import sys
from pathlib import Path

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
COUNTS = (*TORCHRUN, "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
OWN_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # "True": asked for its store, even by one process
SHARE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
VARIABLES = (*COUNTS, "MASTER_ADDR", "MASTER_PORT", OWN_STORE)
# From here on: steps that are no parallel program, the batch script or an interactive shell.
SPECIAL_STEPS = 0xFFFFFFF0
PORTS = range(15_000, 30_000)  # below those that the system hands out by itself


def adopt_slurm(env) -> None:
    """Set torchrun's variables in `env` (os.environ) from Slurm's, and say so on stderr.

    Nothing is set unless this process is one of several tasks of an srun step and nobody has set
    them: torchrun inside a Slurm job stays in charge, and so does a script that exports RANK and
    the like itself. MASTER_ADDR and MASTER_PORT are kept where they are given. Raise ValueError if
    what Slurm says does not fit together.
    """
    step = env.get("SLURM_STEP_ID", "")
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or "1"
    if any(env.get(name) for name in TORCHRUN) or not step.isdecimal():
        return
    if not tasks.isdecimal():
        raise ValueError(f"SLURM_NTASKS={tasks}: is no number; start with srun, or unset it")
    if int(step) >= SPECIAL_STEPS or int(tasks) < 2:
        return
    if _is_typed_into_a_shell(env):
        print(
            f"this shell is in a Slurm step of {tasks} tasks, but is none of them: one process "
            "trains; srun python src/train_improved.py starts one for each task",
            file=sys.stderr,
        )
        return
    try:
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        rank, local_rank, job = (
            int(env[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"this is a Slurm step of {tasks} tasks, but {error} in its environment: start it "
            "with srun, or with torchrun"
        ) from None
    # Under --gpus-per-task each process sees its own GPU only, and that is number 0.
    if re.fullmatch("[^,]+", env.get("CUDA_VISIBLE_DEVICES", "")):
        local_rank = 0
    env.update({"RANK": str(rank), "WORLD_SIZE": tasks, "LOCAL_RANK": str(local_rank)})
    if here := tasks_of_this_node(env):
        env["LOCAL_WORLD_SIZE"] = str(here)
    env.setdefault("MASTER_ADDR", first_host(nodes))
    # The same in all processes, another one for the next job, and for the next step of this job.
    env.setdefault("MASTER_PORT", str(PORTS[(16 * job + int(step)) % len(PORTS)]))
    if rank == 0:
        address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        print(f"Slurm step {job}.{step}: {tasks} processes, meeting at {address}", file=sys.stderr)


def _is_typed_into_a_shell(env) -> bool:
    """Return whether `srun --pty bash` started the shell that started this process: what is typed
    there inherits the variables of a task."""
    try:
        with open(f"/proc/{os.getppid()}/comm") as file:
            if file.read().startswith("slurmstepd"):
                return False
    except OSError:
        pass  # not Linux
    return "SLURM_PTY_PORT" in env or (sys.stdin is not None and sys.stdin.isatty())


def tasks_of_this_node(env) -> int | None:
    """Return how many tasks of the step run on this node, from Slurm's "4(x2),3"; None: unknown."""
    counts = []
    layout = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", layout):
        counts += [int(count)] * int(times or 1)
    node = env.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def check_environment(env) -> None:
    """Raise ValueError for launcher's variables that do not fit together: a sentence instead of a
    wait for processes that never come. Empty ones count as not set, and are removed."""
    for name in VARIABLES:
        if not env.get(name, "x"):
            del env[name]
    unset = f"; start with torchrun, or unset {' '.join(VARIABLES)}"
    numbers = {name: env[name] for name in COUNTS if name in env}
    for name, value in numbers.items():
        if not value.isdecimal():
            raise ValueError(f"{name}={value} in the environment is no number{unset}")
    world_size = int(numbers.get("WORLD_SIZE", 1))
    for name in ("RANK", "LOCAL_RANK"):
        if int(numbers.get(name, 0)) >= world_size:
            raise ValueError(
                f"{name}={numbers[name]} in the environment, with WORLD_SIZE "
                f"{numbers.get('WORLD_SIZE', 'not set')}, is left over from another start{unset}"
            )
    torchrun = env.get(OWN_STORE) == "True"
    if world_size == 1 and not torchrun:
        return
    told = f"{OWN_STORE}=True" if torchrun else f"WORLD_SIZE={world_size}"
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            raise ValueError(f"{told} in the environment, but no {name}{unset}")
    if not (env["MASTER_PORT"].isdecimal() and 0 < int(env["MASTER_PORT"]) < 65_536):
        raise ValueError(f"MASTER_PORT={env['MASTER_PORT']} is no port from 1 to 65535{unset}")


def first_host(nodes: str) -> str:
    """Return the first name of Slurm's node list: "node[003-007,9],login1" -> "node003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\]]*)\]", lambda ranges: re.split("[-,]", ranges[1])[0], first)


def start_words(env) -> list[str]:
    """Return what started this process, up to the script's name, as it can be typed again."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    if "TORCHELASTIC_RUN_ID" not in env:
        several = int(env.get("WORLD_SIZE", 1)) > 1 and "SLURM_STEP_ID" in env
        return ["srun", python] if several else [python]
    nodes, processes = env.get("GROUP_WORLD_SIZE", "1"), env.get("LOCAL_WORLD_SIZE", "1")
    torchrun = [python, "-m", "torch.distributed.run"]
    if shutil.which("torchrun"):
        torchrun = ["torchrun"]
    typed = _typed_to_torchrun()
    if any(word.startswith(("--nnodes", "--rdzv", "--master")) for word in typed):
        return [*torchrun, *typed]
    if nodes == "1":
        return [*torchrun, "--standalone", f"--nproc_per_node={processes}"]
    meeting = f"--rdzv_endpoint={env.get('MASTER_ADDR')}:{PORTS[0]}"
    nodes = [f"--nnodes={nodes}", f"--nproc_per_node={processes}"]
    return [*torchrun, *nodes, "--rdzv_backend=c10d", meeting]


def what_elastic_needs(env) -> str:
    """Return what torchrun wants to be told beside --nnodes=MIN:MAX, in a sentence; "" if nothing.

    PyTorch 2.13 tells a machine that joins later the address of a store that is gone, unless its
    machines share none; then only the name of the job says which run a restart goes on with. One
    whose link is back after a time-out of torchrun's closes the rendezvous, for good and for all.
    """
    typed = " ".join(_typed_to_torchrun())
    nodes = re.search(r"--nnodes[= ](\d+):(\d+)", typed)
    if nodes is None or nodes[1] == nodes[2]:
        return ""
    wanted = [] if env.get(SHARE) == "1" else [f"export {SHARE}=1 before torchrun"]
    wanted += ["--rdzv_id=NAME"] if env.get("TORCHELASTIC_RUN_ID") == "none" else []
    wanted += [] if "read_timeout=" in typed else ["--rdzv_conf=read_timeout=1200"]
    needs = f"torchrun {nodes[0]} takes machines back only with {' and '.join(wanted)}"
    return f"{needs}, on all of them: see docs/SEVERAL_MACHINES.md" if wanted else ""


def _typed_to_torchrun() -> list[str]:
    """Return torchrun's own options, as the process above this one has them; [] if none can be
    read. On several machines they differ, and say which one this is."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        names = [word.rsplit("/", 1)[-1] for word in words]
        torchrun = "torchrun" if "torchrun" in names else "torch.distributed.run"
        script = next(i for i, name in enumerate(names) if name.endswith(".py"))
        return words[names.index(torchrun) + 1 : script]
    except (OSError, ValueError, StopIteration):  # not Linux, or another launcher
        return []
