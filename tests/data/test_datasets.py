"""Data modules of images: what they hold, when they read it, and training with them."""

import json
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import pfgm
from pfgm.cli import train
from pfgm.data import ImageDataModule, image_sources
from pfgm.data.batches import Preparation, TrainingStream
from pfgm.data.degradations import Downsample
from pfgm.data.image_dataset import ImageSet
from pfgm.files.images import read_pixels
from tests.helpers import ROOT, SMALL, contents, fit, last, pack, write_set


def test_folders_and_zips_hold_the_same_images_and_labels(tmp_path, caplog):
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


@pytest.mark.parametrize("first", ["train", "held_out", "summary", "shape", "setup"])
def test_images_are_decoded_once_and_only_when_needed(first, tmp_path, monkeypatch):
    folder, decoded = write_set(tmp_path / "images"), []
    monkeypatch.setattr(image_sources, "read_pixels", lambda file: decoded.append(file) or read_pixels(file))
    data = ImageDataModule(folder, size=8, labels=True)
    assert not decoded
    data.setup("fit") if first == "setup" else getattr(data, first)
    assert len(decoded) == 24
    data.setup()
    assert contents(data) == [(10 * i, i % 2) for i in range(24)]
    assert data.summary.shape == (3, 8, 8)
    assert sorted(decoded) == sorted(folder.glob("[cd]*/[0-9]*.png")), "each once"


def test_pixels_that_cannot_be_decoded_are_an_error_of_setup(tmp_path):
    folder = write_set(tmp_path / "images")
    (folder / "dog" / "03.png").write_bytes((folder / "dog" / "03.png").read_bytes()[:50])
    data = ImageDataModule(folder, size=8)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"path = .*images: 1 of 24 images cannot be used: dog/03.png"):
            data.setup()


def test_held_out_images_may_be_another_set(tmp_path):
    write_set(tmp_path / "images")
    for i in range(6):
        file = tmp_path / "other" / ("dog", "cat")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30, 30), 5 + i, np.uint8)).save(file)
    for memory in (None, 0.0):
        data = ImageDataModule(tmp_path / "images", size=8, labels=True, held_out=str(tmp_path / "other"), memory=memory)
        seen = dict(zip(data.held_out.x[:][:, 0, 0, 0].tolist(), data.held_out.label.tolist(), strict=True))
        assert seen == {5 + i: (i + 1) % 2 for i in range(6)}, "the classes have the numbers of the training images"
        assert sorted(data.train.x[:][:, 0, 0, 0].tolist()) == [10 * i for i in range(24)]
    (tmp_path / "other" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^held_out = .*other: 1 of 6 images cannot be used: cat/1.png"):
        ImageDataModule(tmp_path / "images", size=8, held_out=str(tmp_path / "other"))


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
        file = folder / "ab"[i % 2] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


@pytest.mark.process
def test_an_odd_folder_trains_after_one_clear_message(tmp_path, capsys):
    folder = tmp_path / "photos"
    odd_folder(folder)
    base = ["--config", str(ROOT / "configs" / "folder.yaml"), *SMALL, "--model.net.init_args.width=8", "--data.batch_size=4"]
    base += ["--model.net.init_args.blocks=1", "--data.size=8", "--data.path", str(folder), "--trainer.max_steps=2"]
    message = re.escape("1 of 200 images cannot be used: b/199.png (OSError: ")
    with pytest.raises(ValueError, match=message + r".*Repair or remove them, or leave them out with data.skip_damaged = true"):
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


@pytest.mark.process
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
            assert (a.step, a.rows, a.conditions.keys()) == (b.step, b.rows, b.conditions.keys())
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.conditions["label"], b.conditions["label"])
            assert (a.charges is None) == (b.charges is None) == (reference_size == 0)
            assert a.charges is None or torch.equal(a.charges.x, b.charges.x)
        del workers


@pytest.mark.process
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
        ({"path": "nowhere"}, "path = nowhere: no such folder or file, or of another kind. Give a folder of images, a .zip"),
        ({"path": __file__}, "no such folder or file, or of another kind"),
        ({"held_out": "nowhere"}, "held_out = nowhere: no such folder"),
        ({"held_out": 1.0}, "held_out = 1.0 must lie between 0 and 1"),
        ({"held_out": 0.99}, "held_out = 0.99: of 24 samples none would be left"),
        ({"size": 0}, "size = 0: must be at least 1 pixel. Give one number"),
        ({"size": (8, 0)}, r"size = \(8, 0\)"),
        ({"crop": -1}, "crop = -1: must be at least 1 pixel"),
        ({"channels": 4}, "channels = 4: expected one of"),
        ({"size": (8.5, 8)}, r"size = \(8.5, 8\)"),
        ({"resize": "fit"}, "resize = 'fit': expected one of"),
        ({"path": ""}, "path = : no such folder"),
        ({"workers": 0}, "workers = 0"),
        ({"memory": -1.0}, "memory = -1.0"),
        ({"labels": "none.csv"}, "labels = none.csv: no such file"),
        (
            {"crop": 64},
            "24 of 24 images cannot be used: cat/00.png .it has 12 x 16 pixels, fewer than",
        ),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"degrade": Downsample(3)}, "factor = 3 does not divide 8 x 8"),
    ],
)
def test_bad_options_are_named_before_an_image_is_decoded(options, message, tmp_path, monkeypatch):
    folder = write_set(tmp_path / "images")
    if "crop" not in options:
        monkeypatch.setattr(image_sources, "read_pixels", None)
    with pytest.raises((ValueError, OSError), match=message):
        ImageDataModule(**({"path": str(folder), "size": 8} | options))
