"""Sequences `x | z | m | y*` as token grids, and micro-batches cut from them. Ids in, ids out: no text here.

One row of the grid is one trace with everything the objective needs at each token; all of it is built with
tensor operations, whatever the number of traces.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """int64 [b, s]"""
    position_ids: Tensor
    """int64 [b, s]"""
    branches: Tensor | None
    """int64 [b, s] of a packed tree: 0 for the prompt, 1..K for its traces, -1 for padding; None: causal rows"""
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
    """Tokens fed, padding excluded; a sequence's last token is a target only."""
    sampler_log_probs: Tensor | None = None
    """float32 [n]: the sampler's, where `old_log_probs` are the trainer's own; None: they are the sampler's"""

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return MicroBatch(
            **{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()}
        )


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of some sequences lie in the [b, s] batch that is fed."""

    tokens: Tensor
    """int64 [b, s]"""
    position_ids: Tensor
    """int64 [b, s]"""
    branches: Tensor | None
    row: Tensor
    """int64 [n]: batch row of each sequence"""
    prompt_end: Tensor
    """int64 [n]: batch column of the prompt's last token"""
    branch_start: Tensor
    """int64 [n]: batch column of the first token after the prompt"""


def _as_rows(part: SequenceGrid, width: int) -> _Layout:
    """One sequence a row, padded on the right; no token looks at the padding behind it."""
    b = len(part)
    tokens = torch.zeros(b, width, dtype=torch.int64, device=part.tokens.device)
    shown = part.tokens[:, : min(width, part.tokens.size(1))].clamp(min=0)
    tokens[:, : shown.size(1)] = shown
    return _Layout(
        tokens=tokens,
        position_ids=torch.arange(width, device=tokens.device).expand(b, width),
        branches=None,
        row=torch.arange(b, device=tokens.device),
        prompt_end=part.prompt_lengths - 1,
        branch_start=part.prompt_lengths,
    )


def _as_trees(part: SequenceGrid, traces: int, pad: Callable[[int], int]) -> _Layout:
    """The prompt of each `traces` neighbouring sequences once, then their continuations side by side."""
    device, n = part.tokens.device, len(part)
    trees = n // traces
    assert trees * traces == n, f"{n} sequences are no groups of {traces}"
    continuation = part.lengths - part.prompt_lengths - 1  # the last token is a target only
    before = continuation.view(trees, traces).cumsum(1) - continuation.view(trees, traces)
    start = part.prompt_lengths + before.flatten()  # [n]
    width = pad(int((start + continuation).max()))
    row = torch.arange(n, device=device) // traces
    columns = torch.arange(part.tokens.size(1), device=device)
    behind = columns - part.prompt_lengths[:, None]  # [n, S]
    first = (torch.arange(n, device=device) % traces == 0)[:, None]
    fed = torch.where(behind < 0, first, columns < part.lengths[:, None] - 1)
    sequence, column = fed.nonzero(as_tuple=True)
    target = torch.where(behind < 0, columns, start[:, None] + behind)[sequence, column]

    def spread(values: Tensor, fill: int) -> Tensor:
        out = torch.full((trees, width), fill, dtype=torch.int64, device=device)
        out[row[sequence], target] = values
        return out

    in_prompt = behind[sequence, column] < 0
    return _Layout(
        tokens=spread(part.tokens[sequence, column], 0),
        position_ids=spread(column, 0),
        branches=spread(torch.where(in_prompt, 0, sequence % traces + 1), -1),
        row=row,
        prompt_end=part.prompt_lengths - 1,
        branch_start=start,
    )


def micro_batch(
    grid: SequenceGrid,
    index: Tensor,
    *,
    temperature: float,
    pad_multiple: int = 1,
    at_least: int = 0,
    traces_per_tree: int = 0,
) -> MicroBatch:
    """The sequences `index` as one forward.

    temperature: of the sampler; sampled tokens are scored at it, all others at 1. pad_multiple: the width is
    rounded up to it (tensor-parallel size under sequence parallelism). at_least: room for this many tokens a
    row. traces_per_tree: K to feed the prompt of K neighbouring sequences once, 0 for a row per sequence.
    """
    part = grid.rows(index)

    def padded(width: int) -> int:
        return -(-max(width, at_least) // pad_multiple) * pad_multiple

    if traces_per_tree:
        place = _as_trees(part, traces_per_tree, padded)
    else:
        place = _as_rows(part, padded(part.tokens.size(1) - 1))
    b = len(place.tokens)
    sequence, column = part.kind.nonzero(as_tuple=True)  # [n]
    ended = part.eos_ended.nonzero()[:, 0]  # [e]
    sequence = torch.cat([sequence, ended])
    # The position that predicts: one before the token; for an end token, the last of prompt and trace.
    source = torch.cat([column, (part.prompt_lengths + part.trace_lengths)[ended]]) - 1
    behind = source - part.prompt_lengths[sequence]
    source = torch.where(behind < 0, place.prompt_end[sequence], place.branch_start[sequence] + behind)

    def flat(at_tokens: Tensor, at_eos: Tensor) -> Tensor:
        return torch.cat([at_tokens[sequence[: len(column)], column], at_eos[ended].to(at_tokens.dtype)])

    kind = flat(part.kind, torch.full_like(part.lengths, TRACE))
    return MicroBatch(
        tokens=place.tokens,
        position_ids=place.position_ids,
        branches=place.branches,
        sources=source * b + place.row[sequence],
        targets=flat(part.tokens, part.eos_ids),
        scale=torch.where(kind == TRACE, 1.0 / temperature, 1.0),
        kind=kind,
        old_log_probs=flat(part.old_log_probs, part.eos_log_probs),
        advantages=part.advantages[sequence],
        token_signal=flat(part.token_signal, torch.zeros_like(part.eos_log_probs)),
        sequence=sequence,
        num_sequences=len(part),
        num_tokens=int((place.branches >= 0).sum()) if traces_per_tree else int((part.lengths - 1).sum()),
    )


def micro_batches(
    grid: SequenceGrid,
    index: Tensor,
    size: int,
    *,
    temperature: float,
    pad_multiple: int = 1,
    same_width: bool = False,
    traces_per_tree: int = 0,
) -> list[MicroBatch]:
    """`index` in micro-batches of `size` sequences, neighbours in length together so that little is padded.

    same_width: all are as wide as the widest, for schedules that exchange tensors of one shape.
    traces_per_tree: K to pack the K sequences of a prompt, which are neighbours in `index`; 0: no packing.
    """
    unit = traces_per_tree or 1
    groups = index.view(-1, unit)
    # A packed row is as long as its prompt and all continuations.
    length = grid.lengths[groups].sum(1) - (unit - 1) * grid.prompt_lengths[groups[:, 0]]
    by_length = groups[length.argsort(stable=True, descending=True)]

    def cut(at_least: int) -> list[MicroBatch]:
        options = dict(temperature=temperature, pad_multiple=pad_multiple, traces_per_tree=traces_per_tree)
        return [
            micro_batch(grid, part.flatten(), at_least=at_least, **options) for part in by_length.split(size // unit)
        ]

    return cut(int(length.max()) - 1 if same_width else 0)
