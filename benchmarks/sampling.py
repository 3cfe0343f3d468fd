"""Sampling with kept keys and values against a whole forward pass for every token, same model.

    python benchmarks/sampling.py                        124M, random weights, 512 tokens
    python benchmarks/sampling.py --tokens 256 --prompts 1 --dtypes bfloat16 --device cuda

The slow way is the usual one (nanoGPT's sample.py): autocast, and at each token all the positions
before it again. It is timed at every 64th length (--every) and the times between are interpolated.
All the tokens of the fast way are checked against one forward pass without a cache: with the same
random numbers it must choose the same ones (in float32). Weights are random: they do not change
the time. Processor time is what to look at on a CPU that others use, too. Last printed line: the
ratios.
"""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train_improved.py, before torch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
import train_improved
from runtime import machine
from tokens import tokenizer
from training import generation

TEXTS = (
    "Hello, I'm a language model,",
    "The",
    "In the year of our Lord one thousand eight hundred and",
    "It was",
)


def clock(device) -> np.ndarray:
    """(wall, processor) seconds."""
    machine.wait_for(device)
    return np.array([time.perf_counter(), time.process_time()])


def without_cache(model, rows, lengths, autocast) -> np.ndarray:
    """(wall, processor) seconds of the tokens before which the text has these lengths."""
    device, seconds = model.lm_head.weight.device, []
    with torch.no_grad(), autocast():
        for length in [lengths[0], *lengths]:  # the first is not counted: it casts the weights
            ids = torch.randint(0, tokenizer.VOCAB_SIZE, (rows, length), device=device)
            start = clock(device)
            logits = model.logits(model.features(ids)[:, -1]) / 0.8
            least = logits.topk(50).values[:, -1:]
            probs = logits.masked_fill(logits < least, -torch.inf).softmax(dim=-1)
            torch.multinomial(probs, 1)
            seconds.append(clock(device) - start)
    return np.array(seconds[1:])


def same_tokens(model, prompt, row, draws) -> int:
    """How many of row's tokens a forward pass over the whole text chooses, too."""
    device = model.lm_head.weight.device
    ids = torch.tensor([prompt + row], device=device)
    with torch.no_grad():
        logits = model.logits(model.features(ids[:, :-1])[0, len(prompt) - 1 :])
        chosen = generation.choose(logits, draws[: len(row)].to(device), 0.8, 50, 1.0)
    return int((chosen == ids[0, len(prompt) :]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="written after each prompt")
    parser.add_argument("--every", type=int, default=64, help="lengths timed without a cache")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4], help="at once")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    enc = tokenizer.get_tokenizer()
    device = machine.choose_device(args.device)

    torch.manual_seed(0)
    plain = train_improved.GPT(n_layer=12, n_head=12, n_embd=768, seq_len=1024).to(device).eval()
    print(f"GPT-2 124M, {args.device}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}: {args.tokens} tokens, top-k 50")  # fmt: skip
    ratios = []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        model = train_improved.GPT(n_layer=12, n_head=12, n_embd=768, seq_len=1024).to(device)
        model.load_state_dict(plain.state_dict())
        model = model.to(dtype).eval()  # as sample.py does: cast once
        low = dtype != torch.float32
        autocast = (
            (lambda d=dtype: torch.autocast(device.type, d)) if low else contextlib.nullcontext
        )
        for count in args.prompts:
            prompts = [enc.encode(TEXTS[i % len(TEXTS)]) for i in range(count)]
            list(generation.stream(model, prompts, 2, torch.Generator()))  # not timed: first use
            generator = torch.Generator().manual_seed(1)
            rows, start = [[] for _ in prompts], clock(device)
            for tokens in generation.stream(model, prompts, args.tokens, generator):
                for row, token in zip(rows, tokens, strict=True):
                    row += [token] if token is not None else []
            fast = clock(device) - start

            n = max(len(prompt) for prompt in prompts)
            lengths = [*range(n, n + args.tokens, args.every), n + args.tokens - 1]
            slow = without_cache(plain, count, lengths, autocast)
            each = np.arange(n, n + args.tokens)
            slow = np.array([np.interp(each, lengths, column).sum() for column in slow.T])
            written = sum(map(len, rows))
            rate = written / fast[0]
            generator, same = torch.Generator().manual_seed(1), 0
            for prompt, row in zip(prompts, rows, strict=True):
                same += same_tokens(model, prompt, row, torch.rand(1024, generator=generator))
            print(f"{name:9}{count:3} prompt(s): {rate:7.1f} tokens/s, {fast[1] / args.tokens:.4f} "
                  f"processor seconds a step; without a cache {slow[1] / args.tokens:.4f}; "
                  f"{same} of {written} tokens the same")  # fmt: skip
            assert low or same == written
            ratios.append(f"{name} x {count} {slow[0] / fast[0]:.1f} ({slow[1] / fast[1]:.1f})")
    print("times as fast (by processor time): " + ", ".join(ratios))


if __name__ == "__main__":
    main()
