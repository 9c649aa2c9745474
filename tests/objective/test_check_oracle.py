"""`tools/check_oracle.py` on the recorded numbers, and on files that are wrong in one place."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"
RECORDED = {name: json.loads((DATA / f"{name}.json").read_text()) for name in ("rewards", "loss")}


def run(rewards: Path, loss: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON line, and stderr."""
    command = [sys.executable, ROOT / "tools/check_oracle.py", "--rewards", rewards, "--loss", loss]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) <= 1, done.stdout
    return done.returncode, json.loads(lines[0]) if lines else {}, done.stderr


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    """The tool in this process: starting one for each change would take minutes."""
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("check_oracle")
    sys.path.remove(str(ROOT / "tools"))


def part(file: str) -> dict:
    """A copy of a few cases of a file: enough to see a change, and quick."""
    data = copy.deepcopy(RECORDED[file])
    if file == "rewards":
        data["scenarios"] = data["scenarios"][:1]
        data["num_scenarios"] = 1
    else:
        data["cases"] = [data["cases"][i] for i in (0, 1, 4, 16)]
        data["num_cases"] = 4
    return data


def test_all_recorded_numbers_agree():
    code, line, errors = run(DATA / "rewards.json", DATA / "loss.json")
    assert (code, line["ok"], line["failures"], errors) == (0, True, [], "")
    assert line["rewards"]["cases"] == 6 and line["rewards"]["blocks"] == 6 * 6 * 4
    assert line["loss"]["cases"] == 18 and line["loss"]["blocks"] == 18 * 3
    assert len(line["rewards"]["max_rel_error"]) == 6
    worst = [*line["rewards"]["max_rel_error"].values(), *line["loss"]["max_rel_error"].values()]
    assert max(worst) < 1e-6
    assert all(line["loss"]["values_compared"].values()) and all(line["rewards"]["values_compared"].values())
    assert len(line["degenerate"]) == 7 and all(case["finite"] for case in line["degenerate"])
    assert line["tokens_above_default_cap"] == 8


def scenario(data: dict, id_: str = "typical_K2") -> dict:
    return next(s for s in data["scenarios"] if s["id"] == id_)


def nudge(values: list, index: int = 0, by: float = 1.00001) -> None:
    values[index] *= by


REWARD_CHANGES: dict[str, Callable[[dict], Any]] = {
    "raw trace reward": lambda d: nudge(scenario(d)["expected"][1]["raw_trace_reward"], 2),
    "raw token reward": lambda d: nudge(scenario(d)["expected"][3]["raw_token_reward"][1]),
    "trace reward": lambda d: nudge(scenario(d)["expected"][5]["normalised"][3]["trace_reward"]),
    "token reward": lambda d: nudge(scenario(d)["expected"][5]["normalised"][3]["token_reward_when_not_fixed"][0], 3),
    "fixed token reward": lambda d: scenario(d)["expected"][0]["normalised"][1].update(token_reward_when_fixed=0.5),
    "a log-prob": lambda d: nudge(scenario(d)["sequences"][0]["answer_log_probs"], 1),
    "a baseline": lambda d: nudge(scenario(d)["sequences"][0]["baseline_answer_log_probs"], 1, 1.001),
    "an answer cut short": lambda d: scenario(d)["sequences"][0]["answer_log_probs"].pop(),
    "a group": lambda d: scenario(d)["sequences"][0].update(group=2),
    "a scheme in one scenario": lambda d: scenario(d)["expected"].pop(),
    "a scheme everywhere": lambda d: [d["modes"].pop()] + [s["expected"].pop() for s in d["scenarios"]],
    "a scenario": lambda d: d["scenarios"].pop(),
    "a centre and scale choice": lambda d: scenario(d)["expected"][0].update(normalised=[]),
    "an unknown scheme": lambda d: scenario(d)["expected"][0].update(reward_agg_mode="harmonic_mean"),
    "an unknown centre": lambda d: scenario(d)["expected"][0]["normalised"][1].update(center_reward_by="median"),
    "an unknown scale": lambda d: scenario(d)["expected"][0]["normalised"][1].update(scale_reward_by="range"),
    "a missing key": lambda d: scenario(d)["expected"][0].pop("raw_token_reward"),
    "a text for a number": lambda d: scenario(d)["sequences"][0]["answer_log_probs"].__setitem__(0, "x"),
    "a degenerate case": lambda d: nudge(d["degenerate_cases"][3]["float64_run"]["raw_trace_reward"]),
    "an unknown format": lambda d: d.update(format="nrt-oracle-rewards/2"),
}
LOSS_CHANGES: dict[str, Callable[[dict], Any]] = {
    **{
        f"{key} of block {block}": lambda d, key=key, block=block: d["cases"][1]["expected"][block].update(
            {key: d["cases"][1]["expected"][block][key] * 1.00001}
        )
        for key in ("trace_loss", "response_prefix_loss", "token_loss", "reference_loss", "combined_loss")
        for block in range(3)
    },
    "grad_trace": lambda d: nudge(d["cases"][1]["expected"][0]["grad_trace"][0]),
    "grad_prefix": lambda d: nudge(d["cases"][1]["expected"][2]["grad_prefix"][0]),
    "grad_answer": lambda d: nudge(d["cases"][1]["expected"][0]["grad_answer"][0]),
    "a divisor": lambda d: d["cases"][0]["expected"][1].update(divisor=15),
    "a bound": lambda d: d["cases"][2]["settings"].update(clip_ratio_high=100.0),
    "a clamp": lambda d: d["cases"][3]["settings"].update(cispo_clip_ratio_high=2.0),
    "a coefficient": lambda d: d["cases"][1]["coefficients"].update(prefix=0.4),
    "a matched marker": lambda d: d["cases"][1]["sequences"][0].update(prefix_matched=True),
    "an old log-prob": lambda d: nudge(d["cases"][2]["sequences"][0]["trace_old_log_probs"], 1),
    "an unknown reduction": lambda d: d["cases"][0]["expected"][0].update(loss_agg_mode="seq-mean-token-mean"),
    "an unknown setting": lambda d: d["cases"][0]["settings"].update(clip_ratio_c=3.0),
    "a missing setting": lambda d: d["cases"][0]["settings"].pop("clip_ratio"),
    "an unknown coefficient": lambda d: d["cases"][0]["coefficients"].update(entropy=0.1),
    "a missing block": lambda d: d["cases"][0].update(expected=[]),
    "a missing loss": lambda d: d["cases"][0]["expected"][0].pop("token_loss"),
    "null that is defined here": lambda d: d["cases"][1]["expected"][0].update(trace_loss=None, undefined=True),
    "null in a defined block": lambda d: d["cases"][0]["expected"][0].update(response_prefix_loss=None),
    "a case": lambda d: d["cases"].pop(),
    "a sequence": lambda d: d["cases"][0]["sequences"].pop(),
    "a cut gradient": lambda d: d["cases"][0]["expected"][0]["grad_answer"][0].pop(),
    "a signal cut short": lambda d: d["cases"][0]["sequences"][0]["token_reward"].pop(),
    "too narrow a width": lambda d: d["cases"][0].update(padded_width=5),
    "an unknown format": lambda d: d.update(format="nrt-oracle-loss/2"),
}


def examine(tool: ModuleType, file: str, data: dict) -> dict:
    return tool.examine(data, None) if file == "rewards" else tool.examine(None, data)


@pytest.mark.parametrize(
    ("file", "change"),
    [("rewards", c) for c in REWARD_CHANGES] + [("loss", c) for c in LOSS_CHANGES],
)
def test_one_wrong_thing_fails_in_words(tool, file, change):
    data = part(file)
    assert examine(tool, file, data)["ok"]
    (REWARD_CHANGES if file == "rewards" else LOSS_CHANGES)[change](data)
    line = examine(tool, file, data)
    assert not line["ok"] and line["failures"]
    assert all(len(f.splitlines()) == 1 for f in line["failures"])
    json.dumps(line, allow_nan=False)


def test_other_sizes_settings_and_null_values(tool):
    """What other files of the formats may hold: groups of one, markers of two tokens, no clamp, other coefficients."""
    rewards, loss = part("rewards"), part("loss")
    only = scenario(rewards)
    only["sequences"] = only["sequences"][:1]
    only["num_sequences"] = 1
    for expected in only["expected"]:
        for key in ("raw_trace_reward", "raw_token_reward"):
            expected[key] = expected[key][:1]
        expected["normalised"] = [n for n in expected["normalised"] if n["scale_reward_by"] == "none"]
        for block in expected["normalised"][1:]:
            block["trace_reward"] = [0.0]
            block["token_reward_when_not_fixed"] = [[None] * 6]
    case = loss["cases"][1]
    case["settings"]["cispo_clip_ratio_low"] = None
    case["coefficients"] = {"trace": 2.0, "prefix": 0.0, "token": 0.5}
    for s in case["sequences"]:
        s["prefix_log_probs"], s["prefix_old_log_probs"] = (
            s["prefix_log_probs"] * 2,
            s["prefix_old_log_probs"] * 2,
        )
    case["padded_width"] += 1
    case["expected"] = case["expected"][:1]
    block = case["expected"][0]
    for key in ("grad_trace", "grad_prefix", "grad_answer"):
        del block[key]
    marker = sum(s["prefix_log_probs"][0] for s in case["sequences"]) / 512
    block["response_prefix_loss"] -= marker
    block["trace_loss"] -= sum(s["trace_reward"] * s["prefix_log_probs"][0] for s in case["sequences"]) / 512
    block["combined_loss"] = 2 * block["trace_loss"] + 0.5 * block["token_loss"]
    line = tool.examine(rewards, loss)
    assert line["failures"] == [] and line["rewards"]["undefined_in_reference"] == 6 * 6


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": "nrt-oracle-loss/1"}', '{"cases": []}'])
def test_what_is_no_oracle_file_ends_with_one_line(tool, tmp_path, monkeypatch, capsys, content):
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    monkeypatch.setattr(sys, "argv", ["check_oracle", "--rewards", str(DATA / "rewards.json"), "--loss", str(bad)])
    assert tool.main() == 2
    out, errors = capsys.readouterr()
    assert out == "" and len(errors.splitlines()) == 1 and str(bad) in errors


def test_a_failure_is_exit_code_one(tmp_path):
    data = copy.deepcopy(RECORDED["loss"])
    data["cases"][0]["expected"][0]["token_loss"] *= 1.001
    changed = tmp_path / "loss.json"
    changed.write_text(json.dumps(data))
    code, line, _ = run(DATA / "rewards.json", changed)
    assert code == 1 and len(line["failures"]) == 1 and "token is off by 0.000999" in line["failures"][0]
