"""Reading image files of all kinds, and converting them to one size, number of channels and depth."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from pfgm.data import ImageDataModule
from pfgm.files import images
from pfgm.files.images import ImageError, ImageFormat, read_header, read_images, read_pixels

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = RGB[..., 0]
DEEP = np.random.default_rng(1).integers(0, 65536, (6, 5), dtype=np.uint16)
ALPHA = np.concatenate([RGB, np.where(GREY < 100, 0, 255)[..., None].astype(np.uint8)], 2)


def encoded(array, mode=None, suffix="png", **options):
    """An image as a file in memory."""
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(file := io.BytesIO(), {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
    return io.BytesIO(file.getvalue())


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


KINDS = [
    (lambda: encoded(RGB), RGB),
    (lambda: encoded(GREY), GREY[..., None]),
    (lambda: encoded(DEEP), DEEP[..., None]),
    (lambda: encoded(DEEP, suffix="tif"), DEEP[..., None]),
    (lambda: encoded(ALPHA), np.where(ALPHA[..., 3:] == 0, 255, RGB)),
    (lambda: encoded(np.where(GREY < 128, 0, 255).astype(np.uint8), "1"), np.where(GREY < 128, 0, 255)[..., None]),
    (lambda: encoded(ALPHA, "LA"), None),
    (lambda: encoded(GREY // 32 * 32, "P"), None),
    (lambda: encoded(RGB, "CMYK", "jpg", quality=95), None),
    (lambda: encoded(RGB, exif=exif(6)), np.rot90(RGB, -1)),
    (lambda: encoded(RGB, exif=exif(3)), RGB[::-1, ::-1]),
    (lambda: encoded(RGB, exif=exif(5)), RGB.transpose(1, 0, 2)),
    (lambda: encoded(RGB, suffix="tif", exif=exif(8)), np.rot90(RGB)),
    (lambda: encoded(RGB, suffix="tif", tiffinfo={0x0112: 8, 700: b"<x:xmpmeta/>"}), np.rot90(RGB)),
    (lambda: encoded(RGB, suffix="webp", lossless=True, exif=exif(7)), RGB[::-1, ::-1].transpose(1, 0, 2)),
    (lambda: encoded(RGB, suffix="bmp"), RGB),
    (lambda: encoded(RGB, suffix="webp", lossless=True), RGB),
]


@pytest.mark.parametrize(("make", "expected"), KINDS)
def test_every_kind_of_image_is_read_upright_and_its_header_says_so(make, expected):
    array = read_pixels(make())
    if expected is not None:
        assert np.array_equal(array, expected)
    assert array.dtype in (np.uint8, np.uint16)
    height, width, channels = array.shape
    assert read_header(make()) == ImageFormat(height, width, channels, 8 * array.itemsize)


def test_transparent_grey_stays_grey_on_white():
    layer = np.stack([GREY, np.full_like(GREY, 128)], 2)
    array = read_pixels(encoded(layer, "LA"))
    assert array.shape == (6, 5, 1)
    assert np.abs(array[..., 0] - (GREY * (128 / 255) + 255 * (127 / 255))).max() <= 1


def wave(height, width, h, w, top=0.0, left=0.0):
    """A smooth image of `height` x `width` pixels that shows the rectangle (top, left) + (h, w) of the plane."""
    y, x = (np.arange(height) + 0.5) / height * h + top, (np.arange(width) + 0.5) / width * w + left
    return 0.5 + 0.25 * np.cos(5 * y[:, None] + 1) + 0.25 * np.sin(4 * x[None] + 2 * y[:, None])


@pytest.mark.parametrize("bits", [8, 16])
def test_fitted_images_show_the_right_part_at_the_right_size(bits):
    form, top = ImageFormat(16, 24, 1, bits), 2**bits - 1
    for height, width in ((64, 192), (120, 48), (32, 48), (9, 10)):
        image = (top * wave(height, width, height / 64, width / 64)).round().astype(form.dtype)[..., None]
        h, w = min(height, width * 2 / 3), min(width, height * 3 / 2)
        crop = wave(16, 24, h / 64, w / 64, (height - h) / 128, (width - w) / 128)
        inner = (slice(2, -2), slice(2, -2))
        got = images.fit(image, form)[..., 0] / top
        assert np.abs(got - crop)[inner].max() < 0.02, "crop"
        stretched = images.fit(image, form, "stretch")[..., 0] / top
        assert np.abs(stretched - wave(16, 24, height / 64, width / 64))[inner].max() < 0.02, "stretch"
    image = np.arange(20 * 30).reshape(20, 30, 1).astype(form.dtype)
    assert np.array_equal(images.fit(image, form, crop=(16, 24)), image[2:18, 3:27])
    assert np.array_equal(images.fit(image, form, crop=(8, 20)), images.fit(image[6:14, 5:25], form))
    with pytest.raises(ImageError, match="it has 9 x 40 pixels, fewer than 16 x 24"):
        images.fit(np.zeros((9, 40, 1), form.dtype), form, crop=(16, 24))


def test_channels_and_depth_are_converted():
    luma = 0.299 * RGB[..., 0] + 0.587 * RGB[..., 1] + 0.114 * RGB[..., 2]
    assert np.abs(images.fit(RGB, ImageFormat(6, 5, 1, 8))[..., 0] - luma).max() <= 0.5
    assert np.array_equal(images.fit(GREY[..., None], ImageFormat(6, 5, 3, 8)), np.stack([GREY] * 3, 2))
    eight = images.fit(DEEP[..., None], ImageFormat(6, 5, 1, 8))[..., 0]
    assert np.abs(eight / 255 - DEEP / 65535).max() <= 0.5 / 255 + 1e-9
    assert np.array_equal(images.fit(GREY[..., None], ImageFormat(6, 5, 1, 16))[..., 0] / 65535, GREY / 255)
    fine = np.random.default_rng(3).integers(20_000, 40_000, (40, 40)).astype(np.uint16)
    exact = np.asarray(Image.fromarray(fine.astype(np.float32)).resize((16, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(images.fit(fine[..., None], ImageFormat(16, 16, 1, 16))[..., 0], exact.round())
    large = np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    lanczos = Image.fromarray(large).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(images.fit(large, ImageFormat(16, 16, 3, 8)), np.asarray(lanczos))
    edge = np.repeat(np.array([0, 65535], np.uint16), 16)[None].repeat(32, 0)[..., None]
    scaled = images.fit(edge, ImageFormat(24, 24, 1, 16))
    assert scaled[:, :10].max() < 7000, "what Lanczos overshoots is clipped, not wrapped"
    assert scaled[:, 14:].min() > 58000
    assert (scaled.min(), scaled.max()) == (0, 65535)


DAMAGED = [
    (lambda: io.BytesIO(b""), "empty, not an image, or damaged"),
    (lambda: io.BytesIO(b"some text"), "empty, not an image, or damaged"),
    (lambda: io.BytesIO(encoded(RGB).getvalue()[:-40]), "OSError|SyntaxError"),
    (lambda: encoded(np.ones((4, 4), np.float32), suffix="tif"), "no black and white .mode F."),
    (lambda: encoded(np.ones((4, 4), np.int32), suffix="tif"), "no black and white .mode I."),
]


@pytest.mark.parametrize(("make", "message"), DAMAGED)
def test_damaged_images_say_why(make, message):
    with pytest.raises(ImageError, match=message):
        read_pixels(make())


def test_damaged_input_images_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RGB).getvalue()[:-30])
    with pytest.raises(ValueError, match=r"image = .*a.png cannot be used: "):
        read_images(tmp_path / "a.png", (3, 6, 5), "image")
    Image.fromarray(DEEP).save(tmp_path / "b.png")
    assert np.allclose(read_images(tmp_path / "b.png", (3, 6, 5))[0, 1].numpy(), DEEP / 65535, atol=1e-6)


def write_images(folder, kinds):
    """Random images of three sizes."""
    folder.mkdir()
    random = np.random.default_rng(4)
    for k, (kind, size) in enumerate(zip(kinds, ((12, 16), (20, 14), (5, 7)), strict=True)):
        shape = size if kind in ("L", "I;16") else (*size, len(kind))
        depth = np.uint16 if kind == "I;16" else np.uint8
        Image.fromarray(random.integers(0, np.iinfo(depth).max + 1, shape, dtype=depth)).save(folder / f"{k}.png")
    return folder


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10), (3, 12, 16)])
@pytest.mark.parametrize(
    ("kinds", "bits"),
    [(("RGB", "L", "RGBA"), 8), (("I;16", "I;16", "I;16"), 16), (("I;16", "L", "I;16"), 8), (("I;16", "RGB", "RGBA"), 8)],
    ids=str,
)
def test_input_images_of_any_size_become_what_training_makes_of_them(kinds, bits, shape, tmp_path, capsys):
    folder = write_images(tmp_path / "images", kinds)
    data = ImageDataModule(folder, size=shape[1:], channels=shape[0], held_out=str(folder))
    assert data.summary.levels == 2**bits
    capsys.readouterr()
    expected = data.train.x[:].float() / (2**bits - 1)
    assert torch.equal(read_images(folder, shape, "images"), expected)
    other = 2 if shape[1:] == (12, 16) else 3
    note = f"images = {folder}: {other} of 3 images scaled and cropped to {shape[2]} x {shape[1]} pixels, as in training\n"
    assert capsys.readouterr() == ("", note)
    alone = read_images(folder / "1.png", shape)
    assert torch.equal(alone, expected[1:2]), "of 8 bits in each mixed set"


def test_images_of_the_right_size_are_read_without_a_note(tmp_path, capsys):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert np.array_equal(255 * read_images(tmp_path / "a.png", (3, 6, 5))[0].permute(1, 2, 0), RGB)
    assert capsys.readouterr() == ("", "")


def test_images_of_another_size_are_refused_where_their_pixels_count(tmp_path):
    for k, side in enumerate((6, 8)):
        Image.fromarray(RGB[:, :, 0]).resize((5, side)).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match=r"^inpaint = .*1\.png has 5 x 8 pixels\. Resize it to 5 x 6\.$"):
        read_images(tmp_path, (1, 6, 5), "inpaint", any_size=False)
    (tmp_path / "1.png").unlink()
    assert len(read_images(tmp_path, (1, 6, 5), any_size=False)) == 1


def test_a_folder_gives_its_visible_images_in_the_order_of_their_names(tmp_path):
    for name, value in {"b.png": 2, "a.PNG": 1, "c.bmp": 3}.items():
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / name)
    (tmp_path / "._a.png").write_text("left by a system")
    (tmp_path / "notes.txt").write_text("not an image")
    os.mkfifo(tmp_path / "d.png")
    (tmp_path / "e.png").mkdir()
    assert (255 * read_images(tmp_path, (1, 4, 4))[:, 0, 0, 0]).tolist() == [1, 2, 3]
    for path in (tmp_path / "d.png", tmp_path / "e.png", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=r"path = .*: no images \(\.png, .*\)\. Pass an image, a folder"):
            read_images(path, (1, 4, 4))
    with pytest.raises(FileNotFoundError, match=r"path = .*f\.png does not exist\. Pass an image"):
        read_images(tmp_path / "f.png", (1, 4, 4))


@pytest.mark.parametrize("shape", [(2,), (2, 8, 8), (8, 8)])
def test_samples_that_are_not_images_are_not_read_from_images(shape, tmp_path):
    with pytest.raises(ValueError, match=r"are not images\. Pass a \.npy, \.npz or \.pt file"):
        read_images(tmp_path, shape)
