"""Rows of the vocabulary matrices: a tensor rank's share, padding, and added tokens.

An added token has no trained row, so its first probability is decided by how the row is made. Its logit
is h . w, linear in the output row w, so with the mean of rows the logit is the mean of logits:

- `eos`: the row of the end-of-sequence token. Marker and EOS start equally likely, at the probability
  EOS had (both divided by the slightly larger normaliser): right where a model would have stopped.
- `mean`: the mean row of the vocabulary. By Jensen's inequality the probability starts at or below the
  average 1/V: rare, and the same preference whatever the text says.
- a text: the mean row of its tokens. The probability starts at the geometric mean of theirs.

With tied embeddings the one row serves as input too; untied, both matrices get theirs by the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from nrt_megatron.convert.safetensors_io import TensorReader

_CHUNK_BYTES = 64 << 20
"""Bytes of float64 held at once while averaging a matrix."""


@dataclass(frozen=True)
class NewTokens:
    """Tokens added to a checkpoint's vocabulary, and the rows theirs start from."""

    ids: tuple[int, ...]
    """Their ids. An id below the matrix's rows overwrites a row that no token of the tokenizer used."""
    base_size: int
    """Tokens of the tokenizer before the addition: the rows that `mean` averages."""
    like: Optional[tuple[int, ...]] = None
    """Ids whose rows are averaged: (eos,) for `eos`, the text's tokens for a text; None: `mean`."""

    def vocab_size(self, rows: int) -> int:
        """Rows needed once the tokens are in a matrix that has `rows`."""
        return max(rows, *(token + 1 for token in self.ids))


def initial_row(weights: TensorReader, name: str, new: NewTokens) -> Tensor:
    """The row [hidden] an added token starts from; averaged in float64, in a fixed order, so it is reproducible."""
    rows, hidden = weights.tensors[name].shape
    if new.like is not None:
        picked = [weights.read(name, slice(token, token + 1)) for token in new.like]
        return torch.cat(picked).double().mean(0).to(picked[0].dtype)
    step = max(1, _CHUNK_BYTES // (8 * hidden))
    size = min(new.base_size, rows)
    total = torch.zeros(hidden, dtype=torch.float64)
    for start in range(0, size, step):
        chunk = weights.read(name, slice(start, min(start + step, size)))
        total += chunk.double().sum(0)
    return (total / size).to(chunk.dtype)


def read_rows(weights: TensorReader, name: str, start: int, stop: int, new: Optional[NewTokens] = None) -> Tensor:
    """Rows [start, stop) of a vocabulary matrix: the file's, then added tokens', then zeros. [stop - start, hidden]"""
    rows, hidden = weights.tensors[name].shape
    kept = weights.read(name, slice(min(start, rows), min(stop, rows)))
    here = [token - start for token in (new.ids if new else ()) if start <= token < stop]
    if stop <= rows and not here:
        return kept
    out = torch.cat([kept, torch.zeros(stop - start - len(kept), hidden, dtype=kept.dtype)])
    if here:
        out[here] = initial_row(weights, name, new)
    return out
