"""Next-token cross-entropy that never holds all the logits.

The (N, V) logits are by far the largest tensor of GPT-2 training: 50,257 numbers per token. Only
their softmax is needed to go back, so each chunk's gradient is taken while its logits are at hand.
N tokens, C channels, V = 50,257 classes.
"""

import torch
import torch.nn.functional as F

from tokens.tokenizer import VOCAB_SIZE

PADDED_VOCAB = 50_304  # the next multiple of 64: matrix units want aligned shapes
CPU_ROWS = 1024  # of logits that exist at a time on a CPU; a GPU takes more, to be busy
CACHE_ROWS = 32  # rows of float32 logits, 6 MB, that a CPU turns into gradients inside its caches


def chunk_rows(device: torch.device) -> int:
    """Rows of logits that exist at a time."""
    return 4096 if device.type == "cuda" else CPU_ROWS


def chunked_cross_entropy(x_NC, w_VC, y_N) -> torch.Tensor:
    """Mean of the cross-entropy (nats, float32, shape ()) of logits `x @ w.T` against targets y.

    Products are in the precision of autocast where that is on, else in x's; softmax and sums are
    in float32. The gradient is the exact one of this mean.
    """
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(_in_product_dtype(x_NC), w_VC, y_N)
    return next_token_losses(x_NC, w_VC, y_N).mean()


def next_token_losses(x_NC, w_VC, y_N) -> torch.Tensor:
    """Cross-entropy of each token, (N,) float32; for evaluation, without gradients. Who calls it
    often passes `padded(w)`."""
    x_NC = _in_product_dtype(x_NC)
    w, rows = padded(w_VC, x_NC.dtype), chunk_rows(x_NC.device)
    losses = []
    for x, y in zip(x_NC.split(rows), y_N.split(rows), strict=True):
        logits = x @ w.T
        step = _rows_at_a_time(logits)
        losses += [
            F.cross_entropy(some[:, :VOCAB_SIZE].float(), targets, reduction="none")
            for some, targets in zip(logits.split(step), y.split(step), strict=True)
        ]
    return torch.cat(losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`F.linear_cross_entropy` has a chunked path too; it sums in bf16 (its loss was off by 1.8
    in 10.8) and took 2 to 6 times as long on the CPU: LAB_NOTES.md, 2026-11-22."""

    @staticmethod
    def forward(ctx, x_NC, w_VC, y_N):
        w, rows = padded(w_VC, x_NC.dtype), chunk_rows(x_NC.device)
        grad_w, grad_x = None, []
        loss = torch.zeros((), dtype=torch.float32, device=w.device)
        for x, y in zip(x_NC.split(rows), y_N.split(rows), strict=True):
            logits = x @ w.T
            step = _rows_at_a_time(logits)
            for some, targets in zip(logits.split(step), y.split(step), strict=True):
                # Padding is no class: its logits stay 0 and meet rows of zeros in the next product.
                loss += _gradient_in_place(some[:, :VOCAB_SIZE], targets)
            grad_x.append(logits @ w)
            product = logits.T @ x
            grad_w = product.float() if grad_w is None else grad_w.add_(product)
        ctx.save_for_backward(torch.cat(grad_x), grad_w)
        ctx.num_tokens = len(y_N)
        return loss / ctx.num_tokens

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad_loss / ctx.num_tokens
        return (grad_x * scale).to(grad_x.dtype), grad_w[:VOCAB_SIZE] * scale, None


def _gradient_in_place(logits, y) -> torch.Tensor:
    """Replace logits by the gradient of their summed cross-entropy, softmax - onehot; the sum."""
    scores = logits.float()
    largest, target = scores.amax(1), scores.gather(1, y[:, None])[:, 0]
    probs = scores.softmax(1)
    # The logarithm of the sum of exp(logits), from what softmax left: no second exp pass, and
    # never the logarithm of 0, since the largest probability is at least 1 / V.
    logsumexp = largest - probs.amax(1).log()
    probs.scatter_add_(1, y[:, None], probs.new_full((len(y), 1), -1.0))
    logits.copy_(probs)
    return (logsumexp - target).sum()


def _rows_at_a_time(logits) -> int:
    """In eager mode a CPU works inside its caches; a GPU, and a compiler, take the whole chunk."""
    in_cache = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    return CACHE_ROWS if in_cache else len(logits)


def _in_product_dtype(x):
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def padded(w_VC, dtype):
    """The output matrix in the product's precision, with rows of zeros up to PADDED_VOCAB.

    Padding lives here alone: the model and its checkpoints have exactly GPT-2's rows. A matrix that
    is padded already comes back as it is.
    """
    missing = PADDED_VOCAB - len(w_VC)
    return F.pad(w_VC.to(dtype), (0, 0, 0, missing)) if missing else w_VC.to(dtype)
