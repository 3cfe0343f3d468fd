"""Slurm's environment in torchrun's words, so that srun alone starts the processes of a run.

srun --ntasks-per-node=4 --gpus-per-node=4 python src/train_improved.py ...
"""

import os
import re
import shlex
import sys
from pathlib import Path

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# From here on: steps that are no parallel program, the batch script or an interactive shell.
SPECIAL_STEPS = 0xFFFFFFF0
PORTS = range(15_000, 30_000)  # below those that the system hands out by itself


def adopt_slurm(env) -> None:
    """Set torchrun's variables in `env` (os.environ) from Slurm's, and say so on stderr.

    Nothing is set unless this process is one of several tasks of an srun step and nobody has set
    them: torchrun inside a Slurm job stays in charge, and so does a script that exports RANK and
    the like itself. MASTER_ADDR and MASTER_PORT are kept where they are given.
    """
    step = env.get("SLURM_STEP_ID", "")
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if any(name in env for name in TORCHRUN) or not (step.isdecimal() and tasks.isdecimal()):
        return
    if int(step) >= SPECIAL_STEPS or int(tasks) < 2:
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
    env.setdefault("MASTER_ADDR", first_host(nodes))
    # The same in all processes, another one for the next job, and for the next step of this job.
    env.setdefault("MASTER_PORT", str(PORTS[(16 * job + int(step)) % len(PORTS)]))
    if rank == 0:
        address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        print(f"Slurm step {job}.{step}: {tasks} processes, meeting at {address}", file=sys.stderr)


def first_host(nodes: str) -> str:
    """The first name of Slurm's node list: "node[003-007,9],login1" -> "node003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\]]*)\]", lambda ranges: re.split("[-,]", ranges[1])[0], first)


def starter() -> str:
    """The words before the script's name in the command that started this process, to be printed in
    others: "python", or torchrun with its options as the process above this one has them."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        options = [f"--nproc_per_node={env.get('LOCAL_WORLD_SIZE', 1)}"]
        try:
            words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
            names = [word.rsplit("/", 1)[-1] for word in words]
            torchrun = "torchrun" if "torchrun" in names else "torch.distributed.run"
            script = next(i for i, name in enumerate(names) if name.endswith(".py"))
            options = words[names.index(torchrun) + 1 : script]
        except (OSError, ValueError, StopIteration):  # no Linux, or a launcher of one's own
            pass
        return shlex.join(["torchrun", *options])
    if "SLURM_PROCID" in env and int(env.get("WORLD_SIZE", 1)) > 1:
        return f"srun --ntasks={env['WORLD_SIZE']} python"
    return "python"
