"""HellaSwag: which of four endings does the model find most likely? Chance is 0.25.

    python src/hellaswag.py --download                     fetch the 10,042 validation items (12 MB)
    python src/hellaswag.py                                score the newest checkpoint
    python src/hellaswag.py --checkpoint checkpoints/RUN/step_00005000.pt --out results.jsonl
    python src/hellaswag.py --checkpoint exported/RUN         a Hugging Face folder; or gpt2

Zellers et al. 2019, https://github.com/rowanz/hellaswag. How items are read and scored, and the two
conventions in use: training/scoring.py.
"""

import functools
import hashlib
import http.client
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from basics import durable, terminal, words

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train_improved.py, before torch

DEFAULT_FILE = "data/hellaswag/hellaswag_val.jsonl"

# --- Download -------------------------------------------------------------------------------------

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
NUM_ITEMS = 10_042
ATTEMPTS = 3
TIMEOUT = 60  # seconds without a byte
CUT_OFF = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def download(path, url: str = URL) -> None:
    """Fetch the validation items to `path`; the file appears whole and checked, or not at all.

    A transfer that is cut begins again from the start (it is 12 MB). Raise ValueError if there is
    no connection, not the expected content, no place to write, or something else at `path`.
    """
    from training.scoring import load_items

    path = Path(path)
    if path.exists():
        print(f"{path} is already there: {len(load_items(path)):,} items")
        return
    try:
        durable.make_folder(path.absolute().parent)
        with durable.replacing(path) as file:
            _fetch(url, file)
            digest = hashlib.sha256(Path(file.name).read_bytes()).hexdigest()
            if url == URL and digest != SHA256:
                raise ValueError(f"{url} is not the known file: SHA-256 {digest}, not {SHA256}")
            try:
                items = load_items(file.name)
            except ValueError as e:
                raise ValueError(f"{url} is not a HellaSwag file: {e}") from None
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror or e}") from None
    print(f"{path}: {len(items):,} items")


def _fetch(url: str, file) -> None:
    """Write what `url` gives into an empty file; raise ValueError after some attempts."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                announced = int(response.headers["Content-Length"] or 0)
                print(
                    f"downloading {url} ({words.size(announced) if announced else 'size unknown'})"
                )
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                file.flush()
            if not announced or file.tell() == announced:
                return
            raise ConnectionError(f"the transfer ended after {file.tell():,} of {announced} bytes")
        except CUT_OFF as e:
            if attempt == ATTEMPTS or isinstance(e, urllib.error.HTTPError):
                raise ValueError(
                    f"cannot download {url}: {e}; try again, or fetch it by other means and give "
                    "it with --file"
                ) from None
            print(f"  {e}: beginning again, attempt {attempt + 1} of {ATTEMPTS}")
            file.seek(0)
            file.truncate()


# --- The command ----------------------------------------------------------------------------------


# What is measured: convention, Result's attribute, name, and OpenAI's 124M models on all the items.
MEASURES = (
    ("gpt2", "predicted", "gpt2: mean loss", {"GPT-2": 0.2955, "GPT-3": 0.337}),
    ("harness", "predicted_acc", "harness: acc", {"GPT-2": 0.2892}),
    ("harness", "predicted_acc_norm", "harness: acc_norm", {"GPT-2": 0.3114}),
)


def _write_results(path, results: dict) -> None:
    """Write JSON lines: ind, label, predicted, losses (gpt2's, if scored), the harness' choices."""
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
        raise ValueError(f"--out {path}: cannot be written ({e.strerror})") from None


def evaluate(args) -> None:
    """Score a model and print the table; raise ValueError for what the user has to change."""
    import torch
    from tqdm import tqdm

    import train_improved
    from checkpointing import pretrained
    from runtime import machine
    from training.scoring import accuracy, load_items, score

    device = machine.choose_device(args.device)
    wanted = ("gpt2", "harness") if args.convention == "both" else (args.convention,)
    if not Path(args.file).exists():
        raise ValueError(
            f"--file {args.file} is not there: add --download to fetch it, or name another"
        )
    items = {name: load_items(args.file, name)[: args.limit] for name in wanted}
    if args.out:
        durable.check_writable(Path(args.out).parent)
    source = args.checkpoint or "latest"
    model, notes = pretrained.load_model(train_improved.GPT, source, device)
    dtype, reduced = getattr(torch, args.dtype), args.dtype != "float32"
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=reduced)

    results, start = {}, time.monotonic()
    every = 0.1 if sys.stderr.isatty() else 30  # seconds: in a log file rarely
    for name in wanted:
        total = len(items[name])
        with tqdm(total=total, desc=name, unit="item", leave=False, mininterval=every) as bar:
            results[name] = score(model, items[name], autocast=autocast, progress=bar.update)
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


@terminal.command
def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = terminal.Parser(description="Score a checkpoint on HellaSwag.")
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
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: give at least 1")
    if args.download:
        download(args.file, args.url)
    if args.download and args.checkpoint is None:
        print("score a checkpoint on them: python src/hellaswag.py --checkpoint latest")
    else:
        evaluate(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
