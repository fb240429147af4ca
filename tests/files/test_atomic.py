"""Files of every format are written completely or not at all."""

import os

import pytest
import torch

from pfgm.cli import outputs
from pfgm.evaluation import plots
from pfgm.files.atomic import atomic_write
from pfgm.flow import checkpoints
from tests.helpers import full_disk

WRITERS = {
    "a.ckpt": lambda path: checkpoints.write_checkpoint(path, {"x": torch.zeros(10_000)}),
    "a.safetensors": lambda path: checkpoints.write_tensors(path, {"x": torch.zeros(10_000)}, {}),
    "a.npz": lambda path: outputs.save_arrays(path, {"x": torch.zeros(10_000)}),
    "a.pt": lambda path: outputs.save_arrays(path, {"x": torch.zeros(10_000)}),
    "a.png": lambda path: plots.save_grid(path, torch.rand(16, 3, 40, 40)),
    "a.gif": lambda path: plots.save_animation(path, *torch.rand(2, 3, 4, 1, 32, 32)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(name, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    with full_disk(2_000), pytest.raises(OSError, match=rf"{name} cannot be written: .*unchanged; make room, or change folder"):
        WRITERS[name](path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    before = os.umask(0o027)
    try:
        WRITERS[name](path)
    finally:
        os.umask(before)
    assert path.stat().st_size > 2_000
    assert path.stat().st_mode & 0o777 == 0o640


def test_content_is_synced_before_it_replaces_the_file(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replaced"), replace(*paths)))
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("new")
        inode = temporary.stat().st_ino
    assert done == [inode, "replaced", tmp_path.stat().st_ino]
