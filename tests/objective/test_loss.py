"""The loss: values by hand, gradients, and that no split, padding or foreign token changes it."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from nrt_megatron.objective.loss import (
    ANSWER,
    FORMAT,
    LOSS_MAXIMA,
    LOSS_METRICS,
    NONE,
    TRACE,
    LossOutput,
    TokenBatch,
    nrt_loss,
)
from nrt_megatron.recipe import NRT, PRESETS

ONE = NRT(loss_normalizer=1.0)
OPTIONAL = ("entropy", "sampler_log_probs")
TENSORS = tuple(f.name for f in fields(TokenBatch) if f.name not in ("num_sequences", *OPTIONAL))


def batch(rows: list[tuple], num_sequences: int = 1, dtype: torch.dtype = torch.float64) -> TokenBatch:
    """rows: (log-prob, old log-prob, advantage, signal, kind, sequence)."""
    columns = list(zip(*rows)) or [()] * 6
    floats = [torch.tensor(c, dtype=dtype) for c in columns[:4]]
    floats[0].requires_grad_()
    return TokenBatch(*floats, *(torch.tensor(c, dtype=torch.int64) for c in columns[4:]), num_sequences)


def gradient(out: LossOutput, tokens: TokenBatch) -> list[float]:
    return torch.autograd.grad(out.loss_sum, tokens.log_probs)[0].tolist()


def random_batch(num_sequences: int = 6, length: int = 9) -> TokenBatch:
    g = torch.Generator().manual_seed(11)
    n = num_sequences * length
    sequence = torch.arange(num_sequences).repeat_interleave(length)
    log_probs = -2 * torch.rand(n, generator=g, dtype=torch.float64)
    return TokenBatch(
        log_probs=log_probs.requires_grad_(),
        old_log_probs=log_probs.detach() + 0.4 * torch.randn(n, generator=g, dtype=torch.float64),
        advantages=torch.randn(num_sequences, generator=g, dtype=torch.float64)[sequence],
        token_signal=torch.randn(n, generator=g, dtype=torch.float64),
        kind=torch.randint(0, 4, (n,), generator=g),
        sequence=sequence,
        num_sequences=num_sequences,
        entropy=torch.rand(n, generator=g, dtype=torch.float64),
    )


def part_of(tokens: TokenBatch, index: torch.Tensor) -> TokenBatch:
    """Some of the tokens, their sequences renumbered as a micro-batch does."""
    given = [name for name in (*TENSORS, *OPTIONAL) if getattr(tokens, name) is not None]
    some = replace(tokens, **{name: getattr(tokens, name)[index] for name in given})
    ids, sequence = some.sequence.unique(return_inverse=True)
    return replace(some, sequence=sequence, num_sequences=len(ids))


def test_every_term_by_hand():
    rows = [
        (math.log(0.5), math.log(0.5), 2.0, 9.0, TRACE, 0),  # ratio 1
        (math.log(0.5), math.log(0.55), 2.0, 9.0, TRACE, 0),  # ratio 0.909..
        (math.log(0.5), math.log(0.3), 2.0, 9.0, TRACE, 0),  # ratio 1.67, A > 0: dropped
        (math.log(0.5), math.log(0.3), -1.0, 9.0, TRACE, 1),  # ratio 1.67, A < 0: clamped to 1.28
        (math.log(0.3), math.log(0.5), -1.0, 9.0, TRACE, 1),  # ratio 0.6, A < 0: dropped
        (math.log(0.3), math.log(0.5), 2.0, 9.0, TRACE, 0),  # ratio 0.6, A > 0: clamped to 0.8
        (math.log(0.1), math.log(0.9), 5.0, 9.0, FORMAT, 1),
        (math.log(0.4), math.log(0.9), 5.0, 3.0, ANSWER, 0),
        (math.log(0.2), math.log(0.9), 5.0, -0.5, ANSWER, 1),
    ]
    tokens = batch(rows, 2)
    out = nrt_loss(tokens, NRT())
    weights = [-2.0, -2 / 1.1, 0.0, 1.28, 0.0, -1.6]
    trace = sum(w * r[0] for w, r in zip(weights, rows)) / 512
    marker, token = -math.log(0.1) / 512, (-3 * math.log(0.4) + 0.5 * math.log(0.2)) / 512
    assert {k: v.item() for k, v in out.terms.items()} == pytest.approx(
        {"trace": trace, "format": marker, "token": token}
    )
    assert out.loss_sum.item() == pytest.approx(trace + 0.3 * marker + token)
    assert {k: int(v) for k, v in out.counts.items()} == {"trace": 4, "format": 1, "token": 2}
    expected = [w / 512 for w in weights] + [-0.3 / 512, -3 / 512, 0.5 / 512]
    assert gradient(out, tokens) == pytest.approx(expected)
    metrics = {name: (float(total), float(count)) for name, (total, count) in out.metrics.items()}
    assert metrics["ratio/drop_share"] == (2.0, 6.0) and metrics["ratio/clip_share"] == (4.0, 6.0)
    assert metrics["ratio/mean"] == pytest.approx((1 + 1 / 1.1 + 2 * 5 / 3 + 2 * 0.6, 6.0))
    assert metrics["loss/trace"] == pytest.approx((trace, 2.0))
    assert metrics["marker/format_nll"] == pytest.approx((-math.log(0.1), 1.0))
    assert metrics["answer/nll"] == pytest.approx((-math.log(0.08), 2.0))
    gaps = [0, math.log(1.1), *[math.log(5 / 3)] * 4]
    assert metrics["logprob_gap/abs_mean"] == pytest.approx((sum(gaps), 6.0))
    assert {k: float(v) for k, v in out.maxima.items()} == pytest.approx(
        {"ratio/max": 5 / 3, "logprob_gap/max": math.log(5 / 3)}
    )


def test_gradcheck_and_no_gradient_through_ratios():
    # Bounds are wide: finite differences see the ratio move, the loss's gradient must not. So the ratio is frozen at
    # its value by old = new - gap, and what is left has to be linear in the log-probs.
    tokens = random_batch()
    for settings in (NRT(), NRT(**PRESETS["paper"]), NRT(**PRESETS["reference"])):
        gap = (tokens.log_probs - tokens.old_log_probs).detach()

        def loss(x: torch.Tensor, settings=settings, gap=gap) -> torch.Tensor:
            return nrt_loss(replace(tokens, log_probs=x, old_log_probs=x.detach() - gap), settings).loss_sum

        assert torch.autograd.gradcheck(loss, tokens.log_probs)


def test_first_update_has_ratio_one_and_no_drops():
    tokens = random_batch()
    out = nrt_loss(replace(tokens, old_log_probs=tokens.log_probs.detach()), NRT())
    assert torch.equal(*out.metrics["ratio/mean"]) or float(out.metrics["ratio/mean"][0]) == float(
        out.metrics["ratio/mean"][1]
    )
    assert float(out.metrics["ratio/drop_share"][0]) == 0 and float(out.maxima["ratio/max"]) == 1
    assert float(out.maxima["logprob_gap/max"]) == 0


@pytest.mark.parametrize("forced", [False, True])
def test_forced_marker_gets_no_policy_gradient_unless_asked(forced):
    rows = [(-1.0, -1.0, 2.0, 0.0, TRACE, 0), (-3.0, -3.0, 2.0, 0.0, FORMAT, 0)]
    tokens = batch(rows)
    out = nrt_loss(tokens, replace(ONE, train_forced_marker=forced))
    assert gradient(out, tokens) == pytest.approx([-2.0, -0.3 - 2.0 * forced])
    assert float(out.metrics["ratio/mean"][1]) == 1 + forced


def test_marker_that_the_policy_produced_has_only_the_trace_term():
    tokens = batch([(-1.0, -1.0, 2.0, 0.0, TRACE, 0)])
    out = nrt_loss(tokens, ONE)
    assert out.terms["format"].item() == 0 and gradient(out, tokens) == [-2.0]


@pytest.mark.parametrize("settings", [NRT(), NRT(**PRESETS["paper"]), NRT(**PRESETS["reference"])])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_foreign_values_reach_neither_losses_nor_gradients(settings, junk):
    tokens = random_batch()
    plain = nrt_loss(tokens, settings)
    wanted = gradient(plain, tokens)
    in_trace = (tokens.kind == TRACE) | ((tokens.kind == FORMAT) & settings.train_forced_marker)

    def spoil(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.where(where, junk, values.detach())

    spoilt = replace(
        tokens,
        log_probs=spoil(tokens.log_probs, tokens.kind == NONE).requires_grad_(),
        old_log_probs=spoil(tokens.old_log_probs, ~in_trace),
        advantages=spoil(tokens.advantages, ~in_trace),
        token_signal=spoil(tokens.token_signal, tokens.kind != ANSWER),
        entropy=spoil(tokens.entropy, tokens.kind != TRACE),
    )
    out = nrt_loss(spoilt, settings)
    assert out.loss_sum.item() == plain.loss_sum.item()
    assert gradient(out, spoilt) == wanted
    assert {k: (float(a), float(b)) for k, (a, b) in out.metrics.items()} == {
        k: (float(a), float(b)) for k, (a, b) in plain.metrics.items()
    }
    assert {k: float(v) for k, v in out.maxima.items()} == {k: float(v) for k, v in plain.maxima.items()}


def test_a_log_prob_of_minus_infinity_spoils_only_its_own_term():
    tokens = batch([(-math.inf, -1.0, 0.0, 1.0, ANSWER, 0), (-1.0, -1.0, 2.0, 0.0, TRACE, 0)])
    out = nrt_loss(tokens, ONE)
    assert out.terms["trace"].item() == 2.0 and out.terms["format"].item() == 0.0
    assert out.terms["token"].item() == math.inf


@pytest.mark.parametrize("kinds", [[], [NONE], [TRACE], [FORMAT], [ANSWER]])
def test_terms_without_tokens_are_exactly_zero(kinds):
    tokens = batch([(-1.0, -1.2, 0.5, 1.0, kind, 0) for kind in kinds])
    out = nrt_loss(tokens, NRT())
    there = {TRACE: "trace", FORMAT: "format", ANSWER: "token"}
    for kind, name in there.items():
        assert (out.terms[name].item() != 0) == (kind in kinds)
        assert int(out.counts[name]) == kinds.count(kind)
    grads = torch.autograd.grad(out.loss_sum, tokens.log_probs)[0]
    assert grads.isfinite().all() and grads.count_nonzero() == len([k for k in kinds if k != NONE])
    assert tuple(out.metrics) == LOSS_METRICS and tuple(out.maxima) == LOSS_MAXIMA


def test_extreme_ratios_are_finite_in_float32():
    rows = [(-1.0, -500.0, -1.0, 0.0, TRACE, 0), (-500.0, -1.0, 1.0, 0.0, TRACE, 0)]
    for settings in (ONE, replace(ONE, sequence_ratio=True)):
        tokens = batch(rows, dtype=torch.float32)
        out = nrt_loss(tokens, settings)
        assert out.loss_sum.isfinite() and all(math.isfinite(x) for x in gradient(out, tokens))
        assert all(math.isfinite(float(x)) for pair in out.metrics.values() for x in pair)
    tokens = batch(rows, dtype=torch.float32)
    assert gradient(nrt_loss(tokens, ONE), tokens) == pytest.approx([1.28, -0.8])


def test_sequence_ratio_by_hand():
    settings = replace(ONE, sequence_ratio=True, token_signal="raw")
    rows = [
        (-1.0, -1.1, 2.0, 0.0, TRACE, 0),
        (-1.0, -1.05, 2.0, 0.0, TRACE, 0),  # r_0 = e^0.15
        (-1.0, -1.0, 2.0, 3.0, ANSWER, 0),
        (-1.0, -9.0, -1.0, 0.0, TRACE, 1),
        (-9.0, -1.5, -1.0, 0.0, TRACE, 1),  # r_1 = e^(8 - 7.5) = 1.65, clamped to 1.28 and kept since A < 0
        (-1.0, -1.0, -1.0, 0.5, ANSWER, 1),
        (-1.0, -2.0, 1.0, 0.0, TRACE, 2),  # r_2 = e: dropped since A > 0; the answer keeps the clamped ratio
        (-1.0, -1.0, 1.0, 1.0, ANSWER, 2),
        (-1.0, -1.0, 1.0, 1.0, ANSWER, 3),  # an empty trace: r_3 = 1
        (-1.0, -4.0, 1.0, 1.0, FORMAT, 3),  # not sampled: no part of r_3
    ]
    tokens = batch(rows, 4)
    out = nrt_loss(tokens, settings)
    r = math.exp(0.15)
    expected = [-2 * r, -2 * r, -3 * r, 1.28, 1.28, -0.5 * 1.28, 0.0, -1.28, -1.0, -0.3]
    assert gradient(out, tokens) == pytest.approx(expected)
    assert float(out.metrics["ratio/drop_share"][0]) == 1


def test_rollout_weights_by_hand():
    """Ratios start from the trainer's own log-probs; w corrects for the sampler's, on sampled tokens alone."""
    rows = [
        (math.log(0.5), math.log(0.5), 2.0, 0.0, TRACE, 0),  # sampled at 0.4: w = 1.25
        (math.log(0.5), math.log(0.45), -1.0, 0.0, TRACE, 0),  # sampled at 0.9: w = 0.5, and rho = 1.111
        (math.log(0.5), math.log(0.5), 2.0, 0.0, TRACE, 1),  # sampled at 0.1: w = 5, truncated to 2
        (math.log(0.5), math.log(0.3), 2.0, 0.0, TRACE, 1),  # rho = 1.67 and A > 0: dropped whatever w is
        (math.log(0.2), math.log(0.2), 1.0, 0.0, FORMAT, 1),  # not sampled: w = 1 in the trace term
        (math.log(0.4), math.log(0.4), 1.0, 3.0, ANSWER, 1),
    ]
    sampler = torch.tensor([0.4, 0.9, 0.1, 0.6, 1e-9, 1e-9], dtype=torch.float64).log()
    tokens = replace(batch(rows, 2), sampler_log_probs=sampler)
    settings = replace(ONE, train_forced_marker=True, format_loss_weight=0.0, rollout_importance_cap=2.0)
    out = nrt_loss(tokens, settings)
    assert gradient(out, tokens) == pytest.approx([-2.5, 0.5 / 0.9, -4.0, 0.0, -1.0, -3.0])
    metrics = {name: (float(total), float(count)) for name, (total, count) in out.metrics.items()}
    assert metrics["rollout_weight/mean"] == pytest.approx((1.25 + 0.5 + 2.0 + 0.5, 4.0))
    assert metrics["rollout_weight/cap_share"] == (1.0, 4.0)
    gaps = [math.log(1.25), math.log(2), math.log(5), math.log(2)]
    assert metrics["logprob_gap/abs_mean"] == pytest.approx((sum(gaps), 4.0))
    assert float(out.maxima["logprob_gap/max"]) == pytest.approx(math.log(5))


def test_a_sampler_that_is_the_trainer_has_weight_one():
    tokens = random_batch()
    plain = nrt_loss(tokens, NRT())
    same = nrt_loss(replace(tokens, sampler_log_probs=tokens.old_log_probs), NRT())
    assert torch.equal(same.loss_sum, plain.loss_sum)
    assert torch.equal(*(value.double() for value in same.metrics["rollout_weight/mean"]))
    assert float(same.metrics["logprob_gap/abs_mean"][0]) == 0
    assert plain.metrics["rollout_weight/mean"] == (0.0, 0.0)  # left out of the row


def test_an_impossible_token_of_the_sampler_is_finite():
    tokens = batch([(-1.0, -1.0, 1.0, 0.0, TRACE, 0)], dtype=torch.float32)
    tokens = replace(tokens, sampler_log_probs=torch.tensor([-500.0]))
    assert gradient(nrt_loss(tokens, ONE), tokens) == pytest.approx([-2.0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("preset", ["reference", "paper"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_split_into_micro_batches_adds_up_to_the_same(preset, size, weighted):
    settings, tokens = NRT(**PRESETS[preset]), random_batch()
    if weighted:
        tokens = replace(tokens, sampler_log_probs=tokens.old_log_probs + tokens.token_signal)
    whole = nrt_loss(tokens, settings)
    wanted = torch.autograd.grad(whole.loss_sum, tokens.log_probs)[0]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(size))
    parts = [torch.isin(tokens.sequence, rows).nonzero()[:, 0].flip(0) for rows in order.split(size)]
    outs = [nrt_loss(part_of(tokens, index), settings) for index in parts]
    total = sum(out.loss_sum for out in outs)
    torch.testing.assert_close(total, whole.loss_sum, rtol=0, atol=1e-12)
    got = torch.autograd.grad(total, tokens.log_probs)[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for name, (value, count) in whole.metrics.items():
        assert sum(float(out.metrics[name][0]) for out in outs) == pytest.approx(float(value), abs=1e-12), name
        assert sum(float(out.metrics[name][1]) for out in outs) == float(count), name
    for name, value in whole.maxima.items():
        assert max(float(out.maxima[name]) for out in outs) == float(value), name


def test_per_token_ratios_allow_splits_inside_a_sequence():
    tokens = random_batch()
    order = torch.randperm(len(tokens.kind), generator=torch.Generator().manual_seed(5))
    total = sum(nrt_loss(part_of(tokens, index), NRT()).loss_sum for index in order.split(7))
    torch.testing.assert_close(total, nrt_loss(tokens, NRT()).loss_sum, rtol=0, atol=1e-12)


def test_scale_does_not_depend_on_the_longest_sequence_or_on_padding():
    tokens = random_batch()
    alone = nrt_loss(part_of(tokens, (tokens.sequence == 0).nonzero()[:, 0]), NRT())
    first = {k: v.item() for k, v in alone.terms.items()}
    row = (-1.0, -1.0, 3.0, 1.0, TRACE, 1)
    long = batch([row] * 500 + [(0.0, 0.0, 0.0, 0.0, NONE, 1)] * 500, 2)
    mine = part_of(tokens, (tokens.sequence == 0).nonzero()[:, 0])
    both = TokenBatch(
        **{name: torch.cat([getattr(mine, name), getattr(long, name)]) for name in TENSORS}, num_sequences=2
    )
    other = nrt_loss(long, NRT()).terms
    for name, value in nrt_loss(both, NRT()).terms.items():
        assert value.item() == pytest.approx(first[name] + other[name].item(), abs=1e-12)


def test_sft_is_cross_entropy_on_the_answer_alone():
    tokens = random_batch()
    settings = NRT(reward_scheme="sft", sequence_ratio=True, train_forced_marker=True)
    out = nrt_loss(replace(tokens, entropy=None), settings)
    answer = tokens.kind == ANSWER
    torch.testing.assert_close(out.loss_sum, -tokens.log_probs[answer].sum() / 512)
    assert out.terms["trace"].item() == out.terms["format"].item() == 0
    assert torch.equal(torch.autograd.grad(out.loss_sum, tokens.log_probs)[0], -answer.double() / 512)
    assert tuple(out.metrics) == LOSS_METRICS and float(out.maxima["ratio/max"]) == -math.inf
