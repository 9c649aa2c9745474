"""`nrt plan` as a user and as a machine call it."""

import json
import re
import resource
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nrt_megatron.cli import app
from nrt_megatron.plan import load_hardware, plan
from nrt_megatron.recipe import ConfigError, load_recipe

from . import published
from .test_recipes import LARGE

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LARGEST = next(path for path in LARGE if "70b" in path.stem)


def run(*arguments) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_json_of_a_training_step_from_policy_and_cluster_alone(tmp_path):
    """Llama-3 70B on 64 GPUs as published: what is fixed of the JSON, and 15% of 1,621 tokens/s/GPU."""
    runs, _, models = published.load()
    row = next(run for run in runs if run.tokens_per_second_per_gpu == 1621)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(published.recipe(row, models)))
    said = json.loads(run(path, "--json", "--training-only", "--hardware", "h100"))
    assert len(said["stages"]) == 8 and said["fits"] is True
    sizes = ("weights", "gradients", "optimizer", "activations", "kv_cache", "workspace", "total")
    for stage in said["stages"]:
        assert isinstance(stage["parameters"], int) and all(stage[f"{size}_gib"] >= 0 for size in sizes)
    for phase in ("rollout", "scoring", "update"):
        assert {"seconds", "tokens_per_second_per_gpu", "tflops_per_gpu"} <= set(said[phase])
    assert said["update"]["tokens_per_second_per_gpu"] == pytest.approx(1621, rel=0.15)
    assert said["step_seconds"] == said["update"]["seconds"] and said["run_gpu_hours"] > 0


def test_text_of_the_largest_recipe_within_ten_seconds_of_work():
    """Processor seconds of the command's processes: what else runs on the machine must not fail the test."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    text = run(LARGEST)
    now = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent = sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(used, now))
    assert spent < 10
    for part in (
        "128 x H100",
        "TP 8 x DP 4 x PP 4",
        "2,271,543,296",
        "fits:",
        "update x 4",
        "GPU-hours",
        "bubble",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) < 250 and "…" not in text


def test_overrides_and_hardware_reach_the_plan():
    said = json.loads(run(LARGE[-1], "--json", "--hardware", "b200", "nrt.max_num_steps=1", "--trace-tokens", "100"))
    assert said["hardware"].startswith("B200") and said["tokens_per_sequence"]["trace"] == 100
    assert said["run_gpu_hours"] == pytest.approx(said["step_seconds"] * 8 / 3600)


@pytest.mark.parametrize("key", ["max_cache_tokens", "max_batch_size"])
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_first_change_makes_it_fit(path, key):
    """A cache that is too large: the change that is named, applied as it is printed, fits.

    All 512 rows of a rank of the largest run fit as one batch; four batches of 192 in flight do not.
    """
    rows = 192 if path == LARGEST else 4096
    tokens = "null" if key == "max_batch_size" else 2**22
    too_much = [f"policy.generation.max_batch_size={rows}", f"policy.generation.max_cache_tokens={tokens}"]
    planned = plan(load_recipe(path, [], too_much), load_hardware("h100"), build=False)
    assert not planned.fits
    change, _, peak = planned.first_change.removeprefix("set ").rpartition(": ")
    assert change.startswith(f"policy.generation.{key}=")
    changed = plan(load_recipe(path, [], [*too_much, *change.split()]), load_hardware("h100"), build=False)
    assert changed.fits and f"{changed.peak_gib:.1f} GiB" == peak


def test_several_changes_where_one_does_not_do():
    """Activations of 8 sequences and a cache of 4,000,000 tokens: neither alone is enough to change."""
    path = next(path for path in LARGE if path.stem == "nrt-llama3.1-8b-1n8g-tp2")
    too_much = ["policy.generation.max_cache_tokens=4000000", "policy.train_micro_batch_size=8"]
    planned = plan(load_recipe(path, [], too_much), load_hardware("h100"), build=False)
    changes = planned.first_change.removeprefix("set ").rpartition(": ")[0].split()
    assert len(changes) > 1
    assert plan(load_recipe(path, [], [*too_much, *changes]), load_hardware("h100"), build=False).fits


def test_a_model_that_is_elsewhere_needs_its_shape():
    recipe = load_recipe(LARGE[0], [], ["policy.model.shape=null"])
    with pytest.raises(ConfigError, match=r"policy.model.path = .*set policy.model.shape"):
        plan(recipe, load_hardware("h100"), build=False)


def test_a_recipe_for_cpus_says_what_it_is_planned_as(tmp_path):
    tiny = RECIPES / "nrt-tiny-1n0g-cpu.yaml"
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    done = CliRunner().invoke(app, ["plan", str(tiny), f"policy.model.path={tmp_path}"], catch_exceptions=False)
    assert "nrt: cluster.gpus_per_node = 0: 2 CPU ranks planned as if each were an H100" in done.output
    assert re.search(r"one update, seconds: \d\S* in all;", done.output) and "rollout    │     0.0 " not in done.output


@pytest.mark.parametrize(
    "name, made",
    [
        ("nrt-tiny-1n0g-cpu", "; nrt train recipes/nrt-tiny-1n0g-cpu.yaml makes it"),
        ("nrt-smollm2-135m-1n0g-cpu", "; make smollm2, or tools/fetch_smollm2.py, fetches it"),
    ],
)
def test_a_model_that_this_project_makes(name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"not on this machine, .*{made}$"):
        plan(load_recipe(RECIPES / f"{name}.yaml"), load_hardware("h100"), build=False)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "choose b200, h100, h200"),
        ("name: x", "keys missing or unknown: bf16_tflops"),
        ("[", "not a YAML file"),
        ("{}", "keys missing"),
    ],
)
def test_hardware_that_is_not_known(tmp_path, text, message):
    name = "a100"
    if text is not None:
        name = str(tmp_path / "a.yaml")
        (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_hardware(name)


def test_hardware_of_ones_own(tmp_path):
    mine = vars(load_hardware("h200")) | {"name": "mine", "bf16_tflops": 1.0}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(mine))
    assert load_hardware(str(path)).bf16_tflops == 1.0
    path.write_text(yaml.safe_dump(mine | {"memory_gib": -1}))
    with pytest.raises(ConfigError, match="set a number above 0"):
        load_hardware(str(path))
