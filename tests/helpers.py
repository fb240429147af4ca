"""Small models, data sets and runs that several tests use."""

import contextlib
import json
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from pfgm.cli import train as train_cli
from pfgm.data import Digits
from pfgm.flow import checkpoints
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.nn import TimeMLP, UNet
from pfgm.nn.preconditioning import FieldDenoiser, PreconditionedDenoiser
from pfgm.sampling.sampler import Sampler
from pfgm.theory.data_summary import DataSummary, condition_key
from pfgm.theory.kernel import StudentTKernel
from pfgm.training.checkpointing import LastCheckpoint
from pfgm.training.losses import DenoisingLoss, PoissonFieldLoss
from pfgm.training.module import PFGM


def write_set(folder, count=24, suffix="png"):
    """Images of two classes, of two kinds and three sizes, each of one brightness, its number."""
    for i in range(count):
        place = folder / ("cat", "dog")[i % 2] / f"{i:02}.{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        height, width = ((12, 16), (10, 10), (20, 14))[i % 3]
        shape = (height, width, 3) if i % 4 else (height, width)
        Image.fromarray(np.full(shape, 10 * i, np.uint8)).save(place)
    (folder / "notes.txt").write_text("not an image")
    (folder / "cat" / "._00.png").write_text("left by a system")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "00.png").write_text("left by another")
    return folder


def pack(folder, path, table=None):
    """The files of `folder` in a zip, with EDM's dataset.json if given."""
    with zipfile.ZipFile(path, "w") as file:
        for name in sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True):
            file.write(name, name.relative_to(folder).as_posix())
        if table is not None:
            file.writestr("dataset.json", json.dumps({"labels": table}))
    return path


def contents(data):
    """(brightness, label) of each image of a data module whose images have one brightness each, sorted."""
    parts = [data.train, data.held_out]
    x = torch.cat([part.x[:] for part in parts]).flatten(1)
    assert bool((x == x[:, :1]).all())
    label = torch.cat([part.label for part in parts]) if data.num_classes else torch.full((len(x),), -1)
    return sorted(zip(x[:, 0].tolist(), label.tolist(), strict=True))


NCSNPP = {"resblock_updown": True, "resample_filter": (1, 3, 3, 1), "residual_input": True, "fourier_scale": 16.0}
DIFFUSERS = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "norm_num_groups": 4}
DIFFUSERS |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}


def randomized(net):
    """Draw all parameters of `net` anew, those that start at zero as well."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


class Answering(nn.Module):
    """A network that returns `answer(x, c_noise)`."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, c_noise, label=None):
        return self.answer(x, c_noise)


OBJECTIVES = {
    "PFGM": {"loss": PoissonFieldLoss(0.5, 100), "D": 1.0},
    "PFGM++": {"loss": DenoisingLoss(), "D": 128.0},
    "stable targets": {"loss": DenoisingLoss(reference_size=64), "D": 2.0},
}


def digits(**options):
    return Digits(**{"batch_size": 32, "labels": True, **options})


def model(data, objective="PFGM++", **options):
    torch.manual_seed(0)
    settings = OBJECTIVES[objective]
    extra = settings["loss"].extra_channels
    net = UNet(data.shape, data.num_classes, extra, data.condition_shapes, width=8, blocks=1, **options.pop("net", {}))
    return PFGM(net, data.summary, **settings, **{"lr": 1e-3, "warmup_steps": 0, **options})


def train_steps(data, module, steps, *callbacks, folder, resume=None, **options):
    settings = {"max_epochs": -1, "max_steps": steps, "logger": False, "enable_progress_bar": False, "limit_val_batches": 0}
    settings |= {"accelerator": "cpu", "enable_model_summary": False, "gradient_clip_val": 1.0, "log_every_n_steps": 1}
    keeps = any(isinstance(callback, LastCheckpoint) for callback in callbacks)
    trainer = pl.Trainer(**(settings | options), callbacks=[*callbacks], default_root_dir=folder, enable_checkpointing=keeps)
    trainer.fit(module, data, ckpt_path=resume if resume and resume.exists() else None, weights_only=True)
    return [p.detach().clone() for p in module.parameters()]


ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"


SMALL = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--grid.n=4", "--trainer.log_every_n_steps=1"]


TOY = ["--config", str(ROOT / "configs" / "heart.yaml"), "--data.init_args.size=300", "--data.init_args.batch_size=32"]


TOY += ["--model.net.init_args.width=16", "--model.net.init_args.depth=1", *SMALL]


def fit(run_dir, *extra, base=TOY):
    return train_cli.main(["fit", *base, "--run_dir", str(run_dir), *extra])


def last(run_dir):
    return checkpoints.read_checkpoint(Path(run_dir) / "checkpoints" / "last.ckpt")


def flow_of(denoiser, shape, *, sigma_min=0.01, sigma_max=40.0, unconditional=False, start="hemisphere", **summary):
    """A flow around `denoiser`, for data of that shape and summary."""
    summary = DataSummary(shape, **{"sigma_data": getattr(denoiser, "sigma_data", 0.5), **summary})
    return PoissonFlow(denoiser, summary, sigma_min=sigma_min, sigma_max=sigma_max, unconditional=unconditional, start=start)


def conditional(shape=(2,), condition_shape=(3,), **options):
    """A flow with random weights that takes conditions."""
    torch.manual_seed(1)
    conditions = {condition_key(condition_shape): condition_shape}
    net = (UNet if len(shape) == 3 else TimeMLP)(shape, 0, 0, conditions, width=8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return flow_of(PreconditionedDenoiser(net, 8.0, 0.5, 0.1), shape, conditions=conditions, **options)


def labelled(**options):
    return make_flow(classes=3, std=0.2, unconditional=True, **options)


FAST = {"method": "midpoint", "steps": 4}


def make_flow(D=128.0, shape=(1, 8, 8), classes=0, std=0.05, **options):
    torch.manual_seed(0)
    net = (
        UNet(shape, classes, int(D == 1), width=8)
        if len(shape) == 3
        else TimeMLP(shape, classes, int(D == 1), width=8, depth=1)
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=std)
    denoiser = FieldDenoiser(net, 5.0, 0.5, 0.06) if D == 1 else PreconditionedDenoiser(net, D, 0.5, 0.06)
    settings = {"num_classes": classes, "value_range": (-1.0, 1.0)} | options
    return flow_of(denoiser, shape, mean=0.3 * torch.randn(shape), **settings)


F64 = torch.float64


TIGHT = {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}


def make_sampler(denoiser, kernel=None, shape=(3,), sigma_min=0.01, sigma_max=40.0, **options):
    """A sampler for points in three dimensions, with D = 1 unless a kernel is given."""
    kernel = kernel or StudentTKernel(1)
    return Sampler(denoiser, kernel, shape=shape, sigma_min=sigma_min, sigma_max=sigma_max, **options)


@contextlib.contextmanager
def full_disk(size):
    """Let no file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
