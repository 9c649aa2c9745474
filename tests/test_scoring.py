"""From traces to the token grid: sampled ids are what is scored and trained, and each token carries its own kind."""

from __future__ import annotations

import pytest
import torch

from nrt_megatron.data import Example
from nrt_megatron.data.batch import micro_batch, micro_batches, place
from nrt_megatron.data.traces import EOS, LENGTH, MARKER, Generated
from nrt_megatron.objective.loss import ANSWER, FORMAT, NONE, TRACE
from nrt_megatron.recipe import NRT
from nrt_megatron.rollout import Rollout
from nrt_megatron.scoring import answers_only, score, sequence_grid

MARK = (7, 8)
EXAMPLES = [Example(0, (1, 2, 3), (20, 2), "", ""), Example(1, (4, 5), (30, 31, 2), "", "")]


def generated() -> Generated:
    """Two prompts, two traces each: ended by marker, by EOS at once (empty), by the limit, by marker."""
    ids = torch.tensor([[[40, 41, -1], [-1, -1, -1]], [[50, 51, 52], [60, -1, -1]]])
    columns = torch.arange(3)
    lengths = torch.tensor([[2, 0], [3, 1]])
    sampled = torch.where(columns < lengths[..., None], -0.1 * (1 + columns), 0.0)
    return Generated(
        trace_ids=ids,
        trace_log_probs=sampled,
        trace_entropies=-sampled,
        trace_lengths=lengths,
        finish=torch.tensor([[MARKER, EOS], [LENGTH, MARKER]]),
        stop_ids=torch.tensor([[8, 2], [52, 8]]),
        stop_log_probs=torch.tensor([[-0.6, -0.7], [-0.8, -0.9]]),
        marker_log_probs=torch.tensor([[[-1.0, -1.1], [-1.2, -1.3]], [[-1.4, -1.5], [-1.6, -1.7]]]),
        answer_log_probs=torch.tensor(
            [[[-0.5, -0.1, 9.0], [-2.0, -0.2, 9.0]], [[-1.0, -1.0, -0.3], [-1.0, -1.0, -0.3]]]
        ),
        baseline_log_probs=torch.tensor([[-1.0, -0.2, 9.0], [-1.0, -1.0, -0.3]]),
        sampled_tokens=torch.tensor([5, 7]),
        scored_tokens=torch.tensor([7, 12]),
    )


@pytest.fixture
def scored():
    return score(Rollout(EXAMPLES, generated()), NRT(reward_scheme="log_prob", num_generations_per_prompt=2))


def test_rewards_and_advantages_by_hand(scored):
    assert scored.rewards.tolist() == pytest.approx([-0.6, -2.2, -2.3, -2.3])
    assert scored.advantages.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), 0.0, 0.0])  # +-1/sqrt(2), and no spread
    sums = {k: float(s) / float(c) for k, (s, c) in scored.metrics.items() if c}
    assert sums["reward/degenerate_group_share"] == 0.5
    assert sums["reward/above_baseline_share"] == 0.25  # only the first trace beats its empty one
    assert sums["trace/length_mean"] == 1.5 and sums["trace/empty_share"] == 0.25
    assert (
        sums["trace/marker_share"] == 0.5 and sums["trace/truncated_share"] == 0.25 and sums["trace/eos_share"] == 0.25
    )
    assert scored.maxima["trace/length_max"] == 3


def test_the_grid_holds_the_sampled_ids_between_prompt_and_answer(scored):
    grid = sequence_grid(scored, MARK)
    assert [row[row >= 0].tolist() for row in grid.tokens] == [
        [1, 2, 3, 40, 41, 7, 8, 20, 2],
        [1, 2, 3, 7, 8, 20, 2],
        [4, 5, 50, 51, 52, 7, 8, 30, 31, 2],
        [4, 5, 60, 7, 8, 30, 31, 2],
    ]
    T, F, A, N = TRACE, FORMAT, ANSWER, NONE
    assert grid.kind.tolist() == [
        [N, N, N, T, T, T, T, A, A, N],  # the policy drew the marker: it is part of the trace term
        [N, N, N, F, F, A, A, N, N, N],  # forced: format term only
        [N, N, T, T, T, F, F, A, A, A],
        [N, N, T, T, T, A, A, A, N, N],
    ]
    assert grid.old_log_probs[0, 3:9].tolist() == pytest.approx([-0.1, -0.2, -1.0, -1.1, -0.5, -0.1])
    assert grid.eos_ended.tolist() == [False, True, False, False] and grid.eos_ids[1] == 2
    assert grid.token_signal[1].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("traces_per_tree", [0, 2])
def test_each_token_is_predicted_by_the_one_before_it(scored, traces_per_tree):
    grid = sequence_grid(scored, MARK)
    batch = micro_batch(grid, torch.arange(4), temperature=2.0, traces_per_tree=traces_per_tree)
    b = len(batch.tokens)
    before = [int(batch.tokens[s % b, s // b]) for s in batch.sources.tolist()]
    told = [[] for _ in range(4)]
    for sequence, source, target in zip(batch.sequence.tolist(), before, batch.targets.tolist()):
        told[sequence].append((source, target))
    assert told == [
        [(3, 40), (40, 41), (41, 7), (7, 8), (8, 20), (20, 2)],
        [(3, 7), (7, 8), (8, 20), (20, 2), (3, 2)],  # last: the drawn end token, predicted where the marker is
        [(5, 50), (50, 51), (51, 52), (52, 7), (7, 8), (8, 30), (30, 31), (31, 2)],
        [(5, 60), (60, 7), (7, 8), (8, 30), (30, 31), (31, 2)],
    ]
    assert torch.equal(batch.scale, torch.where(batch.kind == TRACE, 0.5, 1.0)), "sampled tokens at the temperature"
    # Positions are those of the sequence, wherever a token lies in the batch.
    assert batch.position_ids[0, : 3 + 5].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_tree_feeds_the_prompt_once_and_less_than_rows_do(scored):
    grid = sequence_grid(scored, MARK)
    rows, tree = (micro_batch(grid, torch.arange(2), temperature=1.0, traces_per_tree=k) for k in (0, 2))
    assert tree.tokens.tolist() == [[1, 2, 3, 40, 41, 7, 8, 20, 7, 8, 20]]
    assert tree.branches.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5]]
    assert tree.num_tokens == 11 < rows.num_tokens == 14 < rows.tokens.numel() == 16


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_hold_every_scored_token_once(scored, size):
    grid = sequence_grid(scored, MARK)
    batches = micro_batches(grid, torch.arange(4), size, temperature=1.0)
    assert sum(len(batch.targets) for batch in batches) == int((grid.kind > 0).sum()) + 1
    assert sum(batch.num_sequences for batch in batches) == 4
    assert (
        len(
            {
                batch.tokens.size(1)
                for batch in micro_batches(grid, torch.arange(4), size, temperature=1.0, same_width=True)
            }
        )
        == 1
    )


def test_penalties_lower_the_reward_of_empty_and_truncated_traces():
    cfg = NRT(
        reward_scheme="log_prob", num_generations_per_prompt=2, empty_trace_penalty=1.0, truncated_trace_penalty=0.25
    )
    rewards = score(Rollout(EXAMPLES, generated()), cfg).rewards
    assert rewards.tolist() == pytest.approx([-0.6, -3.2, -2.55, -2.3])


def test_answers_only_trains_the_answer_after_the_empty_trace():
    grid = answers_only(EXAMPLES, MARK, torch.device("cpu"))
    assert [row[row >= 0].tolist() for row in grid.tokens] == [[1, 2, 3, 7, 8, 20, 2], [4, 5, 7, 8, 30, 31, 2]]
    assert (grid.kind == ANSWER).sum(1).tolist() == [2, 3] and not ((grid.kind != NONE) & (grid.kind != ANSWER)).any()


def test_place_keeps_segments_of_no_length_out():
    values = torch.tensor([[1, 2], [3, 4]])
    empty = torch.zeros(2, 0, dtype=torch.int64)
    out = place(
        4, [(values, torch.tensor([0, 2])), (empty, torch.tensor([0, 0])), (values + 10, torch.tensor([2, 1]))], -1
    )
    assert out.tolist() == [[11, 12, -1, -1], [3, 4, 13, -1]]
