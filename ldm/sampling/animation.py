"""The denoising of pictures as a film: a frame a step, of what the network sees through the noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.images import grid, to_pil
from ldm.models.autoencoder import Autoencoder
from ldm.sampling.loop import Step
from ldm.utils.atomic_files import whole_file
from ldm.utils.errors import UserError

KINDS = (".gif", ".webp", ".mp4")
STEP, END = 80, 1500  # milliseconds that a frame is shown, and the last one


class Animation:
    """Takes in steps, then writes a `.gif`, `.webp` or `.mp4` of the pictures side by side, with captions."""

    def __init__(self, path: Path, autoencoder: Autoencoder, captions: Sequence[str]):
        self.path, self.autoencoder, self.captions = path, autoencoder, captions
        self._frames: list[Image.Image] = []

    @staticmethod
    def check(path: Path) -> None:
        """UserError where such a file can't be written here."""
        if path.suffix.lower() not in KINDS:
            raise UserError(f"--animate: {path} is none of {', '.join(KINDS)}")
        if path.suffix.lower() == ".mp4":
            try:
                import imageio_ffmpeg  # noqa: F401
            except ImportError:
                raise UserError("--animate: .mp4 needs pip install 'ldm[video]'; .gif and .webp need nothing") from None

    def step(self, step: Step) -> None:
        """Adds a frame."""
        self.show(to_pil(self.autoencoder.decode(step.x0)))

    def show(self, pictures: Sequence[Image.Image]) -> None:
        """Adds a frame of pictures that are made already."""
        self._frames.append(grid(pictures, self.captions, columns=min(4, len(pictures))))

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        kind = self.path.suffix.lower()
        times = [STEP] * (len(self._frames) - 1) + [END]
        with whole_file(self.path) as tmp_path:
            if kind == ".mp4":
                self._film(tmp_path, times)
            else:
                first, *rest = self._frames
                first.save(tmp_path, kind[1:].upper(), save_all=True, append_images=rest, duration=times, loop=0)

    def _film(self, path: Path, times: Sequence[int]) -> None:
        from imageio_ffmpeg import write_frames

        width, height = (side + side % 2 for side in self._frames[0].size)  # which its colours want
        film = write_frames(str(path), (width, height), fps=1000 / STEP, output_params=["-f", "mp4"])
        film.send(None)
        for frame, time in zip(self._frames, times, strict=True):
            whole = Image.new("RGB", (width, height), "white")
            whole.paste(frame)
            for _ in range(round(time / STEP)):
                film.send(np.asarray(whole).tobytes())
        film.close()
