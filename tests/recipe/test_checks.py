"""Values that cannot work, alone or together, and the remedy in each message, applied, is accepted."""

import json

import pytest

from nrt_megatron.recipe import (
    ConfigError,
    MissingFileError,
    check,
    check_files,
    data_parallel_size,
    num_sequences_per_step,
    num_updates_per_step,
    world_size,
)
from nrt_megatron.recipe.keys import leaf_types, value_type
from nrt_megatron.recipe.limits import CHOICES, NOT_EMPTY, RANGES, Range

from .conftest import CONFIG

SFT = "nrt.reward_scheme=sft"


def refusal(recipe, checker=check) -> str:
    with pytest.raises(ConfigError) as caught:
        checker(recipe)
    text = str(caught.value)
    assert len(text.splitlines()) == (2 if "\nalso: " in text else 1)
    return text


def test_the_minimal_recipe_passes_and_its_sizes(load):
    recipe = load()
    check(recipe)
    assert (world_size(recipe), data_parallel_size(recipe)) == (4, 2)
    assert (num_sequences_per_step(recipe), num_updates_per_step(recipe)) == (32, 2)
    gpus = load("cluster={num_nodes: 2, gpus_per_node: 8}", "policy.megatron_cfg.pipeline_model_parallel_size=2")
    assert (world_size(gpus), data_parallel_size(gpus)) == (16, 4)


def test_every_number_has_a_range_and_every_listed_key_exists():
    numbers = {key for key in leaf_types() if value_type(key)[0] in (int, float)}
    assert numbers == set(RANGES)
    assert set(CHOICES) | set(NOT_EMPTY) <= set(leaf_types())


def test_range_bounds():
    inside = Range(0, 1, open_low=True)
    assert 1 in inside and 1e-9 in inside and 0 not in inside and 1.1 not in inside
    assert float("nan") not in Range() and float("inf") not in Range()
    assert str(inside) == "a finite number above 0 and at most 1"


@pytest.mark.parametrize("key", sorted(RANGES))
def test_no_number_may_be_negative_or_not_finite(load, key):
    is_float = value_type(key)[0] is float
    for value in ("-1", "nan", "inf") if is_float else ("-1",):
        assert refusal(load(f"{key}={value}")).startswith(
            f"{key} = {'-1.0' if is_float and value == '-1' else value}: out of"
        )


@pytest.mark.parametrize("key", sorted(set(CHOICES) - {"nrt.preset"}))
def test_an_unknown_choice_lists_the_known_ones(load, key):
    text = refusal(load(f"{key}=bogus"))
    assert text.startswith(f"{key} = 'bogus': unknown value; choose ") and all(c in text for c in CHOICES[key])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["policy.generation.top_p=0"],
            "policy.generation.top_p = 0.0: out of range; set a finite number above 0",
        ),
        (["policy.generation.temperature=0"], "above 0"),
        (["policy.tokenizer.marker=' '"], "policy.tokenizer.marker = ' ': empty"),
        (["evaluation.match=fuzzy"], "choose exact, last_word, after:TEXT"),
        (["evaluation.match='after:'"], "choose exact, last_word, after:TEXT"),
        (["data.prompt_template=hello"], "holds no {question}"),
        (["policy.model.path=null"], "no model is given"),
        (["policy.model.config={a: 1}"], "given together with policy.model.config"),
        ([CONFIG], "policy.tokenizer.path = null: a model from policy.model.config brings no tokenizer"),
        (
            ["policy.megatron_cfg.context_parallel_size=2", "policy.max_total_sequence_length=2046"],
            "policy.max_total_sequence_length = 2046: not a multiple of 4 = 2 x CP 2; set 2044 or 2048, or another "
            "policy.megatron_cfg.context_parallel_size",
        ),
        (
            [
                "policy.megatron_cfg.context_parallel_size=2",
                "policy.megatron_cfg.sequence_parallel=true",
                "policy.max_total_sequence_length=2044",
            ],
            "not a multiple of 8 = 2 x CP 2 x TP 2 with sequence_parallel; set 2040 or 2048",
        ),
        (
            [
                "policy.megatron_cfg.tensor_model_parallel_size=1",
                "policy.megatron_cfg.sequence_parallel=true",
            ],
            "sequence_parallel",
        ),
        (["policy.megatron_cfg.virtual_pipeline_model_parallel_size=2"], "there is one pipeline stage"),
        (["policy.megatron_cfg.overlap_param_gather=true"], "needs the distributed optimizer"),
        (["policy.megatron_cfg.transformer_impl=transformer_engine"], "Transformer Engine needs a GPU"),
        (["policy.megatron_cfg.recompute_granularity=full"], "recompute_method = null"),
        (["policy.megatron_cfg.recompute_num_layers=1"], "only recompute_granularity full has it"),
        (["nrt.ratio_clip_min=2"], "nrt.ratio_clip_min = 2.0: above nrt.ratio_clip_max = 1.28"),
        (
            ["policy.generation.max_batch_size=3"],
            "max_batch_size = 3: the 4 traces of a prompt are decoded together; set",
        ),
        (["policy.generation.max_cache_tokens=259"], "may need 4 x 65; set at least 260"),
        (["policy.optimizer.min_lr=1"], "set at most 2e-06"),
        (["evaluation.every=5"], "set data.validation, or evaluation.every=0"),
    ],
)
def test_contradictions(load, overrides, expected):
    assert expected in refusal(load(*overrides))


def test_one_trace_has_no_group(load):
    one = ["nrt.num_generations_per_prompt=1", "policy.train_global_batch_size=4"]
    unscaled, uncentred = "nrt.scale_reward_by=none", "nrt.center_reward_by=none"
    assert "nrt.num_generations_per_prompt = 1: one trace has no group to be compared with" in refusal(load(*one))
    assert "every advantage would be 0" in refusal(load(*one, unscaled))
    assert "no standard deviation" in refusal(load(*one, uncentred))
    check(load(*one, unscaled, uncentred))
    check(load(*one, SFT))


def test_ranks_that_do_not_fill_replicas(load):
    text = refusal(load("cluster.cpu_ranks=5"))
    assert text == (
        "cluster.cpu_ranks = 5: 5 ranks cannot be split into replicas of TP 2 x PP 1 = 2; set cluster.cpu_ranks to 4 or"
        " 6, or policy.megatron_cfg.tensor_model_parallel_size to 1"
    )
    assert "cluster.gpus_per_node = 3" in refusal(load("cluster.gpus_per_node=3"))
    context = ["policy.megatron_cfg.context_parallel_size=8", "policy.megatron_cfg.tensor_model_parallel_size=1"]
    assert refusal(load(*context)) == (
        "policy.megatron_cfg.context_parallel_size = 8: 4 ranks cannot be split into replicas of TP 1 x PP 1 x CP 8 ="
        " 8; set cluster.cpu_ranks to 8, or lower policy.megatron_cfg.context_parallel_size"
    )
    assert "set the product of cluster.num_nodes and cluster.gpus_per_node to 4 or 8" in refusal(
        load("cluster={num_nodes: 3, gpus_per_node: 2}", "policy.megatron_cfg.tensor_model_parallel_size=4")
    )
    assert refusal(load("policy.megatron_cfg.tensor_model_parallel_size=8")).startswith(
        "policy.megatron_cfg.tensor_model_parallel_size = 8: 4 ranks cannot be split into replicas of TP 8 x PP 1 = 8"
    )


def test_questions_are_dealt_evenly(load):
    assert "set a multiple of 2: 6 or 8" in refusal(load("nrt.num_prompts_per_step=7"))


@pytest.mark.parametrize(("batch", "suggested"), [(12, "8, 16 or 32"), (64, "8, 16 or 32"), (4, "8, 16 or 32")])
def test_updates_are_whole_groups_on_every_rank(load, batch, suggested):
    """8 prompts x K 4 on 2 replicas: an update takes 1, 2 or 4 prompts a replica, 8, 16 or 32 sequences."""
    text = refusal(load(f"policy.train_global_batch_size={batch}"))
    assert text.startswith(f"policy.train_global_batch_size = {batch}: ") and text.endswith(f"set {suggested}")
    for valid in (8, 16, 32):
        check(load(f"policy.train_global_batch_size={valid}"))


def test_for_sft_a_question_is_one_sequence(load):
    """8 prompts on 2 replicas: 2, 4 or 8 sequences an update, whatever K says."""
    assert num_sequences_per_step(load(SFT)) == 8
    assert "set 4 or 8" in refusal(load(SFT))  # micro-batches of 2 rule 2 out
    check(load(SFT, "policy.train_global_batch_size=4"))


def test_micro_batches_divide_what_a_rank_gets(load):
    text = refusal(load("policy.train_micro_batch_size=3"))
    assert text == (
        "policy.train_micro_batch_size = 3: does not divide the 8 sequences of an update on one of 2 data-parallel"
        " ranks; set 1, 2, 4 or 8"
    )


def test_something_must_be_left_for_prompt_and_answer(load):
    assert "set more than 64" in refusal(load("policy.generation.max_new_tokens=64"))
    assert "set at most 47" in refusal(load("data.max_prompt_tokens=48"))
    check(load("data.max_prompt_tokens=47"))
    check(load(SFT, "policy.train_global_batch_size=4", "policy.generation.max_new_tokens=64"))


TOKENIZER = "policy.tokenizer.path=somewhere"
TP, PP = "policy.megatron_cfg.tensor_model_parallel_size", "policy.megatron_cfg.pipeline_model_parallel_size"


def test_layout_against_an_inline_config(load):
    """4 heads, 2 key-value heads, MLP of 96, 6 layers."""
    check(load(CONFIG, TOKENIZER))
    text = refusal(load(CONFIG, TOKENIZER, f"{TP}=4"))
    assert text == f"{TP} = 4: does not divide num_key_value_heads = 2 of policy.model.config; set 1 or 2"
    assert "set 1 or 2" in refusal(load(CONFIG, TOKENIZER, f"{TP}=3", "cluster.cpu_ranks=3"))
    pp4 = [CONFIG, TOKENIZER, f"{TP}=1", f"{PP}=4"]
    assert refusal(load(*pp4)).endswith(
        "does not divide num_hidden_layers = 6 of policy.model.config; set 1, 2, 3 or 6"
    )
    vpp = [
        CONFIG,
        TOKENIZER,
        f"{TP}=2",
        f"{PP}=2",
        "policy.megatron_cfg.virtual_pipeline_model_parallel_size=2",
    ]
    assert refusal(load(*vpp)).endswith("set 3 or null")
    assert "set at most 64" in refusal(load(CONFIG, TOKENIZER, "policy.max_total_sequence_length=65"))


@pytest.fixture
def place(load, tmp_path, monkeypatch):
    """The minimal recipe's files, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"num_attention_heads": 9, "num_key_value_heads": 3}))
    return load


def test_files_and_the_config_in_the_model_directory(place, tmp_path):
    one = [f"{TP}=1"]
    check_files(place(*one))
    text = refusal(place(), check_files)
    assert text == f"{TP} = 2: does not divide num_attention_heads = 9 of model/config.json; set 1 or 3"
    (tmp_path / "model/config.json").rename(tmp_path / "model/was.json")
    assert "holds no config.json" in refusal(place(), check_files)
    meta = {"model": {"num_attention_heads": 4, "num_key_value_heads": 1}, "step": 3}
    (tmp_path / "model/meta.json").write_text(json.dumps(meta))  # one of our own checkpoints
    assert "num_key_value_heads = 1 of model/meta.json; set 1" in refusal(place(), check_files)
    (tmp_path / "model/config.json").write_text("{")
    assert "config.json is not what it should be" in refusal(place(), check_files)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=nowhere.jsonl", "data.train = 'nowhere.jsonl': no such file in "),
        ("data.validation=nowhere.jsonl", "data.validation = 'nowhere.jsonl': no such file"),
        ("policy.model.path=org/model", "policy.model.path = 'org/model': no such directory"),
        ("policy.model.path=train.jsonl", "not a directory"),
        ("policy.tokenizer.path=nowhere", "give a local directory with tokenizer.json or tokenizer.model"),
    ],
)
def test_missing_files(place, override, expected):
    with pytest.raises(MissingFileError) as caught:
        check_files(place(f"{TP}=1", override))
    assert expected in str(caught.value)


def test_run_dir_and_directories_in_place_of_files(place, tmp_path):
    assert "model/config.json is a file" in refusal(place("run_dir=model/config.json/run"), check_files)
    assert "is a directory" in refusal(place(f"{TP}=1", "data.train=model"), check_files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.yaml", "train.jsonl"]


@pytest.mark.parametrize("batch, micro, fits", [(16, 2, True), (16, 4, True), (16, 16, False), (24, 8, False)])
def test_chunks_of_stages_take_micro_batches_in_groups_of_the_stages(load, batch, micro, fits):
    """One replica of two stages; Megatron's interleaved schedule would end the run in its first update."""
    recipe = load(
        "policy.megatron_cfg={tensor_model_parallel_size: 1, pipeline_model_parallel_size: 2}",
        "policy.megatron_cfg.virtual_pipeline_model_parallel_size=2",
        "cluster.cpu_ranks=2",
        "nrt.num_prompts_per_step=12" if batch == 24 else "nrt.num_prompts_per_step=8",
        f"policy.train_global_batch_size={batch}",
        f"policy.train_micro_batch_size={micro}",
    )
    if fits:
        check(recipe)
    else:
        text = refusal(recipe)
        assert text.startswith(
            f"policy.train_micro_batch_size = {micro}: makes {batch // micro} micro-batches an update"
        )
