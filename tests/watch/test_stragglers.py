"""Which rank is slow, by hand-made seconds."""

from __future__ import annotations

import math

import pytest

from nrt_megatron.watch import Position, Stragglers


def replicas(*hosts: str, ranks_each: int = 1, stages: int = 1) -> list[Position]:
    """Megatron's order: tensor ranks are neighbours, then replicas, then stages."""
    return [
        Position(host, index, stage)
        for stage in range(stages)
        for index, host in enumerate(hosts)
        for _ in range(ranks_each)
    ]


def test_figures_of_a_phase():
    judge = Stragglers({"update": replicas("a", "b", "c")}, ratio=1.5, steps=2)
    metrics, lines = judge.judge({"update": [1.0, 4.0, 3.0]})
    assert lines == []
    assert metrics == pytest.approx(
        {
            "straggler/update_max": 4.0,
            "straggler/update_min": 1.0,
            "straggler/update_mean": 8 / 3,
            "straggler/update_ratio": 4.0 / 2.0,
            "straggler/update_rank": 1,
        }
    )


def test_said_once_when_the_same_rank_is_slow_for_long_enough():
    judge = Stragglers({"rollout": replicas("a", "b", ranks_each=2)}, ratio=1.5, steps=3)
    slow, other, even = [1.0, 1.0, 2.0, 2.1], [2.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.1, 1.1]
    said = [judge.judge({"rollout": s})[1] for s in (slow, slow, even, slow, slow, other, slow, slow, slow, slow, slow)]
    assert [len(lines) for lines in said] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert said[8][0].startswith("straggler: ranks 2, 3 on b took 2.1 times as long as the peers in rollout")


def test_stages_are_compared_with_their_like():
    """The last stage has the output layer as well: slower than the first in every replica, and no straggler."""
    judge = Stragglers({"update": replicas("a", "b", stages=2)}, ratio=1.5, steps=1)
    metrics, lines = judge.judge({"update": [1.0, 1.2, 5.0, 5.0]})
    assert (metrics["straggler/update_rank"], lines) == (1, [])
    assert metrics["straggler/update_ratio"] == pytest.approx(1.2)
    metrics, (line,) = judge.judge({"update": [1.0, 1.2, 10.0, 5.0]})
    assert metrics["straggler/update_rank"] == 2 and "rank 2 on a took 2.0 times" in line


@pytest.mark.parametrize("seconds", [[1.0], [math.nan, math.nan], [0.0, 0.0]])
def test_nothing_to_compare(seconds):
    positions = replicas(*"ab"[: len(seconds)])
    assert Stragglers({"rollout": positions}, 1.5, 1).judge({"rollout": seconds}) == ({}, [])


def test_ranks_of_one_replica_are_not_compared():
    assert Stragglers({"rollout": replicas("a", ranks_each=2)}, 1.5, 1).judge({"rollout": [1.0, 9.0]}) == ({}, [])
