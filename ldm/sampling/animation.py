"""Animations of denoising: one frame per step, which shows the x_0 that the network predicts there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.images import grid, to_pil
from ldm.models.autoencoder import Autoencoder
from ldm.sampling.loop import Step
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

FORMATS = (".gif", ".webp", ".mp4")
FRAME_MS, LAST_FRAME_MS = 80, 1500  # how long each frame is shown, in milliseconds


class Animation:
    """Collects steps, then writes a `.gif`, `.webp` or `.mp4` of the images side by side, with captions."""

    def __init__(self, path: Path, autoencoder: Autoencoder, captions: Sequence[str]):
        self.path, self.autoencoder, self.captions = path, autoencoder, captions
        self._frames: list[Image.Image] = []

    @staticmethod
    def check(path: Path) -> None:
        """UserError if such a file can't be written on this machine."""
        if path.suffix.lower() not in FORMATS:
            raise UserError(f"animation: {path} is none of {', '.join(FORMATS)}")
        if path.suffix.lower() == ".mp4":
            try:
                import imageio_ffmpeg  # noqa: F401
            except ImportError:
                raise UserError("animation: .mp4 needs pip install 'ldm[video]'; .gif and .webp need nothing") from None

    def step(self, step: Step) -> None:
        """Adds a frame."""
        self.show(to_pil(self.autoencoder.decode(step.x0)))

    def show(self, images: Sequence[Image.Image]) -> None:
        """Adds a frame of finished images."""
        self._frames.append(grid(images, self.captions, columns=4))

    def write(self) -> None:
        """Writes the file, complete or not at all."""
        suffix = self.path.suffix.lower()
        durations = [FRAME_MS] * (len(self._frames) - 1) + [LAST_FRAME_MS]
        with atomic_file(self.path) as tmp_path:
            if suffix == ".mp4":
                self._write_mp4(tmp_path, durations)
            else:
                first, *rest = self._frames
                first.save(tmp_path, suffix[1:].upper(), save_all=True, append_images=rest, duration=durations, loop=0)

    def _write_mp4(self, path: Path, durations: Sequence[int]) -> None:
        from imageio_ffmpeg import write_frames

        width, height = (side + side % 2 for side in self._frames[0].size)  # its chroma subsampling needs even sides
        writer = write_frames(str(path), (width, height), fps=1000 / FRAME_MS, output_params=["-f", "mp4"])
        writer.send(None)
        for frame, duration in zip(self._frames, durations, strict=True):
            padded = Image.new("RGB", (width, height), "white")
            padded.paste(frame)
            for _ in range(round(duration / FRAME_MS)):
                writer.send(np.asarray(padded).tobytes())
        writer.close()
