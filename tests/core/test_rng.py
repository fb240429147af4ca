"""Random numbers are functions of counters."""

import math

import numpy as np
import pytest
import torch

from pfgm.core import rng
from pfgm.data import Digits, Toy
from pfgm.nn import TimeMLP
from pfgm.training.losses import DenoisingLoss
from pfgm.training.module import PFGM

DRAWS = {
    "normal": lambda count, generator: rng.normal((count, 3), generator, like=torch.zeros(1)),
    "normal in float64": lambda count, generator: rng.normal((count,), generator, like=torch.zeros(1, dtype=torch.float64)),
    "uniform": lambda count, generator: rng.uniform((count, 2), generator),
    "uniform numbers": lambda count, generator: rng.uniform(count, generator),
    "gamma": lambda count, generator: rng.gamma(2.5, count, generator),
}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def test_streams_depend_on_all_counters_and_on_nothing_else():
    counters = [(0,), (1,), (0, 1), (1, 1), (0, 0, 1), (0, 1, 1), (1, 0, 1)]
    torch.rand(7)
    first = [torch.rand(4, generator=rng.generator(*c)) for c in counters]
    torch.manual_seed(5)
    again = [torch.rand(4, generator=rng.generator(*c)) for c in counters]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(x.tolist()) for x in first}) == len(counters)
    assert rng.seed(1) == rng.seed(1, 0), "SeedSequence pads with zeros"


def test_seeds_keep_their_values():
    """Checkpoints and published samples depend on these."""
    assert rng.seed(0) == 6375474604893067239
    assert rng.seed(3, rng.TRAINING, 7) == 1709633046756376670
    words = np.random.SeedSequence([3, rng.TRAINING, 7]).generate_state(2, np.uint32)
    assert rng.seed(3, rng.TRAINING, 7) == (int(words[0]) << 31) ^ int(words[1])


@draws
def test_rows_are_those_of_the_larger_batch(draw):
    whole = draw(12, rng.generator(3))
    parts = [draw(4, rng.Rows(rng.generator(3), first, 12)) for first in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts))
    with pytest.raises(ValueError, match="has no rows for 4 samples"):
        draw(4, rng.Rows(rng.generator(3), 10, 12))


@draws
def test_a_sample_with_its_own_generator_does_not_depend_on_its_batch(draw):
    together = draw(6, [rng.generator(0, i) for i in range(6)])
    assert torch.equal(together[3:4], draw(1, [rng.generator(0, 3)]))
    assert torch.equal(together[3:4], draw(1, rng.generator(0, 3)))
    with pytest.raises(ValueError, match="2 generators for 6 samples"):
        draw(6, [rng.generator(0), rng.generator(1)])


@draws
def test_no_samples_need_no_generators(draw):
    assert draw(0, []).shape == draw(0, rng.generator(0)).shape
    assert len(draw(0, [])) == 0


@draws
def test_without_a_generator_the_global_one_is_used(draw):
    torch.manual_seed(3)
    first = draw(5, None)
    torch.manual_seed(3)
    assert torch.equal(first, draw(5, None))


def test_numbers_have_their_distributions():
    n = 200_000
    normal = rng.normal((n,), rng.generator(1), like=torch.zeros(1, dtype=torch.float64))
    uniform = rng.uniform(n, rng.generator(2))
    gamma = rng.gamma(2.5, n, rng.generator(3))
    assert gamma.dtype == uniform.dtype == torch.float64
    for x, mean, std in ((normal, 0, 1), (uniform, 0.5, 12**-0.5), (gamma, 2.5, 2.5**0.5)):
        assert float(x.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(n))
        assert float(x.std()) == pytest.approx(std, rel=0.01)
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1


@pytest.mark.parametrize("value", [0, np.uint32(2**32 - 1), torch.tensor(7), True])
def test_integers_of_any_library_are_counters(value):
    assert rng.natural("n", value) == int(value)
    assert type(rng.natural("n", value)) is int


@pytest.mark.parametrize("value", [-1, 2**32, 2.5, "3", None, torch.ones(2)])
def test_values_that_are_no_counters_are_named(value):
    with pytest.raises(ValueError, match=r"^n = .*: expected an integer from 0 to 2\^32 - 1$"):
        rng.natural("n", value)


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize(
    "call",
    [
        lambda seed: Toy(seed=seed),
        lambda seed: Digits(seed=seed),
        lambda seed: PFGM(TimeMLP((2,), 0, 0), Toy(size=9).summary, DenoisingLoss(), seed=seed),
        lambda seed: rng.generator(seed, 1),
    ],
)
def test_seeds_of_runs_and_data_are_counters(call, seed):
    with pytest.raises(ValueError, match=f"seed = {seed}: expected an integer from 0 to"):
        call(seed)


def test_a_tensor_of_one_number_is_a_seed():
    assert torch.equal(Toy(size=9, seed=torch.tensor(3)).train.x, Toy(size=9, seed=3).train.x)
