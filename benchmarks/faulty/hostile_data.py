"""Hostile arrays, images, archives and tables."""

import functools
import io
import math
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from benchmarks.faulty.hostile import (
    CANARY,
    HUGE,
    Call,
    Hostile,
    bomb,
    condition,
    grids,
    images,
    labelled,
    latents_of,
    picture,
    samples,
    table,
    written,
    zipped,
)


def npy(header: str, data: bytes = bytes(64), version: bytes = b"\x01\x00") -> bytes:
    """A .npy file with any header."""
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + data


def _arrays() -> Iterator[Hostile]:
    lie = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"
    evil = pickle.dumps(Call(os.system, f"touch {CANARY}"), 2)
    headers = {
        "a shape of terabytes": npy(lie.format("'<f4'", "(1000000000000,)")),
        "a shape beyond int64": npy(lie.format("'<f4'", f"({10**30},)")),
        "a negative shape": npy(lie.format("'<f4'", "(-4,)")),
        "objects": npy(lie.format("'|O'", "(1,)"), evil),
        "records": npy(lie.format("[('x', '<f4')]", "(4,)")),
        "text": npy(lie.format("'<U4'", "(4,)")),
        "dates": npy(lie.format("'<M8[s]'", "(4,)")),
        "a huge item": npy(lie.format("'|V2000000000'", "(1,)")),
        "code in the header": npy(f"__import__('os').system('touch {CANARY}')"),
        "a header that is too long": npy(lie.format("'<f4'", "(4,)") + " " * 60_000),
        "format 3": npy(lie.format("'<f4'", "(4,)"), version=b"\x03\x00"),
        "format 9": npy(lie.format("'<f4'", "(4,)"), version=b"\x09\x00"),
        "nothing": b"",
    }
    for name, content in headers.items():
        yield Hostile(f"npy: {name}", written("a.npy", content), samples, name == "format 3")
        yield Hostile(f"npz: {name}", written("a.npz", zipped({"x.npy": content})), condition)
    numbers = npy(lie.format("'<f4'", "(4, 4)"))
    bad = np.zeros((4, 4), np.float32)
    bad[0, 0] = math.nan
    with_nan = npy(lie.format("'<f4'", "(4, 4)"), bad.tobytes())
    head = npy(lie.format("'|u1'", f"({HUGE},)"), b"")
    yield Hostile("npz: a bomb", lambda folder: bomb(folder / "a.npz", "x.npy", head), samples)
    yield Hostile(
        "npz: a bomb beside the data", lambda folder: bomb(folder / "a.npz", "y.npy", head, {"x.npy": numbers}), samples
    )
    yield Hostile("npz: a bomb with ballast", _ballast, condition)
    yield Hostile("npz: NaN", written("a.npz", zipped({"x.npy": with_nan})), samples)
    yield Hostile("npz: NaN in a condition", written("a.npz", zipped({"x.npy": with_nan})), condition)
    yield Hostile("npz: elsewhere", written("a.npz", zipped({"../../escaped.npy": numbers})), samples, True)
    latents = {name: np.zeros(0) for name in ("t", "level", "plane", "D")}
    yield Hostile("latents: empty", lambda folder: _npz(folder, latents), latents_of)
    two = {name: np.zeros(2) for name in ("t", "level", "plane", "D")}
    yield Hostile("latents: nonsense", lambda folder: _npz(folder, two), latents_of)
    yield Hostile("grids: a pipe", lambda folder: _pipe(folder) / "a.png", grids)
    for name, content in {"deep JSON": b"[" * 10**5, "long JSON": b" " * 10**7, "a list": b"[1]", "bytes": bytes(99)}.items():
        yield Hostile(f"grids: {name}", written("a.json", content), grids)


def _ballast(folder: Path) -> Path:
    """Zeros that are unpacked to 90 times as much, as real data may be to a few."""
    head = npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({HUGE // 16}, 4), }}", b"")
    return bomb(folder / "a.npz", "x.npy", head, {"y.npy": npy("{}", os.urandom(HUGE // 100))})


def _npz(folder: Path, arrays: dict[str, Any]) -> Path:
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def png(width: int, height: int, bits: int = 8, colour: int = 2, chunks: bytes = b"", data: bytes = b"") -> bytes:
    """A .png file that claims any size."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _encoded(kind: str, seed: int = 0) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(out, kind)
    return out.getvalue()


def _plain(folder: Path, size: int, mode: str) -> Path:
    """Ten images, one as large as is read at all."""
    Image.new(mode, (size, size)).save(folder / "a.png", compress_level=1)
    for k in range(9):
        (folder / f"{k}.png").write_bytes(_encoded("PNG", k))
    return folder


def _tiff(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 64)]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\x00" + struct.pack("<I", 72) + bytes(64) + struct.pack("<H", len(tags)) + body + bytes(4)


def _tiled(side: int) -> bytes:
    """A TIFF of 4 x 4 pixels in a tile of side x side."""
    data = zlib.compress(bytes(side**2), 1)
    tags = [(256, 4), (257, 4), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 8), (325, len(data))]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\x00" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + body + bytes(4)


def _pictures() -> Iterator[Hostile]:
    script = f"(%pipe%touch {CANARY}) (w) file closefile"
    eps = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n{script}\nshowpage\n".encode()
    large = bytearray(_encoded("BMP"))
    large[18:26] = struct.pack("<ii", 60_000, 60_000)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("a", "b" * 9_000_000, zip=True)
    text = io.BytesIO()
    Image.new("RGB", (4, 4)).save(text, "PNG", pnginfo=notes)
    jpeg, good = _encoded("JPEG"), {f"{k}.png": _encoded("PNG", k) for k in range(9)}
    frame = jpeg.index(b"\xff\xc0")
    files: dict[str, bytes | Callable[[], bytes]] = {
        "3600 million pixels": png(60_000, 60_000),
        "four times 10^18 pixels": png(2**31 - 1, 2**31 - 1),
        "89 million pixels": png(9_400, 9_400),
        "51 million pixels": png(7_150, 7_150),
        "no pixels": png(0, 0),
        "fewer data than pixels": png(4, 4),
        "a bomb of data": lambda: png(4, 4, data=bytes(10**8)),
        "a bomb of text": text.getvalue(),
        "a bomb of colours": lambda: png(4, 4, chunks=_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "PostScript": eps,
        "an icon": _encoded("ICO"),
        "a PDF": _encoded("PDF"),
        "XML": b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "a JPEG of 4295 million pixels": jpeg[: frame + 5] + b"\xff\xff\xff\xff" + jpeg[frame + 9 :],
        "a BMP of 3600 million pixels": bytes(large),
        "a TIFF of 3600 million pixels": _tiff(60_000, 60_000),
        "a TIFF whose strips are missing": _tiff(4_000, 4_000),
        "a TIFF of one tile of a gigabyte": lambda: _tiled(2**15),
        "floats": _floats(),
    }
    for name, content in files.items():
        harmless = name in ("a bomb of data", "a bomb of colours")  # which the decoder does not unpack
        yield Hostile(f"folder: {name}", _among(written("a.png", content)), images, harmless)
        archive = functools.partial(zipped, good | {"a.png": content})
        yield Hostile(f"zip: {name}", written("a.zip", archive), images, harmless)
        yield Hostile(f"input: {name}", written("a.png", content), picture, harmless)
    yield Hostile("folder: a pipe", _among(_pipe), images, True)
    yield Hostile("folder: a device", _among(_link("/dev/zero")), images, True)
    yield Hostile("folder: a link to itself", _among(_link("a.png")), images, True)
    one = _encoded("PNG")
    yield Hostile("zip: a bomb", lambda folder: bomb(folder / "a.zip", "a.png", one), images)
    yield Hostile("zip: a bomb among images", lambda folder: bomb(folder / "a.zip", "a.bmp", one, good), images)
    for name, size, mode in (
        ("RGB", 7_000, "RGB"),
        ("transparent", 6_100, "RGBA"),
        ("grey", 12_200, "L"),
        ("16-bit", 7_000, "I;16"),
    ):
        yield Hostile(f"largest: {name}", lambda folder, s=size, m=mode: _plain(folder, s, m), images, True)
    names = ("../../escaped.png", "/tmp/escaped.png", "C:\\escaped.png", "a/../../escaped.png")
    elsewhere = dict(zip(names, good.values(), strict=False))
    yield Hostile("zip: elsewhere", written("a.zip", zipped(elsewhere)), images, True)
    yield Hostile("zip: no zip", written("a.zip", b"PK" + bytes(99)), images)
    tables = {
        "deep JSON": b'{"labels": ' + b"[" * 10**5,
        "a list": b"[1]",
        "numbers": b'{"labels": [1, 2]}',
        "NaN": b'{"labels": [["a.png", NaN]]}',
        "a huge class": b'{"labels": [["a.png", ' + b"9" * 5000 + b"]]}",
    }
    for name, content in tables.items():
        make = written("a.zip", zipped(good | {"dataset.json": content}))
        yield Hostile(f"labels: {name}", make, labelled)
    for name, content in {"no text": bytes(range(256)), "one field": b"a" * 200_000, "quotes": b'"a,1\n' * 9}.items():
        yield Hostile(f"CSV: {name}", written("a.csv", content), table)


def _among(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A folder of nine good images and what `make` makes."""

    def both(folder: Path) -> Path:
        for k in range(9):
            (folder / f"{k}.png").write_bytes(_encoded("PNG", k))
        make(folder)
        return folder

    return both


def _floats() -> bytes:
    out = io.BytesIO()
    Image.new("F", (4, 4)).save(out, "TIFF")
    return out.getvalue()


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.png")
    return folder


def _link(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "a.png").symlink_to(target)
        return folder

    return make


def corpus() -> list[Hostile]:
    """All of them."""
    return [*_arrays(), *_pictures()]
