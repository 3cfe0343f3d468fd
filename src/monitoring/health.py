"""Warnings about a run's health, from numbers that the training loop has on the host anyway.

    run_health = Health(run, "host, device")
    for check, text in run_health.step(loss, norm, bad, lr, seconds, norms): ...  # one update
    for check, text in run_health.evaluation(validation_loss, hellaswag): ...

A warning is said once when it begins and once when it is over. Between its two thresholds a warning
that is on stays on and one that is off stays off, so that noise does not switch it. What is
remembered is in the train state as plain values, and so in every checkpoint: a resumed run says
what an uninterrupted one would have said.

`run` is train_improved.Run. Sections: Checks · Update-to-weight ratio · Health
"""

import math
import re
import statistics
from dataclasses import dataclass

import torch

from training import sharding

# --- Checks ---------------------------------------------------------------------------------------
# The one table of warnings. TENSORBOARD_GUIDE.md has the same rows in the same words (a test
# compares them).

CHECK_EVERY = 100  # steps between checks; the median of so many stands for a loss or a step time
CLIPPED_OVER = 300  # updates
SLOW_OVER = 3  # checks
HELLASWAG_OVER = 4  # scores
MARKS = 64  # losses remembered of the whole run, evenly spaced
SETTLE_SECONDS = 600.0  # of training until clocks and fans have settled
HELLASWAG_TOKENS = 5e9  # GPT-2 124M is above chance by then, by far
LEAST_RATE = 0.01  # of --max_lr: below that a schedule wants layers to stand still


@dataclass(frozen=True)
class Check:
    """Says when a warning begins and ends: it is about high values where `begin` is above `end`,
    else about low ones."""

    name: str
    compared: str  # what the value is
    over: str  # over how many steps, how often, from when on
    begin: float
    end: float
    shown: str  # how a value is written
    advice: str
    timed: bool = False  # depends on the clock: differs between two otherwise equal runs

    @property
    def begins(self) -> str:
        return f"{'above' if self.begin > self.end else 'below'} {self.shown.format(self.begin)}"

    @property
    def ends(self) -> str:
        return f"{'below' if self.begin > self.end else 'above'} {self.shown.format(self.end)}"


CHECKS = {
    # 0.3 nats: the validation text is 1.35 times as surprising per token. Repeating FineWeb-Edu
    # five times stays far below; while the loss falls fast the median lags, which makes it smaller.
    "overfitting": Check(
        "validation far above train",
        "validation loss minus training loss",
        "each evaluation from the second epoch on; training loss: median of the last "
        f"{CHECK_EVERY} steps",
        begin=0.3,
        end=0.2,
        shown="{:.2f} nats",
        advice="The model learns its training text by heart: more data, fewer `--epochs`, or a "
        "smaller model; the best checkpoint is kept. Above in the first epoch too: the validation "
        "text is of another kind.",
    ),
    # A loss curve falls by about as much for every doubling of the steps, so that a share of the
    # run so far suits 600 steps as well as 95,365; a fixed number of steps would suit only one.
    "flat": Check(
        "loss flat",
        "fall of the training loss in the last third of the steps so far",
        f"every {CHECK_EVERY} steps after warm-up, from step {3 * CHECK_EVERY} on; medians of "
        f"{CHECK_EVERY} steps",
        begin=0.01,
        end=0.02,
        shown="{:.3f} nats",
        advice="Below 0: lower `--max_lr`. Near 10.8: the rate is far too small, or the data is "
        "noise. Late in a run: more steps bring little.",
    ),
    # While the rate rises it is normal that most updates are clipped.
    "clipped": Check(
        "gradient clipped nearly always",
        "share of updates whose gradient norm was above `--grad_clip`",
        f"every {CHECK_EVERY} steps; the last {CLIPPED_OVER} updates, all after warm-up",
        begin=0.95,
        end=0.80,
        shown="{:.0%}",
        advice="The clip, not the gradient, sets the length of each update: lower `--max_lr`, or "
        "raise `--grad_clip` if the loss falls well.",
    ),
    "slow": Check(
        "throughput dropping",
        "speed as a share of the best on this machine",
        f"every {CHECK_EVERY} steps; median of {SLOW_OVER * CHECK_EVERY} steps, without the first "
        f"{SETTLE_SECONDS / 60:.0f} minutes on a machine",
        begin=0.80,
        end=0.90,
        shown="{:.0%}",
        advice="Another program, heat, or a slow disk: look at `top` and `nvidia-smi`.",
        timed=True,
    ),
    # All take the same time for a step: what counts is how long each works until it has to wait.
    "lagging": Check(
        "one process lags",
        "seconds of a step that the slowest process works by itself, as a multiple of the others'",
        f"every {CHECK_EVERY} steps; each process' median of {CHECK_EVERY} steps, compared with "
        "the median of the others",
        begin=1.25,
        end=1.15,
        shown="{:.2f}",
        advice="All wait for it. Look at that machine's `nvidia-smi` (heat, a power limit, another "
        "program), its `top` and its disk; leave it out if it stays.",
        timed=True,
    ),
    # In standard errors, so that it suits 1,000 items as well as all 10,042 (where one is 0.0043).
    "hellaswag": Check(
        "HellaSwag flat",
        "accuracy above chance (0.25), in standard errors",
        f"each score from {HELLASWAG_TOKENS / 1e9:.0f} billion tokens on; mean of the last "
        f"{HELLASWAG_OVER} scores",
        begin=2.0,
        end=3.0,
        shown="{:.1f}",
        advice="The model understands no more than chance does: is the data English text? A model "
        "much smaller than 124M stays there.",
    ),
    # AdamW moves a weight by up to the rate, and weights are some hundredths: healthy is 1e-4 and
    # more, also in the first steps of warm-up. An update below 3e-8 does not change a float32.
    "frozen": Check(
        "layers not updating",
        "update-to-weight ratio of the slowest matrix",
        f"every {CHECK_EVERY} steps; the higher of the last two, while the rate is at least "
        f"{LEAST_RATE:.0%} of `--max_lr`",
        begin=1e-6,
        end=2e-6,
        shown="{:.1e}",
        advice="One matrix: no gradient reaches it. All of them: `--max_lr` is far too small.",
    ),
}


def check_due(step: int) -> bool:
    return step > 0 and step % CHECK_EVERY == 0


# --- Update-to-weight ratio -----------------------------------------------------------------------


class UpdateNorms:
    """Measures how long an update is beside its weights. Made just before optimizer.step(), at a
    check only: it copies all the weights (the activations that were there are gone by then)."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        """Take weight decay off beforehand: a layer that no gradient reaches still decays."""
        decay = {
            id(p): 1 - group["lr"] * group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        params = list(model.parameters())
        self.sharded = sharding.is_sharded(model)  # then all processes measure
        self.params = [sharding.local(p.detach()) for p in params]
        factors = [decay.get(id(p), 1.0) for p in params]
        self.kept = torch._foreach_mul(self.params, factors)

    def measure(self) -> torch.Tensor:
        """Return norms of all updates, then of all weights: (2 * parameters,) float32, not waited
        for."""
        torch._foreach_sub_(self.kept, self.params)
        norms = [*torch._foreach_norm(self.kept), *torch._foreach_norm(self.params)]
        self.kept = None
        norms = torch.stack(norms).float()
        if self.sharded:
            norms = norms.square()
            torch.distributed.all_reduce(norms)
            norms = norms.sqrt()
        return norms


def layer_of(parameter: str) -> str:
    """Return h03 for transformer.h.3.mlp.c_fc.weight, wte for transformer.wte.weight."""
    block = re.match(r"transformer\.h\.(\d+)\.", parameter)
    return f"h{int(block[1]):02d}" if block else parameter.split(".")[1]


# --- Health ---------------------------------------------------------------------------------------


def new_memory() -> dict:
    """Return what the checks remember: the first TrainState.health_memory."""
    return {
        "active": {},  # key of a check -> step at which it began
        "losses": [],  # of the last CHECK_EVERY steps
        "marks": [],  # [step, median loss] over the whole run
        "clipped": [],  # of the last CLIPPED_OVER updates after warm-up, 0 or 1
        "ratios": [],  # of the slowest matrix at the last two checks
        "accuracies": [],  # the last HELLASWAG_OVER HellaSwag scores
    }


def new_time_memory(machine: str = "") -> dict:
    """Return the same for the check that depends on the clock: TrainState.health_seconds."""
    return {
        "active": {},
        "machine": machine,  # the times below are from there
        "settling": 0.0,  # seconds of training on it, up to SETTLE_SECONDS
        "steps": [],  # seconds of each of the last CHECK_EVERY steps
        "looks": [],  # their medians at the last SLOW_OVER checks
        "best": math.inf,  # the lowest median of those
    }


class Health:
    """Judges every update and evaluation of a run; what it remembers is in run.state."""

    def __init__(self, run, machine: str):
        """machine: what step times depend on. On another one they are compared anew."""
        self.run = run
        times = run.state.health_seconds
        if times["machine"] != machine:
            run.state.health_seconds = new_time_memory(machine) | {"active": times["active"]}
        self.names = [name for name, _ in run.model.named_parameters()]
        self.matrices = [p.dim() >= 2 for p in run.model.parameters()]

    def active(self, timed: bool) -> int:
        """Return how many warnings are on."""
        return len(self._memory(timed)["active"])

    def _memory(self, timed: bool) -> dict:
        return self.run.state.health_seconds if timed else self.run.state.health_memory

    def step(
        self, loss: float, norm: float, bad: bool, lr: float, seconds: float, norms: list[float]
    ) -> list[tuple[Check, str]]:
        """Take update run.state.step into account -> what to say. norms: UpdateNorms at a check."""
        state, cfg = self.run.state, self.run.cfg
        memory, times = state.health_memory, state.health_seconds
        if math.isfinite(loss):
            memory["losses"] = [*memory["losses"], loss][-CHECK_EVERY:]
        if state.step > cfg.warmup_steps and not bad:
            memory["clipped"] = [*memory["clipped"], int(norm > cfg.grad_clip)][-CLIPPED_OVER:]
        if times["settling"] < SETTLE_SECONDS:
            times["settling"] += seconds
        else:
            times["steps"] = [*times["steps"], seconds][-CHECK_EVERY:]
        if not check_due(state.step):
            return []

        said = self._loss_flat()
        if cfg.grad_clip and len(memory["clipped"]) == CLIPPED_OVER:
            said += self._judge("clipped", sum(memory["clipped"]) / CLIPPED_OVER)
        if len(times["steps"]) == CHECK_EVERY:
            times["looks"] = [*times["looks"], statistics.median(times["steps"])][-SLOW_OVER:]
        if len(times["looks"]) == SLOW_OVER:
            typical = statistics.median(times["looks"])
            times["best"] = min(times["best"], typical)
            said += self._judge("slow", times["best"] / typical)
        if norms and not bad and lr >= LEAST_RATE * cfg.max_lr:
            ratio, slowest = min(self._matrix_ratios(norms))
            memory["ratios"] = [*memory["ratios"], ratio][-2:]
            if len(memory["ratios"]) == 2:
                said += self._judge("frozen", max(memory["ratios"]), slowest)
        return said

    def evaluation(
        self, validation_loss: float | None, hellaswag: float | None
    ) -> list[tuple[Check, str]]:
        """Take an evaluation after run.state.step into account; None: was not due."""
        state = self.run.state
        memory, said = state.health_memory, []
        again = state.position >= self.run.train_data.num_windows  # before that nothing is repeated
        if validation_loss is not None and again and len(memory["losses"]) == CHECK_EVERY:
            gap = validation_loss - statistics.median(memory["losses"])
            said += self._judge("overfitting", gap)
        if hellaswag is not None and state.tokens >= HELLASWAG_TOKENS:
            memory["accuracies"] = [*memory["accuracies"], hellaswag][-HELLASWAG_OVER:]
            if len(memory["accuracies"]) == HELLASWAG_OVER:
                error = math.sqrt(0.25 * 0.75 / len(self.run.hellaswag_items))
                mean = statistics.mean(memory["accuracies"])
                said += self._judge("hellaswag", (mean - 0.25) / error)
        return said

    def compare(self, work: dict[str, float]) -> list[tuple[Check, str]]:
        """Take into account how many seconds each process works by itself in a step, by name."""
        if len(work) < 2:
            return []
        slowest = max(work, key=work.get)
        others = statistics.median(seconds for name, seconds in work.items() if name != slowest)
        detail = f"{slowest}: {1000 * work[slowest]:.3g} ms beside {1000 * others:.3g} ms"
        return self._judge("lagging", work[slowest] / others, detail)

    def layer_ratios(self, norms: list[float]) -> dict[str, float]:
        """Return the update-to-weight ratio of each layer, all its parameters together."""
        squares: dict[str, list[float]] = {}
        for name, update, weight in self._by_name(norms):
            sums = squares.setdefault(layer_of(name), [0.0, 0.0])
            sums[0] += update**2
            sums[1] += weight**2
        return {layer: math.sqrt(u / w) for layer, (u, w) in squares.items() if w > 0}

    def _by_name(self, norms: list[float]):
        half = len(norms) // 2
        return zip(self.names, norms[:half], norms[half:], strict=True)

    def _matrix_ratios(self, norms: list[float]) -> list[tuple[float, str]]:
        """Return (ratio, name) of the matrices: biases start at 0, and that of the keys has no
        gradient at all."""
        rows = zip(self.matrices, self._by_name(norms), strict=True)
        return [(u / w if w else 0.0, name) for matrix, (name, u, w) in rows if matrix]

    def _loss_flat(self) -> list[tuple[Check, str]]:
        """Compare the loss with what it was at two thirds of the steps, from marks on the way:
        MARKS / 2 to MARKS of them, further apart the longer the run is."""
        state, memory, said = self.run.state, self.run.state.health_memory, []
        if len(memory["losses"]) < CHECK_EVERY:
            return []
        now = statistics.median(memory["losses"])
        before = [loss for step, loss in memory["marks"] if 3 * step <= 2 * state.step]
        if before and state.step >= 3 * CHECK_EVERY and state.step > self.run.cfg.warmup_steps:
            said = self._judge("flat", before[-1] - now)
        spacing = CHECK_EVERY
        while state.step > MARKS * spacing:
            spacing *= 2
        marks = [*memory["marks"], [state.step, now]]
        memory["marks"] = [mark for mark in marks if mark[0] % spacing == 0]
        return said

    def _judge(self, key: str, value: float, detail: str = "") -> list[tuple[Check, str]]:
        check, state = CHECKS[key], self.run.state
        active = self._memory(check.timed)["active"]
        sign = 1 if check.begin > check.end else -1  # NaN begins and ends nothing
        found = f"{check.name}: {check.compared} = {check.shown.format(value)}"
        found += f" ({detail})" if detail else ""
        if key not in active and sign * value > sign * check.begin:
            active[key] = state.step
            story = f"{found}; begins {check.begins}, ends {check.ends}. {check.advice}"
            return [(check, f"WARNING step {state.step}: {story.replace('`', '')}")]
        if key in active and sign * value < sign * check.end:
            story = f"over, since step {active.pop(key)}: {found}"
            return [(check, f"step {state.step:>5}: {story.replace('`', '')}")]
        return []
