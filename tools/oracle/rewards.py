"""Format nrt-oracle-rewards/1: rewards and token signals of every scheme, raw and relative to the group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nrt_megatron.objective.advantages import group_advantages, group_token_signal
from nrt_megatron.objective.rewards import SCHEMES, TraceRewards, trace_rewards
from nrt_megatron.recipe import NRT, PRESETS
from oracle.findings import Findings, NotComparable, compare

FORMAT = "nrt-oracle-rewards/1"
NAMES = tuple(SCHEMES)
OPTIONAL = ()
SETTINGS = replace(NRT(), **{**PRESETS["reference"], "max_inverse_prob_weight": math.inf})
RENAMED = {"weighted_sum_inverse_prob": "weighted_inverse_prob", "weighted_sum_log_prob": "weighted_log_prob"}


@dataclass(frozen=True)
class Answers:
    """Padded answer log-probs of a scenario; the padding is NaN, which must not reach any result."""

    log_c: Tensor
    log_b: Tensor
    mask: Tensor
    group: Tensor
    """int64 [N]"""
    token_group: Tensor
    """int64 [M], of the answer tokens in order"""

    @staticmethod
    def parse(sequences: list[dict]) -> Answers:
        for i, s in enumerate(sequences):
            if len(s["answer_log_probs"]) != len(s["baseline_answer_log_probs"]):
                raise NotComparable(f"sequence {i}: answer and baseline differ in length")
        width = max(len(s["answer_log_probs"]) for s in sequences) + 1
        log_c, log_b = (
            torch.tensor([s[key] + [math.nan] * (width - len(s[key])) for s in sequences], dtype=torch.float64)
            for key in ("answer_log_probs", "baseline_answer_log_probs")
        )
        mask = torch.arange(width) < torch.tensor([[len(s["answer_log_probs"])] for s in sequences])
        group = torch.tensor([s["group"] for s in sequences], dtype=torch.int64)
        return Answers(log_c, log_b, mask, group, group[:, None].expand_as(mask)[mask])

    def rewards(self, scheme: str, dtype: torch.dtype = torch.float64) -> TraceRewards:
        return trace_rewards(scheme, self.log_c.to(dtype), self.log_b.to(dtype), self.mask, SETTINGS)

    def final(self, worth: TraceRewards, kind: str, center: str, scale: str) -> tuple[Tensor, Tensor, bool]:
        """Advantages [N], signals of the answer tokens [M], and whether a group had no spread."""
        traces, metrics = group_advantages(worth.final, self.group, center, scale, worth.noise)
        tokens, token_metrics = group_token_signal(
            worth.token_signal, self.mask, self.group, kind, center, scale, worth.token_noise
        )
        shares = (
            metrics["reward/degenerate_group_share"],
            token_metrics["reward/degenerate_token_group_share"],
        )
        return traces, tokens[self.mask], any(total > 0 for total, _ in shares)


def _scheme(mode: Any) -> str:
    name = RENAMED.get(mode, mode)
    if name not in SCHEMES:
        raise NotComparable(f"unknown reward_agg_mode {mode!r}")
    return name


def _choice(block: dict, key: str, known: Sequence[str]) -> str:
    value = "none" if block[key] is None else block[key]
    if value not in known:
        raise NotComparable(f"unknown {key} {value!r}")
    return value


def _center_and_scale(block: dict) -> tuple[str, str]:
    return _choice(block, "center_reward_by", ("mean", "none")), _choice(block, "scale_reward_by", ("std", "none"))


def _check_block(findings: Findings, where: str, answers: Answers, expected: dict, block: dict) -> None:
    """One centre and scale choice of one scheme."""
    scheme = _scheme(expected["reward_agg_mode"])
    center, scale = _center_and_scale(block)
    where, worth = f"{where} {center}/{scale}", answers.rewards(scheme)
    same = block.get("same_as_raw", False)
    want = expected["raw_trace_reward"] if same else block["trace_reward"]
    want_tokens = expected["raw_token_reward"] if same else block["token_reward_when_not_fixed"]
    traces, signal, _ = answers.final(worth, "normalised", center, scale)
    fixed = answers.final(worth, "fixed", center, scale)[1]
    want_fixed = [block["token_reward_when_fixed"]] * len(fixed)
    compare(findings, where, scheme, traces, want, answers.group, worth.raw)
    compare(findings, where, scheme, signal, want_tokens, answers.token_group, worth.token_signal[answers.mask])
    compare(findings, where, scheme, fixed, want_fixed, answers.token_group)
    findings.blocks += 1


def _check_scheme(findings: Findings, where: str, answers: Answers, expected: dict) -> None:
    """One scheme of one scenario: raw numbers, then every centre and scale choice."""
    scheme = _scheme(expected["reward_agg_mode"])
    worth = answers.rewards(scheme)
    # Nothing cancels in raw numbers: each is compared by itself, not by its group.
    for ours, key in (
        (worth.raw, "raw_trace_reward"),
        (worth.token_signal[answers.mask], "raw_token_reward"),
    ):
        compare(findings, where, scheme, ours, expected[key], torch.arange(len(ours)))
    if not expected["normalised"]:
        raise NotComparable("no centre and scale choice recorded")
    for block in expected["normalised"]:
        findings.attempt(where, _check_block, findings, where, answers, expected, block)


def _check_scenario(findings: Findings, case: dict, modes: list[str]) -> None:
    findings.check_count(case["id"], "num_sequences", case, case["sequences"])
    answers = Answers.parse(case["sequences"])
    for mode in modes:
        if all(e["reward_agg_mode"] != mode for e in case["expected"]):
            findings.failures.append(f"{case['id']}: {mode} is missing")
    for expected in case["expected"]:
        where = f"{case['id']} {expected['reward_agg_mode']}"
        findings.attempt(where, _check_scheme, findings, where, answers, expected)
    findings.cases += 1


def _check_degenerate(findings: Findings, case: dict, outcomes: list[dict]) -> None:
    """Ours has to be finite in float64 and float32. Where the reference's float64 run is finite ours agrees with it,
    unless a group has no spread (the reference may scale rounding noise there) or a log-prob is above 0."""
    answers, scheme = Answers.parse(case["sequences"]), _scheme(case["reward_agg_mode"])
    center, scale = _center_and_scale(case)
    kind, run = "fixed" if case["use_fixed_token_reward"] else "normalised", case["float64_run"]
    where, probe = f"degenerate {case['id']} {scheme}", Findings(())
    for dtype in (torch.float32, torch.float64):
        worth = answers.rewards(scheme, dtype)
        traces, tokens, no_spread = answers.final(worth, kind, center, scale)
        ours = {
            "raw_trace_reward": worth.raw,
            "raw_token_reward": worth.token_signal[answers.mask],
            "trace_reward": traces,
            "token_reward": tokens,
        }
        finite = all(bool(v.isfinite().all()) for v in ours.values())
        if not finite:
            findings.failures.append(f"{where}: not finite in {dtype}")
    agrees = None
    if run["outcome"] == "finite":
        for key, values in ours.items():
            group = answers.group if values.numel() == len(answers.group) else answers.token_group
            size = {"trace_reward": worth.raw, "token_reward": ours["raw_token_reward"]}.get(key)
            probe.attempt(where, compare, probe, where, key, values, run[key], group, size)
        agrees = not probe.failures
        excused = no_spread or float(worth.metrics["reward/clamped_token_share"][0]) > 0
        findings.failures += [] if excused else probe.failures
    facts = {"id": case["id"], "scheme": scheme, "reference": run["outcome"]}
    outcomes.append({**facts, "finite": finite, "agrees": agrees, "group_without_spread": no_spread})


def check(findings: Findings, data: dict) -> list[dict]:
    """Every scenario and degenerate case of a rewards file. Returns the outcomes of the degenerate cases."""
    outcomes: list[dict] = []
    findings.check_count("rewards", "num_scenarios", data, data["scenarios"])
    for i, case in enumerate(data["scenarios"]):
        findings.attempt(f"scenario {i}", _check_scenario, findings, case, data["modes"])
    for i, case in enumerate(data.get("degenerate_cases", [])):
        findings.attempt(f"degenerate case {i}", _check_degenerate, findings, case, outcomes)
    return outcomes


def tokens_above_default_cap(data: dict) -> int:
    """Answer tokens of the scenarios whose 1/b the default recipe would cap."""
    lowest = -math.log(NRT().max_inverse_prob_weight)
    log_bs = (b for case in data["scenarios"] for s in case["sequences"] for b in s["baseline_answer_log_probs"])
    return sum(b < lowest for b in log_bs)
