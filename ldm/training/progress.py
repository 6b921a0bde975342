"""The progress bar of a training run, on the main process."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm import tqdm

from ldm.training.budget import LoadWatch


class ProgressBar:
    """Counts images; shows step, batch and the last metrics. Where stderr is no terminal, a line each 30 s."""

    def __init__(
        self, stage: str, step: int, steps: int, batch: int, hidden: bool, load_watch: LoadWatch | None = None
    ):
        self.steps, self.batch, self.load_watch = steps, batch, load_watch
        self._bar = tqdm(
            total=steps * batch,
            initial=step * batch,
            unit=" img",
            desc=stage,
            smoothing=0.1,
            disable=hidden,
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
        )

    def advance(self) -> None:
        """By a global batch."""
        self._bar.update(self.batch)

    def show(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Metrics, but for gradient norms, and the shares `waiting` and `mfu`."""
        shown = {name: f"{value:.3g}" for name, value in values.items() if not name.endswith("gradient_norm")}
        shown |= {name: f"{speed[name]:.0%}" for name in ("waiting", "mfu") if name in speed}
        self._bar.set_postfix({"step": f"{step}/{self.steps}", "batch": self.batch} | shown, refresh=False)
        if self.load_watch and (line := self.load_watch.observe(step, self.batch / speed["images_per_second"])):
            self.write(line)

    def write(self, line: str) -> None:
        """A line above the bar."""
        self._bar.write(line)

    def close(self) -> None:
        self._bar.close()
