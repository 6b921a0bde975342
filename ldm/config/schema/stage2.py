"""`stage2`: the U-Net, the diffusion process and what is learned of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from ldm.config import rules
from ldm.config.presets import PROCESSES, UNETS
from ldm.config.schema.training import Training

CONDITIONS = ("text", "class", "size", "inpaint", "upscale")


def _in_order(given: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(given)) < len(given):
        raise ValueError("one stands here twice; name each once")
    return tuple(sorted(given, key=CONDITIONS.index))


class Stage2Config(Training):
    init_from: str | None = None
    """A diffusers folder or Hub id, or a `.safetensors` in diffusers' or the original layout, whose U-Net the training
    starts from. It keeps its architecture; inputs that it lacks are added."""
    conditions: Annotated[tuple[Literal[CONDITIONS], ...], AfterValidator(_in_order)] = ("text",)  # type: ignore[valid-type]
    """What pictures are made from besides noise: captions; classes; original size and crop; a picture with a hole; a
    small picture. `[]` is unconditional."""
    cond_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples trained without captions and classes, for classifier-free guidance."""
    dropout_each: bool = False
    """Drops captions and classes by draws of their own, rather than together."""
    uncond_embedding: Literal["empty", "learned"] = "empty"
    """What stands for a dropped caption: the embedding of the empty one, or one that is trained."""
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
    norm_num_groups: PositiveInt = 32
    """Groups of the group normalisation; divides every width."""
    pooled_text: bool = False
    """Adds the text to the time embedding, pooled by attention; with `size` among the conditions, its mean."""
    scale_shift: bool = False
    """The time embedding scales features as well as shifting them (ADM's adaptive group normalisation)."""
    attention_backend: Literal["auto", "eager", "sdpa", "xformers"] = "auto"
    """`auto`: sdpa on a GPU, eager on a CPU, where sdpa's backward is slow."""
    compile: bool = False
    """Compiles the U-Net with torch.compile: a minute or more at the start, faster steps on GPUs."""
    channels_last: bool = False
    """Keeps pictures channel by channel innermost in memory: faster convolutions on GPUs."""
    process: Literal[tuple(PROCESSES)] = "custom"  # type: ignore[valid-type]
    """How pictures become noise and what is learned of it; the keys below change single values of it."""
    prediction_type: Literal["eps", "v", "x0", "flow"] = "eps"
    """What the U-Net predicts; `flow` is the velocity of a straight path from picture to noise."""
    beta_schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "learned"] = "scaled_linear"
    """Noise schedule of eps, v and x0; flow has none."""
    timesteps: PositiveInt = 1000
    """Steps of the chain from picture to noise."""
    zero_snr: bool = False
    """The chain ends in pure noise, so that very dark and very bright pictures can be made."""
    shift: float = Field(default=1.0, gt=0)
    """Side of these latents, or pixels, over the side that the schedule was made for: larger ones get more noise."""
    variance: Literal["fixed", "learned"] = "fixed"
    """The reverse step's variance: the schedule's, or a second output of the U-Net (for `sample.solver: ddpm`)."""
    vlb_weight: float = Field(default=0.001, gt=0)
    """Learned variance: weight of the variational bound, which teaches it."""
    loss: Literal["l2", "l1", "huber"] = "l2"
    """Distance of prediction and target."""
    loss_weighting: Literal["uniform", "min_snr", "soft_min_snr", "p2", "sigmoid", "learned"] = "uniform"
    """Weight of a loss by its noise level; `learned` divides by how large losses are there."""
    weight_gamma: float | None = Field(default=None, gt=0)
    """γ of min_snr and soft_min_snr (5 unless set), and of p2 (1)."""
    timestep_sampling: Literal["auto", "uniform", "logit_normal", "loss"] = "auto"
    """How noise levels are drawn: evenly, more often in the middle, or by how large losses were (`loss`); `auto` is
    logit_normal for flow and uniform otherwise."""
    logit_mean: float = 0.0
    """Logit-normal times: mean of the logit; larger is noisier."""
    logit_std: float = Field(default=1.0, gt=0)
    """Logit-normal times: its standard deviation."""
    stratified: bool = False
    """Spreads the noise levels of a batch evenly, which steadies the loss."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Strength of noise that is the same all over a channel (0.1 where used); zero_snr is the sounder way."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Strength of noise that the U-Net sees and is not told of (0.1 where used)."""
    evaluate_every: PositiveInt = 1000
    """Steps between two measurements of the loss by noise level, on held-out and on training pictures."""
    evaluate_pictures: PositiveInt = 64
    """Pictures of each of the two that are measured, always the same."""

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
        """Whether a picture stands beside x_t."""
        return bool({"inpaint", "upscale"} & set(self.conditions))

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return rules.check(self, rules.STAGE2)
