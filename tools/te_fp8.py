"""Stand-ins for Transformer Engine's FP8 kernels: quantizing, transposing, and products of what is quantized.

The formats of its tensors are its own, and so is all that its Python does with them: which format a product takes,
gathering shards, keeping weights. Rounding is that of `nrt_megatron.mcore.fp8`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK = 128


def _codes(x: Tensor, quantizer: Any, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """x [m, k] -> codes uint8 [m, k] and inverse scales, one a tile."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    from nrt_megatron.mcore.fp8 import quantize as rounded

    codes, inverse = rounded(x, TE_DType_To_Torch[quantizer.dtype], tile, quantizer.force_pow_2_scales)
    return codes.view(torch.uint8), inverse


def _whole(x: Tensor, quantizer: Any, out: Any) -> None:
    """One scale for a tensor, or for those of all ranks that share it."""
    rows = x
    if quantizer.with_amax_reduction:  # a row with the largest magnitude of all ranks has their scale
        largest = x.abs().amax()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        rows = torch.cat([x, largest.expand(1, x.size(1))])
    codes, inverse = _codes(rows, quantizer, tuple(rows.shape))
    codes = codes[: len(x)]
    out._scale_inv.copy_(inverse.view(1))
    out._data = _into(out._data, codes.view(out.shape)) if quantizer.rowwise_usage else None
    out._transpose = codes.t().contiguous() if quantizer.columnwise_usage else None
    out._transpose_invalid = out._transpose is None


def _scaled(x: Tensor, quantizer: Any, out: Any) -> None:
    """With a scale that is there."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    dtype = TE_DType_To_Torch[quantizer.dtype]
    largest = torch.finfo(dtype).max
    codes = (x.float() * quantizer.scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    out._data = _into(out._data, codes.view(out._data.shape))


def _into(there: Tensor | None, values: Tensor) -> Tensor:
    return values.contiguous() if there is None else there.copy_(values)


def _fill(scales: Tensor, values: Tensor) -> None:
    scales.zero_()
    scales[: values.size(0), : values.size(1)] = values


def _blocks(x: Tensor, quantizer: Any, out: Any) -> None:
    """Squares for weights, else runs of 128: along the rows, and for `columnwise` down the columns."""
    square, compact = quantizer.block_scaling_dim == 2, quantizer.all_gather_usage
    empty = quantizer.make_empty(out.shape, dtype=x.dtype, device=x.device)
    for field in ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv", "_data_format"):
        setattr(out, field, getattr(empty, field))
    if quantizer.rowwise_usage:
        codes, inverse = _codes(x, quantizer, (BLOCK, BLOCK) if square else (1, BLOCK))
        out._rowwise_data.copy_(codes.view(out.shape))
        _fill(out._rowwise_scale_inv, inverse if square or compact else inverse.t())
    if quantizer.columnwise_usage:
        codes, inverse = _codes(x, quantizer, (BLOCK, BLOCK) if square else (BLOCK, 1))
        out._columnwise_data.copy_((codes if compact else codes.t()).view(out._columnwise_data.shape))
        _fill(out._columnwise_scale_inv, inverse.t() if square else inverse)


def quantize(x: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """As the quantizer says: of one scale or of blocks, for rows, columns, or both."""
    kinds = {"Float8CurrentScalingQuantizer": _whole, "Float8Quantizer": _scaled, "Float8BlockQuantizer": _blocks}
    assert noop is None
    if out is None:
        out = quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device)
    kinds[type(quantizer).__name__](x.detach().reshape(-1, x.size(-1)), quantizer, out)
    return out


def largest_magnitude(x: Tensor, out: Tensor) -> None:
    """Into `out` [1]."""
    out.copy_(x.abs().amax())


def scales(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], largest: float, power_of_2: bool, epsilon: float
) -> None:
    """lists: magnitudes, their scales, and the inverse of these, each [1]."""
    assert not power_of_2 and not epsilon
    for magnitude, scale, inverse in zip(*lists, strict=True):
        scale.copy_(torch.where(magnitude == 0, 1.0, torch.div(largest, magnitude)))
        inverse.copy_(scale.reciprocal())


def dequantize(x: Any, dtype: Any) -> Tensor:
    """Of one scale, from its rows."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return (x._data.view(TE_DType_To_Torch[x._fp8_dtype]).float() * x._scale_inv).to(TE_DType_To_Torch[dtype])


def transpose(codes: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """[..., k] -> [k, ...]"""
    turned = codes.flatten(0, -2).t().contiguous().view(codes.size(-1), *codes.shape[:-1])
    return turned if out is None else out.copy_(turned)


def operand(x: Any, columnwise: bool) -> Tensor:
    """What a product reads, float32 [m, k]: Hopper's sum along rows, so transposed operands need their transpose."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if not isinstance(x, QuantizedTensorStorage):
        return x.flatten(0, -2)
    if isinstance(x, Float8TensorStorage):
        from transformer_engine.pytorch.constants import TE_DType_To_Torch

        assert not columnwise or not x._transpose_invalid, "this product needs the transpose"
        codes = x._transpose.flatten(1).t() if columnwise else x._data.flatten(0, -2)
        return codes.contiguous().view(TE_DType_To_Torch[x._fp8_dtype]).float() * x._scale_inv
    kept = x.get_metadata()
    drop = "rowwise" if columnwise else "columnwise"
    kept |= {f"{drop}_data": None, f"{drop}_scale_inv": None}
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    return Float8BlockwiseQTensorStorage(**kept).dequantize().flatten(0, -2)
