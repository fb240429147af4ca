"""Images as arrays: reading a file of any kind, and fitting it to one size, number of channels and depth.

An array here is [height, width, 1 or 3], of 8 bits (uint8) or 16 bits (uint16). Training and the commands that take images as
input read them by the same functions, so that a model sees both alike.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pfgm.files.untrusted import first_line, is_regular_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # decoded whatever a file is called; for others Pillow runs Ghostscript
MAX_VALUES = 150_000_000  # of an image, such as 50 million RGB pixels: a few hundred megabytes of memory while it is read
TILE_WIDTH, TILE_HEIGHT = 322, 323  # TIFF tags
BAND = 512  # rows that are converted at a time
GREY_MODES = ("1", "L", "LA", "La")

Resize = Literal["crop", "stretch"]


class ImageError(ValueError):
    """An image cannot be used. The message gives the reason and leaves the image's name to the caller."""


@dataclass(frozen=True)
class ImageFormat:
    """Size in pixels, number of channels (1 or 3) and bits per channel (8 or 16) of an image, or of all in a data set."""

    height: int
    width: int
    channels: int
    bits: int

    @property
    def dtype(self) -> Any:
        """The dtype of arrays of this depth."""
        return np.uint8 if self.bits == 8 else np.uint16


def read_header(file: Path | BinaryIO) -> ImageFormat:
    """Read the format of an image file without decoding its pixels.

    Raises:
        ImageError: If the file is not an image, or one that `read_pixels` refuses.
    """
    with _opened(file) as image:
        _check_size(image)
        width, height = image.size
        if _orientation(image) in (5, 6, 7, 8):  # a camera on its side
            width, height = height, width
        deep = _is_deep(image)
        return ImageFormat(height, width, 1 if deep or image.mode in GREY_MODES else 3, 16 if deep else 8)


def read_pixels(file: Path | BinaryIO) -> np.ndarray:
    """Read the pixels of an image file, upright. Transparent parts become white.

    Raises:
        ImageError: If the file is damaged, not an image, too large, or has pixels without a defined black and white.
    """
    with _opened(file) as image:
        return pixels(image)


def pixels(image: Image.Image) -> np.ndarray:
    """Convert an opened Pillow image to an array, as `read_pixels` does."""
    deep, grey = _is_deep(image), image.mode in GREY_MODES
    _check_size(image)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)

    def band(first: int, last: int) -> np.ndarray:
        part = image if (first, last) == (0, image.height) else image.crop((0, first, image.width, last))
        return np.asarray(part).astype(np.uint16)[..., None] if deep else _bytes(part, grey)

    return _in_bands(band, image.height)


def fit(array: np.ndarray, format: ImageFormat, resize: Resize = "crop", crop: Sequence[int] | None = None) -> np.ndarray:
    """Convert an image to another format.

    RGB becomes grey by ITU-R 601 luma, 16 bits become 8 by rounding. Scaling uses Pillow's antialiased Lanczos filter.

    Args:
        array: [height, width, 1 or 3] of 8 or 16 bits.
        format: The format to convert to.
        resize: "crop" scales the image until it just covers the size and keeps the middle; "stretch" scales both sides.
        crop: (height, width) in pixels of the middle part to use instead of the whole image.

    Returns:
        The image [format.height, format.width, format.channels] in `format.dtype`.

    Raises:
        ImageError: If the image is smaller than `crop`.
    """
    array = array if crop is None else _middle(array, *crop)
    array = _luma(array) if array.shape[2] > format.channels else array
    array = _depth(array, format)
    height, width = array.shape[:2]
    if (height, width) != (format.height, format.width):
        h, w = float(height), float(width)
        if resize == "crop":
            h, w = min(h, w * format.height / format.width), min(w, h * format.width / format.height)
        left, top = (width - w) / 2, (height - h) / 2
        array = _scale(array, format, (left, top, left + w, top + h))
    return array.repeat(format.channels // array.shape[2], axis=2) if array.shape[2] < format.channels else array


def read_images(path: Path, shape: Sequence[int], name: str = "path", *, any_size: bool = True) -> Tensor:
    """Read an image, or all images of a folder, fitted as in training with the default options of the data module.

    Images of another size are scaled until they cover the model's and cropped to the middle, which one line on stderr says.
    They keep 16 bits if all of them have 16.

    Args:
        path: An image file, or a folder whose images are read in the order of their names. Hidden files and sub-folders are
            ignored.
        shape: (1 or 3, height, width) of the result.
        name: What `path` is called in messages.
        any_size: Whether to fit images of another size. Otherwise they are refused.

    Returns:
        The images [n, *shape] in float32, from 0 (black) to 1 (white).

    Raises:
        ValueError: If `shape` is not that of an image, there are no images, or one cannot be used.
        FileNotFoundError: If `path` does not exist.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{name} = {path}: samples of shape {tuple(shape)} are not images. Pass a .npy, .npz or .pt file.")
    if not path.exists():
        raise FileNotFoundError(
            f"{name} = {path} does not exist. Pass an image, a folder of images, or a .npy, .npz or .pt file."
        )
    files = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if _is_image(file)]
    if not files:
        raise ValueError(
            f"{name} = {path}: no images ({', '.join(SUFFIXES)}). Pass an image, a folder of images, or an array file "
            "(.npy, .npz, .pt)."
        )
    channels, height, width = shape
    found = [_named(read_header, file, name) for file in files]
    other = {file: one for file, one in zip(files, found, strict=True) if (one.height, one.width) != (height, width)}
    if other and not any_size:
        file, one = next(iter(other.items()))
        raise ValueError(f"{name} = {file} has {one.width} x {one.height} pixels. Resize it to {width} x {height}.")
    format = ImageFormat(height, width, channels, min(one.bits for one in found))
    arrays = [fit(_named(read_pixels, file, name), format) for file in files]
    if other:
        note = f"{len(other)} of {len(files)} images scaled and cropped to {width} x {height} pixels, as in training"
        print(f"{name} = {path}: {note}", file=sys.stderr)
    return torch.from_numpy(np.stack(arrays).astype(np.float32)).permute(0, 3, 1, 2) / (2**format.bits - 1)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and is_regular_file(file)


def _named(read: Callable[[Path], Any], file: Path, name: str) -> Any:
    try:
        return read(file)
    except ImageError as error:
        raise ValueError(f"{name} = {file} cannot be used: {error}") from error


@contextmanager
def _opened(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """Open an image and turn all that its decoder raises into ImageError."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError("empty, not an image, or damaged at its start") from error
    except Exception as error:  # decoders raise errors of any kind for damaged files
        raise ImageError(f"{type(error).__name__}: {first_line(error)}") from error


def _check_size(image: Image.Image) -> None:
    """Raise ImageError if decoding the image would take too much memory."""
    values = 4 if image.has_transparency_data else 1 if image.mode in ("1", "L") else 3  # per pixel, while it is converted
    if image.width * image.height * values > MAX_VALUES:
        raise ImageError(
            f"{image.width} x {image.height} pixels are too many, {MAX_VALUES / 1e6 / values:.3g} million such pixels are the "
            "limit. Make the image smaller, or cut it into tiles."
        )
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose decoder allocates a whole tile
    if math.prod(int(tags.get(side, 1)) for side in (TILE_WIDTH, TILE_HEIGHT)) * values > MAX_VALUES:
        raise ImageError("its tiles are larger than an image may be. Save it without tiles.")


def _is_deep(image: Image.Image) -> bool:
    """Return whether the image has 16 bits of grey. Raise ImageError for 32-bit integers and floating point."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ImageError(f"its pixels have no black and white (mode {image.mode}). Save them as .npy.")
    return image.mode.startswith("I")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF or XMP orientation before decoding. Pillow gives the size of a TIFF upright already."""
    sources = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} & set(image.info)
    return int(image.getexif().get(0x0112, 1)) if sources and image.format != "TIFF" else 1


def _bytes(image: Image.Image, grey: bool) -> np.ndarray:
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    array = np.asarray(image.convert("L" if grey else "RGB"))
    return array[..., None] if grey else array


def _in_bands(band: Callable[[int, int], np.ndarray], height: int) -> np.ndarray:
    """Join the rows `band(first, last)`, computed a few at a time, since computing takes more memory than the result."""
    array = None
    for first in range(0, height, BAND):
        rows = band(first, min(first + BAND, height))
        if len(rows) == height:
            return rows
        array = np.empty((height, *rows.shape[1:]), rows.dtype) if array is None else array
        array[first : first + BAND] = rows
    assert array is not None
    return array


def _middle(array: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = array.shape[:2]
    if rows < height or columns < width:
        raise ImageError(f"it has {rows} x {columns} pixels, fewer than {height} x {width}")
    top, left = (rows - height) // 2, (columns - width) // 2
    return array[top : top + height, left : left + width]


def _scale(array: np.ndarray, format: ImageFormat, box: tuple[float, float, float, float]) -> np.ndarray:
    """Scale the box (left, top, right, bottom). 16 bits go through floating point, which Pillow does not round."""

    def scale(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(plane).resize((format.width, format.height), Image.Resampling.LANCZOS, box=box)
        return np.asarray(image).reshape(format.height, format.width, -1)

    if format.bits == 8:
        return scale(array[..., 0] if array.shape[2] == 1 else np.ascontiguousarray(array))
    planes = [scale(array[..., c].astype(np.float32)) for c in range(array.shape[2])]
    return np.concatenate(planes, axis=2).round().clip(0, 65535).astype(np.uint16)


def _luma(array: np.ndarray) -> np.ndarray:
    weights = np.array([0.299, 0.587, 0.114])
    return _in_bands(lambda first, last: (array[first:last] @ weights).round().astype(array.dtype)[..., None], len(array))


def _depth(array: np.ndarray, format: ImageFormat) -> np.ndarray:
    if array.dtype == format.dtype:
        return array
    if format.bits == 16:
        return array.astype(np.uint16) * np.uint16(257)
    return _in_bands(lambda first, last: (array[first:last] / 257).round().astype(np.uint8), len(array))
