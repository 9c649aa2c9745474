#!/usr/bin/env python
"""Checks the objective against recorded numbers: `tools/check_oracle.py --rewards FILE --loss FILE [--verbose]`.

The files hold what the authors' code computed (formats nrt-oracle-rewards/1 and nrt-oracle-loss/1). Prints one JSON
line: per scheme and per loss term the largest relative error and the number of values compared, the number of cases
and blocks, the degenerate cases with their outcome, and every failure in words. Exit code 0 only when all is within
1e-6 in float64 and nothing was left out; 1 when not; 2 when a file cannot be read as such.

The recorded runs knew no cap on 1/b, so it is off here; `tokens_above_default_cap` says how many tokens it would touch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from oracle import losses, rewards
from oracle.findings import TOLERANCE, Findings


class BadFile(ValueError):
    """Not an oracle file at all."""


def _load(path: Path, key: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path}: {error}") from None
    if not isinstance(data, dict) or "format" not in data or not isinstance(data.get(key), list):
        raise BadFile(f"{path}: not an oracle file (needs an object with `format` and a list `{key}`)")
    return data


def _check(room: Any, data: dict, verbose: bool) -> tuple[Findings, list[dict]]:
    findings, outcomes = Findings(room.NAMES, room.OPTIONAL, verbose), []
    if data["format"] != room.FORMAT:
        findings.failures.append(f"unknown format {data['format']!r}, expected {room.FORMAT!r}")
        return findings, outcomes

    def run() -> None:
        outcomes.extend(room.check(findings, data))

    findings.attempt(room.FORMAT, run)
    return findings, outcomes


def examine(reward_data: dict | None, loss_data: dict | None, verbose: bool = False) -> dict[str, Any]:
    """The JSON line for the contents of the two files; None leaves a file out."""
    line: dict[str, Any] = {"ok": False, "tolerance": TOLERANCE, "dtype": "float64"}
    degenerate, failures = [], []
    for key, room, data in (("rewards", rewards, reward_data), ("loss", losses, loss_data)):
        if data is not None:
            findings, outcomes = _check(room, data, verbose)
            line[key] = findings.summary()
            failures += findings.failures
            degenerate += outcomes
    if reward_data is not None and not failures:
        line["cap_on_inverse_prob_weight"] = None
        line["tokens_above_default_cap"] = rewards.tokens_above_default_cap(reward_data)
    return {**line, "ok": not failures, "degenerate": degenerate, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", type=Path, required=True, metavar="FILE")
    parser.add_argument("--loss", type=Path, required=True, metavar="FILE")
    parser.add_argument("--verbose", action="store_true", help="print every comparison to stderr")
    args = parser.parse_args()
    try:
        reward_data, loss_data = _load(args.rewards, "scenarios"), _load(args.loss, "cases")
    except BadFile as error:
        print(f"check_oracle: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    line = examine(reward_data, loss_data, args.verbose)
    print(json.dumps(line, allow_nan=False))
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
