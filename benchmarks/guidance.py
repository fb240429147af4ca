"""What guidance does: agreement with the class that was asked for, and distance to the real digits of that class.

    python train.py fit --config configs/digits_conditional.yaml
    python benchmarks/guidance.py

1000 samples for each strength, 100 of each class, by the default sampler. The judge is a support vector classifier, trained on
the real training digits; its own accuracy on held-out digits is printed. The energy distance is to the training digits of each
class, the mean over the ten; the last column is with guidance only at levels from .1 to 2.
"""

import argparse

import torch
from sklearn.svm import SVC

import pfgm
from pfgm.data import Digits
from pfgm.evaluation.metrics import energy_distance

STRENGTHS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/digits_conditional/checkpoints/last.ckpt")
    parser.add_argument("--guide", help="checkpoint of a weaker model, for autoguidance instead")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="sets of n samples")
    arguments = parser.parse_args()
    flow, data = pfgm.load(arguments.checkpoint), Digits(labels=True)
    guide = pfgm.load(arguments.guide) if arguments.guide else None
    judge = SVC().fit(data.train.x.flatten(1), data.train.label)
    print(f"judge on held-out digits: {judge.score(data.held_out.x.flatten(1), data.held_out.label):.4f}")
    labels = torch.arange(arguments.n) % 10
    print("guidance | agreement %, energy distance (sd over sets), calls | the same, at levels .1 to 2")
    for strength in STRENGTHS:
        cells = []
        for interval in (None, (0.1, 2.0)):
            options = {} if strength == 1 else {"guidance": strength, "guidance_interval": interval, "guide": guide}
            draws = [flow.sample(arguments.n, seed=s, labels=labels, **options) for s in range(arguments.seeds)]
            agreement = torch.tensor([judge.score(d.x.flatten(1), labels) for d in draws]) * 100
            distance = torch.tensor([by_class(d.x, labels, data) for d in draws])
            cells.append(f"{agreement.mean():.1f} ({agreement.std():.1f}), {distance.mean():.4f} ({distance.std():.4f}), ")
            cells[-1] += str(draws[0].calls)
        print(f"{strength} | {cells[0]} | {cells[1]}", flush=True)


def by_class(x: torch.Tensor, labels: torch.Tensor, data: Digits) -> float:
    """Mean over the classes of the energy distance to the training digits of the class."""
    real = [data.train.x[data.train.label == k] for k in range(10)]
    return sum(energy_distance(x[labels == k], real[k]) for k in range(10)) / 10


if __name__ == "__main__":
    main()
