"""Prior preservation: training on images of the class too, so that the class is not forgotten (DreamBooth, 2208.12242).

Images of the class are sources of `data` with `prior`. They come from a folder, from kohya's `is_reg`, or are drawn
once by the model that training starts from.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from tqdm import tqdm

from ldm.config.kohya import subsets
from ldm.config.schema import Config, SourceConfig
from ldm.data import index
from ldm.data.dataset import Item
from ldm.data.folder_tree import FolderTree
from ldm.data.formats import is_image_file
from ldm.data.index import Index
from ldm.data.index_report import stop_reason, write_report
from ldm.data.records import PRIOR, TRAINED
from ldm.data.stream import Stream
from ldm.distributed.consensus import on_all, wait_until_visible
from ldm.distributed.launch import join, on_main, precision
from ldm.models import autoencoder, unet
from ldm.models.text_encoder import AnyTextEncoder
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training import preflight
from ldm.training.diffusion_process import diffusion_process
from ldm.utils.atomic_files import atomic_file, tensors_sha256
from ldm.utils.errors import UserError
from ldm.utils.rng import generator
from stage2_diffusion.finetune.inversion import check_word_in_captions

BATCH = 4  # images that are drawn at once; always as many, since an image's last bits depend on it
FOLDER = "class-images"  # in the cache


class ClassImages(NamedTuple):
    """Images that a model draws: their folder in the cache, what they depend on, the numbers of those to draw."""

    folder: Path
    settings: str
    missing: Sequence[int]

    def file(self, number: int) -> Path:
        return self.folder / f"{number:05}.png"


# ------------------------------------------------------------------------------------------------------------ the loss


def sample_weights(batch: Item, prior_weight: float | None) -> torch.Tensor | float:
    """What the loss of each sample counts, `(N,)`: `prior_weight` for an image of the class, 1 for the subject's.

    1.0 without prior preservation, whose batches have no `prior`.
    """
    if "prior" not in batch:
        return 1.0
    assert prior_weight is not None, "the configuration allows no images of the class without a weight"
    return torch.where(batch["prior"], prior_weight, 1.0)


def loss_metrics(batch: Item, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """To log: the share of images of the class, and the losses of both kinds, each a sum and a count.

    `losses` are `(N,)`, before they are weighted.
    """
    if "prior" not in batch:
        return {}
    prior, zero = batch["prior"], losses.new_zeros(())
    return {
        "prior_share": prior.float().mean(),
        **{
            name: torch.stack([torch.where(chosen, losses.detach(), zero).sum(), chosen.sum().to(losses)])
            for name, chosen in (("loss_subject", ~prior), ("loss_prior", prior))
        },
    }


# ---------------------------------------------------------------------------------------------------------- the images


def check(config: Config) -> None:
    """UserError where there are no images of the class, or the subject's are among them."""
    finetune = config.finetune
    if finetune.prior_weight is None:
        return
    if not (folder := finetune.class_images):
        if not finetune.class_prompt.strip() and not any(_has_class_images(source) for source in config.data.source):
            raise UserError(
                "finetune.class_prompt: missing, and no subset of data.source has is_reg; set it to the caption of the "
                "class's images, such as 'a photo of a dog'"
            )
        return
    if not folder.is_dir():
        raise UserError(f"finetune.class_images: no folder {folder}; put images of the class there, or leave it out")
    if not any(is_image_file(name) for directory in FolderTree(folder).walk() for name in directory.names):
        raise UserError(f"finetune.class_images: no image in {folder}; add some, or leave it out to have them drawn")
    own = folder.resolve()
    for path in (path for source in config.data.source for path in _folders(source)):
        if own == (other := path.resolve()) or own in other.parents or other in own.parents:
            raise UserError(
                f"finetune.class_images: {folder} and data.source, {path}, overlap; keep the images of the class and "
                "of the subject in folders of their own"
            )


def check_found(config: Config, data: Index | Stream) -> None:
    """UserError where prior preservation found no usable image of the class."""
    if config.finetune.prior_weight is not None and isinstance(data, Index) and data.prior() is None:
        raise UserError(
            "finetune.prior_weight: no usable image of the class, so nothing would be preserved; see data-report.json, "
            "and add some, or leave it out"
        )


def _has_class_images(source: SourceConfig) -> bool:
    if _is_kohya(source):
        return source.prior and any(subset.is_reg for subset in subsets(Path(source.path)))
    return source.prior


def _is_kohya(source: SourceConfig) -> bool:
    return source.kind == "kohya" or (source.kind == "auto" and source.path.endswith(".toml"))


def _folders(source: SourceConfig) -> list[Path]:
    """The folders of the subject's images."""
    if _is_kohya(source):
        return [subset.folder for subset in subsets(Path(source.path)) if not subset.is_reg]
    return [Path(source.path)] if Path(source.path).exists() else []


def with_class_images(config: Config, text: AnyTextEncoder | None) -> Config:
    """The configuration with the images of the class as one more source; those of a model are drawn first.

    Every process of the run calls it.
    """
    finetune = config.finetune
    if finetune.prior_weight is None or not finetune.class_prompt.strip():
        return config
    folder, limit = finetune.class_images, None
    if not folder:
        folder, limit = _draw(config, text), finetune.num_class_images
        _free_memory(text)
    weight = None if config.data.source[0].weight is None else 1.0  # all sources have one, or none; only theirs counts
    source = SourceConfig(
        path=str(folder), kind="sidecars", caption=finetune.class_prompt, prior=True, limit=limit, weight=weight
    )
    data = config.data.model_copy(update={"source": (*config.data.source, source)})
    return config.model_copy(update={"data": data})


def warn_of_shared_captions(data: Index | Stream) -> None:
    """Prints a warning where an image of the subject has a caption of the class, which would then mean the subject."""
    if not PartialState().is_main_process or not isinstance(data, Index) or data.prior() is None:
        return
    of_class = {caption for captions in data.select(PRIOR).captions() for caption in captions}
    captions = (caption for captions in data.select("train").captions() for caption in captions)
    if shared := next((caption for caption in captions if caption in of_class), None):
        print(
            f"finetune.class_prompt: {shared!r} captions images of the subject too, so the class would learn to look "
            "like it; give the subject a word of its own, such as 'a photo of sks dog'",
            file=sys.stderr,
            flush=True,
        )


# --------------------------------------------------------------------------------------------------------- drawing them


def count_undrawn(config: Config, text: AnyTextEncoder | None) -> int:
    """How many images of the class would be drawn."""
    finetune = config.finetune
    if finetune.prior_weight is None or not finetune.class_prompt.strip() or finetune.class_images:
        return 0
    return len(_find(config, _base_model(config, text)).missing)


def describe_drawing(config: Config, count: int) -> str:
    """A line on the drawing of `count` images, with the time it takes at the speed of the preflight's sample grid."""
    file, prompts, processes = (
        config.run.dir / preflight.FILE,
        len(config.sample.prompts),
        join(config.run).num_processes,
    )
    sheet = json.loads(file.read_text("utf-8")).get("stage2", {}).get("needs", {}).get("sheet") if file.exists() else 0
    time = ""
    if sheet and prompts:  # a grid's prompts, as the images, are shared among the processes
        time = f", in about {preflight.format_time(sheet * -(-count // processes) / -(-prompts // processes))}"
    return f"class    {count} images of {config.finetune.class_prompt!r} would be drawn with the base model{time}"


def _find(config: Config, model: LatentDiffusion) -> ClassImages:
    """The images that this model draws, as the main process finds them."""
    settings = json.dumps(_settings(config, model), indent=1, sort_keys=True, ensure_ascii=False)
    folder = config.cache_dir / FOLDER / hashlib.sha256(settings.encode()).hexdigest()[:16]

    def find() -> ClassImages:
        images = ClassImages(folder, settings, ())
        return images._replace(
            missing=[i for i in range(config.finetune.num_class_images) if not images.file(i).exists()]
        )

    return on_main(find)


def _draw(config: Config, text: AnyTextEncoder | None) -> Path:
    """Draws the images that are missing, and returns their folder. A killed run goes on where it was."""
    state, count = join(config.run), config.finetune.num_class_images
    model = _base_model(config, text)
    images = _find(config, model)
    if not images.missing:
        return images.folder
    _check_subject(config, text)

    def write_settings() -> None:
        images.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(images.folder.with_suffix(".json")) as tmp_path:
            tmp_path.write_text(images.settings + "\n", "utf-8")
        rest = "" if len(images.missing) == count else f"; {len(images.missing)} of them are missing"
        print(
            f"class    drawing {count} images of {config.finetune.class_prompt!r} with the base model{rest}", flush=True
        )

    on_main(write_settings)
    model.to(state.device).optimize_for_inference(precision(config.run))
    on_all(lambda: _draw_share(config, model, images))
    wait_until_visible([images.file(i) for i in range(count)], Path.exists)
    return images.folder


def _check_subject(config: Config, text: AnyTextEncoder | None) -> None:
    """UserError where the subject's images can't be trained on: before hours of drawing, not after them."""
    with redirect_stdout(io.StringIO()):  # the index of both says it again
        subject = index.build(config.data, config.cache_dir, config.stage2.conditions)
    report = config.run.dir / "data-report.json"
    if problem := stop_reason(subject, report):
        on_main(lambda: write_report(subject, report))
        raise UserError(problem)
    check_word_in_captions(config.finetune, subject.select(*TRAINED), text)


def _free_memory(text: AnyTextEncoder | None) -> None:
    """For what is measured or trained next."""
    if text:
        text.to(torch.device("cpu"))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _draw_share(config: Config, model: LatentDiffusion, images: ClassImages) -> None:
    """Draws this process's batches. Image i has the same noise in any run, and the same others in its batch."""
    state, seed, side = PartialState(), config.run.seed, config.data.size
    missing, starts = set(images.missing), sorted({i // BATCH * BATCH for i in images.missing})
    images.folder.mkdir(
        parents=True, exist_ok=True
    )  # also on a machine that doesn't share it, for the check afterwards
    with tqdm(
        desc="drawing class images", total=len(missing), unit=" img", leave=False, disable=not state.is_main_process
    ) as bar:
        for start in starts[state.process_index :: state.num_processes]:
            numbers = range(start, start + BATCH)
            seeds = [int(generator(seed, "class image", i).integers(2**63)) for i in numbers]
            try:
                drawn = model([config.finetune.class_prompt] * BATCH, seeds, BATCH, size=(side, side))
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"finetune.class_images: drawing {BATCH} at once does not fit in the GPU's memory "
                    f"({str(error).split('. ')[0]}); free it of other programs, or give a folder of images"
                ) from None
            for i in missing.intersection(numbers):
                with atomic_file(images.file(i)) as tmp_path:
                    drawn[i - start].save(tmp_path, "PNG")
            bar.update(len(missing.intersection(numbers)) * min(state.num_processes, len(starts)))


def _base_model(config: Config, text: AnyTextEncoder | None) -> LatentDiffusion:
    """The pipeline that training starts from, on the CPU."""
    assert text, "the configuration allows no prior preservation without text"
    stage1, stage2, sample = config.stage1, config.stage2, config.sample
    name = stage1.pretrained or stage1.init_from or ("identity" if stage1.needs_none else None)
    vae = autoencoder.load(name or config.run.dir / "autoencoder")
    network = unet.load(stage2, vae.channels, config.data.size // vae.factor, text.width, 0, text.pooled_width)
    solver = scheduler(diffusion_process(stage2), sample.solver, stage2.variance == "learned", clip=False)
    return LatentDiffusion(text, network.eval(), vae, solver, sample.steps, sample.guidance)


def _settings(config: Config, model: LatentDiffusion) -> dict[str, object]:
    """What the drawn images depend on."""
    assert model.text
    stage, process = config.stage2, ("prediction_type", "beta_schedule", "timesteps", "zero_snr", "shift", "variance")
    return {
        "unet": tensors_sha256(model.unet.state_dict()),
        "autoencoder": model.autoencoder.fingerprint(),
        "text": model.text.fingerprint(),
        "prompt": config.finetune.class_prompt,
        "size": config.data.size,
        **{key: getattr(config.sample, key) for key in ("steps", "guidance", "solver")},
        **{key: getattr(stage, key) for key in process},
        "seed": config.run.seed,
        "precision": precision(config.run),
    }
