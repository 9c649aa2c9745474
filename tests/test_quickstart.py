"""The quickstart as a new user runs it: NRT learns what answers alone do not teach."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory without any earlier run; the recipes name their data relative to it."""
    return tmp_path_factory.mktemp("home")


def train(home: Path, recipe: str) -> tuple[str, dict, dict]:
    """What the command printed, and the first and last row of its metrics."""
    command = [sys.executable, "-m", "nrt_megatron", "train", str(ROOT / "recipes" / f"{recipe}.yaml")]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (home / "runs" / recipe / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(61))
    return done.stdout, rows[0], rows[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nrt_learns_the_sum_and_fine_tuning_on_answers_does_not(home):
    shown, before, after = train(home, "nrt-tiny-1n0g-cpu")
    assert before["eval/accuracy"] < 0.35 and before["eval/accuracy_greedy"] < 0.35
    assert after["eval/accuracy"] > 0.85 and after["eval/accuracy_greedy"] > 0.95
    assert after["eval/answer_prob"] > after["eval/answer_prob_no_trace"] + 0.15, "the trace carries the computation"
    assert after["logprob_gap/max"] < 1e-4
    assert "accuracy, greedy trace" in shown and "step_00000060" in shown, "the summary names result and checkpoint"

    _, _, tuned = train(home, "sft-tiny-1n0g-cpu")
    assert max(tuned[f"eval/accuracy{kind}"] for kind in ("", "_greedy", "_direct")) < 0.35
    samples = [json.loads(line) for line in (home / "runs/nrt-tiny-1n0g-cpu/samples.jsonl").read_text().splitlines()]
    assert {len(sample["traces"]) for sample in samples} == {8}
    assert all(len(t["c"]) == len(sample["b"]) for sample in samples for t in sample["traces"])
