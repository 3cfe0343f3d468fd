"""How long each process works by itself in a step: what names the one that holds up the others.

All processes of a run take the same time for a step, since they wait for the slowest. What differs
is the time before they wait: from the beginning of a step to the end of its last forward pass where
the model is replicated (its last backward pass waits), and the forward pass of every block and the
loss where it is sharded (between them it waits). Nothing of it is sent in a step: the medians
travel with the heartbeats (runtime/peers.py).
"""

import statistics
import time
from collections import deque

import torch

from training import sharding

STEPS = 100  # in the median
LEAST = 20  # steps before there is one


class OwnWork:
    """Measures this process. On a GPU by events, read two steps later: nothing waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self.median = 0.0  # seconds; 0: not known yet
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._steps: deque[list] = deque()  # of each: pairs of times
        self._begun = None
        self._watching = False

    def watch(self, train_model: torch.nn.Module, model: torch.nn.Module) -> None:
        """Have the passes of training say when they begin and end, where there are others."""
        replicated = isinstance(train_model, torch.nn.parallel.DistributedDataParallel)
        self._watching = replicated or sharding.is_sharded(model)
        if replicated:
            train_model.register_forward_hook(self._end_for_now)
        if replicated or not self._watching:
            return
        begin, end = self._begin, self._end
        if train_model is not model:  # compiled: a graph ends before and after each block anyway
            begin, end = torch.compiler.disable(begin), torch.compiler.disable(end)
        train_model.register_forward_pre_hook(self._end, prepend=True)
        for block in model.transformer.h:  # its weights are here when these hooks run
            block.register_forward_pre_hook(begin)
            block.register_forward_hook(end)
        model.transformer.h[-1].register_forward_hook(begin)  # nor does the loss wait for others
        train_model.register_forward_hook(self._end)

    def begin_step(self) -> None:
        """Begin to measure a step, when all have ended the last one."""
        if not self._watching:
            return
        if len(self._steps) == 2:
            self._recent.append(sum(self._seconds(*pair) for pair in self._steps.popleft()))
            if len(self._recent) >= LEAST:
                self.median = statistics.median(self._recent)
        self._steps.append([])
        self._begun = self._now()

    def _begin(self, *_) -> None:
        if torch.is_grad_enabled() and self._steps:
            self._begun = self._now()

    def _end(self, *_) -> None:
        self._end_for_now()
        self._begun = None

    def _end_for_now(self, *_) -> None:
        """Note an end; of several after one beginning the last counts."""
        if torch.is_grad_enabled() and self._begun is not None:
            pairs = self._steps[-1]
            if pairs and pairs[-1][0] is self._begun:
                pairs.pop()
            pairs.append((self._begun, self._now()))

    def _now(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin, end) -> float:
        return end - begin if self.device.type == "cpu" else begin.elapsed_time(end) / 1000
