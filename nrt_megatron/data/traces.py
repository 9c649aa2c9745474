"""What a generator is asked for, and what it gives back. Ids and tensors; no text, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Optional, Protocol

from torch import Tensor

MARKER, EOS, LENGTH = 0, 1, 2
"""How a trace ended: the policy drew the marker, drew an end token, or reached the limit."""


@dataclass(frozen=True)
class Request:
    """G prompts to sample K traces for, and the answers to score after each trace and without one."""

    prompts: list[tuple[int, ...]]
    indices: list[int]
    """Prompt indices; with the step they fix the randomness of the traces. A row that a small file gives twice in
    one step gets the same traces twice."""
    num_generations: int
    """K"""
    max_new_tokens: int
    """Trace limit, marker excluded; 0 scores or continues the empty trace."""
    step: int = 0
    answers: Optional[list[tuple[int, ...]]] = None
    """Reference answers to teacher-force after each trace; None: sample only."""
    baseline: bool = True
    """Also score the answers after the empty trace."""
    greedy: bool = False

    def subset(self, groups: list[int]) -> Request:
        """The request for some of the prompts."""
        return Request(
            prompts=[self.prompts[g] for g in groups],
            indices=[self.indices[g] for g in groups],
            num_generations=self.num_generations,
            max_new_tokens=self.max_new_tokens,
            step=self.step,
            answers=None if self.answers is None else [self.answers[g] for g in groups],
            baseline=self.baseline,
            greedy=self.greedy,
        )

    @staticmethod
    def concatenate(requests: Sequence[Request]) -> Request:
        """One request for the prompts of all, which must agree in everything else."""
        first = requests[0]
        assert all(r.subset([]) == first.subset([]) for r in requests), "requests for different things"
        return replace(
            first,
            prompts=[prompt for r in requests for prompt in r.prompts],
            indices=[index for r in requests for index in r.indices],
            answers=None if first.answers is None else [answer for r in requests for answer in r.answers],
        )


@dataclass(frozen=True)
class Generated:
    """Traces of G prompts, K each; at most L tokens. Log-probs are float32, natural, 0 in the padding."""

    trace_ids: Tensor
    """int64 [G, K, L]: as sampled, without marker and end token; -1 in the padding"""
    trace_log_probs: Tensor
    """[G, K, L], at the sampling temperature, before top-k and top-p"""
    trace_entropies: Tensor
    """[G, K, L], nats"""
    trace_lengths: Tensor
    """int64 [G, K]"""
    finish: Tensor
    """int64 [G, K]: MARKER, EOS or LENGTH"""
    stop_ids: Tensor
    """int64 [G, K]: last token drawn (the end token where finish is EOS)"""
    stop_log_probs: Tensor
    """[G, K]"""
    marker_log_probs: Tensor
    """[G, K, M]: the sampler's where the policy drew the marker, else of the forced marker"""
    answer_log_probs: Tensor
    """[G, K, A]: log c_i; A is 0 when nothing was scored"""
    baseline_log_probs: Tensor
    """[G, A]: log b_i"""
    sampled_tokens: Tensor
    """int64 [G]: tokens drawn for the prompt's traces, markers and end tokens included"""
    scored_tokens: Tensor
    """int64 [G]: tokens teacher-forced on the cache: marker and answer, for each trace and once per prompt"""
    scoring_seconds: float = 0.0
    """Wall-clock seconds of the teacher-forced forwards, which run between those of the sampling."""

    @property
    def num_sampled_tokens(self) -> int:
        return int(self.sampled_tokens.sum())

    @property
    def num_scored_tokens(self) -> int:
        return int(self.scored_tokens.sum())

    def groups(self, chosen: slice | Tensor) -> Generated:
        """What was generated for some of the prompts; `chosen` indexes them."""
        index = chosen if isinstance(chosen, slice) else chosen.to(self.finish.device)
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scoring_seconds"}
        return replace(self, **{name: value[index] for name, value in tensors.items()})


class Generator(Protocol):
    """Anything that samples traces from the current policy and scores answers after them."""

    def generate(self, request: Request) -> Generated:
        """Every rank of a model replica calls it with the same request and gets the same result."""
        ...
