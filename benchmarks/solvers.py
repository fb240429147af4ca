"""Error and quality of every solver against the network calls it makes.

    python benchmarks/solvers.py runs/digits/checkpoints/last.ckpt [more checkpoints] --out solvers [--sets 3]

Error: the same samples drawn by each method and by dopri5 at tolerance 1e-5 from the same start; mean over the samples of the
root mean square difference, in units of half the data's range. Calls include the final denoising. "dopri5, log sigma" is the
published form of PFGM's sampler for D < inf (from the hyperplane, here without clipping), edm_heun that of EDM and PFGM++,
dpmpp_2m and dpmpp_3m are DPM-Solver++ on EDM's grid. "estimate" is the mean error that the solver claims over the mean error.
Grids: ab3 on uniform, paced and optimized grids, on samples that the search has not seen. Quality: distances of draws to the
training digits, mean and standard deviation over sets of 1000. Writes <out>.csv and <out>.png and prints tables.
"""

import argparse
import csv
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import pfgm
from pfgm.data import Digits
from pfgm.evaluation.metrics import energy_distance, frechet_distance
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.flow.tuned_solvers import optimize_grid

CALLS = (6, 8, 10, 12, 16, 20, 24, 36, 48, 64)
QUALITY = (6, 8, 10, 12, 16, 20)
ERRORS = (0.05, 0.02, 0.01, 0.005)
TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01, 5e-3, 2e-3, 1e-3, 3e-4, 1e-4)
MOST_CALLS = 130
"""A method's tolerances end where it needs more."""
STEPS = {
    "ab3": lambda calls: calls - 2,
    "ab2": lambda calls: calls - 1,
    "euler": lambda calls: calls - 1,
    "midpoint": lambda calls: (calls - 1) // 2,
    "heun2": lambda calls: (calls - 1) // 2,
    "rk4": lambda calls: (calls - 1) // 4,
    "dpmpp_2m": lambda calls: calls - 1,
    "dpmpp_3m": lambda calls: calls - 1,
    "edm_heun": lambda calls: calls // 2,
}
ADAPTIVE = {
    "adaptive_heun": {"method": "adaptive_heun"},
    "bosh3": {"method": "bosh3"},
    "bosh3, independent": {"method": "bosh3", "independent": True},
    "dopri5": {"method": "dopri5"},
}
SEARCHED = (4, 8)
"""Steps of the optimized grids."""
PUBLISHED = "dopri5, log sigma"


def ways(D: float) -> dict[str, list[dict[str, Any]]]:
    """The options of each method, by the calls they lead to or by tolerance."""
    result = {name: [{"method": name, "steps": steps(c)} for c in CALLS if steps(c) > 1] for name, steps in STEPS.items()}
    result |= {name: [options | {"rtol": t, "atol": t} for t in TOLERANCES] for name, options in ADAPTIVE.items()}
    published = {"method": "dopri5", "coordinates": "log_sigma"} | ({"start": "hyperplane"} if math.isfinite(D) else {})
    result[PUBLISHED] = [published | {"rtol": t, "atol": t} for t in TOLERANCES if t <= 0.05]
    return result


class Reference:
    """Converged samples (`n` of seed 11) of a flow, from both starts."""

    def __init__(self, flow: PoissonFlow, n: int):
        self.flow, self.n = flow, n
        converged = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}
        self.x = {start: flow.sample(n, seed=11, start=start, **converged).x for start in ("hemisphere", "hyperplane")}
        low, high = flow.summary.value_range or (-1.0, 1.0)
        self.unit = (high - low) / 2

    def error(self, option: dict[str, Any]) -> tuple[int, float, float]:
        """Calls, error, and the error that the solver estimates, of a draw with these options."""
        out = self.flow.sample(self.n, seed=11, batch_size=self.n, **option)
        difference = (out.x - self.x[option.get("start", "hemisphere")]) / self.unit
        estimate = math.nan if out.error is None else float(out.error.mean()) / self.unit
        return out.calls, float(difference.flatten(1).square().mean(1).sqrt().mean()), estimate


def errors(reference: Reference) -> dict[str, list[tuple[int, float, float]]]:
    """For each method (calls, error, estimate) in rising order of calls."""
    result = {}
    for name, options in ways(reference.flow.kernel.D).items():
        rows: dict[int, tuple[int, float, float]] = {}
        for option in options:
            if max(rows, default=0) > MOST_CALLS:
                break
            row = reference.error(option)
            rows[row[0]] = row
        result[name] = [rows[calls] for calls in sorted(rows)]
    return result


def grids(reference: Reference) -> None:
    """A table of the errors of ab3 on its grids."""
    print("\n| steps of ab3 | uniform | paced | optimized |\n|---|---|---|---|")
    for steps in SEARCHED:
        options = [{"grid": "uniform", "steps": steps}, {"grid": "paced", "steps": steps}]
        options.append({"grid": optimize_grid(reference.flow, steps)})
        row = [f"{reference.error({'method': 'ab3'} | option)[1]:.4f}" for option in options]
        print(f"| {steps} | " + " | ".join(row) + " |", flush=True)


def calls_for(rows: list[tuple[int, float, float]], error: float) -> float:
    """Calls at which a method first stays below `error`, between its points by powers; nan if it never does."""
    best = math.nan
    for (c0, e0, _), (c1, e1, _) in pairwise([rows[0], *rows]):
        if e1 > error:
            best = math.nan
        elif math.isnan(best):
            best = (
                c1
                if e0 <= error or e0 == e1
                else math.exp(math.log(c0) + math.log(c1 / c0) * math.log(e0 / error) / math.log(e0 / e1))
            )
    return best


def quality(flow: PoissonFlow, train: torch.Tensor, options: dict[str, Any], sets: int) -> list[str]:
    """Energy and Fréchet distance to the training digits, mean (sd)."""
    draws = [flow.sample(1000, seed=seed, batch_size=250, **options).x for seed in range(sets)]
    cells = []
    for distance in (energy_distance, frechet_distance):
        values = [distance(x, train) for x in draws]
        cells.append(f"{statistics.mean(values):.4f} ({statistics.stdev(values) if sets > 1 else math.nan:.4f})")
    return cells


def draw_plot(path: Path, results: dict[str, dict[str, list[tuple[int, float, float]]]]) -> None:
    """Error over calls, a panel for each model."""
    import matplotlib.pyplot as plt

    ours, compared = (
        ("ab3", "ab2", "bosh3", "bosh3, independent", "adaptive_heun"),
        ("edm_heun", "dpmpp_2m", "dpmpp_3m", PUBLISHED),
    )
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.2 * len(results), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (model, rows) in zip(axes[0], results.items(), strict=True):
        for name in ours + compared:
            calls, error, _ = zip(*rows[name], strict=True)
            axis.loglog(calls, error, "o-" if name in ours else "s:", ms=3, lw=1.2, label=name)
        axis.set(title=model, xlabel="network calls", xlim=(5, 130), ylim=(5e-4, 1))
        axis.set_xticks([6, 10, 20, 50, 100], ["6", "10", "20", "50", "100"])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("error")
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--n", type=int, default=64, help="samples of the errors")
    parser.add_argument("--sets", type=int, default=3, help="sets of 1000 samples for the quality; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path("solvers"))
    arguments = parser.parse_args()
    train, results, lines = Digits().train.x, {}, []
    for path in arguments.checkpoints:
        flow = pfgm.load(path)
        run = path if path.is_dir() else path.parent.parent
        model = f"{run.name} (D = {flow.kernel.D:g})"
        reference = Reference(flow, arguments.n)
        results[model] = rows = errors(reference)
        print(f"\n{model}\n| method | error at calls | " + " | ".join(f"calls for {e}" for e in ERRORS) + " | estimate |")
        print("|---" * (3 + len(ERRORS)) + "|")
        for name, points in rows.items():
            lines += [(model, name, *point) for point in points]
            some = ", ".join(f"{calls}: {error:.4f}" for calls, error, _ in points if calls <= 36)
            ratio = statistics.median(estimate / error for _, error, estimate in points)
            needed = " | ".join(f"{calls_for(points, e):.1f}" for e in ERRORS)
            print(f"| {name} | {some} | {needed} | {ratio:.1f} |", flush=True)
        grids(reference)
        if arguments.sets:
            print("\n| calls | energy distance | Fréchet distance |\n|---|---|---|")
            options = {str(c): {"method": "ab3", "steps": c - 2} for c in QUALITY}
            for name, option in (options | {"converged": {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}}).items():
                print(f"| {name} | " + " | ".join(quality(flow, train, option, arguments.sets)) + " |", flush=True)
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("model", "method", "calls", "error", "estimate"), *lines])
    draw_plot(arguments.out.with_suffix(".png"), results)


if __name__ == "__main__":
    main()
