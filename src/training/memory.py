"""Estimate what a training process needs of memory."""

import torch

from training.chunked_loss import PADDED_VOCAB, chunk_rows


def training_bytes(model, dtype: torch.dtype, sequences: int) -> int:
    """Estimate of what a process needs: weights, gradients, two moments, activations, loss."""
    # Kept for the backward pass, in bytes per token, layer and channel, as measured on GPT-2 124M.
    width = 50 if dtype != torch.float32 else 80
    tokens = sequences * model.seq_len
    activations = tokens * model.n_layer * model.n_embd * width
    weight = model.lm_head.weight
    logits = min(chunk_rows(weight.device), tokens) * PADDED_VOCAB * dtype.itemsize
    in_float = 2 * PADDED_VOCAB * (4096 if weight.is_cuda else 32) * 4
    loss = logits + in_float + 2 * PADDED_VOCAB * model.n_embd * 4
    return 16 * model.num_params() + activations + loss
