"""SOAP's scaling before Muon's orthogonalization.

SOAP (Vyas et al. 2024, arXiv 2409.11321) is Adam in the basis of Shampoo's eigenvectors: there the
entries of a gradient differ most in size, and dividing each by its root mean square does most good.
Here it is the momentum that is divided so, turned back and then orthogonalized. Of a matrix' two
bases only that of its shorter side is used (one-sided, as the paper calls it): that of a
feed-forward matrix' longer side has 16 times the memory of its shorter one's.
"""

import torch

from training.muon import MuonAdamW

BETA = 0.95  # decay of the means over gradients
RENEWED_EVERY = 10  # updates; the paper's frequency, and as good as 1 (LAB_NOTES.md, 2026-11-25)


def with_short_rows(x, parts: int):
    """Return a matrix of several, one below the other, as (parts, longer side, shorter side)."""
    x = x.view(parts, -1, x.size(1))
    return x.mT if x.size(1) < x.size(2) else x


class SoapMuonAdamW(MuonAdamW):
    """As MuonAdamW; the matrices' momentum is scaled before it is orthogonalized.

    State of a matrix beside the momentum, s being its shorter side and G its gradients, laid so
    that rows are short: "covariance" (parts, s, s), the mean of G'G; "basis" (parts, s, s), about
    its eigenvectors; "square" (parts, longer, s), the mean square of the entries of G in that
    basis.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Make one update, without waiting for the device."""
        super().step(closure)
        first = self.param_groups[0]
        first["updates"] = first.get("updates", 0) + 1  # is saved
        if first["updates"] % RENEWED_EVERY:
            return
        matrices = self._matrices()
        bases = [self.state[p]["basis"] for p, _ in matrices]
        renewed = self._one_each(matrices, self._renewed, bases, torch.float32)
        for basis, new in zip(bases, renewed, strict=True):
            basis.copy_(new)

    def _observe(self, p, group):
        super()._observe(p, group)
        state, parts = self.state[p], group["parts"]
        G = with_short_rows(self._gradient(p, instead=0.0), parts)
        if "basis" not in state:
            state["basis"] = torch.eye(G.size(2), device=p.device).repeat(parts, 1, 1)
            state["covariance"] = torch.zeros_like(state["basis"])
            state["square"] = torch.zeros(G.shape, device=p.device)
        weight = (1 - BETA) * self._keep()
        state["covariance"].lerp_(G.mT @ G, weight)
        state["square"].lerp_((G @ state["basis"]).square(), weight)

    def _direction(self, p, group):
        D, state = with_short_rows(super()._direction(p, group), group["parts"]), self.state[p]
        # No correction for young means: what a matrix is multiplied by, orthogonalizing takes away.
        scaled = (D @ state["basis"]) / (state["square"].sqrt() + 1e-12)
        scaled = scaled @ state["basis"].mT
        turned = p.size(0) < group["parts"] * p.size(1)
        return (scaled.mT if turned else scaled).reshape(p.shape)

    def _renewed(self, p, group):
        """Return the basis after one step of the power iteration towards the eigenvectors."""
        basis = self.state[p]["basis"]
        turned = self.state[p]["covariance"] @ basis
        if turned.device.type == "mps":  # has no QR decomposition
            turned = turned.cpu()
        renewed = torch.linalg.qr(turned)[0].to(p.device)
        return renewed if self.found_inf is None else renewed.where(self.found_inf == 0, basis)
