"""Hostile checkpoints, exports and weights."""

import copy
import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pfgm
from benchmarks.faulty.hostile import CANARY, Call, Hostile, averages, flow, samples, written
from pfgm.data import ImageDataModule
from pfgm.evaluation.features import load_features
from pfgm.flow import checkpoints
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.nn import UNet
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.theory.data_summary import DataSummary
from pfgm.training.module import PFGM


def _calls() -> Iterator[tuple[str, bytes]]:
    """Pickles that make the canary, by many ways to call something."""
    touch, write = f"touch {CANARY}", f"open('{CANARY}', 'w').close()"
    import importlib
    import runpy
    import shutil
    import subprocess

    script = Path(__file__).with_name("payload.py")
    yield "os.system", pickle.dumps(Call(os.system, touch), 2)
    yield "os.system, protocol 4", pickle.dumps(Call(os.system, touch), 4)
    yield "os.system, protocol 0", pickle.dumps(Call(os.system, touch), 0)
    yield "exec", pickle.dumps(Call(exec, write), 2)
    yield "eval", pickle.dumps(Call(eval, write), 2)
    yield "open", pickle.dumps(Call(open, CANARY, "w"), 2)
    yield "subprocess.Popen", pickle.dumps(Call(subprocess.Popen, ["touch", CANARY]), 2)
    yield "shutil.copy", pickle.dumps(Call(shutil.copy, __file__, CANARY), 2)
    yield "runpy", pickle.dumps(Call(runpy.run_path, str(script)), 2)
    yield "os.mkdir", pickle.dumps(Call(os.mkdir, CANARY), 2)
    yield "import", pickle.dumps(Call(importlib.import_module, "benchmarks.faulty.payload"), 2)
    yield "np.save", pickle.dumps(Call(np.save, CANARY, [1]), 2)
    yield "torch.save", pickle.dumps(Call(torch.save, 1, CANARY), 2)
    yield "own class", pickle.dumps(Call(ImageDataModule, "torchvision:MNIST"), 2)
    argument = b"X" + struct.pack("<I", len(touch)) + touch.encode()
    yield "getattr", b"cbuiltins\ngetattr\n(cos\nX\x06\x00\x00\x00systemtR(" + argument + b"tR."
    yield "INST", b"(S'" + touch.encode() + b"'\nios\nsystem\n."


def torch_zip(data: bytes, records: dict[str, bytes] | None = None, compressed: bool = False, before: bytes = b"") -> bytes:
    """An archive such as torch.save writes, around a pickle; or one that begins only after other bytes, and knows it."""
    out = io.BytesIO(before)
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "a", kind) as archive:
        for name, content in ({"data.pkl": data, "version": b"3\n", "byteorder": b"little"} | (records or {})).items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def _shared() -> bytes:
    """Forty entries of a table of contents for one record."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(250_000, (500, 500), (500, 1)))
        archive.writestr("archive/data/0", bytes(10**6))
        first = archive.getinfo("archive/data/0")
        for k in range(1, 40):
            other = copy.copy(first)
            other.filename = other.orig_filename = f"archive/data/{k}"
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other
    return out.getvalue()


def _other_items() -> bytes:
    """A tensor that is larger than what is stored of it, in a dict whose `items` are others."""
    evil = tensor_pickle(16, (10**5, 10**5), (0, 0))
    begin = evil.index(b"X\x01\x00\x00\x00x")
    tensor = evil[begin : evil.rindex(b"s.")]
    state = b"}X\x05\x00\x00\x00items" + b"ccollections\nOrderedDict\nsb"
    return b"\x80\x02ccollections\nOrderedDict\n)R" + tensor + b"s" + state + b"."


def tensor_pickle(numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle {"x": tensor} of a storage of `numel` floats under the key 0."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, _Storage) else None

    out = io.BytesIO()
    rebuilt = Call(torch._utils._rebuild_tensor_v2, _Storage(), 0, shape, stride, False, {})
    Pickler(out, 2).dump({"x": rebuilt})
    return out.getvalue()


EMPTY_ZIP = b"PK\5\6" + bytes(18)
"""What an archive ends with, after its table of contents."""


class _Storage:
    """Stands for a storage in a pickle."""


def _torch_files() -> Iterator[Hostile]:
    for name, data in _calls():
        yield Hostile(f"checkpoint: {name}", written("a.ckpt", torch_zip(data)), pfgm.load)
        yield Hostile(f"bare pickle: {name}", written("a.ckpt", data), PFGM.load_from_checkpoint)
        yield Hostile(f"array file: {name}", written("a.pt", torch_zip(data)), samples)
    plain = pickle.dumps({"x": 1}, 2)
    evil = next(_calls())[1]
    laugh: Any = ["ha"] * 10
    for _ in range(12):
        laugh = [laugh] * 10
    ring: list[Any] = []
    ring.append(ring)
    files = {
        "two pickles of one name": torch_zip(plain, {"DATA.pkl": evil}),
        "a second pickle": torch_zip(plain, {"constants.pkl": evil}),
        "compressed records": torch_zip(tensor_pickle(10**7, (10**7,), (1,)), {"data/0": bytes(4 * 10**7)}, True),
        "a storage larger than its record": torch_zip(tensor_pickle(2**40, (2**40,), (1,)), {"data/0": bytes(64)}),
        "a tensor larger than its storage": torch_zip(tensor_pickle(16, (10**5, 10**5), (0, 0)), {"data/0": bytes(64)}),
        "a tensor beyond its storage": torch_zip(tensor_pickle(16, (64,), (1,)), {"data/0": bytes(64)}),
        "lists in lists": torch_zip(pickle.dumps(laugh, 2)),
        "deep lists": torch_zip(b"\x80\x02" + b"]" * 900 + b"a" * 899 + b"."),
        "a ring": torch_zip(pickle.dumps(ring, 2)),
        "a million dicts": torch_zip(b"\x80\x02](" + b"}" * (2**23 - 8) + b"e."),
        "other methods": torch_zip(_other_items(), {"data/0": bytes(64)}),
        "entries that share their bytes": _shared(),
        "a large pickle": torch_zip(b"\x80\x02](" + b"}" * (2**23 + 1) + b"e."),
        "a huge integer": torch_zip(pickle.dumps({"x": 10**100_000}, 2)),
        "old format": _old_format(),
        "old format before an archive": torch_zip(plain, before=_old_format()),
        "an archive before an archive": _tensor(b"\2")[: -len(EMPTY_ZIP)] + _tensor(b"\1"),
    }
    for name, content in files.items():
        yield Hostile(f"checkpoint: {name}", written("a.ckpt", content), pfgm.load)
        yield Hostile(f"array file: {name}", written("a.pt", content), samples)


def _tensor(value: bytes) -> bytes:
    """An archive of 16 numbers. Of two that follow each other torch reads the first, zipfile the last."""
    return torch_zip(tensor_pickle(16, (4, 4), (4, 1)), {"data/0": 32 * value + bytes(32)})


def _old_format() -> bytes:
    out = io.BytesIO()
    torch.save({"x": torch.eye(9)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def _descriptions() -> Iterator[Hostile]:
    """Exports whose digest is right: anyone can make one."""
    good = flow()
    spec = good.config["denoiser"]
    net = spec["init_args"]["net"]

    def changed(part: str, **arguments: Any) -> dict[str, Any]:
        whole = good.config[part]
        return {part: whole | {"init_args": whole["init_args"] | arguments}}

    def with_net(**arguments: Any) -> dict[str, Any]:
        inner = net | {"init_args": net["init_args"] | arguments}
        return changed("denoiser", net=inner)

    def named(class_path: str, **arguments: Any) -> dict[str, Any]:
        return {"denoiser": {"class_path": class_path, "init_args": arguments}}

    nested: Any = spec
    for _ in range(400):
        nested = {"class_path": spec["class_path"], "init_args": {"net": nested}}
    changes = {
        "os.system": named("os.system", command=f"touch {CANARY}"),
        "subprocess": named("subprocess.Popen", args=["touch", CANARY]),
        "a module that runs on import": named("benchmarks.faulty.payload.Net"),
        "a function of ours": named("pfgm.cli.train.main", args=["fit"]),
        "a data module of ours": named("pfgm.data.ImageDataModule", path="torchvision:MNIST", root=CANARY),
        "another package": named("torch.nn.Linear", in_features=1, out_features=1),
        "no class": named("pfgm.core.rng"),
        "a path that is none": named("..", x=1),
        "nested": {"denoiser": nested},
        "a wide network": with_net(width=10**6),
        "a deep network": with_net(depth=10**9),
        "a negative width": with_net(width=-1),
        "a huge shape": changed("summary", shape=[10**6, 10**6]),
        "a shape beyond int64": changed("summary", shape=[10**30]),
        "a negative shape": changed("summary", shape=[-4]),
        "text for a level": {"sigma_max": "os.system"},
        "no dimensions": changed("denoiser", D="nan"),
        "a list of dimensions": changed("denoiser", D=[1]),
        "no description": {"denoiser": 7},
        "more arguments": {"harm": True},
    }
    for name, change in changes.items():
        yield Hostile(
            f"export: {name}", lambda folder, c=change: _export(folder, good.config | c, good.state_dict()), pfgm.load
        )
    weights = {key: value.clone().fill_(math.nan) for key, value in good.state_dict().items()}
    yield Hostile("export: weights that are NaN", lambda folder: _export(folder, good.config, weights), pfgm.load)
    yield Hostile("export: a filter of 20000 taps", _taps, pfgm.load)
    for name, header in {"a header of a gigabyte": struct.pack("<Q", 10**9) + b"{}", "numbers beyond their type": None}.items():
        yield Hostile(f"export: {name}", lambda folder, h=header: _weights(folder, h), pfgm.load)
    text = '{"format": 2, "flow": ' + "[" * 200_000
    yield Hostile("export: deep JSON", lambda folder: _export(folder, good.config, {}, text), pfgm.load)
    yield Hostile("export: long JSON", lambda folder: _export(folder, good.config, {}, " " * 10**7), pfgm.load)


def _export(folder: Path, config: dict[str, Any], state: Any, text: str | None = None) -> Path:
    checkpoints.write_export(folder, config, state)
    if text is not None:
        (folder / "config.json").write_text(text)
    return folder


def _taps(folder: Path) -> Path:
    """What a network makes beside its weights, from a short description."""
    net = UNet((1, 8, 8), 0, 0, width=8, blocks=1)
    whole = PoissonFlow(PreconditionedDenoiser(net, 8.0, 0.5, 0.1), DataSummary((1, 8, 8)), sigma_min=0.01, sigma_max=40.0)
    config = json.loads(json.dumps(whole.config))
    config["denoiser"]["init_args"]["net"]["init_args"]["resample_filter"] = [1] * 20_000
    return _export(folder, config, whole.state_dict())


def _weights(folder: Path, content: bytes | None) -> Path:
    """An export with other weights; by default doubles that are no floats."""
    good = flow()
    _export(
        folder,
        good.config,
        {key: torch.full_like(value, 1e300, dtype=torch.double) for key, value in good.state_dict().items()},
    )
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    return folder


def _tensor_files() -> Iterator[Hostile]:
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}}).encode()
    contents = {
        "a header without end": struct.pack("<Q", 2**62) + b"{}",
        "a header of a gigabyte": struct.pack("<Q", 10**9) + b"{}",
        "a long header": struct.pack("<Q", 2 * 10**7) + b" " * 2 * 10**7,
        "a tensor without data": struct.pack("<Q", len(header)) + header + bytes(4),
        "deep JSON": struct.pack("<Q", 10**5) + b"[" * 10**5,
    }
    for name, content in contents.items():
        yield Hostile(f"features: {name}", written("a.safetensors", content), load_features)
        yield Hostile(f"averages: {name}", _average(content), averages)
    for name, spec in {
        "os.system": {"class_path": "os.system", "init_args": {"command": f"touch {CANARY}"}},
        "no class": 3,
        "a wide network": {
            "class_path": "pfgm.evaluation.Classifier",
            "init_args": {"channels": 1, "classes": 2, "width": 10**6},
        },
        "a negative width": {
            "class_path": "pfgm.evaluation.Classifier",
            "init_args": {"channels": 1, "classes": 2, "width": -1},
        },
    }.items():
        yield Hostile(f"features: {name}", lambda folder, s=spec: _classifier(folder, s), load_features)


def _average(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "averages").mkdir()
        (folder / "averages" / "00000001.safetensors").write_bytes(content)
        return folder

    return make


def _classifier(folder: Path, spec: Any) -> Path:
    checkpoints.write_tensors(folder / "a.safetensors", {"x": torch.zeros(1)}, {"classifier": spec, "made": {}})
    return folder / "a.safetensors"


def corpus() -> list[Hostile]:
    """All of them."""
    return [*_torch_files(), *_descriptions(), *_tensor_files()]
