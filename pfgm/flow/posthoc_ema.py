"""Averages of the weights whose width is chosen after training (arXiv 2312.02696, section 3).

A power-function average at step t weighs the weights of step tau by tau^gamma, 0 < tau <= t. Its width sigma_rel is the
standard deviation of that profile over t. Training saves averages of two widths (`PowerAverages`); that of any other width and
step is nearly a combination of theirs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pfgm.core.arguments import checked
from pfgm.flow import checkpoints

FOLDER = "averages"  # of a run
WIDEST = 12**-0.5  # sigma_rel of gamma = 0, at which all steps weigh the same


@checked
def exponent(sigma_rel: float) -> float:
    """Solve (gamma+1) = sigma_rel² (gamma+2)² (gamma+3) for gamma. Raise ValueError unless gamma >= 0."""
    if not 0.001 <= sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel = {sigma_rel} must lie between .001 and 12^-1/2 = .2887, the width of the plain mean")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max().clip(min=0))


def decay(gamma: float, step: int) -> float:
    """Return the share of the average that stays in step 1, 2, ...: (1 - 1/step)^(gamma+1)."""
    return (1 - 1 / step) ** (gamma + 1)


def overlap(gamma: np.ndarray, step: np.ndarray, other_gamma: np.ndarray, other_step: np.ndarray) -> np.ndarray:
    """Return ∫ p q dtau of the normalised profiles p = (gamma+1) tau^gamma / step^(gamma+1) and q; arrays broadcast."""
    later = np.maximum(step, other_step)
    power = np.where(step < other_step, other_gamma, gamma)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) / later * (np.minimum(step, other_step) / later) ** power


def combination(gammas: Sequence[float], steps: Sequence[int], gamma: float, step: int) -> tuple[np.ndarray, float]:
    """Fit the profile (gamma, step) by those of snapshots: return their coefficients and the relative error."""
    g, t = np.array(gammas, dtype=float), np.array(steps, dtype=float)
    one = np.array([float(gamma)]), np.array([float(step)])
    gram, target, power = overlap(g[:, None], t[:, None], g, t), overlap(g, t, *one), overlap(*one, *one)[0]
    x = np.linalg.lstsq(gram, target, rcond=1e-13)[0]
    return x, float(np.sqrt(max(0.0, power - 2 * x @ target + x @ gram @ x) / power))


def write_snapshot(run_dir: str | Path, step: int, averages: dict[float, dict[str, Tensor]]) -> None:
    """Write the averages {sigma_rel: {name: tensor}} of a run at `step`."""
    path = Path(run_dir) / FOLDER / f"{step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{width!r}/{name}": tensor for width, part in averages.items() for name, tensor in part.items()}
    checkpoints.write_tensors(path, tensors, {"step": step, "sigma_rel": list(averages)})


def _header(path: Path) -> tuple[int, list[float]]:
    """Return step and widths of a snapshot. Raise CheckpointError if it names none."""
    header = checkpoints.read_header(path)
    step: Any = header.get("step")
    widths: Any = header.get("sigma_rel")
    valid = isinstance(step, int) and step > 0 and isinstance(widths, list)
    if not valid or not all(isinstance(width, float) and 0.001 <= width <= WIDEST for width in widths):
        raise checkpoints.CheckpointError(f"{path}: step = {step}, sigma_rel = {widths} is no step and its widths. Delete it.")
    return step, widths


def reconstruct(run_dir: str | Path, sigma_rel: float, step: int | None = None) -> tuple[dict[str, Tensor], int, float]:
    """Reconstruct the average of width `sigma_rel` of a run (arXiv 2312.02696, section 3).

    The width is a share of the training up to `step`, by default the last one saved.

    Returns:
        The weights, the step, and the relative error of the profile.

    Raises:
        FileNotFoundError: If the run has no snapshots.
        ValueError: If none was saved at this step, or the profile is missed by over 20 %.
    """
    gamma = exponent(sigma_rel)
    files = sorted((Path(run_dir) / FOLDER).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"run_dir = {run_dir} has no snapshots of averages. Train with --averages.every_n_steps.")
    headers = {path: _header(path) for path in files}
    saved = [at for at, _ in headers.values()]
    step = saved[-1] if step is None else step
    if step not in saved:
        raise ValueError(f"step = {step}: there are snapshots of steps {', '.join(map(str, saved))}; give one of them")
    used = [(path, at, width) for path, (at, widths) in headers.items() for width in widths if at <= step]
    x, error = combination([exponent(width) for _, _, width in used], [t for _, t, _ in used], gamma, step)
    if error > 0.2:
        raise ValueError(
            f"sigma_rel = {sigma_rel}: the {len(used)} snapshots to step {step} miss its profile by {100 * error:.0f} %; take "
            "a width nearer to theirs, a later step, or save them more often"
        )
    total: dict[str, Tensor] = {}
    for factor, (path, _, width) in zip(x.tolist(), used, strict=True):
        for key, tensor in checkpoints.read_tensors(path).items():
            prefix, _, name = key.partition("/")
            if prefix == repr(width):
                total[name] = total.get(name, 0) + factor * tensor.double()
    return total, step, error
