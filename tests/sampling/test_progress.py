"""Test the progress bar against the samples that are finished."""

import pytest

from pfgm.sampling.progress import SamplingProgress
from pfgm.sampling.sampler import Sampler
from pfgm.theory.analytic import CauchyBlob
from pfgm.theory.kernel import StudentTKernel


def test_bar_advances_from_batch_to_batch():
    sampler = Sampler(CauchyBlob(0.3), StudentTKernel(1), shape=(2,), sigma_min=0.01, sigma_max=40.0, method="euler", steps=4)
    shown = []
    with SamplingProgress(10, sampler, False) as progress:
        for size in (6, 4):
            progress.batch(size)
            sampler.sample(size, on_call=lambda calls, level: (progress(calls, level), shown.append(progress.bar.n)))
    assert shown == pytest.approx([0, 1.5, 3, 4.5, 6, 6, 7, 8, 9, 10])
