"""Image files as tensors."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import for_each
from PIL import Image

from ldm.data import images
from ldm.data.crops import crop_resize
from ldm.data.records import BadSampleError


def load(path: Path, size: int) -> torch.Tensor:
    return images.to_tensor(crop_resize(images.decode(path.read_bytes()), (size, size))[0])


def test_an_image_survives_the_round_trip_through_a_tensor(tmp_path: Path) -> None:
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    image.save(tmp_path / "a.png")
    pixels = load(tmp_path / "a.png", 32)
    assert pixels.shape == (3, 32, 32)
    assert pixels.abs().max() <= 1
    assert images.to_pil(pixels[None])[0].tobytes() == image.tobytes()


def test_transparency_becomes_white_and_the_centre_is_kept(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (48, 16), (255, 0, 0, 255))
    wide.paste((0, 0, 255, 0), (16, 0, 32, 16))
    wide.save(tmp_path / "a.png")
    assert torch.equal(load(tmp_path / "a.png", 16)[:, :, 4:12], torch.ones(3, 16, 8))


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), "white")
    image.paste((0, 0, 0), (0, 0, 16, 8))  # the upper half is black
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180°
    image.save(tmp_path / "a.png", exif=exif)
    pixels = load(tmp_path / "a.png", 16)
    assert pixels[:, :8].min() == 1
    assert pixels[:, 8:].max() == -1


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 30_000, np.uint16)).save(tmp_path / "a.png")
    pixels = load(tmp_path / "a.png", 16)
    torch.testing.assert_close(pixels, torch.full((3, 16, 16), 30_000 / 32_767.5 - 1), atol=0.01, rtol=0)


@for_each("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_an_image_cut_off_after_its_signature_is_damaged_not_of_an_unknown_format(format: str) -> None:
    with pytest.raises(BadSampleError, match="its pixels can't be decoded"):
        images.decode(encoded(format)[:16])


def test_data_that_is_no_image_is_refused() -> None:
    with pytest.raises(BadSampleError, match="none of JPEG"):
        images.decode(b"not an image")


def test_a_grid_has_room_for_every_image() -> None:
    grid = images.grid(
        [Image.new("RGB", (64, 64), "red")] * 5, ["a long caption that wraps"] * 5, columns=3, marked=[0]
    )
    assert grid.width >= 3 * 128
    assert grid.getpixel((12 + 64, 12 + 64)) == (255, 0, 0)
    one, all_columns = (images.grid([Image.new("RGB", (64, 64))], ["a"], columns=columns) for columns in (1, 8))
    assert one.size == all_columns.size, "no wider than its images"


def with_chunk(png: bytes, name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """A PNG with one more chunk after its header."""
    if checksum is None:
        checksum = zlib.crc32(name + content)
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    return png[:33] + chunk + png[33:]


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    return jpeg[:2] + b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """EXIF that says to rotate by 90°, with more tags: number, type, count, value or offset."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), *tags]
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


LONG_TEXT = b"a\0\0" + zlib.compress(bytes(3_000_000))
ODD_TAGS = [
    (0x8825, 3, 1, b"\x05\0\0\0"),  # the GPS directory is a number
    (0x9286, 2, 9, b"\xff\xff\0\0"),  # a comment of a wrong type, whose offset lies beyond the end
    (0x011A, 5, 2**20, b"\xff\xff\0\0"),
]


@for_each(
    ("name", "content", "checksum"),
    [
        (b"zTXt", LONG_TEXT, None),
        (b"iCCP", LONG_TEXT, None),
        (b"tEXt", b"a\0b", 5),
        (b"iTXt", b"\xff", 5),
        (b"pHYs", b"1", None),
        (b"gAMA", b"", None),
        (b"eXIf", b"II*", 5),
        (b"cHRM", b"\0" * 5, None),
    ],
)
def test_an_odd_metadata_chunk_never_makes_a_png_bad(name: bytes, content: bytes, checksum: int | None) -> None:
    plain = encoded("PNG")
    assert images.decode(with_chunk(plain, name, content, checksum)).tobytes() == images.decode(plain).tobytes()


@for_each("tags", [[tag] for tag in ODD_TAGS] + [ODD_TAGS])
@for_each("kind", ["JPEG", "PNG", "WEBP"])
def test_odd_exif_never_makes_an_image_bad_and_its_rotation_is_kept(
    kind: str, tags: list[tuple[int, int, int, bytes]]
) -> None:
    plain, exif = encoded(kind), rotated_exif(*tags)
    odd = encoded(kind, exif=b"Exif\0\0" + exif)
    rotated = images.decode(plain).transpose(Image.Transpose.ROTATE_270)
    assert images.decode(odd).tobytes() == rotated.tobytes()


@for_each("marker", [0xE1, 0xE2, 0xED, 0xFE])
@for_each("content", [b"Exif\0\0", b"ICC_PROFILE\0\5\1", b"MPF\0II", b"Photoshop 3.0\x008BIM\4\4\0"])
def test_an_odd_metadata_segment_never_makes_a_jpeg_bad(marker: int, content: bytes) -> None:
    plain = encoded("JPEG")
    assert images.decode(with_segment(plain, marker, content)).tobytes() == images.decode(plain).tobytes()


def test_a_png_with_a_long_text_keeps_the_rotation_of_its_exif() -> None:
    plain = encoded("PNG", exif=rotated_exif())
    assert images.decode(with_chunk(plain, b"zTXt", LONG_TEXT)).tobytes() == images.decode(plain).tobytes()
    assert images.decode(plain).size == (16, 24)


def test_images_that_another_decoder_refused_are_opened_again() -> None:
    for reason in (
        "it is none of JPEG, PNG",
        "it can't be decoded (Decompressed data too large)",  # the reason that earlier versions recorded
        "it is HEIF, which this Pillow does not read",
    ):
        assert images.may_be_read_now(reason)
    for damaged in (b"junk", encoded("PNG")[:80]):
        with pytest.raises(BadSampleError) as caught:
            images.decode(damaged)
        assert not images.may_be_read_now(caught.value.args[0])
