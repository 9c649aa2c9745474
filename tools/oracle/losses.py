"""Format nrt-oracle-loss/1: losses of every term and the gradient of their combination."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nrt_megatron.objective import loss as nrt
from nrt_megatron.recipe import NRT, PRESETS
from oracle.findings import Findings, NotComparable, compare

FORMAT = "nrt-oracle-loss/1"
NAMES = ("trace", "format", "token", "cross_entropy", "combined")
OPTIONAL = ("grad_trace", "grad_marker", "grad_answer", "grad_padding")
LOSSES = {
    "trace_loss": "trace",
    "response_prefix_loss": "format",
    "token_loss": "token",
    "reference_loss": "cross_entropy",
    "combined_loss": "combined",
}
SEGMENTS = {"grad_trace": "trace", "grad_prefix": "prefix", "grad_answer": "answer"}
GRADIENTS = {"grad_trace": "grad_trace", "grad_prefix": "grad_marker", "grad_answer": "grad_answer"}
WEIGHTS = {"trace": "trace_loss_weight", "prefix": "format_loss_weight", "token": "token_loss_weight"}
DROPS = {"clip_ratio_low": "ratio_drop_min", "clip_ratio_high": "ratio_drop_max"}
CLAMPS = {
    "cispo_clip_ratio_low": ("ratio_clip_min", 0.0),
    "cispo_clip_ratio_high": ("ratio_clip_max", math.inf),
}


def _refuse_unknown(what: str, given: dict, known: set[str]) -> None:
    if set(given) != known:
        raise NotComparable(f"{what} {sorted(set(given) ^ known)} unknown or missing")


def settings_of(case: dict) -> NRT:
    """The recipe section with a case's bounds and weights.

    A drop bound of null is `clip_ratio` itself, an absolute ratio as well: the recorded gradients keep and drop tokens
    so. A clamp bound of null is no bound.
    """
    given, weights = case["settings"], case["coefficients"]
    _refuse_unknown("settings", given, {"name", "clip_ratio", *DROPS, *CLAMPS})
    _refuse_unknown("coefficients", weights, set(WEIGHTS))
    fields: dict[str, float] = {WEIGHTS[key]: float(value) for key, value in weights.items()}
    for key, name in DROPS.items():
        fields[name] = float(given["clip_ratio"] if given[key] is None else given[key])
    for key, (name, unbounded) in CLAMPS.items():
        fields[name] = unbounded if given[key] is None else float(given[key])
    return replace(NRT(), **{**PRESETS["reference"], **fields})


@dataclass(frozen=True)
class Batch:
    """The tokens of a case in a row, padding included: there every input is NaN."""

    tokens: nrt.TokenBatch
    segment: list[str]
    """`trace`, `prefix`, `answer` or `padding` of each token"""

    @staticmethod
    def parse(case: dict) -> Batch:
        rows: list[tuple] = []  # log-prob, old log-prob, advantage, signal, kind, sequence, segment
        for i, s in enumerate(case["sequences"]):
            marker = nrt.TRACE if s["prefix_matched"] else nrt.FORMAT
            start = len(rows)
            for segment, kind in (("trace", nrt.TRACE), ("prefix", marker), ("answer", nrt.ANSWER)):
                new, old = s[f"{segment}_log_probs"], s[f"{segment}_old_log_probs"]
                signal = s["token_reward"] if segment == "answer" else [math.nan] * len(new)
                if not len(new) == len(old) == len(signal):
                    raise NotComparable(f"sequence {i}: {segment} lists differ in length")
                rows += [(*x, kind, i, segment) for x in zip(new, old, [s["trace_reward"]] * len(new), signal)]
            if len(rows) - start > case["padded_width"]:
                raise NotComparable(f"sequence {i}: longer than padded_width")
            missing = case["padded_width"] - (len(rows) - start)
            rows += [(math.nan,) * 4 + (nrt.NONE, i, "padding")] * missing
        columns = list(zip(*rows))
        floats = [torch.tensor(c, dtype=torch.float64) for c in columns[:4]]
        kind, sequence = (torch.tensor(c, dtype=torch.int64) for c in columns[4:6])
        tokens = nrt.TokenBatch(*floats, kind=kind, sequence=sequence, num_sequences=len(case["sequences"]))
        tokens.log_probs.requires_grad_()
        return Batch(tokens, list(columns[6]))


def _reduced(batch: Batch, settings: NRT, block: dict) -> tuple[dict[str, Tensor], dict[str, int]]:
    """All losses of a block in its reduction, and the number of tokens that carry each term."""
    mode = block["loss_agg_mode"]
    if mode == "seq-mean-token-sum-norm":
        settings = replace(settings, loss_normalizer=float(block["divisor"]))
    elif mode == "token-mean":
        settings = replace(settings, loss_normalizer=1.0)
    else:
        raise NotComparable(f"unknown loss_agg_mode {mode!r}")
    out = nrt.nrt_loss(batch.tokens, settings)
    plain = nrt.nrt_loss(batch.tokens, replace(settings, reward_scheme="sft"))
    losses = {**out.terms, "cross_entropy": plain.terms["token"], "combined": out.loss_sum}
    counts = {**{k: int(v) for k, v in out.counts.items()}, "cross_entropy": int(plain.counts["token"])}
    if mode == "token-mean":  # an empty term is 0, not 0/0
        losses.update({name: losses[name] / max(count, 1) for name, count in counts.items()})
        weights = dict(zip(("trace", "format", "token"), (getattr(settings, f) for f in WEIGHTS.values())))
        losses["combined"] = sum(weight * losses[name] for name, weight in weights.items())
    return losses, counts


def _check_block(findings: Findings, where: str, case: dict, block: dict) -> None:
    batch = Batch.parse(case)
    losses, counts = _reduced(batch, settings_of(case), block)
    where = f"{where} {block['loss_agg_mode']} {block.get('divisor', '')}".strip()
    for key, name in LOSSES.items():
        recorded = block[key]
        if recorded is None and not block.get("undefined", False):
            raise NotComparable(f"{key} is null in a block that is not marked undefined")
        if recorded is None and name in counts and (counts[name] or losses[name] != 0):
            raise NotComparable(f"{key} is 0/0 in the reference, but {losses[name].item()} here")
        compare(findings, where, name, losses[name].reshape(1), [recorded])
    _compare_gradients(findings, where, case, block, batch, losses["combined"])
    findings.blocks += 1


def _compare_gradients(findings: Findings, where: str, case: dict, block: dict, batch: Batch, combined: Tensor) -> None:
    """Every recorded gradient, relative to the largest of the block; the padding's has to be exactly 0."""
    (gradient,) = torch.autograd.grad(combined, batch.tokens.log_probs)
    padding = gradient[torch.tensor([s == "padding" for s in batch.segment], dtype=torch.bool)]
    findings.note(where, "grad_padding", float(padding.abs().sum()), max(len(padding), 1))
    for key, segment in SEGMENTS.items():
        if key not in block:
            continue
        lengths = [len(s[f"{segment}_log_probs"]) for s in case["sequences"]]
        if [len(row) for row in block[key]] != lengths:
            raise NotComparable(f"{key}: lengths differ from the sequences'")
        ours = gradient[torch.tensor([s == segment for s in batch.segment], dtype=torch.bool)]
        compare(findings, where, GRADIENTS[key], ours, block[key], size=gradient.abs().max().expand(len(ours)))


def _check_case(findings: Findings, case: dict) -> None:
    findings.check_count(case["id"], "num_sequences", case, case["sequences"])
    if not case["expected"]:
        raise NotComparable("nothing recorded")
    for block in case["expected"]:
        findings.attempt(case["id"], _check_block, findings, case["id"], case, block)
    findings.cases += 1


def check(findings: Findings, data: dict) -> list[Any]:
    """Every block of every case of a loss file."""
    findings.check_count("loss", "num_cases", data, data["cases"])
    for i, case in enumerate(data["cases"]):
        findings.attempt(f"case {i}", _check_case, findings, case)
    return []
