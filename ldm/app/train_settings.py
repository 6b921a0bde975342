"""What a training of the page *Train* can start from, and its settings as the schema has them: no widgets here."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from ldm.app.data_check import check_links
from ldm.app.roots import INDEX, inside, outside, pipelines, roots, short
from ldm.config import kohya, loader
from ldm.config.schema import Config, Section
from ldm.data.archives import TARS
from ldm.data.formats import is_image_file
from ldm.data.records import BadSample
from ldm.data.sources import Sources
from ldm.utils.errors import UserError
from ldm.utils.paths import expand

SCRATCH, FULL, LORA = KINDS = ("From scratch", "Full fine-tune", "LoRA")
TINY = "tiny.yaml"
MAX_FOLDERS, MAX_ENTRIES = 50, 200  # of images that are offered; of a folder that are looked at
MAX_PROMPTS = 4  # captions that become prompts
REMOTE = re.compile(r"(https?|hf|s3|gs)://")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Base:
    """A configuration to start from; `overrides` make it one of a model that is there."""

    name: str
    path: Path
    overrides: tuple[str, ...] = ()

    @property
    def run_name(self) -> str:
        """The name that its run begins with."""
        if not self.overrides:
            return self.path.stem
        return f"{self.path.parent.name}-{'lora' if 'finetune.kind=lora' in self.overrides else 'tuned'}"

    @property
    def description(self) -> str:
        """The first paragraph of the file's comment."""
        text = self.path.read_text("utf-8").partition("\n#\n")[0]
        return " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))


@dataclass(frozen=True)
class Setting:
    """A key of the configuration; what a person types for it is the text of an override."""

    key: str
    info: FieldInfo

    @property
    def name(self) -> str:
        return self.key.partition(".")[2]

    @property
    def help(self) -> str:
        """Its docstring, without links, which lead into the documentation's folder."""
        text = re.sub(r"\[([^]]+)]\([^)]*\)", r"\1", " ".join((self.info.description or "").split()))
        return f"{text}\n\n`{self.key}`"

    @property
    def widget(self) -> Literal["switch", "choice", "number", "lines", "text"]:
        """How it is shown."""
        kind = self.info.annotation
        if kind is bool:
            return "switch"
        if get_origin(kind) is Literal:
            return "choice"
        if kind is int:
            return "number"
        return "lines" if get_args(kind) == (str, ...) else "text"

    @property
    def choices(self) -> list[str]:
        return list(get_args(self.info.annotation))

    def shown(self, config: Config) -> Any:
        """The value of a configuration, as its widget has it."""
        section, name = self.key.split(".")
        value = getattr(getattr(config, section), name)
        if self.widget in ("switch", "choice", "number"):
            return value
        if self.widget == "lines":
            return "\n".join(value)
        if value is None or isinstance(value, str | Path):
            return str(value or "")
        plain = _plain(value)
        if self.key == "data.source" and len(plain) == 1 and plain[0].keys() == {"path"}:
            return plain[0]["path"]
        return json.dumps(plain, ensure_ascii=False)

    def override(self, value: Any) -> str:
        """The override for what was chosen or typed."""
        if self.widget == "switch":
            text = "true" if value else "false"
        elif self.widget == "lines":
            text = json.dumps([line.strip() for line in value.splitlines() if line.strip()], ensure_ascii=False)
        else:
            empty = '""' if NoneType not in get_args(self.info.annotation) else "null"
            text = str(value).strip() if value not in (None, "") else empty
        return f"{self.key}={text}"


def _plain(value: Any) -> Any:
    """A value as JSON has it, sections without their defaults."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def settings() -> dict[str, dict[str, Setting]]:
    """All keys of the schema, by section and key. The run's folder is the form's own; a budget is the command's."""
    keys: dict[str, dict[str, Setting]] = {}
    for section, field in Config.model_fields.items():
        if section == "budget":
            continue
        kind = field.annotation
        assert isinstance(kind, type) and issubclass(kind, Section)
        all_of_section = (Setting(f"{section}.{name}", info) for name, info in kind.model_fields.items())
        keys[section] = {setting.key: setting for setting in all_of_section if setting.key != "run.dir"}
    return keys


def resolve(base: Base, overrides: Sequence[str]) -> Config:
    """The configuration; UserError by the loader's rules, or where a path is outside of the roots."""
    try:
        config = loader.load(base.path, [*base.overrides, *overrides])
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{base.path}: ")) from None
    for key, path in _paths(config, ""):
        _check_inside(key, path)
    for source in config.data.source:
        if source.kind == "kohya" or source.path.endswith(".toml"):
            for subset in kohya.subsets(Path(source.path)):
                for folder in filter(None, (subset.folder, subset.conditioning_data_dir)):
                    _check_inside(source.path, folder)
    return config


def _paths(section: BaseModel, prefix: str) -> Iterator[tuple[str, str | Path]]:
    """Keys and values that are paths, or, where they are strings, may be."""
    for name, info in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, BaseModel):
                yield from _paths(item, f"{key}.")
            elif item and _expands(info) and (name, item) != ("mask", "alpha"):
                parts = str(item).split(":")[1:] if str(item).startswith("open_clip:") else [item]
                yield from ((key, part) for part in parts)


def _expands(info: FieldInfo) -> bool:
    """Whether `~` and `$` are expanded in a key's values, which makes them paths."""
    inner = (data for kind in get_args(info.annotation) for data in getattr(kind, "__metadata__", ()))
    validators = (data for data in (*info.metadata, *inner) if isinstance(data, AfterValidator))
    return any(getattr(validator.func, "__name__", "").strip("_") == expand.__name__ for validator in validators)


def _check_inside(key: str, text: str | Path) -> None:
    """UserError where it is a path outside of the roots, links followed; a string may be a name of the Hub."""
    try:
        path = Path(text)
        if isinstance(text, str) and (REMOTE.match(text) or (HUB_ID.fullmatch(text) and not path.exists())):
            return
        path = path.resolve()
        refused = "" if inside(path) else outside(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {str(text)!r} can't be read ({error}); give another") from None
    if refused:
        raise UserError(f"{key}: {refused}")


def tidy(path: Path) -> Path:
    """A path as one types it in the folder where the app was started."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def configurations() -> Path | None:
    """The folder of the configurations that come with the project; None where only the package is installed."""
    here = Path(__file__).parents[2] / "configs"
    return next((folder for folder in (Path("configs"), tidy(here)) if (folder / TINY).is_file()), None)


def bases(kind: str) -> list[Base]:
    """What a training of this kind can start from: finished runs first, the newest one before, then files."""
    found = []
    for path in sorted(folder.glob("*.yaml") if (folder := configurations()) else ()):
        if not (config := _loaded(path, path.stat().st_mtime)):
            continue
        of_kind = SCRATCH if not config.stage2.init_from else FULL if config.finetune.kind == "full" else LORA
        if of_kind == kind:
            found.append((config.data.size, Base(path.stem, path)))
    own = [base for pipeline in newest_pipelines() if kind != SCRATCH and (base := _of_model(pipeline, kind))]
    return own + [base for _, base in sorted(found, key=lambda pair: (pair[0], pair[1].name))]


@lru_cache(maxsize=256)
def _loaded(path: Path, changed: float) -> Config | None:
    """The configuration of a file, read anew where it has `changed`; None where it is none."""
    try:
        return loader.load(path)
    except UserError:
        return None


def _of_model(pipeline: Path, kind: str) -> Base | None:
    """Continues a finished run's model on other images; None where that isn't the result of a plain training."""
    file = tidy(pipeline.parent / "config.yaml")
    config = _loaded(file, file.stat().st_mtime) if file.is_file() else None
    if config is None or config.finetune.kind != "full":
        return None
    model, stage2 = tidy(pipeline), config.stage2
    overrides = [f"stage1.pretrained={model}", "stage1.init_from=null", f"stage2.init_from={model}"]
    overrides += [f"text.model={model}", "text.normalize=false"] if stage2.text else []
    # as configs/lora-openmoji.yaml, whose adapter of a small model is measured; a tenth of its rate for all weights
    of_adamw = stage2.lr / (1 if stage2.optimizer != "muon" else 3 if stage2.muon_lr else 2)
    rate = of_adamw / (2 if kind == LORA else 10)
    overrides += [f"stage2.lr={rate:.3g}", "stage2.steps=300", "stage2.lr_warmup_steps=20", "stage2.ema_decay=0.95"]
    overrides += [f"stage2.batch={min(16, stage2.batch)}", "stage2.lr_scheduler=cosine", "stage2.checkpoint_every=100"]
    overrides += ["stage2.optimizer=adamw", "stage2.muon_lr=null", "sample.every=50"]  # or the first samples come late
    overrides += ["finetune.kind=lora", "finetune.targets=all"] if kind == LORA else []
    return Base(f"{short(pipeline.parent)}, your model", file, tuple(overrides))


def fitting_images(config: Config) -> dict[str, Any]:
    """Settings, by key as their widgets have them, that fit the folder of images of a configuration.

    A step has no more images than there are, and some captions are the prompts. Empty where it is no folder, has links
    that lead out of the roots, or can't be read.
    """
    folder = Path(config.data.source[0].path)
    if len(config.data.source) > 1 or not folder.is_dir():
        return {}
    batches = {"stage2.batch": config.stage2.batch}
    if not config.stage1.needs_none:
        batches["stage1.batch"] = config.stage1.batch
    try:
        check_links(folder)
        records = Sources(config.data.source, config.data.size, folder, config.stage2.conditions).records(0)
        good = (record for record in records if not isinstance(record, BadSample))
        images = list(itertools.islice(good, max(MAX_ENTRIES, *batches.values())))
    except (UserError, OSError):
        return {}
    fitting: dict[str, Any] = {key: len(images) for key, batch in batches.items() if 0 < len(images) < batch}
    captions = list(dict.fromkeys(record.captions[0] for record in images if record.captions[0]))
    if config.stage2.text and captions:
        fitting["sample.prompts"] = "\n".join(captions[:: -(-len(captions) // MAX_PROMPTS)])
    return fitting


def shares_caption(config: Config) -> bool:
    """Whether all images would share a caption guessed from a folder's name, which a training takes with `--yes`."""
    try:
        for source in config.data.source:
            check_links(Path(source.path))
        sources = Sources(config.data.source, config.data.size, Path(), config.stage2.conditions)
        return bool(sources.unconfirmed_caption())
    except (UserError, OSError):  # which the training says
        return False


def image_sources() -> list[str]:
    """Folders with images, archives or class folders in the roots, without those of runs; at most `MAX_FOLDERS`."""
    paths: list[Path] = []
    for root in roots():
        sources: list[Path] = []
        for folder in (root, *root.glob("*/"), *root.glob("*/*/")):
            of_run = any((parent / "config.yaml").exists() for parent in (folder, folder.parent))
            if not of_run and inside(folder.resolve()) and (source := _image_source(folder)):
                sources.append(source)
        parents = Counter(source.parent for source in sources)
        classes = [parent for parent, count in parents.items() if count > 1 and parent not in (root, root.parent)]
        paths += sorted({*sources, *classes})
    return [str(tidy(path)) for path in dict.fromkeys(paths)][:MAX_FOLDERS]


def _image_source(folder: Path) -> Path | None:
    """The folder where it has images or several archives, else its only archive; None without either."""
    try:
        names = [path.name for path, _ in zip(folder.iterdir(), range(MAX_ENTRIES), strict=False)]
    except OSError:
        return None
    archives = [name for name in names if name.endswith((*TARS, ".parquet"))]
    if len(archives) == 1 and not any(map(is_image_file, names)):
        return folder / archives[0]
    return folder if archives or any(map(is_image_file, names)) else None


def newest_pipelines() -> list[Path]:
    """Those of `pipelines`, the newest first."""
    return sorted(pipelines(), key=lambda model: (model / INDEX).stat().st_mtime, reverse=True)


def default_size() -> int:
    """The side of the training images of the newest model in the roots; without one, of the smallest configuration."""
    files = [*(model.parent / "config.yaml" for model in newest_pipelines()), *(base.path for base in bases(SCRATCH))]
    configs = (config for file in filter(Path.is_file, files) if (config := _loaded(file, file.stat().st_mtime)))
    return next((config.data.size for config in configs), 512)


def free_name(name: str) -> str:
    """The name, or with a number, of which there is no run in the first root."""
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, 10**6))
    return next(name for name in names if not (roots()[0] / name / "config.yaml").exists())


def configuration(run: Path) -> Mapping[str, Any]:
    """A run's configuration as its file has it; empty where it has none yet, or is a model made from a run."""
    file = run / "config.yaml"
    return _tree(file, file.stat().st_mtime_ns) if file.is_file() else {}


@lru_cache(maxsize=256)
def _tree(file: Path, changed: int) -> Mapping[str, Any]:
    """The configuration in a run's file, read anew where that has `changed`."""
    try:
        tree = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree["configuration"] if isinstance(tree, dict) and isinstance(tree.get("configuration"), dict) else {}
