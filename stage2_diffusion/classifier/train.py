"""Trains the classifier of classifier guidance on a finished run's latents with noise: `OUT/model` out.

    python -m stage2_diffusion.classifier.train runs/openmoji --out runs/classifier [steps=3000 channels=[64,128,256] …]

It learns the classes of the run's training pictures, which the run itself need not have been told. The keys are those
of `ClassifierConfig`. The same command again continues, or finds it finished.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

import torch
import yaml
from torch import nn
from torch.nn import functional as F

from ldm.config import loader
from ldm.config.loader import differences
from ldm.config.schema import ClassifierConfig, Config
from ldm.data import index
from ldm.data.cache import CacheOptions
from ldm.data.dataset import evaluation_batch, sample_names, stage2_dataset
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.data.sampler import SampleSpec
from ldm.diffusion.process import DiffusionProcess
from ldm.distributed.launch import on_main, training_processes
from ldm.models.autoencoder import Autoencoder
from ldm.models.classifier import NoisyClassifier
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.checkpoint import checkpoints
from ldm.training.evaluation_sizes import VALIDATION_BATCH
from ldm.training.run_dir import FREE_ENDS, make_dir
from ldm.training.trainer import Run
from ldm.utils.atomic_files import whole_file, whole_folder
from ldm.utils.errors import Parser, UserError, command
from ldm.utils.rng import normal, uniform
from stage2_diffusion.validation import EVAL_LOG_SNRS

STAGE = "classifier"


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="stage2_diffusion.classifier.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write; a used one is continued")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps=3000")
    args = parser.parse_intermixed_args(arguments)
    own = loader.section(ClassifierConfig, args.overrides, "stage2_diffusion.classifier.train")
    settings = read(args.run)
    with training_processes(settings.run):
        train(settings, own, args.run, args.out)


def read(run: Path) -> Config:
    """A finished run's settings; UserError where no classifier can be trained for it."""
    found = loader.of_run(run)
    if found.stage2.image:
        raise UserError(
            f"{run}: made for {', '.join(found.stage2.conditions)}; classifiers guide models that make whole pictures"
        )
    if found.data.streaming:
        raise UserError(f"{run}: a stream's classes aren't known beforehand; train one with data.streaming=false")
    return found


def train(settings: Config, own: ClassifierConfig, run_folder: Path, out: Path) -> None:
    """Trains a classifier of the pictures of split `train`, or of half of them, and writes `OUT/model`."""
    pictures = index.build(settings.data, settings.cache_dir, ("class",))
    classes = usable(pictures, out)
    train_set = pictures.select("train")
    train_set = train_set if own.half is None else train_set.half(own.half)
    if not len(train_set):
        raise UserError(f"half: {own.half} holds no training picture of {settings.data.name}; leave it out")
    pipeline = LatentDiffusion.load(run_folder / "pipeline", "cpu")
    autoencoder = pipeline.autoencoder
    process = replace(DiffusionProcess.of(settings.stage2), timestep_sampling="uniform")  # as ADM draws them
    torch.manual_seed(own.seed)
    model = NoisyClassifier.of(own, autoencoder, process, classes)
    model.check(pipeline.scheduler, autoencoder)
    contract = {
        **autoencoder.latent_fingerprint(settings.data.size), "data": train_set.fingerprint(),
        "noise": hashlib.sha256(repr(model.config.betas).encode()).hexdigest(),
    }  # fmt: skip
    on_main(partial(claim, out, run_folder, own, contract))
    if (out / "model").exists():
        on_main(lambda: print(f"finished: {out / 'model'}"))
        return
    if own.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    spec = SampleSpec.of(settings.data, own.batch, own.seed)
    of_run = settings.run.model_copy(update={"dir": out, "seed": own.seed})
    run = Run(of_run, own, STAGE, model, contract, name=sample_names(train_set, spec))
    autoencoder.to(run.device)
    cache = CacheOptions.of(settings.data, settings.cache_dir)
    samples = stage2_dataset(train_set, spec, cache, autoencoder, None, run.device)
    validation = Validation(own, pictures, autoencoder, process, run.device, run.passes.images)

    def evaluate_if_due() -> None:
        if run.due(own.evaluate_every, last=True):
            validation(run)

    if run.step:  # what a killed run still owes
        evaluate_if_due()
    for batch in run.batches(samples.dataset, settings.data.workers):
        with run.accumulate():
            n, y = batch["position"], batch["class"]
            x0, _ = samples.encode(batch)
            eps = normal(own.seed, "noise", n, x0.shape[1:]).to(x0)
            t = process.time(uniform(own.seed, "time", n).to(run.device))

            logits = run.model(process.add_noise(x0, eps, t), process.model_time(t))
            losses = F.cross_entropy(logits.float(), y, reduction="none")
            loss = losses.mean()
            run.track_nonfinite(n, losses[:, None])
            run.backward(loss)
            run.update(loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
        evaluate_if_due()

    run.close()
    trained = run.export_ema()
    on_main(partial(save, trained, out / "model", validation))  # last: where it stands, the training is finished


def usable(pictures: Index, out: Path) -> list[str]:
    """The classes of the pictures; UserError where they have none, or one, or too many pictures are bad."""
    report = out / "data-report.json"
    if problem := pictures.verdict(report):
        on_main(partial(make_dir, "--out", out))
        on_main(partial(pictures.report, report))
        raise UserError(problem)
    classes = pictures.labels()
    if len(classes) < 2:
        raise UserError(
            f"data.source: all pictures of {pictures.data.name} are of one class, {classes[0]!r}; a classifier needs "
            "two at least"
        )
    return classes


def claim(out: Path, run: Path, own: ClassifierConfig, contract: dict[str, Any]) -> None:
    """Writes `OUT/config.yaml`, or takes the folder up again; UserError, with what differs, where it is another's."""
    file = out / "config.yaml"
    now = {"run": str(run), "pictures": contract, "classifier": own.model_dump(mode="json")}
    if file.exists():
        before = yaml.safe_load(file.read_text("utf-8"))
        if now.keys() != before.keys():
            raise UserError(f"--out: {out} is not a classifier's folder; give another one")
        before["classifier"], _ = loader.renamed(ClassifierConfig, before["classifier"])
        begun = (out / "model").exists() or checkpoints(out / STAGE)
        changed = [
            change for change in differences({**before, "run": str(run)}, now)
            if begun and not change.partition(":")[0].endswith(FREE_ENDS)
        ]  # fmt: skip
        if changed:
            raise UserError(f"--out: {out} belongs to another training ({'; '.join(changed)}); give another folder")
    make_dir("--out", out)
    with whole_file(file) as tmp_path:
        tmp_path.write_text(yaml.safe_dump(now, sort_keys=False), "utf-8")


def save(model: NoisyClassifier, folder: Path, validation: Validation) -> None:
    print(validation.table(model))
    with whole_folder(folder) as tmp_path:
        model.save_pretrained(tmp_path)
    print(f"finished: {folder}")


class Validation:
    """Accuracy by noise level on held-out pictures, always the same, with the same noise; nothing where none are.

    At most so many `images` are computed at once.
    """

    def __init__(
        self, own: ClassifierConfig, pictures: Index, autoencoder: Autoencoder, process: DiffusionProcess,
        device: torch.device, images: int,
    ):  # fmt: skip
        held, self.process, self.seed = pictures.select(*HELD_OUT).some(own.evaluate_pictures), process, own.seed
        self.batch = min(VALIDATION_BATCH, images)
        self.classes, numbers = pictures.labels(), range(len(held))
        batches = [
            evaluation_batch(held, numbers[at : at + self.batch], autoencoder, None, self.classes, device)
            for at in numbers[:: self.batch]
        ]
        self.x0 = torch.cat([batch.mean.cpu() for batch in batches]) if batches else torch.empty(0)
        self.y = torch.cat([each.batch["class"].cpu() for each in batches]) if batches else torch.empty(0).long()

    def __call__(self, run: Run) -> None:
        """Logs `held_out_accuracy`, mean over the noise levels, and that of each level."""
        if not len(self.y):
            return
        with run.averaged("a validation"):
            right = self.right(run.module, run.accelerator.process_index, run.accelerator.num_processes)
        shares = (run.total(right).sum(0) / len(self.y)).tolist()
        levels = {
            f"held_out_accuracy_at_{level:+.0f}": share for level, share in zip(EVAL_LOG_SNRS, shares, strict=True)
        }
        run.log({"held_out_accuracy": sum(shares) / len(shares)} | levels)

    @torch.no_grad()
    def right(self, model: nn.Module, rank: int = 0, processes: int = 1) -> torch.Tensor:
        """How many pictures of each class are recognised at each level, `(K, levels)`, in one process's share."""
        found = torch.zeros(len(self.classes), len(EVAL_LOG_SNRS), dtype=torch.float64)
        device = next(model.parameters()).device
        for numbers in torch.arange(len(self.y))[rank::processes].split(self.batch):
            x0, y = self.x0[numbers].to(device), self.y[numbers]
            eps = normal(self.seed, "validation", numbers, x0.shape[1:]).to(x0)
            for i, level in enumerate(EVAL_LOG_SNRS):
                t = self.process.time_at(torch.full((len(x0),), level, device=device))
                logits = model(self.process.add_noise(x0, eps, t), self.process.model_time(t))
                found[:, i].index_add_(0, y, (logits.argmax(1).cpu() == y).double())
        return found

    def table(self, model: NoisyClassifier) -> str:
        """A row of accuracies for each class and one for all pictures, a column for each log-SNR."""
        counts, right = torch.bincount(self.y, minlength=len(self.classes)), self.right(model)
        rows = [(name, n, row) for name, n, row in zip(self.classes, counts.tolist(), right, strict=True) if n]
        if not rows:
            return "no pictures are held out, so that nothing is measured; data.val_fraction=0.05 holds some out"
        width = max(12, *(len(name) for name, *_ in rows))
        lines = [
            f"{'held out':{width}} {'pictures':>8}"
            + "".join(f"{level:>+7.0f}" for level in EVAL_LOG_SNRS)
            + "  log-SNR"
        ]
        for name, count, row in [("all", len(self.y), right.sum(0)), *rows]:
            lines.append(f"{name:{width}} {count:>8}" + "".join(f"{share:>7.3f}" for share in row / count))
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(None))
