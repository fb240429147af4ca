"""The shipped configurations of published models."""

import pytest
import torch
import yaml

from pfgm.core.configurable import build
from pfgm.nn import UNet
from pfgm.theory.data_summary import DataSummary
from pfgm.training.module import PFGM
from tests.helpers import ROOT

PUBLISHED = [("cifar10_pfgmpp", None), ("cifar10_pfgmpp", 2048), ("cifar10_edm", None), ("cifar10_pfgm", None)]
PUBLISHED += [("ffhq64", None), ("celeba64", None), ("church256", None)]


@pytest.mark.parametrize(("config", "D"), PUBLISHED)
def test_published_configurations_make_their_models(config, D):
    """Build them at full size on the meta device."""
    settings = yaml.safe_load((ROOT / "configs" / f"{config}.yaml").read_text())
    data, model = settings["data"]["init_args"], settings["model"]
    size, D, net = data.get("size", 32), D or model["D"], model.pop("net")["init_args"]
    shape = (3, size, size)
    options = {name: build(value) if isinstance(value, dict) else value for name, value in model.items()}
    with torch.device("meta"):
        options["net"] = UNet(shape, extra_channels=options["loss"].extra_channels, **net)
    summary = DataSummary(shape, 0.5, 0.5 * (3 * size**2) ** 0.5, 0.05, scale=127.5, mean=torch.zeros(shape))
    module = PFGM(**options | {"data": summary, "D": D})
    assert float(D) == module.flow.kernel.D
    assert [size // 2**level for level in net["attention_levels"]] == [16]
    assert next(module.flow.denoiser.parameters()).is_meta
    millions = {"cifar10_pfgm": 61.8, "ffhq64": 61.8, "celeba64": 61.8, "church256": 124.1}.get(config, 55.7)
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 1) == millions


def test_configurations_that_should_differ_in_one_thing_do():
    edm, pfgmpp = (yaml.safe_load((ROOT / "configs" / f"cifar10_{name}.yaml").read_text()) for name in ("edm", "pfgmpp"))
    assert (edm["model"].pop("D"), pfgmpp["model"].pop("D")) == ("inf", 128)
    assert (edm.pop("run_dir"), pfgmpp.pop("run_dir")) == ("runs/cifar10_edm", "runs/cifar10_pfgmpp")
    assert edm == pfgmpp
