"""Pictures: scaling to bytes, layout of grids and strips, animations, and memory."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image

from pfgm.evaluation import plots
from pfgm.training.csv_logger import MetricsLogger


def test_bytes_map_the_value_range_and_clip():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5)
    assert plots.to_bytes(x, (-1.0, 1.0)).flatten().tolist() == [0, 0, 128, 255, 255]
    assert plots.to_bytes(x, None).flatten().tolist() == [0, 64, 128, 191, 255]
    assert plots.to_bytes(torch.ones(1, 1, 2, 2), None).flatten().tolist() == [0] * 4, "a constant image is no division by zero"


def test_grids_enlarge_small_images_by_an_integer_factor(tmp_path):
    x = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 1, 10, 12)
    plots.save_grid(tmp_path / "a.png", x, (0.0, 1.0), columns=2)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (2 * (40 + 2) + 2, 2 * (48 + 2) + 2, 3)
    assert [int(picture[10, 10, 0]), int(picture[10, 60, 0]), int(picture[60, 10, 0])] == [0, 128, 255]


def test_samples_are_drawn_as_grid_or_scatter_plot_or_refused(tmp_path):
    plots.save_samples(tmp_path / "a.png", torch.rand(4, 3, 8, 8))
    plots.save_samples(tmp_path / "b.png", torch.rand(4, 2))
    for name, size in (("a.png", (70, 70)), ("b.png", (600, 600))):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == size
    with pytest.raises(ValueError, match=r"x has samples of shape \(2, 8, 8\)"):
        plots.save_samples(tmp_path / "c.png", torch.rand(4, 2, 8, 8))


def test_strips_scale_each_column_to_the_spread_of_the_data(tmp_path):
    """Column 0 is the data multiplied by 50, so that both columns look alike."""
    end = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    end = end / end.flatten(1).std(1)[:, None, None, None]
    plots.save_strip(tmp_path / "a.png", torch.stack([50 * end, end]), (-4.0, 4.0))
    picture = np.asarray(Image.open(tmp_path / "a.png")).astype(int)[..., 0]
    assert picture.shape == (70, 70)
    assert np.abs(picture[2:34, 2:34] - picture[2:34, 36:68]).max() <= 1
    assert np.abs(picture[36:68, 2:34] - picture[36:68, 36:68]).max() <= 1


def test_animations_have_a_frame_per_point_and_hold_the_last(tmp_path):
    for shape in ((1, 8, 8), (2,)):
        plots.save_animation(tmp_path / "a.gif", *torch.rand(2, 3, 4, *shape))
        with Image.open(tmp_path / "a.gif") as film:
            assert film.n_frames == 3
            film.seek(2)
            assert film.info["duration"] == 2000


@pytest.mark.process
def test_pictures_leave_no_figures_in_memory(tmp_path):
    from matplotlib.figure import Figure

    MetricsLogger(tmp_path).log_metrics({"train_loss": 0.5}, 1)
    states = torch.rand(3, 4, 2)
    gc.collect()
    gc.disable()  # otherwise an automatic collection may hide figures that are left
    try:
        plots.save_loss_curve(tmp_path / "loss.png", tmp_path / "metrics.csv")
        plots.save_scatter(tmp_path / "a.png", states[0])
        plots.save_field_lines(tmp_path / "b.png", states, torch.rand(3, 4), states[0])
        plots.save_animation(tmp_path / "c.gif", states, states)
        assert not [thing for thing in gc.get_objects() if type(thing) is Figure]
        assert not gc.isenabled(), "the state of the collector is restored"
    finally:
        gc.enable()
    plots.save_scatter(tmp_path / "a.png", states[0])
    assert gc.isenabled()
