"""The group step: values by hand, groups in any order, and groups that say nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nrt_megatron.objective.advantages import group_advantages, group_token_signal
from nrt_megatron.objective.rewards import SCHEMES, trace_rewards
from nrt_megatron.recipe import NRT

CHOICES = [(center, scale) for center in ("mean", "none") for scale in ("std", "none")]


def share(metrics, name="reward/degenerate_group_share") -> tuple[float, float]:
    total, count = metrics[name]
    return float(total), float(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_by_hand_in_interleaved_groups_of_unequal_size(dtype):
    rewards = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0], dtype=dtype)
    group = torch.tensor([5, -2, 5, -2, 5])  # means 3 and 15; sample deviations sqrt(7) and sqrt(50)
    by_hand = {
        ("none", "none"): [1, 10, 2, 20, 6],
        ("mean", "none"): [-2, -5, -1, 5, 3],
        ("none", "std"): [x / d for x, d in zip([1, 10, 2, 20, 6], [7**0.5, 50**0.5, 7**0.5, 50**0.5, 7**0.5])],
        ("mean", "std"): [x / d for x, d in zip([-2, -5, -1, 5, 3], [7**0.5, 50**0.5, 7**0.5, 50**0.5, 7**0.5])],
    }
    for (center, scale), expected in by_hand.items():
        advantages, metrics = group_advantages(rewards, group, center, scale)
        torch.testing.assert_close(advantages, torch.tensor(expected, dtype=dtype))
        assert advantages.dtype == dtype and share(metrics) == (0.0, 2.0)
    torch.testing.assert_close(float(metrics["reward/group_std_mean"][0]), 7**0.5 + 50**0.5)


@pytest.mark.parametrize(("center", "scale"), CHOICES)
def test_a_group_of_one_is_finite_and_counted(center, scale):
    advantages, metrics = group_advantages(torch.tensor([0.7]), torch.tensor([0]), center, scale)
    assert advantages.tolist() == (torch.tensor([0.7]).tolist() if (center, scale) == ("none", "none") else [0.0])
    assert share(metrics) == (1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [1e-30, 0.1, 3e5])
@pytest.mark.parametrize(("center", "scale"), [("mean", "std"), ("none", "std"), ("mean", "none")])
def test_rounding_noise_gives_exactly_zero_and_is_counted(dtype, magnitude, center, scale):
    noise = torch.tensor([0, 1, -1, 0], dtype=dtype) * torch.finfo(dtype).eps
    noisy = magnitude * (1 + noise)
    signal = magnitude * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype)
    rewards, group = torch.cat([noisy, signal]), torch.tensor([0] * 4 + [1] * 4)
    assert noisy.unique().numel() > 1
    advantages, metrics = group_advantages(rewards, group, center, scale)
    assert advantages[:4].tolist() == [0.0] * 4 and share(metrics) == (1.0, 2.0)
    assert advantages[4:].unique().numel() == 4
    if (center, scale) == ("mean", "std"):
        expected = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=dtype) / (5 / 3) ** 0.5
        torch.testing.assert_close(advantages[4:], expected)


def test_a_small_but_real_spread_is_kept():
    rewards = 1 + torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) * 1e-9
    advantages, metrics = group_advantages(rewards, torch.zeros(3, dtype=torch.int64), "mean", "std")
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 0.0, 1.0]).double(), rtol=1e-5, atol=1e-5)
    assert share(metrics) == (0.0, 1.0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("clip", [False, True])
def test_traces_that_differ_by_float32_rounding_are_equal(scheme, clip):
    # The same trace eight times, its answer scored with rounding of the last bit; with clipping the difference to the
    # baseline is nothing but that rounding.
    generator = torch.Generator().manual_seed(0)
    log_b = -torch.rand(20, generator=generator).expand(8, 20)
    noise = torch.randint(-1, 2, (8, 20), generator=generator) * torch.finfo(torch.float32).eps
    log_c = log_b * (1 + noise)
    mask = torch.ones_like(log_c, dtype=torch.bool)
    worth = trace_rewards(scheme, log_c, log_b, mask, replace(NRT(), clip_to_baseline=clip))
    assert worth.final.unique().numel() > 1
    group = torch.zeros(8, dtype=torch.int64)
    advantages, metrics = group_advantages(worth.final, group, "mean", "std", worth.noise)
    assert advantages.tolist() == [0.0] * 8 and share(metrics) == (1.0, 1.0)
    assert float(worth.metrics["reward/above_baseline_share"][0]) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_traces_that_differ_by_the_models_precision_are_equal(scheme):
    """Errors of 0.01 nats, as bfloat16 makes them, are scaled up to advantages above 2 unless the settings name them;
    a trace that raises every token by ten times as much is still better."""
    generator = torch.Generator().manual_seed(0)
    log_b = (-torch.rand(64, 1, 20, generator=generator)).expand(64, 8, 20)
    log_c = log_b + 0.01 * torch.randn(64, 8, 20, generator=generator)
    log_c[0, 3] += 0.1
    log_b, log_c = log_b.reshape(-1, 20).clamp(max=0), log_c.reshape(-1, 20).clamp(max=0)
    mask, group = torch.ones_like(log_c, dtype=torch.bool), torch.arange(64).repeat_interleave(8)

    def advantages(error: float):
        worth = trace_rewards(scheme, log_c, log_b, mask, replace(NRT(), log_prob_error=error))
        return group_advantages(worth.final, group, "mean", "std", worth.noise)

    found, metrics = advantages(0.01)
    assert share(metrics) == (63.0, 64.0) and not found[8:].any()
    assert found[:8].argmax() == 3 and found[3] > 2
    noisy, metrics = advantages(0.0)
    assert share(metrics) == (0.0, 64.0) and noisy.abs().max() > 2


def test_huge_and_tiny_rewards_neither_overflow_nor_underflow():
    rewards = torch.tensor([1e300, 3e300, 1e-300, 3e-300], dtype=torch.float64)
    advantages, _ = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), "mean", "std")
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0, -1.0, 1.0]).double() / 2**0.5)


def test_advantages_do_not_depend_on_the_order_of_traces():
    generator = torch.Generator().manual_seed(1)
    rewards, group = torch.randn(12, generator=generator), torch.arange(12) % 3
    order = torch.randperm(12, generator=generator)
    straight, _ = group_advantages(rewards, group, "mean", "std")
    shuffled, _ = group_advantages(rewards[order], group[order], "mean", "std")
    torch.testing.assert_close(shuffled, straight[order])


def test_no_traces_at_all():
    advantages, metrics = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64), "mean", "std")
    assert advantages.shape == (0,) and share(metrics) == (0.0, 0.0)


SIGNAL = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.nan, math.nan], [5.0, 5.0, 5.0]])
MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
GROUP = torch.tensor([4, 4, 9])


@pytest.mark.parametrize(("kind", "first"), [("fixed", [1.0, 1.0, 0.0]), ("raw", [1.0, 2.0, 0.0])])
def test_fixed_and_raw_signals(kind, first):
    out, metrics = group_token_signal(SIGNAL, MASK, GROUP, kind, "mean", "std")
    assert out[0].tolist() == first
    assert not out[~MASK].any()
    assert share(metrics, "reward/token_signal_mean") == ((6.0, 6.0) if kind == "fixed" else (24.0, 6.0))


def test_normalised_signal_is_over_all_answer_tokens_of_the_group():
    out, metrics = group_token_signal(SIGNAL, MASK, GROUP, "normalised", "mean", "std")
    deviation = math.sqrt(7)  # of 1, 2, 6
    expected = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]) / deviation
    torch.testing.assert_close(out, expected)
    assert share(metrics, "reward/degenerate_token_group_share") == (1.0, 2.0)
    uncentred, _ = group_token_signal(SIGNAL, MASK, GROUP, "normalised", "none", "std")
    torch.testing.assert_close(uncentred[0], torch.tensor([1.0, 2.0, 0.0]) / deviation)
    assert not uncentred[2].any()
    centred, _ = group_token_signal(SIGNAL, MASK, GROUP, "normalised", "mean", "none")
    torch.testing.assert_close(centred[1], torch.tensor([3.0, 0.0, 0.0]))
