"""The U-Net and all that is trained with it."""

from __future__ import annotations

import torch
from accelerate.utils import convert_to_fp32
from torch import nn

from ldm.config.schema import Stage2Config
from ldm.diffusion.losses import Uncertainty
from ldm.diffusion.schedules import LearnedSchedule
from ldm.diffusion.timestep_sampling import LossSecondMoment
from ldm.models.conditioning import Condition, TextEmbedding, predict
from ldm.models.text_encoder import NULL_PROMPT, AnyTextEncoder
from ldm.models.unet import UNet


class Denoiser(nn.Module):
    """What a run of stage two trains, averages and keeps in checkpoints.

    `unet` always; a `null` embedding, the text `encoder`, the `schedule`, the `uncertainty` of each noise level and the
    losses that timesteps are drawn by (`times`), where the configuration asks for them. `empty` is the embedding of the
    empty caption by a frozen encoder. Pass an `encoder` only if some of its parameters train, which require gradients;
    their names begin with `encoder.`, of several encoders with `encoder.0.`, `encoder.1.`. `frozen`: checkpoints keep
    what is trained of the networks alone.
    """

    empty: torch.Tensor | None
    empty_pooled: torch.Tensor | None

    def __init__(
        self,
        unet: UNet,
        stage: Stage2Config,
        empty: TextEmbedding | None = None,
        encoder: AnyTextEncoder | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        self.unet, self.frozen_prefixes = unet, ("unet.", "encoder.") if frozen else ()
        self.register_buffer("empty", empty.states[0] if empty else None, persistent=False)
        self.register_buffer("empty_pooled", empty.pooled if empty else None, persistent=False)
        self.text = encoder
        self.encoder = encoder.module if encoder else None
        learned_null = stage.uncond_embedding == "learned"
        self.null = nn.Parameter(self._empty().states[0].detach().clone()) if learned_null else None
        self.schedule = LearnedSchedule() if stage.beta_schedule == "learned" else None
        self.uncertainty = Uncertainty() if stage.loss_weighting == "learned" else None
        self.times = LossSecondMoment(stage.timesteps) if stage.timestep_sampling == "loss" else None

    @property
    def _no_split_modules(self) -> list[str]:
        """The name by which FSDP looks for what it gathers at a time: the blocks of the U-Net and of the encoder."""
        known = {"BasicTransformerBlock", "ResnetBlock2D"}
        for model in self.text.models if self.text else ():
            known.update(getattr(model, "_no_split_modules", None) or ())
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
        takes `condition.text` as the result of its `token_ids`, int64.
        """
        if condition.text is not None:
            text = TextEmbedding(condition.text, condition.pooled)
            if self.text:
                text = self.text.embed_tokens(condition.text)
            if dropped is not None:
                text = self._drop(text, dropped)
            condition = condition.with_text(text)
        return convert_to_fp32(predict(self.unet, x, t, condition))  # type: ignore[no-any-return]

    def _drop(self, text: TextEmbedding, dropped: torch.Tensor) -> TextEmbedding:
        null = self.uncond_embedding()
        pooled = text.pooled
        if pooled is not None and null.pooled is not None:
            pooled = torch.where(dropped[:, None], null.pooled, pooled)
        return TextEmbedding(torch.where(dropped[:, None, None], null.states, text.states), pooled)

    def uncond_embedding(self) -> TextEmbedding:
        """The embedding of no caption, of one text; a learned one has the empty caption's pooled embedding."""
        if self.null is None:
            return self._empty()
        if self.text and not self.text.pooled_width:
            return TextEmbedding(self.null[None])  # spares a pass through the encoder
        return TextEmbedding(self.null[None], self._empty().pooled)

    def _empty(self) -> TextEmbedding:
        if self.text:
            return self.text.embed_tokens(self.text.token_ids([NULL_PROMPT]))
        assert self.empty is not None, "there is no text to leave out"
        return TextEmbedding(self.empty[None], self.empty_pooled)

    def train(self, mode: bool = True) -> Denoiser:
        """The text encoder's own dropout stays off: its states would not be those that sampling sees."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
            for name, module in self.encoder.named_modules():
                if ".lora_dropout." in name:  # an adapter's own
                    module.train(mode)
        return self
