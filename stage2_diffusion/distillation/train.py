"""Distils a finished run's model into one of few steps: progressive distillation, or latent consistency.

    python -m stage2_diffusion.distillation.train runs/openmoji --out runs/openmoji-few [key=value …]
    python -m stage2_diffusion.distillation.train runs/openmoji --out runs/openmoji-lcm --method consistency

Written is `OUT/pipeline`, which plain diffusers opens, and one for each halving on the way. The same command again
continues where it stopped.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

import torch

from ldm.config import loader
from ldm.config.schema import Config, DistillConfig, Stage2Config
from ldm.data import index
from ldm.data.cache import CacheOptions
from ldm.data.dataset import EvaluationBatch, evaluation_batch, sample_names, stage2_dataset
from ldm.data.draws import with_draws
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.distributed.consensus import wait_until_visible
from ldm.distributed.launch import join, on_main, precision, training_processes
from ldm.models.attention import use_attention
from ldm.models.compilation import compile_blocks
from ldm.models.conditioning import TextEmbedding
from ldm.models.text_encoder import NULL_PROMPT
from ldm.models.unet import UNet, make_guidance_conditioned, remove_variance_channels
from ldm.sampling.few_steps import first_order_scheduler, lcm_scheduler
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training.diffusion_process import diffusion_process
from ldm.training.optimizer import check_optimizer
from ldm.training.run_dir import prepare_out_dir
from ldm.training.trainer import Trainer
from ldm.utils.atomic_files import tensors_sha256
from ldm.utils.errors import Parser, UserError, training_command
from ldm.utils.precision import DTYPES
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.distillation.methods import Consistency, DistillationMethod, Guidance, ProgressiveDistillation

METHODS = ("progressive", "consistency")
CAPTIONS = 1000  # that others are blended with


@training_command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="stage2_diffusion.distillation.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; a used one is continued")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps_to=8")
    args = parser.parse_intermixed_args(arguments)
    config = loader.load_run(args.run)
    options = loader.section(DistillConfig, args.overrides, "distill")
    if options.guidance_to is None:
        twice = max(2 * config.sample.guidance, options.guidance_from + 1)
        options = options.model_copy(update={"guidance_to": twice})
    check(config.stage2, options, args.method)
    with training_processes(config.run) as state:
        on_main(partial(check_optimizer, options, ""))
        teacher = LatentDiffusion.load(args.run / "pipeline", "cpu")
        remove_variance_channels(teacher.unet, teacher.autoencoder.channels)
        settings = {
            "run": str(args.run),
            "method": args.method,
            "teacher": tensors_sha256(teacher.unet.state_dict()),
            "distill": options.model_dump(mode="json"),
        }
        on_main(partial(prepare_out_dir, args.out, DistillConfig, "distill", settings))
        if not on_main((args.out / "pipeline").exists):
            distill(config, options, args.method, teacher, args.out)
        if state.is_main_process:
            print(f"finished: {args.out / 'pipeline'}")


def check(stage: Stage2Config, options: DistillConfig, method: str) -> None:
    """UserError where a model can't be distilled so."""
    if "upscale" in stage.conditions:
        raise UserError("stage2.conditions: diffusers' pipeline for upscale can't tell a student its scale of guidance")
    if method == "progressive":
        if stage.prediction_type == "eps":
            raise UserError(
                "stage2.prediction_type: at pure noise 'eps' says nothing about the image, so progressive "
                "distillation can't learn it; use --method consistency, or a run with prediction_type v, x0 or flow"
            )
        try:
            options.halvings()
        except ValueError as error:
            raise UserError(f"distill: {error}") from None
        if stage.prediction_type != "flow" and options.steps_from > stage.timesteps:
            raise UserError(
                f"distill: steps_from: {options.steps_from}, but stage2.timesteps are {stage.timesteps}; lower it"
            )
    elif stage.prediction_type == "flow":
        raise UserError("--method consistency: diffusers' LCMScheduler can't sample a flow; use --method progressive")
    elif not options.steps_to <= options.original_steps <= stage.timesteps // 2:
        raise UserError(
            f"distill: original_steps: {options.original_steps}; give steps_to, {options.steps_to}, at least, and "
            f"half of stage2.timesteps, {stage.timesteps // 2}, at most"
        )


def distill(config: Config, options: DistillConfig, method: str, model: LatentDiffusion, folder: Path) -> None:
    """Trains one student after the other; each is exported, the last one as `pipeline` too."""
    stage, process = config.stage2, diffusion_process(config.stage2)
    device = join(config.run).device
    model.to(device)
    data: Index | Stream
    if config.data.streaming:
        data = Stream(config.data, config.cache_dir, folder / "data-report.jsonl", stage.conditions)
    else:
        data = index.build(config.data, config.cache_dir, stage.conditions)
    assert options.guidance_to, "the command sets it"
    null = None
    if model.text:
        null = model.text.embed([NULL_PROMPT]) if model.null is None else TextEmbedding(model.null[None])
        within = min(max(model.guidance, options.guidance_from), options.guidance_to)
        model = replace(model, guidance=within)
    arguments = (process, options, config.run.seed, null, len(model.classes) if stage.classes else None)

    def teach(name: str, distillation: DistillationMethod, solver: Any, steps: int) -> LatentDiffusion:
        exported = folder / f"pipeline-{name.removeprefix('steps-')}"
        if not on_main(exported.exists):
            unet = train_student(config, options, model, data, name, distillation, folder)
            on_main(partial(replace(model, unet=unet, scheduler=solver, steps=steps).save, exported))
        wait_until_visible([exported], Path.is_dir, "--out")
        return replace(model, unet=LatentDiffusion.load(exported, device).unet, scheduler=solver, steps=steps)

    if method == "consistency":
        solver = lcm_scheduler(process, options.original_steps)
        model = teach("consistency", Consistency(model.unet, *arguments), solver, options.steps_to)
    else:
        if model.text:
            solver = scheduler(process, config.sample.solver)
            model = teach("guidance", Guidance(model.unet, *arguments), solver, model.steps)
        for steps in options.halvings():
            halving = ProgressiveDistillation(model.unet, *arguments, steps)
            model = teach(f"steps-{steps}", halving, first_order_scheduler(process), steps)
    on_main(partial(model.save, folder / "pipeline"))  # last: where it stands, all is finished


def train_student(
    config: Config,
    options: DistillConfig,
    model: LatentDiffusion,
    everything: Index | Stream,
    name: str,
    distillation: DistillationMethod,
    folder: Path,
) -> UNet:
    """Trains a student, which starts as its teacher, and returns it with its averaged weights."""
    stage, data = config.stage2, everything.select("train")
    unet = build_student(config, options, distillation)
    training = options.model_copy(update={"steps": options.guidance_steps} if name == "guidance" else {})
    spec = SampleSpec.of(config.data, options.batch, config.run.seed, stage.cond_dropout)
    trainer = Trainer(
        config.run,
        training,
        name,
        Denoiser(unet, Stage2Config(), distillation.null),  # by default, only the U-Net is trained
        fingerprint_of(config, model, data, distillation),
        name=sample_names(data, spec),
        sharded=distillation.can_be_sharded,
        run_dir=folder,
    )
    if stage.compile:
        compile_blocks(unet, dynamic=bool(config.data.buckets))
    cache = CacheOptions.of(config.data, config.cache_dir)
    samples = stage2_dataset(data, spec, cache, model.autoencoder, model.text, trainer.device, stage.image)
    conditions = Conditions(config, model.autoencoder, None, len(model.classes))
    dataset = with_draws(samples.dataset, conditions.draws)
    held = held_out_batches(model, everything, options.batch, trainer.accumulation.images, conditions)
    distillation.others = embed_captions(model, data) if options.blended else None

    def evaluate_if_due() -> None:
        if held and trainer.due(options.evaluate_every, last=True):
            validate(trainer, distillation, conditions, held)

    if trainer.step:  # what a killed run did not finish
        evaluate_if_due()
    for batch in trainer.batches(dataset, config.data.workers, config.data.prefetch_factor):
        with trainer.accumulate():
            n = batch["position"]
            x0, states = samples.encode(batch)
            condition, _, _ = conditions(distillation.undropped(batch), x0, states)
            condition = distillation.blended(n, condition)
            student_batch = distillation.make_batch(n, x0, condition)  # z_t and a scale of guidance
            with torch.no_grad(), trainer.autocast():
                target = distillation.target(student_batch, trainer)

            prediction = trainer.model(student_batch.z, student_batch.model_time, student_batch.condition)
            losses = distillation.losses(prediction.float(), student_batch, target)
            loss = losses.mean()
            trainer.nonfinite.track_nonfinite(n, losses[:, None])
            trainer.backward(loss)
            trainer.optimizer_step()
            trainer.log(loss=loss)
        trainer.checkpoint_if_due()
        evaluate_if_due()
    trainer.close()
    return trainer.export_ema().unet


def build_student(config: Config, options: DistillConfig, distillation: DistillationMethod) -> UNet:
    """The student, a copy of its teacher, ready to be trained."""
    stage, teacher = config.stage2, distillation.teacher
    unet = copy.deepcopy(teacher).requires_grad_(True)
    if distillation.guidance_conditioned:
        make_guidance_conditioned(unet)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if stage.channels_last:
        unet.to(memory_format=torch.channels_last)
    for network in (unet, teacher):
        use_attention(network, stage.attention_backend, teacher.device, DTYPES[precision(config.run)])
    return unet


def fingerprint_of(
    config: Config, model: LatentDiffusion, data: Index | Stream, distillation: DistillationMethod
) -> dict[str, Any]:
    """What a student's checkpoints depend on: latents, data and teacher."""
    return {
        **model.autoencoder.latent_fingerprint(config.data.size),
        "data": data.fingerprint(),
        "teacher": tensors_sha256(distillation.teacher.state_dict()),
    }


def embed_captions(model: LatentDiffusion, data: Index | Stream) -> TextEmbedding | None:
    """The embeddings of some captions, for `blended`; None where there are none, or where they are not known."""
    if not model.text or isinstance(data, Stream):
        return None
    some = data.subset(CAPTIONS)
    return model.text.embed([some[i].captions[0] for i in range(len(some))])


def held_out_batches(
    model: LatentDiffusion, everything: Index | Stream, count: int, images: int, conditions: Conditions
) -> list[EvaluationBatch]:
    """At most `count` held-out images with their latents and embeddings, at most `images` in each batch."""
    held = everything.select(*HELD_OUT)
    if not isinstance(held, Index):
        return []
    held = held.subset(count)
    numbers = range(len(held))
    arguments = (model.autoencoder, model.text, model.classes, model.unet.device, [conditions.draws])
    return [evaluation_batch(held, numbers[at : at + images], *arguments) for at in numbers[::images]]


@torch.no_grad()
def validate(
    trainer: Trainer, distillation: DistillationMethod, conditions: Conditions, held: Sequence[EvaluationBatch]
) -> None:
    """Logs `held_out_loss`, of the averaged weights; every process measures all of it, which is little."""
    losses = []
    with trainer.ema_weights("a validation"):
        for batch, x0, _, states in held:
            condition, _, _ = conditions(distillation.undropped(batch), x0, states)
            student_batch = distillation.make_batch(batch["position"], x0, condition)
            with trainer.autocast():
                target = distillation.target(student_batch, trainer)
                prediction = trainer.module(student_batch.z, student_batch.model_time, student_batch.condition)
            losses.append(distillation.losses(prediction.float(), student_batch, target))
    trainer.log_values({"held_out_loss": float(torch.cat(losses).mean())})


if __name__ == "__main__":
    sys.exit(main(None))
