"""Images as arrays: reading a file of any kind, and fitting all to one size, number of channels and depth.

An array here is [height, width, 1 or 3], of 8 bits (uint8) or 16 (uint16).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")

Resize = Literal["crop", "stretch"]


class ImageError(ValueError):
    """An image that cannot be used; says why, without naming it."""


@dataclass(frozen=True)
class Form:
    """What the pixels of an image are: its size and depth, or that of all images of a data set."""

    height: int
    width: int
    channels: int
    bits: int

    @property
    def dtype(self) -> Any:
        """Of arrays of this depth."""
        return np.uint8 if self.bits == 8 else np.uint16


def read_header(file: Path | BinaryIO) -> Form:
    """The form of an image file, without its pixels. ImageError if it is none."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = _orientation(image) in (5, 6, 7, 8)  # a camera on its side
            grey = image.mode in ("1", "L", "LA", "La") or _is_deep(image)
            form = Form(height, width, 1 if grey else 3, 16 if _is_deep(image) else 8)
    except ImageError:
        raise
    except Exception as error:  # whatever the decoders make of a damaged file
        raise _unreadable(error) from error
    return Form(width, height, form.channels, form.bits) if turned else form


def read_pixels(file: Path | BinaryIO) -> np.ndarray:
    """The pixels of an image file, upright; what is transparent shows white. ImageError if it is damaged."""
    try:
        with Image.open(file) as image:
            return pixels(image)
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable(error) from error


def pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an opened image. ImageError for those that have no black and white."""
    deep = _is_deep(image)
    image.load()
    upright = ImageOps.exif_transpose(image)
    if deep:
        return np.asarray(upright).astype(np.uint16)[..., None]
    grey = upright.mode in ("1", "L", "LA", "La")
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    array = np.asarray(upright.convert("L" if grey else "RGB"))
    return array[..., None] if grey else array


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


def first_line(error: Exception) -> str:
    """Of what it says."""
    return str(error).partition("\n")[0]


def fit(array: np.ndarray, form: Form, resize: Resize = "crop", crop: Sequence[int] | None = None) -> np.ndarray:
    """`array`, or its middle `crop` (height, width), in another form. Grey is ITU-R 601 luma; 16 bits become 8 by rounding.

    "crop" scales an image so that it just covers the size, and cuts out the middle; "stretch" scales both sides. Scaling is
    Lanczos' with antialiasing. ImageError for an image smaller than `crop`.
    """
    array = _depth(_channels(array if crop is None else _middle(array, *crop), form.channels), form)
    height, width = array.shape[:2]
    if (height, width) == (form.height, form.width):
        return array
    h, w = float(height), float(width)
    if resize == "crop":
        h, w = min(h, w * form.height / form.width), min(w, h * form.width / form.height)
    left, top = (width - w) / 2, (height - h) / 2
    box = (left, top, left + w, top + h)
    if form.bits == 8:
        return _scaled(array, form, box)
    planes = [_scaled(array[..., c].astype(np.float32), form, box) for c in range(form.channels)]
    return np.concatenate(planes, axis=2).round().clip(0, 65535).astype(np.uint16)


def _middle(array: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = array.shape[:2]
    if rows < height or columns < width:
        raise ImageError(f"it has {rows} x {columns} pixels, fewer than {height} x {width}")
    top, left = (rows - height) // 2, (columns - width) // 2
    return array[top : top + height, left : left + width]


def _scaled(array: np.ndarray, form: Form, box: tuple[float, float, float, float]) -> np.ndarray:
    """Bytes [H, W, 1 or 3] or one channel in floating point, [H, W], which Pillow does not round."""
    image = Image.fromarray(array[..., 0] if array.shape[-1:] == (1,) else np.ascontiguousarray(array))
    scaled = np.asarray(image.resize((form.width, form.height), Image.Resampling.LANCZOS, box=box))
    return scaled.reshape(form.height, form.width, -1)


def _channels(array: np.ndarray, channels: int) -> np.ndarray:
    if array.shape[2] == channels:
        return array
    if channels == 3:
        return array.repeat(3, axis=2)
    luma = array @ np.array([0.299, 0.587, 0.114])
    return luma.round().astype(array.dtype)[..., None]


def _depth(array: np.ndarray, form: Form) -> np.ndarray:
    if array.dtype == form.dtype:
        return array
    return (array / 257).round().astype(np.uint8) if form.bits == 8 else array.astype(np.uint16) * np.uint16(257)
