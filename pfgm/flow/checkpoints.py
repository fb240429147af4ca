"""Checkpoints and exports: write them, read them, and say why one cannot be read.

torch.load does not notice a flipped bit. Checkpoints therefore end in the SHA-256 of their bytes, and safetensors files come
with one of their content.
"""

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pfgm.files.atomic import atomic_write, atomic_write_all, save_torch
from pfgm.files.untrusted import UNREADABLE, RefusedError, check_network, check_safetensors, load_torch, read_text
from pfgm.flow.integrity import DamagedError, append_digest, digest, verify_digest
from pfgm.flow.upgrades import upgrade_checkpoint, upgrade_flow, upgrade_weights

M = TypeVar("M", bound=nn.Module)

FORMAT = 3
READABLE = (2, 3)  # 2: version 0.1, with other class paths and a digest of the content
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"  # the newest checkpoint of a run, and the one before
KEY = "pfgm"  # where a Lightning checkpoint holds this package's description: {"format", "flow", "data"}


class CheckpointError(ValueError):
    """A checkpoint or export lacks something, is damaged, refused, or of another format."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not, bit for bit, what was written."""


def describe(checkpoint: dict[str, Any], flow: Mapping[str, Any], data: Mapping[str, Any] | None) -> None:
    """Add the descriptions of a flow and its data to a Lightning `checkpoint`."""
    checkpoint[KEY] = {"format": FORMAT, "flow": flow, "data": data}


def check_format(checkpoint: Any, path: object = "the checkpoint") -> None:
    """Raise CheckpointError unless `checkpoint` was written by this package in a readable format."""
    parts = (KEY, "state_dict", "hyper_parameters")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(name), Mapping) for name in parts):
        raise CheckpointError(
            f"{path} is not a checkpoint of this package: it holds a {type(checkpoint).__name__}. Pass a .ckpt file written by "
            "train.py, or an exported folder."
        )
    found = checkpoint[KEY].get("format")
    if found not in READABLE:
        raise CheckpointError(f"{path} has format {found!r}, this version reads {READABLE}. Install the version that wrote it.")


def checkpoint_path(run_dir: str | Path, name: str = LAST) -> Path:
    """Return the path of a checkpoint of a run, by default of the newest."""
    return Path(run_dir) / "checkpoints" / name


def write_checkpoint(path: str | Path, checkpoint: Mapping[str, Any], previous: str | Path | None = None) -> None:
    """Write a Lightning `checkpoint` and its digest to `path`, and move what was there to `previous` if that is given."""
    with atomic_write(path, previous) as temporary:
        save_torch(temporary, checkpoint)
        append_digest(temporary)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint to the CPU, in the present format. No code of the file is run.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If it is truncated or altered.
        CheckpointError: If it is refused or of another format.
        OSError: If the machine cannot read it now; likewise MemoryError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist or is not a file. Pass a .ckpt file, a run folder or an exported folder."
        )
    previous = path.with_name(PREVIOUS)
    example = f", such as {previous}" if previous != path and previous.exists() else ""
    with _reading(path, f"Use another copy{example}.", DamagedCheckpointError):
        verify_digest(path)
        checkpoint = load_torch(path, path)
    check_format(checkpoint, path)
    with _interpreting(path):
        return checkpoint if checkpoint[KEY]["format"] == FORMAT else upgrade_checkpoint(checkpoint, KEY)


def restore_module(make: Callable[[], M], state: Mapping[str, Tensor], place: object) -> M:
    """Make the module that the file `place` describes, and load its weights.

    Raise CheckpointError if it cannot be made, if `state` does not fit it, or if weights are not finite. The ValueError of a
    class that is not trusted passes.
    """
    try:
        check_network(make, state, place)
        module = make()
        module.load_state_dict(state)
    except RefusedError as error:
        raise CheckpointError(str(error)) from error
    except (RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, MemoryError) as error:
        raise CheckpointError(f"{place}: what it describes cannot be made ({type(error).__name__}: {error})") from error
    return module


def write_export(folder: str | Path, flow: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write `folder`/config.json (strict JSON) and `folder`/model.safetensors.

    Both are on the disk before they replace older files. If the process is killed between the two replacements, the digest in
    config.json does not match, and loading says so.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder = {folder} cannot be made: {error.strerror}. Choose another.") from error
    tensors = _to_cpu(state)
    config = json.dumps(_with_digest({"format": FORMAT, "flow": flow}, tensors), indent=2, allow_nan=False)
    with atomic_write_all([folder / "config.json", folder / "model.safetensors"]) as (text, weights):
        _save(weights, tensors)
        text.write_text(config + "\n")


def read_export(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the description of a flow and its tensors from an exported `folder`. For errors see `read_checkpoint`."""
    text, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    for path in (text, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}. Pass a folder written by save_pretrained, or a .ckpt file.")
    with _reading(folder, "Use another copy."):
        config = json.loads(read_text(text, text))
        if not isinstance(config, dict) or config.get("format") not in READABLE or not isinstance(config.get("flow"), dict):
            raise RefusedError(f"{text} is not an export of this package in format {FORMAT}")
        state = _load(weights, config, folder)
    flow = config["flow"]
    with _interpreting(folder):
        return (flow, state) if config["format"] == FORMAT else (upgrade_flow(flow), upgrade_weights(state, flow))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write `tensors` to a safetensors file with a JSON `header` and a digest of both."""
    tensors = _to_cpu(tensors)
    metadata = {KEY: json.dumps(_with_digest({"format": FORMAT, **header}, tensors))}
    with atomic_write(path) as temporary:
        _save(temporary, tensors, metadata)


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a file of `write_tensors`. Raise CheckpointError if there is none, or one of another format."""
    with _reading(path, "Delete it."):
        check_safetensors(Path(path), path)
        with safe_open(path, framework="pt") as file:
            header = dict(json.loads((file.metadata() or {})[KEY]))
        if header.get("format") not in READABLE:
            raise RefusedError(f"{path} has format {header.get('format')!r}, this version reads {READABLE}. Delete it.")
    return header


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of `write_tensors`. Raise CheckpointError if it is damaged or altered."""
    header = read_header(path)
    with _reading(path, "Delete it."):
        return _load(Path(path), header, path)


def _to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _with_digest(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `content` with the digest of itself and of `tensors`."""
    plain = {name: value for name, value in content.items() if name != "digest"}
    return plain | {"digest": digest(plain | {"tensors": tensors})}


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # which hides the system's reason in its text
        raise OSError(errno.EIO, f"not all could be written ({error})") from error


def _load(path: Path, content: Mapping[str, Any], place: object) -> dict[str, Tensor]:
    """Load a safetensors file, and verify the digest of its tensors and `content`."""
    check_safetensors(path, path)
    tensors = load_file(path)
    if content != _with_digest(content, tensors):
        raise DamagedError(f"{place} has been altered: its content does not have the digest in it")
    return tensors


@contextmanager
def _reading(place: object, remedy: str, damaged: type[CheckpointError] = CheckpointError) -> Iterator[None]:
    """Convert the errors of reading a file to CheckpointErrors about `place`. Errors of the machine pass."""
    try:
        yield
    except RefusedError as error:
        raise CheckpointError(str(error)) from error
    except DamagedError as error:
        raise damaged(f"{error}. {remedy}") from error
    except (*UNREADABLE, SafetensorError) as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
            raise
        # Not torch's own words: they advise to load the file without weights_only.
        raise damaged(
            f"{place} cannot be read: truncated, altered or of another kind ({type(error).__name__}). {remedy}"
        ) from error


@contextmanager
def _interpreting(place: object) -> Iterator[None]:
    """Convert the errors of reading a description of an earlier format to CheckpointErrors about `place`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{place}: its description cannot be read ({type(error).__name__}: {error})") from error
