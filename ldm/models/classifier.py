"""The classifier of classifier guidance: which class a noisy image is of, and what would make it more of one."""

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
from ldm.utils.errors import UserError

EPS = 1e-5  # of the group normalisations, as in diffusers' U-Nets


class NoisyClassifier(ModelMixin, ConfigMixin):
    """Logits of classes from x_t and t: the first half of a U-Net, and attention pooling (arXiv 2105.05233, section 4).

    x_t = α(t)·x_0 + σ(t)·ε of the process that it was trained on, whatever U-Nets of that process predict; t as U-Nets
    are told it, in [0, timesteps). The pooling has no position embedding, so that images may have any shape.

    `classes` are their names, `betas` those of the chain, None for a flow's straight path; `autoencoder` is
    `Autoencoder.encoder_fingerprint` of the latents, of `in_channels` channels. The rest is as in `ClassifierConfig`.
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
        head_size: int = 64,
        groups: int = 32,
    ):
        super().__init__()
        width, last = 4 * channels[0], channels[-1]
        shared: dict[str, Any] = {
            "temb_channels": width, "resnet_eps": EPS, "resnet_act_fn": "silu", "resnet_groups": groups,
            "resnet_time_scale_shift": "scale_shift", "attention_head_dim": head_size,
        }  # fmt: skip
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], width)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (attends, after) in enumerate(zip(attention, channels, strict=True)):
            kind, halves = "AttnDownBlock2D" if attends else "DownBlock2D", i < len(channels) - 1
            before = channels[max(0, i - 1)]
            self.down_blocks.append(
                get_down_block(kind, layers, before, after, add_downsample=halves, downsample_padding=1, **shared)
            )
        self.mid_block = UNetMidBlock2D(last, attn_groups=groups, **shared)
        self.norm = nn.GroupNorm(groups, last, EPS)
        self.pool = nn.MultiheadAttention(last, last // head_size, batch_first=True)
        self.head = nn.Linear(last, len(classes))

    @classmethod
    def of(
        cls, settings: ClassifierConfig, autoencoder: Autoencoder, process: DiffusionProcess, classes: list[str]
    ) -> NoisyClassifier:
        """One with random weights."""
        betas = None if process.prediction_type == "flow" else tuple(process.chain().beta.tolist())
        return cls(
            autoencoder.channels, tuple(classes), betas, autoencoder.encoder_fingerprint(), settings.channels,
            settings.layers, settings.attention, settings.attention_head_dim, settings.norm_num_groups,
        )  # fmt: skip

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu") -> NoisyClassifier:
        """A trained one: the folder that it was trained in, or its `model`; UserError where there is none."""
        folder = Path(name) / "model" if (Path(name) / "model").is_dir() else Path(name)
        try:
            found = cls.from_pretrained(folder, use_safetensors=True)
        except (OSError, ValueError, TypeError) as error:
            said = " ".join(str(error).splitlines()[:1])
            raise UserError(
                f"classifier: can't load one from {str(name)!r} ({said}); "
                "give a folder of stage2_diffusion.classifier.train"
            ) from None
        return found.eval().to(device)  # type: ignore[no-any-return]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names; a class's number is its place in them."""
        return tuple(self.config.classes)

    def check(self, scheduler: Any, autoencoder: Autoencoder) -> None:
        """UserError where a pipeline with these has other latents, or other noise, than it was trained on."""
        if self.config.autoencoder != autoencoder.encoder_fingerprint():
            raise UserError("classifier: it was trained on latents of another autoencoder; train one on this model's")
        own, flow = self.config.betas, is_flow(scheduler.config)
        same = flow == (own is None)
        if own is not None and same:
            theirs, alpha_bar = scheduler.alphas_cumprod, (1 - torch.tensor(own, dtype=torch.float64)).cumprod(0)
            same = len(theirs) == len(alpha_bar) and torch.allclose(theirs.cpu().double(), alpha_bar, atol=1e-5)
        if not same:
            raise UserError("classifier: it was trained on another process's noise; train one on this model's run")

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits `(N, K)` of x_t `(N, C, h, w)` at the network's times t, `(N,)` or one for all."""
        frequencies = self.time_proj(t.to(x.device).expand(len(x)))
        embedding = self.time_embedding(frequencies.to(self.dtype))
        x = self.conv_in(x.to(self.dtype))
        for block in self.down_blocks:
            x, _ = block(x, embedding)
        x = F.silu(self.norm(self.mid_block(x, embedding)))
        tokens = x.flatten(2).transpose(1, 2)  # (N, hw, D)
        mean = tokens.mean(1, keepdim=True)
        both = torch.cat([mean, tokens], dim=1)
        pooled, _ = self.pool(mean, both, both, need_weights=False)  # as CLIP's: the mean asks what to look at
        return self.head(pooled[:, 0])  # type: ignore[no-any-return]

    def gradient(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """∇_x log p(y | x_t, t), `(N, C, h, w)` float32, or float64 where x is; arXiv 2105.05233, section 4.1.

        x and t as in `forward`; y `(N,)` are numbers of classes. Works under `torch.no_grad`; parameters get none.
        """
        with torch.enable_grad():
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
            log_p = self(x, t).to(x.dtype).log_softmax(1)
            return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]
