"""Images as arrays: reading a file of any kind, and fitting all to one size, number of channels and depth.

An array here is [height, width, 1 or 3], of 8 bits (uint8) or 16 (uint16).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps

from pfgm.files.untrusted import first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
"""What is decoded, whatever a file is called: Pillow would run Ghostscript for others."""
MAX_VALUES = 150_000_000
"""Of an image, such as 50 million pixels of RGB: a few hundred megabytes of memory while it is read."""

TILE_WIDTH, TILE_HEIGHT = 322, 323
"""Tags of TIFF."""
BAND = 512
"""Rows that are converted at a time."""

Resize = Literal["crop", "stretch"]


class ImageError(ValueError):
    """An image that cannot be used; says why, without naming it."""


@dataclass(frozen=True)
class ImageFormat:
    """What the pixels of an image are: its size and depth, or that of all images of a data set."""

    height: int
    width: int
    channels: int
    bits: int

    @property
    def dtype(self) -> Any:
        """Of arrays of this depth."""
        return np.uint8 if self.bits == 8 else np.uint16


def read_header(file: Path | BinaryIO) -> ImageFormat:
    """The form of an image file, without its pixels. ImageError if it is none."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image)
            width, height = image.size
            turned = _orientation(image) in (5, 6, 7, 8)  # a camera on its side
            grey = image.mode in ("1", "L", "LA", "La") or _is_deep(image)
            form = ImageFormat(height, width, 1 if grey else 3, 16 if _is_deep(image) else 8)
    except ImageError:
        raise
    except Exception as error:  # whatever the decoders make of a damaged file
        raise _unreadable(error) from error
    return ImageFormat(width, height, form.channels, form.bits) if turned else form


def read_pixels(file: Path | BinaryIO) -> np.ndarray:
    """The pixels of an image file, upright; what is transparent shows white. ImageError if it is damaged."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return pixels(image)
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable(error) from error


def pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an opened image. ImageError for those that have no black and white, or are too large."""
    deep, grey = _is_deep(image), image.mode in ("1", "L", "LA", "La")
    _check_size(image)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)

    def band(first: int, last: int) -> np.ndarray:
        part = image if (first, last) == (0, image.height) else image.crop((0, first, image.width, last))
        return np.asarray(part).astype(np.uint16)[..., None] if deep else _bytes(part, grey)

    return _in_bands(band, image.height)


def _bytes(image: Image.Image, grey: bool) -> np.ndarray:
    """8 bits, on white."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    array = np.asarray(image.convert("L" if grey else "RGB"))
    return array[..., None] if grey else array


def _in_bands(band: Callable[[int, int], np.ndarray], height: int) -> np.ndarray:
    """The rows `band(first, last)` of an array of that height, a few at a time: making them takes more memory than they do."""
    array = None
    for first in range(0, height, BAND):
        rows = band(first, min(first + BAND, height))
        if len(rows) == height:
            return rows
        array = np.empty((height, *rows.shape[1:]), rows.dtype) if array is None else array
        array[first : first + BAND] = rows
    assert array is not None
    return array


def _check_size(image: Image.Image) -> None:
    """ImageError for one that would take too much memory."""
    values = 4 if image.has_transparency_data else 1 if image.mode in ("1", "L") else 3  # of a pixel, while it is converted
    if image.width * image.height * values > MAX_VALUES:
        raise ImageError(
            f"{image.width} x {image.height} pixels are too many: {MAX_VALUES / 1e6:.0f} million values at most, so "
            f"{MAX_VALUES / 1e6 / values:.3g} million such pixels; make it smaller, or cut it into tiles"
        )
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose decoder makes room for a whole tile
    if math.prod(int(tags.get(side, 1)) for side in (TILE_WIDTH, TILE_HEIGHT)) * values > MAX_VALUES:
        raise ImageError("its tiles are larger than an image may be; save it without tiles")


def _orientation(image: Image.Image) -> int:
    """As EXIF or XMP say it, before the pixels are read; Pillow gives the size of a TIFF upright already."""
    told = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} & set(image.info)
    return int(image.getexif().get(0x0112, 1)) if told and image.format != "TIFF" else 1


def _is_deep(image: Image.Image) -> bool:
    """Whether it has 16 bits of grey. ImageError for integers of 32 bits and floating point."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ImageError(f"its pixels have no black and white (mode {image.mode}); give them as .npy")
    return image.mode.startswith("I")


def _unreadable(error: Exception) -> ImageError:
    unknown = isinstance(error, Image.UnidentifiedImageError)
    return ImageError("empty, no image, or damaged at its start" if unknown else f"{type(error).__name__}: {first_line(error)}")


def fit(array: np.ndarray, form: ImageFormat, resize: Resize = "crop", crop: Sequence[int] | None = None) -> np.ndarray:
    """`array`, or its middle `crop` (height, width), in another form. Grey is ITU-R 601 luma; 16 bits become 8 by rounding.

    "crop" scales an image so that it just covers the size, and cuts out the middle; "stretch" scales both sides. Scaling is
    Lanczos' with antialiasing. ImageError for an image smaller than `crop`.
    """
    array = array if crop is None else _middle(array, *crop)
    array = _luma(array) if array.shape[2] > form.channels else array
    array = _depth(array, form)
    height, width = array.shape[:2]
    if (height, width) != (form.height, form.width):
        h, w = float(height), float(width)
        if resize == "crop":
            h, w = min(h, w * form.height / form.width), min(w, h * form.width / form.height)
        left, top = (width - w) / 2, (height - h) / 2
        array = _scaled(array, form, (left, top, left + w, top + h))
    return array.repeat(form.channels // array.shape[2], axis=2) if array.shape[2] < form.channels else array


def _middle(array: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = array.shape[:2]
    if rows < height or columns < width:
        raise ImageError(f"it has {rows} x {columns} pixels, fewer than {height} x {width}")
    top, left = (rows - height) // 2, (columns - width) // 2
    return array[top : top + height, left : left + width]


def _scaled(array: np.ndarray, form: ImageFormat, box: tuple[float, float, float, float]) -> np.ndarray:
    """Of the box (left, top, right, bottom). 16 bits go through floating point, which Pillow does not round."""

    def scale(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(plane).resize((form.width, form.height), Image.Resampling.LANCZOS, box=box)
        return np.asarray(image).reshape(form.height, form.width, -1)

    if form.bits == 8:
        return scale(array[..., 0] if array.shape[2] == 1 else np.ascontiguousarray(array))
    planes = [scale(array[..., c].astype(np.float32)) for c in range(array.shape[2])]
    return np.concatenate(planes, axis=2).round().clip(0, 65535).astype(np.uint16)


def _luma(array: np.ndarray) -> np.ndarray:
    weights = np.array([0.299, 0.587, 0.114])
    return _in_bands(lambda first, last: (array[first:last] @ weights).round().astype(array.dtype)[..., None], len(array))


def _depth(array: np.ndarray, form: ImageFormat) -> np.ndarray:
    if array.dtype == form.dtype:
        return array
    if form.bits == 16:
        return array.astype(np.uint16) * np.uint16(257)
    return _in_bands(lambda first, last: (array[first:last] / 257).round().astype(np.uint8), len(array))
