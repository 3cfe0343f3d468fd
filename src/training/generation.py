"""Write text with a model: a KV cache, one pass over the prompts, then a token a row at a time."""

from collections.abc import Iterator

from tokens.tokenizer import EOT

# The first pass reads the prompts, each later one a single token a row: keys and values of the
# positions before it are kept. B rows, T positions, V = vocabulary.


class KVCache:
    """Keys and values of the positions so far: for each layer (B, head, T, C/head)."""

    def __init__(self, capacity: int):
        self.k, self.v, self.capacity = [], [], capacity
        self.length = 0  # positions filled; the model moves it on after its last layer

    def extend(self, layer: int, k, v):
        """Append keys and values (B, head, T, C/head) of new positions -> those of all so far."""
        B, H, T, D = k.shape
        assert T == 1 or self.length == 0, "after the prompts one position at a time"
        if layer == len(self.k):
            self.k.append(k.new_empty(B, H, self.capacity, D))
            self.v.append(v.new_empty(B, H, self.capacity, D))
        end = self.length + T
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def repeat(self, count: int) -> None:
        """Have each row `count` times, side by side: a prompt is read once for all its samples."""
        self.k = [k.repeat_interleave(count, dim=0) for k in self.k]
        self.v = [v.repeat_interleave(count, dim=0) for v in self.v]


def stream(
    model,
    prompts: list[list[int]],
    max_tokens: int,
    generator,
    *,
    count: int = 1,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
) -> Iterator[list[int | None]]:
    """Go on from each prompt `count` times, all at once; yields the next token of every row.

    prompts: token ids, 1 to seq_len - 1 of them; lengths may differ. Rows are in the order of the
    prompts, the samples of one side by side. A row ends with <|endoftext|>, or after max_tokens
    tokens, or when prompt and text fill the context; then its token is None. See `choose` for the
    rest. `generator` (a torch.Generator on the CPU) gives each row its random numbers in advance:
    what a row says does not depend on the rows beside it.
    """
    import torch

    device, seq_len = model.lm_head.weight.device, model.seq_len
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths) > 0 and max(lengths) < seq_len, (lengths, seq_len)
    room = [min(max_tokens, seq_len - n) for n in lengths for _ in range(count)]
    draws = torch.stack([torch.rand(seq_len, generator=generator) for _ in room]).to(device)

    # All prompts end in the same column. The shorter ones are padded on the left: there no later
    # position looks, and a row's own positions count from its first token.
    T = max(lengths)
    ids = torch.tensor([[EOT] * (T - len(prompt)) + prompt for prompt in prompts], device=device)
    padding = torch.tensor([T - n for n in lengths], device=device)[:, None]
    columns = torch.arange(T + max(room), device=device)
    positions = (columns - padding).clamp(0, seq_len - 1)  # (prompts, columns)
    visible = mask = None
    if min(lengths) < T:
        visible = columns >= padding
        itself = torch.eye(T, dtype=torch.bool, device=device)  # softmax over nothing is NaN
        mask = (visible[:, None, :T] & (columns[:T, None] >= columns[:T]) | itself)[:, None]
        visible = visible.repeat_interleave(count, dim=0)[:, None, None]

    cache = KVCache(T + max(room))
    running = [True] * len(room)
    for t in range(max(room)):
        # Not around the yield: whoever takes the tokens may do with tensors what they like. And no
        # inference_mode: in it autocast casts all the weights again at every token.
        with torch.no_grad():
            if t == 0:
                x = model.features(ids, positions[:, :T], mask, cache)
                x = x[:, -1].repeat_interleave(count, dim=0)
                cache.repeat(count)
                positions = positions.repeat_interleave(count, dim=0)
            else:
                end = T + t
                mask = visible[..., :end] if visible is not None else None
                x = model.features(ids, positions[:, end - 1 : end], mask, cache)[:, -1]
            chosen = choose(model.logits(x), draws[:, t], temperature, top_k, top_p)
            ids = chosen[:, None]
            tokens = chosen.tolist()
        yield [token if on else None for token, on in zip(tokens, running, strict=True)]
        for row, token in enumerate(tokens):
            running[row] &= token != EOT and t + 1 < room[row]
        if not any(running):
            return


def choose(logits, draws, temperature: float, top_k: int, top_p: float):
    """Return the next token of each row, (B,): logits (B, V) float32, draws (B,) uniform in [0, 1).

    Drawn from softmax(logits / temperature), among the top_k likeliest tokens (0: all), and of
    these among the likeliest that together have the share top_p. temperature 0: the likeliest.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    ids, V = None, logits.shape[-1]
    if 0 < top_k < V or top_p < 1:
        logits, ids = logits.topk(min(top_k or V, V))  # from the likeliest down
    probs = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    upto = probs.cumsum(dim=-1)
    if top_p < 1:
        probs = probs.masked_fill(upto - probs >= top_p, 0.0)
        upto = probs.cumsum(dim=-1)
    # The first token whose cumulative share is above the draw (which is below 1, so there is one):
    # a tenth of the time of torch.multinomial, and it takes one given number a row.
    chosen = (upto <= draws[:, None] * upto[:, -1:]).sum(dim=-1)
    return chosen if ids is None else ids.gather(1, chosen[:, None])[:, 0]


def generate(model, prompts, max_tokens, generator, *, poll=lambda: None, **how) -> list[list[int]]:
    """Return the rows of `stream` without <|endoftext|>; `poll` is called at every token."""
    rows = []
    for tokens in stream(model, prompts, max_tokens, generator, **how):
        poll()
        rows = rows or [[] for _ in tokens]
        for row, token in zip(rows, tokens, strict=True):
            if token is not None and token != EOT:
                row.append(token)
    return rows
