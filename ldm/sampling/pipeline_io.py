"""A model ↔ the folder of a diffusers pipeline, which plain diffusers opens too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LDMPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from transformers.utils import logging as text_logging

from ldm.diffusion.schedules import betas
from ldm.models.autoencoder import Autoencoder, Identity, fold
from ldm.models.conditioning import MAX_NOISE_LEVEL
from ldm.models.convert import checkpoint
from ldm.models.convert.safetensors_file import opened
from ldm.models.convert.unet import prediction_type_of
from ldm.models.finite import check_weights
from ldm.models.text_encoder import AnyTextEncoder, TextEncoder, TextEncoders
from ldm.models.text_encoder_files import TWO
from ldm.models.weight_files import contents, load_variant
from ldm.utils.atomic_files import atomic_folder
from ldm.utils.errors import UserError, first_line

FACTS, NULL = "ldm.json", "null.safetensors"  # files in a pipeline's folder that plain diffusers ignores
PIPELINES = (
    StableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    LatentConsistencyModelPipeline,
    DDPMPipeline,
    DDIMPipeline,
    LDMPipeline,
)
UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}  # components of pipelines
Model: TypeAlias = Any  # ldm.sampling.pipeline.LatentDiffusion
UPSCALER_SCALING_FACTOR = 0.08333  # the only one that diffusers' StableDiffusionUpscalePipeline does not replace


def read(name: str | Path, option: str = "--model", base: str | None = None) -> dict[str, Any]:
    """The fields of a LatentDiffusion from a diffusers folder or Hub id; UserError for an unknown kind of pipeline.

    Weights are read from safetensors only. Errors name `option`, the flag or key that `name` came from. `name` may be a
    single file in the layout of Stable Diffusion 1, 2 or XL; its configuration and tokenizers are those of `base`, a
    pipeline of the same family: by default the published one, from the Hub.
    """
    if Path(name).suffix == ".safetensors":
        return _fields(_read_file(Path(name), option, base), {}, None, str(name), option)
    if base:
        raise UserError(f"--base: has no effect on {name}, which has a configuration of its own; leave it out")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # our own error repeats what it logs
    try:
        config = DiffusionPipeline.load_config(str(name))
        kind = next((kind for kind in PIPELINES if kind.__name__ == config.get("_class_name")), None)
        if not kind:
            known = ", ".join(kind.__name__ for kind in PIPELINES)
            raise UserError(f"{option}: {name} is a {config.get('_class_name')}; known are {known}")
        components: dict[str, Any] = {"vae": None} if config.get("vae") == [None, None] else {}  # diffusion on pixels
        components |= dict.fromkeys(UNUSED & config.keys())  # a folder may lack them
        for part in ("text_encoder", "text_encoder_2"):  # alone: a pipeline would initialise missing weights at random
            if config.get(part, [None])[0]:
                components[part] = _text_encoder(str(name), part, config[part][1])
        for part in ("unet", "vae", "vqvae"):
            library, class_name = config.get(part) or ("", "")
            if library == "diffusers" and (component := getattr(diffusers, str(class_name), None)):
                components[part] = load_variant(component.from_pretrained, str(name), part)
        pipeline = kind.from_pretrained(str(name), use_safetensors=True, **components)
        facts, null = _facts(Path(name))
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError, ArithmeticError) as error:
        reason = first_line(error)
        raise UserError(f"{option}: can't load a pipeline from {str(name)!r}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
    return _fields(pipeline, facts, null, str(name), option)


def read_outline(folder: Path) -> dict[str, Any]:
    """The fields of a LatentDiffusion that has no weights, by the configurations in a folder that `write` made.

    Its networks are on the meta device, which takes no memory; its text encoder has `models` and `chunks` alone.
    """
    config = DiffusionPipeline.load_config(str(folder))
    networks: dict[str, Any] = {}
    with torch.device("meta"):
        for part in ("unet", "vae", "vqvae", *(f"text_encoder{suffix}" for suffix in TWO)):
            library, class_name = config.get(part) or (None, "")
            if library == "diffusers":
                kind = getattr(diffusers, str(class_name))
                networks[part] = kind.from_config(kind.load_config(str(folder), subfolder=part))
            elif library:
                kind = getattr(transformers, str(class_name))
                networks[part] = kind(kind.config_class.from_pretrained(folder / part))
    encoders = [network for part, network in networks.items() if part.startswith("text_encoder")]
    scheduler = getattr(diffusers, config["scheduler"][1])
    facts, null = _facts(folder)
    return {
        "text": SimpleNamespace(models=encoders, chunks=getattr(encoders[-1].config, "chunks", 1))
        if encoders
        else None,
        "unet": networks["unet"],
        "autoencoder": Autoencoder(networks.get("vqvae") or networks.get("vae") or Identity()),
        "scheduler": scheduler.from_pretrained(str(folder), subfolder="scheduler"),
        "null": null,
        "classes": tuple(facts.get("classes", ())),
    }


def _read_file(path: Path, option: str, base: str | None) -> DiffusionPipeline:
    """The pipeline of a single file; what it predicts is taken from the file where that says it."""
    with opened(path) as file:
        names, metadata = set(file.keys()), file.metadata() or {}
        first = f"{checkpoint.UNET}input_blocks.0.0.weight"
        channels = file.get_slice(first).get_shape()[1] if first in names else 0
    layout = checkpoint.layout_of_names(names)
    kinds: dict[Any, Any] = {
        (False, 4): StableDiffusionPipeline,
        (False, 9): StableDiffusionInpaintPipeline,
        (True, 4): StableDiffusionXLPipeline,
        (True, 9): StableDiffusionXLInpaintPipeline,
    }
    if not layout or not (kind := kinds.get((layout == "sdxl", channels))):
        raise UserError(
            f"{option}: {path} holds {contents(names)}; give a whole checkpoint of Stable Diffusion 1, 2 or XL"
        )
    options: dict[str, Any] = {"safety_checker": None} if layout != "sdxl" else {}
    pipeline = checkpoint.read_pipeline(path, kind, option, base, **options)
    changes: dict[str, Any] = {}
    if predicts := prediction_type_of(names, metadata):
        changes["prediction_type"] = predicts
    if "ztsnr" in names:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = type(pipeline.scheduler).from_config({**pipeline.scheduler.config, **changes})
    return pipeline


def _fields(
    pipeline: DiffusionPipeline, facts: dict[str, Any], null: torch.Tensor | None, name: str, option: str
) -> dict[str, Any]:
    if "prediction_type" not in pipeline.scheduler.config:
        scheduler = type(pipeline.scheduler).__name__
        raise UserError(
            f"{option}: {name} comes with {scheduler}, which these pipelines of diffusers can't run; save another"
        )
    vae = getattr(pipeline, "vqvae", None) or getattr(pipeline, "vae", None) or Identity()
    encoders = (getattr(pipeline, f"text_encoder{suffix}", None) for suffix in TWO)
    for module in (pipeline.unet, vae, *filter(None, encoders)):
        if missing := [key for key, tensor in module.state_dict().items() if tensor.is_meta]:
            raise UserError(f"{option}: {name} lacks {missing[0]} and {len(missing) - 1} more weights; fetch it anew")
    return {
        "text": _text(pipeline, name, option),
        "unet": pipeline.unet.eval(),
        "autoencoder": Autoencoder(vae),
        "scheduler": pipeline.scheduler,
        "null": null,
        "classes": tuple(facts.get("classes", ())),
        **_default_options(pipeline),
        **{key: facts[key] for key in ("steps", "guidance") if key in facts},
    }


def _text_encoder(name: str, part: str, class_name: str) -> Any:
    """A text encoder of a pipeline; ValueError if its files lack weights."""
    verbosity = text_logging.get_verbosity()
    text_logging.set_verbosity(text_logging.CRITICAL)
    try:
        encoder, loading_info = load_variant(
            getattr(transformers, class_name).from_pretrained,
            name,
            part,
            output_loading_info=True,
            dtype=torch.float32,
        )
    finally:
        text_logging.set_verbosity(verbosity)
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"its {part} lacks {missing[0]} and {len(missing) - 1} more")
    return encoder


def _text(pipeline: DiffusionPipeline, name: str, option: str) -> AnyTextEncoder | None:
    """The text encoder of a pipeline, or both of SDXL's; UserError where one is missing."""
    if "text_encoder" not in pipeline.config:
        return None
    first, second = (getattr(pipeline, f"text_encoder{suffix}", None) for suffix in TWO)
    if "text_encoder_2" not in pipeline.config:
        if not first:
            raise UserError(f"{option}: {name} was saved without its text encoder; fetch it anew")
        return TextEncoder(first, pipeline.tokenizer)
    if pipeline.config.get("requires_aesthetics_score"):
        raise UserError(
            f"{option}: {name} is a refiner, which finishes the images of another model; give the base model"
        )
    if not first or not second:
        missing = "text_encoder_2" if first else "text_encoder"
        raise UserError(f"{option}: {name} lacks its {missing}; SDXL has two text encoders: fetch it anew")
    tokenizers = pipeline.tokenizer, pipeline.tokenizer_2
    encoders = [
        TextEncoder(model, tokenizer, penultimate=True)
        for model, tokenizer in zip((first, second), tokenizers, strict=True)
    ]
    return TextEncoders(encoders, pipeline.config.get("force_zeros_for_empty_prompt", True))


def _default_options(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Steps and guidance for the pipeline's class, where its folder does not record them."""
    if isinstance(pipeline, LatentConsistencyModelPipeline):
        return {"steps": 4, "guidance": 8.5}
    if isinstance(pipeline, DDPMPipeline):
        return {"steps": pipeline.scheduler.config.num_train_timesteps}
    return {}


def write(model: Model, folder: Path) -> None:
    """Writes a folder that plain diffusers opens as the pipeline of the model's task; extra files are for `read`.

    UserError, before anything is written, where weights are not finite.
    """
    parts = {"U-Net": model.unet, "null embedding": model.null}
    for number, encoder in enumerate(model.text.models if model.text else (), start=1):
        parts["text encoder" if number == 1 else f"text encoder {number}"] = encoder
    if not isinstance(model.autoencoder.vae, Identity):
        parts["autoencoder"] = model.autoencoder.vae
    check_weights({name: part for name, part in parts.items() if part is not None}, folder)
    with atomic_folder(folder) as tmp_path:
        pipeline_of(model).save_pretrained(tmp_path)
        facts = {"steps": model.steps, "guidance": model.guidance, "classes": list(model.classes)}
        (tmp_path / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        if model.null is not None:
            save_file({"null": model.null.detach().float().cpu().contiguous()}, tmp_path / NULL)


def pipeline_of(model: Model) -> DiffusionPipeline:
    vae = None if isinstance(model.autoencoder.vae, Identity) else model.autoencoder.vae
    if not model.text:
        if vae is None:
            return DDPMPipeline(unet=model.unet, scheduler=model.scheduler)
        return LDMPipeline(vqvae=vae, unet=model.unet, scheduler=model.scheduler)
    if isinstance(vae, AutoencoderDC):  # the pipeline derives its scale factor from it
        vae.register_to_config(block_out_channels=vae.config.encoder_block_out_channels)
    if isinstance(model.text, TextEncoders):
        return _sdxl_pipeline(model, vae)
    parts: dict[str, Any] = {
        "text_encoder": model.text.model,
        "tokenizer": model.text.tokenizer,
        "unet": model.unet,
        "scheduler": model.scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }
    if model.task == "inpaint":
        return StableDiffusionInpaintPipeline(vae=vae, **parts, requires_safety_checker=False)
    if model.task == "upscale":
        if isinstance(vae, AutoencoderKL):
            zeros = torch.zeros(model.autoencoder.channels)
            vae = fold(vae, zeros, torch.full_like(zeros, UPSCALER_SCALING_FACTOR / model.autoencoder.scale))
            vae.register_to_config(scaling_factor=UPSCALER_SCALING_FACTOR)
        low_res_scheduler = DDPMScheduler(trained_betas=betas("scaled_linear").tolist())
        return StableDiffusionUpscalePipeline(
            vae=vae, **parts, low_res_scheduler=low_res_scheduler, watermarker=None, max_noise_level=MAX_NOISE_LEVEL
        )
    return StableDiffusionPipeline(vae=vae, **parts, requires_safety_checker=False)


def _sdxl_pipeline(model: Model, vae: Any) -> DiffusionPipeline:
    first, second = model.text.encoders
    kind = StableDiffusionXLInpaintPipeline if model.task == "inpaint" else StableDiffusionXLPipeline
    return kind(
        vae=vae,
        text_encoder=first.model,
        text_encoder_2=second.model,
        tokenizer=first.tokenizer,
        tokenizer_2=second.tokenizer,
        unet=model.unet,
        scheduler=model.scheduler,
        force_zeros_for_empty_prompt=model.text.zero_null,
        add_watermarker=False,
    )


def _facts(folder: Path) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The facts and null embedding that `write` saved; none in other people's folders or on the Hub."""
    facts = dict(json.loads((folder / FACTS).read_text("utf-8"))) if (folder / FACTS).exists() else {}
    return facts, load_file(folder / NULL)["null"] if (folder / NULL).exists() else None
