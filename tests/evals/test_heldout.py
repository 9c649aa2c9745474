"""Held-out evaluation where a data-parallel rank has no question."""

from __future__ import annotations

from nrt_megatron.evals.heldout import METRICS, Evaluator
from nrt_megatron.recipe import Evaluation


def test_a_rank_without_questions_knows_the_same_metrics():
    """Ranks add their metrics up by position: one that has fewer names would never be answered."""
    evaluator = Evaluator(traces=None, answers=None, tokenizer=None, cfg=Evaluation(), max_new_tokens=1)
    found = evaluator.run([])
    assert tuple(found) == tuple(f"eval/{name}" for name in METRICS)
    assert all(float(total) == 0 and int(count) == 0 for total, count in found.values())
