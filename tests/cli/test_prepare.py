"""The commands `features` and `advise`."""

import pytest

from pfgm.cli import prepare
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out=a.pt"], "out = a.pt: give a file ending in .safetensors"),
        (["--out=a.safetensors", "--width=5"], "width = 5"),
        (["--out=a.safetensors", "--steps=0"], "steps = 0"),
        (
            ["--out=a.safetensors", "--config", str(ROOT / "configs" / "heart.yaml")],
            r"features need images, not samples of shape \(2,\)",
        ),
    ],
)
def test_bad_options_of_features_raise_by_name(words, message, tmp_path):
    (tmp_path / "empty.yaml").write_text("model: 3")
    with pytest.raises(ValueError, match=r"empty.yaml has no data section"):
        prepare.prepare(["features", f"--config={tmp_path}/empty.yaml", *words])
    config = [] if "--config" in words else ["--config", str(ROOT / "configs" / "digits.yaml")]
    with pytest.raises(ValueError, match=message):
        prepare.prepare(["features", *config, *words])
