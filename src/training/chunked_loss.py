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
    """Return how many rows of logits exist at a time."""
    return 4096 if device.type == "cuda" else CPU_ROWS


def chunked_cross_entropy(x_NC, w_VC, y_N) -> torch.Tensor:
    """Return the mean cross-entropy (nats, float32, ()) of logits `x @ w.T` against targets y.

    Products are in the precision of autocast where that is on, else in x's; softmax and sums are
    in float32. The gradient is the exact one of this mean.
    """
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(_in_product_dtype(x_NC), w_VC, y_N)
    return next_token_losses(x_NC, w_VC, y_N).mean()


def next_token_losses(x_NC, w_VC, y_N) -> torch.Tensor:
    """Return each token's cross-entropy, (N,) float32; for evaluation, without gradients. Who
    calls it often passes `padded(w)`."""
    x_NC = _in_product_dtype(x_NC)
    w, rows = padded(w_VC, x_NC.dtype), chunk_rows(x_NC.device)
    buffer = _buffer(x_NC, rows)
    # Into one tensor: small results that stay, one a piece, would hold the heap's holes open.
    losses_N = torch.empty(len(x_NC), dtype=torch.float32, device=x_NC.device)
    chunks = (x_NC.split(rows), y_N.split(rows), losses_N.split(rows))
    for x, y, losses in zip(*chunks, strict=True):
        logits = torch.mm(x, w.T, out=buffer[: len(x)])
        step = CACHE_ROWS if x.device.type == "cpu" else rows
        pieces = (logits.split(step), y.split(step), losses.split(step))
        for some, targets, found in zip(*pieces, strict=True):
            scores = some[:, :VOCAB_SIZE].float()
            found.copy_(F.cross_entropy(scores, targets, reduction="none"))
    return losses_N


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`F.linear_cross_entropy` has a chunked path too; it sums in bf16 (its loss was off by 1.8
    in 10.8) and took 2 to 6 times as long on the CPU: LAB_NOTES.md, 2026-11-22."""

    @staticmethod
    def forward(ctx, x_NC, w_VC, y_N):
        w, rows = padded(w_VC, x_NC.dtype), chunk_rows(x_NC.device)
        grad_w, grad_x, sums = None, [], []
        loss = torch.zeros((), dtype=torch.float32, device=w.device)
        eager = not torch.compiler.is_compiling()
        buffer = _buffer(x_NC, rows) if eager else None
        for x, y in zip(x_NC.split(rows), y_N.split(rows), strict=True):
            if eager:
                logits = torch.mm(x, w.T, out=buffer[: len(x)])
                # Padding is no class: its logits stay 0 and meet rows of zeros in the products.
                _gradient_in_place(logits[:, :VOCAB_SIZE], y, loss)
            else:
                logits, sum_of_losses = _gradient_that_fuses(x @ w.T, x, w, y)
                sums.append(sum_of_losses)
            grad_x.append(logits @ w)
            if grad_w is None:
                grad_w = (logits.T @ x).float()
            else:
                _add_product(grad_w, logits, x)
        ctx.save_for_backward(torch.cat(grad_x), grad_w)
        ctx.num_tokens = len(y_N)
        # A compiler that may add on the way fuses the sums of all chunks, comes to them first, and
        # so has the logits of all chunks at a time (read in Triton code, LAB_NOTES.md).
        loss = torch.stack(sums).sum() if sums else loss
        return loss / ctx.num_tokens

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad_loss / ctx.num_tokens
        return (grad_x * scale).to(grad_x.dtype), grad_w[:VOCAB_SIZE] * scale, None


def _gradient_in_place(logits, y, loss) -> None:
    """Replace logits by the gradient of their summed cross-entropy, softmax - onehot; add the sum
    to loss. A CPU takes as many rows at a time as its caches hold."""
    step = CACHE_ROWS if logits.device.type == "cpu" else len(logits)
    for some, targets in zip(logits.split(step), y.split(step), strict=True):
        scores = some.float()
        largest, target = scores.amax(1), scores.gather(1, targets[:, None])[:, 0]
        probs = scores.softmax(1)
        # The logarithm of the sum of exp(logits), from what softmax left: no second exp pass, and
        # never the logarithm of 0, since the largest probability is at least 1 / V.
        logsumexp = largest - probs.amax(1).log()
        probs.scatter_add_(1, targets[:, None], probs.new_full((len(targets), 1), -1.0))
        some.copy_(probs)
        loss += (logsumexp - target).sum()


def _gradient_that_fuses(logits, x, w, y) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax - onehot in the precision of the logits, and the sum of their cross-entropy,
    written so that a compiler makes one pass to sum and one to write of it.

    Nothing of the logits' size is in float32: no scatter, and the target's logit is a product of
    its own, since a compiler that reads it from the logits keeps those of every chunk.
    """
    classes = torch.arange(PADDED_VOCAB, device=y.device)
    scores = torch.where(classes < VOCAB_SIZE, logits.float(), -1e30)
    largest = scores.amax(1, keepdim=True)
    logsumexp = largest + (scores - largest).exp().sum(1, keepdim=True).log()
    gradient = (scores - logsumexp).exp() - (classes == y[:, None]).float()
    target = (x.float() * w[y].float()).sum(1)
    return gradient.to(logits.dtype), (logsumexp[:, 0] - target).sum()


@torch.library.custom_op("gpt2::add_product", mutates_args={"total_VC"})
def _add_product(total_VC: torch.Tensor, a_NV: torch.Tensor, b_NC: torch.Tensor) -> None:
    """Add a.T @ b to total. A compiler cannot look inside: it would keep the products of all chunks
    for the backward pass and add them there."""
    total_VC.add_(a_NV.T @ b_NC)


def _buffer(x_NC, rows: int) -> torch.Tensor:
    """Return the memory in which the logits of one chunk after the other lie. A new tensor for each
    would not fit where the last one was, once small ones are there: 3 GB of holes in the C
    library's heap after 16 chunks of 0.2 GB."""
    return x_NC.new_empty(min(rows, len(x_NC)), PADDED_VOCAB)


def _in_product_dtype(x):
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def padded(w_VC, dtype):
    """Return the output matrix in the product's precision, with rows of zeros to PADDED_VOCAB.

    Padding lives here alone: the model and its checkpoints have exactly GPT-2's rows. A matrix that
    is padded already comes back as it is.
    """
    missing = PADDED_VOCAB - len(w_VC)
    return F.pad(w_VC.to(dtype), (0, 0, 0, missing)) if missing else w_VC.to(dtype)
