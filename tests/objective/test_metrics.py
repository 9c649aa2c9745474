"""Step metrics by hand; every one is (sum, count)."""

from __future__ import annotations

import math

import pytest
import torch

from nrt_megatron.objective.metrics import answer_metrics, distinct_ngrams, trace_maxima, trace_metrics


def values(metrics) -> dict[str, float]:
    return {name: float(total) / float(count) for name, (total, count) in metrics.items() if float(count)}


def test_trace_metrics():
    lengths = torch.tensor([0, 4, 8, 8])
    metrics = trace_metrics(lengths, torch.tensor([False, False, True, True]), torch.tensor([True, True, False, False]))
    assert values(metrics) == {
        "trace/length_mean": 5.0,
        "trace/empty_share": 0.25,
        "trace/truncated_share": 0.5,
        "trace/marker_share": 0.5,
    }
    assert float(trace_maxima(lengths)["trace/length_max"]) == 8
    assert float(trace_maxima(lengths[:0])["trace/length_max"]) == -math.inf


def brute_force(ids, lengths, group, n) -> tuple[int, int]:
    grams = [
        (g, *row[i : i + n])
        for row, length, g in zip(ids.tolist(), lengths.tolist(), group.tolist())
        for i in range(length - n + 1)
    ]
    return len(set(grams)), len(grams)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_ngrams_equal_a_plain_count(n):
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(0, 3, (10, 9), generator=generator) * 50_000  # ids as large as real vocabularies
    lengths = torch.randint(0, 10, (10,), generator=generator)
    ids[torch.arange(9) >= lengths[:, None]] = -1
    group = torch.randint(0, 3, (10,), generator=generator) - 1
    distinct, total = distinct_ngrams(ids, lengths, group, n)[f"trace/distinct_{n}gram"]
    assert (int(distinct), int(total)) == brute_force(ids, lengths, group, n)


def test_distinct_ngrams_of_a_collapsed_group_and_of_empty_traces():
    same = torch.tensor([[1, 2, 3]] * 4)
    lengths, group = torch.full((4,), 3), torch.zeros(4, dtype=torch.int64)
    assert values(distinct_ngrams(same, lengths, group)) == {"trace/distinct_2gram": 0.25}
    for ids in (same, same[:, :0]):
        assert [float(x) for x in distinct_ngrams(ids, lengths * 0, group)["trace/distinct_2gram"]] == [
            0.0,
            0.0,
        ]


def test_answer_metrics_split_by_the_baseline():
    log_c = torch.tensor([[0.8, 0.2, 1.0], [0.6, 1.0, 1.0]]).log()
    log_b = torch.tensor([[0.4, 0.9, 1.0], [0.1, 1.0, 1.0]]).log()
    log_c[:, 2] = log_b[1, 1] = math.nan
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert values(answer_metrics(log_c, log_b, mask)) == pytest.approx(
        {
            "answer/hard_share": 2 / 3,
            "answer/prob_with_trace": 1.6 / 3,
            "answer/prob_without_trace": 1.4 / 3,
            "answer/geometric_prob_with_trace": (math.sqrt(0.16) + 0.6) / 2,
            "answer/geometric_prob_without_trace": (math.sqrt(0.36) + 0.1) / 2,
            "answer/prob_hard_with_trace": 0.7,
            "answer/prob_hard_without_trace": 0.25,
            "answer/prob_easy_with_trace": 0.2,
            "answer/prob_easy_without_trace": 0.9,
        }
    )
