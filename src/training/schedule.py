"""The learning rate: a pure function of the step, of which nothing needs saving."""

import math


def learning_rate(step: int, cfg) -> float:
    """Return the rate of update `step` (from 1): linear from 0 to max_lr, then down to min_lr.

    By --schedule: cosine half a period, linear a straight line, wsd (warm-up, stable, decay) a
    straight line in the last --decay_share of the run.
    """
    if cfg.schedule == "wsd":  # the lower of two ramps: before the decay the length plays no part
        rise = min(1.0, step / max(1, cfg.warmup_steps))
        fall = min(1.0, (cfg.max_steps - step) / (cfg.decay_share * cfg.max_steps))
        return min(rise * cfg.max_lr, cfg.min_lr + fall * (cfg.max_lr - cfg.min_lr))
    if step <= cfg.warmup_steps:
        return cfg.max_lr * step / cfg.warmup_steps
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    if cfg.schedule == "linear":
        share = 1 - progress
    else:
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min_lr + share * (cfg.max_lr - cfg.min_lr)


def last_stable_step(cfg) -> int | None:
    """Return the step of a wsd run from which it can be extended or branched off; else None."""
    if cfg.schedule != "wsd":
        return None
    return math.floor(cfg.max_steps - cfg.decay_share * cfg.max_steps + 1e-6)
