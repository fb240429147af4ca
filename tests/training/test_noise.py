"""Noise levels of training against their published distributions, and recommended ranges."""

import math
from pathlib import Path

import pytest
import torch
from scipy import stats

import pfgm
from pfgm.cli import train
from pfgm.core import rng
from pfgm.core.configurable import build
from pfgm.core.tensors import norm
from pfgm.training.losses import DenoisingLoss
from pfgm.training.module import PFGM
from pfgm.training.noise import (
    LogNormal,
    LogUniform,
    NoiseLaw,
    PoissonFlowNoise,
    ScaledLogNormal,
    recommended_sigma_max,
    recommended_sigma_min,
)

F64 = torch.float64
Y = torch.zeros(4000, 8, dtype=F64)
OLD_LEVELS = [0.912799712295358, 0.10369771777972385, 0.09935149393027538]


def test_noise_levels_follow_their_distributions():
    levels = LogNormal(-0.9, 1.4).sample(Y, 0.3, rng.generator(1))
    assert stats.kstest(levels.log().numpy(), stats.norm(-0.9, 1.4).cdf).pvalue > 1e-3
    levels = ScaledLogNormal(-0.5, 1.2).sample(Y, 0.3, rng.generator(1))
    assert stats.kstest((levels / 0.3).log().numpy(), stats.norm(-0.5, 1.2).cdf).pvalue > 1e-3
    levels = LogUniform(0.01, 50).sample(Y, 0.3, rng.generator(1))
    low, high = math.log(0.003), math.log(15)
    assert stats.kstest(levels.log().numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_log_normal_equals_the_scaled_one_with_its_mean_shifted_by_log_sigma_data():
    for sigma_data in (0.5, 3.0):
        levels = LogNormal(-0.5 + math.log(sigma_data), 1.2).sample(Y, sigma_data, rng.generator(1))
        scaled = ScaledLogNormal(-0.5, 1.2).sample(Y, sigma_data, rng.generator(1))
        torch.testing.assert_close(levels, scaled, rtol=1e-12, atol=0)


def test_noise_of_version_0_1_keeps_its_meaning():
    """Its LogNormal was relative to sigma_data, and so was the default of its loss. The values were drawn with that version."""
    old = build({"class_path": "pfgm.noise.LogNormal", "init_args": {"mean": -0.3, "std": 1.1}})
    assert old.spec == {"class_path": "pfgm.training.ScaledLogNormal", "init_args": {"mean": -0.3, "std": 1.1}}
    assert old.sample(Y[:3], 0.7, rng.generator(5)).tolist() == pytest.approx(OLD_LEVELS, rel=1e-14)
    assert DenoisingLoss().noise.spec == ScaledLogNormal(-0.5, 1.2).spec


LAW = """
import torch
from pfgm.core import rng
from pfgm.training import NoiseLaw

class Triangular(NoiseLaw):
    def __init__(self, top: float = 4.0):
        self.top = top

    def sample(self, y, sigma_data, generator=None):
        u, v = (rng.uniform(len(y), generator, device=y.device) for _ in range(2))
        return sigma_data * self.top * (u + v) / 2 + 1e-3
"""


@pytest.mark.process
def test_a_custom_noise_law_trains_resumes_and_loads_from_a_trusted_module(tmp_path, monkeypatch):
    (tmp_path / "my_laws.py").write_text(LAW)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Path(__file__).parent.parent.parent / "configs" / "heart.yaml"
    words = ["fit", "--config", str(config), "--data.init_args.size=100", "--model.D=4", "--trainer.accelerator=cpu"]
    words += ["--model.loss=pfgm.training.DenoisingLoss", "--model.loss.init_args.noise=my_laws.Triangular", "--grid.n=0"]
    words += ["--model.loss.init_args.noise.init_args.top=3", f"--run_dir={tmp_path / 'run'}"]
    for steps in (2, 4):
        module = train.main([*words, f"--trainer.max_steps={steps}"]).model
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"class_path 'my_laws\.Triangular' is outside pfgm.*trust=\['my_laws'\]"):
        PFGM.load_from_checkpoint(checkpoint)
    loaded = PFGM.load_from_checkpoint(checkpoint, trust=["my_laws"])
    assert type(loaded.loss.noise).__name__ == "Triangular"
    assert loaded.loss.noise.top == 3
    y = torch.zeros(5000, 2)
    u = loaded.loss.noise.sample(y, 1.0, rng.generator(1)) / 3
    assert stats.kstest(u.numpy(), stats.triang(0.5).cdf).pvalue > 1e-3
    assert torch.equal(pfgm.load(checkpoint).sample(2).x, module.flow.eval().sample(2).x), "the flow does not need the law"


def test_a_noise_law_without_sample_is_refused():
    with pytest.raises(TypeError, match="abstract"):
        NoiseLaw()


def test_poisson_flow_noise_has_the_published_distribution():
    """log z and log |x - y| are each a uniform exponent plus the log of a chi, and independent given the exponent."""
    noise = PoissonFlowNoise(sigma_end=0.01, tau=0.03, M=200)
    x, z = noise.perturb(Y, 1.0, rng.generator(2))
    m = torch.rand(200000, generator=rng.generator(3), dtype=F64) * 200
    growth = 0.01 * 1.03**m
    expected_z = growth * torch.randn(200000, generator=rng.generator(4), dtype=F64).abs()
    expected_x = growth * norm(torch.randn(200000, 8, generator=rng.generator(5), dtype=F64))
    assert stats.ks_2samp(z.numpy(), expected_z.numpy()).pvalue > 1e-3
    assert stats.ks_2samp(norm(x).numpy(), expected_x.numpy()).pvalue > 1e-3
    ratio = norm(x) / z
    assert stats.kstest((ratio.square() / 8).numpy(), stats.f(8, 1).cdf).pvalue > 1e-3, "the angle is that of D = 1"


def test_exponent_and_height_follow_the_published_rule():
    """By hand for CIFAR-10-like numbers: 28²/(2 sqrt(3072) 1e-4) = 70726, .75 ln 70726 / ln 1.03 = 283.33."""
    noise = PoissonFlowNoise()
    assert noise.exponent(28.0, 3072) == pytest.approx(283.33, abs=0.01)
    assert noise.z_max(28.0, 3072) == pytest.approx(math.sqrt(2 / math.pi) * 0.01 * 1.03 ** noise.exponent(28.0, 3072))
    assert PoissonFlowNoise(M=100).exponent(28.0, 3072) == 100


def test_recommended_values_are_those_of_edm():
    """EDM states P_mean = -1.2 and P_std = 1.2 for sigma_data = 0.5."""
    assert (recommended_sigma_max(0.5), recommended_sigma_min(0.5)) == (40.0, 0.01)
    assert (LogNormal().P_mean, LogNormal().P_std) == (-1.2, 1.2)
    assert (ScaledLogNormal().mean + math.log(0.5), ScaledLogNormal().std) == pytest.approx((-1.2, 1.2), abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(math.inf), "P_mean = inf"),
        (lambda: LogNormal(0.0, -1.0), "P_std = -1"),
        (lambda: ScaledLogNormal(math.nan), "mean = nan"),
        (lambda: ScaledLogNormal(0.0, 0.0), "std = 0"),
        (lambda: LogUniform(2.0, 1.0), "low = 2.0, high = 1.0"),
        (lambda: PoissonFlowNoise(tau=-1.0), "tau = -1"),
        (lambda: PoissonFlowNoise(M=0.0), "M = 0"),
        (lambda: PoissonFlowNoise(M=1e5).z_max(1.0, 3), r"M = 100000, .*between 1 and e\^100"),
        (lambda: PoissonFlowNoise(sigma_end=1.0).z_max(0.1, 3), "M = -"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
