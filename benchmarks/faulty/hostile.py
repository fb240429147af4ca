"""Files that strangers might send, and how a user comes to read them."""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfgm.cli.edit import read_latents
from pfgm.data import Arrays, ImageDataModule
from pfgm.data.labels import csv_labels
from pfgm.files.arrays import read_inputs
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.flow.posthoc_ema import reconstruct
from pfgm.flow.tuned_solvers import stored_grid
from pfgm.nn import TimeMLP
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.theory.data_summary import DataSummary

CANARY = "canary"
"""A file that appears in the working folder if code of a file was run."""
HUGE = 1_500_000_000


@dataclass(frozen=True)
class Hostile:
    """A file, how to make it in a folder, and how a user would come to read it."""

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    harmless: bool = False
    """Whether reading it may succeed, since only what it tries beside that is hostile."""

    @property
    def quick(self) -> bool:
        """Whether it is made within a second."""
        return not any(slow in self.name for slow in ("largest", "a bomb", "a million", "a gigabyte"))


def flow() -> PoissonFlow:
    """A small one."""
    net = TimeMLP((4,), 0, 0, width=8, depth=1)
    return PoissonFlow(PreconditionedDenoiser(net, 8.0, 0.5, 0.1), DataSummary((4,)), sigma_min=0.01, sigma_max=40.0)


def samples(path: Path) -> Any:
    """As data."""
    return Arrays(path)


def condition(path: Path) -> Any:
    """As an input of sample.py."""
    return read_inputs(path, (4,), None, "condition")


def images(path: Path) -> Any:
    """As data."""
    return ImageDataModule(str(path), size=4, channels=3).held_out


def picture(path: Path) -> Any:
    """As an input of sample.py."""
    return read_inputs(path, (3, 4, 4), (-1.0, 1.0), "images")


def labelled(path: Path) -> Any:
    """As data with labels."""
    return ImageDataModule(str(path), size=4, labels=True).held_out


def table(path: Path) -> Any:
    """As labels."""
    return csv_labels(path, ["a.png"])


def latents_of(path: Path) -> Any:
    """As latents."""
    return read_latents(path, flow())


def grids(path: Path) -> Any:
    """As the grids beside a checkpoint."""
    return stored_grid(path, flow(), 4)


def averages(path: Path) -> Any:
    """As the averages of a run."""
    return reconstruct(path, 0.1)


class Call:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def written(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], Path]:
    """What writes a file, whose content may be made then."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content() if callable(content) else content)
        return folder / name

    return make


def zipped(entries: dict[str, Any]) -> bytes:
    """A zip archive of contents, or of what makes them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content() if callable(content) else content)
    return out.getvalue()


def bomb(path: Path, name: str, head: bytes, others: dict[str, bytes] | None = None) -> Path:
    """An archive with an entry of `head` and HUGE zeros, in a few megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for key, content in (others or {}).items():
            archive.writestr(key, content)
        with archive.open(name, "w", force_zip64=True) as entry:
            entry.write(head)
            for _ in range(HUGE // 10**7):
                entry.write(bytes(10**7))
    return path
