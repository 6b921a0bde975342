"""Trains a latent diffusion model: an autoencoder, then a text-conditioned U-Net in its latents.

    accelerate launch train_ldm.py --config configs/openmoji.yaml [stage2.lr=1e-3 …]

One process or many, and plain `python train_ldm.py …`. The same command again continues where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ldm import autoencoder, config, plan
from ldm.data import check, index, samples
from ldm.data.stream import Stream
from ldm.errors import Parser, UserError, command
from ldm.folder import check_finished, claim, write_card
from ldm.processes import join, on_main
from stage1_vae.train import train as train_autoencoder
from stage2_diffusion.train import train as train_unet


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="train_ldm.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="a YAML file, for example configs/openmoji.yaml")
    parser.add_argument("--stage", choices=("1", "2"), help="only this stage; default: both")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, and train nothing")
    parser.add_argument("--fresh", action="store_true", help="leave a used run folder alone and start beside it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example stage2.lr=1e-3")
    given = parser.parse_intermixed_args(arguments)

    settings = config.load(given.config, given.overrides)
    if given.dry_run:
        print(plan.describe(settings))
        return
    state = join(settings.run)
    encoder = plan.check(settings, state.num_processes)  # what stage two needs, before stage one takes its hours
    settings = claim(settings, given.fresh)
    folder = settings.run.dir
    trained, pipeline = folder / "autoencoder", folder / "pipeline"
    untrained = not settings.stage1.needs_none and not trained.exists()
    made = settings.stage1.pretrained or ("identity" if settings.stage1.needs_none else trained)
    if untrained and given.stage == "2":
        raise UserError(f"--stage 2: no autoencoder in {trained}; run --stage 1 first, or set stage1.pretrained")
    pictures = Stream(settings) if settings.data.streaming else index.build(settings)
    check.before_training(pictures, settings, encoder)
    if not pipeline.exists():
        on_main(lambda: plan.check_on_pictures(settings, next(samples.whole(pictures, 2)), state.device))

    if untrained:
        train_autoencoder(settings, pictures)
    if given.stage != "1":
        if pipeline.exists():
            check_finished(folder / "stage2", {"data": pictures.select("train").fingerprint()})
        else:
            train_unet(settings, pictures, autoencoder.load(made), encoder)
        if state.is_main_process and not (folder / "README.md").exists():
            write_card(settings)
    if state.is_main_process:
        print(f"finished: {pipeline if given.stage != '1' else made}")


if __name__ == "__main__":
    sys.exit(main())
