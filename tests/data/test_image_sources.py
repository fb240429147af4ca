"""Images of all kinds: what is read, the form they get, their labels, batches of them."""

import io
import json
import pickle
import re
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

import pfgm
from pfgm.cli import train
from pfgm.core.configurable import build
from pfgm.data import ImageDataModule, image_sources, labels
from pfgm.data.batches import Preparation, TrainingStream
from pfgm.data.image_dataset import ImageSet
from pfgm.files import images
from pfgm.files.arrays import read_images
from pfgm.files.images import ImageError, ImageFormat, read_header, read_pixels
from pfgm.nn import UNet
from pfgm.theory.data_summary import DataSummary
from pfgm.training.module import PFGM
from tests.helpers import ROOT, SMALL, fit, last, pack, write_set

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


def contents(data):
    """(brightness, label) of each image of a data module, sorted."""
    parts = [data.train, data.held_out]
    x = torch.cat([part.x[:] for part in parts]).flatten(1)
    assert bool((x == x[:, :1]).all())
    label = torch.cat([part.label for part in parts]) if data.num_classes else torch.full((len(x),), -1)
    return sorted(zip(x[:, 0].tolist(), label.tolist(), strict=True))


def test_folders_and_zips_are_read_with_their_labels(tmp_path, caplog):
    folder = write_set(tmp_path / "images")
    expected = [(10 * i, i % 2) for i in range(24)]
    with caplog.at_level("INFO"):
        data = ImageDataModule(str(folder), size=8, labels=True, held_out=0.25)
    assert "2 classes: cat, dog" in caplog.text
    assert "18 8-bit RGB, 6 8-bit grey, 10 x 10 to 20 x 14, 3 other files ignored. As 3 x 8 x 8: 18 for training" in caplog.text
    assert "in memory" in caplog.text
    assert (data.shape, data.num_classes, len(data.train), len(data.held_out)) == ((3, 8, 8), 2, 18, 6)
    assert contents(data) == expected
    assert data.train.x.dtype == torch.uint8
    assert (data.summary.scale, data.summary.value_range, data.summary.levels) == (127.5, (0.0, 255.0), 256)
    assert data.held_out.label.bincount().tolist() == [3, 3], "each class in proportion"
    archive = str(pack(folder, tmp_path / "images.zip"))
    assert contents(ImageDataModule(archive, size=8, labels=True)) == expected
    with caplog.at_level("INFO"):
        assert contents(ImageDataModule(archive, size=(12, 7), memory=0)) == [(value, -1) for value, _ in expected]
    assert "As 3 x 12 x 7 (8 smaller ones are enlarged)" in caplog.text
    assert "more than data.memory: read from the disk each time" in caplog.text
    names = image_sources.open_source(archive).names
    table = [[name, 5 - i // 5] for i, name in enumerate(names)]
    edm = ImageDataModule(str(pack(folder, tmp_path / "edm.zip", table)), size=8, labels=True)
    brightness = [10 * int(name[-6:-4]) for name in names]
    assert contents(edm) == sorted(zip(brightness, (label for _, label in table), strict=True))
    assert edm.num_classes == 6
    assert image_sources.open_source(str(folder)).ignored == 3
    (folder / "dataset.json").write_text(json.dumps({"labels": table}))
    assert contents(ImageDataModule(str(folder), size=8, labels=True)) == contents(edm)
    grey = ImageDataModule(str(folder), size=8, channels=1)
    assert contents(grey) == [(value, -1) for value, _ in expected]


def test_one_set_is_split_in_one_way_however_it_is_packed_and_labelled(tmp_path):
    folder = write_set(tmp_path / "images")
    (folder / "dog").rename(folder / "cat-2")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "cat-2"):
        (linked / name).symlink_to(folder / name, target_is_directory=True)
    archive = pack(folder, tmp_path / "IMAGES.ZIP")
    within = tmp_path / "within.zip"
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile(within, "w") as file:
        for name in before.namelist():
            if not name.startswith("loop"):
                file.writestr(f"top/{name}", before.read(name))
    kinds = [{"path": folder}, {"path": tmp_path / "link"}, {"path": linked}, {"path": within}, {"path": folder, "memory": 0.0}]
    data = [ImageDataModule(**kind, size=8, labels=labels) for kind in kinds for labels in (False, True)]
    held_out = [one.held_out.x[:][:, 0, 0, 0].tolist() for one in data]
    assert all(values == held_out[0] for values in held_out)
    assert len({tuple(one.train.label.tolist()) for one in data[1::2]}) == 1
    assert contents(data[1]) == [(10 * i, i % 2) for i in range(24)]
    assert data[0].held_out.x[0, 0, 0, 0] not in data[0].train.x[:, 0, 0, 0]


def test_held_out_images_may_come_from_another_place(tmp_path):
    write_set(tmp_path / "images")
    for i in range(6):
        place = tmp_path / "other" / ("dog", "cat")[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30, 30), 5 + i, np.uint8)).save(place)
    for memory in (None, 0.0):
        data = ImageDataModule(tmp_path / "images", size=8, labels=True, held_out=str(tmp_path / "other"), memory=memory)
        seen = dict(zip(data.held_out.x[:][:, 0, 0, 0].tolist(), data.held_out.label.tolist(), strict=True))
        assert seen == {5 + i: (i + 1) % 2 for i in range(6)}, "the classes have the numbers of the training images"
        assert sorted(data.train.x[:][:, 0, 0, 0].tolist()) == [10 * i for i in range(24)]
    (tmp_path / "other" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^held_out = .*other: 1 of 6 images cannot be used: cat/1.png"):
        ImageDataModule(tmp_path / "images", size=8, held_out=str(tmp_path / "other"))


def test_one_form_for_all(tmp_path, monkeypatch):
    """Fewer bits if one has fewer, colour if one has it; the same by one thread and by several."""
    for i in range(9):
        array = np.full((8 + i, 8 + i), 257 * i, np.uint16) if i else np.full((8, 8), 7, np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.PNG" if i else tmp_path / "0.png")
    data = ImageDataModule(tmp_path, size=8)
    assert (data.shape, data.train.x.dtype) == ((1, 8, 8), torch.uint8)
    assert sorted(v for v, _ in contents(data)) == [1, 2, 3, 4, 5, 6, 7, 7, 8]
    assert ImageDataModule(tmp_path, size=8, channels=3).shape == (3, 8, 8)
    assert ImageDataModule(tmp_path, crop=8, size=4).shape == (1, 4, 4)
    assert ImageDataModule(tmp_path, crop=(8, 6)).shape == (1, 8, 6)
    both = 9 * 64 / 1e9
    kept = [ImageDataModule(tmp_path, size=8, memory=memory).train.x for memory in (both, both * 8.5 / 9)]
    assert [isinstance(x, torch.Tensor) for x in kept] == [True, False], "training and held-out images"
    monkeypatch.setattr("pfgm.data.image_dataset.CHUNK", 2)
    assert torch.equal(kept[1].load(threads=3)[0], kept[0])
    (tmp_path / "0.png").unlink()
    deep = ImageDataModule(tmp_path, size=8)
    assert (deep.train.x.dtype, deep.summary.levels, deep.summary.scale) == (torch.int32, 65536, 32767.5)
    assert sorted(v for v, _ in contents(deep)) == [257 * i for i in range(1, 9)]


def test_the_summary_does_not_depend_on_memory(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "images")
    whole = ImageDataModule(folder, size=8)
    monkeypatch.setattr("pfgm.data.datamodule.SUMMARY_BYTES", 10 * 3 * 64)
    in_memory, read = (ImageDataModule(folder, size=8, memory=memory) for memory in (None, 0.0))
    assert in_memory.summary.norm == read.summary.norm != whole.summary.norm
    assert torch.equal(in_memory.summary.mean, read.summary.mean)


def test_numbered_labels():
    assert labels.numbered([3, 1, 1])[0].tolist() == [3, 1, 1]
    assert labels.numbered(["10.0", "2.0"])[0].tolist() == [10, 2]
    assert labels.numbered(["2000", "1999", "2001"])[0].tolist() == [1, 0, 2], "years are names"
    assert labels.numbered(["10", "9", "-1"])[0].tolist() == [2, 1, 0]
    assert labels.numbered(["1", "01"])[0].tolist() == [1, 0]
    assert labels.numbered([2**70, 5])[0].tolist() == [1, 0]
    assert labels.numbered([13, 0])[0].tolist() == [13, 0]
    assert labels.numbered(["v1.0", "v1", "v1.0"])[0].tolist() == [1, 0, 1], "names stay as they are"
    assert labels.numbered([14, 0])[0].tolist() == [1, 0]


def test_tables_of_labels_within_folders_and_their_faults(tmp_path):
    names = ["top/a/0.png", "top/b/1.png"]
    text = json.dumps({"labels": [["a/0.png", 4], ["b/1.png", 2]]}).encode()
    found = labels.table_or_folders(
        [*names, "top/dataset.json", "top/a/dataset.json"], names, {"top/dataset.json": text}.get, "x"
    )
    assert found == [4, 2]
    assert labels.folder_labels(names) == ["a", "b"]
    assert labels.folder_labels(["a/x/0.png", "b/y/1.png"]) == ["a", "b"], "the first level"
    assert labels.folder_labels(["a/0.png", "a/1.png"]) == ["a", "a"], "one class"
    with pytest.raises(ValueError, match=r"has two labels for a/0.png, 4 and 5; keep one"):
        labels.edm_labels(b'{"labels": [["a/0.png", 4], ["a/0.png", 5]]}', ["a/0.png"], "x")
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        labels.edm_labels(b'{"labels": [["a/0.png", true]]}', ["a/0.png"], "x")
    table = tmp_path / "t.csv"
    for header in ("", '"name", "class"\n'):
        table.write_text(f'\ufeff{header}"./a/0.png", "big cat"\n', encoding="utf-8")
        assert labels.csv_labels(table, ["a/0.png"]) == ["big cat"]
    table.write_text("a/0.png,\n")
    with pytest.raises(ValueError, match="a row has no label"):
        labels.csv_labels(table, ["a/0.png"])


def test_labels_from_a_csv_file(tmp_path):
    folder = write_set(tmp_path / "images")
    names = image_sources.open_source(str(folder)).names
    table = tmp_path / "labels.csv"
    table.write_text("file,class\n" + "".join(f"{name},{10 if int(name[-6:-4]) < 12 else 9}\n" for name in reversed(names)))
    data = ImageDataModule(str(folder), size=8, labels=str(table))
    assert contents(data) == [(10 * i, 10 if i < 12 else 9) for i in range(24)], "numbers are kept as they are"
    words = labels.csv_labels(table, names)
    assert labels.numbered(["b", "a", "b"])[0].tolist() == [1, 0, 1]
    assert labels.numbered(["10", "9"])[1] == ["9", "10"]
    assert len(words) == 24
    table.write_text(f"{names[0]},1\n")
    with pytest.raises(ValueError, match=f"has no label for 23 of 24 images, such as {names[1]}"):
        ImageDataModule(str(folder), size=8, labels=str(table))
    table.write_text("just one column\n")
    with pytest.raises(ValueError, match="a row has no label; give two columns"):
        ImageDataModule(str(folder), size=8, labels=str(table))


def test_classes_that_occur_once_or_only_among_the_held_out_count(tmp_path):
    for i, name in enumerate("aaaabbbc"):
        place = tmp_path / "images" / name / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(place)
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "images" / "d.png")
    (tmp_path / "other" / "e").mkdir(parents=True)
    (tmp_path / "images" / "d.png").rename(tmp_path / "other" / "e" / "d.png")
    data = ImageDataModule(str(tmp_path / "images"), labels=True)
    assert (data.num_classes, len(data.train), len(data.held_out)) == (3, 7, 1)
    data = ImageDataModule(str(tmp_path / "images"), labels=True, held_out=str(tmp_path / "other"))
    assert (data.num_classes, data.held_out.label.tolist(), data.train.label.tolist()) == (4, [3], [0, 0, 0, 0, 1, 1, 1, 2])


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhw", "deep"])
def test_array_files(layout, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (30, 3, 6, 8)).astype(np.uint8)
    stored = {"nchw": x, "nhwc": x.transpose(0, 2, 3, 1), "nhw": x[:, 0], "deep": x[:, 0].astype(np.uint16) * 257}[layout]
    np.save(tmp_path / "x.npy", stored)
    np.savez(tmp_path / "x.npz", x=stored, labels=np.arange(30) % 3)
    expected = x if layout in ("nchw", "nhwc") else x[:, :1].astype(int) * (257 if layout == "deep" else 1)
    for name in ("x.npy", "x.npz"):
        data = ImageDataModule(str(tmp_path / name), held_out=0.1, labels=name == "x.npz")
        got = torch.cat([data.train.x, data.held_out.x]).long().flatten(1)
        assert sorted(got.tolist()) == sorted(torch.tensor(expected.astype(int)).flatten(1).tolist())
        assert data.summary.levels == (65536 if layout == "deep" else 256)


def test_torchvision_reads_from_its_root_and_says_what_to_do_offline(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        shown = pixels if part == "train" else 255 - pixels
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 20, 28, 28) + shown.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 20) + bytes(i % 2 for i in range(20)))
    data = ImageDataModule("torchvision:MNIST", root=str(tmp_path), labels=True, held_out="torchvision:MNIST:test")
    assert (data.shape, data.num_classes, len(data.train), len(data.held_out)) == ((1, 28, 28), 2, 20, 20)
    assert np.array_equal(data.train.x[:, 0].numpy(), pixels)
    assert np.array_equal(data.held_out.x[:, 0].numpy(), 255 - pixels)
    assert data.train.label.tolist() == [i % 2 for i in range(20)]

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    with pytest.raises(OSError, match=r"is not in root = .*cannot be downloaded \(no network\). On a machine"):
        ImageDataModule("torchvision:CIFAR10", root=str(tmp_path))
    with pytest.raises(ValueError, match="path = torchvision:CIFAR11 is unknown; these can be used: CIFAR10, CIFAR100"):
        ImageDataModule("torchvision:CIFAR11")
    with pytest.raises(ValueError, match="path = torchvision:MNIST:val: this set has the splits train and test"):
        ImageDataModule("torchvision:MNIST:val")
    with pytest.raises(ValueError, match="root = data: only torchvision"):
        ImageDataModule(str(tmp_path), root="data")


def test_hugging_face_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    rows = {
        "picture": [Image.fromarray(np.full((8, 8), 9 * i, np.uint8)) for i in range(20)],
        "kind": [i % 2 for i in range(20)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    data = ImageDataModule(f"huggingface:{folder}", labels=True)
    assert contents(data) == [(9 * i, i % 2) for i in range(20)]
    with pytest.raises(OSError, match=r"cannot be loaded \(.*Offline it must be in the cache"):
        ImageDataModule("huggingface:nobody/nothing")


def odd_folder(folder):
    """200 images, grey, RGB, RGBA and of 16 bits, of three sizes, one of them cut off."""
    g = np.random.default_rng(0)
    for i in range(200):
        height, width = ((24, 32), (20, 20), (36, 28))[i % 3]
        y, x = np.mgrid[:height, :width] / 16
        blob = np.exp(-((y - g.random()) ** 2 + (x - g.random()) ** 2) * 4)[..., None]
        colour = blob * g.integers(60, 255, 3)
        kinds = [colour, 255 * blob[..., 0], np.concatenate([colour, 255 * (blob > 0.1)], 2), 65535 * blob[..., 0]]
        array = kinds[i % 4].astype(np.uint16 if i % 4 == 3 else np.uint8)
        place = folder / "ab"[i % 2] / f"{i:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(place)
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2])


def test_an_odd_folder_trains_after_one_clear_message(tmp_path, capsys):
    folder = tmp_path / "photos"
    odd_folder(folder)
    base = ["--config", str(ROOT / "configs" / "folder.yaml"), *SMALL, "--model.net.init_args.width=8", "--data.batch_size=4"]
    base += ["--model.net.init_args.blocks=1", "--data.size=8", "--data.path", str(folder), "--trainer.max_steps=2"]
    message = re.escape("1 of 200 images cannot be used: b/199.png (OSError: ")
    with pytest.raises(ValueError, match=message + r".*Mend or remove them, or leave them out with data.skip_damaged = true"):
        fit(tmp_path / "run", base=base)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match=message.replace("used", "used and are left out")):
        fit(tmp_path / "run", "--data.skip_damaged=true", base=base)
    assert pfgm.load(tmp_path / "run" / "checkpoints" / "last.ckpt").sample(2).x.shape == (2, 3, 8, 8)
    # The same images elsewhere are the same run; others are not.
    good = (folder / "a" / "000.png").read_bytes()
    (folder / "a" / "000.png").unlink()
    folder.rename(tmp_path / "moved")
    (tmp_path / "photos").mkdir()
    base[base.index(str(folder))] = str(tmp_path / "moved")
    more = ["--data.skip_damaged=true", "--data.workers=2", "--trainer.max_steps=3"]
    with pytest.warns(UserWarning, match="b/199"), pytest.raises(ValueError, match=r"data.norm: [\d.]+ -> [\d.]+"):
        fit(tmp_path / "run", *more, base=base)
    (tmp_path / "moved" / "a" / "000.png").write_bytes(good)
    with pytest.warns(UserWarning, match="b/199"):
        fit(tmp_path / "run", *more, base=base)
    assert last(tmp_path / "run")["global_step"] == 3


def test_all_damaged_images_are_named_and_counted(tmp_path):
    folder = write_set(tmp_path / "images")
    for name in ("cat/02.png", "dog/03.png", "dog/05.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
    (folder / "dog" / "07.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 of 24 images cannot be used: cat/02.png .*dog/03.png .*dog/05.png .*dog/07.png"):
        ImageDataModule(str(folder), size=8)
    for memory in (None, 0):
        with pytest.warns(UserWarning, match="4 of 24 images cannot be used and are left out"):
            data = ImageDataModule(str(folder), size=8, labels=True, skip_damaged=True, memory=memory)
        assert contents(data) == [(10 * i, i % 2) for i in range(24) if i not in (2, 3, 5, 7)]
    with pytest.raises(ValueError, match=r"images of 3 sizes, such as .*; give data.size"):
        ImageDataModule(str(folder), skip_damaged=True)
    archive = pack(write_set(tmp_path / "others"), tmp_path / "images.zip")
    broken = bytearray(archive.read_bytes())
    where = broken.find(b"IDAT")
    broken[where + 6] ^= 255
    archive.write_bytes(broken)
    with pytest.raises(ValueError, match=r"1 of 24 images cannot be used: dog/23.png \(BadZipFile: Bad CRC-32"):
        ImageDataModule(str(archive), size=8)
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises(ValueError, match="is no zip, or was not copied to its end"):
        ImageDataModule(str(archive), size=8)


@pytest.mark.parametrize("reference_size", [0, 10])
def test_images_read_from_the_disk_by_workers_make_the_same_batches(reference_size, tmp_path):
    archive = str(pack(write_set(tmp_path / "images"), tmp_path / "images.zip"))
    in_memory, read = (ImageDataModule(archive, size=8, labels=True, memory=memory) for memory in (None, 0))
    assert isinstance(in_memory.train.x, torch.Tensor)
    assert isinstance(read.train.x, ImageSet)
    sent = pickle.loads(pickle.dumps(read.train.x))  # as to workers that are not forked
    assert torch.equal(sent[:], in_memory.train.x)
    assert read.summary.norm == in_memory.summary.norm
    assert torch.equal(read.summary.mean, in_memory.summary.mean)
    options = {"batch_size": 3, "seed": 5, "start": 7, "rank": 1, "world": 2, "accumulate": 2, "reference_size": reference_size}
    options["preparation"] = Preparation(flip=True, width=0.5)
    memory = iter(TrainingStream(in_memory.train, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork in a process with threads
        workers = iter(DataLoader(TrainingStream(read.train, **options), batch_size=None, num_workers=2))
        for _, a, b in zip(range(7), memory, workers, strict=False):
            tensors = [key for key in a if key not in ("step", "rows")]
            assert (a["step"], tuple(a["rows"]), a.keys()) == (b["step"], tuple(b["rows"]), b.keys())
            assert all(torch.equal(a[key], b[key]) for key in tensors)
        del workers


def test_images_that_vanish_and_folders_of_damaged_ones_are_named(tmp_path):
    folder = write_set(tmp_path / "images")
    data = ImageDataModule(str(folder), size=8, memory=0)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"path = .*images: (cat|dog)/..\.png was read at the start, and cannot be now: empty"):
        data.train.x[:3]
    with pytest.raises(ValueError, match=r"path = .*images: none of 24 images can be used, cat/00.png: empty"):
        ImageDataModule(str(folder), size=8, skip_damaged=True)
    good = write_set(tmp_path / "good")
    with pytest.raises(ValueError, match=r"held_out = .*images: none of 24 images can be used"):
        ImageDataModule(str(good), size=8, held_out=str(folder), skip_damaged=True)


def test_sets_read_from_the_disk_train_and_are_tested(tmp_path):
    archive = pack(write_set(tmp_path / "images"), tmp_path / "images.zip")
    base = ["--config", str(ROOT / "configs" / "folder.yaml"), *SMALL, "--model.net.init_args.width=8", "--data.batch_size=4"]
    base += ["--model.net.init_args.blocks=1", "--data.size=8", "--data.path", str(archive), "--data.workers=2"]
    base += ["--trainer.val_check_interval=2"]
    fit(tmp_path / "memory", "--trainer.max_steps=4", base=base)
    fit(tmp_path / "disk", "--trainer.max_steps=2", "--data.memory=0", base=base)
    fit(tmp_path / "disk", "--trainer.max_steps=4", base=base)  # resumed in memory
    a, b = (last(tmp_path / name)["state_dict"] for name in ("memory", "disk"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    train.main(
        ["test", *base, "--run_dir", str(tmp_path / "disk"), "--data.memory=0", "--evaluation.n=8", "--evaluation.sets=1"]
    )
    assert (tmp_path / "disk" / "test.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "path = nowhere does not exist, or is of another kind; give a folder"),
        ({"path": __file__}, "does not exist, or is of another kind"),
        ({"held_out": "nowhere"}, "held_out = nowhere does not exist"),
        ({"held_out": 1.0}, "held_out = 1.0 must lie between 0 and 1"),
        ({"held_out": 0.99}, "held_out = 0.99: of 24 samples none would be left"),
        ({"size": 0}, "size = 0: give one number of pixels"),
        ({"size": (8, 0)}, r"size = \(8, 0\)"),
        ({"crop": -1}, "crop = -1: give one number of pixels"),
        ({"channels": 4}, "channels = 4: expected one of 1, 3"),
        ({"size": (8.5, 8)}, r"size = \(8.5, 8\)"),
        ({"resize": "fit"}, "resize = 'fit': expected one of crop, stretch"),
        ({"path": ""}, "path =  does not exist"),
        ({"workers": 0}, "workers = 0"),
        ({"memory": -1.0}, "memory = -1.0"),
        ({"labels": "none.csv"}, "labels = none.csv does not exist"),
        (
            {"crop": 64},
            "24 of 24 images cannot be used: cat/00.png .it has 12 x 16 pixels, fewer than",
        ),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    folder = write_set(tmp_path / "images")
    with pytest.raises((ValueError, OSError), match=message):
        ImageDataModule(**({"path": str(folder), "size": 8} | options))


def test_folders_without_images_or_labels_are_named(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"holds no images \(.png, .*but 1 other files"):
        ImageDataModule(str(tmp_path / "text"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(flat / f"{i}.png")
    with pytest.raises(ValueError, match=r"labels = True: path = .*flat has 0 labels for 4 images; put those of one class"):
        ImageDataModule(str(flat), labels=True)
    (flat / "dataset.json").write_text('{"labels": [["0.png", "cat"]]}')
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        ImageDataModule(str(flat), labels=True)
    (flat / "dataset.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"dataset.json is not as EDM writes it"):
        ImageDataModule(str(flat), labels=True)
    np.save(tmp_path / "floats.npy", np.random.default_rng(0).random((9, 8, 8)))
    with pytest.raises(ValueError, match=r"holds float64; images are .*pfgm.data.Arrays"):
        ImageDataModule(str(tmp_path / "floats.npy"))
    np.save(tmp_path / "first.npy", np.zeros((9, 3, 8, 1), np.uint8))
    assert image_sources.open_source(str(tmp_path / "first.npy")).x.shape == (9, 8, 1, 3), "channels first if it can be"
    np.save(tmp_path / "vectors.npy", np.zeros((9, 8), np.uint8))
    np.save(tmp_path / "long.npy", np.arange(9 * 64).reshape(9, 8, 8) % 256)
    with pytest.raises(ValueError, match=r"holds int64; images are uint8 .0..255. or uint16"):
        ImageDataModule(str(tmp_path / "long.npy"))
    np.savez(tmp_path / "few.npz", x=np.zeros((9, 8, 8), np.uint8), labels=np.arange(3))
    with pytest.raises(ValueError, match=r"few.npz has 3 labels for 9 images"):
        ImageDataModule(str(tmp_path / "few.npz"), labels=True)
    with pytest.raises(ValueError, match=r"holds \(9, 8\); images are \[n, C, H, W\]"):
        ImageDataModule(str(tmp_path / "vectors.npy"))


def test_damaged_pictures_for_sample_py_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RGB).getvalue()[:-30])
    with pytest.raises(ValueError, match=r"image = .*a.png cannot be used: "):
        read_images(tmp_path / "a.png", (3, 6, 5), "image")
    Image.fromarray(DEEP).save(tmp_path / "b.png")
    assert np.allclose(read_images(tmp_path / "b.png", (3, 6, 5))[0, 1].numpy(), DEEP / 65535, atol=1e-6)


PUBLISHED = [("cifar10_pfgmpp", None), ("cifar10_pfgmpp", 2048), ("cifar10_edm", None), ("cifar10_pfgm", None)]
PUBLISHED += [("ffhq64", None), ("celeba64", None), ("church256", None)]


@pytest.mark.parametrize(("config", "D"), PUBLISHED)
def test_published_configurations_make_their_models(config, D):
    """At full size, on the meta device, for made-up data of their size."""
    settings = yaml.safe_load((ROOT / "configs" / f"{config}.yaml").read_text())
    data, model = settings["data"]["init_args"], settings["model"]
    size, D, net = data.get("size", 32), D or model["D"], model.pop("net")["init_args"]
    shape = (3, size, size)
    options = {name: build(value) if isinstance(value, dict) else value for name, value in model.items()}
    with torch.device("meta"):
        options["net"] = UNet(shape, extra_channels=options["loss"].extra_channels, **net)
    summary = DataSummary(shape, 0.5, 0.5 * (3 * size**2) ** 0.5, 0.05, scale=127.5, mean=torch.zeros(shape))
    module = PFGM(**options | {"data": summary, "D": D})
    assert float(D) == module.flow.kernel.D
    assert [size // 2**level for level in net["attention_levels"]] == [16]
    assert next(module.flow.denoiser.parameters()).is_meta
    millions = {"cifar10_pfgm": 61.8, "ffhq64": 61.8, "celeba64": 61.8, "church256": 124.1}.get(config, 55.7)
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 1) == millions


def test_configurations_that_should_differ_in_one_thing_do():
    edm, pfgmpp = (yaml.safe_load((ROOT / "configs" / f"cifar10_{name}.yaml").read_text()) for name in ("edm", "pfgmpp"))
    assert (edm["model"].pop("D"), pfgmpp["model"].pop("D")) == ("inf", 128)
    assert (edm.pop("run_dir"), pfgmpp.pop("run_dir")) == ("runs/cifar10_edm", "runs/cifar10_pfgmpp")
    assert edm == pfgmpp
