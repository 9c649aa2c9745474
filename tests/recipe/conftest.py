"""A small complete recipe, and ways to vary it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nrt_megatron.recipe import Recipe, load_recipe

MINIMAL = """
nrt: {num_prompts_per_step: 8, num_generations_per_prompt: 4, max_num_steps: 3}
policy:
  model: {path: model}
  train_global_batch_size: 16
  train_micro_batch_size: 2
  max_total_sequence_length: 64
  megatron_cfg: {tensor_model_parallel_size: 2}
  generation: {max_new_tokens: 16}
data: {train: train.jsonl}
cluster: {gpus_per_node: 0, cpu_ranks: 4}
"""
"""Two data-parallel replicas of TP 2; 32 sequences a step, two updates of 16, 8 a replica, 4 micro-batches of 2."""

CONFIG = (
    "policy.model={path: null, config: {num_attention_heads: 4, num_key_value_heads: 2, intermediate_size: 96,"
    " num_hidden_layers: 6, hidden_size: 64, max_position_embeddings: 64}}"
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(text, name="recipe.yaml")` makes a file below the test's directory and returns its path."""

    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def load(write: Callable[..., Path]) -> Callable[..., Recipe]:
    """`load(*overrides)`: the minimal recipe with overrides as on the command line."""

    def load(*overrides: str) -> Recipe:
        return load_recipe(write(MINIMAL), [], list(overrides))

    return load
