"""A run names the rank that holds the others up."""

from __future__ import annotations

from nrt_megatron.report import read_metrics
from tests.run import tiny
from tests.run.test_watch import collapsing, told


def test_a_slow_rank_is_named(tmp_path):
    def slow() -> None:
        told(tmp_path / "said")()
        import os

        from nrt_megatron.mcore.stopwatch import Stopwatch

        if os.environ["RANK"] == "1":
            take = Stopwatch.take
            Stopwatch.take = lambda self: take(self) + 100

    settings = collapsing(tmp_path, "watch.straggler_steps=3", "nrt.max_num_steps=4", ranks=2)
    tiny.train_ranks(settings, 2, slow)
    rows = read_metrics(tmp_path / "run")[1:]
    for phase in ("rollout", "update"):
        assert [row[f"straggler/{phase}_rank"] for row in rows] == [1] * 4
        assert all(row[f"straggler/{phase}_ratio"] > 2 and 0 < row[f"straggler/{phase}_min"] < 50 for row in rows)
        assert all(row[f"straggler/{phase}_max"] > row[f"straggler/{phase}_mean"] for row in rows)
    said = (tmp_path / "said").read_text().splitlines()
    assert sum("straggler: rank 1 on " in line and " in rollout" in line for line in said) == 1
    assert sum("straggler: rank 1 on " in line and " in update" in line for line in said) == 1
