"""Folders, archives, array files and data sets of packages as sources of images."""

import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from pfgm.data import ImageDataModule, image_sources
from pfgm.files.images import ImageFormat
from tests.helpers import contents, pack, write_set


def test_the_split_does_not_depend_on_packing_links_and_labels(tmp_path):
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


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhw", "deep"])
def test_arrays_of_every_layout_hold_the_same_images(layout, tmp_path):
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
    for split in ("train", "t10k"):
        shown = pixels if split == "train" else 255 - pixels
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 20, 28, 28) + shown.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 20) + bytes(i % 2 for i in range(20)))
    data = ImageDataModule("torchvision:MNIST", root=str(tmp_path), labels=True, held_out="torchvision:MNIST:test")
    assert (data.shape, data.num_classes, len(data.train), len(data.held_out)) == ((1, 28, 28), 2, 20, 20)
    assert np.array_equal(data.train.x[:, 0].numpy(), pixels)
    assert np.array_equal(data.held_out.x[:, 0].numpy(), 255 - pixels)
    assert data.train.label.tolist() == [i % 2 for i in range(20)]

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    with pytest.raises(OSError, match=r"not in root = .*the download failed \(no network\). On a machine"):
        ImageDataModule("torchvision:CIFAR10", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"path = torchvision:CIFAR11: unknown data set. Choose one of CIFAR10, CIFAR100"):
        ImageDataModule("torchvision:CIFAR11")
    with pytest.raises(ValueError, match="path = torchvision:MNIST:val: this data set has the splits train and test"):
        ImageDataModule("torchvision:MNIST:val")
    with pytest.raises(ValueError, match="root = data: only torchvision"):
        ImageDataModule(str(tmp_path), root="data")


@pytest.mark.process
def test_hugging_face_sets_are_read_offline_with_their_labels(tmp_path, monkeypatch):
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


def test_folders_without_images_or_labels_are_named(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"text: no images among 1 files. Their names must end in .png, "):
        ImageDataModule(str(tmp_path / "text"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(flat / f"{i}.png")
    with pytest.raises(ValueError, match=r"labels = True: path = .*flat has 0 labels for 4 images. Put the images"):
        ImageDataModule(str(flat), labels=True)
    (flat / "dataset.json").write_text('{"labels": [["0.png", "cat"]]}')
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        ImageDataModule(str(flat), labels=True)
    (flat / "dataset.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"dataset.json: not in EDM's format"):
        ImageDataModule(str(flat), labels=True)


def test_arrays_that_are_not_images_are_named(tmp_path):
    np.save(tmp_path / "floats.npy", np.random.default_rng(0).random((9, 8, 8)))
    with pytest.raises(ValueError, match=r"has type float64. Images are .*pfgm.data.Arrays"):
        ImageDataModule(str(tmp_path / "floats.npy"))
    np.save(tmp_path / "first.npy", np.zeros((9, 3, 8, 1), np.uint8))
    assert image_sources.open_source(str(tmp_path / "first.npy")).x.shape == (9, 8, 1, 3), "channels first if it can be"
    np.save(tmp_path / "vectors.npy", np.zeros((9, 8), np.uint8))
    np.save(tmp_path / "long.npy", np.arange(9 * 64).reshape(9, 8, 8) % 256)
    with pytest.raises(ValueError, match=r"has type int64. Images are uint8 .0..255. or uint16"):
        ImageDataModule(str(tmp_path / "long.npy"))
    np.savez(tmp_path / "few.npz", x=np.zeros((9, 8, 8), np.uint8), labels=np.arange(3))
    with pytest.raises(ValueError, match=r"few.npz has 3 labels for 9 images"):
        ImageDataModule(str(tmp_path / "few.npz"), labels=True)
    with pytest.raises(ValueError, match=r"has shape \(9, 8\). Images are \[n, C, H, W\]"):
        ImageDataModule(str(tmp_path / "vectors.npy"))


def test_sources_know_names_and_other_files(tmp_path):
    folder = write_set(tmp_path / "images")
    for path in (folder, pack(folder, tmp_path / "images.zip")):
        source = image_sources.open_source(str(path), argument="held_out")
        assert str(source) == f"held_out = {path}"
        assert source.names == sorted(f"{('cat', 'dog')[i % 2]}/{i:02}.png" for i in range(24))
        assert source.ignored == 3
        assert (source.header(0), source.read(0).shape) == (ImageFormat(12, 16, 1, 8), (12, 16, 1))
        assert set(source.labels()) == {"cat", "dog"}


def test_each_process_opens_an_archive_once_for_itself(tmp_path, monkeypatch):
    source, opened = image_sources.open_source(str(pack(write_set(tmp_path / "images"), tmp_path / "images.zip"))), []
    original = zipfile.ZipFile
    monkeypatch.setattr("zipfile.ZipFile", lambda path: opened.append(path) or original(path))
    for pid in (1, 1, 2):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        source.read(0)
    assert len(opened) == 2, "processes that share an open file share its position"


def test_a_new_source_is_one_class_in_the_registry(monkeypatch):
    class Shades(image_sources.Source):
        usage = "shades:N"

        @classmethod
        def accepts(cls, path):
            return path.startswith("shades:")

        def open(self):
            self.names = [f"shade {i}" for i in range(int(self.path.partition(":")[2]))]

        def read(self, i):
            return np.full((4, 6, 1), i, np.uint8)

        def labels(self):
            return ["even" if i % 2 == 0 else "odd" for i in range(len(self.names))]

    monkeypatch.setattr(image_sources, "SOURCES", (*image_sources.SOURCES, Shades))
    assert contents(ImageDataModule("shades:20", labels=True)) == [(i, i % 2) for i in range(20)]
    with pytest.raises(FileNotFoundError, match="or shades:N"):
        ImageDataModule("nowhere")
