"""Images as texts: what a prompt of an image classifier is.

An image is a data URI (RFC 2397) of a PNG or JPEG file: its name, with its pixels behind it. So edits, runs and
questions hold their images themselves, and nothing that comes with a file names another file. A data set puts the
pixels into the prompt's frame, which leaves the name for tables and results.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edit_cli.requests import Frame

BEFORE, AFTER = "data:image/{};name=", ";base64,"
URI = re.compile(r"data:image/(?:png|jpeg)(?:;name=[^;,]*)?;base64,([A-Za-z0-9+/=]+)\s*")
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}  # how files begin
MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
LARGEST = 64 << 20  # pixels, beyond which a small file that unpacks to a huge image is refused

Pixels = NDArray[np.uint8]
"""(height, width, channels): one of gray, or red, green and blue."""


def packed(pixels: Pixels) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    as_image(pixels).save(file, "PNG")
    return file.getvalue()


def as_image(pixels: Pixels) -> Any:
    """One of Pillow's."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def unpacked(file: bytes, channels: int = 3) -> Pixels:
    """The pixels of a PNG or JPEG file, in so many channels.

    Raises:
        ValueError: it is none, a damaged one, or too large; says so as the end of a sentence.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > LARGEST:
                raise ValueError(f"has more than {LARGEST:,} pixels")
            found = np.asarray(image.convert(MODES[channels]))
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("is no PNG or JPEG file, or a damaged one") from None
    return found.reshape(*found.shape[:2], -1)


def framed(file: bytes) -> Frame:
    """The frame that makes an image's name the whole image, from a PNG or JPEG file. See `name_of`."""
    kind = next((kind for start, kind in KINDS.items() if file.startswith(start)), "png")
    return Frame(BEFORE.format(kind), AFTER + base64.b64encode(file).decode())


def name_of(text: str) -> str:
    """A name that can stand in such a frame."""
    return re.sub(r"[^\w./-]", "_", text)


def pixels_of(prompt: str, channels: int) -> Pixels:
    """The pixels of a whole image, as a prompt. Raises ValueError as `unpacked`."""
    found = URI.fullmatch(prompt)
    if found is None:
        raise ValueError("is no image")
    try:
        return unpacked(base64.b64decode(found[1], validate=True), channels)
    except binascii.Error:
        raise ValueError("is no whole image") from None
