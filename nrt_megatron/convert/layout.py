"""Putting Hugging Face matrices together into Megatron's layout, and taking them apart again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nrt_megatron.convert.names import ROW, Parameter
from nrt_megatron.convert.safetensors_io import HFWeights


def join(pieces: Sequence[Tensor], blocks: int) -> Tensor:
    """Lays the pieces block by block: pieces [rows_i, ...] -> [sum rows_i, ...]; see `names`."""
    if len(pieces) == 1:
        return pieces[0]
    width = pieces[0].shape[1:]
    cut = [piece.reshape(blocks, -1, *width) for piece in pieces]  # [blocks, rows_i / blocks, ...]
    return torch.cat(cut, dim=1).reshape(-1, *width)


def split(parameter: Parameter, tensor: Tensor, blocks: int) -> list[Tensor]:
    """The inverse of `join`: a parameter (or its share of `blocks`) as pieces in the order of its sources."""
    if len(parameter.sources) == 1:
        return [tensor]
    total = parameter.shape[0]
    laid = tensor.reshape(blocks, -1, *tensor.shape[1:])  # [blocks, rows per block, ...]
    sizes = [source.shape[0] * laid.shape[1] // total for source in parameter.sources]
    return [piece.reshape(-1, *tensor.shape[1:]) for piece in laid.split(sizes, dim=1)]


def read_shard(weights: HFWeights, parameter: Parameter, tp_rank: int, tp_size: int) -> Tensor:
    """One tensor rank's share of a parameter, reading only that share; vocabulary matrices excepted.

    Returns [rows / tp_size, ...] for a column-parallel parameter, [rows, columns / tp_size] for a
    row-parallel one, else all of it; in the dtype of the file.
    """
    assert not parameter.is_vocabulary or tp_size == 1, "vocabulary shards are padded: read their rows"
    if parameter.tp_axis is None:
        return weights.read(parameter.sources[0].name)
    pieces = []
    for source in parameter.sources:
        size = source.shape[parameter.tp_axis]
        assert size % tp_size == 0, f"tensor parallel {tp_size} does not divide {source}"
        share = slice(tp_rank * size // tp_size, (tp_rank + 1) * size // tp_size)
        index = (slice(None), share) if parameter.tp_axis == ROW else (share,)
        pieces.append(weights.read(source.name, *index))
    return join(pieces, parameter.blocks(tp_size) // tp_size)
