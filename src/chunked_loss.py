"""Next-token cross-entropy that never holds all the logits.

The (N, V) logits are by far the largest tensor of GPT-2 training: 50,257 numbers per token. Only
their softmax is needed to go back, so each chunk's gradient is taken while its logits are at hand.
N tokens, C channels, V = 50,257 classes.
"""

import math

import torch
import torch.nn.functional as F

from tokenizer import VOCAB_SIZE

PADDED_VOCAB = 50_304  # the next multiple of 64: matrix units want aligned shapes


def chunk_rows(w_VC) -> int:
    """Rows of logits that exist at a time. A CPU is fastest while they stay in its cache, but each
    chunk also adds to all of the (V, C) gradient: as many rows as channels balances the two. A GPU
    needs large products to be busy."""
    return 4096 if w_VC.is_cuda else max(64, w_VC.shape[1])


def chunked_cross_entropy(x_NC, w_VC, y_N) -> torch.Tensor:
    """Mean of the cross-entropy (nats, float32, shape ()) of logits `x @ w.T` against targets y.

    Products are in the precision of autocast where that is on, else in x's; softmax and sums are
    in float32. The gradient is the exact one of this mean.
    """
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(_in_product_dtype(x_NC), w_VC, y_N)
    return next_token_losses(x_NC, w_VC, y_N).mean()


def next_token_losses(x_NC, w_VC, y_N) -> torch.Tensor:
    """Cross-entropy of each token, (N,) float32; for evaluation, without gradients."""
    x_NC = _in_product_dtype(x_NC)
    w, rows = _padded(w_VC, x_NC.dtype), chunk_rows(w_VC)
    losses = [
        F.cross_entropy((x @ w.T)[:, :VOCAB_SIZE].float(), y, reduction="none")
        for x, y in zip(x_NC.split(rows), y_N.split(rows), strict=True)
    ]
    return torch.cat(losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`F.linear_cross_entropy` has a chunked path too; it sums in bf16 (its loss was off by 1.8
    in 10.8) and took 2 to 6 times as long on the CPU: LAB_NOTES.md, 2026-11-22."""

    @staticmethod
    def forward(ctx, x_NC, w_VC, y_N):
        w, rows = _padded(w_VC, x_NC.dtype), chunk_rows(w_VC)
        grad_w = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
        grad_x = []
        loss = torch.zeros((), dtype=torch.float32, device=w.device)
        for x, y in zip(x_NC.split(rows), y_N.split(rows), strict=True):
            logits = (x @ w.T).float()
            logits[:, VOCAB_SIZE:] = -math.inf  # padding is no class: probability and gradient 0
            probs = logits.softmax(1)
            # The logarithm of the sum of exp(logits), from what softmax left: no second exp pass,
            # and never the logarithm of 0, since the largest probability is at least 1 / V.
            logsumexp = logits.amax(1) - probs.amax(1).log()
            loss += (logsumexp - logits.gather(1, y[:, None])[:, 0]).sum()
            probs.scatter_add_(1, y[:, None], probs.new_full((len(y), 1), -1.0))
            grad_logits = probs.to(x.dtype)
            grad_x.append(grad_logits @ w)
            grad_w += grad_logits.T @ x
        ctx.save_for_backward(torch.cat(grad_x), grad_w[:VOCAB_SIZE])
        ctx.num_tokens = len(y_N)
        return loss / ctx.num_tokens

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad_loss / ctx.num_tokens
        return (grad_x * scale).to(grad_x.dtype), grad_w * scale, None


def _in_product_dtype(x):
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _padded(w_VC, dtype):
    """The output matrix in the product's precision; on GPUs with rows of zeros up to PADDED_VOCAB.

    Padding lives here alone: the model and its checkpoints have exactly GPT-2's rows.
    """
    w = w_VC.to(dtype)
    return F.pad(w, (0, 0, 0, PADDED_VOCAB - VOCAB_SIZE)) if w.is_cuda else w
