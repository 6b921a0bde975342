"""One YAML and dotted overrides (`stage2.lr=1e-4`) → one frozen, validated `Config`.

Every key stands here with a line on what it means. An unknown key, a wrong type or an impossible combination is a
UserError of one line.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import ImageColor
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from ldm.data import kohya
from ldm.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class RunConfig(Section):
    dir: Path = Path("runs/default")
    """The run's folder; running again with the same folder continues."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision of training; `auto` is bf16 where the processor computes it natively, else none."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes the GPU where there is one."""
    keep: PositiveInt = 2
    """Checkpoints kept per stage."""
    log_every: PositiveInt = 20
    """Steps between two lines of metrics."""
    tracker: str = "tensorboard"
    """Any tracker that accelerate knows by name, or `none`."""


class SourceConfig(Section):
    path: str
    """A folder, tars, parquet, kohya's TOML, an id of the Hub, `openmoji-demo` or `openmoji-all`."""
    kind: Literal["auto", "openmoji", "metadata", "sidecars", "classes", "tar", "parquet", "datasets", "kohya"] = "auto"
    """What the path is; `auto` looks."""
    column: str = "text"
    """Column, or key of a JSON, with the caption or a list of them."""
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


def _sources(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    values = [{"path": str(each)} if isinstance(each, (str, int, float)) else each for each in values]
    for each in values:
        if isinstance(each, dict) and isinstance(each.get("path"), str) and each["path"].startswith("~"):
            each["path"] = str(Path(each["path"]).expanduser())
    return values


class DataConfig(Section):
    source: Annotated[tuple[SourceConfig, ...], BeforeValidator(_sources), Field(min_length=1, strict=False)]
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


class TextConfig(Section):
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A local folder or Hub id: BERT-like, CLIP and T5 encoders of transformers."""
    max_tokens: int | None = Field(default=None, ge=3)
    """Length that captions are padded or cut to; default: the tokenizer's own."""
    width: PositiveInt | None = None
    """Channels of the encoder's token states, checked when it is loaded; `--dry-run` then needs no download."""


TRACKERS = tuple(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
Decay = Annotated[float, Field(ge=0, lt=1)]


class Training(Section):
    """What both stages share."""

    steps: PositiveInt = 1000
    """Optimiser steps."""
    batch: PositiveInt = 16
    """Global batch: the pictures of one optimiser step, over all processes."""
    micro_batches: PositiveInt = 1
    """Parts that the batch is computed in, one after the other (gradient accumulation)."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate, as it stands: not scaled by batch or processes."""
    warmup: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; `cosine` ends at 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Of AdamW."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema: Decay = 0.999
    """Decay of the averaged weights, which are what is saved and sampled."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints."""


class Stage1Config(Training):
    pretrained: str | None = None
    """A diffusers autoencoder, local folder or Hub id, loaded instead of trained; its shape must be the one below."""
    channels: tuple[PositiveInt, ...] = (64, 128, 256)
    """Width of each level; each level after the first halves the resolution."""
    layers: PositiveInt = 2
    """Residual blocks a level."""
    latent_channels: PositiveInt = 4
    """Channels of the latents."""
    groups: PositiveInt = 32
    """Groups of the group normalisation; divides every width."""
    mid_attention: bool = True
    """Self-attention at the lowest resolution."""
    l1: float = Field(default=1.0, ge=0)
    """Weight of the mean absolute error."""
    l2: float = Field(default=0.0, ge=0)
    """Weight of the mean squared error."""
    gradient: float = Field(default=0.0, ge=0)
    """Weight of the error of the picture's gradients at three scales: a perceptual term that needs no download."""
    kl: float = Field(default=1e-6, ge=0)
    """Weight of the Kullback-Leibler term, mean over the latent's elements."""

    @property
    def factor(self) -> int:
        """Pixels along a side per latent."""
        return 2 ** (len(self.channels) - 1)


class Stage2Config(Training):
    init_from: str | None = None
    """A diffusers pipeline folder or Hub id whose U-Net the training starts from."""
    channels: tuple[PositiveInt, ...] = (320, 640, 1280, 1280)
    """Width of each level."""
    layers: PositiveInt = 2
    """Residual blocks a level."""
    attention: tuple[bool, ...] = (True, True, True, False)
    """Which levels have self- and cross-attention."""
    mid_attention: bool = True
    """The same for the middle block."""
    head_size: PositiveInt = 64
    """Channels of an attention head."""
    groups: PositiveInt = 32
    """Groups of the group normalisation; divides every width."""
    pooled_text: bool = False
    """Adds the text, pooled by attention, to the time embedding."""
    scale_shift: bool = False
    """The time embedding scales features as well as shifting them (ADM's adaptive group normalisation)."""
    attention_backend: Literal["auto", "eager", "sdpa", "xformers"] = "auto"
    """`auto`: sdpa on a GPU, eager on a CPU, where sdpa's backward is slow."""
    target: Literal["eps", "v", "x0", "flow"] = "eps"
    """What the U-Net predicts; `flow` is the velocity of a straight path from picture to noise."""
    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    """Noise schedule of eps, v and x0; flow has none."""
    time_mean: float = 0.0
    """Flow: mean of the logit of the time drawn in training; larger is noisier."""
    time_std: float = Field(default=1.0, gt=0)
    """Flow: its standard deviation."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples trained with the empty caption, for classifier-free guidance."""


class SampleConfig(Section):
    steps: PositiveInt = 50
    """Steps of the solver."""
    guidance: float = Field(default=7.5, ge=1)
    """Scale of classifier-free guidance; 1 is none."""
    solver: Literal["ddim", "ddpm", "euler", "dpm++", "unipc"] = "dpm++"
    """Solver of the exported pipeline."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample grids."""
    every: PositiveInt = 1000
    """Steps of stage two between two sample grids."""


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
        for name, stage in (("stage1", one), ("stage2", two)):
            for width in stage.channels:
                _divides(f"{name}.channels", width, stage.groups, f"{name}.groups")
            _divides(f"{name}.batch", stage.batch, stage.micro_batches, f"{name}.micro_batches")
        if not one.l1 + one.l2 + one.gradient:
            raise ValueError("stage1: l1, l2 and gradient are all 0; nothing would be learned, set one of them")
        if len(two.attention) != len(two.channels):
            raise ValueError(
                f"stage2.attention: {len(two.attention)} values for {len(two.channels)} levels of stage2.channels; "
                "give one a level"
            )
        for width, attends in zip(two.channels, two.attention, strict=True):
            if attends:
                _divides("stage2.channels", width, two.head_size, "stage2.head_size")
        if two.target == "flow" and self.sample.solver in ("ddim", "ddpm"):
            raise ValueError(
                f"sample.solver: {self.sample.solver!r} can't sample stage2.target 'flow'; use euler, dpm++ or unipc"
            )
        for prompt in self.sample.prompts:
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
            low, high = buckets.smallest or data.size // 2, buckets.largest or data.size * 2
            if not buckets.step <= low <= data.size <= high:
                raise ValueError(
                    f"data.buckets: step {buckets.step}, smallest {low}, data.size {data.size}, largest {high}; "
                    "each must be no more than the next"
                )
        if data.streaming and (data.buckets or data.cache != "none"):
            raise ValueError(
                "data.streaming: sizes aren't known beforehand; it needs data.buckets=null and data.cache=none"
            )
        if data.streaming and any(source.repeats > 1 or source.weight for source in data.source):
            raise ValueError("data.source: repeats and weight have no meaning with data.streaming; leave them out")


def _divides(key: str, value: int, divisor: int, why: str) -> None:
    if value % divisor:
        nearest = max(1, round(value / divisor)) * divisor
        raise ValueError(f"{key}: {value} is not a multiple of {divisor} ({why}); {nearest} would be")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration file, then applies overrides such as `stage2.lr=1e-4` (values are YAML)."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text("utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(
            f"--config: no file {path}; configurations that come with this project are in configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: can't read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'data:' and 'stage2:', found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    _add_kohya(tree)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], origin: str) -> Config:
    """A validated configuration from plain data; `origin` is named in errors."""
    try:
        return Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None


def dump(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data, every default written out."""
    return config.model_dump(mode="json")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` for each differing leaf."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} → {b}")
    return found


def _add_kohya(tree: dict[str, Any]) -> None:
    """Sizes and buckets that a kohya file sets, where the configuration does not say otherwise."""
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    for source in _sources(data.get("source")):
        path = source.get("path") if isinstance(source, dict) else None
        if isinstance(path, str) and (path.endswith(".toml") or source.get("kind") == "kohya"):
            for key, value in kohya.settings(Path(path)).items():
                if data.get(key) not in (None, value):
                    raise UserError(
                        f"data.{key}: {data[key]}, but {path} says {value}; data.{key}=null takes it from there"
                    )
                data[key] = value


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, except that `1e-4` is a number, and `no` and `on` are words, as YAML 1.2 has it."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's way)
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:bool"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected section.key=value, for example stage2.lr=1e-4")
    *sections, leaf = key.split(".")
    for section in sections:
        if section == "source" and isinstance(tree.get(section), str):
            tree[section] = {"path": tree[section]}
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        new = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: {value!r} is not valid YAML; quote it") from None
    if leaf == "source" and isinstance(tree.get(leaf), dict) and isinstance(new, str):
        new = {**tree[leaf], "path": new}  # how it is read may have been said before
    tree[leaf] = new


def _explain(error: ValidationError) -> str:
    """The first problem, in one line: key, value and remedy."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: Any = Config
        for part in first["loc"][:-1]:
            section = section.model_fields[part].annotation if isinstance(part, str) else section
            section = next((arg for arg in (section, *get_args(section)) if isinstance(arg, type(Section))), section)
        name = str(first["loc"][-1])
        close = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(section.model_fields)}"
        return f"unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"{key} is missing; set it in the file or give {key}=… on the command line"
    message = re.sub(r"^Value error, ", "", first["msg"])
    if not key:
        return message
    message = re.sub(r"^Input s", "s", message)
    close = difflib.get_close_matches(
        str(first["input"]), first.get("ctx", {}).get("expected", "").replace("'", "").split(" "), n=1
    )
    return f"{key}: {first['input']!r}: {message}" + (f"; did you mean {close[0].strip(',')!r}?" if close else "")


SOLVERS: tuple[str, ...] = get_args(SampleConfig.model_fields["solver"].annotation)
