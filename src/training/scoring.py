"""HellaSwag: which of four endings does the model find most likely? Chance is 0.25.

Zellers et al. 2019, https://github.com/rowanz/hellaswag. An item is a context and four endings, one
of them true. There are two conventions, with different numbers for the same model:

  gpt2      build-nanogpt's and llm.c's, and `Evaluation/hellaswag_accuracy` in TensorBoard: the raw
            text; the ending with the lowest mean loss per token wins.
  harness   lm-evaluation-harness': the text cleaned up and headed by the activity; in `acc` the
            lowest summed loss wins, in `acc_norm` the lowest sum per character of the ending.

Scoring computes a context once for its four endings: they stand behind it in one row, each token
with the position it would have alone, and an attention mask keeps the endings from seeing each
other. Logits are computed only where a token of an ending is predicted.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tokens.tokenizer import get_tokenizer
from training.chunked_loss import next_token_losses, padded

# --- Items ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One question, as GPT-2 tokens."""

    ind: int  # the data set's own number
    label: int  # which ending is the true one, 0..3
    context: list[int]
    endings: list[list[int]]  # each begins with a space
    ending_chars: list[int]  # characters of each ending's text, without that space
    exact: bool  # False: the harness' text, but made without the harness' fields


def load_items(path, convention: str = "gpt2") -> list[Item]:
    """Read items from JSON lines in the official field names; `convention` decides their text.

    The harness capitalises the second half of a context (ctx_b). Where a file has only the whole
    context (ctx), that is taken as it is and the item is marked `exact=False`.
    Raise ValueError if the file cannot be read, or a line of it is broken; the line is named.
    """
    text = {"gpt2": _gpt2_text, "harness": _harness_text}[convention]
    encode = get_tokenizer().encode_ordinary
    items = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = _parse(line)
                except ValueError as e:
                    raise ValueError(
                        f"{path}, line {number}: {e}; remove the file and fetch it again with "
                        "python src/hellaswag.py --download"
                    ) from None
                context, continuations, chars = text(record)
                ind, label, endings = record["ind"], record["label"], map(encode, continuations)
                exact = convention == "gpt2" or "ctx_a" in record
                items.append(Item(ind, label, encode(context), [*endings], chars, exact))
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read HellaSwag items from {path}: {e}") from None
    if not items:
        raise ValueError(f"{path} is empty: no HellaSwag items")
    return items


def _parse(line: str) -> dict:
    """Return a line's record with its fields checked; raise ValueError with what is wrong."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError("is not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    for field in ("ind", "label", "activity_label", "ctx", "endings"):
        if field not in record:
            raise ValueError(f"has no field {field!r}")
    if str(record["label"]) not in ("0", "1", "2", "3"):  # the hub's copy has labels as text
        raise ValueError(f"label is {record['label']!r} and not 0, 1, 2 or 3")
    record["label"] = int(record["label"])
    if type(record["ind"]) is not int:
        raise ValueError(f"ind is {record['ind']!r} and not a whole number")
    endings = record["endings"]
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError("endings is not a list of four texts")
    texts = {f"endings[{i}]": ending for i, ending in enumerate(endings)}
    for field, value in (texts | {"ctx": record["ctx"]}).items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{field} is {value!r} and not a text")
    for field in ("activity_label", "ctx_a", "ctx_b"):
        if not isinstance(record.get(field, ""), str):
            raise ValueError(f"{field} is {record[field]!r} and not a text")
    if ("ctx_a" in record) != ("ctx_b" in record):
        raise ValueError("has one of ctx_a and ctx_b, and not the other")
    return record


def _gpt2_text(record: dict) -> tuple[str, list[str], list[int]]:
    """Return context, continuations, and characters of the endings: the text as it is."""
    return record["ctx"], [" " + e for e in record["endings"]], [len(e) for e in record["endings"]]


def _harness_text(record: dict) -> tuple[str, list[str], list[int]]:
    """Return the same as lm-evaluation-harness builds it (its tasks/hellaswag, 0.4.13).

    Half of the items come from WikiHow, whose headings are marked with [header], [title] and so on.
    """

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    if "ctx_a" in record:
        context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    else:
        context = record["ctx"]
    query = clean(f"{record['activity_label']}: {context}")
    endings = [clean(ending) for ending in record["endings"]]
    # A space at a context's end belongs to the first token of what follows.
    context = query.rstrip()
    spaces = query[len(context) :]
    return context, [f"{spaces} {ending}" for ending in endings], [len(e) for e in endings]


# --- Scoring --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What a model makes of one item. Losses are in nats, one for each of the four endings."""

    ind: int
    label: int
    sums: list[float]  # over the tokens of an ending
    losses: list[float]  # mean per token
    ending_chars: list[int]
    cut: bool  # the item was too long for the model: see _fit

    @property
    def predicted(self) -> int:
        """Return the gpt2 convention's choice: the lowest mean loss per token."""
        return _argmin(self.losses)

    @property
    def predicted_acc(self) -> int:
        """Return the choice of the harness' acc: the lowest summed loss."""
        return _argmin(self.sums)

    @property
    def predicted_acc_norm(self) -> int:
        """Return that of acc_norm: the lowest sum per character; an empty ending never wins."""
        both = zip(self.sums, self.ending_chars, strict=True)
        return _argmin([s / n if n else math.inf for s, n in both])


def _argmin(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def accuracy(results: Sequence[Result], prediction: str = "predicted") -> float:
    """Return the share of results whose `prediction` (an attribute of Result) is the label."""
    return sum(getattr(r, prediction) == r.label for r in results) / len(results)


@torch.inference_mode()
def score(
    model,
    items: Sequence[Item],
    batch_tokens: int | None = None,
    autocast: Callable = contextlib.nullcontext,
    poll: Callable[[], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Result]:
    """Return the losses of all endings of `items`, in their order, by train_improved.GPT.

    An item's result does not depend on the items beside it, beyond rounding. `batch_tokens` bounds
    a forward pass; None is what is fast on the model's device. `autocast` makes the context of the
    passes. `poll()` is called before each pass and may raise to stop; `progress(n)` after it, with
    the number of items it scored. The device is waited for once, at the end.
    """
    if not items:
        return []
    weight = model.lm_head.weight
    device = weight.device
    if batch_tokens is None:  # what keeps the device busy
        batch_tokens = 1024 if device.type == "cpu" else 16_384
    multiple = 1 if device.type == "cpu" else 32  # few different shapes: GPU memory is reused

    fitted = [_fit(item, model.seq_len) for item in items]
    lengths = [len(context) + sum(len(e) - 1 for e in endings) for context, endings, _ in fitted]
    order = sorted(range(len(items)), key=lambda i: -lengths[i])  # alike together: little padding
    losses, start = [], 0
    with autocast():
        dtype = weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        weight = padded(weight, dtype)  # once, and not in each pass
        while start < len(order):
            T = math.ceil(lengths[order[start]] / multiple) * multiple
            batch = order[start : start + max(1, batch_tokens // T)]
            start += len(batch)
            if poll is not None:
                poll()
            inputs, predictions = _pack([fitted[i][:2] for i in batch], T)
            idx, positions, segments = to_device(inputs, device)
            rows, targets = to_device(predictions, device)
            x_BTC = model.features(idx, positions, _tree_mask(segments))
            x_NC = x_BTC.flatten(0, 1)[rows]
            losses.append(next_token_losses(x_NC, weight, targets))
            if progress is not None:
                progress(len(batch))

    # One loss per token of the endings, batch after batch. Summed here and not on the device,
    # where the order of a sum, and with it a near tie, could differ from run to run.
    tokens = [len(ending) for i in order for ending in fitted[i][1]]
    first = np.cumsum([0, *tokens[:-1]])
    sums = np.add.reduceat(torch.cat(losses).cpu().double().numpy(), first)
    means = sums / tokens
    results: list[Result | None] = [None] * len(items)
    for i, s, m in zip(order, sums.reshape(-1, 4), means.reshape(-1, 4), strict=True):
        item = items[i]
        results[i] = Result(
            item.ind, item.label, s.tolist(), m.tolist(), item.ending_chars, cut=fitted[i][2]
        )
    return results


def _fit(item: Item, seq_len: int) -> tuple[list[int], list[list[int]], bool]:
    """Return context and endings that fit `seq_len` positions, and whether something was cut.

    The last token of an ending is predicted, never read. A context that is too long for the longest
    ending loses its beginning, for all four endings alike. An ending longer than the whole model is
    scored on its beginning, behind one token of context.
    """
    endings = [ending[:seq_len] for ending in item.endings]
    room = seq_len + 1 - max(len(ending) for ending in endings)
    context = item.context[-room:]
    return context, endings, context != item.context or endings != item.endings


PADDING = 5  # the segment behind the context (0) and the endings (1 to 4)


def _pack(items: Sequence[tuple[list[int], list[list[int]]]], T: int):
    """Make rows [context | ending 1 | ... | ending 4 | padding] of T tokens.

    The last token of an ending is not among them, nothing is predicted from it.
    Return (3, B, T) tokens, positions, segments; and (2, N) for the N tokens of all the endings:
    where (as an index into B*T) each is predicted, and which token it is.
    """
    idx, positions, segments = inputs = np.zeros((3, len(items), T), dtype=np.int64)
    segments[:] = PADDING
    rows, targets = [], []
    for b, (context, endings) in enumerate(items):
        n = len(context)
        idx[b, :n], positions[b, :n], segments[b, :n] = context, range(n), 0
        start = n
        for segment, ending in enumerate(endings, start=1):
            stop = start + len(ending) - 1
            idx[b, start:stop] = ending[:-1]
            positions[b, start:stop] = range(n, n + stop - start)
            segments[b, start:stop] = segment
            rows += [b * T + n - 1, *range(b * T + start, b * T + stop)]
            targets += ending
            start = stop
    return inputs, np.array([rows, targets])


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # from pinned memory the copy does not wait for the GPU
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _tree_mask(segments_BT: torch.Tensor) -> torch.Tensor:
    """Return (B, 1, T, T), True = may look: back, at the context and at one's own ending."""
    own = segments_BT[:, :, None] == segments_BT[:, None, :]
    context = (segments_BT == 0)[:, None, :]
    return (own | context).tril()[:, None]
