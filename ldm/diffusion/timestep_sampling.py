"""Which noise level a training sample gets: uniform numbers for a process's `time`, and times drawn by their loss."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from ldm.utils.rng import generator, uniform


def stratified(seed: int, stream: str, positions: Iterable[int], batch: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), `(len(positions),)` float32, one in each of the `batch` equal parts at every step.

    A step is `batch` consecutive positions of the run, over all processes and passes: the numbers are a function
    of (seed, position, batch), the same however the batch is divided. Each alone is uniform; together they cover the
    noise levels evenly, which lowers the variance of the loss (low-discrepancy times, arXiv 2107.00630, appendix I.1).
    """
    positions = [int(n) for n in positions]
    places: dict[int, np.ndarray] = {}  # of a step: the part that each of its samples falls in
    for step in {n // batch for n in positions}:
        places[step] = generator(seed, f"{stream} strata", step).permutation(batch)
    within = uniform(seed, stream, positions).double()
    part = torch.tensor([int(places[n // batch][n % batch]) for n in positions], dtype=torch.float64)
    # In float32 the last part's end could round to 1, which is no time.
    return ((part + within) / batch).float().clamp(max=1 - 2**-24)


class LossSecondMoment(nn.Module):
    """Draws times in proportion to sqrt(E[L²]), and weighs their losses back: Improved DDPM, eq. 18.

    Keeps the last `history` losses of every step of the chain; until all are there, times are uniform. Its state is
    tensors (`state_dict`). It depends on history, so every process must `update` with the losses of the whole batch,
    gathered in the order of their positions; times then stay the same for any number of processes.
    """

    losses: torch.Tensor
    counts: torch.Tensor

    def __init__(self, timesteps: int, history: int = 10, uniform_share: float = 0.001):
        super().__init__()
        self.uniform_share = uniform_share
        self.register_buffer("losses", torch.zeros(timesteps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(timesteps, dtype=torch.int64))

    def probabilities(self) -> torch.Tensor:
        """Of each time, `(timesteps,)` float64, with sum 1; none is below uniform_share / timesteps."""
        timesteps, history = self.losses.shape
        even = torch.full((timesteps,), 1 / timesteps, dtype=torch.float64, device=self.losses.device)
        if not bool((self.counts >= history).all()):
            return even
        moment = self.losses.square().mean(1).sqrt()
        if not bool(moment.sum() > 0):
            return even
        return moment / moment.sum() * (1 - self.uniform_share) + even * self.uniform_share

    def draw(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Times `(N,)` int64 and the weights `(N,)` float32 of their losses, from uniform numbers `(N,)` in [0, 1).

        The weights 1 / (T·p_t) keep the mean loss what it is with uniform times.
        """
        p = self.probabilities().to(u.device)
        t = torch.searchsorted(p.cumsum(0), u.double(), right=True).clamp(max=len(p) - 1)
        return t, (1 / (len(p) * p[t])).float()

    @torch.no_grad()
    def update(self, t: torch.Tensor, loss: torch.Tensor) -> None:
        """Takes in the losses `(N,)` of times `(N,)`, unweighted, of the global batch in order of position."""
        history = self.losses.shape[1]
        for time, value in zip(t.tolist(), loss.double().tolist(), strict=True):
            self.losses[time, int(self.counts[time]) % history] = value
            self.counts[time] += 1
