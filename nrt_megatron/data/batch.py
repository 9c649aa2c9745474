"""Sequences `x | z | m | y*` as token grids, and micro-batches cut from them. Ids in, ids out: no text here.

One row of the grid is one trace with everything the objective needs at each token; all of it is built with
tensor operations, whatever the number of traces.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nrt_megatron.objective.loss import TRACE


@dataclass(frozen=True)
class SequenceGrid:
    """All sequences of one rank, padded on the right. N sequences of at most S tokens; -1 where unused.

    Every field is about the token in its column as a *target*: kind, its log-prob when it was sampled or
    scored, its advantage or signal. `eos_*` describe the end-of-sequence token that ended a trace without the
    marker: it was sampled after the last trace token, but is not part of the sequence that follows.
    """

    tokens: Tensor
    """int64 [N, S]"""
    lengths: Tensor
    """int64 [N]"""
    prompt_lengths: Tensor
    """int64 [N]"""
    trace_lengths: Tensor
    """int64 [N], without the marker"""
    kind: Tensor
    """int64 [N, S]"""
    old_log_probs: Tensor
    """float32 [N, S]"""
    advantages: Tensor
    """float [N]"""
    token_signal: Tensor
    """float [N, S]"""
    eos_ended: Tensor
    """bool [N]"""
    eos_ids: Tensor
    """int64 [N]: the end token that was drawn"""
    eos_log_probs: Tensor
    """float32 [N]"""

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Tensor) -> SequenceGrid:
        """The sequences `index` int64 [n], cut to the longest of them."""
        width = int(self.lengths[index].max())
        cut = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        return SequenceGrid(**{k: v[:, :width] if v.dim() == 2 else v for k, v in cut.items()})


def place(width: int, segments: list[tuple[Tensor, Tensor]], fill: float | int) -> Tensor:
    """Concatenates padded segments row by row.

    segments: (values [N, s_i], lengths int64 [N]) in order. Returns [N, width] in the dtype of the first
    values, `fill` after the last segment.
    """
    columns = torch.arange(width, device=segments[0][0].device)[None]  # [1, width]
    out = segments[0][0].new_full((len(segments[0][0]), width), fill)
    start = torch.zeros_like(segments[0][1])
    for values, lengths in segments:
        if values.size(1):
            inside = (columns >= start[:, None]) & (columns < (start + lengths)[:, None])
            offset = (columns - start[:, None]).clamp(0, values.size(1) - 1)
            out = torch.where(inside, values.gather(1, offset), out)
        start = start + lengths
    return out


def pad(rows: list[tuple[int, ...]] | list[list[int]], fill: int = 0, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ragged id lists -> (int64 [N, max], lengths int64 [N])."""
    lengths = torch.tensor([len(r) for r in rows])
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(r, dtype=torch.int64) for r in rows],
        batch_first=True,
        padding_value=fill,
        padding_side="left" if left else "right",
    )
    return padded, lengths


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward needs; flat fields have one entry per scored token (n of them)."""

    tokens: Tensor
    """int64 [b, s]: the last token of the longest sequence is a target only and left out"""
    position_ids: Tensor
    """int64 [b, s]"""
    attention_mask: Tensor | None
    """bool [b, 1, s, s], True = hidden; None: causal"""
    sources: Tensor
    """int64 [n]: `column * b + row` of the position that predicts the token"""
    targets: Tensor
    """int64 [n]"""
    scale: Tensor
    """float32 [n]: inverse temperature"""
    kind: Tensor
    """int64 [n]"""
    old_log_probs: Tensor
    """float32 [n]"""
    advantages: Tensor
    """float [n]"""
    token_signal: Tensor
    """float [n]"""
    sequence: Tensor
    """int64 [n]: index of the token's sequence within the micro-batch"""
    num_sequences: int
    num_tokens: int
    """Tokens of the sequences, padding excluded."""

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return MicroBatch(
            **{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()}
        )


def micro_batch(
    grid: SequenceGrid, index: Tensor, *, temperature: float, pad_multiple: int = 1, at_least: int = 0
) -> MicroBatch:
    """The sequences `index` as rows of one forward.

    temperature: of the sampler; sampled tokens are scored at it, all others at 1. pad_multiple: the width is
    rounded up to it (tensor-parallel size under sequence parallelism). at_least: room for sequences this long.
    """
    part = grid.rows(index)
    b, width = part.tokens.shape
    fed = -(-(max(width, at_least) - 1) // pad_multiple) * pad_multiple
    tokens = torch.zeros(b, fed, dtype=torch.int64, device=part.tokens.device)
    shown = part.tokens[:, : min(fed, width)].clamp(min=0)
    tokens[:, : shown.size(1)] = shown
    row, column = part.kind.nonzero(as_tuple=True)  # [n]
    ended = part.eos_ended.nonzero()[:, 0]  # [e]
    eos_source = part.prompt_lengths[ended] + part.trace_lengths[ended] - 1

    def flat(at_tokens: Tensor, at_eos: Tensor) -> Tensor:
        return torch.cat([at_tokens, at_eos.to(at_tokens.dtype)])

    kind = flat(part.kind[row, column], torch.full_like(ended, TRACE))
    sequence = flat(row, ended)
    return MicroBatch(
        tokens=tokens,
        position_ids=torch.arange(fed, device=tokens.device).expand(b, fed),
        attention_mask=None,
        sources=flat((column - 1) * b + row, eos_source * b + ended),
        targets=flat(part.tokens[row, column], part.eos_ids[ended]),
        scale=torch.where(kind == TRACE, 1.0 / temperature, 1.0),
        kind=kind,
        old_log_probs=flat(part.old_log_probs[row, column], part.eos_log_probs[ended]),
        advantages=part.advantages[sequence],
        token_signal=flat(part.token_signal[row, column], torch.zeros_like(part.eos_log_probs[ended])),
        sequence=sequence,
        num_sequences=b,
        num_tokens=int(part.lengths.sum()),
    )


def micro_batches(
    grid: SequenceGrid, index: Tensor, size: int, *, temperature: float, pad_multiple: int = 1, same_width: bool = False
) -> list[MicroBatch]:
    """`index` in micro-batches of `size` sequences, neighbours in length together so that little is padded.

    same_width: all are as wide as the widest, for schedules that exchange tensors of one shape.
    """
    by_length = index[grid.lengths[index].argsort(stable=True, descending=True)]
    at_least = int(grid.lengths[index].max()) if same_width else 0
    return [
        micro_batch(grid, part, temperature=temperature, pad_multiple=pad_multiple, at_least=at_least)
        for part in by_length.split(size)
    ]
