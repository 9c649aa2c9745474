"""Progress and final table: numbers computed by hand."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from nrt_megatron.report import Progress, print_summary
from nrt_megatron.report.format import duration, short, tokens_per_second

EVAL = {
    "eval/accuracy": 0.21,
    "eval/accuracy_greedy": 0.12,
    "eval/answer_prob": 0.5,
    "eval/answer_prob_no_trace": 0.4,
}
STEP = {
    "loss": 0.5,
    "grad_norm": 0.25,
    "lr": 3e-4,
    "reward/trace_mean": 0.6,
    "trace/length_mean": 11.0,
    "trace/entropy": 1.5,
    "time/rollout": 2.0,
    "tokens/rollout": 3000,
    "time/update": 0.5,
    "tokens/update": 2000,
    "memory/peak_bytes": 2**30,
}


def rows():
    last = STEP | {"step": 2, "reward/trace_mean": 0.8, "time/rollout": 1.0, "memory/peak_bytes": 1.5 * 2**30}
    return [{"step": 0} | EVAL, STEP | {"step": 1}, last | EVAL | {"eval/accuracy": 0.93}]


def printed(act, **console):
    out = io.StringIO()
    act(Console(file=out, width=200, highlight=False, **console))
    return out.getvalue()


def show_all(console):
    with Progress(2, console=console) as progress:
        for row in rows():
            progress.show(row)
        progress.say("checkpoint saved")


def test_without_a_terminal_there_is_one_line_for_each_row():
    lines = printed(show_all).splitlines()
    assert len(lines) == 4
    assert lines[0] == "step 0/2  accuracy 0.210  greedy 0.120  P(y*) with trace 0.500  without 0.400"
    assert lines[1].startswith("step 1/2  reward 0.600  trace length 11.0  entropy 1.500  loss 0.5000")
    assert "rollout 1.5k tok/s  update 4.0k tok/s  left 0:0" in lines[1]
    assert "accuracy 0.930" in lines[2] and lines[2].endswith("left 0:00")
    assert lines[3] == "checkpoint saved"


def test_on_a_terminal_the_last_state_stays():
    text = printed(show_all, force_terminal=True, color_system=None)
    assert "step 2/2" in text and "held out at step 2:" in text and "checkpoint saved" in text


def test_a_value_that_was_not_finite_is_a_dash():
    def show(console):
        with Progress(5, console=console) as progress:
            progress.show({"step": 1, "loss": None, "grad_norm": None, "nonfinite": 2})

    assert "loss –  grad norm –" in printed(show)


def test_time_left_follows_the_mean_step_and_leaves_evaluations_out(monkeypatch):
    now = iter([100.0, 150.0, 152.0, 156.0])  # start, evaluation, two steps of 2 and 4 seconds
    clock = SimpleNamespace(monotonic=lambda: next(now))  # its own: other threads look at the real one
    monkeypatch.setattr("nrt_megatron.report.progress.time", clock)
    progress = Progress(12, done=0, console=Console(file=io.StringIO()))
    assert progress.seconds_left is None
    progress.show({"step": 0, "eval/accuracy": 0.5})
    progress.show({"step": 1, "loss": 1.0})
    progress.show({"step": 2, "loss": 1.0})
    assert progress.seconds_left == pytest.approx(3.0 * 10)


def cells(text):
    """Rows of a table by their first cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_summary_compares_first_and_last():
    text = printed(lambda console: print_summary(rows(), Path("runs/x"), Path("runs/x/checkpoints/step_2"), console))
    table = cells(text)
    assert table["held out"] == ["step 0", "step 2"]
    assert table["accuracy, sampled trace"] == ["0.210", "0.930"]
    assert table["accuracy, greedy trace"] == ["0.120", "0.120"]
    assert table["P(y*) per token, with trace"] == ["0.500", "0.500"]
    assert table["P(y*) per token, without trace"] == ["0.400", "0.400"]
    assert table["training"] == ["step 1", "step 2"]
    assert table["trace reward"] == ["0.600", "0.800"]
    assert table["rollout (tokens/s, mean)"] == [
        "",
        "2.0k",
    ]  # 6000 tokens in 3 s, not the mean of 1500 and 3000
    assert table["peak memory of a rank"] == ["", "1.50 GiB"]
    assert "accuracy, no trace" not in table and "scoring (tokens/s, mean)" not in table
    assert text.splitlines()[-2:] == [
        "checkpoint  runs/x/checkpoints/step_2",
        "metrics     runs/x/metrics.jsonl",
    ]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_summary_of_a_run_that_ended_early(count):
    text = printed(lambda console: print_summary(rows()[:count], Path("runs/x"), None, console))
    assert "checkpoint  none" in text
    if count:
        assert cells(text)["accuracy, sampled trace"] == ["0.210", ""]


def test_numbers_as_people_read_them():
    assert [short(v) for v in (7.6, 999, 1234, 2.5e6)] == ["8", "999", "1.2k", "2.5M"]
    assert [duration(s) for s in (0, 59.7, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
    assert tokens_per_second([{"tokens/scoring": 5, "time/scoring": 0.0}], "scoring") is None


def test_the_room_needs_no_torch():
    code = "import sys, nrt_megatron.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
