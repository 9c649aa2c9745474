"""Old NeMo spellings: read with a notice, refused when they contradict the new key beside them."""

import pytest

from nrt_megatron.recipe import ConfigError, load_recipe
from nrt_megatron.recipe.keys import leaf_types
from nrt_megatron.recipe.legacy import RENAMED

DATA = "data: {train: t.jsonl}\n"


def test_every_new_spelling_exists():
    assert set(RENAMED.values()) <= set(leaf_types())


def test_old_spellings_are_read_with_one_line_each(write):
    text = "trainer: {num_nodes: 2, devices: 4, max_steps: 7}\n"
    text += "model: {tensor_model_parallel_size: 8, optim: {lr: 0.1}}\n"
    notices: list[str] = []
    recipe = load_recipe(write(DATA + text), [], ["trainer.precision=bf16-mixed"], notices.append)
    assert (recipe.cluster.num_nodes, recipe.cluster.gpus_per_node, recipe.nrt.max_num_steps) == (2, 4, 7)
    assert (recipe.policy.megatron_cfg.tensor_model_parallel_size, recipe.policy.optimizer.lr) == (8, 0.1)
    assert recipe.policy.megatron_cfg.bf16
    assert len(notices) == 6 and all(len(line.splitlines()) == 1 for line in notices)
    assert "trainer.max_steps is the old spelling of nrt.max_num_steps, read as nrt.max_num_steps = 7" in notices[2]


def test_notice_on_stderr(write, capsys):
    load_recipe(write(DATA), [], ["trainer.max_steps=7"])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nrt: command line: trainer.max_steps") and err.count("\n") == 1


def test_contradiction_in_one_place_is_refused_and_agreement_is_not(write):
    both = ["trainer.max_steps=7", "nrt.max_num_steps=8"]
    with pytest.raises(ConfigError, match=r"trainer.max_steps = 7: contradicts nrt.max_num_steps = 8 .*keep nrt"):
        load_recipe(write(DATA), [], both)
    with pytest.raises(ConfigError, match="contradicts"):
        load_recipe(write(DATA + "trainer: {max_steps: 7}\nnrt: {max_num_steps: 8}"))
    assert load_recipe(write(DATA), [], ["trainer.max_steps=7", "nrt.max_num_steps=7"]).nrt.max_num_steps == 7


def test_between_layers_the_higher_one_decides_as_always(write):
    recipe = write(DATA + "nrt: {max_num_steps: 60}")
    assert load_recipe(recipe, [], ["trainer.max_steps=2"]).nrt.max_num_steps == 2
    recipe = write(DATA + "trainer: {max_steps: 60}")
    assert load_recipe(recipe, [], ["nrt.max_num_steps=2"]).nrt.max_num_steps == 2


def test_what_has_no_new_counterpart_is_refused(write):
    for override, expected in (
        ("trainer.precision=16", "set policy.megatron_cfg.bf16"),
        ("trainer.log_every_n_steps=1", "unknown key"),
        ("model.hidden_size=8", "unknown key"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_recipe(write(DATA), [], [override])
