"""From scored traces to what the update needs: rewards, advantages, token signals, and the token grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_megatron.data import Example
from nrt_megatron.data.batch import SequenceGrid, pad, place
from nrt_megatron.data.traces import EOS, LENGTH, MARKER
from nrt_megatron.objective.advantages import group_advantages, group_token_signal
from nrt_megatron.objective.loss import ANSWER, FORMAT, NONE, TRACE
from nrt_megatron.objective.metrics import (
    Metrics,
    Number,
    answer_metrics,
    distinct_ngrams,
    mean_of,
    trace_maxima,
    trace_metrics,
)
from nrt_megatron.objective.rewards import trace_rewards
from nrt_megatron.recipe import NRT
from nrt_megatron.rollout import Rollout


@dataclass(frozen=True)
class Scored:
    """Traces with what they are worth; N = G * K rows, traces of a prompt next to each other."""

    rollout: Rollout
    log_c: Tensor
    """float32 [N, A]: log pi(y*_i | x, z, m, y*_<i)"""
    log_b: Tensor
    """float32 [N, A]: log pi(y*_i | x, m, y*_<i), the same for all traces of a prompt"""
    answer_mask: Tensor
    """bool [N, A]"""
    rewards: Tensor
    """float [N]: after clipping to the baseline and penalties, before centring"""
    advantages: Tensor
    """float [N]"""
    token_signal: Tensor
    """float [N, A]"""
    metrics: Metrics
    """Everything watched in a step and known before the update (reward, trace and answer)"""
    maxima: dict[str, Number]


def score(rollout: Rollout, cfg: NRT) -> Scored:
    """Rewards of the traces, and group-relative advantages and token signals (`objective`)."""
    generated = rollout.generated
    G, K = generated.finish.shape
    device = generated.finish.device
    answer_lengths = torch.tensor([len(e.answer_ids) for e in rollout.examples], device=device).repeat_interleave(K)
    log_c = generated.answer_log_probs.flatten(0, 1)  # [N, A]
    log_b = generated.baseline_log_probs.repeat_interleave(K, dim=0)  # [N, A]
    mask = torch.arange(log_c.size(1), device=device) < answer_lengths[:, None]
    group = torch.arange(G, device=device).repeat_interleave(K)
    worth = trace_rewards(cfg.reward_scheme, log_c, log_b, mask, cfg)
    lengths, finish = generated.trace_lengths.flatten(), generated.finish.flatten()
    rewards = worth.final - cfg.empty_trace_penalty * (lengths == 0) - cfg.truncated_trace_penalty * (finish == LENGTH)
    advantages, of_rewards = group_advantages(
        rewards, group, cfg.center_reward_by, cfg.scale_reward_by, noise=worth.noise
    )
    signal, of_signal = group_token_signal(
        worth.token_signal, mask, group, cfg.token_signal, cfg.center_reward_by, cfg.scale_reward_by, worth.token_noise
    )
    metrics = worth.metrics | of_rewards | of_signal | answer_metrics(log_c, log_b, mask)
    metrics |= trace_metrics(lengths, finish == LENGTH, finish == MARKER)
    metrics |= distinct_ngrams(generated.trace_ids.flatten(0, 1), lengths, group)
    metrics["trace/eos_share"] = mean_of(finish == EOS)
    metrics["trace/marker_prob"] = mean_of(generated.marker_log_probs[..., 0].exp())
    return Scored(
        rollout=rollout,
        log_c=log_c,
        log_b=log_b,
        answer_mask=mask,
        rewards=rewards,
        advantages=advantages,
        token_signal=signal,
        metrics=metrics,
        maxima=trace_maxima(lengths),
    )


def sequence_grid(scored: Scored, marker_ids: tuple[int, ...]) -> SequenceGrid:
    """The token grid of `x | z | m | y*` with kinds, old log-probs, advantages and signals."""
    generated, examples = scored.rollout.generated, scored.rollout.examples
    K, device = generated.finish.size(1), generated.finish.device
    prompts, prompt_lengths = (t.to(device).repeat_interleave(K, dim=0) for t in pad([e.prompt_ids for e in examples]))
    answers, answer_lengths = (t.to(device).repeat_interleave(K, dim=0) for t in pad([e.answer_ids for e in examples]))
    traces, trace_lengths = generated.trace_ids.flatten(0, 1), generated.trace_lengths.flatten()
    finish, N = generated.finish.flatten(), len(traces)
    marker = torch.tensor(marker_ids, device=device).expand(N, -1)
    marker_lengths = torch.full_like(trace_lengths, len(marker_ids))
    lengths = prompt_lengths + trace_lengths + marker_lengths + answer_lengths
    width = int(lengths.max())

    def grid(prompt: Tensor, trace: Tensor, mark: Tensor, answer: Tensor, fill: float | int) -> Tensor:
        parts = [(prompt, prompt_lengths), (trace, trace_lengths), (mark, marker_lengths), (answer, answer_lengths)]
        return place(width, parts, fill)

    produced = (finish == MARKER)[:, None].expand_as(marker)
    no_prompt = torch.zeros_like(prompts, dtype=torch.float32)
    no_trace = torch.zeros_like(traces, dtype=torch.float32)
    no_marker = torch.zeros_like(marker, dtype=torch.float32)
    return SequenceGrid(
        tokens=grid(prompts, traces, marker, answers, -1),
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        trace_lengths=trace_lengths,
        kind=grid(
            torch.full_like(prompts, NONE),
            torch.full_like(traces, TRACE),
            torch.where(produced, TRACE, FORMAT),
            torch.full_like(answers, ANSWER),
            NONE,
        ),
        old_log_probs=grid(
            no_prompt,
            generated.trace_log_probs.flatten(0, 1),
            generated.marker_log_probs.flatten(0, 1),
            scored.log_c,
            0.0,
        ),
        advantages=scored.advantages.float(),
        token_signal=grid(no_prompt, no_trace, no_marker, scored.token_signal.float(), 0.0),
        eos_ended=finish == EOS,
        eos_ids=generated.stop_ids.flatten(),
        eos_log_probs=generated.stop_log_probs.flatten(),
    )


def answers_only(examples: Sequence[Example], marker_ids: tuple[int, ...], device: torch.device) -> SequenceGrid:
    """The grid of the `sft` scheme: `x | m | y*`, the empty trace, every answer token with signal 1."""
    prompts, prompt_lengths = (t.to(device) for t in pad([e.prompt_ids + marker_ids for e in examples]))
    answers, answer_lengths = (t.to(device) for t in pad([e.answer_ids for e in examples]))
    lengths = prompt_lengths + answer_lengths
    width, nothing = int(lengths.max()), torch.zeros(len(examples), device=device)

    def grid(prompt: Tensor, answer: Tensor, fill: float | int) -> Tensor:
        return place(width, [(prompt, prompt_lengths), (answer, answer_lengths)], fill)

    signal = grid(torch.zeros_like(prompts, dtype=torch.float32), torch.ones_like(answers, dtype=torch.float32), 0.0)
    return SequenceGrid(
        tokens=grid(prompts, answers, -1),
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        trace_lengths=torch.zeros_like(lengths),
        kind=grid(torch.full_like(prompts, NONE), torch.full_like(answers, ANSWER), NONE),
        old_log_probs=torch.zeros_like(signal),
        advantages=nothing,
        token_signal=signal,
        eos_ended=nothing.bool(),
        eos_ids=torch.zeros_like(lengths),
        eos_log_probs=nothing,
    )
