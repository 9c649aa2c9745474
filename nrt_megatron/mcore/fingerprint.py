"""A checksum of a whole parameter that each rank's part adds to, whatever the layout: were weights moved right?

The bits of every entry are taken as an integer and multiplied with an odd number drawn from the entry's place in the
whole parameter, all modulo 2^64. Equal weights have equal sums at every layout; a changed, missing or misplaced entry
changes the sum. One pass over the weights, and eight bytes a parameter to exchange.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nrt_megatron.convert.names import COLUMN, ROW, Parameter

ROWS_AT_ONCE = 1024
"""Bounds the workspace: 16 bytes for each entry of these rows."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(part: Tensor, parameter: Parameter, tp_rank: int, tp_size: int) -> Tensor:
    """int64 scalar: what `part`, a tensor rank's share of `parameter`, adds to the sum of the whole."""
    bits = part.detach().contiguous().view(_BITS[part.element_size()])
    bits = bits.view(len(bits), -1)  # a norm's weight is a column
    shares = [(tp_rank, tp_size) if axis == parameter.tp_axis else (0, 1) for axis in (COLUMN, ROW)]
    rows = _mixed(_places(bits.size(0), *shares[0], num_blocks(parameter), bits.device), 1)
    columns = _mixed(_places(bits.size(1), *shares[1], 1, bits.device), 2)
    slices = zip(bits.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE))
    return torch.stack([((some.long() * columns).sum(-1) * factors).sum() for some, factors in slices]).sum()


def num_blocks(parameter: Parameter) -> int:
    """Runs of rows on a tensor rank that are apart in the whole parameter: gate and up of `linear_fc1`, else one."""
    return len(parameter.sources) if parameter.groups is None else 1


def _places(length: int, rank: int, ranks: int, blocks: int, device: torch.device) -> Tensor:
    """Index in the whole of each of this rank's `length` rows or columns: an equal run of each of the blocks."""
    run = length // blocks
    here = torch.arange(length, device=device)
    return here // run * (run * ranks) + rank * run + here % run


def _mixed(index: Tensor, salt: int) -> Tensor:
    """Odd int64 numbers that look random (the finaliser of splitmix64, S. Vigna 2015), wrapping around."""
    x = (index + salt * 2**40) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return (x ^ (x >> 31)) | 1
