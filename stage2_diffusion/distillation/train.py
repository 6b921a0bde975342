"""A finished run's model made into one of few steps: progressive distillation, or latent consistency.

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
import yaml

from ldm.config import loader
from ldm.config.loader import differences
from ldm.config.schema import Config, DistillConfig, Stage2Config
from ldm.data import index
from ldm.data.cache import CacheOptions
from ldm.data.dataset import EvaluationBatch, evaluation_batch, sample_names, stage2_dataset
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.diffusion.process import DiffusionProcess
from ldm.distributed.launch import join, on_main, precision, training_processes
from ldm.models.attention import use_attention
from ldm.models.compilation import compile_blocks
from ldm.models.text_encoder import NULL_PROMPT
from ldm.models.unet import UNet, make_guidance_conditioned, without_variance
from ldm.sampling.few_steps import first_order_scheduler, lcm_scheduler
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training.optimizer import DTYPES
from ldm.training.run_dir import FREE_ENDS, about, make_dir
from ldm.training.trainer import Run
from ldm.utils.atomic_files import tensors_sha256, whole_file
from ldm.utils.errors import Parser, UserError, command
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.distillation.methods import Consistency, DistillationMethod, Guidance, Halving

METHODS = ("progressive", "consistency")
CAPTIONS = 1000  # that others are blended with


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="stage2_diffusion.distillation.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; a used one is continued")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps_to=8")
    args = parser.parse_intermixed_args(arguments)
    of_run = loader.of_run(args.run)
    settings = loader.section(DistillConfig, args.overrides, "distill")
    if settings.guidance_to is None:
        twice = max(2 * of_run.sample.guidance, settings.guidance_from + 1)
        settings = settings.model_copy(update={"guidance_to": twice})
    check(of_run.stage2, settings, args.method)
    with training_processes(of_run.run) as state:
        teacher = LatentDiffusion.load(args.run / "pipeline", "cpu")
        without_variance(teacher.unet, teacher.autoencoder.channels)
        about_it = {
            "run": str(args.run), "method": args.method, "teacher": tensors_sha256(teacher.unet.state_dict()),
            "distill": settings.model_dump(mode="json"),
        }  # fmt: skip
        on_main(partial(claim, args.out, about_it))
        if not on_main((args.out / "pipeline").exists):
            distill(of_run, settings, args.method, teacher, args.out)
        if state.is_main_process:
            print(f"finished: {args.out / 'pipeline'}")


def check(stage: Stage2Config, settings: DistillConfig, method: str) -> None:
    """UserError where a model can't be distilled so."""
    if "upscale" in stage.conditions:
        raise UserError("stage2.conditions: diffusers' pipeline for upscale can't tell a student its scale of guidance")
    if method == "progressive":
        if stage.prediction_type == "eps":
            raise UserError(
                "stage2.prediction_type: at pure noise 'eps' says nothing about the picture, so progressive "
                "distillation can't learn it; use --method consistency, or a run with target v, x0 or flow"
            )
        try:
            settings.halvings()
        except ValueError as error:
            raise UserError(f"distill: {error}") from None
        if stage.prediction_type != "flow" and settings.steps_from > stage.timesteps:
            raise UserError(
                f"distill: steps_from: {settings.steps_from}, but stage2.timesteps are {stage.timesteps}; lower it"
            )
    elif stage.prediction_type == "flow":
        raise UserError("--method consistency: diffusers' LCMScheduler can't sample a flow; use --method progressive")
    elif not settings.steps_to <= settings.original_steps <= stage.timesteps // 2:
        raise UserError(
            f"distill: original_steps: {settings.original_steps}; give steps_to, {settings.steps_to}, at least, and "
            f"half of stage2.timesteps, {stage.timesteps // 2}, at most"
        )


def claim(folder: Path, new: dict[str, Any]) -> None:
    """Makes the folder, or takes it up again; UserError where it was made from another model or otherwise."""
    file = folder / "config.yaml"
    if file.exists():
        old = yaml.safe_load(file.read_text("utf-8"))
        if "distill" not in old:
            raise UserError(f"--out: {folder} is a run of another kind; give another folder")
        old["distill"], _ = loader.renamed(DistillConfig, old["distill"])
        changed = [
            change for change in differences(old["distill"], new["distill"])
            if not f".{change.partition(':')[0]}".endswith(FREE_ENDS)
        ]  # fmt: skip
        before, now = ({key: each[key] for key in ("method", "teacher")} for each in (old, new))
        changed += differences(before, now)
        if changed:
            raise UserError(f"--out: {folder} belongs to another distillation ({'; '.join(changed)}); give another")
        return
    make_dir("--out", folder)
    with whole_file(file) as tmp_path:
        tmp_path.write_text(yaml.safe_dump({"about": about(), **new}, sort_keys=False), "utf-8")


def distill(of_run: Config, settings: DistillConfig, method: str, model: LatentDiffusion, folder: Path) -> None:
    """Teaches one student after the other; each is exported, the last one as `pipeline` too."""
    stage, process = of_run.stage2, DiffusionProcess.of(of_run.stage2)
    device = join(of_run.run).device
    model.to(device)
    data: Index | Stream
    if of_run.data.streaming:
        data = Stream(of_run.data, of_run.cache_dir, folder / "data-report.jsonl", stage.conditions)
    else:
        data = index.build(of_run.data, of_run.cache_dir, stage.conditions)
    assert settings.guidance_to, "the command sets it"
    null = None
    if model.text:
        null = model.text.encode([NULL_PROMPT])[0] if model.null is None else model.null
        within = min(max(model.guidance, settings.guidance_from), settings.guidance_to)
        model = replace(model, guidance=within)
    given = (process, settings, of_run.run.seed, null, len(model.classes) if stage.classes else None)

    def teach(name: str, lesson: DistillationMethod, solver: Any, steps: int) -> LatentDiffusion:
        exported = folder / f"pipeline-{name.removeprefix('steps-')}"
        if not on_main(exported.exists):
            unet = learn(of_run, settings, model, data, name, lesson, folder)
            on_main(partial(replace(model, unet=unet, scheduler=solver, steps=steps).save, exported))
        return replace(model, unet=LatentDiffusion.load(exported, device).unet, scheduler=solver, steps=steps)

    if method == "consistency":
        solver = lcm_scheduler(process, settings.original_steps)
        model = teach("consistency", Consistency(model.unet, *given), solver, settings.steps_to)
    else:
        if model.text:
            solver = scheduler(process, of_run.sample.solver, clip=model.autoencoder.factor == 1)
            model = teach("guidance", Guidance(model.unet, *given), solver, model.steps)
        for steps in settings.halvings():
            model = teach(f"steps-{steps}", Halving(model.unet, *given, steps), first_order_scheduler(process), steps)
    on_main(partial(model.save, folder / "pipeline"))  # last: where it stands, all is finished


def learn(
    of_run: Config, settings: DistillConfig, model: LatentDiffusion, everything: Index | Stream, name: str,
    lesson: DistillationMethod, folder: Path,
) -> UNet:  # fmt: skip
    """Trains a student, which starts as its teacher, and returns it with its averaged weights."""
    stage, device, data = of_run.stage2, model.unet.device, everything.select("train")
    unet = copy.deepcopy(lesson.teacher).requires_grad_(True)
    if lesson.guidance_conditioned:
        make_guidance_conditioned(unet)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if stage.channels_last:
        unet.to(memory_format=torch.channels_last)
    for each in (unet, lesson.teacher):
        use_attention(each, stage.attention_backend, device, DTYPES[precision(of_run.run)])
    training = settings.model_copy(update={"steps": settings.guidance_steps} if name == "guidance" else {})
    contract = {
        **model.autoencoder.latent_fingerprint(of_run.data.size), "data": data.fingerprint(),
        "teacher": tensors_sha256(lesson.teacher.state_dict()),
    }  # fmt: skip
    student = Denoiser(unet, Stage2Config(), lesson.null)  # by default, nothing beside the U-Net is trained
    spec = SampleSpec.of(of_run.data, settings.batch, of_run.run.seed, stage.cond_dropout)
    run = Run(
        of_run.run.model_copy(update={"dir": folder}), training, name, student, contract,
        name=sample_names(data, spec), sharded=lesson.can_be_sharded,
    )  # fmt: skip
    if stage.compile:
        compile_blocks(unet, dynamic=bool(of_run.data.buckets))
    cache = CacheOptions.of(of_run.data, of_run.cache_dir)
    samples = stage2_dataset(data, spec, cache, model.autoencoder, model.text, run.device, stage.image)
    conditions = Conditions(of_run, model.autoencoder, None, len(model.classes))
    held = held_out(model, everything, settings.batch, run.passes.images)
    if settings.blended and model.text and isinstance(data, Index):
        captions = data.some(CAPTIONS)
        lesson.others = model.text.encode([captions[i].captions[0] for i in range(len(captions))])

    def evaluate_if_due() -> None:
        if held and run.due(settings.evaluate_every, last=True):
            validate(run, lesson, conditions, held)

    if run.step:  # what a killed run still owes
        evaluate_if_due()
    for batch in run.batches(samples.dataset, of_run.data.workers):
        with run.accumulate():
            n = batch["position"]
            x0, states = samples.encode(batch)
            condition, _, _ = conditions(lesson.undropped(batch), x0, states)
            asked = lesson.make_batch(n, x0, lesson.blended(n, condition))  # z_t, at a noise level and a scale
            with torch.no_grad(), run.autocast():
                target = lesson.target(asked, run)

            prediction = run.model(asked.z, asked.model_time, asked.condition)
            losses = lesson.losses(prediction.float(), asked, target)
            loss = losses.mean()
            run.track_nonfinite(n, losses[:, None])
            run.backward(loss)
            run.update(loss=loss)
        evaluate_if_due()
    run.close()
    return run.export_ema().unet


def held_out(model: LatentDiffusion, everything: Index | Stream, count: int, images: int) -> list[EvaluationBatch]:
    """Some of the held-out images with their latents and embeddings, so many `images` in each batch."""
    held = everything.select(*HELD_OUT)
    if not isinstance(held, Index):
        return []
    held = held.some(count)
    numbers = range(len(held))
    return [
        evaluation_batch(
            held, numbers[at : at + images], model.autoencoder, model.text, model.classes, model.unet.device
        )
        for at in numbers[::images]
    ]


@torch.no_grad()
def validate(run: Run, lesson: DistillationMethod, conditions: Conditions, held: Sequence[EvaluationBatch]) -> None:
    """Logs `held_out_loss`, of the averaged weights; every process measures all of it, which is little."""
    losses = []
    with run.averaged("a validation"):
        for batch, x0, _, states in held:
            condition, _, _ = conditions(lesson.undropped(batch), x0, states)
            asked = lesson.make_batch(batch["position"], x0, condition)
            with run.autocast():
                target = lesson.target(asked, run)
                prediction = run.module(asked.z, asked.model_time, asked.condition)
            losses.append(lesson.losses(prediction.float(), asked, target))
    run.log({"held_out_loss": float(torch.cat(losses).mean())})


if __name__ == "__main__":
    sys.exit(main(None))
