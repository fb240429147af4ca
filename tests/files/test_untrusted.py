"""Each hostile file is refused for its own reason, before a library opens it."""

import contextlib
import zipfile

import numpy as np
import pytest
import torch

from benchmarks.faulty import hostile, hostile_data, hostile_models
from benchmarks.faulty.hostile import labelled, zipped
from pfgm.files import untrusted
from pfgm.files.arrays import load_arrays
from pfgm.files.images import ImageError, read_pixels
from pfgm.files.untrusted import RefusedError, load_torch, open_zip
from pfgm.flow.checkpoints import read_tensors

REASONS = {
    "array file: os.system": "holds posix.system, which is no tensor or plain value",
    "array file: os.system, protocol 4": "holds an object, which is no tensor or plain value",
    "array file: own class": r"holds pfgm\.data\.(datasets\.)?ImageDataModule, which is no tensor",
    "array file: INST": r"holds os\.system, which is no tensor",
    "array file: two pickles of one name": "several entries have one name",
    "array file: a second pickle": r"holds posix\.system, which is no tensor",
    "array file: compressed records": "is compressed, which torch.save never does",
    "array file: a tensor larger than its storage": "is larger than what is stored of it",
    "array file: lists in lists": "are more than 1000000",
    "array file: deep lists": "nested more than 100 deep",
    "array file: a ring": "nested more than 100 deep",
    "array file: a million dicts": "makes more than 1000000 values",
    "array file: other methods": "is larger than what is stored of it",
    "array file: entries that share their bytes": "its entries share their bytes",
    "array file: a large pickle": r"has 8\.39 MB, far more than tensors need",
    "array file: old format before an archive": "is a zip archive in something else",
    "array file: an archive before an archive": "is a zip archive in something else",
    "export: a function of ours": "is not a class that a checkpoint may name",
    "export: another package": r"is outside pfgm\. If you trust",
    "export: a wide network": "the weights do not match the network",
    "export: a deep network": "describes a network of more parts than it has weights",
    "export: a huge shape": "the weights do not match the network",
    "export: a filter of 20000 taps": r"describes a network with 3\.2e\+03 MB beside its weights",
    "export: a header of a gigabyte": r"claims a header of 1e\+03 MB",
    "export: numbers beyond their type": r"are not finite\. Use an earlier checkpoint",
    "export: weights that are NaN": r"are not finite\. Use an earlier checkpoint",
    "export: long JSON": r"has 10 MB, or is not a file\. The limit is 8\.39 MB",
    "features: a header of a gigabyte": r"claims a header of 1e\+03 MB",
    "features: a negative width": "what it describes cannot be made",
    "grids: a pipe": r"or is not a file\. The limit is",
    "input: a TIFF of one tile of a gigabyte": "its tiles are larger than an image may be",
    "averages: a long header": "claims a header of 20 MB",
    "npz: a shape of terabytes": r"claims the shape \(1000000000000,\) of float32, but has only 192 bytes",
    "npz: a negative shape": r"claims the shape \(-4,\) of float32",
    "npz: objects": "holds object, which are no numbers",
    "npy: records": r"which are no numbers\. Save arrays of numbers",
    "npz: format 9": r"numpy's format \(9, 0\)",
    "folder: 51 million pixels": "7150 x 7150 pixels are too many",
    "input: PostScript": "empty, not an image, or damaged at its start",
    "labels: a huge class": "Exceeds the limit",
}
CORPUS = {file.name: file for file in [*hostile_models.corpus(), *hostile_data.corpus()]}


@pytest.mark.process
@pytest.mark.parametrize("name", REASONS)
def test_each_hostile_file_is_refused_for_its_own_reason(name, tmp_path):
    file = CORPUS[name]
    path = file.make(tmp_path)
    with pytest.raises(ValueError, match=REASONS[name]):
        file.read(path)


def test_torch_archives_load_and_archives_inside_other_files_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    given = {"x": torch.arange(6.0).view(2, 3), "y": [1, "two", {"three": torch.zeros(0)}], "z": torch.float16}
    torch.save(given, path)
    found = load_torch(path, path)
    assert torch.equal(found["x"], given["x"])
    assert found["y"][:2] == [1, "two"]
    assert found["z"] == torch.float16
    content = path.read_bytes()
    for spoiled in (b"PK" + content, content[:100] + content, content + content):
        path.write_bytes(spoiled)
        with pytest.raises(RefusedError, match="a zip archive in something else"):
            load_torch(path, "a.pt")


def test_only_tensors_and_plain_values_are_loaded(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(torch, "load", lambda path, **options: given.update(options) or {"x": [1, True, None, (2.5, "a")]})
    (tmp_path / "a.pt").write_bytes(hostile_models._tensor(b"\1"))
    assert load_torch(tmp_path / "a.pt", "a.pt") == {"x": [1, True, None, (2.5, "a")]}
    assert given == {"map_location": "cpu", "weights_only": True}
    for value in ({1, 2}, torch.nn.Linear(1, 1), torch.zeros(2, device="meta"), torch.eye(3).to_sparse()):
        monkeypatch.setattr(torch, "load", lambda path, value=value, **options: [value])
        with pytest.raises(RefusedError, match=r"no tensor or plain value|larger than what is stored"):
            load_torch(tmp_path / "a.pt", "a.pt")


def test_single_images_and_zip_entries_are_checked_too(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(hostile_data.png(7_150, 7_150))
    with pytest.raises(ImageError, match="7150 x 7150 pixels are too many"):
        read_pixels(path)
    path = tmp_path / "a.zip"
    images = {f"{k}.png": hostile_data._encoded("PNG", k) for k in range(3)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (images | {"large.png": bytes(2**26 + 1)}).items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"large\.png \(it would unpack to 67\.1 MB\)"):
        hostile.images(path)


def test_tensors_of_any_kind_of_numbers_are_read_as_plain_ones(tmp_path):
    x = torch.randn(5, 4, requires_grad=True)
    torch.save({1: x, "x": x.bfloat16()}, tmp_path / "a.pt")
    found = load_arrays(tmp_path / "a.pt", ["x"])["x"]
    assert torch.equal(found, x.detach().bfloat16().float())
    assert not found.requires_grad
    with pytest.raises(ValueError, match=r"has no array 'y', only \['1', 'x'\]"):
        load_arrays(tmp_path / "a.pt", ["y"])
    torch.save({"x": torch.randn(5, 3, 4, 4).bfloat16()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"has type float32\. Images are uint8"):
        hostile.images(tmp_path / "b.pt")


def test_the_zip64_end_record_is_found(tmp_path, monkeypatch):
    """Lowered limits make zipfile write the records of archives of over 4 GB."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    content = zipped({"a": bytes(200), "b": b"1"})
    assert b"PK\6\6" in content
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    untrusted._check_layout(path, b"", "a.zip")
    at = content.index(b"PK\6\6")
    elsewhere = content[: at + 64] + bytes(8) + content[at + 72 :]
    for spoiled in (b"PK" + content, content[:at] + b"more" + content[at:], content + content, elsewhere):
        path.write_bytes(spoiled)
        with pytest.raises(RefusedError, match="in something else"):
            untrusted._check_layout(path, b"", "a.zip")


def test_the_unpacked_size_of_archives_is_bounded(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(zipped({"a": bytes(2**26)}))
    with open_zip(path, "a.zip") as archive:
        assert len(archive.read("a")) == untrusted.FREE
    path.write_bytes(zipped({"a": bytes(2**26), "b": b"1"}))
    with pytest.raises(RefusedError, match=r"a\.zip has .* MB and would unpack to 67\.1 MB"), open_zip(path, "a.zip"):
        pass


@pytest.mark.process
def test_archives_of_more_than_twenty_times_their_size_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    for zeros, fine in ((15, True), (25, False)):
        path.write_bytes(zipped({"a": np.random.default_rng(0).bytes(2**22) + bytes((zeros - 1) * 2**22), "b": bytes(2**24)}))
        refused = contextlib.nullcontext() if fine else pytest.raises(RefusedError, match="would unpack to")
        with refused, open_zip(path, "a.zip"):
            pass


def test_tensors_larger_than_their_storage_are_refused():
    for total, tensor in ((400, torch.zeros(1).expand(100)), (10, torch.zeros(100))):
        with pytest.raises(RefusedError, match=r"a tensor \(100,\) is larger than what is stored of it"):
            untrusted._Copy(total, "a").of(tensor)
    assert untrusted._Copy(400, "a").of(torch.zeros(100)).shape == (100,)


def test_labels_take_memory_in_proportion_to_images(tmp_path):
    path = tmp_path / "a.zip"
    images = {f"{k}.png": hostile_data._encoded("PNG", k) for k in range(9)}
    path.write_bytes(zipped(images | {"dataset.json": b" " * (2**24 + 10_000)}))
    with pytest.raises(ValueError, match=r"dataset\.json .*has 16\.8 MB, far more than 9 images need"):
        labelled(path)


def test_altered_tensors_are_refused(tmp_path):
    path = hostile_models._classifier(tmp_path, {"a": 1})
    read_tensors(path)
    path.write_bytes(path.read_bytes().replace(b'\\"a\\": 1', b'\\"a\\": 2'))
    with pytest.raises(ValueError, match="has been altered"):
        read_tensors(path)
