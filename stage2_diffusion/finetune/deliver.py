"""What a run of stage two hands over: a pipeline, an adapter, or the embedding of a word."""

from __future__ import annotations

from ldm.config.schema import Config
from ldm.sampling.pipeline import LatentDiffusion


def deliver(config: Config, model: LatentDiffusion) -> None:
    """Writes the folders of a finished run's result; the last one, which marks the run as finished, last."""
    folder, finetune = config.run.dir, config.finetune
    if finetune.deliverable == "pipeline":
        model.save(folder / "pipeline")
