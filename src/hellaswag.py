"""HellaSwag: which of four endings does the model find most likely? Chance is 0.25.

    python src/hellaswag.py --download                     fetch the 10,042 validation items (12 MB)
    python src/hellaswag.py                                score the newest checkpoint
    python src/hellaswag.py --checkpoint checkpoints/RUN/step_00005000.pt --out results.jsonl
    python src/hellaswag.py --checkpoint exported/RUN         a Hugging Face folder; or gpt2

Zellers et al. 2019, https://github.com/rowanz/hellaswag. An item is a context and four endings, one
of them true. There are two conventions, with different numbers for the same model:

  gpt2      build-nanogpt's and llm.c's, and `Evaluation/hellaswag_accuracy` in TensorBoard: the raw
            text; the ending with the lowest mean loss per token wins.
  harness   lm-evaluation-harness': the text cleaned up and headed by the activity; in `acc` the
            lowest summed loss wins, in `acc_norm` the lowest sum per character of the ending.

Scoring computes a context once for its four endings: they stand behind it in one row, each token
with the position it would have alone, and an attention mask keeps the endings from seeing each
other. Logits are computed only where a token of an ending is predicted.

Sections: items, scoring, download, the command.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train_improved.py, before torch

import numpy as np
import torch

from chunked_loss import next_token_losses, padded
from tokenizer import get_tokenizer

DEFAULT_FILE = "data/hellaswag/hellaswag_val.jsonl"

# --- Items ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One question, as GPT-2 tokens."""

    ind: int  # the data set's own number
    label: int  # which ending is the true one, 0..3
    activity_label: str
    context: list[int]
    endings: list[list[int]]  # each begins with a space
    ending_chars: list[int]  # characters of each ending's text, without that space
    exact: bool  # False: the harness' text, but made without the harness' fields


def load_items(path, convention: str = "gpt2") -> list[Item]:
    """Read items from JSON lines in the official field names; `convention` decides their text.

    The harness capitalises the second half of a context (ctx_b). Where a file has only the whole
    context (ctx), that is taken as it is and the item is marked `exact=False`.
    ValueError: the file cannot be read, or a line of it is broken; the line is named.
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
                items.append(
                    Item(
                        ind=record["ind"],
                        label=record["label"],
                        activity_label=record["activity_label"],
                        context=encode(context),
                        endings=[encode(c) for c in continuations],
                        ending_chars=chars,
                        exact=convention == "gpt2" or "ctx_a" in record,
                    )
                )
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read HellaSwag items from {path}: {e}") from None
    if not items:
        raise ValueError(f"{path} is empty: no HellaSwag items")
    return items


def _parse(line: str) -> dict:
    """One line's record with its fields checked; ValueError says what is wrong with it."""
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
    """Context, continuations, and characters of the endings: the text as it is."""
    return record["ctx"], [" " + e for e in record["endings"]], [len(e) for e in record["endings"]]


def _harness_text(record: dict) -> tuple[str, list[str], list[int]]:
    """The same as lm-evaluation-harness builds it (its tasks/hellaswag, 0.4.13).

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
        """The gpt2 convention's choice: the lowest mean loss per token."""
        return _argmin(self.losses)

    @property
    def predicted_acc(self) -> int:
        """The harness' acc: the lowest summed loss."""
        return _argmin(self.sums)

    @property
    def predicted_acc_norm(self) -> int:
        """The harness' acc_norm: the lowest sum per character; an empty ending never wins."""
        return _argmin(
            [s / n if n else math.inf for s, n in zip(self.sums, self.ending_chars, strict=True)]
        )


def _argmin(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def accuracy(results: Sequence[Result], prediction: str = "predicted") -> float:
    """Share of the results whose `prediction` (an attribute of Result) is the label."""
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
    """Losses of all endings of `items`, in their order, by a GPT as train_improved.py has it.

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
            idx, positions, segments = _to_device(inputs, device)
            rows, targets = _to_device(predictions, device)
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
    """Context and endings that fit a model of `seq_len` positions, and whether something was cut.

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
    """Rows [context | ending 1 | ... | ending 4 | padding] of T tokens.

    The last token of an ending is not among them, nothing is predicted from it.
    -> (3, B, T) tokens, positions, segments; and (2, N) for the N tokens of all the endings: where
    (as an index into B*T) each is predicted, and which token it is.
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


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # from pinned memory the copy does not wait for the GPU
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _tree_mask(segments_BT: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, T), True = may look: back, at the context and at one's own ending."""
    own = segments_BT[:, :, None] == segments_BT[:, None, :]
    context = (segments_BT == 0)[:, None, :]
    return (own | context).tril()[:, None]


# --- Download -------------------------------------------------------------------------------------

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
NUM_ITEMS = 10_042
ATTEMPTS = 3
TIMEOUT = 60  # seconds without a byte


def download(path, url: str = URL, say: Callable[[str], object] = print) -> None:
    """Fetch the validation items to `path`; the file appears whole and checked, or not at all.

    A transfer that is cut begins again from the start (it is 12 MB). ValueError: no connection, not
    the expected content, no place to write, or `path` is there and is something else.
    """
    path = Path(path)
    if path.exists():
        say(f"{path} is already there: {len(load_items(path)):,} items")
        return
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _fetch(url, part, say)
                break
            except (
                urllib.error.URLError,
                http.client.HTTPException,
                ConnectionError,
                TimeoutError,
            ) as e:
                if attempt == ATTEMPTS or isinstance(e, urllib.error.HTTPError):
                    raise ValueError(
                        f"cannot download {url}: {e}; try again, or fetch it by other means and "
                        "give it with --file"
                    ) from None
                say(f"  {e}: beginning again, attempt {attempt + 1} of {ATTEMPTS}")
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        if url == URL and digest != SHA256:
            raise ValueError(f"{url} is not the known file: SHA-256 {digest} instead of {SHA256}")
        try:
            items = load_items(part)
        except ValueError as e:
            raise ValueError(f"{url} is not a HellaSwag file: {e}") from None
        os.replace(part, path)
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    say(f"{path}: {len(items):,} items")


def _fetch(url: str, part: Path, say: Callable[[str], object]) -> None:
    """One transfer into `part`, flushed to the disk; ConnectionError if it ends too early."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(part, "wb") as file:
        announced = response.headers["Content-Length"]
        size = f"{int(announced) / 1e6:.1f} MB" if announced else "of unknown size"
        say(f"downloading {url} ({size})")
        while chunk := response.read(1 << 20):
            file.write(chunk)
        if announced and file.tell() != int(announced):
            raise ConnectionError(f"the transfer ended after {file.tell():,} of {announced} bytes")
        file.flush()
        os.fsync(file.fileno())


# --- The command ----------------------------------------------------------------------------------


def load_model(source: str, device: torch.device):
    """(the GPT that `source` means, see pretrained.py, notes about it), for evaluation."""
    import pretrained
    import train_improved

    shape, weights, notes = pretrained.read_pretrained(source)
    with torch.device("meta"):  # no time for initial weights
        model = train_improved.GPT(**shape)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval(), notes


# What is measured: convention, Result's attribute, name, and OpenAI's 124M models on all the items.
MEASURES = (
    ("gpt2", "predicted", "gpt2: mean loss", {"GPT-2": 0.2955, "GPT-3": 0.337}),
    ("harness", "predicted_acc", "harness: acc", {"GPT-2": 0.2892}),
    ("harness", "predicted_acc_norm", "harness: acc_norm", {"GPT-2": 0.3114}),
)


@contextlib.contextmanager
def _progress(total: int, name: str):
    """Gives a function to call with items done: it draws a bar on a terminal, else rare lines."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=name, unit="item", leave=False) as bar:
            yield bar.update
        return
    done, last = 0, time.monotonic()

    def update(n: int) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"  {name}: {done:,} of {total:,} items", file=sys.stderr, flush=True)

    yield update


def _write_results(path, results: dict[str, list[Result]]) -> None:
    """JSON lines: ind, label, predicted, losses (the first convention's); the harness' choices."""
    first = next(iter(results.values()))
    harness = results.get("harness")
    try:
        with open(path, "w", encoding="utf-8") as file:
            for i, r in enumerate(first):
                line = {name: getattr(r, name) for name in ("ind", "label", "predicted", "losses")}
                if harness:
                    line["harness_acc"] = harness[i].predicted_acc
                    line["harness_acc_norm"] = harness[i].predicted_acc_norm
                file.write(json.dumps(line) + "\n")
    except OSError as e:
        raise ValueError(f"cannot write --out {path}: {e}") from None


def evaluate(args: argparse.Namespace) -> None:
    import checkpoint_files
    import machine

    device = machine.choose_device(args.device)
    wanted = ("gpt2", "harness") if args.convention == "both" else (args.convention,)
    if not Path(args.file).exists():
        raise ValueError(f"{args.file} is not there: add --download to fetch it, or name another")
    items = {name: load_items(args.file, name)[: args.limit] for name in wanted}
    if args.out:
        checkpoint_files.check_writable(Path(args.out).parent)
    source = args.checkpoint or "latest"
    model, notes = load_model(source, device)
    dtype = getattr(torch, args.dtype)

    def autocast():
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype)

    results, start = {}, time.monotonic()
    for name in wanted:
        with _progress(len(items[name]), name) as update:
            results[name] = score(model, items[name], autocast=autocast, progress=update)
    seconds = time.monotonic() - start
    scored = results[wanted[0]]
    if not all(math.isfinite(loss) for rs in results.values() for r in rs for loss in r.losses):
        raise ValueError(f"{source}: the model's losses are not finite numbers, there is no score")
    if args.out:
        _write_results(args.out, results)

    n = len(scored)
    print("\n".join(notes))
    print(f"{n:,} items in {seconds:.1f} s, {args.dtype} on {device}")
    print(f"{'':20}{'accuracy':>10}{'±':>8}   GPT-2 124M  GPT-3 124M  chance")
    for convention, attribute, name, reference in MEASURES:
        if convention in results:
            p = accuracy(results[convention], attribute)
            error = math.sqrt(p * (1 - p) / n)
            gpt2, gpt3 = reference.get("GPT-2", ""), reference.get("GPT-3", "")
            print(f"{name:20}{p:>10.4f}{error:>8.4f}   {gpt2:>10}  {gpt3:>10}    0.25")
    print("± is one standard error of the sample of items")
    if n != NUM_ITEMS:
        print(f"OpenAI's figures are of all {NUM_ITEMS:,} items, here are {n:,} of them")
    if cut := sum(r.cut for r in scored):
        print(f"{cut} items were longer than the model's {model.seq_len} positions and were cut")
    if not all(item.exact for item in items.get("harness", ())):
        print("harness: the file has no ctx_a and ctx_b, their capitals are missing from the text")
    if args.out:
        print(f"wrote {args.out}")


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = argparse.ArgumentParser(description="Score a checkpoint on HellaSwag.")
    parser.add_argument("--checkpoint", metavar="SOURCE", help="a checkpoint, a run's folder, a Hugging Face folder, a hub id (gpt2), or latest [latest in checkpoints/]")  # noqa: E501
    parser.add_argument("--file", default=DEFAULT_FILE, help=f"validation items as JSON lines [{DEFAULT_FILE}]")  # noqa: E501
    parser.add_argument("--download", action="store_true", help="fetch the items to --file first; without --checkpoint, only that")  # noqa: E501
    parser.add_argument("--url", default=URL, help="where --download finds them [the authors' repository]")  # noqa: E501
    parser.add_argument("--out", metavar="FILE", help="per-item results as JSON lines: ind, label, predicted, losses")  # noqa: E501
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items [all]")
    parser.add_argument("--convention", choices=("both", "gpt2", "harness"), default="both", help="how an item becomes text, and what wins [both]")  # noqa: E501
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps [the best there is]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision of the matrix products [float32]")  # noqa: E501
    # fmt: on
    args = parser.parse_args(argv)
    try:
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"--limit {args.limit}: give at least 1")
        if args.download:
            download(args.file, args.url)
        if args.download and args.checkpoint is None:
            print("score a checkpoint on them: python src/hellaswag.py --checkpoint latest")
        else:
            evaluate(args)
    except ValueError as e:
        print(f"hellaswag.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
