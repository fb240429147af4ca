"""Super-resolution of digits, 4 x 4 -> 8 x 8, against bicubic interpolation.

    python train.py fit --config configs/digits_superres.yaml
    python benchmarks/superres.py --picture superres.png

Of the 360 held-out digits, in their units (-1 to 1): root mean square distance to the truth, of single samples and of the mean
of 16; root mean square distance of the result's block means to the 4 x 4 condition; energy and Fréchet distance to the training
digits; share that a support vector classifier, trained on the real digits, reads as the right digit. Mean and standard
deviation over seeds. "inverse" is the unconditional model of configs/digits_pfgmpp.yaml, drawn under the measurement of the
block means.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

import pfgm
from pfgm.data import Digits
from pfgm.data.degradations import Downsample
from pfgm.evaluation import plots
from pfgm.evaluation.metrics import energy_distance, frechet_distance
from pfgm.sampling.inverse import Measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/digits_superres/checkpoints/last.ckpt")
    parser.add_argument("--unconditional", default="runs/digits_pfgmpp/checkpoints/last.ckpt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="a .png: condition, bicubic, four samples, truth")
    arguments = parser.parse_args()
    flow, prior = pfgm.load(arguments.checkpoint), pfgm.load(arguments.unconditional)
    data = Digits(labels=True)
    judge = SVC().fit(data.train.x.flatten(1), data.train.label)
    truth, label = data.held_out.x, data.held_out.label
    low = avg_pool2d(truth, 2)

    def conditional(seed: int) -> Tensor:
        return flow.sample(len(low), seed=seed, condition=low).x

    def measured(seed: int) -> Tensor:
        return prior.sample(len(low), seed=seed, measurement=Measurement(Downsample(2), low, noise=0.01)).x

    def bicubic(seed: int) -> Tensor:
        return interpolate(low, scale_factor=2, mode="bicubic", align_corners=False)

    def row(draw: Callable[[int], Tensor]) -> str:
        figures = torch.tensor([figures_of(draw(seed)) for seed in range(arguments.seeds)])
        return " | ".join(f"{m:.4f} ({s:.4f})" for m, s in zip(figures.mean(0), figures.std(0), strict=True))

    def figures_of(x: Tensor) -> list[float]:
        distances = [rms(x, truth), rms(avg_pool2d(x, 2), low), energy_distance(x, data.train.x)]
        return [*distances, frechet_distance(x, data.train.x), judge.score(x.flatten(1), label)]

    print(
        "| | distance to the truth | of the block means | energy distance | Fréchet | read rightly |\n|---|---|---|---|---|---|"
    )
    for name, draw in (("samples", conditional), ("inverse", measured), ("bicubic", bicubic), ("truth", lambda seed: truth)):
        print(f"| {name} | {row(draw)} |", flush=True)
    for name, draw in (("samples", conditional), ("inverse", measured)):
        mean = torch.stack([draw(seed) for seed in range(16)]).mean(0)
        print(f"mean of 16 {name}: {rms(mean, truth):.4f} to the truth")
    if arguments.picture:
        columns = [interpolate(low, scale_factor=2), bicubic(0), *(conditional(seed) for seed in range(4)), truth]
        plots.save_grid(arguments.picture, torch.stack([x[:8] for x in columns]).flatten(0, 1), (-1, 1), columns=8)


def rms(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean().sqrt())


if __name__ == "__main__":
    main()
