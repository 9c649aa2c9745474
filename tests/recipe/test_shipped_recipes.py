"""Every recipe of the repository parses, passes the checks and means what its name says."""

import re
from pathlib import Path

import pytest

from nrt_megatron.quickstart import PREPARATIONS
from nrt_megatron.recipe import check, from_yaml, load_recipe, num_updates_per_step, to_yaml

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_parses_checks_and_matches_its_name(path):
    recipe = load_recipe(path)
    check(recipe)
    assert from_yaml(to_yaml(recipe)) == recipe
    assert recipe.prepare is None or recipe.prepare in PREPARATIONS
    name = re.fullmatch(r"(nrt|sft)-.+-(\d+)n(\d+)g(-.+)?", path.stem)
    assert name is not None, "METHOD-MODEL-NODESnGPUSg-LAYOUT.yaml"
    assert (name[1] == "sft") == (recipe.nrt.reward_scheme == "sft")
    assert (int(name[2]), int(name[3])) == (recipe.cluster.num_nodes, recipe.cluster.gpus_per_node)


@pytest.mark.parametrize("path", sorted((RECIPES / "base").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_parent_is_inherited(path):
    assert any(f"base/{path.name}" in recipe.read_text() for recipe in SHIPPED)


def test_the_sft_peer_trains_as_often_on_as_many_sequences_of_the_same_data():
    nrt, sft = (load_recipe(RECIPES / f"{method}-tiny-1n0g-cpu.yaml") for method in ("nrt", "sft"))
    assert (
        nrt.data == sft.data and nrt.policy.model == sft.policy.model and nrt.policy.optimizer == sft.policy.optimizer
    )
    assert nrt.policy.train_global_batch_size == sft.policy.train_global_batch_size
    updates = [recipe.nrt.max_num_steps * num_updates_per_step(recipe) for recipe in (nrt, sft)]
    assert updates == [60, 60]


def test_the_default_objective_is_the_reference_but_for_its_hazards():
    """The schema's defaults and the preset may not drift apart unnoticed."""
    plain = load_recipe(RECIPES / "nrt-tiny-1n0g-cpu.yaml").nrt
    reference = load_recipe(RECIPES / "nrt-tiny-1n0g-cpu.yaml", [], ["nrt.preset=reference"]).nrt
    differing = {name for name in vars(plain) if getattr(plain, name) != getattr(reference, name)}
    assert differing == {"preset", "train_forced_marker", "max_inverse_prob_weight"}
