"""The model card of a finished run, `RUN/README.md`, with the metadata that the Hub reads."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from ldm.config.schema import Config
from ldm.data import openmoji
from ldm.data.images import has_frames
from ldm.data.source_kinds import HUB_ID
from ldm.models.autoencoder import STATISTICS
from ldm.utils.atomic_files import atomic_file

IN_REPORT = (
    "real against real",
    "comparison",
    "memorization",
    "retrieval",
    "sampling of figures",
    "references",
)  # parts of evaluation.json that a card leaves out


def write_card(config: Config, figures: Mapping[str, Any] = MappingProxyType({})) -> None:
    """`README.md` of a finished run: its data, settings, figures, and a grid of samples.

    `figures`, as `evaluation.json` has them, are added to those of the autoencoder's own folder, a row each.
    """
    folder = config.run.dir
    facts = folder / "autoencoder" / STATISTICS
    held_out = json.loads(facts.read_text("utf-8")).get("held_out", {}) if facts.exists() else {}
    rebuilt = {name: held_out[name] for name in ("psnr", "ssim") if name in held_out}
    framed, grids = False, list((folder / "stage2" / "samples").glob("step-*.png"))
    if grids:
        newest = max(grids, key=lambda path: int(path.stem.removeprefix("step-")))
        shutil.copy(newest, folder / "samples.png")
        with Image.open(newest) as sheet:
            framed = has_frames(sheet)
    stage1, stage2 = config.stage1, config.stage2
    autoencoder = "none: pixels" if stage1.needs_none else f"{stage1.model}, {stage1.steps} steps of {stage1.batch}"
    unet = stage2.init_from or f"channels {list(stage2.channels)}"
    schedule = "" if stage2.prediction_type == "flow" else f", {stage2.beta_schedule} schedule"
    lines = [
        "---",
        _metadata(config, {**rebuilt, **figures}),
        "---",
        "",
        f"# {folder.name}",
        "",
        f"{_kind(config)} {_usage(config)}" if config.finetune.kind == "full" else _adapter(config),
        "",
        *(["![samples](samples.png)", ""] if grids else []),
        *(["Framed: prompts of held-out images.", ""] if framed else []),
        "| | |",
        "|---|---|",
        f"| data | `{config.data.name}`, {config.data.size} px |",
        f"| conditions | {', '.join(stage2.conditions) or 'none'} |",
        *([f"| text encoder | `{config.text.model}`{', trained along' * config.text.train} |"] if stage2.text else []),
        f"| autoencoder | {stage1.pretrained or autoencoder} |",
        f"| U-Net | {unet}, {stage2.steps} steps of {stage2.batch} |",
        *([f"| trained | {_trained(config)} |"] if config.finetune.kind != "full" else []),
        f"| process | {stage2.prediction_type}{schedule} |",
        f"| sampling | {config.sample.solver}, {config.sample.steps} steps, guidance {config.sample.guidance} |",
        *(f"| {name} | {value} |" for name, value in _rows({**rebuilt, **figures})),
        "",
        *([openmoji.ATTRIBUTION, ""] if any(source.path in openmoji.SUBSETS for source in config.data.source) else []),
        "All settings are in `config.yaml`, all curves and figures in `report.html`.",
        "",
    ]
    with atomic_file(folder / "README.md") as tmp_path:
        tmp_path.write_text("\n".join(lines), "utf-8")


def _adapter(config: Config) -> str:
    """What a run hands over that changes a frozen model."""
    finetune = config.finetune
    what, folder = ("adapter", "lora") if finetune.adapter else ("word", "embeddings")
    text = (
        f"A {finetune.kind} {what} of {config.stage2.init_from}. The folder `{folder}` has it in the layouts of "
        "several programs, and a README that says how to use it."
    )
    return f"{text} {_usage(config)}" if finetune.merge else text


def _trained(config: Config) -> str:
    finetune = config.finetune
    if finetune.kind == "inversion":
        return f"the embedding of `{finetune.token}`, {finetune.vectors} × {finetune.initializer!r} at the start"
    layers = f"{finetune.targets}{', text encoder too' * finetune.text_encoder}"
    return f"{finetune.kind} of rank {finetune.rank}, alpha {finetune.alpha or finetune.rank}: {layers}"


def _kind(config: Config) -> str:
    stage2, space = config.stage2, "latent" if config.stage1.factor > 1 else "pixel"
    if stage2.image:
        task = "inpaints images" if "inpaint" in stage2.conditions else f"upscales images {config.stage1.factor}-fold"
        return f"A {space} diffusion model that {task}."
    kind = "text-to-image" if stage2.text else "class-conditional" if stage2.classes else "unconditional"
    return f"A {kind} {space} diffusion model."


def _usage(config: Config) -> str:
    """How the pipeline is used: in plain diffusers where its pipelines have arguments for the model's conditions."""
    stage2, sample, folder = config.stage2, config.sample, config.run.dir / "pipeline"
    prompt = json.dumps((sample.prompts or ("a red heart",))[0], ensure_ascii=False)
    steps = f"num_inference_steps={sample.steps}"
    guided = f"{steps}, guidance_scale={sample.guidance}"
    call = {
        "text": f"pipe({prompt}, {guided}).images[0]",
        "": f"pipe({steps}).images[0]",
        "text inpaint": f"pipe({prompt}, image=image, mask_image=mask, {guided}).images[0]",
        "text upscale": f"pipe({prompt}, image=small, {guided}).images[0]",
    }.get(" ".join(stage2.conditions))
    decoded = not stage2.text or config.stage1.family in ("kl", "tiny")  # by diffusers' Stable Diffusion pipelines
    needs_ldm = stage2.uncond_embedding == "learned" or config.text.chunks > 1 or not decoded
    if call and not needs_ldm:
        code = [
            "from diffusers import DiffusionPipeline",
            f'pipe = DiffusionPipeline.from_pretrained("{folder}")',
            call,
        ]
        return "\n".join(["The folder `pipeline` opens in plain diffusers:", "", "```python", *code, "```"])
    arguments = {"text": prompt, "class": "labels=0", "inpaint": "image=image, mask=mask", "upscale": "image=small"}
    keywords = ", ".join(arguments[name] for name in stage2.conditions if name in arguments)
    code = [
        "from ldm.sampling.pipeline import LatentDiffusion",
        f'model = LatentDiffusion.load("{folder}")',
        f"model({keywords})[0]",
    ]
    return "\n".join(["With `ldm` installed:", "", "```python", *code, "```"])


def _rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and texts of figures; those with an interval, as of `evaluation.json`, with it."""
    for names, figure in _flat(figures):
        low, high = figure.get("low"), figure.get("high")
        bar = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        images = f", {figure['images']:,} images" if figure.get("images") else ""
        yield " ".join(names), f"{figure['value']:.3f}{bar}{images}"


def _flat(
    figures: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Finite figures by their names and those of the mappings that they are in."""
    for name, value in figures.items():
        if not above and name in IN_REPORT:
            continue
        names = above if (not above and name == "figures") else (*above, name)
        if isinstance(value, Mapping) and not isinstance(value.get("value"), float):
            yield from _flat(value, names)
            continue
        figure = value if isinstance(value, Mapping) else {"value": value}
        if isinstance(figure["value"], float) and math.isfinite(figure["value"]):
            yield names, figure


def _metadata(config: Config, figures: Mapping[str, Any]) -> str:
    """The YAML at a card's top, as the Hub defines it: huggingface.co/docs/hub/model-cards."""
    stage2, sources = config.stage2, config.data.source
    if stage2.image:
        task = "image-to-image"
    else:
        task = "text-to-image" if stage2.text else "unconditional-image-generation"
    hub = [source.path for source in sources if source.kind in ("auto", "datasets") and _on_hub(source.path)]
    base = str(stage2.init_from) if stage2.init_from and _on_hub(str(stage2.init_from)) else None
    drawn = all(source.path in openmoji.SUBSETS for source in sources) and not stage2.init_from
    kind = "textual_inversion" if config.finetune.kind == "inversion" else config.finetune.kind
    tags = ["diffusers", "ldm", "latent-diffusion" if config.stage1.factor > 1 else "pixel-diffusion"]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        tags=[*tags, task, *([kind] if kind != "full" else [])],
        base_model=base,
        base_model_relation=("finetune" if kind == "full" or config.finetune.merge else "adapter") if base else None,
        datasets=hub or None,
        license="cc-by-sa-4.0" if drawn else None,  # of the images, which the samples are much like
        model_name=config.run.dir.name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=config.data.name,
                dataset_name=config.data.name,
                metric_type=_metric_type(names),
                metric_name=" ".join(names) + (f" ({figure['images']:,} images)" if figure.get("images") else ""),
                metric_value=figure["value"],
            )
            for names, figure in _flat(figures)
            if names != ("guidance",) and not any("shuffled" in name for name in names)  # a setting, and chance
        ]
        or None,
    )
    return data.to_yaml()


def _metric_type(names: Sequence[str]) -> str:
    """The Hub's name of a metric; "fid" and the like are of Inception, those of other networks are named after them."""
    *above, metric = (name.lower().replace(" ", "-") for name in names)
    return metric if not above or above[-1] == "inception" else f"{metric}-{above[-1]}"


def _on_hub(name: str) -> bool:
    """Whether it can only be an id of the Hub."""
    return bool(HUB_ID.match(name)) and not Path(name).exists()
