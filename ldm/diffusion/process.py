"""The forward process: how images become noise, and what the network learns to predict. Pure functions.

Throughout, x_t = α(t)·x_0 + σ(t)·ε with ε ~ N(0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ldm.diffusion.parameterization import PREDICTION_TYPES, predict_eps, predict_x0, target_from
from ldm.diffusion.schedules import SCHEDULES, TIMESTEPS, Chain, betas, betas_of, chain, shift_time
from ldm.utils.errors import unknown_choice

__all__ = ["TIMESTEPS", "DiffusionProcess", "betas", "offset_noise", "perturbed"]
CLOSED_FORM_TIMES = ("uniform", "logit_normal")  # values of `timestep_sampling`; `loss` needs a `LossSecondMoment`


@dataclass(frozen=True)
class DiffusionProcess:
    """A forward process, and what the network predicts.

    `prediction_type` is `eps`, `x0` or `v`, over the discrete chain of `beta_schedule`, or `flow`, on the straight
    path, where `beta_schedule` is unused.

    Times t are whole numbers in [0, `timesteps`) on the chain, and real numbers in (0, 1) for a flow, 1 being noise.
    Where the images are float64, so is the arithmetic; otherwise it is float32.
    """

    prediction_type: str
    beta_schedule: str | tuple[float, ...] = "scaled_linear"
    """A name, or the betas themselves, `timesteps` of them."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timesteps: int = TIMESTEPS
    """Steps T of the chain; a flow's time in [0, 1] reaches its network multiplied by T."""
    zero_snr: bool = False
    """The chain ends in pure noise (arXiv 2305.08891). ValueError with `eps`, which says nothing about x_0 there."""
    shift: float = 1.0
    """Side of the images over the side that the schedule was made for; larger is noisier."""
    timestep_sampling: str | None = None
    """`uniform` or `logit_normal` training times; None: logit-normal for a flow, uniform for a chain."""
    model_timesteps: tuple[int, ...] | None = None
    """The time that the network gets at each step; None: the step's own number."""

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise unknown_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_sampling not in (None, *CLOSED_FORM_TIMES):
            raise unknown_choice("timestep_sampling", self.timestep_sampling, CLOSED_FORM_TIMES)
        if self.shift <= 0:
            raise ValueError(f"shift: {self.shift} is not a ratio of two sides; give more than 0")
        if self.prediction_type == "flow":
            return
        if isinstance(self.beta_schedule, tuple):
            if len(self.beta_schedule) != self.timesteps:
                raise ValueError(
                    f"beta_schedule: {len(self.beta_schedule)} betas for {self.timesteps} timesteps; give one each"
                )
        elif self.beta_schedule not in SCHEDULES:
            raise unknown_choice("beta_schedule", self.beta_schedule, SCHEDULES)
        if self.zero_snr and self.prediction_type == "eps":
            raise ValueError(
                "prediction_type: 'eps' can't be used with zero_snr: pure noise hides x_0 from it; use v or x0"
            )

    def respaced(self, steps: int) -> DiffusionProcess:
        """The chain of `steps` of this chain's noise levels, the noisiest included, for the same network.

        Improved DDPM, arXiv 2102.09672, section 4: the likelihood and the samples of few steps.
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps: {steps}; give 1 to {self.timesteps}")
        kept = [round(self.timesteps * (i + 1) / steps) - 1 for i in range(steps)]
        beta = betas_of(self.chain().alpha_bar[kept])
        model_timesteps = tuple(kept if self.model_timesteps is None else [self.model_timesteps[i] for i in kept])
        return replace(
            self,
            beta_schedule=tuple(beta.tolist()),
            timesteps=steps,
            zero_snr=False,
            shift=1.0,
            model_timesteps=model_timesteps,
        )

    def chain(self, device: torch.device | None = None) -> Chain:
        """The tables of the discrete chain, such as β and ᾱ; ValueError for a flow, which has none."""
        if self.prediction_type == "flow":
            raise ValueError("a flow has no chain of steps; use eps, x0 or v")
        return chain(self.beta_schedule, self.timesteps, self.zero_snr, self.shift, device or torch.device("cpu"))

    def time(self, u: torch.Tensor) -> torch.Tensor:
        """Training times `(N,)` from uniform numbers u in [0, 1)."""
        flow = self.prediction_type == "flow"
        if self.timestep_sampling == "logit_normal" or (
            flow and self.timestep_sampling is None
        ):  # arXiv 2403.03206, eq. 19
            # In float64: in float32 the last bit of a sigmoid may depend on the batch that the sample is in.
            normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6).double())
            u = torch.sigmoid(self.logit_mean + self.logit_std * normal).to(u.dtype)
        if flow:  # never 0 or 1, where log-SNR is infinite
            return shift_time(u, self.shift).clamp(1e-6, 1 - 1e-6)
        # A uniform number rounded to 1 in low precision must not leave the chain.
        return (u * self.timesteps).long().clamp(max=self.timesteps - 1)

    def model_time(self, t: torch.Tensor) -> torch.Tensor:
        """The time that the network gets for t, in [0, timesteps)."""
        if self.prediction_type == "flow":
            return t * self.timesteps
        return t if self.model_timesteps is None else torch.tensor(self.model_timesteps, device=t.device)[t]

    def alpha_sigma(self, t: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """α(t) and σ(t), `(N, 1, 1, 1)` each, in `dtype` on a chain; a flow's keep the dtype of t."""
        if self.prediction_type == "flow":  # the straight path, arXiv 2209.03003, eq. 1
            alpha, sigma = 1 - t, t
        else:  # α² = ᾱ_t, σ² = 1 - ᾱ_t: DDPM, eq. 4
            alpha_bar = self.chain(t.device).alpha_bar[t]
            alpha, sigma = alpha_bar.sqrt().to(dtype), (1 - alpha_bar).sqrt().to(dtype)
        return _wide(alpha), _wide(sigma)

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        """log(α² / σ²) at t, `(N,)` float32, within ±20."""
        if self.prediction_type == "flow":
            return (-2 * torch.logit(t)).clamp(-20, 20).float()
        return self.chain(t.device).log_snr[t].float()

    def time_at(self, log_snr: torch.Tensor) -> torch.Tensor:
        """The time `(N,)` whose log-SNR is nearest to `log_snr` `(N,)`."""
        if self.prediction_type == "flow":
            return torch.sigmoid(-log_snr / 2)
        table = self.chain(log_snr.device).log_snr
        return (table[None] - log_snr[:, None]).abs().argmin(1)

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t, a draw of q(x_t | x_0); DDPM, eq. 4. Shapes `(N, C, h, w)`, t `(N,)`."""
        alpha, sigma = self.alpha_sigma(t, _precision(x0))
        return alpha * x0 + sigma * eps

    def posterior(
        self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q(x_{t-1} | x_t, x_0): mean `(N, C, h, w)`, variance, clipped log-variance `(N, 1, 1, 1)`; DDPM, eqs. 6, 7.

        At t = 0 the mean is x_0 and the variance 0; the log-variance is that of t = 1, as in Improved DDPM's code.
        """
        beta, alpha_bar, before, _, variance, log_variance = (table[t] for table in self.chain(t.device))
        of_x0 = beta * before.sqrt() / (1 - alpha_bar)
        of_x_t = (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar)
        dtype = _precision(x_t)
        mean = _wide(of_x0).to(dtype) * x0 + _wide(of_x_t).to(dtype) * x_t
        return mean, _wide(variance).to(dtype), _wide(log_variance).to(dtype)

    def log_variances(self, t: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """log β̃_t, clipped, and log β_t: the reverse step's least and greatest log-variance, `(N, 1, 1, 1)` each.

        They are optimal for data that is a single point and for standard normal data; DDPM, section 3.2.
        """
        table = self.chain(t.device)
        return _wide(table.log_variance[t]).to(dtype), _wide(table.beta[t].log()).to(dtype)

    def learned_log_variance(self, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Log-variance of the reverse step from the second half of the network's channels; Improved DDPM, eq. 15.

        v `(N, C, h, w)` to the same shape: v = −1 is log β̃, v = 1 is log β.
        """
        small, large = self.log_variances(t, _precision(v))
        weight = (v + 1) / 2
        return weight * large + (1 - weight) * small

    def target_from(
        self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, prediction_type: str | None = None
    ) -> torch.Tensor:
        """The network's training target at (x_t, t), or that of a network with another `prediction_type`."""
        return target_from(prediction_type or self.prediction_type, x0, eps, *self.alpha_sigma(t, _precision(x0)))

    def predict_x0(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_0 from the network's prediction at (x_t, t): the inverse of `target_from`."""
        return predict_x0(self.prediction_type, prediction, x_t, *self.alpha_sigma(t, _precision(x_t)))

    def predict_eps(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """ε from the network's prediction at (x_t, t); at zero terminal SNR it is x_t itself."""
        return predict_eps(self.prediction_type, prediction, x_t, *self.alpha_sigma(t, _precision(x_t)))

    def convert(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, prediction_type: str
    ) -> torch.Tensor:
        """The prediction in terms of another `prediction_type` (eps, x0, v, flow)."""
        if prediction_type == self.prediction_type:
            return prediction
        return self.target_from(
            self.predict_x0(prediction, x_t, t), self.predict_eps(prediction, x_t, t), t, prediction_type
        )


def offset_noise(eps: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise whose mean varies too: ε + strength·offset, with offset `(N, C, 1, 1)` standard normal.

    Lets a model learn dark and bright images where the schedule doesn't end in pure noise (Guttenberg, "Diffusion with
    offset noise", 2023, strength 0.1); zero terminal SNR does so without bias. Both x_t and the target use this noise.
    """
    return eps + strength * offset


def perturbed(eps: torch.Tensor, xi: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise for x_t alone, ε + strength·ξ, where the target keeps ε: input perturbation, arXiv 2301.11706 (0.1 there).

    Training then shows the network errors like those that it makes in sampling. ξ is standard normal, as ε is.
    """
    return eps + strength * xi


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value[:, None, None, None]


def _precision(x: torch.Tensor) -> torch.dtype:
    """The dtype of coefficients that multiply x: half precision would lose the small ones."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
