"""The log of a run: what it keeps on a full disk, after a crash, and when it is damaged."""

import csv

import pytest

from pfgm.training.csv_logger import MetricsLogger, read_rows
from tests.helpers import full_disk


def rows(logger, *columns):
    with logger.path.open(newline="") as file:
        return [tuple(row[name] for name in columns) for row in csv.DictReader(file)]


def test_a_new_process_drops_rows_from_its_first_step_on(tmp_path):
    for steps in ((1, 2, 3, 4), (3, 5)):
        log = MetricsLogger(tmp_path)
        for step in steps:
            log.log_metrics({"train_loss": step / 8, "epoch": 0.0}, step)
    assert rows(log, "step", "train_loss") == [("1", "0.125"), ("2", "0.25"), ("3", "0.375"), ("5", "0.625")]


def test_new_metrics_add_columns_and_keep_all_rows(tmp_path):
    log = MetricsLogger(tmp_path)
    log.log_metrics({"train_loss": 0.5}, 1)
    log.log_metrics({"FID": 7.0}, 1)
    assert rows(log, "step", "train_loss", "FID") == [("1", "0.5", ""), ("1", "", "7.0")]
    again = MetricsLogger(tmp_path)
    again.log_metrics({"train_loss": 0.25}, 2)
    assert rows(again, "step", "train_loss", "FID") == [("1", "0.5", ""), ("1", "", "7.0"), ("2", "0.25", "")]


def test_a_full_disk_costs_no_rows(tmp_path):
    log = MetricsLogger(tmp_path)
    log.log_metrics({"train_loss": 0.5}, 1)
    before = log.path.read_bytes()
    with full_disk(len(before) + 5), pytest.raises(OSError, match=r"metrics\.csv cannot be written: .*Free disk space"):
        log.log_metrics({"train_loss": 0.25}, 2)
    assert log.path.read_bytes() == before


def test_incomplete_rows_are_removed(tmp_path):
    log = MetricsLogger(tmp_path)
    log.log_metrics({"train_loss": 0.5}, 1)
    damage = bytes(200_000) + b"\n2,0.2\n3,abc,,,,\n4,0.125,,,,\n5,0.1,,,,,,7\n\0\0\0"
    log.path.write_bytes(log.path.read_bytes() + damage)
    with pytest.warns(UserWarning, match="5 of 7 rows are damaged and left out"):
        MetricsLogger(tmp_path).log_metrics({"train_loss": 0.0625}, 9)
    assert rows(log, "step", "train_loss") == [("1", "0.5"), ("4", "0.125"), ("9", "0.0625")]


def test_short_rows_are_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("train_loss,step\n0.5,1\n0.25\n")
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert read_rows(tmp_path / "metrics.csv")[1] == [{"train_loss": "0.5", "step": "1"}]


@pytest.mark.parametrize("header", ["qtep,train_loss,lr", "1,0.5,0.1"])
def test_a_log_without_its_header_is_kept_under_another_name(header, tmp_path):
    (tmp_path / "metrics.csv").write_text(f"{header}\n1,0.5,0.1\n2,0.25,0.1\n")
    with pytest.warns(UserWarning, match="damaged"):
        MetricsLogger(tmp_path).log_metrics({"train_loss": 0.125}, 3)
    assert (tmp_path / "metrics.damaged.csv").read_text().endswith("2,0.25,0.1\n")
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == ["3,0.125,,,,"]
