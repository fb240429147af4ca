"""sample.py beyond plain drawing: encode, decode, interpolate, vary, inpaint, conditions and guidance from files."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pfgm
from pfgm.cli import main
from pfgm.cli.arguments import prepare_words
from pfgm.files.arrays import read_inputs
from pfgm.files.images import read_images
from pfgm.sampling.inverse import Mask, Measurement
from pfgm.sampling.latents import Latent
from tests.helpers import conditional, labelled, make_flow


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with exports, two images (and one too large), a mask, arrays."""
    monkeypatch.chdir(tmp_path)
    make_flow(scale=1.0).save_pretrained("plain")
    labelled().save_pretrained("labelled")
    conditional((1, 8, 8), (1, 4, 4), value_range=(-1.0, 1.0)).save_pretrained("superres")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    os.mkdir("images")
    for i in (0, 1):
        Image.fromarray(pixels[i]).save(f"images/{i}.png")
    Image.fromarray(np.kron(pixels[2], np.ones((2, 2), dtype=np.uint8))).save("large.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:3] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save("white.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save("float.tif")
    np.save("values.npy", np.full((8, 8), 0.3))
    np.save("complex.npy", np.zeros((1, 8, 8), dtype=complex))
    make_flow(64.0).save_pretrained("other")
    make_flow(sigma_max=50.0).save_pretrained("higher")
    latents = {"t": np.zeros((2, 1, 8, 8)), "level": 40.0, "plane": True, "D": 128.0}
    np.savez("good.npz", **latents)
    np.savez("bad.npz", **(latents | {"level": np.ones(2)}))
    np.save("low.npy", np.zeros((3, 1, 4, 4), dtype=np.float32))
    np.savez("training.npz", x=np.zeros((3, 1, 8, 8)), conditions=np.full((2, 1, 4, 4), 0.5, dtype=np.float32))
    return pixels


def user(pixels):
    """8-bit pixels in the units of the flow's value_range."""
    return torch.from_numpy(pixels / 127.5 - 1).float()[:, None]


@pytest.mark.process
def test_encoding_and_decoding_images_gives_them_back(here, capsys):
    main.sample(["encode", "plain", "images", "--out=new/latents.npz", "--rtol=1e-4", "--atol=1e-4"])
    median, worst = re.search(r"median (\S+), worst (\S+),", capsys.readouterr().out).groups()
    assert float(median) <= float(worst) < 0.01
    main.sample(["decode", "plain", "new/latents.npz", "--out=back.npz", "--rtol=1e-4", "--atol=1e-4"])
    back = np.load("back.npz")["x"]
    difference = np.sqrt(((back - user(here[:2]).numpy()) ** 2).mean((1, 2, 3)))
    assert difference.max() == pytest.approx(float(worst), rel=0.1)
    main.sample(["decode", "plain", "new/latents.npz", "--out=folder"])
    for i in (0, 1):
        with Image.open(f"folder/{i:06d}.png") as image:
            assert np.abs(np.asarray(image.convert("L")).astype(int) - here[i]).max() <= 2


@pytest.mark.process
def test_labels_are_kept_with_the_latents(here):
    main.sample(["encode", "labelled", "images/0.png", "--labels=2", "--out=latents.pt", "--rtol=1e-3"])
    assert torch.load("latents.pt")["labels"].tolist() == [2]
    main.sample(["decode", "labelled", "latents.pt", "--out=own.npz"])
    main.sample(["decode", "labelled", "latents.pt", "--labels=1", "--out=other.npz"])
    own, other = (torch.from_numpy(np.load(f"{name}.npz")["x"]) for name in ("own", "other"))
    assert float((own - user(here[:1])).abs().max()) < 0.02
    assert float((other - own).abs().max()) > 0.02


@pytest.mark.process
def test_interpolation_begins_and_ends_at_its_images(here, capsys):
    main.sample(["interpolate", "plain", "--images=[images/0.png,images/1.png]", "--points=4", "--out=way.npz"])
    way = np.load("way.npz")["x"]
    assert way.shape == (1, 4, 1, 8, 8)
    assert np.abs(way[0, [0, 3]] - user(here[:2]).numpy()).max() < 0.05
    main.sample(["interpolate", "plain", "--seeds=3,7,9", "--points=5", "--out=way.png"])
    assert "2 interpolations of 5 points" in capsys.readouterr().out
    with Image.open("way.png") as strip:
        assert strip.size == (5 * 34 + 2, 2 * 34 + 2)
    drawn = pfgm.load("plain").sample(seeds=[3, 7, 9], preset="reference").x
    main.sample(["interpolate", "plain", "--seeds=3,7,9", "--points=2", "--out=ends.npz"])
    ends = torch.from_numpy(np.load("ends.npz")["x"])
    main.sample(["interpolate", "plain", "--seeds=3,7,9", "--points=2", "--out=cold.npz", "--temperature=0.5"])
    assert not np.allclose(np.load("cold.npz")["x"], ends, atol=1e-2)
    assert float((ends[0, 0] - drawn[0]).abs().max()) < 0.1, "up to the last denoising"
    assert torch.equal(ends[0, 1], ends[1, 0])


def test_variations_keep_the_image_at_low_levels(here):
    main.sample(["vary", "plain", "images/1.png", "--level=[0.02,30]", "--n=3", "--out=v.npz"])
    v = torch.from_numpy(np.load("v.npz")["x"])
    assert v.shape == (3, 3, 1, 8, 8)
    assert torch.allclose(v[0], user(here[1:2]).expand(3, -1, -1, -1), atol=1e-6)
    near, far = ((v[k] - v[0]).square().mean().sqrt() for k in (1, 2))
    assert float(near) < 0.1 < float(far)
    three = user(here[1:2]).expand(3, -1, -1, -1)
    assert torch.allclose(v[2], pfgm.load("plain").vary(three, 30.0).x, atol=1e-5)
    main.sample(["vary", "plain", "images/1.png", "--level=30", "--n=3", "--seed=5", "--out=v.npz"])
    assert np.allclose(np.load("v.npz")["x"][1], pfgm.load("plain").vary(three, 30.0, seed=5).x, atol=1e-5)


@pytest.mark.process
def test_inpainting_keeps_what_the_mask_leaves(here):
    options = ["--n=2", "--measurement_noise=0.05", "--out=x.npz"]
    main.sample(["plain", "--inpaint", "images/0.png", "mask.png", *options])
    x = torch.from_numpy(np.load("x.npz")["x"])
    known = torch.ones(1, 8, 8, dtype=torch.bool)
    known[:, :3] = False
    mask = Mask(known)
    expected = pfgm.load("plain").sample(2, measurement=Measurement(mask, mask(user(here[:1]))[0], 0.05)).x
    assert torch.allclose(x, expected, atol=1e-3)
    for array in (~known.numpy(), ~known.numpy()[0]):
        np.save("mask.npy", array)
        main.sample(["plain", "--inpaint=[images/0.png,mask.npy]", *options])
        assert torch.allclose(torch.from_numpy(np.load("x.npz")["x"]), expected, atol=1e-3)


def test_the_least_noise_of_a_measurement_is_the_models(here):
    main.sample(["plain", "--inpaint", "images/0.png", "mask.png", "--n=1", "--out=x.npz"])
    first = np.load("x.npz")["x"]
    main.sample(["plain", "--inpaint", "images/0.png", "mask.png", "--n=1", "--out=x.npz", "--measurement_noise=0.01"])
    assert np.array_equal(np.load("x.npz")["x"], first)


@pytest.mark.process
def test_latents_of_a_conditional_model_need_its_condition_again(here):
    np.save("one.npy", np.full((1, 4, 4), 0.5, dtype=np.float32))
    main.sample(["encode", "superres", "images", "--condition=one.npy", "--out=latents.npz", "--rtol=1e-4", "--atol=1e-4"])
    main.sample(["decode", "superres", "latents.npz", "--condition=one.npy", "--out=x.npz", "--rtol=1e-4", "--atol=1e-4"])
    assert np.abs(np.load("x.npz")["x"] - user(here[:2]).numpy()).max() < 0.05
    with pytest.raises(SystemExit, match="2"):
        main.sample(["decode", "superres", "latents.npz", "--out=x.npz"])


def test_images_of_another_size_are_fitted_and_named(here, capsys):
    main.sample(["vary", "plain", "large.png", "--level=1", "--n=1", "--out=v.npz"])
    assert "images = large.png: 1 of 1 images scaled and cropped to 8 x 8 pixels" in capsys.readouterr().err
    Path("training").mkdir()
    for name in ("large.png", "mask.png"):
        os.link(name, f"training/{name}")
    data = pfgm.data.ImageDataModule("training", size=8, held_out="training")
    assert np.allclose(np.load("v.npz")["x"][0], user(data.train.x[:1, 0].numpy()), atol=1e-6)


@pytest.mark.process
def test_latents_and_levels_are_in_the_units_of_the_data(here):
    make_flow(scale=3.0).save_pretrained("scaled")
    main.sample(["encode", "scaled", "images", "--out=latents.npz", "--rtol=1e-4", "--atol=1e-4"])
    main.sample(["decode", "scaled", "latents.npz", "--out=x.npz", "--rtol=1e-4", "--atol=1e-4"])
    assert np.abs(np.load("x.npz")["x"] - user(here[:2]).numpy()).max() < 0.05
    main.sample(["interpolate", "scaled", "--seeds=3-4", "--points=2", "--out=ends.npz"])
    flow = pfgm.load("scaled")
    prior = flow.sampler().prior([(3, 0)])
    expected = flow.decode(Latent(prior.t.float(), 120.0, "hemisphere"), preset="reference")
    assert np.abs(np.load("ends.npz")["x"][0, 0] - expected[0].numpy()).max() < 1e-4


def test_samples_of_one_number_are_read_as_a_column(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5.0))
    assert read_inputs(tmp_path / "a.npy", (1,), None, "x").flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.process
def test_conditions_come_from_arrays_and_images(here):
    main.sample(["superres", "--condition=low.npy", "--out=a.npz", "--trajectory=way.npz"])
    assert np.load("a.npz")["x"].shape == (3, 1, 8, 8), "one for each condition"
    main.sample(["superres", "--condition=training.npz", "--out=b.npz"])
    expected = pfgm.load("superres").sample(2, condition=torch.full((1, 4, 4), 0.5)).x
    assert np.allclose(np.load("b.npz")["x"], expected, atol=1e-5)
    main.sample(["superres", "--condition=low.npy", "--n=6", "--out=grid.png", "--columns=3"])
    with Image.open("grid.png") as grid:
        assert grid.size == (3 * 34 + 2, 2 * 34 + 2), "conditions in turn"
    Image.fromarray(np.full((4, 4), 255, dtype=np.uint8)).save("bright.png")
    main.sample(["superres", "--condition=bright.png", "--n=2", "--out=c.npz"])
    expected = pfgm.load("superres").sample(2, condition=torch.ones(1, 4, 4)).x
    assert np.allclose(np.load("c.npz")["x"], expected, atol=1e-5)


def test_guidance_and_temperature_reach_the_sampler(here, capsys):
    main.sample(["labelled", "--n=2", "--labels=1", "--guidance=[2,3]", "--temperature=0.5", "--out=x.npz", "--preset=fast"])
    assert "12 network calls" in capsys.readouterr().out
    flow = pfgm.load("labelled")
    expected = flow.sample(2, labels=1, guidance=[2, 3], temperature=0.5, preset="fast").x
    assert np.allclose(np.load("x.npz")["x"], expected, atol=1e-5)
    main.sample(["plain", "--n=2", "--guide=plain", "--guidance=2", "--guidance_interval=[0.1,1]", "--out=y.npz"])
    assert np.allclose(np.load("y.npz")["x"], pfgm.load("plain").sample(2).x, atol=1e-4), "a guide like itself leads nowhere"
    prior = flow.sampler(temperature=0.5).prior([(0, 0)]).t
    assert torch.allclose(prior, 0.5 * flow.sampler().prior([(0, 0)]).t)


@pytest.mark.process
def test_a_film_shows_the_first_of_many_guided_samples(here):
    main.sample(["superres", "--condition=low.npy", "--out=a.npz", "--trajectory=way.png", "--preset=fast"])
    main.sample(
        ["labelled", "--n=70", "--labels=1", "--guidance", str([2.0] * 70), "--out=b.npz", "--trajectory=way.gif", "--steps=2"]
    )
    with Image.open("way.gif") as film:
        assert film.n_frames > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "plain", "none.png"], "images = none.png does not exist"),
        (["encode", "plain", "plain"], "images = plain: no images"),
        (["encode", "plain", "low.npy"], r"images = low.npy holds \(3, 1, 4, 4\) torch.float32"),
        (["encode", "plain", "images", "--out=x.png"], "out = x.png: .png is not supported here. Use one of .npz, .pt"),
        (["encode", "labelled", "images", "--labels=5"], "labels = 5: this model's labels are the integers 0..2"),
        (["encode", "plain", "images", "--labels=1"], "trained without labels"),
        (["encode", "superres", "images"], "condition = None"),
        (["decode", "plain", "low.npy"], "latents = low.npy has no array 'level', only"),
        (["encode", "plain", "images", "--method=ab3"], "steps = None: ab3 takes fixed steps"),
        (["encode", "plain", "training.npz", "--out=training.npz"], "out = training.npz: another argument names this file"),
        (["encode", "plain", "complex.npy"], r"complex.npy holds .* torch.complex"),
        (["encode", "plain", "float.tif"], r"images = float.tif cannot be used: its pixels have no black and white \(mode F\)"),
        (["decode", "plain", "good.npz", "--out=good.npz"], "out = good.npz: another argument names this file"),
        (["decode", "other", "good.npz"], "they are of D = 128, this model's D is 64"),
        (["decode", "higher", "good.npz"], "they are of level 40, this model's of 50"),
        (["decode", "plain", "bad.npz"], "latents = bad.npz: not what encode writes"),
        (["interpolate", "plain", "--images=[]"], "images is empty"),
        (["interpolate", "plain"], "images = None, seeds = None: give one of them"),
        (["interpolate", "plain", "--seeds=3"], "give two or more"),
        (["interpolate", "plain", "--seeds=3-4", "--points=1"], "points = 1: must be an integer from 2"),
        (["interpolate", "plain", "--seeds=3-4", "--points=100001"], "points = 100001: must be .* to 100000"),
        (["interpolate", "plain", "--seeds=3-4", "--out=x.jpg"], "out = x.jpg"),
        (["vary", "plain", "images", "--level=[0.001]"], "level = 0.001 must lie above 0.01, up to 40"),
        (["vary", "plain", "images", "--level=[41]"], "level = 41.0 must lie"),
        (["vary", "plain", "images", "--level=[]"], r"level = \[\]: give at least one column and one level"),
        (["vary", "plain", "images", "--level=[1]", "--n=0"], "n = 0"),
        (["vary", "plain", "images", "--level=[1]", "--n=3"], "n = 3: images has 2 images, each a column"),
        (["vary", "plain", "images", "--level=[1]", "--out=images"], "out = images: a folder is not supported"),
        (["plain", "--inpaint", "images/0.png", "large.png"], "inpaint = large.png has 16 x 16 pixels. Resize it to 8 x 8"),
        (["plain", "--inpaint", "images", "mask.png"], "inpaint = images: 2 images; give one"),
        (["plain", "--inpaint", "images/0.png", "mask.png", "--measurement_noise=0"], "measurement_noise = 0"),
        (["plain", "--inpaint", "images/0.png", "white.png"], "white.png: the mask is the same everywhere"),
        (["plain", "--inpaint", "images/0.png", "values.npy"], r"values.npy: \(8, 8\) is no mask of \(1, 8, 8\)"),
        (["plain", "--inpaint", "mask.png", "mask.png", "--out=mask.png"], "out = mask.png: another argument names this file"),
        (["plain", "--measurement_noise=1"], "nothing is measured; give inpaint as well"),
        (["plain", "--condition=low.npy"], "condition = low.npy: this model was trained without conditions"),
        (["superres", "--condition=low.npy", "--n=2"], "condition: 3 for 2 samples, in turn"),
        (["labelled", "--labels=[0,1]", "--n=3"], "labels: 2 for 3 samples, in turn"),
        (["plain", "--inpaint", "images/0.png", "mask.png", "--trajectory=mask.png"], "trajectory = mask.png: another"),
        (["plain", "--columns=0"], "columns = 0"),
        (["plain", "--columns=3", "--out=x.npz"], "columns = 3, out = x.npz"),
        (["superres"], "condition = None: this model needs conditions"),
        (["plain", "--guidance=2"], "classifier-free guidance needs labels"),
        (["labelled", "--guidance=2", "--labels=1", "--max_calls=1"], "max_calls = 1 must be at least 2"),
        (["labelled", "--guide=plain", "--labels=1"], "guidance = None"),
        (["plain", "--temperature=0"], "temperature = 0"),
    ],
)
def test_bad_arguments_end_in_one_line_before_any_work(here, arguments, message, capsys):
    before = sorted(os.listdir())
    with pytest.raises(SystemExit, match="2"):
        main.sample(arguments)
    assert re.search(message, capsys.readouterr().err)
    assert sorted(os.listdir()) == before, "nothing is written"


def test_damaged_images_are_named(here, capsys):
    whole = Path("images/0.png").read_bytes()
    for content in (b"", whole[:40], b"not an image"):
        Path("images/0.png").write_bytes(content)
        with pytest.raises(SystemExit, match="2"):
            main.sample(["encode", "plain", "images"])
        assert re.search(r"images = images/0.png cannot be used: \S", capsys.readouterr().err)


def test_sixteen_bits_and_colours_become_the_models_channels(here):
    Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)).save("deep.png")
    assert read_images(Path("deep.png"), (1, 8, 8)).unique().tolist() == [1]
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save("red.png")
    assert read_images(Path("red.png"), (3, 8, 8))[0, :, 0, 0].tolist() == [1, 0, 0]
    assert float(read_images(Path("red.png"), (1, 8, 8)).mean()) == pytest.approx(0.299, abs=0.01)
    assert read_images(Path("images"), (3, 8, 8)).shape == (2, 3, 8, 8)


def test_what_the_readme_names_is_there():
    assert pfgm.sampling.inverse.Measurement is Measurement
    assert pfgm.data.degradations.Downsample(2).factor == 2
    assert pfgm.sampling.latents.Latent is Latent


def test_a_pair_after_inpaint_is_joined():
    assert prepare_words(["c", "--inpaint", "a", "b", "--n", "2"]) == ["c", "--inpaint", '["a", "b"]', "--n", "2"]
    for words in (["c", "--n", "2"], ["c", "--inpaint", "[a,b]"], ["c", "--inpaint", "a", "--n", "2"]):
        assert prepare_words(words) == words
