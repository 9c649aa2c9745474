"""The table of names against the two programs it stands between, for models too large to load here."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from nrt_megatron.convert import names
from nrt_megatron.convert.config import ModelShape
from tests.distributed import run_ranks

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
        _LLAMA31 | dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32),
        8_030_261_248,
    ),
    "Llama-3.1-70B": (
        _LLAMA31 | dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80),
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


# In a fresh interpreter: with Megatron's CPU adapter installed, `torch.device("meta")` would take real memory.
AS_TRANSFORMERS_HAS_THEM = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
found = {}
for model, config in json.load(sys.stdin).items():
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    found[model] = {name: list(parameter.shape) for name, parameter in built.named_parameters()}
print(json.dumps(found))
"""


def test_every_tensor_of_the_public_models_as_transformers_has_it() -> None:
    configs = json.dumps({model: config for model, (config, _) in PUBLIC.items()})
    command = [sys.executable, "-c", AS_TRANSFORMERS_HAS_THEM]
    done = subprocess.run(command, input=configs, capture_output=True, text=True, check=True)
    found = {
        model: {name: tuple(shape) for name, shape in shapes.items()}
        for model, shapes in json.loads(done.stdout).items()
    }
    assert found.keys() == PUBLIC.keys()
    for model, (config, count) in PUBLIC.items():
        assert names.hf_shapes(ModelShape.from_hf(config)) == found[model]
        assert sum(torch.Size(shape).numel() for shape in found[model].values()) == count


def as_megatron_has_them() -> dict[str, tuple[dict[str, tuple[int, ...]], set[str]]]:
    """Per public model: shape of every parameter, and the keys of its checkpoints; built without memory."""
    from nrt_megatron.mcore import runtime
    from nrt_megatron.mcore.hf import global_parameters
    from nrt_megatron.mcore.model import build_chunks
    from nrt_megatron.recipe import Recipe

    runtime.initialize(Recipe())
    found = {}
    for model, (config, _) in PUBLIC.items():
        shape = ModelShape.from_hf(config)
        (built,) = build_chunks(shape, Recipe().policy.megatron_cfg, init_model_with_meta_device=True)
        shapes = {name: tuple(parameter.shape) for name, parameter in global_parameters(built)}
        state = built.sharded_state_dict().items()
        found[model] = (shapes, {value.key for name, value in state if "_extra_state" not in name})
    runtime.shutdown()
    return found


def test_every_parameter_of_the_public_models_as_megatron_has_it() -> None:
    (found,) = run_ranks(1, as_megatron_has_them)
    for model, (shapes, keys) in found.items():
        table = list(names.parameters(ModelShape.from_hf(PUBLIC[model][0])))
        assert shapes == {p.name: p.shape for p in table}
        assert keys == {p.key for p in table}


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
