"""Removes from encoded images what isn't needed for their pixels: texts, profiles, EXIF."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")
_JFIF, _EXIF, _ADOBE, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE  # the last but one says how colours are stored
_START_OF_SCAN = 0xDA
_WEBP_METADATA = (b"ICCP", b"EXIF", b"XMP ")


def without_metadata(data: bytes, exif: bool) -> bytes:
    """A PNG, JPEG or WebP without metadata, its EXIF kept where `exif` is set; other data as it is."""
    if data.startswith(_PNG):
        kept = (*_PNG_PIXELS, b"eXIf") if exif else _PNG_PIXELS
        return _PNG + b"".join(chunk for name, chunk in _png_chunks(data) if name in kept)
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd8" + b"".join(
            segment
            for marker, segment in _jpeg_segments(data)
            if not _is_metadata(marker) or (exif and marker == _EXIF and segment[4:8] == b"Exif")
        )
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        dropped = [name for name in _WEBP_METADATA if name != b"EXIF" or not exif]
        body = b"WEBP" + b"".join(chunk for name, chunk in _riff_chunks(data) if name not in dropped)
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return data


def _is_metadata(marker: int) -> bool:
    return marker == _COMMENT or (0xE0 <= marker <= 0xEF and marker not in (_JFIF, _ADOBE))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes of each chunk; what follows a damaged length is one chunk."""
    start = len(_PNG)
    while start + 8 <= len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        end = start + length + 12
        yield data[start + 4 : start + 8], data[start:end]
        start = end


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and bytes of each segment; from the first scan on, all the rest is one."""
    start = 2
    while start + 4 <= len(data):
        marker = data[start + 1]
        if data[start] != 0xFF or marker == _START_OF_SCAN:
            break
        if marker == 0xFF:  # a fill byte
            start += 1
            continue
        (length,) = struct.unpack(">H", data[start + 2 : start + 4])
        yield marker, data[start : start + 2 + length]
        start += 2 + length
    yield _START_OF_SCAN, data[start:]


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = 12
    while start + 8 <= len(data):
        (length,) = struct.unpack("<I", data[start + 4 : start + 8])
        end = start + 8 + length + length % 2
        yield data[start : start + 4], data[start:end]
        start = end
