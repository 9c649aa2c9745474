"""What one layer and the output layer cost a rank: arithmetic, memory traffic and exchanges, and their seconds.

Counts follow Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198), appendix A, with SwiGLU, grouped queries and causal attention in place of GPT's. A backward pass takes two
matrix products for each of the forward's; in attention five for two, since the scores are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.plan import efficiency
from nrt_megatron.plan.layout import Layout
from nrt_megatron.plan.parameters import layer_matrix, vocab_matrix
from nrt_megatron.recipe import Megatron


@dataclass(frozen=True)
class Pass:
    """Sequences that go through the model together on one data-parallel rank."""

    sequences: float
    tokens: float
    """New tokens of each, over all its context-parallel ranks."""
    cached: float = 0.0
    """Tokens before them whose keys and values are in the cache."""
    branches: int = 1
    """Continuations of one prompt that share it and do not see one another (a packed tree)."""
    trunk: float = 0.0
    """Tokens of the shared prompt."""
    scored: float | None = None
    """Tokens of each that go through the output layer; None: all."""

    @property
    def packed(self) -> bool:
        """Whether each sequence is a tree, which attention sees through a mask."""
        return self.trunk > 0

    @property
    def num_scored(self) -> float:
        return self.sequences * (self.tokens if self.scored is None else self.scored)


@dataclass(frozen=True)
class Seconds:
    """Time of a piece of work on one rank, by cause. Adds and scales."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor_exchange: float = 0.0
    context_exchange: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(**{name: value * factor for name, value in vars(self).items()})


@dataclass(frozen=True)
class Costs:
    """Costs of a model at a layout."""

    shape: ModelShape
    cfg: Megatron
    layout: Layout

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.cfg.bf16 else 4

    @property
    def query_key(self) -> int:
        return (self.shape.num_attention_heads + self.shape.num_query_groups) * self.shape.kv_channels

    def attended(self, work: Pass) -> float:
        """Pairs of a token and one that it attends to, over a whole sequence, inside the sliding window if any."""
        window = self.shape.sliding_window

        def causal(length: float) -> float:
            inside = min(length, window) if window else length
            return inside**2 / 2 + (length - inside) * inside

        before = work.cached + work.trunk
        branch = (work.tokens - work.trunk) / work.branches
        return causal(before) - causal(work.cached) + work.branches * (causal(before + branch) - causal(before))

    def mask_columns(self, work: Pass) -> float:
        """Keys for each query in the mask that attention is given, all of which it computes scores of; 0 without one.

        `mcore/attention.py`: trees have a mask, and so have sliding windows that do not reach the first key. Of the
        latter a context-parallel rank takes the keys that a chunk of it can see.
        """
        keys, window = work.cached + work.tokens, self.shape.sliding_window
        if work.packed:
            return keys
        if not window or keys <= window:
            return 0.0
        return keys if self.layout.cp == 1 else min(keys, work.tokens / (2 * self.layout.cp) + window)

    def attention_flops(self, work: Pass) -> float:
        """Forward, one layer, all its ranks: two products over the attended pairs."""
        return 4 * self.attended(work) * self.shape.num_attention_heads * self.shape.kv_channels * work.sequences

    def model_flops(self, work: Pass) -> float:
        """Forward through the whole model on all its ranks.

        The convention of Megatron-Bridge's tables: causal attention counts half, recomputation not at all.
        """
        tokens = work.sequences * work.tokens
        layers = 2 * layer_matrix(self.shape) * tokens + self.attention_flops(work)
        head = 2 * self.shape.vocab_size * self.shape.hidden_size * work.num_scored
        return self.shape.num_layers * layers + head

    def layer(self, work: Pass, *, fp8: bool = False, backward: bool = False, inference: bool = False) -> Seconds:
        """One layer in one direction. `inference`: sequence parallelism off, weights read for few tokens."""
        tokens = work.sequences * work.tokens / self.layout.cp
        matrix = layer_matrix(self.shape) / self.layout.tp
        matmul = 2 * matrix * tokens * (2 if backward else 1) / self._matmul_rate(fp8)
        if inference:
            matmul = max(matmul, matrix * (1 if fp8 else self.element) / self._memory_rate)
        attention = self._attention(work, backward)
        parts = Seconds(
            matmul=matmul,
            attention=attention,
            memory=self._traffic(tokens, fp8, backward, inference) / self._memory_rate,
            tensor_exchange=self._tensor_exchange(tokens, backward),
            context_exchange=self._context_exchange(tokens, backward),
        )
        return parts + Seconds(host=max(0.0, efficiency.HOST_SECONDS_PER_LAYER - parts.total))

    def output_layer(self, tokens: float, *, backward: bool = False, chunked: bool = True) -> Seconds:
        """Logits, softmax and their gradients for `tokens` tokens of a rank.

        `chunked`: `mcore/logprobs.py`, which computes the logits again in the backward pass; bytes an element are
        those of its element-wise operations. Else a fused vocabulary-parallel cross-entropy that keeps them.
        """
        matrix = vocab_matrix(self.shape, self.cfg) / self.layout.tp
        logits = matrix / self.shape.hidden_size * tokens
        products, bytes_each = (2, 12) if backward else (1, 6)
        extra = 0.0
        if chunked:
            products, bytes_each = (3, 94) if backward else (1, 56)
            chunks = tokens / self.cfg.logprob_chunk_size
            extra = 12 * matrix * chunks if backward else 0.0  # each chunk adds to the fp32 weight gradient
        return Seconds(
            matmul=products * 2 * matrix * tokens / self._matmul_rate(False),
            memory=(bytes_each * logits + extra) / self._memory_rate,
        )

    def stage_transfer_bytes(self, tokens: float, *, inference: bool = False) -> float:
        """What a rank sends to the next stage for `tokens` tokens of its replica."""
        split = 1 if inference else self.layout.norm_split
        return tokens / self.layout.cp * self.shape.hidden_size * self.element / split

    def tensor_exchange_bytes(self, tokens: float) -> float:
        """One all-gather or reduce-scatter of the hidden states; an all-reduce is two."""
        return tokens * self.shape.hidden_size * self.element * (self.layout.tp - 1) / self.layout.tp

    def context_exchange_bytes(self, tokens: float) -> float:
        """Keys and values of `tokens` tokens a rank, gathered once over the context-parallel ranks."""
        width = 2 * self.shape.num_query_groups * self.shape.kv_channels / self.layout.tp
        return width * tokens * self.element * (self.layout.cp - 1)

    def memory_seconds(self, traffic: float) -> float:
        """Time to move `traffic` bytes between memory and processor."""
        return traffic / self._memory_rate

    @property
    def _memory_rate(self) -> float:
        return self.layout.hardware.memory_tb_per_second * 1e12 * efficiency.MEMORY

    def _matmul_rate(self, fp8: bool) -> float:
        hardware = self.layout.hardware
        peak = hardware.fp8_tflops if fp8 else hardware.bf16_tflops if self.cfg.bf16 else hardware.fp32_tflops
        return peak * 1e12 * efficiency.MATMUL

    def _attention(self, work: Pass, backward: bool) -> float:
        """Products, or reading the cached keys and values where that takes longer (decoding).

        Under a mask products are of all pairs; that it is read for each head hides behind them.
        """
        ranks = self.layout.tp * self.layout.cp
        hardware = self.layout.hardware
        peak = hardware.bf16_tflops if self.cfg.bf16 else hardware.fp32_tflops
        masked = work.tokens * self.mask_columns(work) / self.attended(work)
        flops = self.attention_flops(work) * max(1.0, masked) * (2.5 if backward else 1) / ranks
        groups = self.shape.num_query_groups / self.layout.tp
        cache = 2 * groups * self.shape.kv_channels * self.element * work.cached * work.sequences
        return max(flops / (peak * 1e12 * efficiency.ATTENTION), cache / self._memory_rate)

    def _traffic(self, tokens: float, fp8: bool, backward: bool, inference: bool) -> float:
        """Bytes of element-wise kernels, each operand read and each result written once.

        Hidden width: two norms (forward 2 accesses an element each, backward 3) and two residual sums (3 and 3).
        Rotary embedding: 2 and 2. SwiGLU: 3 and 5. Backward also adds each weight's gradient to its fp32 sum.
        FP8: the inputs of four linear maps are quantised, and backward the gradients of their outputs.
        """
        shape, tp = self.shape, self.layout.tp
        hidden, ffn, heads = (
            shape.hidden_size,
            shape.ffn_hidden_size,
            shape.num_attention_heads * shape.kv_channels,
        )
        split = 1 if inference else self.layout.norm_split
        accesses = (
            (12 if backward else 10) * hidden / split + 2 * self.query_key / tp + (5 if backward else 3) * ffn / tp
        )
        total = accesses * self.element * tokens
        if backward:
            total += 8 * layer_matrix(shape) / tp
        if fp8:
            inputs = 2 * hidden + heads + ffn
            outputs = 2 * hidden + heads + 2 * shape.num_query_groups * shape.kv_channels + 2 * ffn
            total += efficiency.FP8_CAST_BYTES * (outputs if backward else inputs) * tokens / tp
        return total

    def _tensor_exchange(self, tokens: float, backward: bool) -> float:
        """Exposed exchanges of a layer: four forward; backward two, since two run during weight-gradient products.

        (megatron.core.tensor_parallel.layers.LinearWithGradAccumulationAndAsyncCommunication.)
        """
        return (2 if backward else 4) * self.tensor_exchange_bytes(tokens) / self.layout.tensor_bandwidth

    def _context_exchange(self, tokens: float, backward: bool) -> float:
        """Gathered before attention, which waits for it; backward gathered again, and gradients scattered."""
        return self.context_exchange_bytes(tokens) * (2 if backward else 1) / self.layout.context_bandwidth
