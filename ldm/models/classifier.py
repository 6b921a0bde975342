"""The noisy classifier of classifier guidance: the class of a noisy image, and the gradient towards a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import nn
from torch.nn import functional as F

from ldm.config.schema import ClassifierConfig
from ldm.diffusion.parameterization import is_flow
from ldm.diffusion.process import DiffusionProcess
from ldm.models.autoencoder import Autoencoder
from ldm.utils.errors import UserError, first_line

EPS = 1e-5  # of the group normalisations, as in diffusers' U-Nets


class NoisyClassifier(ModelMixin, ConfigMixin):
    """Logits of classes from x_t and t: the first half of a U-Net, and attention pooling (arXiv 2105.05233, section 4).

    x_t = α(t)·x_0 + σ(t)·ε of the process that it was trained on; it fits U-Nets of every prediction type. t is in
    [0, timesteps), as for U-Nets. The pooling has no position embedding, so images may have any shape.

    `classes` are the names of the classes; `betas` are the chain's, None for a flow. `autoencoder` is
    `Autoencoder.encoder_fingerprint` for the latents, which have `in_channels` channels. The other arguments are those
    of `ClassifierConfig`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        classes: tuple[str, ...],
        betas: tuple[float, ...] | None,
        autoencoder: str = "",
        channels: tuple[int, ...] = (128, 256, 384, 512),
        layers: int = 2,
        attention: tuple[bool, ...] = (False, True, True, True),
        head_size: int = 64,  # these two keys are in saved folders' config.json
        groups: int = 32,
    ):
        super().__init__()
        width, last = 4 * channels[0], channels[-1]
        shared: dict[str, Any] = {
            "temb_channels": width,
            "resnet_eps": EPS,
            "resnet_act_fn": "silu",
            "resnet_groups": groups,
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": head_size,
        }
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], width)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (attends, out_channels) in enumerate(zip(attention, channels, strict=True)):
            self.down_blocks.append(
                get_down_block(
                    "AttnDownBlock2D" if attends else "DownBlock2D",
                    layers,
                    channels[max(0, i - 1)],
                    out_channels,
                    add_downsample=i < len(channels) - 1,
                    downsample_padding=1,
                    **shared,
                )
            )
        self.mid_block = UNetMidBlock2D(last, attn_groups=groups, **shared)
        self.norm = nn.GroupNorm(groups, last, EPS)
        self.pool = nn.MultiheadAttention(last, last // head_size, batch_first=True)
        self.head = nn.Linear(last, len(classes))

    @classmethod
    def of(
        cls, settings: ClassifierConfig, autoencoder: Autoencoder, process: DiffusionProcess, classes: list[str]
    ) -> NoisyClassifier:
        """A classifier with random weights."""
        betas = None if process.prediction_type == "flow" else tuple(process.chain().beta.tolist())
        return cls(
            in_channels=autoencoder.channels,
            classes=tuple(classes),
            betas=betas,
            autoencoder=autoencoder.encoder_fingerprint(),
            channels=settings.channels,
            layers=settings.layers,
            attention=settings.attention,
            head_size=settings.attention_head_dim,
            groups=settings.norm_num_groups,
        )

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu") -> NoisyClassifier:
        """Loads a trained classifier from its run's folder, or from `model` in it; UserError if it can't."""
        folder = Path(name) / "model" if (Path(name) / "model").is_dir() else Path(name)
        try:
            classifier = cls.from_pretrained(folder, use_safetensors=True)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"classifier: can't load one from {str(name)!r} ({first_line(error)}); "
                "give a folder of stage2_diffusion.classifier.train"
            ) from None
        return classifier.eval().to(device)  # type: ignore[no-any-return]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; the number of a class is its index here."""
        return tuple(self.config.classes)

    def check(self, scheduler: Any, autoencoder: Autoencoder) -> None:
        """UserError if a pipeline with these has other latents, or other noise levels, than the training."""
        if self.config.autoencoder != autoencoder.encoder_fingerprint():
            raise UserError("classifier: it was trained on latents of another autoencoder; train one on this model's")
        betas = self.config.betas
        same = is_flow(scheduler.config) == (betas is None)
        if same and betas is not None:
            alpha_bar = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
            other = scheduler.alphas_cumprod.cpu().double()
            same = len(other) == len(alpha_bar) and torch.allclose(other, alpha_bar, atol=1e-5)
        if not same:
            raise UserError("classifier: it was trained on another process's noise; train one on this model's run")

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits `(N, K)` for x_t `(N, C, h, w)` at the network's times t, `(N,)` or a scalar."""
        frequencies = self.time_proj(t.to(x.device).expand(len(x)))
        embedding = self.time_embedding(frequencies.to(self.dtype))
        x = self.conv_in(x.to(self.dtype))
        for block in self.down_blocks:
            x, _ = block(x, embedding)
        x = F.silu(self.norm(self.mid_block(x, embedding)))
        tokens = x.flatten(2).transpose(1, 2)  # (N, hw, D)
        mean = tokens.mean(1, keepdim=True)
        tokens = torch.cat([mean, tokens], dim=1)
        pooled, _ = self.pool(mean, tokens, tokens, need_weights=False)  # as in CLIP: the mean token is the query
        return self.head(pooled[:, 0])  # type: ignore[no-any-return]

    def gradient(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """∇_x log p(y | x_t, t), `(N, C, h, w)` float32, or float64 where x is; arXiv 2105.05233, section 4.1.

        x and t as in `forward`; y `(N,)` are class numbers. Works under `torch.no_grad`; parameters get no gradient.
        """
        with torch.enable_grad():
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
            log_p = self(x, t).to(x.dtype).log_softmax(1)
            return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]
