"""HellaSwag by lm-evaluation-harness and by src/hellaswag.py, on one exported model, item by item.

    pip install lm_eval==0.4.13 accelerate        (best in a virtual environment of its own)
    python src/export.py latest exported/tiny
    python benchmarks/harness_parity.py exported/tiny
    python benchmarks/harness_parity.py exported/tiny --file ITEMS.jsonl --limit 200 --device cuda

The harness runs offline: its own task hellaswag, included by one that reads a local file instead.
Where the items lack ctx_a and ctx_b (halves of ctx, of which the harness capitalises the second),
ctx is cut before its last sentence if that begins in lower case, as it does in the original. Both
then read the same file. Last printed line: how far apart they are. Exit code 1 if an accuracy
differs.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train_improved.py, before torch
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # before a hellaswag.py beside this one

import hellaswag
from checkpointing import pretrained
from train_improved import GPT
from training import scoring


def with_halves(line: str) -> str:
    """The item with ctx_a and ctx_b, so that ctx_a + " " + ctx_b is ctx."""
    record = json.loads(line)
    if "ctx_a" not in record:
        cut = re.fullmatch(r"(.*[.!?]) ([a-z].*?)", record["ctx"], re.S)
        record["ctx_a"], record["ctx_b"] = cut.groups() if cut else (record["ctx"], "")
    return json.dumps(record) + "\n"


def by_harness(folder: str, items: Path, device: str, batch_size: int) -> tuple[dict, list]:
    """Its results, and the four summed log-likelihoods of each item in the file's order."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    task = items.with_name("hellaswag_local.yaml")
    original = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    task.write_text(
        f"include: {original}\ntask: hellaswag_local\ndataset_path: json\ntraining_split: null\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {items}\n"
    )
    model = HFLM(pretrained=folder, device=device, dtype="float32", batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=model, tasks=[str(task)], bootstrap_iters=0)
    samples = sorted(found["samples"]["hellaswag_local"], key=lambda s: s["doc_id"])
    sums = [[log_likelihood for log_likelihood, _ in s["filtered_resps"]] for s in samples]
    return found["results"]["hellaswag_local"], sums


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of a model that src/export.py wrote")
    parser.add_argument("--file", default=hellaswag.DEFAULT_FILE, help="items as JSON lines")
    parser.add_argument("--limit", type=int, help="only the first items [all]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, default=16, help="of the harness, in sequences")
    args = parser.parse_args()

    lines = Path(args.file).read_text(encoding="utf-8").splitlines()[: args.limit]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "items.jsonl")
        path.write_text("".join(map(with_halves, lines)), encoding="utf-8")
        items = scoring.load_items(path, "harness")
        model, notes = pretrained.load_model(GPT, args.folder, torch.device(args.device))
        print("\n".join(notes))
        start = time.process_time()
        ours = scoring.score(model, items)
        middle = time.process_time()
        theirs, sums = by_harness(args.folder, path, args.device, args.batch_size)
        end = time.process_time()

    equal = True
    print(f"{len(items):,} items{'ours':>17}{'harness':>12}")
    for metric in ("acc", "acc_norm"):
        here = scoring.accuracy(ours, f"predicted_{metric}")
        there = theirs[f"{metric},none"]
        equal &= abs(here - there) < 1e-9
        print(f"{metric:20}{here:>10.4f}{there:>12.4f}")
    print(f"{'processor seconds':20}{middle - start:>10.1f}{end - middle:>12.1f}")
    cut = sum(r.cut for r in ours)
    if cut:
        print(f"{cut} items are longer than the model's {model.seq_len} positions: cut differently")
    apart = [abs(a + b) for r, s in zip(ours, sums, strict=True) for a, b in zip(r.sums, s)]  # noqa: B905
    other = sum(
        max(range(4), key=s.__getitem__) != r.predicted_acc for r, s in zip(ours, sums, strict=True)
    )
    print(
        f"{'equal' if equal else 'DIFFERENT'}: summed losses at most {max(apart):.1e} nats apart, "
        f"{other} items with another choice"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
