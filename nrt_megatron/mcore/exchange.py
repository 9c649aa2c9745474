"""Prompts dealt to the replicas that draw, and their traces brought to the ranks that train on them.

A rollout may have more replicas of the model than training: context-parallel ranks hold the same weights, and another
layout may need fewer ranks for each.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from nrt_megatron.data.traces import Generated, Generator, Request


class SharingGenerator:
    """Implements `data.traces.Generator` on many replicas that draw: each takes an equal share of the prompts.

    drawers: one rank of each of these replicas; every rank is in such a group, and its place in it is that of its
    replica. askers: one rank of each training replica, whose requests differ; None where all ranks of `drawers` ask for
    the same. Traces depend on their prompt and on nothing else, so who draws them does not show.
    """

    def __init__(self, inner: Generator, drawers: dist.ProcessGroup, askers: dist.ProcessGroup | None = None):
        self.inner, self.drawers, self.askers = inner, drawers, askers

    def generate(self, request: Request) -> Generated:
        """Traces for the prompts of this rank's own request. Collective over both groups.

        Where there are more replicas than prompts, the rest draw for the first prompt once more, and nobody sees it.
        `scoring_seconds` are those of this rank's replica.
        """
        requests = [request] if self.askers is None else _all_requests(request, self.askers)
        whole = Request.concatenate(requests)
        members, me = self.drawers.size(), self.drawers.rank()
        shares = [list(range(first, len(whole.prompts), members)) for first in range(members)]
        part = self.inner.generate(whole.subset(shares[me] or [0]))
        gathered = _gather(part.groups(slice(len(shares[me]))), whole, self.drawers, [len(share) for share in shares])
        own = 0 if self.askers is None else self.askers.rank()
        start = sum(len(other.prompts) for other in requests[:own])
        place = {prompt: row for row, prompt in enumerate(prompt for share in shares for prompt in share)}
        rows = [place[prompt] for prompt in range(start, start + len(request.prompts))]
        return gathered.groups(torch.tensor(rows, dtype=torch.int64))


def _all_requests(request: Request, group: dist.ProcessGroup) -> list[Request]:
    requests: list[Request | None] = [None] * group.size()
    dist.all_gather_object(requests, request, group=group)
    return requests


def _gather(part: Generated, request: Request, group: dist.ProcessGroup, counts: list[int]) -> Generated:
    """The parts of all ranks of the group, one after the other; `counts` prompts each, of the request in all."""
    answers = max((len(answer) for answer in request.answers), default=0) if request.answers is not None else 0
    done = {"scoring_seconds": part.scoring_seconds}
    for field in fields(Generated):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            if field.name in ("answer_log_probs", "baseline_log_probs"):
                value = pad(value, (0, answers - value.size(-1)))
            done[field.name] = _gather_rows(value.contiguous(), group, counts)
    return Generated(**done)


def _gather_rows(rows: Tensor, group: dist.ProcessGroup, counts: list[int]) -> Tensor:
    """Concatenates tensors that differ in their first dimension, `counts[rank]`."""
    padded = pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(counts) - len(rows)))
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
