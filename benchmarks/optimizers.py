"""What the best public recipes do beside Muon, tried on top of `--recipe fast`.

    python benchmarks/optimizers.py --experiment cautious --recipe fast --data_dir data/books
    python benchmarks/optimizers.py --cost --size 4x128
    python benchmarks/optimizers.py --convert data/books data/books4096 --vocabulary 4096
    python benchmarks/optimizers.py --cut data/books4096 data/documents4096 --vocabulary 4096

The first line trains: all other flags are src/train_improved.py's; several names, joined by commas,
work together. benchmarks/learning.py runs it as the arm fast+cautious. The second prints the
processor time of an update, alone and as a share of a step. None of it is in the program. What an
experiment needs to be resumed is in its checkpoint.

--vocabulary 4096 trains with the first 4,095 tokens of GPT-2's own BPE, on shards that --convert
wrote: every other token is spelled by those. Of a 4x128 with all 50,257 tokens 89% is embeddings,
where Muon and AdamW do not differ, and 90% of the time their products; with 4,096 it is 40%, near
the 31% of the 124M model, at a fifth of the time.

--cut makes documents about as long as a window, as FineWeb-Edu's are, of a stream that has books in
it: consecutive pieces of log-normal lengths, shuffled, so that neighbours have nothing to do with
each other. The experiments on documents are all validated alike: each document by itself.

Sources: modded-nanogpt's optimizer benchmark (track 3, 2026) for floor, momentum, ema, lookahead,
power and beta2; Polar Express arXiv 2505.16932, cautious weight decay 2510.12402, SOAP 2409.11321.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import train_improved as ti
from runtime.supervisor import begin, end
from tokens import shards, tokenizer
from tokens.stream import WindowSource
from training import chunked_loss, muon

EXPERIMENTS = {
    "polar": "Polar Express' coefficients instead of Newton-Schulz' five equal steps",
    "cautious": "weight decay only where the update points the same way",
    "power": "constant for a quarter of the run, then (remaining share)^1.2",
    "floor": "each row moves at least 1.3% of its length at the peak rate",
    "momentum": "Muon's from 0.85 up in the first tenth, down to it in the last",
    "ema": "the last weights blended 0.4 : 0.6 with a mean over the end of the run",
    "lookahead": "gradients taken 0.3 of the mean step further on, until two thirds of the run",
    "soap1": "momentum scaled as by Adam in Shampoo's eigenbasis, renewed each step, then Muon",
    "soap10": "the same, the basis renewed every ten steps",
    "aux0.5": "AdamW's part at half the rate",
    "aux2": "AdamW's part at twice the rate",
    "beta2": "0.99 instead of 0.95 for the vectors",
}
DOCUMENTS = {
    "apart": "training as it is; documents by themselves in the validation, as in those below",
    "masked": "attention does not cross the border of a document",
    "restarted": "nor do positions: they begin at 0 in each document",
    "packed": "as restarted, but validated as any text is, window after window",
    "starts": "each window begins where a document does, what is left of a long one is not read",
}
EXPERIMENTS |= DOCUMENTS
ON: set[str] = set()  # what this process tries
NOW = {"step": 0, "steps": 1, "max_lr": 1.0}  # of the schedule, when the optimizer is called


def polar_express(x, dtype: torch.dtype):
    """As muon.orthogonalized, each of the five steps with coefficients of its own."""
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02).clamp(min=1e-7)).to(dtype)
    for a, b, c in (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


plain_features = ti.GPT.features


def features(self, idx, positions=None, mask=None, cache=None):
    """As GPT.features, with documents apart: in training by the experiment, always without it."""
    training = torch.is_grad_enabled()
    apart = ON & ({"masked", "restarted", "packed"} if training else {*DOCUMENTS} - {"packed"})
    if apart and mask is None and cache is None:
        begins, at = idx == ti.VOCAB_SIZE - 1, torch.arange(idx.size(1), device=idx.device)
        document = begins.cumsum(1)[:, None]
        mask = (document[..., None] == document[..., None, :]) & (at[:, None] >= at)
        if not training or ON & {"restarted", "packed"}:
            positions = at - torch.where(begins, at, 0).cummax(1).values
    return plain_features(self, idx, positions, mask, cache)


class AtStarts:
    """A stream whose windows begin at the first document that begins in or after them."""

    def __init__(self, stream):
        self.tokens = stream.read(0, stream.num_tokens)
        self.starts = np.flatnonzero(self.tokens == ti.VOCAB_SIZE - 1)

    def windows(self, index: np.ndarray, T: int) -> np.ndarray:
        last = np.searchsorted(self.starts, len(self.tokens) - T - 1, "right") - 1
        begin = self.starts[np.searchsorted(self.starts, index * T).clip(max=last)]
        return self.tokens[begin[:, None] + np.arange(T + 1)]


plain_windows = WindowSource.windows


def windows_at_starts(self, positions):
    """As WindowSource.windows, which training reads by, at the beginnings of documents."""
    if not isinstance(self.streams[0], AtStarts):
        self.streams = [AtStarts(stream) for stream in self.streams]
    return plain_windows(self, positions)


plain_rate = ti.learning_rate


def learning_rate(step: int, cfg) -> float:
    """As train_improved's, and remembered."""
    NOW.update(step=step, steps=cfg.max_steps, max_lr=cfg.max_lr)
    if "power" not in ON or step <= cfg.warmup_steps:
        return plain_rate(step, cfg)
    return cfg.max_lr * min(1.0, (1 - step / cfg.max_steps) / 0.75) ** 1.2


class Tried(muon.MuonAdamW):
    def __init__(self, groups, adamw, dtype):
        super().__init__(groups, adamw, dtype)
        for group in self.param_groups:
            if "cautious" in ON and "parts" in group:
                group["cautious_decay"], group["weight_decay"] = group["weight_decay"], 0.0
            if "beta2" in ON and "parts" not in group and group["weight_decay"] == 0:
                group["betas"] = (group["betas"][0], 0.99)

    @torch.no_grad()
    def step(self, closure=None):
        done = NOW["step"] / NOW["steps"]
        for group in self.param_groups:
            if "parts" not in group:
                group["lr"] *= 0.5 if "aux0.5" in ON else 2.0 if "aux2" in ON else 1.0
            elif "momentum" in ON:
                group["momentum"] = 0.85 + 0.1 * min(1.0, done / 0.1, (1 - done) / 0.1)
        super().step()
        everything = [p for group in self.param_groups for p in group["params"]]
        if "ema" in ON:
            self._average([p for p in everything if p.size(0) != ti.VOCAB_SIZE], done)
        if "lookahead" in ON:
            self._look_ahead(everything, done)

    def _average(self, params, done: float):
        for p in params if done > 0.83 else ():
            mean = self.state[p].setdefault("mean", p.clone())
            mean.lerp_(p, 1 / (0.05 * NOW["steps"]))
            if done == 1:
                p.lerp_(mean, 0.6)

    def _look_ahead(self, params, done: float):
        """Leave p = x + beta m, m being the mean of x's steps: the next gradient is taken there."""
        beta = 0.3 * self.param_groups[0]["lr"] / NOW["max_lr"] if 0.1 < done < 0.67 else 0.0
        for p in params:
            state = self.state[p]
            if "x" not in state:
                state["x"], state["m"] = p.clone(), torch.zeros_like(p)
            state["m"].lerp_(p - state["x"], min(1.0, 30 / NOW["steps"]))
            state["x"].copy_(p)
            p.add_(state["m"], alpha=beta)

    def _direction(self, p, group):
        direction = super()._direction(p, group)
        # Step 0 is the skipped update that makes the moments.
        if not {"soap1", "soap10"} & ON or NOW["step"] == 0:
            return direction
        G, D = (x.view(group["parts"], -1, p.size(1)).float() for x in (p.grad, direction))
        state = self.state[p]
        if "left" not in state:
            state |= {"left": G @ G.mT, "right": G.mT @ G, "square": torch.zeros_like(G)}
            state |= {f"Q_{side}": torch.linalg.eigh(state[side])[1] for side in ("left", "right")}
        state["left"].lerp_(G @ G.mT, 0.05)
        state["right"].lerp_(G.mT @ G, 0.05)
        if "soap1" in ON or NOW["step"] % 10 == 0:  # one step of the power iteration
            for side in ("left", "right"):
                state[f"Q_{side}"] = torch.linalg.qr(state[side] @ state[f"Q_{side}"])[0]
        left, right = state["Q_left"], state["Q_right"]
        state["square"].lerp_((left.mT @ G @ right).square(), 0.05)
        scale = (state["square"] / (1 - 0.95 ** NOW["step"])).sqrt() + 1e-12
        scaled = (left.mT @ D @ right) / scale
        return (left @ scaled @ right.mT).view_as(p)

    def _updates(self, matrices):
        for (p, group), update in zip(matrices, super()._updates(matrices), strict=True):
            if "floor" in ON:
                rms = 0.2 * max(p.size(0) // group["parts"], p.size(1)) ** 0.5
                moved = NOW["max_lr"] * rms * update.norm(dim=1, keepdim=True).float()
                least = 0.013 * p.norm(dim=1, keepdim=True)
                update = update * (least / moved.clamp(min=1e-12)).clamp(min=1.0)
            if "cautious" in ON:
                p.mul_(1 - self._keep() * group["lr"] * group["cautious_decay"] * (update * p > 0))
            yield update


def switch_on(names: str) -> None:
    """Put the experiments into the program. ValueError for one that there is not."""
    ON.clear()
    ON.update(name for name in names.split(",") if name)
    if ON - set(EXPERIMENTS):
        what = "\n  ".join(f"{name}: {text}" for name, text in EXPERIMENTS.items())
        raise ValueError(f"--experiment {names}: there are\n  {what}")
    muon.orthogonalized = polar_express if "polar" in ON else plain_orthogonalized
    muon.MuonAdamW = Tried
    ti.learning_rate = learning_rate
    ti.GPT.features = features
    WindowSource.windows = windows_at_starts if "starts" in ON else plain_windows


plain_orthogonalized = muon.orthogonalized


def set_vocabulary(size: int) -> None:
    """Have the program build and train a model of this many tokens."""
    ti.VOCAB_SIZE = chunked_loss.VOCAB_SIZE = size
    chunked_loss.PADDED_VOCAB = -(-size // 64) * 64


def convert(source: Path, target: Path, size: int) -> None:
    """Spell the tokens of prepared shards with the first size - 1 of GPT-2's; the last is EOT."""
    whole = tokenizer.get_tokenizer()
    pieces = [whole.decode_single_token_bytes(i) for i in range(tokenizer.EOT)]
    few = tiktoken.Encoding(
        name="few",
        pat_str=tokenizer.PATTERN,
        mergeable_ranks={piece: i for i, piece in enumerate(pieces[: size - 1])},
        special_tokens={"<|endoftext|>": size - 1},
    )
    spelled = [np.array(few._encode_single_piece(piece), np.uint16) for piece in pieces]
    spelled.append(np.array([size - 1], np.uint16))
    target.mkdir(parents=True)
    for split in ("train", "val"):
        stream = shards.open_split(source, split)
        tokens = np.concatenate([spelled[i] for i in stream.read(0, stream.num_tokens)])
        shards.write_shard(target / f"{target.name}_{split}_000000.bin", tokens)
        print(f"{split}: {stream.num_tokens:,} tokens, now {len(tokens):,}")


def cut(source: Path, target: Path, length: int, eot: int) -> None:
    """Cut the texts of prepared shards into documents of `length` tokens on average, shuffled.

    Log-normal with sigma 1: the mean of FineWeb-Edu's documents is 1.6 times their median.
    """
    target.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        stream = shards.open_split(source, split)
        tokens = stream.read(0, stream.num_tokens)
        tokens = tokens[tokens != eot]
        count = 2 * len(tokens) // length
        lengths = np.exp(generator.normal(np.log(length) - 0.5, 1.0, count)).astype(int) + 1
        documents = np.split(tokens, lengths.cumsum()[lengths.cumsum() < len(tokens)])
        order = generator.permutation(len(documents))
        pieces = [piece for i in order for piece in (np.array([eot], np.uint16), documents[i])]
        shards.write_shard(target / f"{target.name}_{split}_000000.bin", np.concatenate(pieces))
        print(f"{split}: {len(documents):,} documents of {len(tokens) / len(documents):.0f} tokens")


def cost(size: str, tokens: int = 1024, seq_len: int = 128) -> None:
    """Print the processor time of an update with each experiment, and of the rest of a step."""
    layers, width = (int(n) for n in size.split("x"))
    torch.manual_seed(0)
    model = ti.GPT(layers, max(1, width // 64), width, seq_len)
    ids = torch.randint(ti.VOCAB_SIZE, (tokens // seq_len, seq_len + 1))

    def seconds(function) -> float:
        start = time.process_time()
        for _ in range(10):
            function()
        return (time.process_time() - start) / 10

    def gradients():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids[:, :-1], ids[:, 1:]).backward()

    rest = seconds(gradients)
    print(f"{size}, {tokens} tokens a step; forward and backward: 1")
    print("| update | relative to forward and backward | whole step relative to fast's |")
    print("|---|---|---|")
    fast = None
    for name in ("adamw", "fast", *(n for n in EXPERIMENTS if n not in DOCUMENTS)):
        switch_on("" if name in ("adamw", "fast") else name)
        cfg = ti.Config(optimizer="adamw" if name == "adamw" else "muon", max_lr=1e-3)
        optimizer = ti.make_optimizer(model, cfg)
        NOW.update(step=100, steps=112 if name == "ema" else 300, max_lr=1e-3)

        def update(optimizer=optimizer):
            NOW["step"] += 1
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            optimizer.step()

        update()  # creates its state
        spent = seconds(update)
        fast = spent if name == "fast" else fast
        whole = "" if fast is None else f"{(rest + spent) / (rest + fast):.2f}"
        print(f"| {name} | {spent / rest:.2f} | {whole} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--experiment", default="", help=", ".join(EXPERIMENTS))
    parser.add_argument("--cost", action="store_true", help="time the updates and stop")
    parser.add_argument("--vocabulary", type=int, default=tokenizer.VOCAB_SIZE, help="tokens")
    parser.add_argument("--convert", nargs=2, type=Path, help="shards to read, folder to write")
    parser.add_argument("--cut", nargs=2, type=Path, help="shards to read, folder to write")
    parser.add_argument("--length", type=int, default=128, help="mean tokens of --cut's documents")
    parser.add_argument("--size", default="4x128", help="layers x width, for --cost")
    args, flags = parser.parse_known_args()
    if args.convert:
        convert(*args.convert, args.vocabulary)
        return 0
    set_vocabulary(args.vocabulary)
    if args.cut:
        cut(*args.cut, args.length, args.vocabulary - 1)
        return 0
    if args.cost:
        cost(args.size)
        return 0
    try:
        switch_on(args.experiment)
    except ValueError as error:
        parser.error(str(error))
    sys.argv[1:] = flags
    return ti.main()


if __name__ == "__main__":
    begin()
    end(main())
