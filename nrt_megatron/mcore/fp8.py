"""FP8 rehearsed on Megatron's local linear layers: the rounding of Transformer Engine, without its speed.

Every operand of the three matrix products of a linear layer is scaled, cast to an 8-bit float and multiplied in
float32:

    forward           y  = q(x) q(W)^T          q(x): rows of tokens
    data gradient     dx = q(dy) q(W)
    weight gradient   dW = q'(dy)^T q'(x)       q': the same, but blocks run along the tokens

The scale maps the largest magnitude of a block to the largest 8-bit number (scaling of the current tensor, no
history). `tensorwise`: the whole tensor is one block (Transformer Engine's `Float8CurrentScaling`), and q' = q.
`blockwise`: weights in blocks of 128 x 128, activations and gradients in runs of 128 along the summed axis
(`Float8BlockScaling`), so that q' starts again from the tensor as it was. `e4m3` forward and, in `hybrid`, `e5m2` for
gradients: P. Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.

A block is a rank's own: as in Transformer Engine, a shard of a weight has its own scale, and so have the tokens that a
context-parallel rank holds. Ranks agree on the scale of a whole tensor under sequence parallelism alone, those of the
tensor-parallel group (`_customize_quantizers_float8_current_scaling` in Transformer Engine's linear layers, 2.11); the
larger group that Megatron hands it (`get_amax_reduction_group`, `tp_only_amax_red`) is for delayed scaling, which is
not rehearsed. So results depend, within rounding, on the layout and (tensorwise) on what else is in the batch.
Attention, norms, embedding and output layer stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from nrt_megatron.recipe import Megatron

BLOCK = 128
"""Side of a weight's block and length of a run of activations, in elements."""

Tile = tuple[int, int]
"""Rows and columns that share a scale."""


def quantize(x: Tensor, dtype: torch.dtype, tile: Tile, power_of_2: bool = False) -> tuple[Tensor, Tensor]:
    """x float [m, k] -> codes, an 8-bit float [m, k], and inverse scales float32 [ceil(m / rows), ceil(k / columns)].

    Tiles at the edges may be cut. power_of_2: scales are rounded down to powers of two.
    """
    tiles = _tiled(x.float(), tile)  # [M, rows, K, columns]
    scale = _scale(tiles.abs().amax(dim=(1, 3), keepdim=True), dtype, x.dtype, power_of_2)  # [M, 1, K, 1]
    largest = torch.finfo(dtype).max
    # E5M2 has infinities: what rounding puts beyond the largest number must not become one.
    codes = (tiles * scale).clamp(-largest, largest).to(dtype)
    return _flat(codes, x.shape), scale.reciprocal()[:, 0, :, 0]


def dequantize(codes: Tensor, inverse_scale: Tensor, tile: Tile) -> Tensor:
    """The float32 [m, k] that codes stand for."""
    return _flat(_tiled(codes.float(), tile) * inverse_scale[:, None, :, None], codes.shape)


def _tiled(x: Tensor, tile: Tile) -> Tensor:
    """[m, k] -> [m / rows, rows, k / columns, columns], filled up with zeros."""
    (m, k), (rows, columns) = x.shape, tile
    if m % rows or k % columns:
        x = torch.nn.functional.pad(x, (0, -k % columns, 0, -m % rows))
    return x.reshape(x.size(0) // rows, rows, x.size(1) // columns, columns)


def _flat(tiles: Tensor, shape: torch.Size) -> Tensor:
    M, rows, K, columns = tiles.shape
    return tiles.view(M * rows, K * columns)[: shape[0], : shape[1]]


def _scale(amax: Tensor, dtype: torch.dtype, of: torch.dtype, power_of_2: bool) -> Tensor:
    """Scale of a block with the largest magnitude `amax`, as Transformer Engine defines it at the edges: 1 for zeros,
    the largest number of the tensor's own dtype `of` where the quotient overflows."""
    # torch.div, and not `max / amax`, which multiplies by a reciprocal and rounds twice.
    scale = torch.div(torch.finfo(dtype).max, amax)
    scale = torch.where(scale == torch.inf, torch.finfo(of).max, scale)
    if power_of_2:
        _, exponent = torch.frexp(scale)  # scale = fraction * 2 ** exponent, fraction in [0.5, 1)
        floor = torch.ldexp(torch.ones_like(scale), exponent - 1)
        scale = torch.where(amax.isfinite(), floor, scale)
    return torch.where(amax == 0, 1.0, scale)


@dataclass(frozen=True)
class Scaling:
    """How the operands of a linear layer become 8-bit floats. Methods: float [m, k] -> what is multiplied, float32."""

    forward_dtype: torch.dtype
    backward_dtype: torch.dtype
    blockwise: bool
    power_of_2: bool

    @classmethod
    def of(cls, cfg: Megatron) -> Scaling | None:
        """The rehearsal that a recipe asks for; None: none.

        Block scales are powers of two unless NVTE_FP8_BLOCK_SCALING_FP32_SCALES is 1, Transformer Engine's own switch.
        """
        if cfg.fp8 is None or not cfg.fp8_emulation:
            return None
        assert cfg.fp8_recipe in ("tensorwise", "blockwise"), cfg.fp8_recipe
        blockwise = cfg.fp8_recipe == "blockwise"
        return cls(
            forward_dtype=torch.float8_e4m3fn,
            backward_dtype=torch.float8_e4m3fn if cfg.fp8 == "e4m3" else torch.float8_e5m2,
            blockwise=blockwise,
            power_of_2=blockwise and os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0") != "1",
        )

    def _rounded(self, x: Tensor, dtype: torch.dtype, tile: Tile) -> Tensor:
        tile = tile if self.blockwise else tuple(x.shape)
        return dequantize(*quantize(x, dtype, tile, self.power_of_2), tile)

    def weight(self, weight: Tensor) -> Tensor:
        """The same in forward and data gradient: its blocks are square."""
        return self._rounded(weight, self.forward_dtype, (BLOCK, BLOCK))

    def activation(self, x: Tensor, over_tokens: bool = False) -> Tensor:
        """x [tokens, k]; over_tokens: for a product that sums over tokens."""
        return self._rounded(x, self.forward_dtype, (BLOCK, 1) if over_tokens else (1, BLOCK))

    def gradient(self, dy: Tensor, over_tokens: bool = False) -> Tensor:
        """dy [tokens, n]; over_tokens: for a product that sums over tokens."""
        return self._rounded(dy, self.backward_dtype, (BLOCK, 1) if over_tokens else (1, BLOCK))


class _Fp8Matmul(torch.autograd.Function):
    """x [..., k], weight [n, k], and the weight rounded beforehand, float32 [n, k], or None -> [..., n] like x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scaling: Scaling, rounded_weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaling = scaling
        rounded_weight = scaling.weight(weight) if rounded_weight is None else rounded_weight
        y = scaling.activation(x.flatten(0, -2)) @ rounded_weight.t()  # [tokens, n]
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), scaling = ctx.saved_tensors, ctx.scaling
        rows, dy = x.flatten(0, -2), grad.flatten(0, -2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = (scaling.gradient(dy) @ scaling.weight(weight)).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            dw = scaling.gradient(dy, over_tokens=True).t() @ scaling.activation(rows, over_tokens=True)
            dw = dw.to(weight.dtype)
        return dx, dw, None, None


class _Rehearsed:
    """Puts the rounding into Megatron's parallel linear layers; names, shapes and shards of the weights stay theirs."""

    def __init__(self, *args, scaling: Scaling, **kwargs):
        super().__init__(*args, **kwargs)
        self.scaling: Scaling | None = scaling
        """None: switched off."""
        self.kept: list[Tensor] | None = None
        """The rounded weight while weights do not change, once it is needed; None: it is rounded at every use."""

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *, bias, allreduce_dgrad, sequence_parallel, tp_group, **options
    ):
        if self.scaling is None:
            options |= dict(allreduce_dgrad=allreduce_dgrad, sequence_parallel=sequence_parallel, tp_group=tp_group)
            return super()._forward_impl(input=input, weight=weight, bias=bias, **options)
        assert bias is None and not self.gradient_accumulation_fusion
        if sequence_parallel:
            # Transformer Engine agrees on one scale over the shards of a sequence: that of the whole. Its blocks do not
            # cross from one shard to the next either, since a shard is padded to whole ones (recipe.token_multiple).
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return _Fp8Matmul.apply(input, weight, self.scaling, self._kept_weight(weight))

    def _kept_weight(self, weight: Tensor) -> Tensor | None:
        if self.kept is None:
            return None
        if not self.kept:
            self.kept.append(self.scaling.weight(weight))
        return self.kept[0]


class Fp8ColumnParallelLinear(_Rehearsed, ColumnParallelLinear):
    """ColumnParallelLinear with its matrix products in rehearsed FP8."""


class Fp8RowParallelLinear(_Rehearsed, RowParallelLinear):
    """RowParallelLinear with its matrix products in rehearsed FP8."""


def rehearsed_layers(model: torch.nn.Module) -> Iterator[_Rehearsed]:
    """The linear layers of a model that rehearse FP8."""
    return (module for module in model.modules() if isinstance(module, _Rehearsed))
