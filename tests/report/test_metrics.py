"""metrics.jsonl: what is written, and what a resumed run keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nrt_megatron.recipe import ConfigError
from nrt_megatron.report import MetricsWriter, read_metrics
from nrt_megatron.report.jsonl import StepLog
from nrt_megatron.report.metrics import clean_row


def write(run_dir, steps, resume_step=None, tensorboard=False, **values):
    writer = MetricsWriter(run_dir, resume_step, tensorboard)
    for step in steps:
        writer.write({"loss": step / 8, "step": step, **values})
    writer.close()


def test_a_row_has_step_first_then_sorted_plain_values():
    row = clean_row({"loss": torch.tensor(0.5), "a": np.float32(0.25), "step": torch.tensor(3), "n": 7, "flag": True})
    assert list(row) == ["step", "a", "flag", "loss", "n"]
    assert row == {"step": 3, "a": 0.25, "flag": True, "loss": 0.5, "n": 7}
    assert [type(value) for value in row.values()] == [int, float, bool, float, int]


def test_nonfinite_values_are_null_and_counted(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    written = writer.write({"step": 1, "a": math.nan, "b": torch.tensor(-math.inf), "c": 1.0})
    writer.close()
    assert written == {"step": 1, "a": None, "b": None, "c": 1.0, "nonfinite": 2}
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 1.0, "nonfinite": 2}\n'


def test_rows_are_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path / "new" / "run", tensorboard=False)
    writer.write({"step": 0, "eval/accuracy": 0.5})
    assert read_metrics(tmp_path / "new" / "run") == [{"step": 0, "eval/accuracy": 0.5}]
    writer.close()


def test_resume_keeps_earlier_rows_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    # Spacing and order that this writer would not choose: kept rows are copied, not written again.
    first = b'{"b":1,  "step": 2}\n'
    path.write_bytes(first + b'{"step": 3, "loss": 0.1}\n{"step": 4, "loss": 0.1}\n{"step": 5, "lo')
    write(tmp_path, [4], resume_step=3)
    assert path.read_bytes() == first + b'{"step": 3, "loss": 0.1}\n{"step": 4, "loss": 0.5}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resumed_rows_equal_those_of_one_run(tmp_path):
    write(tmp_path / "one", range(6))
    write(tmp_path / "two", range(5))
    write(tmp_path / "two", range(3, 6), resume_step=2)
    one, two = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, [0])
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 0.0}]


@pytest.mark.parametrize("line", [b"not json\n", b"[1]\n", b'{"loss": 1}\n'])
def test_a_foreign_line_is_refused_and_the_file_stays(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    before = b'{"step": 1}\n' + line + b'{"step": 2}\n'
    path.write_bytes(before)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2 "):
        MetricsWriter(tmp_path, 1, tensorboard=False)
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_said_in_one_line(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl", None)
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(ConfigError, match=r"jsonl cannot be written \(No space left on device\)") as raised:
        log.append({"step": 1})
    assert len(str(raised.value).splitlines()) == 1
    log.close()


def test_tensorboard_shows_the_same_values_and_hides_what_was_resumed_over(tmp_path):
    write(tmp_path, range(1, 5), tensorboard=True, name="text is not a scalar", gone=math.nan)
    write(tmp_path, [3], resume_step=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {(e.step, e.value) for e in events.Scalars("loss")} == {(1, 1 / 8), (2, 2 / 8), (3, 3 / 8)}
    assert set(events.Tags()["scalars"]) == {"loss", "nonfinite"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
