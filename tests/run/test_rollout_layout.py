"""A run whose rollout has a layout of its own is the run without: metrics, samples and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nrt_megatron.recipe import ConfigError
from nrt_megatron.report import read_metrics
from tests.run import tiny
from tests.run.test_resume import assert_same_tensors, die_after
from tests.run.tiny import PP, TP

LAYOUTS = {"tp1-pp1": (1, 1), "tp4-pp1": (4, 1)}
GENERATION = "policy.generation.{}_model_parallel_size={}"


def sizes(tp: int, pp: int) -> list[str]:
    return [GENERATION.format("tensor", tp), GENERATION.format("pipeline", pp)]


def run(directory: Path, *overrides: str, **layout: int) -> Path:
    inputs = tiny.write_inputs(directory)
    recipe = tiny.recipe(
        inputs,
        "nrt.max_num_steps=2",
        "nrt.rollout_importance_sampling=true",
        "policy.megatron_cfg.make_vocab_size_divisible_by=8",
        "evaluation.num_questions=3",
        "evaluation.every=1",
        *overrides,
        ranks=4,
        **layout,
    )
    assert tiny.train_ranks(recipe, 4) == [True] * 4
    return directory / "run"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("same"), **{TP: 2, PP: 2})


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_the_rollout_changes_nothing(reference, name, tmp_path):
    found = run(tmp_path, *sizes(*LAYOUTS[name]), **{TP: 2, PP: 2})
    expected, rows = tiny.rows(reference), tiny.rows(found)
    assert len(rows) == len(expected) and [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, wanted in zip(rows, expected):
        for key, value in wanted.items():
            # The gap between sampler and trainer is rounding alone, which the layout does change.
            assert row[key] == pytest.approx(value, rel=1e-5, abs=2e-5 if "gap" in key else 1e-6), (row["step"], key)
    steps = [row for row in read_metrics(found) if row["step"]]
    assert all(row["time/reshard"] > 0 for row in steps)
    assert not any("time/reshard" in row for row in read_metrics(reference))
    last = "checkpoints/step_00000002"
    weights, known = tiny.tensors(found / last), tiny.tensors(reference / last)
    for key, value in known.items():
        torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    inputs = tiny.write_inputs(tmp_path)
    overrides = ["nrt.max_num_steps=3", "checkpointing.every=2", "evaluation.every=1", *sizes(2, 1)]
    whole, cut = (
        tiny.recipe(inputs, *overrides, f"run_dir={tmp_path}/{name}", ranks=2, **{PP: 2}) for name in ("whole", "cut")
    )
    tiny.train_ranks(whole, 2)
    with pytest.raises(AssertionError, match="Crash: step 3"):
        tiny.train_ranks(cut, 2, lambda: die_after(3))
    tiny.train_ranks(cut, 2)
    assert tiny.rows(cut.run_dir) == tiny.rows(whole.run_dir) and len(tiny.rows(cut.run_dir)) == 4
    assert tiny.samples(cut.run_dir) == tiny.samples(whole.run_dir) != []
    assert_same_tensors(tmp_path / "cut", tmp_path / "whole", 3)


@pytest.mark.parametrize(
    "overrides,layout,message",
    [
        (sizes(3, 1), {}, r"generation\.tensor_model_parallel_size = 3: 4 ranks cannot be split .* set 1, 2 or 4"),
        (sizes(1, 3), {}, r"4 ranks cannot be split"),
        (sizes(4, 1), {TP: 2}, r"make_vocab_size_divisible_by = 3: .* multiple of 6 .* 4 parts .* set a multiple of 4"),
        (sizes(1, 1)[:1], {TP: 2, PP: 2}, None),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(tmp_path, overrides, layout, message):
    inputs = tiny.write_inputs(tmp_path)
    inputs["policy"]["megatron_cfg"]["make_vocab_size_divisible_by"] = 3
    if message is None:
        tiny.recipe(inputs, *overrides, ranks=4, **layout)
        return
    with pytest.raises(ConfigError, match=message):
        tiny.recipe(inputs, *overrides, ranks=4, **layout)
