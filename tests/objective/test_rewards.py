"""Rewards and raw token signals: hand-computed values, autograd, and the edges where plain formulas break."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nrt_megatron.objective.rewards import SCHEMES, TraceRewards, multi_sample_bound, trace_rewards
from nrt_megatron.recipe import NRT
from nrt_megatron.recipe.limits import CHOICES

SETTINGS = NRT()
C = [[0.5, 0.25], [0.8, 0.5]]
B = [[0.25, 0.5], [0.5, 1.0]]


def logs(rows: list[list[float]], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype).log()


def run(scheme: str, c=C, b=B, settings: NRT = SETTINGS, dtype: torch.dtype = torch.float64) -> TraceRewards:
    log_c = logs(c, dtype)
    return trace_rewards(scheme, log_c, logs(b, dtype), torch.ones_like(log_c, dtype=torch.bool), settings)


@pytest.mark.parametrize(
    ("scheme", "raw", "baseline", "signal"),
    [
        ("log_prob", [math.log(0.125), math.log(0.4)], [math.log(0.125), math.log(0.5)], [[1, 1], [1, 1]]),
        ("prob", [0.125, 0.4], [0.125, 0.5], [[0.125, 0.125], [0.4, 0.4]]),
        (
            "geometric_mean",
            [math.sqrt(0.125), math.sqrt(0.4)],
            [math.sqrt(0.125), math.sqrt(0.5)],
            [[math.sqrt(0.125) / 2] * 2, [math.sqrt(0.4) / 2] * 2],
        ),
        ("arithmetic_mean", [0.375, 0.65], [0.375, 0.75], [[0.25, 0.125], [0.4, 0.25]]),
        ("weighted_inverse_prob", [1.25, 1.05], [1.0, 1.0], [[1.0, 0.25], [0.8, 0.25]]),
        (
            "weighted_log_prob",
            [0.5 * (0.5 * math.log(4) + 0.25 * math.log(2)), 0.5 * 0.8 * math.log(2)],
            [0.5 * (0.25 * math.log(4) + 0.5 * math.log(2)), 0.5 * 0.5 * math.log(2)],
            [[0.25 * math.log(4), 0.125 * math.log(2)], [0.4 * math.log(2), 0.0]],
        ),
    ],
)
def test_hand_computed_values(scheme, raw, baseline, signal):
    worth = run(scheme)
    expected = [torch.tensor(x, dtype=torch.float64) for x in (raw, baseline, signal)]
    torch.testing.assert_close(worth.raw, expected[0])
    torch.testing.assert_close(worth.final, expected[0])
    torch.testing.assert_close(worth.baseline, expected[1])
    torch.testing.assert_close(worth.token_signal, expected[2])


def test_recipes_may_name_exactly_the_schemes_and_sft():
    assert {*SCHEMES, "sft"} == set(CHOICES["nrt.reward_scheme"]) and len(SCHEMES) == 6
    assert all(name == scheme.name for name, scheme in SCHEMES.items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_raw_token_signal_is_autograd_of_the_reward(scheme):
    generator = torch.Generator().manual_seed(3)
    log_c = (-3 * torch.rand(4, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    log_b = -3 * torch.rand(4, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [4]])
    (gradient,) = torch.autograd.grad(SCHEMES[scheme].reward(log_c, log_b, mask).sum(), log_c)
    worth = trace_rewards(scheme, log_c, log_b, mask, SETTINGS)
    torch.testing.assert_close(worth.token_signal, gradient, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: SCHEMES[scheme].reward(x, log_b, mask), log_c)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("junk", [math.nan, -math.inf, math.inf, 50.0])
def test_what_is_masked_out_reaches_neither_values_nor_gradients(scheme, junk):
    mask = torch.tensor([[True, True, False], [True, True, False]])
    padded_c, padded_b = (
        torch.cat([logs(x), torch.full((2, 1), junk, dtype=torch.float64)], 1).requires_grad_() for x in (C, B)
    )
    worth, plain = trace_rewards(scheme, padded_c, padded_b, mask, SETTINGS), run(scheme)
    assert torch.equal(worth.raw, plain.raw) and torch.equal(worth.baseline, plain.baseline)
    assert torch.equal(worth.token_signal[:, :2], plain.token_signal) and not worth.token_signal[:, 2].any()
    assert worth.metrics["reward/clamped_token_share"][0] == 0
    SCHEMES[scheme].reward(padded_c, padded_b, mask).sum().backward()
    assert padded_c.grad.isfinite().all() and not padded_c.grad[:, 2].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_log_probs_above_zero_count_as_zero_and_are_counted(scheme):
    slightly = torch.tensor([[1e-6, -0.5]])  # float32 rounding puts a certain token above probability 1
    certain = torch.tensor([[0.0, -0.5]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    above = trace_rewards(scheme, slightly, slightly, mask, SETTINGS)
    at = trace_rewards(scheme, certain, certain, mask, SETTINGS)
    assert torch.equal(above.raw, at.raw) and torch.equal(above.token_signal, at.token_signal)
    assert above.raw.isfinite().all() and above.token_signal.isfinite().all()
    assert [float(x) for x in above.metrics["reward/clamped_token_share"]] == [1.0, 2.0]
    assert float(at.metrics["reward/clamped_token_share"][0]) == 0.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_probability_of_zero_stays_finite(scheme):
    log_p = torch.tensor([[-math.inf, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    worth = trace_rewards(scheme, log_p, log_p, mask, replace(SETTINGS, max_inverse_prob_weight=math.inf))
    assert worth.raw.isfinite().all() and worth.baseline.isfinite().all() and worth.token_signal.isfinite().all()
    assert float(worth.metrics["reward/clamped_token_share"][0]) == 1.0


def test_inverse_weights_are_capped_and_counted():
    worth = run("weighted_inverse_prob", c=[[0.5, 0.5]], b=[[1e-9, 0.25]])
    torch.testing.assert_close(worth.token_signal, torch.tensor([[0.25e6, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(worth.baseline, torch.tensor([(1e-9 * 1e6 + 1) / 2], dtype=torch.float64))
    assert [float(x) for x in worth.metrics["reward/capped_weight_share"]] == [1.0, 2.0]


@pytest.mark.parametrize("log_b", [-95.0, -800.0])
def test_inverse_weights_do_not_overflow_without_a_cap(log_b):
    log_c, log_b = torch.tensor([[-1.0, -0.5]]), torch.tensor([[log_b, -0.5]])
    mask, uncapped = torch.ones(1, 2, dtype=torch.bool), replace(SETTINGS, max_inverse_prob_weight=math.inf)
    worth = trace_rewards("weighted_inverse_prob", log_c, log_b, mask, uncapped)
    assert worth.raw.isfinite().all() and (worth.raw > 1e30).all()


def test_prob_of_a_long_answer_does_not_underflow_in_float32():
    log_c = torch.full((2, 400), -0.5)
    log_c[1] = -0.501
    worth = trace_rewards("prob", log_c, log_c, torch.ones(2, 400, dtype=torch.bool), SETTINGS)
    torch.testing.assert_close(worth.raw.log(), log_c.double().sum(-1))
    assert worth.raw[0] > worth.raw[1] > 0 and float(worth.metrics["reward/zero_share"][0]) == 0
    hopeless = torch.full((2, 400), -5.0)  # e^-2000 is 0 in float64 too: said, not hidden
    worth = trace_rewards("prob", hopeless, hopeless, torch.ones(2, 400, dtype=torch.bool), SETTINGS)
    assert [float(x) for x in worth.metrics["reward/zero_share"]] == [2.0, 2.0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_clip_to_baseline_is_what_a_trace_adds_to_the_empty_one(scheme):
    clipping = replace(SETTINGS, clip_to_baseline=True)
    same = run(scheme, c=B, settings=clipping)
    assert same.final.tolist() == [0.0, 0.0] and float(same.metrics["reward/above_baseline_share"][0]) == 0
    worth = run(scheme, c=[[0.6, 0.6], [0.1, 0.1]], b=[[0.5, 0.5], [0.5, 0.5]], settings=clipping)
    torch.testing.assert_close(worth.final[0], worth.raw[0] - worth.baseline[0])
    assert worth.final[0] > 0 and worth.final[1] == 0
    assert [float(x) for x in worth.metrics["reward/above_baseline_share"]] == [1.0, 2.0]


def test_multi_sample_bound_by_hand():
    group = torch.tensor([7, 3, 7])  # not contiguous, unequal sizes, any ids
    log_c = torch.tensor([[0.5, 0.5], [0.3, 1.0], [0.8, 0.25]], dtype=torch.float64).log().requires_grad_()
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    bound = multi_sample_bound(log_c, mask, group)
    expected = torch.tensor([0.3, (0.25 + 0.2) / 2], dtype=torch.float64).log()
    torch.testing.assert_close(bound, expected)
    bound[1].backward()
    shares = torch.tensor([[0.25 / 0.45] * 2, [0.0, 0.0], [0.2 / 0.45] * 2], dtype=torch.float64)
    torch.testing.assert_close(log_c.grad, shares)


def test_multi_sample_bound_is_tighter_than_one_sample_and_does_not_underflow():
    log_c = torch.tensor([[-900.0, -0.1], [-901.0, -0.1], [-2000.0, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    bound = multi_sample_bound(log_c, mask, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(bound, torch.tensor([-900.1 + math.log1p(math.exp(-1)) - math.log(3)]).double())
    assert bound > torch.tensor([-900.1, -901.1, -2000.0]).mean()
