"""The U-Net and all that is trained with it."""

from __future__ import annotations

import torch
from torch import nn

from ldm.config.schema import Stage2Config
from ldm.diffusion.losses import Uncertainty
from ldm.diffusion.schedules import LearnedSchedule
from ldm.diffusion.timestep_sampling import LossSecondMoment
from ldm.models.conditioning import Condition, TextEmbedding, predict
from ldm.models.text_encoder import NULL_PROMPT, TextEncoder
from ldm.models.unet import UNet


class Denoiser(nn.Module):
    """What a run of stage two trains, averages and keeps in checkpoints.

    `unet` always; a `null` embedding, the text `encoder`, the `schedule`, the `uncertainty` of each noise level and the
    losses that timesteps are drawn by (`times`), where the configuration asks for them. `empty` is the embedding of the
    empty caption by a frozen encoder; an `encoder` passed here is trained. `frozen`: checkpoints keep the trained
    parameters alone.
    """

    empty: torch.Tensor | None
    empty_pooled: torch.Tensor | None

    def __init__(
        self,
        unet: UNet,
        stage: Stage2Config,
        empty: TextEmbedding | None = None,
        encoder: TextEncoder | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        self.unet, self.frozen = unet, frozen
        self.register_buffer("empty", empty.states[0] if empty else None, persistent=False)
        self.register_buffer("empty_pooled", empty.pooled if empty else None, persistent=False)
        self.text = encoder
        self.encoder = encoder.model if encoder else None
        if encoder:
            encoder.trainable()
        self.null = nn.Parameter(self._empty().detach().clone()) if stage.uncond_embedding == "learned" else None
        self.schedule = LearnedSchedule() if stage.beta_schedule == "learned" else None
        self.uncertainty = Uncertainty() if stage.loss_weighting == "learned" else None
        self.times = LossSecondMoment(stage.timesteps) if stage.timestep_sampling == "loss" else None

    @property
    def _no_split_modules(self) -> list[str]:
        """The name by which FSDP looks for what it gathers at a time: the blocks of the U-Net and of the encoder."""
        known = {"BasicTransformerBlock", "ResnetBlock2D", *(getattr(self.encoder, "_no_split_modules", None) or ())}
        return sorted(known & {type(module).__name__ for module in self.modules()})

    @property
    def extra_parameters(self) -> list[nn.Parameter]:
        """Trained parameters outside the networks: no weight decay, and gradients clipped separately."""
        modules = [module for module in (self.schedule, self.uncertainty) if module is not None]
        return [p for module in modules for p in module.parameters()] + ([self.null] if self.null is not None else [])

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition: Condition, dropped: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The U-Net's output for x `(N, C, h, w)` at the network's times t `(N,)`.

        The captions of `dropped` samples, `(N,)` bool, are replaced by the embedding of no caption. A trained encoder
        takes `condition.text` as tokens and mask, `(N, 2, chunks, L)` int64.
        """
        text, pooled = condition.text, condition.pooled
        if text is not None:
            if self.text:
                text = self.text.states(*text.unbind(1))
            if dropped is not None:
                text = torch.where(dropped[:, None, None], self.uncond_embedding(), text)
                if pooled is not None and self.empty_pooled is not None:
                    pooled = torch.where(dropped[:, None], self.empty_pooled, pooled)
        return predict(self.unet, x, t, condition._replace(text=text, pooled=pooled)).float()

    def uncond_embedding(self) -> torch.Tensor:
        """The states of no caption, `(T, D)`."""
        return self.null if self.null is not None else self._empty()

    def _empty(self) -> torch.Tensor:
        if self.text:
            return self.text.states(*self.text.tokens([NULL_PROMPT]))[0]
        assert self.empty is not None, "there is no text to leave out"
        return self.empty

    def train(self, mode: bool = True) -> Denoiser:
        """The text encoder's own dropout stays off: its states would not be those that sampling sees."""
        super().train(mode)
        if self.encoder:
            self.encoder.eval()
        return self
