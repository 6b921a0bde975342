"""Images ↔ normalised latents. No other module knows how latents are scaled, or which architectures there are.

Latents have mean 0 and standard deviation 1 as far as the autoencoder's own files can express it: an AutoencoderKL that
was trained here holds the statistics of each channel in its 1×1 quant convolutions, with `scaling_factor` 1, so that
every program that reads diffusers folders decodes it correctly.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from torch import nn

from ldm.config.schema import Stage1Config
from ldm.models import vae_tiling
from ldm.models.convert import autoencoder as single_file
from ldm.models.finite import check_weights
from ldm.models.identity_paths import add_identity_paths
from ldm.models.weight_files import load_variant
from ldm.utils.atomic_files import atomic_folder, tensors_sha256
from ldm.utils.errors import UserError, first_line
from ldm.utils.precision import placement

STATISTICS = "latents.json"
DETERMINISTIC = -60.0  # log-variance of latents that are no distribution: a sample equals the mean
MAX_PIXELS = 2**20  # of the images that are computed together: 2.7 GB of activations in float32
MAX_UNTILED_SIDE, TILE = 1024, 512  # an image of more than MAX_UNTILED_SIDE² pixels is computed in tiles of TILE²


class Identity(nn.Module):
    """The autoencoder of pixel-space diffusion: its latents are the pixels."""

    config = SimpleNamespace(scaling_factor=1.0, shift_factor=None, latent_channels=3)
    device, dtype = torch.device("cpu"), torch.float32

    def to(self, device: Any) -> Identity:  # type: ignore[override]
        self.device = torch.device(device)
        return self


KINDS = {kind.__name__: kind for kind in (AutoencoderKL, VQModel, AutoencoderTiny, AutoencoderDC)}
FAMILIES = {"kl": "AutoencoderKL", "vq": "VQModel", "tiny": "AutoencoderTiny", "dc": "AutoencoderDC"}
FAMILIES["identity"] = "Identity"
Model: TypeAlias = Any  # one of these, or Identity


def _placement(vae: Model) -> tuple[torch.device, torch.dtype]:
    return (vae.device, vae.dtype) if isinstance(vae, Identity) else placement(vae)


def split_batch(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A batch `(N, C, H, W)` in parts of at most `MAX_PIXELS` pixels, or of one image."""
    return pixels.split(max(1, MAX_PIXELS // pixels[0, 0].numel()))


class Autoencoder:
    """An autoencoder with `encode` and `decode` for normalised latents, their shape, and its fingerprints."""

    def __init__(self, vae: Model):
        if isinstance(vae, AutoencoderKL) and (vae.config.shift_factor or vae.config.latents_mean):
            # diffusers' StableDiffusionPipeline ignores both; folded into the convolutions they take effect
            if vae.config.latents_mean:
                vae = fold(vae, torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std))
            if vae.config.shift_factor:
                ones = torch.ones(vae.config.latent_channels)
                vae = fold(vae, ones * vae.config.shift_factor, ones)
        self.vae = vae.eval().requires_grad_(False)
        self._encoder = ""  # fingerprint of the loaded encoder, once `bfloat16` has changed its weights
        self.channels: int = vae.config.latent_channels
        self.factor: int = factor(vae)
        self.scale: float = vae.config.scaling_factor
        self.shift: float = vae.config.get("shift_factor") or 0.0 if isinstance(vae, AutoencoderTiny) else 0.0

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(N, 3, H, W)` in [-1, 1] → `(N, channels, H/factor, W/factor)` float32: the posterior's mean, normalised."""
        return self.moments(pixels)[0]

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the normalised posterior, each of the shape of `encode`'s result."""
        place = _placement(self.vae)
        parts = [self._moments(part.to(*place)) for part in split_batch(pixels)]
        mean, logvar = (torch.cat(tensors).float() for tensors in zip(*parts, strict=True))
        if self._overflows(mean, pixels):
            return self.moments(pixels)
        return (mean - self.shift) * self.scale, logvar + 2 * math.log(self.scale)

    def _moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.vae, Identity):
            return pixels, torch.full_like(pixels, DETERMINISTIC)
        if pixels[0, 0].numel() > MAX_UNTILED_SIDE**2:
            h = vae_tiling.encode(self.vae, pixels, TILE)
            return posterior(self.vae, h)
        return encode_posterior(self.vae, pixels)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """`(N, channels, h, w)` normalised latents → `(N, 3, h·factor, w·factor)` float32, roughly in [-1, 1]."""
        z = latents.to(*_placement(self.vae)) / self.scale + self.shift
        area = z[0, 0].numel() * self.factor**2
        pixels = torch.cat([self._decode(part, area) for part in z.split(max(1, MAX_PIXELS // area))]).float()
        return self.decode(latents) if self._overflows(pixels, latents) else pixels

    def _overflows(self, output: torch.Tensor, source: torch.Tensor) -> bool:
        """Whether fp16 was too narrow; the autoencoder then computes in float32 from now on.

        Stable Diffusion XL's first autoencoder needs it: its activations exceed 65504.
        """
        _, dtype = _placement(self.vae)
        if dtype != torch.float16 or bool(output.isfinite().all()) or not bool(source.isfinite().all()):
            return False
        print("the autoencoder overflows in fp16; it computes in float32 from now on", file=sys.stderr, flush=True)
        self._encoder = self.encoder_fingerprint()
        self.vae = nn.Module.to(copy.deepcopy(self.vae), torch.float32)  # a copy: another thread may use the first
        return True

    def _decode(self, z: torch.Tensor, area: int) -> torch.Tensor:
        if isinstance(self.vae, Identity):
            return z
        pixels: torch.Tensor = (
            vae_tiling.decode(self.vae, z, TILE) if area > MAX_UNTILED_SIDE**2 else self.vae.decode(z).sample
        )
        return pixels

    def to(self, device: torch.device) -> Autoencoder:
        self.vae.to(device)
        return self

    def bfloat16(self) -> None:
        """Computes in bfloat16 from now on. `encoder_fingerprint` stays that of the loaded weights."""
        self._encoder = self.encoder_fingerprint()
        if not isinstance(self.vae, Identity):
            self.vae.to(torch.bfloat16)

    def fingerprint(self) -> str:
        """SHA-256 of the weights and the scale."""
        return tensors_sha256(self.vae.state_dict(), self.scale, *([self.shift] if self.shift else []))

    def encoder_fingerprint(self) -> str:
        """SHA-256 of all that determines latents, which caches and checkpoints depend on; not of the decoder."""
        return self._encoder or tensors_sha256(
            encoder_tensors(self.vae), self.scale, *([self.shift] if self.shift else [])
        )

    def latent_fingerprint(self, size: int) -> dict[str, Any]:
        """Identifies the latents of images of `size` pixels: their shape, and the SHA-256 of the encoder."""
        side = size // self.factor
        return {"shape": [self.channels, side, side], "autoencoder": self.encoder_fingerprint()}

    def save(self, folder: Path, **facts: Any) -> None:
        """Writes a diffusers folder and `latents.json` (fingerprint and `facts`), complete or not at all.

        UserError, before anything is written, where weights are not finite.
        """
        check_weights({"autoencoder": self.vae}, folder)
        with atomic_folder(folder) as tmp_path:
            self.vae.save_pretrained(tmp_path)
            (tmp_path / STATISTICS).write_text(
                json.dumps({"autoencoder": self.fingerprint(), **facts}, indent=2) + "\n"
            )


# -------------------------------------------------------------------------------------------------------- architectures


def factor(vae: Model) -> int:
    """Pixels per latent, along one side."""
    if isinstance(vae, Identity):
        return 1
    if isinstance(vae, AutoencoderDC):
        return int(vae.spatial_compression_ratio)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encoder_tensors(vae: Model) -> dict[str, torch.Tensor]:
    """The weights that latents depend on."""
    return {name: t for name, t in vae.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}


def posterior(vae: Model, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents from an encoder's output h, before normalisation."""
    if isinstance(vae, AutoencoderKL):
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution
    return h, torch.full_like(h, DETERMINISTIC)


def encode_posterior(vae: Model, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents of images, before normalisation."""
    if isinstance(vae, AutoencoderKL):
        distribution = vae.encode(pixels).latent_dist
        return distribution.mean, distribution.logvar
    return posterior(vae, vae.encode(pixels, return_dict=False)[0])


def build(stage: Stage1Config, size: int) -> Model:
    """An autoencoder with random weights, as `stage` describes it, for images of `size` × `size` pixels."""
    widths, levels = stage.channels, len(stage.channels)
    if stage.family == "identity":
        return Identity()
    if stage.family == "tiny":
        blocks = (stage.layers,) * (levels - 1)
        return AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            latent_channels=stage.latent_channels,
            num_encoder_blocks=(1, *blocks),
            num_decoder_blocks=(*blocks, 1),
        )
    if stage.family == "dc":  # linear attention in the deeper half
        attending = levels // 2 if stage.mid_attention else 0
        scales = ((),) * (levels - attending) + ((5,),) * attending
        types = ("ResBlock",) * (levels - attending) + ("EfficientViTBlock",) * attending
        return AutoencoderDC(
            latent_channels=stage.latent_channels,
            encoder_block_types=types,
            decoder_block_types=types,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=stage.decoder_channels or widths,
            encoder_layers_per_block=(stage.layers,) * levels,
            decoder_layers_per_block=(stage.decoder_layers or stage.layers,) * levels,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
        )
    config: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": stage.layers,
        "latent_channels": stage.latent_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": stage.norm_num_groups,
        "mid_block_add_attention": stage.mid_attention,
        "sample_size": size,
        "scaling_factor": 1.0,
    }
    vae = VQModel(**config, num_vq_embeddings=stage.codes) if stage.family == "vq" else AutoencoderKL(**config)
    add_identity_paths(vae)
    return vae


# ------------------------------------------------------------------------------------------------------------- loading


def load(name: str | Path, key: str = "stage1.pretrained") -> Autoencoder:
    """Loads an autoencoder from a diffusers folder, its own or a pipeline's, a `.safetensors` file in the original
    layout, or a Hub id; `identity` is pixel space. UserError, naming `key`, if it can't."""
    path = Path(name)
    if str(name) == "identity":
        return Autoencoder(Identity())
    try:
        if path.is_file():
            return Autoencoder(single_file.read(path))
        return Autoencoder(_diffusers(str(name), path, key))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        message = reason if str(name) in reason else f"can't load an autoencoder from {str(name)!r}: {reason}"
        raise UserError(message if message.startswith(key) else f"{key}: {message}") from None


def _diffusers(name: str, folder: Path, key: str) -> Model:
    subfolder = next((part for part in ("vae", "vqvae") if (folder / part).is_dir()), None)
    if folder.is_dir() and not (folder / (subfolder or "") / "config.json").exists():
        raise UserError(f"{key}: {folder} has no config.json; give the folder that an autoencoder was saved to")
    try:
        config = AutoencoderKL.load_config(name, subfolder=subfolder)
    except OSError:
        if folder.is_dir():
            raise
        subfolder = "vae"  # the id of a pipeline on the Hub
        config = AutoencoderKL.load_config(name, subfolder=subfolder)
    if not isinstance(config, dict):
        raise UserError(f"{key}: {folder}/config.json is not an autoencoder's")
    kind = KINDS.get(config.get("_class_name", ""))
    if not kind:
        raise UserError(f"{key}: {name} holds a {config.get('_class_name')}; known are {', '.join(KINDS)}")
    for channels in (config.get("in_channels", 3), config.get("out_channels", 3)):
        if channels != 3:
            raise UserError(f"{key}: {name} is for images of {channels} channels; ours have 3")
    if config.get("scaling_factor", 1.0) is None:
        raise UserError(f"{key}: {name} has scaling_factor null, which is not known; give another autoencoder")
    if (width := config.get("vq_embed_dim")) not in (None, config.get("latent_channels")):
        raise UserError(
            f"{key}: {name} has vq_embed_dim {width}, but latent_channels {config.get('latent_channels')}; "
            "only equal ones are known"
        )
    vae, loading_info = load_variant(kind.from_pretrained, name, subfolder, output_loading_info=True)
    if wrong := [*loading_info["missing_keys"], *loading_info["unexpected_keys"]]:
        raise UserError(
            f"{key}: the weights in {name} are not its config's: {wrong[0]} and {len(wrong) - 1} more differ"
        )
    return vae


# ------------------------------------------------------------------------------------------------------- normalisation


def channel_statistics(
    vae: Model, batches: Iterable[torch.Tensor], total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel, `(C,)` each, over all images and positions of `batches`.

    `total` sums a tensor over processes, each of which has its own share of the images.
    """
    sums = torch.zeros(3, vae.config.latent_channels, dtype=torch.float64)  # of 1, of z, of z²
    with torch.no_grad():
        for pixels in (part for batch in batches for part in split_batch(batch)):
            mean, _ = encode_posterior(vae, pixels.to(*placement(vae)))
            z = mean.double().cpu().transpose(0, 1).flatten(1)  # (C, N·h·w)
            sums += torch.stack([torch.full_like(z[:, 0], z.shape[1]), z.sum(1), z.square().sum(1)])
    count, linear, squares = total(sums)
    mean = linear / count
    return mean.float(), (squares / count - mean.square()).clamp_min(1e-12).sqrt().float()


def normalize_latents(vae: Model, mean: torch.Tensor, std: torch.Tensor) -> Autoencoder:
    """The same autoencoder with latents of mean 0 and deviation 1, as far as its architecture can express it.

    AutoencoderKL: each channel, by its convolutions. VQModel: the mean of each channel, but one scale for all, because
    different scales would change which code is nearest. AutoencoderTiny and AutoencoderDC: one scale.
    """
    if isinstance(vae, AutoencoderKL):
        vae.register_to_config(scaling_factor=1.0)
        return Autoencoder(fold(vae, mean, std))
    if isinstance(vae, VQModel):
        mean = mean.to(vae.device, vae.dtype)
        with torch.no_grad():
            vae.quant_conv.bias -= mean
            vae.quantize.embedding.weight -= mean
            vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        mean = torch.zeros_like(std)
    rms = (std.square() + (mean - mean.mean()).square()).mean().sqrt()  # the deviation of all channels together
    vae.register_to_config(scaling_factor=float(1 / rms))
    if isinstance(vae, AutoencoderTiny):
        vae.register_to_config(shift_factor=0.0)  # it has one, but diffusers' StableDiffusionPipeline ignores it
    return Autoencoder(vae)


def fold(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> AutoencoderKL:
    """The same autoencoder with latents `(z - mean) / std`, by its quant convolutions, which are added if it has none.

    quant_conv ends in (mean, log-variance): m' = (m - mean) / std, and lv' = lv - 2 log std.
    post_quant_conv begins on z: W'·z' + b' = W·(std·z' + mean) + b.
    """
    c = vae.config.latent_channels
    config = {**vae.config, "use_quant_conv": True, "use_post_quant_conv": True}
    config |= {"shift_factor": 0.0, "latents_mean": None, "latents_std": None}
    folded = AutoencoderKL.from_config(config)
    nn.Module.to(
        folded, vae.dtype
    )  # diffusers' own `to` warns about layers to keep in float32, of which there are none
    folded.load_state_dict(vae.state_dict(), strict=False)
    mean, std = mean.to(vae.dtype), std.to(vae.dtype)
    with torch.no_grad():
        for conv, present in ((folded.quant_conv, vae.quant_conv), (folded.post_quant_conv, vae.post_quant_conv)):
            if present is None:
                nn.init.dirac_(conv.weight)
                nn.init.zeros_(conv.bias)
        quant, post = folded.quant_conv, folded.post_quant_conv
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]
        quant.bias[:c] = (quant.bias[:c] - mean) / std
        quant.weight[:c] /= std[:, None, None, None]
        quant.bias[c:] -= 2 * std.log()
    return folded.to(vae.device)
