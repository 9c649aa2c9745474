"""`policy.megatron_cfg`: Megatron-Core's own fields, their types and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Megatron:
    """Megatron-Core's own fields, under its own names."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; divides attention heads, key-value heads and the MLP width."""
    pipeline_model_parallel_size: int = 1
    """Stages of consecutive layers; divides the number of layers."""
    virtual_pipeline_model_parallel_size: Optional[int] = None
    """Chunks of layers per stage (interleaved schedule); null: one."""
    context_parallel_size: int = 1
    """Ranks that share each sequence of an update; in a rollout they share a replica's prompts."""
    account_for_embedding_in_pipeline_split: bool = False
    """Deal the embedding to the first stage as if it were a layer."""
    account_for_loss_in_pipeline_split: bool = False
    """Deal the output layer to the last stage as if it were a layer."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks."""
    transformer_impl: str = "auto"
    """`local`, `transformer_engine`, or `auto`: Transformer Engine where it is installed with a GPU."""
    bf16: bool = False
    """Weights and activations in bfloat16, the optimizer's copy in float32. Else all in float32."""
    fp8: Optional[str] = None
    """Linear layers in FP8: `e4m3`, `hybrid` (gradients in E5M2), or null. Needs Transformer Engine's layers, or
    `fp8_emulation`."""
    fp8_recipe: str = "delayed"
    """Scaling: `tensorwise` (of the current tensor), `delayed`, `blockwise`, `mxfp8`. Block scales are powers of two,
    unless Transformer Engine's variable NVTE_FP8_BLOCK_SCALING_FP32_SCALES is 1; `fp8_emulation` follows it. With
    `blockwise` and `sequence_parallel` rows are padded to multiples of 128 x TP tokens."""
    fp8_margin: int = 0
    """With `delayed`: powers of two between the largest value and the end of the range."""
    fp8_amax_history_len: int = 1
    """With `delayed`: steps that the largest value is looked for in."""
    fp8_amax_compute_algo: str = "most_recent"
    """With `delayed`: `max` of the history, or its `most_recent` value."""
    fp8_param: bool = False
    """Keep the weights of linear layers in FP8 alone."""
    first_last_layers_bf16: bool = False
    """Leave the first and last layers of the model out of FP8."""
    num_layers_at_start_in_bf16: int = 1
    """How many of the first, with `first_last_layers_bf16`."""
    num_layers_at_end_in_bf16: int = 1
    """How many of the last, with `first_last_layers_bf16`."""
    fp8_emulation: bool = False
    """Rehearse FP8 (tensorwise or blockwise) on local layers, with or without a GPU: the same rounding, and slower."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs; needs the two fields above."""
    recompute_granularity: Optional[str] = None
    """`full` or `selective` activation recomputation."""
    recompute_method: Optional[str] = None
    """With `full`: `uniform` or `block`."""
    recompute_num_layers: Optional[int] = None
    """With `full`: layers per recomputed unit (uniform), or recomputed layers per stage (block)."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    deterministic_mode: bool = True
    """Deterministic kernels only: repeats are bit for bit equal."""
    distributed_timeout_minutes: float = 10.0
    """A collective, or a phase of a step, that takes longer ends the run and names rank and phase."""
    logprob_chunk_size: int = 1024
    """Tokens per chunk of the output layer; bounds the log-prob workspace."""
