"""Trains the text-conditioned latent U-Net: cached latents and captions in, `RUN/pipeline` out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldm.autoencoder import Autoencoder
from ldm.data.images import grid
from ldm.data.index import Index
from ldm.data.order import normal, uniform
from ldm.data.samples import feed
from ldm.data.stream import Stream
from ldm.diffusion import Process
from ldm.pipeline import LatentDiffusion
from ldm.run import Run
from ldm.sampling import scheduler
from ldm.schema import Config
from ldm.text import TextEncoder
from ldm.unet import build as build_unet
from ldm.unet import load as load_unet
from ldm.unet import use_attention


def train(config: Config, data: Index | Stream, autoencoder: Autoencoder, text: TextEncoder) -> None:
    """Trains the U-Net on the pictures of split `train` and exports the pipeline with its EMA weights."""
    stage, seed = config.stage2, config.run.seed
    train_set = data.select("train")
    contract = {**autoencoder.contract(config.data.size), "data": train_set.fingerprint()}
    process = Process(stage.target, stage.schedule, stage.time_mean, stage.time_std)

    torch.manual_seed(seed)
    side = config.data.size // autoencoder.factor
    if stage.init_from:
        unet = load_unet(stage.init_from, autoencoder.channels, side, text.width, stage.target)
    else:
        unet = build_unet(stage, autoencoder.channels, side, text.width)
    run = Run(config.run, stage, "stage2", unet, contract)
    use_attention(unet, stage.attention_backend, run.device)
    samples = feed(train_set, config, autoencoder.to(run.device), text.to(run.device), run.device)
    unseen = {caption for captions in data.select("combination").captions() for caption in captions}
    model = LatentDiffusion(
        text, unet, autoencoder, scheduler(process, config.sample.solver), config.sample.steps, config.sample.guidance
    )

    for batch in run.batches(samples.dataset, config.data.workers):
        with run.accumulate():
            (x0, text_states), n = samples.encoded(batch), batch["position"]
            eps = normal(seed, "noise", n, x0.shape[1:]).to(run.device)
            t = process.time(uniform(seed, "time", n)).to(run.device)
            dropped = uniform(seed, "dropout", n).to(run.device) < batch["dropout"]
            text_states = torch.where(dropped[:, None, None], samples.null, text_states)  # classifier-free guidance

            x_t = process.add_noise(x0, eps, t)
            prediction = run.model(x_t, process.network_time(t), text_states, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), process.target_of(x0, eps, t))
            run.backward(loss)
            run.update(loss=loss, dropped=dropped.float().mean())
        if run.due(config.sample.every):
            write_grid(config, run, model, unseen)

    run.release()
    write_grid(config, run, model, unseen)
    with run.averaged():
        if run.is_main:
            model.save(config.run.dir / "pipeline")  # last: where it stands, the stage is finished
    run.accelerator.wait_for_everyone()


def write_grid(config: Config, run: Run, model: LatentDiffusion, unseen: set[str]) -> None:
    """`stage2/samples/step-….png`: the configured prompts with the EMA weights; framed are those no training saw."""
    prompts = config.sample.prompts
    path = run.folder / "samples" / f"step-{run.step:06d}.png"
    if prompts and run.is_main and not path.exists():
        with run.averaged():
            pictures = model(prompts, seed=config.run.seed, batch=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        marked = [i for i, prompt in enumerate(prompts) if prompt in unseen]
        grid(pictures, prompts, columns=8, marked=marked).save(path)
