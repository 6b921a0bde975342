"""Trains the classifier of classifier guidance on a finished run's latents with noise: `OUT/model` out.

    python -m stage2_diffusion.classifier.train runs/openmoji --out runs/classifier [steps=3000 channels=[64,128,256] …]

It learns the classes of the run's training images, even where the run itself was trained without them. The keys are
those of `ClassifierConfig`. The same command again continues, or finds it finished.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import ldm.utils.openmp  # noqa: F401  # before torch

import torch
from torch import nn
from torch.nn import functional as F

from ldm.config import loader
from ldm.config.schema import ClassifierConfig, Config
from ldm.data import index
from ldm.data.cache import CacheOptions
from ldm.data.dataset import evaluation_batch, sample_names, stage2_dataset
from ldm.data.draws import with_draws
from ldm.data.index import Index
from ldm.data.index_report import stop_reason, write_report
from ldm.data.records import HELD_OUT
from ldm.data.sampler import SampleSpec
from ldm.diffusion.process import DiffusionProcess
from ldm.distributed.launch import on_main, training_processes
from ldm.models.autoencoder import Autoencoder
from ldm.models.classifier import NoisyClassifier
from ldm.models.finite import check_weights
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.diffusion_process import diffusion_process
from ldm.training.evaluation_sizes import VALIDATION_BATCH
from ldm.training.optimizer import check_optimizer
from ldm.training.run_dir import make_dir, prepare_out_dir
from ldm.training.trainer import Trainer
from ldm.utils.atomic_files import atomic_folder
from ldm.utils.errors import Parser, UserError, training_command
from ldm.utils.rng import normal
from stage2_diffusion.draws import NoiseDraws
from stage2_diffusion.validation import EVAL_LOG_SNRS

STAGE = "classifier"


@training_command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="stage2_diffusion.classifier.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write; a used one is continued")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps=3000")
    args = parser.parse_intermixed_args(arguments)
    stage = loader.section(ClassifierConfig, args.overrides, "stage2_diffusion.classifier.train")
    config = read(args.run)
    with training_processes(config.run):
        train(config, stage, args.run, args.out)


def read(run: Path) -> Config:
    """A finished run's configuration; UserError where no classifier can be trained for it."""
    config = loader.load_run(run)
    if config.stage2.image:
        raise UserError(
            f"{run}: made for {', '.join(config.stage2.conditions)}; classifiers guide models of complete images"
        )
    if config.data.streaming:
        raise UserError(f"{run}: a stream's classes aren't known beforehand; train one with data.streaming=false")
    return config


def train(config: Config, stage: ClassifierConfig, run_folder: Path, out: Path) -> None:
    """Trains a classifier of the images of split `train`, or of half of them, and writes `OUT/model`."""
    on_main(partial(check_optimizer, stage, ""))
    images = index.build(config.data, config.cache_dir, ("class",))
    classes = usable(images, out)
    train_set = images.select("train")
    train_set = train_set if stage.half is None else train_set.half(stage.half)
    if not len(train_set):
        raise UserError(f"half: {stage.half} holds no training image of {config.data.name}; leave it out")
    pipeline = LatentDiffusion.load(run_folder / "pipeline", "cpu")
    autoencoder = pipeline.autoencoder
    process = replace(diffusion_process(config.stage2), timestep_sampling="uniform")  # as ADM draws them
    torch.manual_seed(stage.seed)
    model = NoisyClassifier.of(stage, autoencoder, process, classes)
    model.check(pipeline.scheduler, autoencoder)
    fingerprint = {
        **autoencoder.latent_fingerprint(config.data.size),
        "data": train_set.fingerprint(),
        "noise": hashlib.sha256(repr(model.config.betas).encode()).hexdigest(),
    }
    settings = {"run": str(run_folder), "fingerprint": fingerprint, "classifier": stage.model_dump(mode="json")}
    on_main(partial(prepare_out_dir, out, ClassifierConfig, "classifier", settings))
    if on_main((out / "model").exists):
        on_main(lambda: print(f"finished: {out / 'model'}"))
        return
    if stage.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    spec = SampleSpec.of(config.data, stage.batch, stage.seed)
    name = sample_names(train_set, spec)
    trainer = Trainer(config.run, stage, STAGE, model, fingerprint, name=name, run_dir=out)
    autoencoder.to(trainer.device)
    cache = CacheOptions.of(config.data, config.cache_dir)
    samples = stage2_dataset(train_set, spec, cache, autoencoder, None, trainer.device)
    dataset = with_draws(samples.dataset, NoiseDraws(stage.seed, autoencoder.channels, autoencoder.factor))
    validation = Validation(stage, images, autoencoder, process, trainer.device, trainer.accumulation.images)

    def evaluate_if_due() -> None:
        if trainer.due(stage.evaluate_every, last=True):
            validation(trainer)

    if trainer.step:  # what a killed run did not finish
        evaluate_if_due()
    for batch in trainer.batches(dataset, config.data.workers, config.data.prefetch_factor):
        with trainer.accumulate():
            n, y = batch["position"], batch["class"]
            x0, _ = samples.encode(batch)
            eps, t = batch["noise"], process.time(batch["u"])

            logits = trainer.model(process.add_noise(x0, eps, t), process.model_time(t))
            losses = F.cross_entropy(logits.float(), y, reduction="none")
            loss = losses.mean()
            trainer.nonfinite.track_nonfinite(n, losses[:, None])
            trainer.backward(loss)
            trainer.optimizer_step()
            trainer.log(loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
        trainer.checkpoint_if_due()
        evaluate_if_due()

    trainer.close()
    trained = trainer.export_ema()
    on_main(partial(save, trained, out / "model", validation))  # last: where it stands, the training is finished


def usable(images: Index, out: Path) -> list[str]:
    """The classes of the images; UserError where they have none, or one, or too many images are bad."""
    report = out / "data-report.json"
    if problem := stop_reason(images, report):
        on_main(partial(make_dir, "--out", out))
        on_main(partial(write_report, images, report))
        raise UserError(problem)
    classes = images.labels()
    if len(classes) < 2:
        raise UserError(
            f"data.source: all images of {images.data.name} are of one class, {classes[0]!r}; a classifier needs "
            "two at least"
        )
    return classes


def save(model: NoisyClassifier, folder: Path, validation: Validation) -> None:
    check_weights({"classifier": model}, folder)
    print(validation.table(model))
    with atomic_folder(folder) as tmp_path:
        model.save_pretrained(tmp_path)
    print(f"finished: {folder}")


class Validation:
    """Accuracy by noise level on held-out images, always the same, with the same noise; nothing where none are.

    At most `batch` images are computed at once.
    """

    def __init__(
        self,
        stage: ClassifierConfig,
        images: Index,
        autoencoder: Autoencoder,
        process: DiffusionProcess,
        device: torch.device,
        batch: int,
    ):
        held = images.select(*HELD_OUT).subset(stage.evaluate_images)
        self.process, self.seed = process, stage.seed
        self.batch = min(VALIDATION_BATCH, batch)
        self.classes, numbers = images.labels(), range(len(held))
        batches = [
            evaluation_batch(held, numbers[at : at + self.batch], autoencoder, None, self.classes, device)
            for at in numbers[:: self.batch]
        ]
        self.x0 = torch.cat([batch.mean.cpu() for batch in batches]) if batches else torch.empty(0)
        self.y = torch.cat([batch.batch["class"].cpu() for batch in batches]) if batches else torch.empty(0).long()

    def __call__(self, trainer: Trainer) -> None:
        """Logs `held_out_accuracy`, mean over the noise levels, and that of each level."""
        if not len(self.y):
            return
        with trainer.ema_weights("a validation"):
            right = self.right(trainer.module, trainer.accelerator.process_index, trainer.accelerator.num_processes)
        shares = (trainer.sum(right).sum(0) / len(self.y)).tolist()
        levels = {
            f"held_out_accuracy_at_{level:+.0f}": share for level, share in zip(EVAL_LOG_SNRS, shares, strict=True)
        }
        trainer.log_values({"held_out_accuracy": sum(shares) / len(shares)} | levels)

    @torch.no_grad()
    def right(self, model: nn.Module, rank: int = 0, processes: int = 1) -> torch.Tensor:
        """How many images of each class are recognised at each level, `(K, levels)`, in one process's share."""
        correct = torch.zeros(len(self.classes), len(EVAL_LOG_SNRS), dtype=torch.float64)
        device = next(model.parameters()).device
        for numbers in torch.arange(len(self.y))[rank::processes].split(self.batch):
            x0, y = self.x0[numbers].to(device), self.y[numbers]
            eps = normal(self.seed, "validation", numbers, x0.shape[1:]).to(x0)
            for i, level in enumerate(EVAL_LOG_SNRS):
                t = self.process.time_at(torch.full((len(x0),), level, device=device))
                logits = model(self.process.add_noise(x0, eps, t), self.process.model_time(t))
                correct[:, i].index_add_(0, y, (logits.argmax(1).cpu() == y).double())
        return correct

    def table(self, model: NoisyClassifier) -> str:
        """A row of accuracies for each class and one for all images, a column for each log-SNR."""
        counts, right = torch.bincount(self.y, minlength=len(self.classes)), self.right(model)
        rows = [(name, n, row) for name, n, row in zip(self.classes, counts.tolist(), right, strict=True) if n]
        if not rows:
            return "no images are held out, so that nothing is measured; data.val_fraction=0.05 holds some out"
        width = max(12, *(len(name) for name, *_ in rows))
        lines = [
            f"{'held out':{width}} {'images':>8}" + "".join(f"{level:>+7.0f}" for level in EVAL_LOG_SNRS) + "  log-SNR"
        ]
        for name, count, row in [("all", len(self.y), right.sum(0)), *rows]:
            lines.append(f"{name:{width}} {count:>8}" + "".join(f"{share:>7.3f}" for share in row / count))
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(None))
