"""Cut, kill, stop and bring back machines of a run at random; compare with a run left alone.

    python tests/cut_nodes.py --seed 1 --events 10
    python tests/cut_nodes.py --seed 2 --events 10 --shard --nodes 3

Needs root: the machines are network namespaces (nodes.py) that share one disk. An event is drawn
from the seed: kill -9 of a worker, of a whole machine (it types its command again later), SIGSTOP
of a worker, a link that is down for seconds, or until the others went on. What must be true:

  * the run reaches its last step with who is there, whatever happened, without a flag;
  * its timeline has every step once, and the same losses as a run that nothing disturbed;
  * every checkpoint is whole, and after a cut no two processes were writing at a time.

Machine 1 has torchrun's rendezvous and is only ever cut for seconds or loses its worker: without it
the others end (docs/SEVERAL_MACHINES.md). Ends with 1 and the folder, kept, if something is wrong.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from checkpointing import files, run_folders
from conftest import run, write_data
from nodes import FLAGS, Nodes
from test_training import logged

SILENCE = 10  # --hang_timeout, seconds; heartbeats are due within the same
GIVEN_UP = 75  # seconds: longer than a read of torchrun's store lasts without read_timeout


def losses(folder: Path) -> dict[int, float]:
    values = logged(folder / "runs" / "a")["Loss/train"]
    assert len(values) == len({step for step, _ in values}), "a step is there twice"
    return dict(values)


def disturb(nodes: Nodes, rng: random.Random, restart) -> str:
    """Let one thing happen to one machine, and undo what a person would undo."""
    nodes.wait_for(lambda: any(nodes.workers(i) for i in nodes.processes))
    i = rng.choice([i for i in sorted(nodes.processes) if nodes.workers(i)])
    kind = rng.choice(["worker", "short cut", *(["machine", "cut", "stop"] if i > 1 else [])])
    workers = nodes.workers(i)
    if kind == "worker":
        os.kill(workers[0], signal.SIGKILL)
    elif kind == "stop":
        os.kill(workers[0], signal.SIGSTOP)
    elif kind == "machine":
        for pid in (nodes.processes[i].pid, *workers):
            os.kill(pid, signal.SIGKILL)
        nodes.processes[i].wait()
        time.sleep(rng.uniform(0, 60))
        restart(i)
    else:
        nodes.cut(i)
        time.sleep(rng.uniform(1, 0.7 * SILENCE) if kind == "short cut" else GIVEN_UP)
        nodes.heal(i)
    return f"{kind} on machine {i}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--events", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--shard", action="store_true")
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="cut_nodes_"))
    data = write_data(folder / "walk", train=400_000)
    flags = ["--data_dir", data, "--use_tensorboard", "--run_name", "a", "--checkpoint_freq", 20]
    flags += ["--max_steps", args.steps, "--max_lr", "1e-3", "--hang_timeout", SILENCE]
    run(*FLAGS, *flags, cwd=folder, timeout=3600)
    flags += ["--shard"] if args.shard else []
    nodes = Nodes(folder / "nodes", args.nodes, shared=True)

    def start(i: int) -> None:
        nodes.start(i, *flags, nnodes=f"1:{args.nodes}", restarts=100)

    try:
        for i in range(1, args.nodes + 1):
            start(i)
        for number in range(args.events):
            came_to = (number + 1) * args.steps // (args.events + 1)
            nodes.wait_for_step(came_to, limit=600)
            time.sleep(rng.uniform(0, 3))
            happened = disturb(nodes, rng, start)
            print(f"{number + 1}: after step {came_to:,}, {happened}", flush=True)
        nodes.wait_for(lambda: nodes.processes[1].poll() is not None, limit=900)
        assert nodes.processes[1].returncode == 0, "machine 1 did not finish"
        ours, alone = losses(nodes.local), losses(folder)
        assert ours.keys() == alone.keys(), set(alone) ^ set(ours)
        worst = max(abs(ours[step] - alone[step]) for step in alone)
        assert worst < 0.01, f"losses differ by up to {worst:.2g}"
        for info in run_folders.list_checkpoints(nodes.local / "ck" / "a"):
            files.verify(info.path)
        print(f"{args.steps:,} steps once each; losses within {worst:.1e} of an undisturbed run")
    except AssertionError as wrong:
        print(f"WRONG: {wrong}\n(--seed {args.seed}; everything is in {folder})")
        return 1
    finally:
        nodes.close()
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
