"""What can be configured: every key with its type, its default, a line on what it means, and what can't go together."""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import ImageColor
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from ldm.config.presets import AUTOENCODERS, PROCESSES, UNETS


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def _divides(key: str, value: int, divisor: int, why: str) -> None:
    if value % divisor:
        nearest = max(1, round(value / divisor)) * divisor
        raise ValueError(f"{key}: {value} is not a multiple of {divisor} ({why}); {nearest} would be")


class RunConfig(Section):
    dir: Path = Path("runs/default")
    """The run's folder; running again with the same folder continues."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision of training; `auto` is bf16 where the processor computes it natively, else none."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes the GPU where there is one."""
    preflight: bool = True
    """Measures two steps and a validation first, to tell the memory, time and disk that a run will take."""
    checkpoints_total_limit: PositiveInt = 2
    """Checkpoints kept per stage."""
    log_every: PositiveInt = 20
    """Steps between two lines of metrics."""
    max_skipped: PositiveInt = 10
    """Steps in a row that may be skipped because a loss or gradient is not finite; then the run stops."""
    tracker: str = "tensorboard"
    """Any tracker that accelerate knows by name, or `none`."""


class SourceConfig(Section):
    path: str
    """A folder, tars, parquet, kohya's TOML, an id of the Hub, `openmoji-demo` or `openmoji-all`."""
    kind: Literal[
        "auto", "openmoji", "metadata", "sidecars", "classes", "pictures", "tar", "parquet", "datasets", "kohya"
    ] = "auto"
    """What the path is; `auto` looks."""
    caption_column: str = "text"
    """Column, or key of a JSON, with the caption or a list of them."""
    label: str = "label"
    """Column, or key of a JSON, with the class, a string or an integer; read where `stage2.conditions` has `class`."""
    image: str = "image"
    """Column with the picture, of parquet and `datasets`."""
    lines: bool = False
    """Each line of a caption file is a caption of its own."""
    template: str = "{}"
    """Caption of a class folder's pictures: `a photo of a {}`."""
    split: str = "train"
    """Split of a data set of `datasets`."""
    repeats: PositiveInt = 1
    """Times that each picture comes in an epoch."""
    weight: float | None = Field(default=None, gt=0)
    """Share of an epoch beside the other sources' weights; default: its number of pictures."""


class BucketConfig(Section):
    step: PositiveInt = 64
    """Sides are multiples of it."""
    smallest: PositiveInt | None = None
    """Shortest side of a bucket; default: half of `data.size`."""
    largest: PositiveInt | None = None
    """Longest side of a bucket; default: twice `data.size`."""
    upscale: bool = True
    """Enlarges pictures that are smaller than their bucket; otherwise they get a smaller one."""


def as_sources(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    values = [{"path": str(each)} if isinstance(each, (str, int, float)) else each for each in values]
    for each in values:
        if isinstance(each, dict) and isinstance(each.get("path"), str) and each["path"].startswith("~"):
            each["path"] = str(Path(each["path"]).expanduser())
    return values


class DataConfig(Section):
    source: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_sources), Field(min_length=1, strict=False)]
    """A path or id, a section with `path` and how to read it, or a list of these."""
    size: PositiveInt
    """Side of the square pictures, in pixels; with buckets, the square root of their area."""
    buckets: BucketConfig | None = None
    """Sorts pictures into batches by aspect ratio, so that little is cropped; default: squares."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept of what does not fit."""
    crops: PositiveInt = 4
    """Random crops cached of each picture; without a cache, and in stage one, every draw is a fresh one."""
    flip: bool = False
    """Mirrors half of the samples."""
    background: str = "white"
    """Colour behind transparent pictures."""
    min_side: PositiveInt = 8
    """Pictures with a side of fewer pixels are bad."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the pictures that nothing is trained on, for measuring; which ones follows from their files' content."""
    on_error: Literal["skip", "stop"] = "skip"
    """What bad pictures and captions do: they are left out, or nothing is trained."""
    max_bad: float = Field(default=0.05, ge=0, le=1)
    """Share of bad ones beyond which `skip` stops too."""
    streaming: bool = False
    """Reads tars, parquet and `datasets` shard by shard, with no index and no cache: for more than a disk holds."""
    cache: Literal["disk", "none"] = "disk"
    """Latents and embeddings are encoded once and kept, or encoded for every batch."""
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the cache stores."""
    latents: Literal["sample", "mean"] = "sample"
    """Each draw is a fresh sample of the autoencoder's posterior, or its mean."""
    cache_dir: Path | None = None
    """Where indices, latents and embeddings are kept, for several runs too; default: `cache` in the run's folder."""
    workers: int = Field(default=0, ge=0)
    """Loader processes per training process."""

    @property
    def name(self) -> str:
        return ", ".join(source.path for source in self.source)

    @property
    def shortest(self) -> int:
        """The shortest side that a picture may have, in pixels."""
        return (self.buckets.smallest or self.size // 2) if self.buckets else self.size


class TextConfig(Section):
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A local folder or Hub id: BERT-like, CLIP and T5 encoders of transformers, or a whole diffusers pipeline, whose
    encoder is taken; or `open_clip:ARCH:WEIGHTS`."""
    max_tokens: int | None = Field(default=None, ge=3)
    """Length that captions are padded or cut to; default: the tokenizer's own."""
    width: PositiveInt | None = None
    """Channels of the encoder's token states, checked when it is loaded; `--dry-run` then needs no download."""
    skip_layers: int = Field(default=0, ge=0)
    """Last layers that are left out: 1 gives the penultimate layer's states (Stable Diffusion 2, "clip skip")."""
    chunks: PositiveInt = 1
    """Long captions are encoded in up to so many pieces, whose states stand one after the other."""
    train: bool = False
    """Trains the encoder along with the U-Net; captions' embeddings are then not cached."""


CONDITIONS = ("text", "class", "size", "inpaint", "upscale")


def _in_order(given: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(given)) < len(given):
        raise ValueError("one stands here twice; name each once")
    return tuple(sorted(given, key=CONDITIONS.index))


WIDEST = 12**-0.5  # the relative width of the plain mean of all weights so far


def _widths(given: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 < width < WIDEST for width in given):
        raise ValueError(f"each must be more than 0 and less than {WIDEST:.4f}; 0.05 and 0.1 are usual")
    if len(set(given)) < len(given):
        raise ValueError("one stands here twice; name each once")
    return given


TRACKERS = tuple(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
Decay = Annotated[float, Field(ge=0, lt=1)]


class Training(Section):
    """What both stages share."""

    steps: PositiveInt = 1000
    """Optimiser steps."""
    batch: PositiveInt = 16
    """Global batch: the pictures of one optimiser step, over all processes."""
    device_batch: PositiveInt | None = None
    """Images that one device computes at once, at most; gradients accumulate until the batch is complete. Default: the
    device's whole share of the batch."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its moments in 8 bits: a quarter of their memory; needs bitsandbytes."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate, as it stands: not scaled by batch or processes."""
    lr_warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up; `cosine` and `linear` end at 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema_decay: Decay = 0.999
    """Decay of the averaged weights, which are what is saved and sampled."""
    ema_widths: Annotated[tuple[float, ...], AfterValidator(_widths)] = ()
    """Power-function averages instead, by σ_rel: `[0.05, 0.1]`; the first is saved and sampled, snapshots are kept of
    all."""
    ema_snapshot_every: PositiveInt = 500
    """Steps between their snapshots, of which averages of other widths are made afterwards."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass instead of keeping them: less memory, a third more time."""


class GanConfig(Section):
    """PatchGAN, a second network that learns to tell patches of rebuilt pictures from real ones."""

    weight: float = Field(default=0.5, ge=0)
    """Weight of its verdict in the autoencoder's loss, once fully raised."""
    start: float = Field(default=0.5, ge=0)
    """When it begins to learn: a step, or, below 1, a share of the run."""
    warmup: int = Field(default=200, ge=0)
    """Steps that it learns alone before the autoencoder hears its verdict."""
    ramp: int = Field(default=200, ge=0)
    """Steps over which its weight then rises linearly."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """What both play for."""
    adaptive: bool = True
    """Scales its weight so that its gradient at the decoder's last layer is as long as the reconstruction's."""
    cap: float = Field(default=10.0, gt=0)
    """Largest scale that `adaptive` gives."""
    lr: float = Field(default=1e-4, gt=0)
    """Its learning rate, with the warm-up and decay of the autoencoder's."""
    r1: float = Field(default=0.0, ge=0)
    """Weight of the gradient penalty on real pictures."""
    channels: PositiveInt = 64
    """Width of its first layer; doubles up to eight times."""
    layers: PositiveInt = 3
    """Layers that halve the resolution: 3 judge patches of 70 pixels."""
    norm: Literal["group", "batch"] = "group"
    """`batch` is over all processes, and needs GPUs where there are several."""
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """Differentiable augmentations of what it sees, for small sets."""


class AlignConfig(Section):
    """Draws latents towards the features of a pretrained encoder."""

    model: str
    """A vision transformer of transformers (DINOv2, CLIP's, ViT): local folder or Hub id."""
    weight: float = Field(default=0.1, gt=0)
    """Weight of the alignment."""


class Stage1Config(Training):
    pretrained: str | None = None
    """Loaded instead of trained: a diffusers folder, a `.safetensors` in the original layout, or a Hub id."""
    init_from: str | None = None
    """The same, from which training goes on."""
    train: Literal["all", "decoder"] = "all"
    """`decoder` leaves the encoder as it is, so that latents, and U-Nets trained on them, stay valid."""
    model: Literal[tuple(AUTOENCODERS)] = "kl"  # type: ignore[valid-type]
    """Architecture; the keys below change single values of it."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (64, 128, 256)
    """Width of each level; each level after the first halves the resolution."""
    layers: PositiveInt = 2
    """Residual blocks a level."""
    latent_channels: PositiveInt = 4
    """Channels of the latents."""
    norm_num_groups: PositiveInt = 32
    """Groups of the group normalisation; divides every width."""
    mid_attention: bool = True
    """Self-attention at the lowest resolution."""
    codes: PositiveInt = 1024
    """VQ: entries of the codebook."""
    l1: float = Field(default=1.0, ge=0)
    """Weight of the mean absolute error."""
    l2: float = Field(default=0.0, ge=0)
    """Weight of the mean squared error."""
    charbonnier: float = Field(default=0.0, ge=0)
    """Weight of the Charbonnier error, an absolute error that is smooth at 0."""
    gradient: float = Field(default=1.0, ge=0)
    """Weight of the error of the picture's gradients at three scales: a perceptual term that needs no download."""
    lpips: float = Field(default=0.0, ge=0)
    """Weight of LPIPS, the perceptual distance of a pretrained network."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """That network; torchvision downloads its weights once."""
    learn_variance: bool = False
    """Divides the reconstruction error by a learned variance, so that its weight against the others is found."""
    kl: float = Field(default=1e-6, ge=0)
    """Weight of the Kullback-Leibler term, mean over the latent's elements."""
    kl_free: float = Field(default=0.0, ge=0)
    """Free bits: nats of a latent element, mean over a picture's channel, that the term does not press on."""
    kl_warmup: int = Field(default=0, ge=0)
    """Steps over which its weight rises linearly."""
    commitment: float = Field(default=1.0, ge=0)
    """VQ: weight of the distance of latents and codes."""
    beta: float = Field(default=0.25, ge=0)
    """VQ: how much of that draws latents to codes rather than codes to latents."""
    revive: int = Field(default=200, ge=0)
    """VQ: codes unused for so many steps are placed on latents of the batch; 0 never."""
    equivariance: float = Field(default=0.0, ge=0, le=1)
    """Share of steps in which latents are shrunk and turned, and decoded to the picture shrunk and turned alike."""
    align: AlignConfig | None = None
    """Alignment of latents with a pretrained encoder's features."""
    gan: GanConfig | None = None
    """A discriminator, for crisp textures."""
    evaluate_every: PositiveInt = 1000
    """Steps between two measurements on held-out pictures, with a sheet of reconstructions."""
    evaluate_pictures: PositiveInt = 1024
    """Pictures that are measured, always the same."""

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
    def _possible(self) -> Self:
        if not self.l1 + self.l2 + self.charbonnier + self.gradient + self.lpips:
            raise ValueError(
                "l1, l2, charbonnier, gradient and lpips are all 0; nothing would be learned, set one of them"
            )
        if self.train == "decoder" and not self.init_from:
            raise ValueError("train: decoder needs init_from, the autoencoder whose encoder stays")
        if self.pretrained and self.init_from:
            raise ValueError("pretrained is loaded and not trained, init_from is trained; set one of them")
        if self.gradient_checkpointing and self.family != "kl":
            raise ValueError(
                f"gradient_checkpointing: diffusers has none that is sound for {self.model}; set it to false"
            )
        if self.family == "tiny" and len(set(self.channels)) > 1:
            raise ValueError(f"channels: {list(self.channels)}; AutoencoderTiny has the same width at every level")
        if self.family == "identity" and (self.factor, self.latent_channels) != (1, 3):
            raise ValueError("channels, latent_channels: identity has one level and 3 channels; leave them out")
        if self.family in ("kl", "vq"):
            for width in self.channels:
                _divides("channels", width, self.norm_num_groups, "norm_num_groups")
        if self.family == "dc":  # its shortcuts average channels, its attention has heads of 32
            _divides("channels", self.channels[-1], self.latent_channels, "latent_channels")
            for above, width in itertools.pairwise(self.channels):
                _divides("channels", 4 * above, width, "the next level's, a quarter of it at most")
            for width in self.channels[(len(self.channels) + 1) // 2 :]:
                _divides("channels", width, 32, "size of a head")
        if self.align and self.train == "decoder":
            raise ValueError("align: draws the latents of an encoder that train: decoder leaves as it is; drop one")
        if gan := self.gan:
            start = int(gan.start * self.steps) if gan.start < 1 else int(gan.start)
            if start + gan.warmup >= self.steps:
                raise ValueError(
                    f"gan: begins at step {start} and is warmed up for {gan.warmup}, so in {self.steps} steps the "
                    "autoencoder would never hear it; lower gan.start or gan.warmup"
                )
            if self.equivariance == 1:
                raise ValueError(
                    "equivariance: 1 leaves no step to the discriminator, which sees whole pictures; lower it"
                )
            if gan.norm == "batch" and gan.r1:
                raise ValueError("gan.r1: batch norm over processes has no second derivative; gan.norm=group has")
        return self


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
    def _possible(self) -> Self:
        if {"inpaint", "upscale"} <= set(self.conditions):
            raise ValueError("conditions: a model has one task; give inpaint or upscale")
        if "upscale" in self.conditions and self.classes:
            raise ValueError("conditions: upscale tells its noise level where classes would stand; drop class")
        for key in self.conditions:
            if key in ("size", "inpaint", "upscale") and not self.text:
                raise ValueError(f"conditions: {key} needs text beside it; give [text, {key}]")
        for key, given in (("pooled_text", self.pooled_text), ("uncond_embedding", self.uncond_embedding == "learned")):
            if given and not self.text:
                raise ValueError(f"{key}: there is no text in conditions, {list(self.conditions)}; leave it out")
        flow = self.prediction_type == "flow"
        for key, given in (
            ("zero_snr", self.zero_snr), ("variance", self.variance == "learned"),
            ("timestep_sampling", self.timestep_sampling == "loss"), ("beta_schedule", self.beta_schedule == "learned"),
        ):  # fmt: skip
            if given and flow:
                raise ValueError(
                    f"{key}: {getattr(self, key)!r} is for a chain of steps, which flow is not; leave it out"
                )
        if flow and self.timesteps != 1000:  # which samplers round to whole numbers
            raise ValueError(f"timesteps: {self.timesteps}; flow tells the U-Net its time in thousandths, leave it out")
        if self.loss_weighting == "learned" and self.timestep_sampling == "loss":
            raise ValueError(
                "timestep_sampling: loss means little where loss_weighting is learned, which makes all alike; drop one"
            )
        if self.zero_snr and self.prediction_type == "eps":
            raise ValueError("zero_snr: pure noise says nothing about eps; set prediction_type to v or x0")
        if self.variance == "learned" and (self.loss, self.loss_weighting) != ("l2", "uniform"):
            raise ValueError("variance: learned has its own weighting; set loss to l2 and loss_weighting to uniform")
        if self.beta_schedule == "learned":
            for key, plain in (
                ("prediction_type", "eps"), ("loss", "l2"), ("loss_weighting", "uniform"),
                ("timestep_sampling", "auto"), ("variance", "fixed"),
                ("zero_snr", False), ("shift", 1.0), ("noise_offset", 0.0), ("input_perturbation", 0.0),
            ):  # fmt: skip
                if getattr(self, key) != plain:
                    raise ValueError(
                        f"beta_schedule: learned minimises the bound's variance, which is defined with {key}={plain}; "
                        f"not {getattr(self, key)!r}"
                    )
        if self.weight_gamma and self.loss_weighting not in ("min_snr", "soft_min_snr", "p2"):
            raise ValueError(f"weight_gamma: loss_weighting {self.loss_weighting!r} has no γ; leave it out")
        for key, given in (("loss_weighting 'sigmoid'", self.loss_weighting == "sigmoid"), ("zero_snr", self.zero_snr)):
            if given and self.timesteps < 2:
                raise ValueError(f"timesteps: {key} needs 2 at least")
        return self


class DistillConfig(Training):
    """Of `python -m stage2_diffusion.distillation.train`, which makes a model of few steps from a run's."""

    steps: PositiveInt = 1000
    """Optimiser steps of each halving, or of the whole consistency distillation."""
    batch: PositiveInt = 64
    """Global batch: the pictures of one optimiser step, over all processes."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    lr_scheduler: Literal["constant", "cosine", "linear"] = "linear"
    """Course of the learning rate in each halving; `cosine` and `linear` end at 0."""
    ema_decay: Decay = 0.99
    """Decay of the averaged weights: the next teacher, what is exported, and a consistency model's own target."""
    guidance_from: float = Field(default=1.0, ge=1)
    """Smallest scale of guidance that the student learns to be told."""
    guidance_to: float | None = Field(default=None, gt=1)
    """Largest one; default: twice the run's `sample.guidance`."""
    guidance_steps: PositiveInt = 1000
    """Progressive: optimiser steps in which guidance is learned, before the first halving."""
    blended: float = Field(default=0.5, ge=0, le=1)
    """Share of captions that are blended with another, so that students do not forget how their teacher combines."""
    steps_from: PositiveInt = 64
    """Progressive: solver steps of the first teacher."""
    steps_to: PositiveInt = 4
    """Solver steps of the last student; a consistency model's by default, which can take others too."""
    loss: Literal["snr_truncated", "v"] = "snr_truncated"
    """Progressive: weight of the error of x_0, max(SNR, 1), or 1 + SNR, which makes it the error of v."""
    original_steps: PositiveInt = 50
    """Consistency: steps of the chain that the teacher takes, one of which lies between student and target."""
    huber: float = Field(default=0.001, gt=0)
    """Consistency: c of the pseudo-Huber loss."""
    evaluate_every: PositiveInt = 500
    """Steps between two measurements of the loss on a batch of held-out pictures, always with the same noise."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.guidance_to is not None and self.guidance_to <= self.guidance_from:
            raise ValueError(f"guidance_to: {self.guidance_to} is not more than guidance_from, {self.guidance_from}")
        return self

    def halvings(self) -> list[int]:
        """Solver steps of each student, `steps_to` last; ValueError where halving does not lead there."""
        ratio = self.steps_from // self.steps_to
        if ratio < 2 or ratio & (ratio - 1) or self.steps_from != ratio * self.steps_to:
            raise ValueError(
                f"steps_to: {self.steps_to} is not reached by halving steps_from, {self.steps_from}; "
                f"steps_from={16 * self.steps_to} would lead there"
            )
        return [self.steps_from >> i for i in range(1, ratio.bit_length())]


class SampleConfig(Section):
    steps: PositiveInt = 50
    """Steps of the solver."""
    guidance: float = Field(default=7.5, ge=1)
    """Scale of classifier-free guidance; 1 is none."""
    solver: Literal["ddpm", "ddim", "euler", "euler_a", "heun", "dpm++", "dpm++sde", "unipc", "lcm"] = "dpm++"
    """Solver of the exported pipeline."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample grids."""
    every: PositiveInt = 1000
    """Steps of stage two between two sample grids."""


class ClassifierConfig(Training):
    """The classifier of classifier guidance, which `python -m stage2_diffusion.classifier.train` trains.

    Network, learning rate and weight decay are by default those of ADM's code for 64 × 64 (arXiv 2105.05233).
    """

    batch: PositiveInt = 64
    """Global batch: the pictures of one optimiser step, over all processes."""
    lr: float = Field(default=3e-4, gt=0)
    """Learning rate, as it stands: not scaled by batch or processes."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of AdamW."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""
    half: Literal[0, 1] | None = None
    """Trains on this half of the training pictures, so that a classifier of the other half can judge; default: all."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (128, 256, 384, 512)
    """Width of each level; each level after the first halves the resolution."""
    layers: PositiveInt = 2
    """Residual blocks a level."""
    attention: tuple[bool, ...] = (False, True, True, True)
    """Which levels have self-attention; the middle block and the pooling have."""
    attention_head_dim: PositiveInt = 64
    """Channels of an attention head."""
    norm_num_groups: PositiveInt = 32
    """Groups of the group normalisation; divides every width."""
    evaluate_every: PositiveInt = 500
    """Steps between two measurements of the accuracy by noise level, on held-out pictures."""
    evaluate_pictures: PositiveInt = 256
    """Pictures that are measured, always the same."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"attention: {len(self.attention)} values for {len(self.channels)} levels of channels; give one a level"
            )
        for i, (width, attends) in enumerate(zip(self.channels, self.attention, strict=True)):
            _divides("channels", width, self.norm_num_groups, "norm_num_groups")
            if attends or i == len(self.channels) - 1:
                _divides("channels", width, self.attention_head_dim, "attention_head_dim")
        return self


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig
    text: TextConfig = TextConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    sample: SampleConfig = SampleConfig()

    @property
    def cache_dir(self) -> Path:
        return self.data.cache_dir or self.run.dir / "cache"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        """Checks of several keys together; each names its keys, the values and what would do."""
        one, two = self.stage1, self.stage2
        _divides(
            "data.size", self.data.size, one.factor, f"2 per level after the first of stage1.channels, {one.channels}"
        )
        if self.run.tracker not in (*TRACKERS, "none"):
            close = difflib.get_close_matches(self.run.tracker, TRACKERS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(TRACKERS)}, none"
            raise ValueError(f"run.tracker: {self.run.tracker!r} is not known to accelerate; {hint}")
        self._possible_data()
        for width in two.channels:
            _divides("stage2.channels", width, two.norm_num_groups, "stage2.norm_num_groups")
        if len(two.attention) != len(two.channels):
            raise ValueError(
                f"stage2.attention: {len(two.attention)} values for {len(two.channels)} levels of stage2.channels; "
                "give one a level"
            )
        for width, attends in zip(two.channels, two.attention, strict=True):
            if attends:
                _divides("stage2.channels", width, two.attention_head_dim, "stage2.attention_head_dim")
        if one.equivariance and self.data.shortest < 32:
            raise ValueError(
                f"stage1.equivariance: shrinks pictures to a quarter of {self.data.shortest} px; they need 32"
            )
        if one.gan and self.data.shortest < (least := 3 * 2**one.gan.layers):
            raise ValueError(
                f"stage1.gan.layers: {one.gan.layers} need sides of {least} px, and the shortest has "
                f"{self.data.shortest}; fewer layers, or larger pictures"
            )
        if two.variance == "learned" and self.sample.solver != "ddpm":
            raise ValueError(
                f"sample.solver: {self.sample.solver!r} makes no use of stage2.variance 'learned'; use ddpm"
            )
        if self.sample.steps > two.timesteps and two.prediction_type != "flow":
            raise ValueError(f"sample.steps: {self.sample.steps}, but stage2.timesteps are {two.timesteps}; lower it")
        if not two.conditions and one.family == "identity":
            known = ("euler", "dpm++") if two.prediction_type == "flow" else ("ddpm", "ddim", "dpm++")
            if self.sample.solver not in known:
                raise ValueError(
                    f"sample.solver: {self.sample.solver!r} can't be exported for pixels without conditions, whose "
                    f"pipeline in diffusers runs {', '.join(known)}; take one of these"
                )
        if "upscale" in two.conditions and one.family != "kl":
            raise ValueError(
                f"stage2.conditions: upscale needs an AutoencoderKL, and stage1.model is {one.model!r}: diffusers' "
                "pipeline would change the scale of another"
            )
        if two.sizes and self.data.streaming:
            raise ValueError("stage2.conditions: size needs data.streaming=false, where sizes are known")
        if two.image and (self.data.streaming or self.data.buckets):
            raise ValueError("stage2.conditions: inpaint and upscale need data.streaming=false and data.buckets=null")
        if "upscale" in two.conditions and one.factor < 2:
            raise ValueError("stage1.channels: upscale enlarges by the autoencoder's factor, which is 1; more levels")
        if two.classes and self.data.streaming:
            raise ValueError("stage2.conditions: a stream's classes aren't known beforehand; set data.streaming=false")
        if self.text.train and not two.text:
            raise ValueError("text.train: there is no text in stage2.conditions; leave it out")
        if two.prediction_type == "flow" and self.sample.solver not in STRAIGHT:
            raise ValueError(
                f"sample.solver: {self.sample.solver!r} can't be saved with stage2.prediction_type 'flow'; use "
                f"{', '.join(STRAIGHT)}, and another one when you sample"
            )
        if two.prediction_type == "x0" and self.sample.solver == "euler_a":
            raise ValueError(
                "sample.solver: 'euler_a' of diffusers does not know stage2.prediction_type 'x0'; use another"
            )
        for prompt in self.sample.prompts if two.text else ():
            if not prompt.strip():
                raise ValueError("sample.prompts: an empty prompt; write what the picture shows")
        return self

    def _possible_data(self) -> None:
        data, factor = self.data, self.stage1.factor
        try:
            ImageColor.getrgb(data.background)
        except ValueError:
            raise ValueError(f"data.background: {data.background!r} is no colour; white, or #ffffff") from None
        for source in data.source:
            if "{}" not in source.template:
                raise ValueError(f"data.source.template: {source.template!r} has no {{}}, where the class's name goes")
        weighted = [source.weight is not None for source in data.source]
        if any(weighted) and not all(weighted):
            raise ValueError("data.source: some have a weight and some have none; give all of them one, or none")
        if buckets := data.buckets:
            _divides("data.buckets.step", buckets.step, factor, "2 per level after the first of stage1.channels")
            low, high = data.shortest, buckets.largest or data.size * 2
            if not buckets.step <= low <= data.size <= high:
                raise ValueError(
                    f"data.buckets: step {buckets.step}, smallest {low}, data.size {data.size}, largest {high}; "
                    "each must be no more than the next"
                )
        if data.streaming and (data.buckets or data.cache != "none"):
            raise ValueError(
                "data.streaming: sizes aren't known beforehand; it needs data.buckets=null and data.cache=none"
            )
        if data.streaming and data.val_fraction:
            raise ValueError("data.val_fraction: with data.streaming nothing is held out; set it to 0")
        if data.streaming and any(source.repeats > 1 or source.weight for source in data.source):
            raise ValueError("data.source: repeats and weight have no meaning with data.streaming; leave them out")


STRAIGHT = ("euler", "dpm++", "dpm++sde", "unipc")  # solvers that diffusers' pipelines can run on a flow
SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential")
SOLVERS: tuple[str, ...] = get_args(SampleConfig.model_fields["solver"].annotation)
