"""Digests reveal every damaged byte."""

import pytest
import torch

from benchmarks.faulty import damage
from pfgm.flow import checkpoints
from pfgm.flow.integrity import DamagedError, verify_digest


def test_a_flipped_bit_anywhere_in_a_large_file_is_detected(tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoints.write_checkpoint(path, {"x": torch.zeros(2**20)})
    whole = path.read_bytes()
    for i in (0, 2**20 + 1, 2**21 + 7, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        with pytest.raises(DamagedError):
            verify_digest(path)
    path.write_bytes(whole)
    verify_digest(path)


@pytest.mark.process
def test_loading_names_a_checkpoint_with_any_flipped_bit(run, tmp_path):
    counts = damage.trial(checkpoints.checkpoint_path(run), tmp_path, tries=60, seed=2)
    assert counts == {"tried": 60, "named": 60}
