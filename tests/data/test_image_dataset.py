"""Images in one format: options, damaged images, memory and threads."""

import numpy as np
import pytest
import torch
from PIL import Image

from pfgm.data import ImageDataModule
from pfgm.data.image_dataset import ImageOptions, ImageSurvey, split_images
from pfgm.data.image_sources import open_source
from tests.helpers import contents, pack, write_set


def test_all_images_get_the_least_depth_and_the_most_channels(tmp_path, monkeypatch):
    """One thread and several make the same images."""
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
    assert torch.equal(kept[1].decode(True, threads=3)[0], kept[0])
    (tmp_path / "0.png").unlink()
    deep = ImageDataModule(tmp_path, size=8)
    assert (deep.train.x.dtype, deep.summary.levels, deep.summary.scale) == (torch.int32, 65536, 32767.5)
    assert sorted(v for v, _ in contents(deep)) == [257 * i for i in range(1, 9)]


def test_the_summary_does_not_depend_on_memory(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "images")
    whole = ImageDataModule(folder, size=8).summary
    monkeypatch.setattr("pfgm.data.datamodule.SUMMARY_BYTES", 10 * 3 * 64)
    in_memory, read = (ImageDataModule(folder, size=8, memory=memory) for memory in (None, 0.0))
    assert in_memory.summary.norm == read.summary.norm != whole.norm
    assert torch.equal(in_memory.summary.mean, read.summary.mean)


def test_all_damaged_images_are_named_and_counted(tmp_path):
    folder = write_set(tmp_path / "images")
    for name in ("cat/02.png", "dog/03.png", "dog/05.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
    (folder / "dog" / "07.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 of 24 images cannot be used: cat/02.png .*dog/03.png .*dog/05.png .*dog/07.png"):
        ImageDataModule(str(folder), size=8)
    for memory in (None, 0):
        with pytest.warns(UserWarning, match="4 of 24 images cannot be used and are left out"):
            read = contents(ImageDataModule(str(folder), size=8, labels=True, skip_damaged=True, memory=memory))
        assert read == [(10 * i, i % 2) for i in range(24) if i not in (2, 3, 5, 7)]
    with pytest.raises(ValueError, match=r"images of 3 sizes, such as .*. Give data.size"):
        ImageDataModule(str(folder), skip_damaged=True)
    archive = pack(write_set(tmp_path / "others"), tmp_path / "images.zip")
    broken = bytearray(archive.read_bytes())
    where = broken.find(b"IDAT")
    broken[where + 6] ^= 255
    archive.write_bytes(broken)
    with pytest.raises(ValueError, match=r"1 of 24 images cannot be used: dog/23.png \(BadZipFile: Bad CRC-32"):
        ImageDataModule(str(archive), size=8)
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises(ValueError, match="not a zip archive, or an incomplete copy"):
        ImageDataModule(str(archive), size=8)


def test_vanished_images_and_folders_of_damaged_images_are_named(tmp_path):
    folder = write_set(tmp_path / "images")
    data = ImageDataModule(str(folder), size=8, memory=0)
    data.setup()
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"path = .*images: (cat|dog)/..\.png was readable at the start and is not any more"):
        data.train.x[:3]
    with pytest.raises(ValueError, match=r"path = .*images: none of 24 images can be used .cat/00.png: empty"):
        ImageDataModule(str(folder), size=8, skip_damaged=True)
    good = write_set(tmp_path / "good")
    with pytest.raises(ValueError, match=r"held_out = .*images: none of 24 images can be used"):
        ImageDataModule(str(good), size=8, held_out=str(folder), skip_damaged=True)


def test_options_know_the_size_of_all_images():
    assert ImageOptions().final_size is None
    assert ImageOptions(crop=5).final_size == ImageOptions(crop=5).crop_size == (5, 5)
    assert ImageOptions(size=(3, 4), crop=5).final_size == (3, 4)
    assert ImageOptions(memory=2).max_bytes == 2e9
    with pytest.raises(ValueError, match="workers = 0: must be at least 1"):
        ImageOptions(workers=0)


def test_a_survey_describes_images_by_their_headers(tmp_path):
    survey = ImageSurvey.of(open_source(str(write_set(tmp_path / "images"))))
    assert survey.describe() == "18 8-bit RGB, 6 8-bit grey, 10 x 10 to 20 x 14"
    assert (len(survey.formats), survey.damaged, survey.threads) == (24, {}, 1)


def test_headers_show_flaws_that_make_decoding_pointless(tmp_path):
    folder = write_set(tmp_path / "images")
    assert not split_images(str(folder), ImageOptions(size=8), 0).has_flaws
    assert split_images(str(folder), ImageOptions(size=8, crop=(12, 12)), 0).has_flaws, "some have 10 rows"
    assert not split_images(str(folder), ImageOptions(size=8, crop=10), 0).has_flaws
    (folder / "cat" / "00.png").write_bytes(b"")
    assert split_images(str(folder), ImageOptions(size=8), 0).has_flaws
