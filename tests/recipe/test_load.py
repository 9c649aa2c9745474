"""Layers, precedence, interpolation, and one line for everything that cannot be read."""

import dataclasses
import subprocess
import sys

import pytest

from nrt_megatron.recipe import ConfigError, MissingFileError, from_yaml, load_recipe, to_yaml
from nrt_megatron.recipe.load import print_notice

DATA = "data: {train: t.jsonl}\n"


def message(path, *overrides, overlays=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overlays, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) == (2 if "\nalso: " in text else 1)
    return text


def test_values_defaults_and_run_dir(load):
    recipe = load()
    assert recipe.nrt.num_generations_per_prompt == 4
    assert recipe.nrt.loss_normalizer == 512.0
    assert recipe.policy.optimizer.adam_eps == 1e-15
    assert recipe.run_dir == "runs/recipe"
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.nrt.seed = 1


def test_precedence_from_schema_to_command_line(write):
    write(
        "nrt: {max_num_steps: 1, seed: 1, num_prompts_per_step: 1, num_generations_per_prompt: 1}",
        "base/a.yaml",
    )
    write("nrt: {seed: 2, num_prompts_per_step: 2, num_generations_per_prompt: 2}", "base/b.yaml")
    recipe = write(
        DATA + "defaults: [base/a.yaml, base/b.yaml]\nnrt: {num_prompts_per_step: 3, num_generations_per_prompt: 3}"
    )
    first = write("nrt: {num_generations_per_prompt: 4, seed: 4}", "first.yaml")
    second = write("nrt: {seed: 5}", "second.yaml")
    nrt = load_recipe(recipe, [first, second], ["nrt.center_reward_by=none", "nrt.seed=6", "nrt.seed=7"]).nrt
    assert (nrt.max_num_steps, nrt.num_prompts_per_step, nrt.num_generations_per_prompt) == (1, 3, 4)
    assert (nrt.seed, nrt.center_reward_by, nrt.format_loss_weight) == (7, "none", 0.3)


def test_defaults_are_relative_to_the_file_that_names_them(write):
    write("nrt: {seed: 9}", "deep/er/root.yaml")
    write("defaults: er/root.yaml", "deep/middle.yaml")
    recipe = write(DATA + "defaults: deep/middle.yaml")
    assert load_recipe(recipe).nrt.seed == 9


def test_circle_and_missing_parents(write):
    write("defaults: b.yaml", "a.yaml")
    a = write("defaults: a.yaml", "b.yaml")
    assert "circle: b.yaml -> a.yaml -> b.yaml" in message(a)
    assert "no such file" in message(write("defaults: nowhere.yaml"))
    assert "not a path" in message(write("defaults: {a: 1}"))


def test_one_parent_of_two_files_is_no_circle(write):
    write("nrt: {seed: 3}", "root.yaml")
    write("defaults: root.yaml", "a.yaml")
    write("defaults: root.yaml", "b.yaml")
    assert load_recipe(write(DATA + "defaults: [a.yaml, b.yaml]")).nrt.seed == 3


@pytest.mark.parametrize("where", ["recipe", "overlay", "command line", "parent"])
def test_preset_can_be_set_anywhere_and_lies_below_every_file(write, where):
    """`paper` turns clipping on, `token_signal` stays what the lowest file says."""
    line = "nrt: {preset: paper}"
    write("nrt: {token_signal: normalised" + (", preset: paper}" if where == "parent" else "}"), "base.yaml")
    recipe = write(DATA + "defaults: base.yaml\n" + (line if where == "recipe" else ""))
    overlays = [write(line, "over.yaml")] if where == "overlay" else []
    nrt = load_recipe(recipe, overlays, ["nrt.preset=paper"] if where == "command line" else []).nrt
    assert (nrt.clip_to_baseline, nrt.sequence_ratio, nrt.token_signal) == (True, True, "normalised")


def test_the_two_presets_differ_where_their_sources_do(load):
    reference, paper = load("nrt.preset=reference").nrt, load("nrt.preset=paper").nrt
    differing = {
        field.name: (getattr(reference, field.name), getattr(paper, field.name))
        for field in dataclasses.fields(reference)
        if getattr(reference, field.name) != getattr(paper, field.name)
    }
    assert differing == {
        "preset": ("reference", "paper"),
        "clip_to_baseline": (False, True),
        "token_signal": ("fixed", "raw"),
        "sequence_ratio": (False, True),
        "train_forced_marker": (True, False),
        "max_inverse_prob_weight": (1e30, 1e6),
    }
    with pytest.raises(ConfigError, match="choose reference, paper or null"):
        load("nrt.preset=papper")


@pytest.mark.parametrize(
    ("override", "near"),
    [
        (
            "nrt.num_promts_per_step=3",
            "nrt.num_promts_per_step = 3: unknown key (command line); did you mean nrt.num_prompts_",
        ),
        ("nrtt.seed=3", "did you mean nrt?"),
        ("policy.optimizer.learning_rate=3", "policy.optimizer has: lr, min_lr"),
        (
            "policy.tensor_model_parallel_size=2",
            "did you mean policy.megatron_cfg.tensor_model_parallel_size",
        ),
        ("lr=2", "did you mean policy.optimizer.lr"),
        ("nrt..seed=2", "unknown key"),
        ("defaults=x.yaml", "unknown key"),
    ],
)
def test_unknown_key_names_near_ones(write, override, near):
    assert near in message(write(DATA), override)


def test_unknown_key_names_its_file(write):
    path = write(DATA + "policy: {megatron_cfg: {tensor_parallel: 2}}")
    assert f"policy.megatron_cfg.tensor_parallel = 2: unknown key ({path})" in message(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("nrt.seed=abc", "nrt.seed = 'abc': wrong type (command line); set an integer"),
        ("nrt.seed=1.5", "nrt.seed = 1.5: wrong type (command line); set an integer"),
        ("nrt.seed=true", "set an integer"),
        ("nrt.seed=null", "nrt.seed = null: wrong type"),
        ("nrt.seed=[1,2]", "nrt.seed = [1, 2]: wrong type"),
        ("nrt.seed.deeper=1", "nrt.seed = {'deeper': 1}: wrong type"),
        ("policy.optimizer.lr=high", "policy.optimizer.lr = 'high': wrong type (command line); set a number"),
        ("policy.megatron_cfg.bf16=maybe", "set true or false"),
        ("data.max_prompt_tokens=many", "set an integer or null"),
        ("policy.model.config=foo", "set a mapping or null"),
        ("data.train=[a,b]", "data.train = ['a', 'b']: wrong type (command line); set a text"),
        ("nrt=5", "nrt = 5: nrt is a section (command line); set keys inside it: num_prompts_per_step"),
        ("policy.model=foo", "policy.model is a section"),
        ("nrt.seed", "not an override; write key=value"),
        ("overlay.yaml", "give overlay files with --config"),
        ("=3", "not an override"),
        ("nrt.seed=[1", "nrt.seed = '[1': not a YAML value"),
        ("data.prompt_template={question} Think", "quote it inside"),
        ("nrt.seed=${oc.env:SURELY_NOT_SET_ANYWHERE}", "nrt.seed: KeyError"),
        ("nrt.seed=${run_dir}", "nrt.seed"),
        ("data.train=x${", "data.train"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_remedy(write, override, expected):
    assert expected in message(write(DATA), override)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nrt: {seed: 1\n", "line 2: not valid YAML"),
        ("nrt:\n\tseed: 1\n", "line 2: not valid YAML"),
        ("nrt: {seed: 1, seed: 2}", "line 1: not valid YAML, found duplicate key seed"),
        (
            "nrt: !!python/object/apply:os.system [touch /tmp/pwned]",
            "line 1: not valid YAML, could not determine a constructor",
        ),
        ("- nrt", "holds no mapping"),
        ("5", "holds no mapping"),
        ("1: 2", "1 = 2: unknown key"),
        ("", "data.train = '???': must be set"),
        ("nrt: \0", "not valid YAML"),
    ],
)
def test_a_broken_file_is_one_line(write, text, expected):
    path = write(text)
    assert expected in message(path) and (str(path) in message(path) or not text)


def test_what_is_wrong_beside_a_missing_key_is_said_with_it(write):
    text = message(write("policy: {optimizer: {min_lr: 1}}"))
    first, second = text.splitlines()
    assert first == "data.train = '???': must be set; add data.train=FILE"
    assert second.startswith("also: policy.model.path = null: no model is given; set ")
    assert second.endswith(" | policy.optimizer.min_lr = 1.0: above policy.optimizer.lr = 2e-06; set at most 2e-06")
    assert (
        message(write("policy: {optimizer: {lr: -1}}")).splitlines()[1].startswith("also: policy.optimizer.lr = -1.0")
    )


def test_unreadable_recipes(write, tmp_path):
    write(DATA, "nrt-tiny.yaml")
    assert "did you mean" in message(tmp_path / "nrt-tniy.yaml") and "nrt-tiny.yaml" in message(
        tmp_path / "nrt-tniy.yaml"
    )
    assert "give the path of a YAML file" in message(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9")
    assert "not UTF-8" in message(tmp_path / "latin.yaml")
    with pytest.raises(MissingFileError):
        load_recipe(write(DATA), [tmp_path / "no-overlay.yaml"])


def test_empty_sections_and_scientific_notation(write):
    recipe = load_recipe(
        write(DATA + "policy:\nnrt:\n"), [], ["policy.optimizer.lr=3e-4", "policy.optimizer.adam_eps=1"]
    )
    assert (recipe.policy.optimizer.lr, recipe.policy.optimizer.adam_eps) == (3e-4, 1.0)


def test_interpolation_of_keys_and_environment(write, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    recipe = load_recipe(write("run_dir: ${oc.env:SCRATCH}/run-${nrt.seed}\n" + DATA), [], ["nrt.seed=5"])
    assert recipe.run_dir == "/scratch/me/run-5"


def test_inline_model_config_keeps_any_key(load):
    recipe = load("policy.model={path: null, config: {model_type: llama, rope_scaling: {factor: 8.0}, eos: [1, 2]}}")
    assert recipe.policy.model.config == {
        "model_type": "llama",
        "rope_scaling": {"factor": 8.0},
        "eos": [1, 2],
    }


@pytest.mark.parametrize(
    "template",
    [
        "{question}\n",
        "é {question} 😀",
        "1e5 {question}",
        r"${ {question}",
        r"\${ {question}",
        r"\\${a} \ {question}",
        "yes",
    ],
)
def test_yaml_round_trip_is_exact(load, template):
    recipe = load("policy.optimizer.lr=3e-4", "nrt.preset=paper", "nrt.token_signal=fixed")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, prompt_template=template),
        policy=dataclasses.replace(
            recipe.policy,
            model=dataclasses.replace(recipe.policy.model, config={"a": [template, {"b": 1e-8}], "n": None}),
        ),
    )
    assert from_yaml(to_yaml(recipe)) == recipe


def test_a_resolved_recipe_is_a_recipe(load, write):
    recipe = load("nrt.preset=reference")
    assert load_recipe(write(to_yaml(recipe), "other.yaml")) == recipe


def test_recipes_need_neither_torch_nor_megatron_nor_transformers():
    code = (
        "import sys; from nrt_megatron.recipe import check, check_files, load_recipe, to_yaml;"
        "to_yaml(load_recipe('recipes/nrt-tiny-1n0g-cpu.yaml'));"
        "heavy = {'torch', 'megatron', 'transformers', 'numpy', 'tokenizers'} & {m.split('.')[0] for m in sys.modules};"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_notices_go_to_stderr(capsys):
    print_notice("something")
    assert capsys.readouterr() == ("", "nrt: something\n")
