"""Who draws a trace does not show: dealt prompts come back in the asker's order, whatever the groups."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist

from nrt_megatron.data.batch import pad
from nrt_megatron.data.traces import Generated, Request
from nrt_megatron.mcore import runtime
from nrt_megatron.mcore.exchange import SharingGenerator
from tests.distributed import run_ranks
from tests.mcore import tiny

K, LIMIT, M = 2, 4, 2


class Drawing:
    """Numbers that a prompt alone decides; answers are padded to the longest of the request, as a real one does."""

    def __init__(self):
        self.drawn: list[int] = []

    def generate(self, request: Request) -> Generated:
        self.drawn += request.indices
        index = torch.tensor(request.indices)
        answers, lengths = pad(request.answers if request.answers is not None else [()] * len(index))
        answered = torch.arange(answers.size(1)) < lengths[:, None]

        def numbers(*shape: int) -> torch.Tensor:
            size = torch.Size(shape)
            return index.view(-1, *[1] * len(size)) * 100 + torch.arange(size.numel()).view(size)

        scores = torch.where(answered, numbers(answers.size(1)).float(), 0.0)
        return Generated(
            trace_ids=numbers(K, LIMIT),
            trace_log_probs=numbers(K, LIMIT).float(),
            trace_entropies=numbers(K, LIMIT).float() + 1,
            trace_lengths=numbers(K),
            finish=numbers(K) + 1,
            stop_ids=numbers(K) + 2,
            stop_log_probs=numbers(K).float(),
            marker_log_probs=numbers(K, M).float(),
            answer_log_probs=scores[:, None].repeat(1, K, 1),
            baseline_log_probs=scores + answered,
            sampled_tokens=index + 1,
            scored_tokens=index + 2,
        )


def request(indices: range, scoring: bool = True) -> Request:
    answers = [tuple(range(1 + i % 3)) for i in indices] if scoring else None
    return Request([(1,) * (1 + i) for i in indices], list(indices), K, LIMIT, step=3, answers=answers)


CASES = {
    "two replicas of two ranks ask for the same": ([[0, 2], [1, 3]], None, 5),
    "more that draw than prompts": ([[0, 1, 2, 3]], None, 3),
    "each that asks is two that draw": ([[0, 1, 2, 3]], [[0, 2], [1, 3]], 4),
    "replicas that draw lie across those that ask": ([[0, 2], [1, 3]], [[0, 1], [2, 3]], 3),
}
"""Groups of ranks that draw, groups that ask, and prompts of each that asks."""


def draw():
    runtime.initialize(tiny.recipe())
    return {(name, scoring): draw_case(*case, scoring) for name, case in CASES.items() for scoring in (True, False)}


def draw_case(drawer_ranks, asker_ranks, per_asker: int, scoring: bool):
    drawers, _ = dist.new_subgroups_by_enumeration(drawer_ranks)
    askers = None if asker_ranks is None else dist.new_subgroups_by_enumeration(asker_ranks)[0]
    own = 0 if askers is None else askers.rank()
    inner = Drawing()
    asked = request(range(own * per_asker, (own + 1) * per_asker), scoring)
    got = SharingGenerator(inner, drawers, askers).generate(asked)
    dist.barrier()  # rank 0 keeps the store that the others may still be joining their groups through
    return inner.drawn, asked.indices, got


@pytest.fixture(scope="module")
def drawn():
    return run_ranks(4, draw)


@pytest.mark.parametrize("scoring", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_dealt_prompts_come_back_in_order(drawn, name, scoring):
    drawers, askers, per_asker = CASES[name]
    results = [rank[name, scoring] for rank in drawn]
    for _, asked, got in results:
        expected = Drawing().generate(request(range(asked[0], asked[0] + per_asker), scoring))
        for field in fields(Generated):
            value, known = getattr(got, field.name), getattr(expected, field.name)
            if isinstance(value, torch.Tensor):
                width = known.size(-1)  # answers are padded to the longest that anybody asked for
                assert torch.equal(value[..., :width], known) and not value[..., width:].any(), field.name
        assert got.num_sampled_tokens == expected.num_sampled_tokens
    total = per_asker * (1 if askers is None else len(askers[0]))
    by_replica = [results[rank][0] for rank in drawers[0]]
    assert max(len(indices) for indices in by_replica) == -(-total // len(by_replica))
    assert set().union(*by_replica) == set(range(total))


def test_requests_for_different_things_are_not_joined():
    one = request(range(2))
    with pytest.raises(AssertionError, match="different things"):
        Request.concatenate([one, replace(one, step=4)])
