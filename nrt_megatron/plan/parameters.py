"""How many parameters a rank holds: the planner's arithmetic, which `build.py` proves on the model itself."""

from __future__ import annotations

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.plan.layout import Layout, Stage
from nrt_megatron.recipe import Megatron


def layer_matrix(shape: ModelShape) -> int:
    """Parameters of one layer's linear maps: query-key-value, projection, and the three of SwiGLU."""
    heads, groups, width = shape.num_attention_heads, shape.num_query_groups, shape.kv_channels
    attention = shape.hidden_size * width * (heads + 2 * groups) + heads * width * shape.hidden_size
    return attention + 3 * shape.hidden_size * shape.ffn_hidden_size


def vocab_matrix(shape: ModelShape, cfg: Megatron) -> int:
    """Parameters of the embedding, or of the output layer, padding included."""
    rows = shape.padded_vocab_size(cfg.make_vocab_size_divisible_by, cfg.tensor_model_parallel_size)
    return rows * shape.hidden_size


def num_vocab_matrices(shape: ModelShape, stage: Stage) -> int:
    """Embedding and output layer on this stage; tied ones are one where they share a stage."""
    return 1 if stage.first and stage.last and shape.tie_word_embeddings else stage.first + stage.last


def stage_parameters(shape: ModelShape, cfg: Megatron, layout: Layout, stage: Stage) -> int:
    """Parameters on one rank of the stage. Norms are not split over tensor-parallel ranks."""
    norms = (2 * stage.layers + stage.last) * shape.hidden_size
    matrices = stage.layers * layer_matrix(shape) + num_vocab_matrices(shape, stage) * vocab_matrix(shape, cfg)
    return matrices // layout.tp + norms
