"""Words of a command line: configurations by name, pairs, old class paths, seeds, repeated values, masks and devices."""

import numpy as np
import pytest
import torch

from pfgm.cli.arguments import find_config, load_settings, prepare_words, read_config, shipped_configs
from pfgm.cli.options import choose_device, parse_seeds, read_mask, repeat_in_turn
from tests.helpers import ROOT

CONFIGS = ROOT / "configs"


def test_a_pair_after_inpaint_is_joined():
    assert prepare_words(["c", "--inpaint", "a", "b", "--n", "2"]) == ["c", "--inpaint", '["a", "b"]', "--n", "2"]
    for words in (["c", "--n", "2"], ["c", "--inpaint", "[a,b]"], ["c", "--inpaint", "a", "--n", "2"], ["c", "--inpaint"]):
        assert prepare_words(words) == words


@pytest.mark.parametrize("text", ["a: 1\na: 2", "x: {a: 1, b: {c: 1, c: 2}}", "x: [{a: 1, a: 1}]"])
def test_repeated_keys_are_refused_at_every_depth(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"is not valid YAML: . is given twice"):
        read_config(tmp_path / "a.yaml")


def test_settings_keep_their_types_and_rename_old_class_paths():
    text = "a: 2e-3\nb: {a: .inf, c: [1, x]}\nnet: {class_path: pfgm.nn.unet.UNet}"
    assert load_settings(text) == {"a": 0.002, "b": {"a": float("inf"), "c": [1, "x"]}, "net": {"class_path": "pfgm.nn.UNet"}}
    assert prepare_words(["fit", "--model.net=pfgm.nn.unet.UNet"]) == ["fit", "--model.net=pfgm.nn.UNet"]


@pytest.mark.parametrize("words", [["--config", "digits"], ["--config=digits.yaml"], ["-c", "digits"], ["-c=digits"]])
def test_shipped_configurations_are_found_by_name_from_any_folder(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder does not hide the configuration
    assert prepare_words(["fit", *words, "--x=1"])[2:] == [str(CONFIGS / "digits.yaml"), "--x=1"]


def test_files_here_come_before_shipped_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "heart.yaml"):
        (tmp_path / name).write_text("run_dir: a")
        assert str(find_config(name)) == name
    assert find_config("heart") == CONFIGS / "heart.yaml"


@pytest.mark.parametrize("value", ["circle", "circle.yaml", "elsewhere/digits.yaml", ""])
def test_missing_configurations_list_the_shipped_ones(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"^config = {value} is neither a file .*celeba64, .*digits, .*heart\.$"):
        prepare_words(["fit", f"--config={value}"])


def test_the_shipped_configurations_are_those_of_the_repository():
    assert sorted(shipped_configs().glob("*.yaml")) == sorted(CONFIGS.iterdir())


def test_seeds_are_numbers_and_rising_ranges():
    assert parse_seeds("1,2, 5-8") == [1, 2, 5, 6, 7, 8]
    for text in ("", "a", "3-1", "-1", "1,,2", "0-10000000"):
        with pytest.raises(ValueError, match="seeds = "):
            parse_seeds(text)


def test_values_repeat_in_turn():
    assert repeat_in_turn("labels", [1, 7], 4) == [1, 7, 1, 7]
    assert repeat_in_turn("labels", [3], 4) == repeat_in_turn("labels", 3, 4) == 3
    assert repeat_in_turn("condition", torch.tensor([[0], [1]]), 4).flatten().tolist() == [0, 1, 0, 1]
    assert repeat_in_turn("condition", None, 4) is None
    for values in ([1, 2, 3], []):
        with pytest.raises(ValueError, match=rf"^labels: {len(values)}"):
            repeat_in_turn("labels", values, 4)


def test_masks_of_arrays_are_expanded_over_channels(tmp_path):
    half = np.zeros((2, 2))
    half[0] = 1
    np.save(tmp_path / "half.npy", half)
    mask = read_mask(tmp_path / "half.npy", (3, 2, 2))
    assert mask.shape == (3, 2, 2)
    assert torch.equal(mask[2], torch.tensor([[True, True], [False, False]]))


def test_unusable_devices_are_named():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"^device = '{name}'"):
            choose_device(name)
