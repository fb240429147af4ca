"""Objects that record their constructor arguments, and are built again from them."""

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import pfgm
from pfgm.core.arguments import ArgumentTypeError
from pfgm.core.configurable import ALIASES, Configurable, build, public_path, renamed, to_json, with_defaults
from pfgm.nn import TimeMLP, UNet
from pfgm.training.losses import DenoisingLoss
from pfgm.training.noise import LogNormal


class Law(Configurable):
    def __init__(self, scale: float, *, base: Configurable | None = None, table: dict | None = None, power: int = 2):
        self.scale = scale


class Elsewhere(pfgm.nn.Network):
    """A network that is not of this package."""

    def __init__(self, shape, num_classes=0, extra_channels=0):
        super().__init__()


HERE = f"{__name__}.Law"


def test_a_spec_holds_all_arguments_as_strict_json():
    spec = Law(math.inf, base=LogNormal(-1, 1.5), table={"path": Path("a"), 1: torch.tensor([1.0, -math.inf])}).spec
    assert spec["class_path"] == HERE
    inner = spec["init_args"].pop("base")
    assert inner["class_path"] == "pfgm.training.LogNormal"
    assert list(inner["init_args"].values()) == [-1, 1.5]
    assert spec["init_args"] == {"scale": "inf", "table": {"path": "a", "1": [1.0, "-inf"]}, "power": 2}
    json.dumps(spec, allow_nan=False)


def test_a_spec_builds_an_equal_object():
    net = TimeMLP((2,), 3, 1, width=8)
    again = build(net.spec)
    assert type(again) is TimeMLP
    assert again.spec == net.spec
    assert build(Law(3.0, base=Law(1.0)).spec, trust=[__name__]).spec == Law(3.0, base=Law(1.0)).spec


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda law: pickle.loads(pickle.dumps(law))])
def test_copies_keep_their_spec(twin):
    law = Law(3.0, power=4)
    assert twin(law).spec == law.spec


def test_argument_types_are_checked_on_construction():
    with pytest.raises(ArgumentTypeError, match="scale = 'wide': expected a number"):
        Law("wide")
    with pytest.raises(TypeError, match="colour"):
        Law(1.0, colour=2)


def test_arguments_without_a_json_form_are_refused():
    for value in (object(), torch.nn.Linear(3, 3), {"a": [object()]}):
        with pytest.raises(ArgumentTypeError, match=r"inherit from pfgm\.nn\.Network"):
            to_json(value)
    assert to_json(np.float32(0.5)) == 0.5


def test_classes_are_named_by_the_room_that_exports_them():
    assert public_path(UNet) == "pfgm.nn.UNet"
    assert public_path(DenoisingLoss) == "pfgm.training.DenoisingLoss"
    assert public_path(Configurable) == "pfgm.core.configurable.Configurable"
    assert public_path(Law) == HERE


@pytest.mark.parametrize(("old", "new"), ALIASES.items())
def test_aliases_name_classes_by_their_public_path(old, new):
    room, _, name = new.rpartition(".")
    class_ = getattr(__import__(room, fromlist=[name]), name)
    assert public_path(class_) == new
    assert renamed({"net": [{"class_path": old}]}) == {"net": [{"class_path": new}]}


def test_only_class_paths_are_renamed():
    old = "pfgm.loss.DenoisingLoss"
    assert renamed({"class_path": "pfgm.nn.UNet", "note": old, "list": [old]}) == {
        "class_path": "pfgm.nn.UNet",
        "note": old,
        "list": [old],
    }
    assert build({"class_path": old, "init_args": {}}).spec["class_path"] == "pfgm.training.DenoisingLoss"


def test_missing_arguments_of_earlier_versions_take_their_defaults():
    now = Law(1.0, base=Law(2.0, power=5), power=4).spec
    old = {"class_path": HERE, "init_args": {"scale": 3.0, "base": {"class_path": HERE, "init_args": {"scale": 2.0}}}}
    completed = with_defaults(old, now)
    assert completed == Law(3.0, base=Law(2.0)).spec, "and not those of the present object"
    assert with_defaults(old, {**now, "class_path": "pfgm.nn.UNet"}) == old
    assert with_defaults(7, now) == 7


def test_classes_from_elsewhere_need_trust():
    spec = Elsewhere((3,)).spec
    module = __name__.replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"class_path = '{module}\.Elsewhere' is outside pfgm\. .*pass trust=\['{module}'\]"):
        build(spec)
    assert isinstance(build(spec, trust=[__name__]), Elsewhere)
    assert isinstance(build(spec, trust=["tests"]), Elsewhere), "trust in a package includes its modules"


@pytest.mark.parametrize(
    "path", ["os.system", "pfgm.storage.os", "pfgm.core.rng.generator", "pfgm.none.Thing", "builtins.eval", "pfgm", ""]
)
def test_paths_that_lead_to_no_storable_class_are_refused(path):
    with pytest.raises(ValueError, match="class_path"):
        build({"class_path": path, "init_args": {}})


@pytest.mark.parametrize("path", ["pfgm_evil.nn.Net", "benchmarks.faulty.payload.Net", "pfgm.nn.blocks.Resample"])
def test_class_paths_end_at_a_dot_and_name_what_is_made_to_be_stored(path):
    """Trust in a module does not cover others whose name begins the same, and parts of networks are no networks."""
    message = "is not a class that" if path.startswith("pfgm.") else "is outside pfgm"
    with pytest.raises(ValueError, match=message):
        build({"class_path": path, "init_args": {}}, trust=["benchmarks.faulty.pay", "bench"], kind=torch.nn.Module)


def test_a_class_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="is not a class that a checkpoint may name"):
        build(LogNormal(0.0, 1.0).spec, kind=torch.nn.Module)


def test_stored_arguments_that_the_class_does_not_take_are_named():
    with pytest.raises(ValueError, match=r"pfgm\.nn\.TimeMLP cannot be made from the stored arguments \['colour'\]"):
        build({"class_path": "pfgm.nn.TimeMLP", "init_args": {"colour": 1}})


@pytest.mark.parametrize(
    "spec", [7, None, {}, {"class_path": "a"}, {"class_path": 3, "init_args": {}}, {"class_path": "a.b", "init_args": []}]
)
def test_what_is_not_a_spec_is_named(spec):
    with pytest.raises(TypeError, match=r"spec = .*: expected a mapping with class_path and init_args"):
        build(spec)
