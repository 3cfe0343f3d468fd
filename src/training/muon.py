"""Muon on the hidden matrices, fused AdamW on everything else, behind one optimizer's interface.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): instead of the momentum of a
matrix' gradient the nearest matrix is added whose singular values are all about 1, so that every
direction is learned at the same rate. The arithmetic is that of `torch.optim.Muon` with
`adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv 2502.16982), under which AdamW's learning
rate and weight decay keep their meaning. What that class does not have is here: skipping an update
on the device (`found_inf`), parameters made of several matrices (query, key and value in one), and
sharing the work among processes.
"""

import torch
import torch.distributed

from training.sharding import as_part_of, local, shared_out, whole

# A step of the iteration is x <- a x + b (x x') x + c (x x')^2 x. These coefficients grow small
# singular values fast and are not meant to converge: five steps end between 0.7 and 1.2.
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5


def orthogonalized(x, dtype: torch.dtype):
    """Return roughly the nearest semi-orthogonal matrices of x (..., m, n).

    Newton-Schulz iteration in `dtype`, which is also the result's; singular values 0.7 to 1.2.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # the products below are of the shorter side
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(STEPS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, gram, x, beta=A)
    return x.mT if tall else x


# The second is what PyTorch before 2.13 calls it.
_all_gather = getattr(
    torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor
)


def _cost(p, group) -> int:
    """Return what orthogonalizing a matrix costs, up to a factor."""
    return p.numel() * min(p.size(0) // group["parts"], p.size(1))


class MuonAdamW(torch.optim.Optimizer):
    """The groups `muon` by Muon and those of `adamw` by it; one `lr` and `found_inf` for both.

    muon: groups {"params": matrices (m, n), "parts": how many matrices lie in each one, one below
    the other, "weight_decay", "momentum"}. dtype: of the orthogonalization.

    With several processes, whose gradients are equal, each orthogonalizes a share of the matrices
    and one all_gather brings the rest. What a checkpoint needs is the same on all of them.
    """

    found_inf: torch.Tensor | None = None  # (), on the device; not 0: leave everything as it is

    def __init__(self, muon: list[dict], adamw: torch.optim.AdamW, dtype: torch.dtype):
        self.adamw, self.dtype = adamw, dtype
        super().__init__([{"lr": 0.0, **g} for g in muon] + adamw.param_groups, defaults={})
        several = torch.distributed.is_initialized()
        self.world_size = torch.distributed.get_world_size() if several else 1
        self.rank = torch.distributed.get_rank() if several else 0

    @torch.no_grad()
    def step(self, closure=None):
        """Make one update, without waiting for the device."""
        assert closure is None
        # AdamW works on these groups and this state, which are what is saved and loaded.
        self.adamw.param_groups = [g for g in self.param_groups if "parts" not in g]
        self.adamw.state, self.adamw.found_inf = self.state, self.found_inf
        self.adamw.step()

        keep, matrices = self._keep(), self._matrices()
        for p, group in matrices:
            self._observe(p, group)
        if self._sharded(matrices):  # alike beside each other: each process takes one of a few
            matrices.sort(key=lambda pg: _cost(*pg))
        for (p, group), update in zip(matrices, self._updates(matrices), strict=True):
            rows, columns = p.size(0) // group["parts"], p.size(1)
            p = local(p)
            p.mul_(1 - keep * (group["lr"] * group["weight_decay"]))
            # Root mean square 0.2 of the rate, about that of AdamW's updates.
            p.add_(update * keep, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)

    def _keep(self):
        """Return 1, or 0 where the update is skipped, on the device."""
        return 1.0 if self.found_inf is None else (self.found_inf == 0).float()

    def _matrices(self) -> list:
        """Return (parameter, its group) of all that Muon has."""
        return [(p, g) for g in self.param_groups if "parts" in g for p in g["params"]]

    def _updates(self, matrices):
        """Return an iterator over the orthogonal update of each (parameter, its group)."""
        if self._sharded(matrices):
            return self._sharded_updates(matrices)
        return self._one_each(matrices, self._update, [p for p, _ in matrices], self.dtype)

    def _one_each(self, matrices, make, likes, dtype):
        """Yield make(parameter, its group) of each, made in one process only; likes: tensors of
        the shapes that come out."""
        if self.world_size == 1:
            for p, group in matrices:
                yield make(p, group)
            return
        # The costliest first, each to the process that has least: the same plan everywhere.
        load, lengths, places = [0] * self.world_size, [0] * self.world_size, {}
        cost = [_cost(p, group) for p, group in matrices]
        for i in sorted(range(len(matrices)), key=lambda i: -cost[i]):
            rank = load.index(min(load))
            places[i] = rank, lengths[rank]
            load[rank] += cost[i]
            lengths[rank] += likes[i].numel()
        mine = torch.zeros(max(lengths), dtype=dtype, device=matrices[0][0].device)
        for i, (p, group) in enumerate(matrices):
            rank, start = places[i]
            if rank == self.rank:
                mine[start : start + likes[i].numel()] = make(p, group).flatten()
        everything = mine.new_empty(self.world_size * len(mine))
        _all_gather(everything, mine)
        for i, like in enumerate(likes):
            rank, start = places[i]
            start += rank * len(mine)
            yield everything[start : start + like.numel()].view_as(like)

    def _sharded_updates(self, matrices):
        """Yield this process's rows of the updates, where each has some rows of each matrix: as
        many matrices as there are processes are put together at a time, each process
        orthogonalizes one of them and gives out its rows."""
        for start in range(0, len(matrices), self.world_size):
            some, updates = matrices[start : start + self.world_size], []
            for rank, (p, group) in enumerate(some):
                direction = whole(as_part_of(p, self._direction(p, group)))
                updates.append(torch.empty(p.shape, dtype=self.dtype, device="meta"))
                if rank == self.rank:
                    updates[-1] = self._orthogonalized(direction, group["parts"])
            for rank, (p, _) in enumerate(some):
                yield local(shared_out(updates[rank], p, source=rank))

    @staticmethod
    def _sharded(matrices) -> bool:
        return bool(matrices) and local(matrices[0][0]) is not matrices[0][0]

    def _observe(self, p, group):
        """Take the gradient of a matrix into its momentum; of a sharded one, the rows here."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = local(state["momentum_buffer"])
        buffer.lerp_(self._gradient(p, instead=buffer), 1 - group["momentum"])

    def _gradient(self, p, instead):
        """Return a matrix' gradient or, where it is bad, what stands in for it."""
        grad = local(p.grad)
        return grad if self.found_inf is None else torch.where(self.found_inf == 0, grad, instead)

    def _direction(self, p, group):
        """Return what Nesterov's rule makes of gradient and momentum; of a sharded matrix, for the
        rows in this process."""
        buffer = local(self.state[p]["momentum_buffer"])
        return self._gradient(p, instead=buffer).lerp(buffer, group["momentum"])

    def _update(self, p, group):
        return self._orthogonalized(self._direction(p, group), group["parts"])

    def _orthogonalized(self, direction, parts: int):
        x = direction.view(parts, -1, direction.size(1))
        return orthogonalized(x, self.dtype).reshape(direction.shape)
