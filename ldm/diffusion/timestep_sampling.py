"""Which noise level a training sample gets: stratified uniform numbers, or times drawn in proportion to their loss."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ldm.utils.rng import generator, uniform


def stratified(seed: int, stream: str, positions: Iterable[int], batch: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), `(len(positions),)` float32, one in each of `batch` equal strata at every step.

    A step is `batch` consecutive positions of the run, over all processes and accumulation passes. The numbers are a
    function of (seed, position, batch), however the batch is divided. Each alone is uniform; together they cover the
    noise levels evenly, which lowers the variance of the loss (low-discrepancy times, arXiv 2107.00630, appendix I.1).
    """
    positions = [int(n) for n in positions]
    within = uniform(seed, stream, positions).double()
    strata = [int(_strata(seed, stream, n // batch, batch)[n % batch]) for n in positions]
    stratum = torch.tensor(strata, dtype=torch.float64)
    # In float32 the end of the last stratum could round to 1, which is not in [0, 1).
    return ((stratum + within) / batch).float().clamp(max=1 - 2**-24)


@lru_cache(maxsize=8)  # a loader asks sample by sample
def _strata(seed: int, stream: str, step: int, batch: int) -> np.ndarray:
    """The stratum of each of a step's samples, `(batch,)`."""
    return generator(seed, f"{stream} strata", step).permutation(batch)


class LossSecondMoment(nn.Module):
    """Draws times in proportion to sqrt(E[L²]), with weights that keep the mean loss: Improved DDPM, eq. 18.

    Keeps the last `history` losses of every step of the chain; until it has them, times are uniform. `state_dict` holds
    its state. Because it depends on history, every process must `update` it with the losses of the global batch,
    gathered in order of position; then times are the same for any number of processes.
    """

    losses: torch.Tensor
    counts: torch.Tensor

    def __init__(self, timesteps: int, history: int = 10, uniform_share: float = 0.001):
        super().__init__()
        self.uniform_share = uniform_share
        self.register_buffer("losses", torch.zeros(timesteps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(timesteps, dtype=torch.int64))

    def probabilities(self) -> torch.Tensor:
        """The probability of each time, `(timesteps,)` float64, at least uniform_share / timesteps."""
        timesteps, history = self.losses.shape
        uniform_p = torch.full((timesteps,), 1 / timesteps, dtype=torch.float64, device=self.losses.device)
        moment = self.losses.square().mean(1).sqrt()
        known = (self.counts >= history).all() & (moment.sum() > 0)  # chosen on the device: a step waits for nothing
        return torch.where(
            known, moment / moment.sum() * (1 - self.uniform_share) + uniform_p * self.uniform_share, uniform_p
        )

    def draw(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Times `(N,)` int64 and the weights `(N,)` float32 of their losses, from uniform numbers `(N,)` in [0, 1).

        The weights 1 / (T·p_t) make the mean loss that of uniform times.
        """
        p = self.probabilities().to(u.device)
        t = torch.searchsorted(p.cumsum(0), u.double(), right=True).clamp(max=len(p) - 1)
        return t, (1 / (len(p) * p[t])).float()

    @torch.no_grad()
    def update(self, t: torch.Tensor, loss: torch.Tensor) -> None:
        """Records the unweighted losses `(N,)` at times t `(N,)` of the global batch, in order of position.

        Losses that are not finite are left out.
        """
        timesteps, history = self.losses.shape
        unused = timesteps  # a row for what is left out, so that no number of losses need be known on the host
        t, order = torch.where(loss.isfinite(), t, unused).sort(stable=True)
        first, end = torch.searchsorted(t, t), torch.searchsorted(t, t, right=True)  # of the losses at the same time
        index = torch.arange(len(t), device=t.device)
        losses, counts = F.pad(self.losses, (0, 0, 0, 1)), F.pad(self.counts, (0, 1))
        row = torch.where(index < end - history, unused, t)  # those that later ones of this batch replace
        losses[row, (counts[t] + index - first) % history] = loss[order].double()
        self.losses.copy_(losses[:-1])
        self.counts.copy_(counts.index_add(0, t, torch.ones_like(t))[:-1])
