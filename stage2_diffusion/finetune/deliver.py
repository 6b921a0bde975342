"""What a run of stage two hands over: a pipeline, an adapter, or the embedding of a word."""

from __future__ import annotations

from ldm.config.schema import Config
from ldm.models.adapters.embedding_files import write_embeddings
from ldm.models.adapters.folder import write_lora_folder
from ldm.models.adapters.inject import AdapterSpec
from ldm.models.adapters.merge import merge_adapters
from ldm.models.convert import checkpoint
from ldm.sampling.pipeline import LatentDiffusion


def deliver(config: Config, model: LatentDiffusion) -> None:
    """Writes the folders of a finished run's result, the one that marks the run as finished last."""
    folder, finetune = config.run.dir, config.finetune
    base = {"base": str(config.stage2.init_from), "base_config": config.text.base or ""}
    if finetune.adapter:
        unet, *encoders = model.networks.values()
        write_lora_folder(
            folder / "lora",
            model.networks,
            AdapterSpec.of(finetune),
            folder.name,
            checkpoint.known_layout(unet, model.autoencoder.vae, encoders),
            **base,
            prompt=config.sample.prompts[0] if config.sample.prompts else "",
            side=config.data.size,
        )
        if finetune.merge:
            for network in model.networks.values():
                merge_adapters(network)
    if finetune.kind == "inversion":
        assert model.text
        prompt = next((prompt for prompt in config.sample.prompts if finetune.token in prompt), "")
        write_embeddings(folder / "embeddings", model.text, finetune.token, **base, prompt=prompt)
    if finetune.deliverable == "pipeline":
        model.save(folder / "pipeline")
