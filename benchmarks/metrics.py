"""Which measure sees which fault: real images, degraded step by step, against training images.

python train.py features --data pfgm.data.ImageDataModule --data.path train.zip --data.held_out test.zip --data.labels true \
    --out features.safetensors
python benchmarks/metrics.py features.safetensors            (the data are those of the classifier)
"""

import argparse
import itertools

import torch
from torchvision.transforms.functional import gaussian_blur

from pfgm.core.configurable import build
from pfgm.evaluation import metrics
from pfgm.evaluation.features import extract, load_features
from pfgm.evaluation.metrics import FeatureSet
from pfgm.flow import checkpoints

MEASURES = {measure.heading: measure.function for measure in metrics.MEASURES}
SHOULD_SEE = {
    kind: [measure.heading for measure in metrics.MEASURES if kind in measure.sees] for kind in ("blur", "noise", "classes")
}
SHOULD_SEE["copies"] = ["copying"]


def degraded(x, label, train, value_range):
    """{kind: {how much: images}}, from little to much; as many images in each."""
    low, high = value_range
    noise = (high - low) * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    count, classes = len(x), int(label.max()) + 1
    kernel = [9, 9] if min(x.shape[2:]) > 9 else [5, 5]
    kept = {share: label < round(share * classes) for share in (0.8, 0.5, 0.2)}
    copied = {share: int(share * count) for share in (0.25, 0.5, 1.0)}
    return {
        "blur": {f"{width} px": gaussian_blur(x, kernel, [width, width]) for width in (0.6, 1.0, 2.0)},
        "noise": {f"{std:.0%} of the range": (x + std * noise).clamp(low, high) for std in (0.1, 0.2, 0.4)},
        "classes": {f"{share:.0%}": x[keep].repeat(6, 1, 1, 1)[:count] for share, keep in kept.items()},
        "copies": {f"{share:.0%}": torch.cat([train[:k], x[k:]]) for share, k in copied.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features")
    parser.add_argument("--n", type=int, default=2000, help="images in a set, at most half of those held out")
    parser.add_argument("--reference", type=int, default=10_000)
    arguments = parser.parse_args()
    net, made = load_features(arguments.features), checkpoints.read_header(arguments.features)["made"]
    data = build(made["data"])
    n = min(arguments.n, len(data.held_out) // 2)
    value_range, device = data.summary.value_range, torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def points(images):
        return FeatureSet(torch.cat([extract(net, part, value_range, device) for part in images.split(250)]))

    x, label, other = data.held_out.x[:n].float(), data.held_out.label[:n], points(data.held_out.x[n : 2 * n])
    images = data.train.x[: arguments.reference].float()
    train = points(images)
    measures = MEASURES | {"copying": lambda x, y: metrics.copying(x, y, other)}
    print(f"classifier of {made['of']}, held-out accuracy {made['held-out accuracy']:.3f}; {n} images against {len(train)}")
    print("| " + " | ".join(["", "", *measures]) + " |\n" + "|---" * (len(measures) + 2) + "|")

    def row(kind, much, images):
        values = {name: measure(points(images), train) for name, measure in measures.items()}
        print("| " + " | ".join([kind, much, *(f"{value:.4f}" for value in values.values())]) + " |", flush=True)
        return values

    real, missed = row("real", "", x), []
    for kind, levels in degraded(x, label, images, value_range).items():
        rows = [real] + [row(kind, much, images) for much, images in levels.items()]
        for name in SHOULD_SEE[kind]:
            values = [-r[name] if name in ("precision", "recall") else r[name] for r in rows]
            if any(a >= b for a, b in itertools.pairwise(values)):
                missed.append(f"{kind} by {name}")
    print("not ranked: " + ", ".join(missed) if missed else "every fault is ranked by each measure that should see it")


if __name__ == "__main__":
    main()
