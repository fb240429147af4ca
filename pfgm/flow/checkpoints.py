"""Checkpoints and exports: writing them, reading them, and naming the reason why one cannot be read.

A flipped bit passes torch.load unnoticed. Checkpoints therefore end in the SHA-256 of their bytes, and exports hold one of
their content.
"""

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

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
    """Add to a Lightning `checkpoint` the descriptions of its flow and its data."""
    checkpoint[KEY] = {"format": FORMAT, "flow": flow, "data": data}


def check_format(checkpoint: Mapping[str, Any], path: object = "the checkpoint") -> None:
    """Raise CheckpointError unless `checkpoint` was written by this package in a format that it reads."""
    if not all(isinstance(checkpoint.get(name), Mapping) for name in (KEY, "state_dict", "hyper_parameters")):
        raise CheckpointError(
            f"{path} is not a checkpoint of this package; give a .ckpt written by train.py or an exported folder"
        )
    found = checkpoint[KEY].get("format")
    if found not in READABLE:
        raise CheckpointError(f"{path} has format {found!r}, this version reads {READABLE}; install the version that wrote it")


def checkpoint_path(run_dir: str | Path, name: str = LAST) -> Path:
    """Return the path of a checkpoint of a run, by default of the newest."""
    return Path(run_dir) / "checkpoints" / name


def write_checkpoint(path: str | Path, checkpoint: Mapping[str, Any], previous: str | Path | None = None) -> None:
    """Write a Lightning `checkpoint` as a whole, with its digest. What was at `path` becomes `previous`, if that is given."""
    with atomic_write(path, previous) as temporary:
        save_torch(temporary, checkpoint)
        append_digest(temporary)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read the Lightning checkpoint at `path` to the CPU, in today's format. No code of the file is run (weights_only).

    Raises:
        FileNotFoundError: If there is none.
        DamagedCheckpointError: If it is truncated or altered.
        CheckpointError: If it is refused or of another format.
        OSError: If it cannot be read now, as MemoryError.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file; give a .ckpt file, a run folder or an exported folder")
    try:
        verify_digest(Path(path))
        checkpoint = load_torch(Path(path), path)
    except RefusedError as error:
        raise CheckpointError(str(error)) from error
    except DamagedError as error:
        raise DamagedCheckpointError(f"{error}; {_remedy(path)}") from error
    except UNREADABLE as error:
        if _is_machine_error(error):
            raise
        # Not torch's own words: they advise to load the file without weights_only.
        raise DamagedCheckpointError(
            f"{path} cannot be read: truncated, altered or not a checkpoint ({type(error).__name__}); {_remedy(path)}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"{path} holds a {type(checkpoint).__name__}, not a checkpoint of this package; give a .ckpt written by train.py"
        )
    check_format(checkpoint, path)
    with _named(path):
        return checkpoint if checkpoint[KEY]["format"] == FORMAT else upgrade_checkpoint(checkpoint, KEY)


@contextmanager
def _named(place: object) -> Iterator[None]:
    """Turn what goes wrong while a description of an earlier format is read into a CheckpointError about `place`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{place}: its description cannot be read ({type(error).__name__}: {error})") from error


def _is_machine_error(error: Exception) -> bool:
    """Return whether the machine is to blame, so that the file may be whole."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL))


def _remedy(path: Any) -> str:
    beside = Path(str(path)).with_name(PREVIOUS)
    return f"use another copy, such as {beside}" if beside.exists() and beside != Path(str(path)) else "use another copy"


def restore_module(make: Callable[[], M], state: Mapping[str, Tensor], place: object) -> M:
    """Make the module that a file describes, and load its weights.

    Args:
        make: Makes the module from the description.
        state: The weights.
        place: The file, for messages.

    Raises:
        CheckpointError: If weights and network do not match, weights are not finite, or the module cannot be made.
        ValueError: If a class is not trusted.
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

    Both are on the disk before they replace older files, one right after the other. If the process is killed between the two,
    the digest in config.json does not match, and loading says so.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder = {folder} cannot be made: {error.strerror}; give another") from error
    tensors, parts = _plain(state), {"format": FORMAT, "flow": flow}
    config = json.dumps(parts | {"digest": digest(parts | {"tensors": tensors})}, indent=2, allow_nan=False)
    with atomic_write_all([folder / "config.json", folder / "model.safetensors"]) as (text, weights):
        _save(weights, tensors)
        text.write_text(config + "\n")


def read_export(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the description of a flow and its tensors from an exported `folder`. Errors as for `read_checkpoint`."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; give a folder written by save_pretrained, or a .ckpt file")
    with _readable(folder, "use another copy"):
        config = json.loads(read_text(folder / "config.json", folder / "config.json"))
    if not isinstance(config, dict) or config.get("format") not in READABLE or not isinstance(config.get("flow"), dict):
        raise CheckpointError(f"{folder}/config.json is not an export of this package in format {FORMAT}")
    state = _load(folder / "model.safetensors", folder, "use another copy")
    found = digest({name: value for name, value in config.items() if name != "digest"} | {"tensors": state})
    if config.get("digest") != found:
        raise CheckpointError(
            f"{folder} has been altered: its content does not have the digest in config.json; use another copy"
        )
    if config["format"] == FORMAT:
        return config["flow"], state
    with _named(folder):
        return upgrade_flow(config["flow"]), upgrade_weights(state, config["flow"]["condition_shape"])


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write `tensors` to a safetensors file, as a whole, with a JSON `header` and a digest of both."""
    plain, parts = _plain(tensors), {"format": FORMAT} | dict(header)
    parts["digest"] = digest(parts | {"tensors": plain})
    with atomic_write(path) as temporary:
        _save(temporary, plain, {KEY: json.dumps(parts)})


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a file of `write_tensors`. Raise CheckpointError if it has none, or one of another format."""
    from safetensors import safe_open

    with _readable(path, "delete it"):
        check_safetensors(Path(path), path)
        with safe_open(path, framework="pt") as file:
            header = dict(json.loads((file.metadata() or {})[KEY]))
    if header.get("format") not in READABLE:
        raise CheckpointError(f"{path} has format {header.get('format')!r}, this version reads {READABLE}")
    return header


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of `write_tensors`. Raise CheckpointError if it is damaged or altered."""
    header, tensors = read_header(path), _load(Path(path), path, "delete it")
    found = digest({name: value for name, value in header.items() if name != "digest"} | {"tensors": tensors})
    if header.get("digest") != found:
        raise CheckpointError(f"{path} has been altered: its content does not have the digest in it; delete it")
    return tensors


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # which hides the system's reason in its text
        raise OSError(errno.EIO, f"not all could be written ({error})") from error


def _load(path: Path, place: object, remedy: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with _readable(place, remedy):
        check_safetensors(path, path)
        return load_file(path)


@contextmanager
def _readable(place: object, remedy: str) -> Iterator[None]:
    """Turn what goes wrong in the block into a CheckpointError about `place`."""
    from safetensors import SafetensorError

    try:
        yield
    except RefusedError as error:
        raise CheckpointError(str(error)) from error
    except (*UNREADABLE, SafetensorError) as error:
        if _is_machine_error(error):
            raise
        raise CheckpointError(f"{place} cannot be read: truncated or altered ({type(error).__name__}); {remedy}") from error
