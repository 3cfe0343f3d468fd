"""What PyTorch does in a step: a trace of three early ones, and compilations that come late."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

WAIT, WARMUP, ACTIVE = 2, 1, 3  # steps of --profile: not looked at, warming up, in the trace


class StepWatch:
    """Looks at every step of this command; `step` is called after each, `close` after the last.

    With `traces`, a folder, the steps 4 to 6 are written there as a trace for Perfetto
    (https://ui.perfetto.dev) or TensorBoard's profile plugin. With `compiled`, each graph that
    torch.compile makes after the first step is announced: it costs tens of seconds.
    """

    def __init__(self, traces: Path | None, compiled: bool, announce: Callable[[str], None]):
        self._traces, self._compiled, self._announce = traces, compiled, announce
        self._graphs: int | None = None  # until the first step is done
        self._written = traces is None
        self._profiler = None
        if traces is not None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            schedule = torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
            self._profiler = torch.profiler.profile(
                activities=activities,
                schedule=schedule,
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profiler.start()

    def step(self, number: int) -> None:
        """Take note that step `number` is done."""
        if self._profiler is not None:
            self._profiler.step()
            if self._written:
                self._profiler = None  # a profiler that waits for nothing still costs each step
        if self._compiled:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            if self._graphs not in (None, graphs):
                self._announce(f"WARNING step {number}: torch.compile compiled again")
            self._graphs = graphs

    def close(self) -> None:
        """Write the trace of a command that had fewer steps, or say that there is none."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
        if not self._written:
            self._announce(
                f"--profile: no trace, it needs at least {WAIT + WARMUP + 1} steps of one command"
            )

    def _write(self, profile) -> None:
        path = self._traces / f"trace_{os.getpid()}.pt.trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        self._written = True
        self._announce(f"--profile: {path}")
