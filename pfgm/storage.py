"""Files: written whole or not at all, read with a reason when they cannot be.

Checkpoints and exports carry a SHA-256 digest of their content, since a flipped bit passes torch.load unnoticed.
"""

import hashlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 2
KEY = "pfgm"
"""Where a Lightning checkpoint holds this package's part: {"format", "flow", "data", "digest"}."""


class CheckpointError(ValueError):
    """A checkpoint or export is missing a part, damaged, or of another format."""


def digest(content: Any) -> str:
    """SHA-256 of nested mappings and sequences of tensors and plain values; the order of the mappings does not matter."""
    total = hashlib.sha256()
    _update(total, "", content)
    return total.hexdigest()


def _update(total: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _update(total, f"{name}/{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _update(total, f"{name}/{i}", item)
    else:
        total.update(f"{name} {value!r}\n".encode())


def seal(checkpoint: dict[str, Any], flow: Mapping[str, Any], data: Mapping[str, Any] | None) -> None:
    """Add to a Lightning `checkpoint` what its flow and its data were, and the digest of all that it holds."""
    checkpoint[KEY] = {"format": FORMAT, "flow": flow, "data": data}
    checkpoint[KEY]["digest"] = digest(_sealed(checkpoint))


def check_seal(checkpoint: Mapping[str, Any], path: object = "the checkpoint") -> None:
    """CheckpointError unless `checkpoint` was sealed by this package in this format and is unchanged."""
    part = checkpoint.get(KEY)
    if not isinstance(part, Mapping) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} is not a checkpoint of this package; give a .ckpt written by train.py or an exported folder"
        )
    if part.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {part.get('format')!r}, this version reads {FORMAT}; install the version that wrote it"
        )
    if part.get("digest") != digest(_sealed(checkpoint)):
        raise CheckpointError(f"{path} has been altered: its content does not have the digest stored in it; use another copy")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The Lightning checkpoint at `path`, on the CPU, checked; no code of the file is run (weights_only).

    FileNotFoundError if there is none, CheckpointError if it is truncated, altered or of another format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file; give a .ckpt file or an exported folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        zipfile.BadZipFile,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        # Not torch's own words: they advise to load the file without weights_only.
        raise CheckpointError(
            f"{path} cannot be read: truncated, altered or not a checkpoint ({type(error).__name__}); use another copy"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"{path} holds a {type(checkpoint).__name__}, not a checkpoint of this package; give a .ckpt written by train.py"
        )
    check_seal(checkpoint, path)
    return checkpoint


def write_export(folder: str | Path, flow: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write `folder`/config.json (strict JSON) and `folder`/model.safetensors, each as a whole."""
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    parts = {"format": FORMAT, "flow": flow}
    config = json.dumps(parts | {"digest": digest(parts | {"tensors": tensors})}, indent=2, allow_nan=False)
    with replacing(Path(folder) / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    with replacing(Path(folder) / "config.json") as temporary:
        temporary.write_text(config + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write `tensors` to a safetensors file, as a whole, with a JSON `header` and a digest of both."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    parts = {"format": FORMAT} | dict(header)
    parts["digest"] = digest(parts | {"tensors": plain})
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={KEY: json.dumps(parts)})


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a file of `write_tensors`. CheckpointError if it is none, or of another format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: truncated or altered ({type(error).__name__}); delete it") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {header.get('format')!r}, this version reads {FORMAT}")
    return header


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file of `write_tensors`. CheckpointError if it is damaged or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: truncated or altered; delete it") from error
    found = digest({name: value for name, value in header.items() if name != "digest"} | {"tensors": tensors})
    if header.get("digest") != found:
        raise CheckpointError(f"{path} has been altered: its content does not have the digest in it; delete it")
    return tensors


def read_export(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description of the flow and its tensors from an exported `folder`. Errors as for `read_checkpoint`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("config.json", "model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; give a folder written by save_pretrained, or a .ckpt file")
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        state = load_file(Path(folder) / "model.safetensors")
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be read: truncated or altered ({type(error).__name__}); use another copy"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{folder}/config.json is not an export of this package in format {FORMAT}")
    found = digest({name: value for name, value in config.items() if name != "digest"} | {"tensors": state})
    if config.get("digest") != found:
        raise CheckpointError(
            f"{folder} has been altered: its content does not have the digest in config.json; use another copy"
        )
    return config["flow"], state


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends, and vanishes if the block fails."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sealed(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in checkpoint[KEY].items() if name != "digest"}
    return {name: value for name, value in checkpoint.items() if name != KEY} | {KEY: own}
