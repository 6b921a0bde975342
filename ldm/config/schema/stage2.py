"""`stage2`: the U-Net, the diffusion process and the training objective."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from ldm.config import rules
from ldm.config.presets import PROCESSES, UNETS
from ldm.config.schema.base import PathOrId
from ldm.config.schema.evaluation import EvaluateConfig
from ldm.config.schema.training import Training

CONDITIONS = ("text", "class", "size", "inpaint", "upscale")


def _in_order(conditions: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(conditions)) < len(conditions):
        raise ValueError("an entry is listed twice; name each once")
    return tuple(sorted(conditions, key=CONDITIONS.index))


class Stage2Config(Training):
    init_from: PathOrId | None = None
    """A diffusers folder or Hub id, or a `.safetensors` in diffusers' or the original layout, whose U-Net the training
    starts from. It keeps its architecture; missing inputs are added."""
    conditions: Annotated[tuple[Literal[CONDITIONS], ...], AfterValidator(_in_order)] = ("text",)  # type: ignore[valid-type]
    """Conditions: captions; classes; original size and crop; a masked image; a low-resolution image. `[]` is
    unconditional."""
    cond_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples trained without captions and classes, for classifier-free guidance."""
    dropout_each: bool = False
    """Drops captions and classes independently rather than together."""
    uncond_embedding: Literal["empty", "learned"] = "empty"
    """Embedding of a dropped caption: that of the empty caption, or a trained one."""
    model: Literal[tuple(UNETS)] = "custom"  # type: ignore[valid-type]
    """Architecture; the keys below change single values of it."""
    channels: tuple[PositiveInt, ...] = (320, 640, 1280, 1280)
    """Width of each level."""
    layers: PositiveInt = 2
    """Residual blocks a level."""
    attention: tuple[bool, ...] = (True, True, True, False)
    """Which levels have self-attention, and cross-attention to captions."""
    mid_attention: bool = True
    """The same for the middle block."""
    attention_head_dim: PositiveInt = 64
    """Channels of an attention head."""
    transformer_layers: tuple[PositiveInt, ...] = ()
    """Transformer layers of an attention at each level, the last also of the middle block; default: 1."""
    linear_projection: bool = False
    """Linear projections around the transformer layers, as in Stable Diffusion 2 and XL; else 1×1 convolutions."""
    norm_num_groups: PositiveInt = 32
    """Groups of the group normalisation; divides every width."""
    pooled_text: bool = False
    """Adds the text to the time embedding, pooled by attention; with `size` among the conditions, the
    encoder's own pooled embedding, or the mean."""
    scale_shift: bool = False
    """The time embedding scales and shifts features (ADM's adaptive group normalisation)."""
    attention_backend: Literal["auto", "eager", "sdpa", "xformers"] = "auto"
    """`auto`: sdpa on a GPU, eager on a CPU, where sdpa's backward is slow."""
    compile: bool = False
    """Compiles the U-Net with torch.compile: a minute or more at the start, faster steps on GPUs."""
    channels_last: bool = False
    """Memory format `channels_last`: faster convolutions on GPUs."""
    process: Literal[tuple(PROCESSES)] = "custom"  # type: ignore[valid-type]
    """Diffusion process and prediction target; the keys below change single values of it."""
    prediction_type: Literal["eps", "v", "x0", "flow"] = "eps"
    """What the U-Net predicts; `flow` is the velocity of a straight path from image to noise."""
    beta_schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "learned"] = "scaled_linear"
    """Noise schedule of eps, v and x0; flow has none."""
    timesteps: PositiveInt = 1000
    """Training timesteps, from image to noise."""
    zero_snr: bool = False
    """The last timestep is pure noise, so that very dark and very bright images can be generated."""
    shift: float = Field(default=1.0, gt=0)
    """Side of the latents, or pixels, over the side that the schedule was made for: larger ones get more noise."""
    variance: Literal["fixed", "learned"] = "fixed"
    """The reverse step's variance: the schedule's, or a second output of the U-Net (for `sample.solver: ddpm`)."""
    vlb_weight: float = Field(default=0.001, gt=0)
    """Learned variance: weight of the variational bound, which trains it."""
    loss: Literal["l2", "l1", "huber"] = "l2"
    """Distance of prediction and target."""
    loss_weighting: Literal["uniform", "min_snr", "soft_min_snr", "p2", "sigmoid", "learned"] = "uniform"
    """Weight of the loss by noise level; `learned` divides by the expected loss."""
    weight_gamma: float | None = Field(default=None, gt=0)
    """γ of min_snr and soft_min_snr (5 unless set), and of p2 (1)."""
    unmasked_weight: float = Field(default=0.0, ge=0, le=1)
    """Masks (`data.source.mask`): weight of the loss where a mask is black; where it is white, the weight is 1."""
    timestep_sampling: Literal["auto", "uniform", "logit_normal", "loss"] = "auto"
    """Distribution of noise levels: uniform, mostly in the middle, or by earlier losses (`loss`); `auto` is
    logit_normal for flow and uniform otherwise."""
    logit_mean: float = 0.0
    """Logit-normal times: mean of the logit; larger is noisier."""
    logit_std: float = Field(default=1.0, gt=0)
    """Logit-normal times: its standard deviation."""
    stratified: bool = False
    """Spreads the noise levels of a batch evenly, which steadies the loss."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Strength of noise that is constant over a channel (0.1 where used); prefer zero_snr."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Strength of extra noise in the U-Net's input, which is not part of the target (0.1 where used)."""
    evaluate_every: PositiveInt = 1000
    """Steps between evaluations of the loss by noise level, on held-out and on training images."""
    evaluate_images: PositiveInt = 64
    """Held-out, and training, images to evaluate on, always the same."""
    evaluate: EvaluateConfig | None = None
    """Figures of generated images, such as FID, by the keys below; default: none."""

    @property
    def text(self) -> bool:
        return "text" in self.conditions

    @property
    def classes(self) -> bool:
        return "class" in self.conditions

    @property
    def sizes(self) -> bool:
        return "size" in self.conditions

    @property
    def image(self) -> bool:
        """Whether the U-Net's input has an image besides x_t."""
        return bool({"inpaint", "upscale"} & set(self.conditions))

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return rules.check(self, rules.STAGE2)
