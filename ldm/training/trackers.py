"""Images for experiment trackers: accelerate has one way to log numbers, but each tracker its own for images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image
from tqdm import tqdm

_failed: set[str] = set()  # trackers whose failure was reported


def log_image(trackers: Iterable[GeneralTracker], name: str, image: Image.Image, step: int) -> None:
    """Logs an RGB image to each of a process's trackers; accelerate gives some to the main process only.

    Metrics of the same step may come before or after it, those of earlier steps only before: wandb drops them. A
    tracker that fails is named in a line, once, and training goes on; one that is not in `INTERFACES` is skipped.
    """
    for tracker in trackers:
        if tracker.name not in INTERFACES:
            continue
        try:
            INTERFACES[tracker.name](tracker, name, image, step)
        except Exception as error:  # whatever its library raises: a failing tracker doesn't stop a run
            if tracker.name not in _failed:
                _failed.add(tracker.name)
                reason = " ".join(str(error).split()) or repr(error)
                tqdm.write(
                    f"run.tracker: {tracker.name} did not log the image {name!r} of step {step} ({reason}); "
                    "training goes on, and the image is in the run's folder",
                    file=sys.stderr,
                )


def _tensorboard(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
    tracker.tracker.flush()  # as after metrics


def _list(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: [image]}, step=step)


def _single(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: image}, step=step)


def _trackio(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(image)}, step=step)


def _comet_ml(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.tracker.log_image(image, name=name, step=step)


def _mlflow(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    from mlflow import MlflowClient

    # Not mlflow.log_image: after the end of this run that would begin another.
    MlflowClient().log_image(tracker.tracker.info.run_id, image, key=name, step=step)


def _dvclive(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.tracker.log_image(f"{name}/{step:06d}.png", image)


INTERFACES: dict[str, Callable[[Any, str, Image.Image, int], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _list,
    "swanlab": _list,
    "trackio": _trackio,
    "aim": _single,
    "clearml": _single,
    "comet_ml": _comet_ml,
    "mlflow": _mlflow,
    "dvclive": _dvclive,
}
