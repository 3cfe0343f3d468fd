"""What keeps one bad batch from ruining a run: the verdict on each step, an update that can be
skipped, and loss scaling."""

import math

import numpy as np
import torch


class GuardGaveUp(Exception):
    """Too many skipped updates, also after going back; the message explains."""


class Guard:
    """Judges losses: which updates are skipped, what is reported, when to go back.

    A non-finite loss or gradient norm is always skipped, on the device, before it touches the
    weights. A loss more than `sigmas` standard deviations above the mean of the last WINDOW
    accepted losses is a spike: reported, and skipped with `skip_spikes`. Outliers and skipped
    losses never enter the window. The memory (`recent_losses`, `consecutive_skips`,
    `skipped_updates`) belongs to the train state, so that it is in the checkpoint.
    """

    WINDOW = 128

    def __init__(self, state, sigmas: float, skip_spikes: bool):
        self.state, self.sigmas, self.skip_spikes = state, sigmas, skip_spikes

    def limit(self) -> float:
        """Return the loss above which the next step is a spike; inf until the window is full."""
        losses = self.state.recent_losses
        if len(losses) < self.WINDOW:
            return math.inf
        return float(np.mean(losses) + self.sigmas * np.std(losses))

    def is_bad(self, loss, grad_norm, limit: float) -> torch.Tensor:
        """Return the verdict on a step as a bool tensor (), without waiting for the device."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        return bad | (loss > limit) if self.skip_spikes else bad

    def observe(self, loss: float, bad: bool, limit: float) -> str | None:
        """Take a finished step into account; return what to report, or None."""
        state = self.state
        state.consecutive_skips = state.consecutive_skips + 1 if bad else 0
        state.skipped_updates += bad
        if math.isfinite(loss) and loss > limit:
            outcome = "update skipped" if bad else "update made (--skip_spikes would skip it)"
            return f"loss {loss:.4f} is a spike, above {limit:.4f}: {outcome}"
        if bad:
            return f"loss {loss:.4f} or its gradient norm is not finite: update skipped"
        state.recent_losses = [*state.recent_losses, loss][-self.WINDOW :]
        return None


class AdamW(torch.optim.AdamW):
    """Fused AdamW that leaves weights and moments alone where `found_inf` is not 0, on all devices.

    The kernels of LOOK do so by themselves. That for mps takes `found_inf` and does not look at it
    (PyTorch's FusedAdamWKernelImpl.mm), so there the host waits for the verdict.
    """

    LOOK = ("cpu", "cuda")
    found_inf: torch.Tensor | None = None  # (), on the device

    def step(self, closure=None):
        """Make one update. The first makes the moments, whatever the verdict (make_moments)."""
        bad = self.found_inf
        if bad is not None and bad.device.type not in self.LOOK and self.state and bad:
            return None
        return super().step(closure)


class LossScale:
    """Keeps float16 gradients representable: halved after an overflow, doubled after GROWTH good
    steps (Micikevicius et al. 2018). The rule of torch's GradScaler, on tensors alone, because
    here the guard decides what is skipped. For other precisions nothing is multiplied."""

    GROWTH = 2000

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.active = dtype == torch.float16
        self.scale = torch.tensor(2.0**16 if self.active else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def unscale(self, grads: list[torch.Tensor]) -> None:
        if self.active:
            torch._foreach_mul_(grads, 1 / self.scale)

    def update(self, bad: torch.Tensor) -> None:
        if self.active:
            good_steps = torch.where(bad, 0.0, self.good_steps + 1)
            grow = good_steps == self.GROWTH
            factor = torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0))
            self.scale = self.scale * factor
            self.good_steps = torch.where(grow, 0.0, good_steps)
