"""Every constant of the planner that is not a nominal rate, with its source. None depends on model or layout.

Published training runs are predicted with these values as they stand: `tests/plan/published.yaml` lists the runs
and `tests/plan/test_published.py` how far each prediction is off.
"""

MATMUL = 0.68
"""Share of the Tensor Core peak in matrix products, bf16 and FP8 alike.

The best shape reaches 80% (H100, bf16), 73% (H200, FP8), 78% and 76% (B200): S. Bekman, Machine Learning Engineering,
"Maximum Achievable Matmul FLOPS comparison table". A step's shapes stay below the best; 0.68 is the one constant that
was fitted, to all published runs together."""

ATTENTION = 0.35
"""Share of the bf16 peak in fused attention, forward and backward.

FlashAttention-2, which torch's scaled_dot_product_attention runs, reaches 35% of an H100: Shah et al. 2024,
FlashAttention-3 (arXiv 2407.08608), abstract."""

MEMORY = 0.85
"""Share of the nominal memory bandwidth in element-wise kernels (assumed: plain copies of gigabytes reach 0.90)."""

NETWORK = 0.80
"""Share of the nominal link rate in large collectives: 360 of 450 GB/s in an H100 node (nccl-tests issue 326, answer
of NCCL's maintainer)."""

HOST_SECONDS_PER_LAYER = 1.2e-3
"""Least time of one layer in one direction: Python and kernel launches, without CUDA graphs.

PyTorch blog, "Accelerating Generative AI with PyTorch II: GPT, Fast": eager Llama-7B, 32 layers, decodes 25.5
tokens/s and is bound by the host: 1 / (25.5 x 32) s."""

RESERVED_GIB = 2.0
"""CUDA context, cuBLAS workspaces, NCCL buffers and what the caching allocator cannot use (assumed)."""

FP8_CAST_BYTES = 6
"""Memory traffic to quantise one bf16 element: read it for the scale (2), read it to cast (2), write it in FP8 by rows
and by columns (1 + 1), as Hopper's FP8 products want both. Transformer Engine 2.11, current scaling."""
