"""The planner's parameter counts are those of the ranks that Megatron builds."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.plan import load_hardware
from nrt_megatron.plan.build import built_parameters
from nrt_megatron.plan.layout import Layout
from nrt_megatron.plan.parameters import stage_parameters
from nrt_megatron.recipe import Cluster, Megatron, Policy, Recipe

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
LLAMA_405B = LLAMA_70B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
TIED = LLAMA_70B | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
MISTRAL = TIED | {
    "model_type": "mistral",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
SPLIT = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}


def cut(tp: int, pp: int, vpp: int | None = None, **more) -> Megatron:
    return Megatron(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=tp > 1,
        bf16=True,
        **more,
    )


CASES = [
    (LLAMA_70B, cut(4, 8, 5)),
    (LLAMA_405B, cut(8, 8, 8, **SPLIT)),
    (TIED, cut(1, 1)),
    (TIED, cut(2, 2)),
    (MISTRAL, cut(4, 2, 2, make_vocab_size_divisible_by=1)),
]


def counted(config: dict, cfg: Megatron) -> list[int]:
    shape = ModelShape.from_hf(config)
    gpus = cfg.tensor_model_parallel_size * cfg.pipeline_model_parallel_size
    recipe = Recipe(policy=Policy(megatron_cfg=cfg), cluster=Cluster(num_nodes=1, gpus_per_node=gpus))
    layout = Layout.of(recipe, shape, load_hardware("h100"))
    assert sum(stage.layers for stage in layout.stages) == shape.num_layers
    return [stage_parameters(shape, cfg, layout, stage) for stage in layout.stages]


def test_llama_70b_on_eight_stages_by_hand():
    """Per rank and layer 106,954,752 of matrices and 2 x 8192 of norms; 16,032 rows of embedding and of output."""
    layers, vocabulary = 10 * (106_954_752 + 16_384), 16_032 * 8_192
    stages = counted(LLAMA_70B, cut(8, 8, make_vocab_size_divisible_by=1))
    assert stages == [layers + vocabulary, *[layers] * 6, layers + vocabulary + 8_192]
    assert stages[:2] == [1_201_045_504, 1_069_711_360]


def test_llama_70b_on_128_gpus_equals_the_built_ranks():
    cfg = cut(8, 4)
    assert counted(LLAMA_70B, cfg) == built_parameters(ModelShape.from_hf(LLAMA_70B), cfg)


def test_other_layouts_and_models_equal_the_built_ranks():
    """In one process, since importing Megatron takes longer than building 405B."""
    code = (
        "import json, sys\n"
        "from nrt_megatron.plan.build import ModelShape, Megatron, _count\n"
        "cases = json.load(sys.stdin)\n"
        "print(json.dumps([_count(ModelShape.from_hf(shape), Megatron(**cfg)) for shape, cfg in cases]))\n"
    )
    cases = json.dumps([(config, asdict(cfg)) for config, cfg in CASES])
    env = os.environ | {"NRT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], input=cases, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [counted(*case) for case in CASES]


def test_a_model_that_megatron_refuses_is_no_silent_count():
    with pytest.raises(RuntimeError, match="building the ranks failed"):
        built_parameters(ModelShape.from_hf(LLAMA_70B), cut(1, 3))
