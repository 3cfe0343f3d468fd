"""Muon on the hidden matrices, fused AdamW on everything else, behind one optimizer's interface.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): the momentum of a matrix'
gradient is replaced by the nearest matrix whose singular values are all about 1, so that every
direction is learned at the same rate. The arithmetic is that of `torch.optim.Muon` with
`adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv 2502.16982), under which AdamW's learning
rate and weight decay keep their meaning. What that class does not have is here: skipping an update
on the device (`found_inf`), matrices made of several (query, key and value in one), and sharing the
work among processes.
"""

import torch
import torch.distributed

# Each row (a, b, c) is a step x <- a x + b (x x') x + c (x x')^2 x. These five bring singular values
# from 0.01..1 to within 0.3 of 1; they are not meant to converge further (torch.optim.Muon's).
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 5
POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
import json,os
X = json.loads(os.environ.get('TRY', '{}'))


def orthogonalized(x, dtype: torch.dtype):
    """Nearest semi-orthogonal matrices, roughly (singular values 0.7 to 1.3), of x (..., m, n).

    Newton-Schulz iteration in `dtype`, which is also the result's.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    if X.get("polar"):
        x = x / 1.02
    for a, b, c in POLAR if X.get("polar") else COEFFICIENTS:
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """The groups of `muon` by Muon, those of `adamw` by it; one `lr` and `found_inf` for both.

    muon: list of groups {"params": 2-D parameters, "weight_decay": float, "momentum": float,
    "parts": int}, where `parts` says how many matrices lie in one parameter, one below the other.
    dtype: of the orthogonalization.

    With several processes (torch.distributed is initialised, gradients are equal everywhere) each
    orthogonalizes its share of the parameters and one all_gather brings the rest.
    """

    found_inf: torch.Tensor | None = None  # on the device: not 0 = leave everything as it is

    def __init__(self, muon: list[dict], adamw: torch.optim.AdamW, dtype: torch.dtype):
        self.adamw, self.dtype = adamw, dtype
        muon = [{"lr": 0.0, **group} for group in muon]
        super().__init__([*muon, *adamw.param_groups], defaults={})
        self.world_size, self.rank = 1, 0
        if torch.distributed.is_initialized():
            self.world_size = torch.distributed.get_world_size()
            self.rank = torch.distributed.get_rank()

    @torch.no_grad()
    def step(self, closure=None):
        """One update. No host synchronisation."""
        assert closure is None
        # AdamW works on our groups and state: they are what is saved and loaded.
        self.adamw.param_groups = [g for g in self.param_groups if "parts" not in g]
        self.adamw.state, self.adamw.found_inf = self.state, self.found_inf
        self.adamw.step()

        work = []  # (parameter, its group, what to orthogonalize)
        for group in self.param_groups:
            for p in group["params"] if "parts" in group else ():
                if p.grad is not None:
                    work.append((p, group, self._momentum(p, group["momentum"])))
        updates = self._own(work) if self.world_size == 1 else self._shared(work)
        for (p, group, _), update in zip(work, updates, strict=True):
            self._apply(p, group, update)

    def _momentum(self, p, momentum: float):
        """Updates the momentum of a matrix -> what Nesterov's rule makes of it (fp32, new)."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer, grad = state["momentum_buffer"], p.grad
        if self.found_inf is not None:  # a bad gradient: an average with itself stays as it is
            grad = torch.where(self.found_inf != 0, buffer, grad)
        buffer.lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum)

    def _orthogonalized(self, group, x):
        parts = x.view(group["parts"], -1, x.size(1))
        return orthogonalized(parts, self.dtype).reshape(x.shape)

    def _own(self, work):
        for _, group, x in work:
            yield self._orthogonalized(group, x)

    def _shared(self, work):
        """As _own, but each process computes a share and all of them are gathered at once."""
        # The costliest first, each to the process that has least: the same plan everywhere.
        cost = [x.numel() * min(x.size(0) // g["parts"], x.size(1)) for _, g, x in work]
        load, sizes, places = [0] * self.world_size, [0] * self.world_size, {}
        for i in sorted(range(len(work)), key=lambda i: -cost[i]):
            rank = load.index(min(load))
            places[i] = (rank, sizes[rank])
            load[rank] += cost[i]
            sizes[rank] += work[i][2].numel()
        device = work[0][2].device
        mine = torch.zeros(max(sizes), dtype=self.dtype, device=device)
        for i, (_, group, x) in enumerate(work):
            rank, start = places[i]
            if rank == self.rank:
                update = self._orthogonalized(group, x)
                mine[start : start + x.numel()] = update.reshape(-1)
        everything = torch.empty(self.world_size * len(mine), dtype=self.dtype, device=device)
        torch.distributed.all_gather_into_tensor(everything, mine)
        everything = everything.view(self.world_size, -1)
        for i, (_, _, x) in enumerate(work):
            rank, start = places[i]
            yield everything[rank, start : start + x.numel()].view_as(x)

    def _apply(self, p, group, update):
        """Weight decay and step. An update's root mean square is 0.2 times lr, as AdamW's is."""
        rows, columns = p.size(0) // group["parts"], p.size(1)
        lr = group["lr"]
        keep = 1.0 if self.found_inf is None else (self.found_inf == 0).float()
        if X.get("normuon"):
            update = update.float()
            state = self.state[p]
            if "row_square" not in state:
                state["row_square"] = torch.zeros_like(p[:, :1])
            square = update.square().mean(dim=1, keepdim=True)
            v = state["row_square"]
            if self.found_inf is not None:
                square = torch.where(self.found_inf != 0, v, square)
            v.lerp_(square, 1 - X["normuon"])
            new = update * (v + 1e-12).rsqrt()
            parts = (group["parts"], -1, p.size(1))
            n0 = update.view(parts).norm(dim=(1, 2), keepdim=True)
            n1 = new.view(parts).norm(dim=(1, 2), keepdim=True)
            update = (new.view(parts) * (n0 / n1.clamp(min=1e-12))).view_as(p)
        if X.get("cautious"):
            p.sub_(p * (keep * lr * group["weight_decay"]) * (update * p > 0))
        else:
            p.mul_(1 - keep * lr * group["weight_decay"])
        p.add_(update * keep, alpha=-lr * X.get("mscale", 0.2) * max(rows, columns) ** 0.5)
