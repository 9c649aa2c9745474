"""A run that is continued with another recipe: what changed is said, the old recipe stays, and the new one acts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nrt_megatron import checkpoints
from nrt_megatron.continuation import check_continues, record
from nrt_megatron.preflight import preflight
from nrt_megatron.recipe import ConfigError, Recipe, from_yaml
from nrt_megatron.recipe.changes import changes, described, is_layout
from nrt_megatron.recipe.keys import leaf_types
from nrt_megatron.report import read_metrics
from tests.run import tiny


def said(settings: Recipe, ranks: int) -> list[str]:
    """Notices of a run that ends well."""
    codes, stderr = tiny.work_ranks(settings, ranks)
    assert codes == [0] * ranks, stderr
    return [line for line in stderr.splitlines() if line.startswith("nrt: ")]


def recipe_in(path: Path) -> Recipe:
    return from_yaml(path.read_text())


def test_what_changes_in_the_middle_is_said_kept_and_used(tmp_path):
    inputs = tiny.write_inputs(tmp_path)
    run, constant = (
        tmp_path / "run",
        ["policy.scheduler.lr_decay_style=constant", "policy.scheduler.lr_warmup_fraction=0"],
    )
    first = tiny.recipe(inputs, "nrt.max_num_steps=3", *constant)
    assert said(first, 1) == []
    changed = ["nrt.reward_scheme=prob", "policy.optimizer.lr=0.002", "nrt.max_num_steps=5", "checkpointing.every=1"]
    second = tiny.recipe(inputs, *constant, *changed, ranks=2, **{tiny.TP: 2})
    assert said(second, 2) == [
        "nrt: from step 4 on: nrt.max_num_steps 3 -> 5, nrt.reward_scheme 'geometric_mean' -> 'prob', "
        "policy.megatron_cfg.tensor_model_parallel_size 1 -> 2, policy.optimizer.lr 0.01 -> 0.002, "
        "checkpointing.every 3 -> 1, cluster.cpu_ranks 1 -> 2; "
        f"the recipe until then is kept in {run}/recipe.step_00000003.yaml"
    ]
    assert recipe_in(run / "recipe.step_00000003.yaml") == first and recipe_in(run / "recipe.yaml") == second
    assert [row["lr"] for row in read_metrics(run)[1:]] == pytest.approx([0.01] * 3 + [0.002] * 2)
    assert recipe_in(run / "checkpoints/step_00000005/recipe.yaml") == second
    assert said(tiny.recipe(inputs, *constant, *changed, "logger.samples_every=1"), 1) == []  # nothing is left to do
    assert recipe_in(run / "recipe.yaml") == second, "a recipe that trained nothing is not on record"


def test_an_unchanged_recipe_says_nothing_and_a_moved_run_is_the_same(tmp_path):
    inputs = tiny.write_inputs(tmp_path)
    tiny.train_ranks(tiny.recipe(inputs, "nrt.max_num_steps=6", "checkpointing.every=3"), 1)
    (tmp_path / "run/checkpoints/step_00000006").rename(tmp_path / "lost")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert said(tiny.recipe(inputs, f"run_dir={tmp_path}/moved"), 1) == [] and not list(
        tmp_path.glob("moved/recipe.step_*")
    )


def test_a_recipe_of_another_version_is_kept_and_said(tmp_path):
    settings = tiny.recipe(tiny.write_inputs(tmp_path))
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "recipe.yaml").write_text("nrt: {no_longer_a_key: 1}\n")
    line = record(tmp_path / "run", checkpoint, settings)
    assert line.startswith(
        "from step 4 on: another recipe, which cannot be compared (nrt.no_longer_a_key = 1: unknown key"
    )
    assert (tmp_path / "run/recipe.step_00000003.yaml").read_text() == "nrt: {no_longer_a_key: 1}\n"
    check_continues(checkpoint, settings)


def test_a_checkpoint_without_its_recipe_is_named(tmp_path):
    """Not `cannot write to run_dir`, and before ranks start as well as on them."""
    settings = tiny.recipe(tiny.write_inputs(tmp_path), "nrt.max_num_steps=3")
    tiny.train_ranks(settings, 1)
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    (checkpoint / "recipe.yaml").unlink()
    sums = checkpoints.checksums(checkpoint, checkpoints.files_of(checkpoint))
    (checkpoint / "manifest.json").write_text(json.dumps({"files": sums}))
    longer = tiny.recipe(tiny.write_inputs(tmp_path), "nrt.max_num_steps=5")
    message = f"{checkpoint}/recipe.yaml: cannot be read (No such file or directory), so that nobody knows"
    for again in (settings, longer):
        with pytest.raises(ConfigError, match=re.escape(message)):
            preflight(again)
    codes, said = tiny.work_ranks(longer, 1)
    assert codes == [2] and said.startswith(f"nrt: {message}")
    assert len(read_metrics(tmp_path / "run")) == 4


def test_keys_of_layout_and_keys_of_meaning():
    layout = {key for key in leaf_types() if is_layout(key)}
    assert {"cluster.cpu_ranks", "policy.megatron_cfg.sequence_parallel", "checkpointing.keep_last"} < layout
    meaning = {"nrt.reward_scheme", "nrt.seed", "policy.optimizer.lr", "policy.generation.temperature", "data.shuffle"}
    meaning |= {"policy.model.path", "policy.train_global_batch_size", "policy.megatron_cfg.fp8", "evaluation.every"}
    assert not layout & meaning and meaning < set(leaf_types())


def test_keys_inside_a_mapping_are_compared_one_by_one(tmp_path):
    inputs = tiny.write_inputs(tmp_path)
    before = tiny.recipe(inputs)
    after = tiny.recipe(inputs, "policy.model.config.rope_theta=500.0", "policy.model.config.initializer_range=0.1")
    found = changes(before, after)
    assert (
        described(found)
        == "policy.model.config.initializer_range 0.2 -> 0.1, policy.model.config.rope_theta unset -> 500.0"
    )
    assert changes(before, before) == {}
