"""Samples and inputs from array files."""

import numpy as np
import pytest
import torch
from PIL import Image

from pfgm.cli.options import read_mask
from pfgm.files.arrays import check_values, load_arrays, raw_arrays, read_inputs, read_samples


@pytest.fixture(params=[".npy", ".npz", ".pt"])
def save(request, tmp_path):
    """Write one array, and return its path."""

    def write(array):
        path = tmp_path / f"a{request.param}"
        if path.suffix == ".pt":
            torch.save(torch.from_numpy(array), path)
        else:
            (np.save if path.suffix == ".npy" else np.savez)(path, array)
        return path

    return write


def test_a_single_array_may_have_any_name(save):
    x = np.random.default_rng(0).normal(size=(5, 2, 2))
    path = save(x)
    assert torch.equal(read_samples(path)[0], torch.from_numpy(x))
    assert torch.equal(read_inputs(path, (2, 2), None, "images"), torch.from_numpy(x))
    assert torch.equal(load_arrays(path, ["other"])["other"], torch.from_numpy(x))


def test_samples_come_with_their_labels_and_conditions(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3.0), labels=np.array([0, 2, 1], np.uint8), conditions=np.arange(3), more=[1])
    x, labels, conditions = read_samples(tmp_path / "a.npz", labels=True, conditions=True)
    assert x.tolist() == [[0], [1], [2]]
    assert (labels.tolist(), labels.dtype) == ([0, 2, 1], torch.int64)
    assert (conditions.tolist(), conditions.dtype) == ([[0], [1], [2]], torch.float32)
    assert read_samples(tmp_path / "a.npz")[1:] == (None, None)
    assert set(raw_arrays(tmp_path / "a.npz", ["x"], ["more", "none"])) == {"x", "more"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": np.zeros(3), "labels": np.zeros(2, int)},
            r"labels need one integer >= 0 for each of 3 samples, got",
        ),
        ({"x": np.zeros(3), "labels": np.zeros(3)}, "labels need one integer"),
        ({"x": np.zeros(3), "labels": -np.ones(3, int)}, "labels need one integer"),
        ({"x": np.zeros(3), "labels": np.zeros(3, int), "conditions": np.full(3, np.nan)}, "conditions need finite numbers"),
        ({"x": np.zeros(3), "labels": np.zeros(3, int), "conditions": np.zeros((3, 0))}, "conditions need finite numbers"),
        ({"x": np.zeros(3), "labels": np.zeros(3, int), "conditions": np.zeros(3, complex)}, "conditions need finite numbers"),
        ({"x": np.zeros(()), "labels": np.zeros(3, int), "conditions": np.zeros(3)}, "holds a single number"),
        ({"x": np.zeros(3), "labels": np.zeros(3, int)}, r"has no array 'conditions', only \['labels', 'x'\]"),
    ],
)
def test_arrays_that_do_not_fit_the_samples_are_named(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"^path = .*a\.npz.*{message}"):
        read_samples(tmp_path / "a.npz", labels="labels" in message or len(arrays) > 2, conditions="conditions" in message)


@pytest.mark.parametrize(
    ("x", "shape", "expected"),
    [
        (np.zeros((2, 3)), (3,), (2, 3)),
        (np.zeros(3), (3,), (1, 3)),
        (np.zeros(3), (1,), (3, 1)),
        (np.zeros((3, 1)), (1,), (3, 1)),
        (np.zeros((1, 4, 4), np.uint8), (1, 4, 4), (1, 1, 4, 4)),
    ],
)
def test_inputs_are_one_sample_or_many(x, shape, expected, save):
    found = read_inputs(save(x), shape, None, "condition")
    assert found.shape == expected
    assert found.is_floating_point()


@pytest.mark.parametrize(
    "x", [np.zeros((2, 4)), np.zeros((0, 3)), np.full(3, np.inf), np.zeros(3, complex), np.zeros((1, 1, 3)), np.zeros(())]
)
def test_inputs_of_another_shape_or_without_finite_values_are_named(x, save):
    with pytest.raises(ValueError, match=r"condition = .* holds \(.*\) torch\..*: expected finite numbers \(3,\)"):
        read_inputs(save(x), (3,), None, "condition")


def test_images_are_no_inputs_of_data_without_black_and_white(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path)
    assert read_inputs(path, (1, 4, 4), (-1.0, 3.0), "images").unique().tolist() == [-1.0]
    with pytest.raises(ValueError, match="this model's data have no black and white"):
        read_inputs(path, (1, 4, 4), None, "images")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"path = .*a\.txt: unknown suffix '\.txt'"):
        load_arrays(tmp_path / "a.txt", ["x"])
    with pytest.raises(FileNotFoundError, match=r"latents = .*a\.npy does not exist or is not a file"):
        load_arrays(tmp_path / "a.npy", ["x"], name="latents")
    for suffix in (".npy", ".npz", ".pt"):
        path = tmp_path / f"b{suffix}"
        path.write_bytes(b"text")
        with pytest.raises(ValueError, match=r"cannot be read as samples of one shape \(\w+\)\. Pass arrays") as error:
            load_arrays(path, ["x"])
        assert "pickle" not in str(error.value), "the libraries' advice to load pickles is not repeated"


@pytest.mark.parametrize(
    ("x", "value_range", "message"),
    [
        (torch.zeros(2, dtype=torch.bool), (0, 1), "samples of dtype torch.bool"),
        (torch.zeros(2, dtype=torch.cfloat), None, "samples of dtype torch.complex64"),
        (torch.tensor([1.0, torch.nan, torch.inf]), None, "2 values are NaN or infinite"),
        (torch.arange(3), None, "integers of dtype torch.int64 need value_range"),
        (torch.arange(3), (0, 1), r"values from 0 to 2 leave value_range = \(0, 1\)"),
        (torch.arange(3), (3, 0), "expected two finite numbers, the first below the second"),
        (torch.zeros(3), (0.0, torch.inf), "expected two finite numbers"),
    ],
)
def test_samples_outside_their_range_are_named(x, value_range, message):
    with pytest.raises(ValueError, match=message):
        check_values(x, value_range, "a.npy")
    check_values(torch.arange(3), (0, 2), "a.npy")
    check_values(torch.randn(3), None, "a.npy")


def test_16_bit_integers_keep_their_values(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 4), 65_535, np.uint16))
    assert read_inputs(tmp_path / "a.npy", (4,), None, "condition").tolist() == [[65_535.0] * 4] * 2
    np.save(tmp_path / "m.npy", np.eye(4, dtype=np.uint16))
    assert read_mask(tmp_path / "m.npy", (1, 4, 4)).sum() == 4
