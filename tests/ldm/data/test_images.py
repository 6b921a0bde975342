"""Picture files as tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import images
from ldm.data.crops import crop_resize
from ldm.data.records import BadSampleError


def load(path: Path, size: int) -> torch.Tensor:
    return images.to_tensor(crop_resize(images.decode(path.read_bytes()), (size, size))[0])


def test_a_picture_survives_the_way_there_and_back(tmp_path: Path) -> None:
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    picture.save(tmp_path / "a.png")
    pixels = load(tmp_path / "a.png", 32)
    assert pixels.shape == (3, 32, 32)
    assert pixels.abs().max() <= 1
    assert images.to_pil(pixels[None])[0].tobytes() == picture.tobytes()


def test_transparency_becomes_white_and_the_centre_is_kept(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (48, 16), (255, 0, 0, 255))
    wide.paste((0, 0, 255, 0), (16, 0, 32, 16))
    wide.save(tmp_path / "a.png")
    assert torch.equal(load(tmp_path / "a.png", 16)[:, :, 4:12], torch.ones(3, 16, 8))


def test_the_turn_that_a_camera_noted_is_carried_out(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 16), "white")
    picture.paste((0, 0, 0), (0, 0, 16, 8))  # black above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180°
    picture.save(tmp_path / "a.png", exif=exif)
    pixels = load(tmp_path / "a.png", 16)
    assert pixels[:, :8].min() == 1
    assert pixels[:, 8:].max() == -1


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 30_000, np.uint16)).save(tmp_path / "a.png")
    pixels = load(tmp_path / "a.png", 16)
    torch.testing.assert_close(pixels, torch.full((3, 16, 16), 30_000 / 32_767.5 - 1), atol=0.01, rtol=0)


def test_what_is_no_picture_says_so() -> None:
    with pytest.raises(BadSampleError, match="none of JPEG"):
        images.decode(b"not a picture")


def test_a_sheet_has_room_for_every_picture() -> None:
    sheet = images.grid(
        [Image.new("RGB", (64, 64), "red")] * 5, ["a long caption that wraps"] * 5, columns=3, marked=[0]
    )
    assert sheet.width >= 3 * 128
    assert sheet.getpixel((12 + 64, 12 + 64)) == (255, 0, 0)
