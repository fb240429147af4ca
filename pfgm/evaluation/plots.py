"""Draw grids, scatter plots, trajectories from the hemisphere to the data, field lines and loss curves.

Each function writes a whole PNG or GIF file at `path`. Tensors are in the user's units and on any device. States come from the
highest level to the data. `value_range` is black and white in the user's units, by default the range of the tensor.
"""

import csv
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfgm.files.atomic import atomic_write

ValueRange = Sequence[float] | None


@contextmanager
def free_figures() -> Iterator[None]:
    """Decorate a function so that it leaves no figures in memory.

    Figures are reference cycles of megabytes, which a process with many objects seldom collects. Garbage collection is disabled
    while one is drawn, so that all its objects stay in the youngest generation. Collecting that alone takes milliseconds.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()


def is_image(shape: Sequence[int]) -> bool:
    """Return whether samples of `shape` can be shown as images: (1 or 3, height, width)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def to_bytes(x: Tensor, value_range: ValueRange) -> Tensor:
    """Convert images [n, C, H, W] to uint8 on the CPU, mapping `value_range` to 0..255 and clipping."""
    low, high = (float(x.min()), float(x.max())) if value_range is None else value_range
    return ((x.double() - low) / max(high - low, 1e-12) * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def save_image(path: Path, image: Tensor) -> None:
    """Save one uint8 image [C, H, W] without scaling."""
    from torchvision.utils import save_image

    with atomic_write(path) as temporary:
        save_image(image.float() / 255, temporary)


def save_grid(path: Path, x: Tensor, value_range: ValueRange = None, columns: int | None = None) -> None:
    """Save images [n, C, H, W] as a grid, by default with as many columns as rows."""
    save_image(path, _grid(x, value_range, columns))


def _grid(x: Tensor, value_range: ValueRange, columns: int | None = None) -> Tensor:
    """Arrange images in one, uint8 [3, H', W'], enlarging small ones by an integer factor to at least 32 pixels."""
    from torchvision.utils import make_grid

    factor = max(1, -(-32 // min(x.shape[-2:])))
    large = to_bytes(x, value_range).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(large, nrow=columns or int(np.ceil(np.sqrt(len(x)))), padding=2, pad_value=128)


@free_figures()
def save_scatter(path: Path, x: Tensor) -> None:
    """Save a scatter plot of points [n, 2]."""
    figure = _figure(5, 5)
    axes = figure.add_subplot()
    axes.scatter(*x.detach().cpu().T.numpy(), s=4, alpha=0.5, linewidths=0)
    axes.set_aspect("equal")
    _save(figure, path)


def save_samples(path: Path, x: Tensor, value_range: ValueRange = None) -> None:
    """Save a grid of images [n, C, H, W] or a scatter plot of points [n, 2]. Raise ValueError for other shapes."""
    if is_image(x.shape[1:]):
        save_grid(path, x, value_range)
    elif x.shape[1:] == (2,):
        save_scatter(path, x)
    else:
        raise ValueError(
            f"x has samples of shape {tuple(x.shape[1:])}; only images (1 or 3, H, W) and points (2,) can be drawn. Write .npz."
        )


def save_strip(path: Path, states: Tensor, value_range: ValueRange = None) -> None:
    """Save the trajectories of images [points, n, C, H, W] as a strip with a row per sample.

    Each column is scaled to the spread of the data, since the noise at high levels is far larger than the image.
    """
    end = states[-1].double().std()
    scaled = states.double() * (end / states.double().flatten(2).std(2).clamp(min=end))[..., None, None, None]
    points, n = states.shape[:2]
    save_grid(path, scaled.transpose(0, 1).reshape(points * n, *states.shape[2:]), value_range, columns=points)


def save_animation(path: Path, noisy: Tensor, denoised: Tensor, value_range: ValueRange = None) -> None:
    """Save an animated GIF of noisy states on the left and denoised ones on the right; the last frame stays for 2 s.

    Both are images [points, n, C, H, W] or points [points, n, 2].
    """
    from PIL import Image

    if is_image(noisy.shape[2:]):
        frames = [
            torch.cat([_grid(x, value_range), _grid(y, value_range)], 2).permute(1, 2, 0).numpy()
            for x, y in zip(noisy, denoised, strict=True)
        ]
    else:
        frames = _scatter_frames(noisy, denoised)
    first, *others = [Image.fromarray(frame) for frame in frames]
    duration = [80] * len(others) + [2000]
    with atomic_write(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)


@free_figures()
def _scatter_frames(noisy: Tensor, denoised: Tensor) -> list[np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    low, high = (end.cpu().numpy() for end in (denoised[-1].amin(0), denoised[-1].amax(0)))
    low, high = low - (high - low) / 2, high + (high - low) / 2
    frames = []
    for pair in zip(noisy, denoised, strict=True):
        figure = _figure(7, 3.6)
        for axes, points in zip(figure.subplots(1, 2), pair, strict=True):
            axes.scatter(*points.cpu().T.numpy(), s=4, alpha=0.6, linewidths=0)
            axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return frames


@free_figures()
def save_field_lines(path: Path, states: Tensor, heights: Tensor, charges: Tensor) -> None:
    """Save field lines in the augmented space, inside a hemisphere of 2.5 times the radius of the charges.

    Args:
        path: PNG file.
        states: Points [points, n, 2] of n lines.
        heights: Augmented coordinate r [points, n] of each.
        charges: Data [m, 2], drawn at r = 0.
    """
    figure = _figure(7, 6)
    axes: Any = figure.add_subplot(projection="3d", computed_zorder=False)
    centre = charges.double().mean(0)
    radius = 2.5 * (charges - centre).norm(dim=1).quantile(0.99)
    inside = torch.hypot((states - centre).norm(dim=2), heights) < radius
    for i in range(states.shape[1]):
        line = torch.cat([states[:, i], heights[:, i, None]], dim=1)[inside[:, i]].cpu().numpy()
        axes.plot(*line.T, color="tab:blue", alpha=0.5, linewidth=0.7)
        axes.scatter(*line[:1].T, s=5, color="tab:blue")
    axes.scatter(charges[:, 0].cpu(), charges[:, 1].cpu(), 0, s=2, color="tab:red", alpha=0.6, linewidths=0)
    axes.set(xlabel="$x_1$", ylabel="$x_2$", zlabel="$r$")
    axes.set_aspect("equal")
    axes.view_init(elev=22, azim=-70)
    _save(figure, path)


@free_figures()
def save_loss_curve(path: Path, log: Path) -> None:
    """Save training and validation loss over steps, from the metrics.csv file `log` of a run.

    The scale is logarithmic unless a loss is not positive; a learned log-variance makes training losses negative.
    """
    figure, positive = _figure(6, 4), True
    axes = figure.add_subplot()
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, style in (("train_loss", {"alpha": 0.5}), ("val_loss", {"marker": "o", "markersize": 3})):
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
            axes.legend()
        positive = positive and all(loss > 0 for _, loss in points)
    axes.set(xlabel="step", ylabel="loss", yscale="log" if positive else "linear")
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
