"""Augmentation: warps of known functions, labels that describe the changes, and images that stay as they are."""

import math

import numpy as np
import pytest
import torch

from pfgm.core import rng
from pfgm.data import DataModule
from pfgm.data.augmentation import Augment, Changes, diagonal, rotation, warp
from pfgm.data.batches import SampleSet, TrainingStream
from pfgm.nn import UNet
from pfgm.theory.data_summary import DataSummary
from pfgm.training.losses import DenoisingLoss, PoissonFieldLoss
from pfgm.training.module import PFGM
from tests.helpers import train_steps

HEIGHT, WIDTH = 40, 56


def smooth(right, down):
    """An image known at every point, [C, ...], in pixels from the middle."""
    return torch.stack([torch.sin(right / 12) * torch.cos(down / 14 + 0.3), torch.cos(right / 15 - down / 11)])


def pixels():
    down, right = torch.meshgrid(torch.arange(HEIGHT) - (HEIGHT - 1) / 2, torch.arange(WIDTH) - (WIDTH - 1) / 2, indexing="ij")
    return torch.stack([right, down])


CASES = {
    "turn": (rotation(torch.tensor([0.6])), [[0.0, 0.0]]),
    "stretch": (diagonal(torch.tensor([1.3]), torch.tensor([0.8])), [[0.0, 0.0]]),
    "shift": (torch.eye(2)[None], [[3.4, -2.25]]),
    "all": (rotation(torch.tensor([-1.0])) @ diagonal(torch.tensor([0.7]), torch.tensor([1.1])), [[-2.0, 1.5]]),
}


@pytest.mark.parametrize("case", CASES)
def test_warped_pixels_come_from_the_mapped_positions(case):
    """Compare images that are not square with the function at the mapped positions, away from the border."""
    matrix, shift = CASES[case][0], torch.tensor(CASES[case][1])
    p = pixels()
    warped = warp(smooth(*p)[None], matrix, shift)[0]
    there = torch.einsum("ij,jhw->ihw", matrix[0], p) + shift[0, :, None, None]
    inside = (there[0].abs() < WIDTH / 2 - 3) & (there[1].abs() < HEIGHT / 2 - 3)
    assert float(inside.double().mean()) > 0.4
    assert float((warped - smooth(*there))[:, inside].abs().max()) < 0.01


def only(which, x):
    """Images with the changes `which` alone, and their labels."""

    class Only(Augment):
        def sample(self, x, generator=None):
            changes = super().sample(x, generator)
            return changes._replace(**{name: torch.zeros_like(getattr(changes, name)) for name in set(Changes._fields) - which})

    return Only(1.0)(x, rng.generator(5))


def test_labels_suffice_to_repeat_the_changes():
    x = smooth(*pixels())[None].repeat(12, 1, 1, 1)
    out, label = only({"mirrored", "upside_down"}, x)
    for image, (mirror, over, *rest) in zip(out, label.tolist(), strict=True):
        by_hand = np.flip(x[0].numpy(), [axis for axis, done in ((2, mirror), (1, over)) if done])
        assert np.array_equal(image.numpy(), by_hand)
        assert not any(rest)
    assert len({tuple(row) for row in label.tolist()}) > 2
    out, label = only({"scale"}, x)
    matrix = diagonal(*[torch.exp2(-0.2 * label[:, 2])] * 2)
    assert torch.allclose(out, warp(x, matrix, torch.zeros(12, 2)), atol=1e-6)
    out, label = only({"angle"}, x)
    angle = torch.atan2(label[:, 4], label[:, 3] + 1)
    assert torch.allclose(out, warp(x, rotation(-angle), torch.zeros(12, 2)), atol=1e-4)
    assert float(angle.abs().max()) > math.pi / 2
    out, label = only({"stretch", "direction"}, x)
    stretch, direction = label[:, 5:7].norm(dim=1), torch.atan2(label[:, 6], label[:, 5]) / 2
    axes = rotation(direction) @ diagonal(torch.exp2(-0.2 * stretch), torch.exp2(0.2 * stretch)) @ rotation(-direction)
    assert torch.allclose(out, warp(x, axes, torch.zeros(12, 2)), atol=1e-4), "one label, one change"
    out, label = only({"right", "down"}, x)
    extent = torch.tensor([0.125 * WIDTH, 0.125 * HEIGHT])
    assert torch.allclose(out, warp(x, torch.eye(2).expand(12, 2, 2), -extent * label[:, 7:]), atol=1e-5)
    assert bool(label[:, 7:].ne(0).all())


def test_a_positive_scale_enlarges_and_a_shift_moves_right_and_down():
    spot = torch.zeros(1, 1, 21, 21)
    spot[0, 0, 8:13, 8:13] = 1
    larger = warp(spot, diagonal(*[torch.exp2(torch.tensor([-0.2 * 3]))] * 2), torch.zeros(1, 2))
    assert float(larger.sum()) == pytest.approx(25 * 2**1.2, rel=0.05)
    moved = warp(spot, torch.eye(2)[None], torch.tensor([[-3.0, -2.0]]))
    assert torch.allclose(moved, spot.roll((2, 3), dims=(2, 3)), atol=1e-5)


def test_changes_occur_with_their_probabilities_and_other_images_stay_as_they_are():
    x = torch.rand(4000, 1, 8, 8)
    out, label = Augment(0.12)(x, rng.generator(0))
    done = torch.stack([label[:, 2].ne(0), label[:, 4].ne(0), label[:, 5].ne(0), label[:, 7].ne(0)])
    assert torch.allclose(done.double().mean(1), torch.full((4,), 0.12, dtype=torch.float64), atol=0.02)
    assert float(label[:, 0].mean()) == pytest.approx(0.5, abs=0.03)
    assert float(label[:, 1].mean()) == pytest.approx(0.06, abs=0.015)
    same = ~done.any(0) & (label[:, 1] == 0)
    assert float(same.double().mean()) == pytest.approx(0.88**4 * 0.94, abs=0.03)
    expected = torch.where(label[same, 0].reshape(-1, 1, 1, 1) == 1, x[same].flip(3), x[same])
    assert torch.equal(out[same], expected)
    assert torch.equal(label[same][:, 1:], torch.zeros(int(same.sum()), 8))
    assert label[done[0], 2].std() == pytest.approx(1, abs=0.1)
    pieces = [Augment(0.5)(x[i : i + 2], rng.Rows(rng.generator(3), i, 6)) for i in (0, 2, 4)]
    for whole, piece in zip(Augment(0.5)(x[:6], rng.generator(3)), zip(*pieces, strict=True), strict=True):
        assert torch.allclose(whole, torch.cat(piece), atol=1e-6)


def images(**options):
    x = torch.rand(60, 3, 8, 8)
    return DataModule(SampleSet(x), SampleSet(x[:9]), batch_size=16, seed=0, **options)


def test_networks_train_on_changed_images_and_their_labels_but_validate_without(tmp_path):
    seen = []

    class Spy(DenoisingLoss):
        def forward(self, denoiser, y, conditions, **others):
            seen.append((y.detach().clone(), conditions.get("augmentation"), self.training))
            return super().forward(denoiser, y, conditions, **others)

    data = images()
    module = PFGM(UNet(data.shape, width=8, augmentation_size=9), data.summary, Spy(), augment=Augment(1.0))
    torch.nn.init.normal_(module.flow.denoiser.net.last[-1].weight, std=0.1)
    before = module.flow.denoiser.net.embedding.augmentation.weight.detach().clone()
    options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    train_steps(data, module, 2, folder=tmp_path, **options)
    assert [training for *_, training in seen] == [True, False, True, False]
    generator = rng.Rows(rng.generator(0, rng.AUGMENTATION, 0), 0, 16)
    batch = TrainingStream(data.train, batch_size=16, seed=0, start=0, reference_size=0).batch(0)
    x, label = Augment(1.0)(batch.x, generator)
    assert torch.allclose(seen[0][0], module.flow.to_model(x), atol=1e-6)
    assert torch.equal(seen[0][1], label)
    assert seen[1][1] is None
    assert not torch.equal(module.flow.denoiser.net.embedding.augmentation.weight, before)


def test_unusable_combinations_with_augmentation_are_named():
    data, summary = images(), DataSummary.from_data(torch.randn(9, 3, 8))
    for arguments, message in [
        ((UNet(data.shape, width=8), data.summary), "give a UNet with augmentation_size = 9"),
        ((UNet((3, 8), width=8, augmentation_size=9), summary), r"it changes images \(3, 8\)"),
        ((UNet(data.shape, width=8, augmentation_size=9), data.summary, DenoisingLoss(reference_size=4)), "reference_size = 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            PFGM(*arguments, augment=Augment())
    net = UNet(data.shape, extra_channels=1, width=8, augmentation_size=9)
    with pytest.raises(ValueError, match="reference_size = 4096"):
        PFGM(net, data.summary, PoissonFieldLoss(), D=1, augment=Augment())
    with pytest.raises(ValueError, match=r"probability = 1.5"):
        Augment(1.5)
