"""Which outputs can hold which samples."""

import re

import pytest

from pfgm.cli import outputs
from pfgm.cli.generate import OutputOptions, check_outputs
from pfgm.cli.output_folder import Share
from pfgm.cli.outputs import LATENTS, SAMPLE_FOLDER, SAMPLES, STRIP, TRAJECTORY, check_output


@pytest.mark.parametrize(
    ("kind", "shape", "accepted"),
    [
        (SAMPLES, (3, 8, 8), {".png", ".npz", ".pt", ""}),
        (SAMPLES, (2,), {".png", ".npz", ".pt"}),
        (SAMPLES, (2, 8, 8), {".npz", ".pt"}),
        (SAMPLE_FOLDER, (5,), {""}),
        (STRIP, (1, 8, 8), {".png", ".npz", ".pt"}),
        (STRIP, (2,), {".npz", ".pt"}),
        (LATENTS, (1, 8, 8), {".npz", ".pt"}),
        (TRAJECTORY, (3, 8, 8), {".png", ".gif", ".npz"}),
        (TRAJECTORY, (2,), {".png", ".gif", ".npz"}),
        (TRAJECTORY, (5,), {".npz"}),
    ],
)
def test_endings_accepted_for_each_shape(kind, shape, accepted, tmp_path):
    for ending in (".png", ".gif", ".npz", ".pt", ".jpg", ""):
        path = tmp_path / f"new{ending}" / f"x{ending}"
        if ending in accepted:
            check_output(path, kind, shape)
            assert (path.parent if ending else path).is_dir(), "the folder is made"
            continue
        with pytest.raises(ValueError, match=re.escape(f"trajectory = {path}: {ending or 'a folder'} ")):
            check_output(path, kind, shape, name="trajectory")
        assert not path.parent.exists(), "nothing is made before an error"


def test_unsuitable_pictures_name_the_arrays_to_use(tmp_path):
    with pytest.raises(ValueError, match=r"x.png: \.png holds only images .*, not samples .*\(5,\)\. Use \.npz or \.pt\."):
        check_output(tmp_path / "x.png", STRIP, (5,))


def test_a_folder_is_not_replaced_by_a_file_nor_a_file_by_a_folder(tmp_path):
    (tmp_path / "a.npz").mkdir()
    (tmp_path / "b").write_text("")
    with pytest.raises(ValueError, match=r"out = .*a\.npz is a folder"):
        check_output(tmp_path / "a.npz", SAMPLES, (2,))
    with pytest.raises(ValueError, match=r"out = .*b is a file"):
        check_output(tmp_path / "b", SAMPLE_FOLDER, (2,))


@pytest.mark.parametrize("columns", [0, -1])
def test_columns_must_be_positive_and_for_a_grid_of_images(columns, tmp_path):
    outputs.check_columns(3, tmp_path / "x.png", (1, 8, 8))
    for bad in ((columns, tmp_path / "x.png", (1, 8, 8)), (3, tmp_path / "x.png", (2,)), (3, tmp_path / "x.npz", (1, 8, 8))):
        with pytest.raises(ValueError, match=rf"columns = {bad[0]}, out = .*: only a \.png of images has columns"):
            outputs.check_columns(*bad)


def test_an_input_under_another_name_is_not_overwritten(tmp_path):
    (tmp_path / "below").mkdir()
    with pytest.raises(ValueError, match="another argument names this file too"):
        check_output(tmp_path / "below" / ".." / "a.npz", LATENTS, (2,), others=[tmp_path / "a.npz"])


def test_no_folder_is_made_if_one_of_two_outputs_is_refused(tmp_path):
    for out, trajectory in (("a/x.jpg", "b/x.gif"), ("a/x.png", "b/x.jpg")):
        output = OutputOptions(out=tmp_path / out, trajectory=tmp_path / trajectory)
        with pytest.raises(ValueError, match=r"\.jpg is not supported here"):
            check_outputs((1, 8, 8), output, [], Share())
    assert not list(tmp_path.iterdir())
