"""The table of names against the two programs it stands between, for models too large to load here."""

from __future__ import annotations

import pytest
import torch

from nrt_megatron.convert import names
from nrt_megatron.convert.config import ModelShape

_LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": _LLAMA31_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
# The values of the models' published config.json files, and their published parameter counts.
PUBLIC = {
    "Llama-3.1-8B": (
        _LLAMA31
        | dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32),
        8_030_261_248,
    ),
    "Llama-3.1-70B": (
        _LLAMA31
        | dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80),
        70_553_706_496,
    ),
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "Llama-3.2-1B": (
        {
            **_LLAMA31,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "rope_scaling": {**_LLAMA31_ROPE, "factor": 32.0},
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
}


@pytest.mark.parametrize("model", PUBLIC)
def test_every_tensor_of_a_public_model_as_transformers_has_it(model: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config, count = PUBLIC[model]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    expected = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert names.hf_shapes(ModelShape.from_hf(config)) == expected
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == count


@pytest.mark.parametrize("model", PUBLIC)
def test_every_parameter_of_a_public_model_as_megatron_has_it(model: str, alone) -> None:
    from nrt_megatron.mcore.hf import global_parameters
    from nrt_megatron.mcore.model import build_chunks

    config, _ = PUBLIC[model]
    shape = ModelShape.from_hf(config)
    (built,) = build_chunks(shape, alone, init_model_with_meta_device=True)
    expected = {p.name: p.shape for p in names.parameters(shape)}
    assert {name: tuple(parameter.shape) for name, parameter in global_parameters(built)} == expected
    keys = {value.key for name, value in built.sharded_state_dict().items() if "_extra_state" not in name}
    assert {p.key for p in names.parameters(shape)} == keys


def test_transformer_engine_keeps_norms_in_the_next_linear_layer() -> None:
    table = names.by_name(ModelShape.from_hf(PUBLIC["Llama-3.2-1B"][0]))
    for local, fused, hf in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"),
    ):
        parameter = table[f"decoder.layers.15.{local}"]
        assert table[f"decoder.layers.15.{fused}"] is parameter
        assert parameter.sources[0].name == f"model.layers.15.{hf}.weight"
        assert parameter.key == f"decoder.layers.{fused}"


def test_a_tied_output_layer_is_the_embedding() -> None:
    table = names.by_name(ModelShape.from_hf(PUBLIC["Llama-3.2-1B"][0]))
    assert table[names.OUTPUT] is table[names.EMBEDDING]
    assert names.HF_OUTPUT not in names.hf_shapes(ModelShape.from_hf(PUBLIC["Llama-3.2-1B"][0]))
