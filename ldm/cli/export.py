"""A model as one file for ComfyUI and A1111, or as a diffusers folder; what was written is read again and compared.

    ldm-export runs/openmoji --to single-file --precision fp16 --out openmoji.safetensors
    ldm-export style.safetensors --to lora --layout diffusers --base BASE --out converted.safetensors
    ldm-export runs/large/stage2/checkpoints/step-050000 --to checkpoint --out step-050000

The file has the original layout of Stable Diffusion 1, 2 or XL, whichever has names for the model's tensors.
`--to lora` converts an adapter between the layouts of diffusers and kohya. `--to checkpoint` merges a checkpoint that
FSDP wrote in shards: the files are those of one that was gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging

from ldm.cli.compare import compare_images, compare_tensors, parts_of, size_of
from ldm.cli.export_lora import export_lora
from ldm.models.autoencoder import fold
from ldm.models.convert import checkpoint, safetensors_file
from ldm.models.convert.unet import NOISE_SCHEDULE
from ldm.models.finite import check_weights
from ldm.sampling import pipeline_io
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.checkpoint import checkpoints, merge_shards
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import Parser, UserError, command
from ldm.utils.paths import path_or_id
from ldm.utils.precision import DTYPES

OVERFLOW = (
    "SDXL's autoencoder is stored in fp16, but overflows when it is computed in fp16: diffusers (force_upcast) and "
    "ComfyUI take a wider type, A1111 with --no-half-vae"
)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    names = "a finished run, a diffusers folder, a Hub id, or a file; --to checkpoint: a checkpoint's folder, or a run"
    parser.add_argument("model", type=path_or_id, help=names)
    base = "of a single file: a pipeline of the same family; of an adapter: the model that it was trained on"
    parser.add_argument("--base", type=path_or_id, help=base)
    parser.add_argument("--to", required=True, choices=("single-file", "diffusers", "lora", "checkpoint"))
    parser.add_argument("--layout", choices=("diffusers", "kohya"), help="of the adapter that --to lora writes")
    parser.add_argument("--precision", default="no", choices=DTYPES, help="of all weights; default: no, float32")
    parser.add_argument("--out", required=True, type=Path, help="the .safetensors, or the folder, to write")
    args = parser.parse_args(arguments)
    check_out(args.out, args.to)
    unused = {"--base": args.base, "--layout": args.layout, "--precision": args.precision != "no"}
    if args.to == "checkpoint" and (flags := [flag for flag, is_set in unused.items() if is_set]):
        raise UserError(f"{flags[0]}: has no effect with --to checkpoint, whose tensors stay as they are; leave it out")
    if args.to == "lora":
        export_lora(args.model, args.base, args.layout, DTYPES[args.precision], args.out)
        return
    if args.to == "checkpoint":
        export_checkpoint(args.model, args.out)
        return
    if args.layout:
        raise UserError(f"--layout: is of an adapter, --to lora; leave it out with --to {args.to}")
    run_pipeline = Path(args.model) / "pipeline"
    name = str(run_pipeline) if run_pipeline.is_dir() else args.model
    model = LatentDiffusion(**pipeline_io.read(name, "model", args.base))
    write_and_compare(model, args.base or name, args.to, args.precision, args.out)


def write_and_compare(
    model: LatentDiffusion, config: str, to: str, precision: str, out: Path, say: Callable[[str], None] = print
) -> None:
    """Writes a model, reads it again with plain diffusers, and compares all tensors and an image.

    Says what was found, line by line. `config` is the folder or Hub id with the configuration that a single file lacks.
    UserError where a tensor differs.
    """
    model = in_precision(model, DTYPES[precision])
    if to == "diffusers":
        model.save(out)
        absent = {"safety_checker": None} if "safety_checker" in DiffusionPipeline.load_config(out) else {}
        written = DiffusionPipeline.from_pretrained(out, dtype=torch.float32, **absent)
    else:
        layout = write_single_file(model, out)
        written = read_single_file(model, out, config)
        say(f"layout   {layout}")
        if not has_published_widths(model, layout):
            widths = ", ".join(map(str, checkpoint.WIDTHS[layout]))
            say(f"note     ComfyUI and A1111 open U-Nets of widths {widths} alone; diffusers opens it with config=")
        if layout == "sdxl" and precision == "fp16" and model.autoencoder.vae.config.force_upcast:
            say(f"note     {OVERFLOW}")
    say(f"tensors  {compare_tensors(model, written):,} read again, all equal")
    if model.task == "generate":
        say(f"image    differs by {compare_images(model, written)} of 255 at most from that of the model")
    say(f"wrote    {out}: {size_of(out) / 1e6:,.1f} MB")


def export_checkpoint(name: str, out: Path) -> None:
    """Writes a sharded checkpoint, or a run's last one, with full tensors, and says so."""
    folder = Path(name)
    if not (folder / "state.json").is_file():
        if not (numbered := checkpoints(folder / "stage2")):
            raise UserError(f"{name}: no checkpoint; give RUN/stage2/checkpoints/step-…")
        folder = numbered[-1]
    merge_shards(folder, out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"wrote    {out}: {size / 1e6:,.1f} MB, from the shards of {folder}")


def check_out(out: Path, to: str) -> None:
    if to in ("single-file", "lora") and out.suffix != ".safetensors":
        raise UserError(f"--out: {out}; give a name that ends in .safetensors")
    if out.exists():
        raise UserError(f"--out: {out} exists already; give a new name")
    if not out.parent.is_dir():
        raise UserError(f"--out: no folder {out.parent}; create it first")


def in_precision(model: LatentDiffusion, dtype: torch.dtype) -> LatentDiffusion:
    """The model with weights rounded to `dtype`; UserError where one of them leaves its range."""
    for part in parts_of(model).values():
        torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns about layers to keep in float32
        if dtype == torch.float16:
            check_range(part)
    return model


def check_range(part: torch.nn.Module) -> None:
    try:
        check_weights({type(part).__name__: part}, "--precision fp16")
    except UserError:
        raise UserError(
            f"--precision: fp16 is too narrow for weights of the {type(part).__name__}; give bf16 or no"
        ) from None


def write_single_file(model: LatentDiffusion, path: Path) -> checkpoint.Layout:
    """Writes a model in the original layout, which is returned; UserError, naming the reason, where it has none."""
    try:
        layout = single_file_layout(model)
    except ValueError as error:
        raise UserError(f"--to single-file: {error}; --to diffusers keeps all of it") from None
    encoders = list(model.text.models) if model.text else []
    vae, factor = model.autoencoder.vae, checkpoint.SCALING_FACTOR[layout]
    if abs(vae.config.scaling_factor - factor) > 1e-6:  # programs take the layout's: the weights absorb the rest
        zeros = torch.zeros(vae.config.latent_channels)
        vae = fold(vae, zeros, torch.full_like(zeros, factor / model.autoencoder.scale))
        vae.register_to_config(scaling_factor=factor)
        model.autoencoder.vae = vae
    check_weights(parts_of(model), path)
    tensors = checkpoint.tensors_of(layout, model.unet, vae, encoders)
    v_prediction, zero_snr = model.prediction_type == "v", zero_snr_of(model)
    tensors |= {"v_pred": torch.tensor([])} if v_prediction else {}
    tensors |= {"ztsnr": torch.tensor([])} if zero_snr else {}
    with atomic_file(path) as tmp_path:
        on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        safetensors_file.write(tmp_path, on_cpu, metadata_of(model, layout, path.stem, v_prediction))
    return layout


def single_file_layout(model: LatentDiffusion) -> checkpoint.Layout:
    """The original layout that holds all of a model; ValueError, which says why, where none does."""
    layout = checkpoint.layout_of(model.unet, model.autoencoder.vae, list(model.text.models) if model.text else [])
    check_conventions(model)
    return layout


def has_published_widths(model: LatentDiffusion, layout: checkpoint.Layout) -> bool:
    """Whether ComfyUI and A1111 recognise the U-Net."""
    return tuple(model.unet.config.block_out_channels) == checkpoint.WIDTHS[layout]


def metadata_of(model: LatentDiffusion, layout: checkpoint.Layout, title: str, v_prediction: bool) -> dict[str, str]:
    architecture = checkpoint.ARCHITECTURES[layout] + ("/inpaint" if model.task == "inpaint" else "")
    vae = model.autoencoder.vae.config
    return {
        "scaling_factor": str(vae.scaling_factor),  # these two for ldm.models.convert.autoencoder
        "norm_num_groups": str(vae.norm_num_groups),
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{model.side}x{model.side}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
    }


def check_conventions(model: LatentDiffusion) -> None:
    """ValueError for what a single file can't say, and programs would compute otherwise."""
    if model.prediction_type not in ("eps", "v"):
        raise ValueError(f"it predicts {model.prediction_type}; programs know eps and v of this layout")
    if model.unet.config.out_channels != model.autoencoder.channels:
        raise ValueError("its U-Net predicts the variance too, for which the layout has no place")
    if model.classes:
        raise ValueError("it is class-conditional, for which the layout has no place")
    if model.null is not None:
        raise ValueError("it was trained with an unconditional embedding of its own, for which the layout has no place")
    if model.text and model.text.chunks > 1:
        raise ValueError("its captions are encoded in chunks, which programs do in another way")
    if zero_snr_of(model) is None:
        raise ValueError("its noise schedule is another than Stable Diffusion's, which programs assume")


def zero_snr_of(model: LatentDiffusion) -> bool | None:
    """Whether Stable Diffusion's noise schedule ends in pure noise here; None where the schedule is another one."""
    for zero_snr in (False, True):
        known = DDIMScheduler(**NOISE_SCHEDULE, rescale_betas_zero_snr=zero_snr).alphas_cumprod
        own = model.scheduler.alphas_cumprod
        if own.shape == known.shape and torch.allclose(own.float(), known, atol=1e-5):
            return zero_snr
    return None


def read_single_file(model: LatentDiffusion, path: Path, config: str) -> Any:
    """What plain diffusers reads of the file; the folder that it came from tells the configuration."""
    kind = type(pipeline_io.pipeline_of(model))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        options = {"safety_checker": None} if "safety_checker" in kind._optional_components else {}
        return kind.from_single_file(str(path), config=config, torch_dtype=torch.float32, **options)
    finally:
        logging.set_verbosity(verbosity)
