"""Estimate what a training process needs of memory."""

import torch

from training.chunked_loss import PADDED_VOCAB, chunk_rows

# Kept for the backward pass, in bytes per token, layer and channel. Measured on the shapes of gpt2
# to gpt2-xl; what a compiler keeps is the same but for a few percent (LAB_NOTES.md, 2026-11-25).
KEPT, KEPT_FLOAT32 = 37, 65
# Bytes of Python, its modules, and what an evaluation and histograms hold beside a step's own.
# PyTorch built for CUDA holds more, also where training runs on the CPU (2.11 and 2.15 measured).
PROGRAM = 850_000_000 if torch.version.cuda else 500_000_000


def state_bytes(model, optimizer: str) -> int:
    """Return the bytes of weights and moments: of the blocks' matrices Muon keeps one moment, and
    SOAP two and, on their shorter sides (always C), two squares each, which is 1 more."""
    hidden = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() >= 2)
    more = {"adamw": 0, "muon": -1, "soap_muon": 1}[optimizer]
    return 12 * model.num_params() + 4 * more * hidden


def training_bytes(
    model, dtype: torch.dtype, sequences: int, device: torch.device | None = None,
    accumulating: bool = True, processes: int = 1, optimizer: str = "adamw",
    sharded: bool = False, recomputing: bool = False,
) -> int:  # fmt: skip
    """Return an estimate of a training step's peak, the same for a model on the meta device.

    device: where training runs, the model's without it. accumulating: the gradients of earlier
    micro-batches are there in the forward pass. sharded: --shard. recomputing:
    --activation_checkpointing.
    """
    params, low = model.num_params(), dtype != torch.float32
    tokens, rows = sequences * model.seq_len, chunk_rows(device or model.lm_head.weight.device)
    kept = KEPT if low else KEPT_FLOAT32
    # Of a block that is computed again only its input is kept, in float32.
    activations = (model.n_layer * 4 + kept) if recomputing else model.n_layer * kept
    activations *= tokens * model.n_embd
    # A chunk of logits, and on a GPU twice in float32; the output matrix, and its gradient so far.
    on_cpu = (device or model.lm_head.weight.device).type == "cpu"
    in_float32 = 0 if on_cpu else 8
    loss = min(rows, tokens) * PADDED_VOCAB * (dtype.itemsize + in_float32)
    loss += PADDED_VOCAB * model.n_embd * (dtype.itemsize + (4 if tokens > rows else 0))
    state = state_bytes(model, optimizer)
    if sharded and processes > 1:
        # What is together at a time: the embeddings, two blocks, and the gradients of one.
        block = sum(p.numel() for p in model.transformer.h[0].parameters())
        apart = 4 * (params - model.n_layer * block + 3 * block)
        waiting = 4 * params if accumulating else 4 * (params // processes)
        step = apart + waiting + (2 * params if low else 0) + activations + loss
        return state // processes + max(step, 4 * params)  # an evaluation has the weights whole
    state += 4 * params if processes > 1 else 0  # DDP's buckets
    copies = (2 if low else 0) + (4 if accumulating else 0)  # weights in `dtype`, gradients
    # The update has gradients, and now and then another copy of the weights (Update_Ratio).
    return state + max(copies * params + activations + loss, 8 * params)


def of_run(run, sharded: bool | None = None) -> int:
    """Return the estimate for a process of this train_improved.Run, as it is or with `sharded`; on
    a CPU with the program itself and what the C library keeps (as measured, LAB_NOTES.md)."""
    cfg, dist = run.cfg, run.dist
    accumulating = cfg.total_batch_size > cfg.seq_len * cfg.micro_batch_size * dist.world_size
    need = training_bytes(
        run.model, run.dtype, cfg.micro_batch_size, dist.device, accumulating, dist.world_size,
        cfg.optimizer, cfg.shard if sharded is None else sharded, cfg.activation_checkpointing,
    )  # fmt: skip
    return need if dist.device.type != "cpu" else PROGRAM + round(1.15 * need)
