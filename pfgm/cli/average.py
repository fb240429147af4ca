"""The command that exports an average of the weights."""

from pathlib import Path

from pfgm.files.atomic import PARTIAL, clear_partial
from pfgm.flow import checkpoints
from pfgm.flow.loading import load
from pfgm.flow.posthoc_ema import reconstruct


def taken(folder: Path) -> bool:
    """Whether `folder` holds more than an interrupted export."""
    if not folder.is_dir():
        return folder.exists()
    names = {path.name for path in folder.iterdir() if not path.name.startswith(PARTIAL)}
    return not names < {"config.json", "model.safetensors"}


def average(
    run_dir: Path,
    sigma_rel: float,
    *,
    out: Path,
    step: int | None = None,
    trust: list[str] = [],  # noqa: B006 (read only; jsonargparse shows it as the default)
) -> None:
    """Export a model whose weights are averaged over training with a width chosen now.

    Args:
        run_dir: of a run that was trained with --averages.every_n_steps.
        sigma_rel: width of the average, as a share of the training so far: from half the smallest to twice the largest width
            that was kept.
        out: a new folder for the export; sample.py and pfgm.load read it.
        step: of which training step (default: of the last snapshot).
        trust: modules outside pfgm whose networks the run's checkpoint may name.
    """
    if taken(out):
        raise FileExistsError(f"out = {out} exists; give a new folder")
    flow = load(run_dir / "checkpoints" / "last.ckpt", trust=trust)
    weights, step, error = reconstruct(run_dir, sigma_rel, step)
    state = flow.state_dict()
    if set(weights) != {name for name, _ in flow.named_parameters()}:
        raise checkpoints.CheckpointError(f"run_dir = {run_dir}: its snapshots are of another network than its checkpoint")
    flow.load_state_dict(state | {name: value.to(state[name].dtype) for name, value in weights.items()})
    clear_partial(out)
    flow.save_pretrained(out)
    print(f"average of width {sigma_rel:g} at step {step} -> {out} (its profile is met within {100 * error:.2g} %)")
