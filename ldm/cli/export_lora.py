"""An adapter's file in the other layout: `ldm-export --to lora`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.cli.compare import compare_images, size_of
from ldm.models.adapters import diffusers_layout, kohya_layout
from ldm.models.adapters.diffusers_layout import Adapter
from ldm.models.adapters.factors import LayerAdapter
from ldm.models.adapters.folder import NAMES
from ldm.models.adapters.inject import Kind
from ldm.models.adapters.kohya_layout import scaled_as_read
from ldm.models.adapters.reader import locate, read_adapter
from ldm.models.convert import checkpoint
from ldm.models.finite import describe_weights
from ldm.sampling import pipeline_io
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError


def export_lora(
    name: str,
    base: str | None,
    layout: str | None,
    dtype: torch.dtype,
    out: Path,
    say: Callable[[str], None] = print,
) -> None:
    """Writes an adapter's file in a layout, reads it again, and compares all tensors, and an image where diffusers can.

    Says what was found, line by line. UserError without a layout or a base, or where a tensor differs.
    """
    if not layout:
        raise UserError("--layout: --to lora needs one; give diffusers or kohya")
    if not base:
        raise UserError("--base: --to lora needs the model that the adapter was trained on, for its layers' names")
    model, plain = (LatentDiffusion(**pipeline_io.read(base, "--base")) for _ in range(2))
    path = locate(name, "model")
    changes = read_adapter(path, model.networks, "model")
    adapter = {part: {layer: c.to(dtype) for layer, c in layers.items()} for part, layers in changes.items()}
    check_finite(adapter)
    with atomic_file(out) as tmp_path:
        if layout == "diffusers":
            diffusers_layout.write(tmp_path, adapter)
        else:
            unet, *encoders = model.networks.values()
            family = checkpoint.known_layout(unet, model.autoencoder.vae, encoders)
            metadata = kohya_layout.metadata_of(adapter, out.stem, family, model.side)
            kohya_layout.write(tmp_path, adapter, model.networks, metadata)
        written = read_adapter(tmp_path, model.networks, "--out")
        say(f"tensors  {compare_adapters(adapter, written):,} read again, all equal")
    kinds = {change.kind for layers in written.values() for change in layers.values()}
    if reason := why_not_loaded(kinds, set(written), layout, model.task):
        say(f"image    not compared: {reason}")
    else:
        pipeline = load_in_diffusers(plain, out, min(kinds))
        model.add_loras((out, 1.0))
        say(f"image    differs by {compare_images(model, pipeline)} of 255 at most from that of plain diffusers")
    say(f"wrote    {out}: {size_of(out) / 1e6:,.1f} MB")


def check_finite(adapter: Adapter) -> None:
    """UserError where a factor left the range of fp16."""
    for part, layers in adapter.items():
        for layer, change in layers.items():
            if describe_weights(change.factors):
                raise UserError(f"--precision: fp16 is too narrow for factors of {part}.{layer}; give bf16 or no")


def compare_adapters(adapter: Adapter, written: Adapter) -> int:
    """How many tensors were read again; UserError where one differs."""
    count = 0
    for part, layers in adapter.items():
        for layer, change in layers.items():
            if not (read := written.get(part, {}).get(layer)) or not same(change, read):
                raise UserError(f"--out: {part}.{layer} was not read again as it was; the export can't be trusted")
            count += len(change.factors)
    return count


def same(change: LayerAdapter, read: LayerAdapter) -> bool:
    """Whether two changes have equal factors and, up to rounding, scales."""
    change, read = scaled_as_read(change), scaled_as_read(read)
    equal = change.factors.keys() == read.factors.keys() and math.isclose(change.scale, read.scale, rel_tol=1e-6)
    return equal and all(torch.equal(tensor, read.factors[name]) for name, tensor in change.factors.items())


def why_not_loaded(kinds: set[Kind], components: set[str], layout: str, task: str) -> str:
    """Why plain diffusers does not draw with an adapter's file; empty where it does."""
    if task != "generate":
        return "the base needs an image"
    if "loha" in kinds:
        return "diffusers doesn't load LoHa"
    if layout == "kohya" and (others := kinds & {"dora", "lokr"}):
        return f"diffusers doesn't load {NAMES[min(others)]} in kohya's layout"
    return "diffusers loads LoKr into the U-Net alone" if "lokr" in kinds and components != {"unet"} else ""


def load_in_diffusers(model: LatentDiffusion, path: Path, kind: str) -> Any:
    """The model's pipeline with an adapter, unmerged, as plain diffusers loads it, in float32."""
    pipeline: Any = pipeline_io.pipeline_of(model)
    if kind == "lokr":
        pipeline.unet.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="unet")
    else:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    for part in model.networks.values():
        torch.nn.Module.to(part, torch.float32)
    return pipeline
