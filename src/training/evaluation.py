"""What a model is worth: validation loss, HellaSwag, samples.

All of it runs the plain model, never the compiled one, and draws from generators of its own:
training goes on with the same numbers whether or not it was evaluated. `run` is
train_improved.Run; `poll` is called often and may raise.
"""

import contextlib
from collections.abc import Callable

import numpy as np
import torch

from tokens import tokenizer
from training import scoring
from training.chunked_loss import next_token_losses
from training.generation import generate

EVAL_TOKENS = 16_384  # in a forward pass without gradients


def validation_loss(
    run, poll: Callable[[], None], reading=contextlib.nullcontext
) -> tuple[float, torch.Tensor]:
    """Return the mean loss (nats per token) of the first --val_tokens validation tokens, in fixed
    order, and the mean at each position of the context, (T,). `reading()` is entered for reads."""
    cfg, dist = run.cfg, run.dist
    num_windows = min(cfg.val_tokens // cfg.seq_len, run.val_data.num_windows)
    mine = np.arange(dist.rank, num_windows, dist.world_size)
    batch_size = max(1, EVAL_TOKENS // cfg.seq_len)
    sums = []  # on the device: the host waits for them once, at the end
    for start in range(0, len(mine), batch_size):
        poll()
        with reading():
            windows = run.val_data.windows_in_order(mine[start : start + batch_size])
        batch = scoring.to_device(windows.astype(np.int64), dist.device)
        with torch.inference_mode(), run.autocast():
            x_NC = run.model.features(batch[:, :-1]).view(-1, cfg.n_embd)
            targets = batch[:, 1:].reshape(-1)
            losses_N = next_token_losses(x_NC, run.model.lm_head.weight, targets)
            sums.append(losses_N.view(-1, cfg.seq_len).sum(0))
    total_T = torch.zeros(cfg.seq_len, dtype=torch.float64)
    for sum_T in sums:
        total_T += sum_T.cpu()
    by_position = dist.sum(total_T) / num_windows
    return float(by_position.mean()), by_position


def hellaswag_accuracy(run, poll: Callable[[], None]) -> float:
    """Return the share of the items whose right ending has the lowest mean loss (chance 0.25)."""
    mine = run.hellaswag_items[run.dist.rank :: run.dist.world_size]
    results = scoring.score(run.model, mine, autocast=run.autocast, poll=poll)
    correct = torch.tensor([sum(r.predicted == r.label for r in results), len(results)])
    correct, total = run.dist.sum(correct).tolist()
    return correct / total


def samples(run, poll: Callable[[], None]) -> list[str]:
    """Return texts that go on from --sample_prompt: by weights, seed and step alone."""
    cfg, enc = run.cfg, tokenizer.get_tokenizer()
    generator = torch.Generator().manual_seed(cfg.seed + run.state.step)
    prompt = enc.encode_ordinary(cfg.sample_prompt)
    with run.autocast():
        rows = generate(
            run.model, [prompt], cfg.sample_tokens, generator, count=cfg.num_samples, poll=poll
        )
    return [cfg.sample_prompt + enc.decode(row) for row in rows]
