"""Putting Hugging Face matrices together into Megatron's layout, and taking them apart again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_megatron.convert.names import ROW, Parameter
from nrt_megatron.convert.safetensors_io import TensorReader


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of one Hugging Face tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a whole Megatron parameter, and the rows of its sources they are made of."""

    start: int
    stop: int
    sources: tuple[Rows, ...]
    blocks: int
    """Parts each source is cut into here, see `join`."""


def pieces(parameter: Parameter, max_rows: int) -> Iterator[Piece]:
    """The parameter in pieces of at most `max_rows` rows (of one query group at least), in order.

    `linear_fc1` is laid out here as checkpoints hold it: all of gate, then all of up.
    """
    if parameter.groups is not None:
        height = parameter.shape[0] // parameter.groups
        step = max(1, max_rows // height)
        for first in range(0, parameter.groups, step):
            last = min(first + step, parameter.groups)
            rows = tuple(
                Rows(s.name, first * s.shape[0] // parameter.groups, last * s.shape[0] // parameter.groups)
                for s in parameter.sources
            )
            yield Piece(first * height, last * height, rows, blocks=last - first)
        return
    base = 0
    for source in parameter.sources:
        for first in range(0, source.shape[0], max_rows):
            last = min(first + max_rows, source.shape[0])
            yield Piece(base + first, base + last, (Rows(source.name, first, last),), blocks=1)
        base += source.shape[0]


def join(parts: Sequence[Tensor], blocks: int) -> Tensor:
    """Lays the parts block by block: parts [rows_i, ...] -> [sum rows_i, ...]; see `names`."""
    if len(parts) == 1:
        return parts[0]
    width = parts[0].shape[1:]
    cut = [part.reshape(blocks, -1, *width) for part in parts]  # [blocks, rows_i / blocks, ...]
    return torch.cat(cut, dim=1).reshape(-1, *width)


def split(tensor: Tensor, rows: Sequence[int], blocks: int) -> list[Tensor]:
    """The inverse of `join`: [sum rows_i, ...] -> parts [rows_i, ...]."""
    if len(rows) == 1:
        return [tensor]
    laid = tensor.reshape(blocks, -1, *tensor.shape[1:])  # [blocks, rows per block, ...]
    cut = laid.split([count // blocks for count in rows], dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in cut]


def read_shard(weights: TensorReader, parameter: Parameter, tp_rank: int, tp_size: int) -> Tensor:
    """One tensor rank's share of a parameter, reading only that share; not for vocabulary matrices.

    Returns [rows / tp_size, ...] for a column-parallel parameter, [rows, columns / tp_size] for a
    row-parallel one, else all of it; in the dtype of the file.
    """
    assert not parameter.is_vocabulary, "vocabulary matrices are padded: read them with read_rows"
    if parameter.tp_axis is None:
        return weights.read(parameter.sources[0].name)
    parts = []
    for source in parameter.sources:
        size = source.shape[parameter.tp_axis]
        assert size % tp_size == 0, f"tensor parallel {tp_size} does not divide {source}"
        share = slice(tp_rank * size // tp_size, (tp_rank + 1) * size // tp_size)
        index = (slice(None), share) if parameter.tp_axis == ROW else (share,)
        parts.append(weights.read(source.name, *index))
    return join(parts, parameter.blocks(tp_size) // tp_size)
