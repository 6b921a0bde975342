"""`stage1`: the autoencoder, its losses and its discriminator."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ldm.config import rules
from ldm.config.presets import AUTOENCODERS
from ldm.config.schema.base import PathOrId, Section
from ldm.config.schema.training import Training


class GanConfig(Section):
    """PatchGAN, a discriminator of patches of real and reconstructed images."""

    weight: float = Field(default=0.5, ge=0)
    """Weight of the adversarial loss in the autoencoder's, after the ramp."""
    start: float = Field(default=0.5, ge=0)
    """When its training begins: a step, or, below 1, a fraction of the run."""
    warmup: int = Field(default=200, ge=0)
    """Steps that it trains alone before the adversarial loss counts."""
    ramp: int = Field(default=200, ge=0)
    """Steps over which the weight then rises linearly."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """Adversarial loss of both networks."""
    adaptive: bool = True
    """Scales the weight so that its gradient at the decoder's last layer has the norm of the reconstruction's."""
    cap: float = Field(default=10.0, gt=0)
    """Largest scale that `adaptive` gives."""
    lr: float = Field(default=1e-4, gt=0)
    """Its learning rate, with the autoencoder's warm-up and schedule."""
    r1: float = Field(default=0.0, ge=0)
    """Weight of the gradient penalty on real images."""
    channels: PositiveInt = 64
    """Width of its first layer; doubles up to eight times."""
    layers: PositiveInt = 3
    """Layers that halve the resolution: 3 see patches of 70 pixels."""
    norm: Literal["group", "batch"] = "group"
    """Normalisation. `batch` is over all processes, and needs GPUs where there are several."""
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """Differentiable augmentations of its inputs, for small data sets."""


class AlignConfig(Section):
    """Aligns latents with the features of a pretrained encoder."""

    model: PathOrId
    """A vision transformer of transformers (DINOv2, CLIP's, ViT): local folder or Hub id."""
    weight: float = Field(default=0.1, gt=0)
    """Weight of the alignment."""


class Stage1Config(Training):
    pretrained: PathOrId | None = None
    """Loaded instead of trained: a diffusers folder, a `.safetensors` in the original layout, or a Hub id."""
    init_from: PathOrId | None = None
    """The same, as the initial weights of training."""
    train: Literal["all", "decoder"] = "all"
    """`decoder` freezes the encoder, so that latents, and U-Nets trained on them, stay valid."""
    model: Literal[tuple(AUTOENCODERS)] = "kl"  # type: ignore[valid-type]
    """Architecture; the keys below change single values of it."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (64, 128, 256)
    """Width of each level; each level after the first halves the resolution."""
    layers: PositiveInt = 2
    """Residual blocks a level."""
    decoder_channels: tuple[PositiveInt, ...] = ()
    """`dc`: width of each level of the decoder, from the image's on; empty: as `channels`."""
    decoder_layers: PositiveInt | None = None
    """`dc`: blocks a level of the decoder; empty: as `layers`."""
    latent_channels: PositiveInt = 4
    """Channels of the latents."""
    norm_num_groups: PositiveInt = 32
    """Groups of the group normalisation; divides every width."""
    mid_attention: bool = True
    """Self-attention at the lowest resolution; `dc`: linear attention in the deeper half of the levels."""
    codes: PositiveInt = 1024
    """VQ: entries of the codebook."""
    l1: float = Field(default=1.0, ge=0)
    """Weight of the mean absolute error."""
    l2: float = Field(default=0.0, ge=0)
    """Weight of the mean squared error."""
    charbonnier: float = Field(default=0.0, ge=0)
    """Weight of the Charbonnier error, an absolute error that is smooth at 0."""
    gradient: float = Field(default=1.0, ge=0)
    """Weight of the error of the image's gradients at three scales: a perceptual term that needs no download."""
    lpips: float = Field(default=0.0, ge=0)
    """Weight of LPIPS, the perceptual distance of a pretrained network."""
    lpips_net: Literal["vgg", "alex", "squeeze", "st-vgg", "st-alex"] = "vgg"
    """That network: torchvision's, whose weights are downloaded once; or one that tolerates shifts (arXiv 2207.13686),
    whose weights come with the extra `metrics`."""
    learn_variance: bool = False
    """Divides the reconstruction error by a learned variance, which balances it with the other terms."""
    kl: float = Field(default=1e-6, ge=0)
    """`kl`: weight of the Kullback-Leibler term, mean over the latent's elements."""
    kl_free: float = Field(default=0.0, ge=0)
    """Free bits: nats of a latent element, mean over an image's channel, that the term does not penalise."""
    kl_warmup: int = Field(default=0, ge=0)
    """Steps over which its weight rises linearly."""
    commitment: float = Field(default=1.0, ge=0)
    """VQ: weight of the distance between latents and codes."""
    beta: float = Field(default=0.25, ge=0)
    """VQ: weight, in that, of moving latents to codes relative to moving codes to latents."""
    revive: int = Field(default=200, ge=0)
    """VQ: codes unused for so many steps are reset to latents of the batch; 0 never."""
    equivariance: float = Field(default=0.0, ge=0, le=1)
    """Fraction of steps whose latents are scaled and rotated, and decoded to the image scaled and rotated alike."""
    align: AlignConfig | None = None
    """Alignment of latents with a pretrained encoder's features."""
    gan: GanConfig | None = None
    """A discriminator, for crisp textures."""
    evaluate_every: PositiveInt = 1000
    """Steps between evaluations on held-out images, with a grid of reconstructions."""
    evaluate_images: PositiveInt = 1024
    """Held-out images to evaluate on, always the same."""

    @property
    def family(self) -> str:
        """`kl`, `vq`, `tiny`, `dc` or `identity`."""
        return str(self.model).partition("-")[0]

    @property
    def factor(self) -> int:
        """Pixels along a side per latent."""
        return 2 ** (len(self.channels) - 1)

    @property
    def needs_none(self) -> bool:
        """Whether there is nothing to train."""
        return bool(self.pretrained) or self.family == "identity"

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return rules.check(self, rules.STAGE1)
