"""config.json in, ModelShape, config.json out; what cannot be computed exactly is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from nrt_megatron.convert.config import ModelShape, RopeScaling
from nrt_megatron.recipe import ConfigError
from tests.convert.builders import VARIANTS

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "torch_dtype": "bfloat16",
    "something_else": {"kept": True},
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_fields_carry_megatrons_names() -> None:
    shape = ModelShape.from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-5})
    assert (shape.num_query_groups, shape.kv_channels, shape.ffn_hidden_size) == (4, 8, 96)
    assert (shape.rotary_base, shape.layernorm_epsilon, shape.dtype) == (5e5, 1e-5, "bfloat16")
    assert shape.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_absent_keys_mean_what_transformers_takes_them_to_mean() -> None:
    from transformers import AutoConfig

    for family in ("llama", "mistral"):
        config = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "something_else")}
        config = {**config, "model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"]}
        shape, theirs = ModelShape.from_hf(config), AutoConfig.for_model(**config)
        assert shape.num_query_groups == theirs.num_key_value_heads
        assert shape.max_position_embeddings == theirs.max_position_embeddings
        assert shape.sliding_window == getattr(theirs, "sliding_window", None)
        assert shape.layernorm_epsilon == theirs.rms_norm_eps
        assert shape.rotary_base == theirs.rope_theta
        assert shape.tie_word_embeddings == theirs.tie_word_embeddings


def test_transformers_5_spelling_of_rope() -> None:
    shape = ModelShape.from_hf({**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    assert shape.rotary_base == 5e5 and shape.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_round_trip_keeps_what_it_does_not_know() -> None:
    assert ModelShape.from_hf(LLAMA).to_hf() == LLAMA


def test_a_changed_field_changes_its_key_only() -> None:
    shape = replace(ModelShape.from_hf(LLAMA), vocab_size=140, dtype="float32")
    assert shape.to_hf() == {**LLAMA, "vocab_size": 140, "torch_dtype": "float32"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shape_without_its_config_writes_one_that_reads_the_same(variant: str) -> None:
    shape = ModelShape.from_hf({**{k: v for k, v in LLAMA.items() if k != "architectures"}, **VARIANTS[variant]})
    assert ModelShape.from_hf(replace(shape, original={}).to_hf()) == shape


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2"}, ("model_type", "qwen2", "llama or mistral")),
        ({"attention_bias": True}, ("attention_bias", "True")),
        ({"mlp_bias": True}, ("mlp_bias", "True")),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            ("rope_scaling.rope_type", "yarn", "llama3"),
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ("rope_scaling.rope_type", "linear")),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, ("rope_scaling.factor", "missing")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "dequantised")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "3", "8")),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, ("hidden_size", "64", "head_dim")),
        ({"hidden_size": None}, ("hidden_size", "missing")),
        ({"vocab_size": "131"}, ("vocab_size", "'131'", "integer")),
        ({"torch_dtype": "float8_e4m3fn"}, ("torch_dtype", "float8_e4m3fn", "bfloat16")),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("architectures", "ForCausalLM")),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        ModelShape.from_hf({**LLAMA, **change})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_broken_or_missing_file(tmp_path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        ModelShape.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelShape.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="JSON object"):
        ModelShape.from_dir(tmp_path)


def test_shapes_and_names_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from nrt_megatron.convert import names\n"
        f"shape = names.ModelShape.from_hf({LLAMA!r})\n"
        "assert len(list(names.parameters(shape))) == 15\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
