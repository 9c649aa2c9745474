"""A forward through the whole pipeline on Megatron's static KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from nrt_megatron.mcore.attention import additive, hidden_columns, whole_sequences, window_of
from nrt_megatron.mcore.model import PolicyModel, ScoredTokens
from nrt_megatron.mcore.precision import rollout_precision, set_sequence_parallel


@contextlib.contextmanager
def inference_mode(chunks: list[PolicyModel], fp8: str = "same") -> Iterator[None]:
    """Evaluation mode without gradients, FP8 as a recipe's `policy.generation.fp8` says; sequence and context
    parallelism are off, since one token cannot be split."""
    sequence_parallel = chunks[0].config.sequence_parallel
    for chunk in chunks:
        chunk.eval()
        if sequence_parallel:
            set_sequence_parallel(chunk, False)
    try:
        with torch.no_grad(), rollout_precision(chunks, fp8), contextlib.ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(whole_sequences(chunk))
            yield
    finally:
        for chunk in chunks:
            chunk.train()
            if sequence_parallel:
                set_sequence_parallel(chunk, True)


class KVCache:
    """The cached prefix of n rows, and which of its columns each row may look at.

    Rows share their columns (Megatron's static context has one length for the batch) but not their
    positions: a short prompt is padded on the left, one that comes later begins further right, a dropped token leaves
    a hole. `positions` and `exists` say, for each row and column, the token's position in its own sequence and whether
    there is one.
    """

    def __init__(self, chunks: list[PolicyModel], max_rows: int, max_columns: int, max_tokens_per_forward: int):
        self.chunks, self.columns = chunks, max_columns
        self.context = StaticInferenceContext(max_rows, max_columns)
        self.max_tokens_per_forward = max_tokens_per_forward
        device = torch.device(torch.cuda.current_device())
        self.positions = torch.zeros(max_rows, max_columns, dtype=torch.int64, device=device)
        self.exists = torch.zeros(max_rows, max_columns, dtype=torch.bool, device=device)
        self.length = 0
        """Columns in use."""
        self._ragged = False

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        exists: Tensor | None,
        *,
        first_row: int = 0,
        targets: Tensor | None = None,
        keep: bool = True,
    ) -> Tensor | None:
        """Feeds tokens int64 [n, s] at `positions` [n, s] to rows first_row.. and appends them to the cache.

        exists bool [n, s]: False for padding; None: all real. keep=False leaves the cache's length as it was
        (its further columns are overwritten by the next call). Rows go through the model in slices of at most
        `max_tokens_per_forward` tokens. Returns on the last stage, None elsewhere: with `targets` int64 [n, s], the
        log-prob float32 [n, s] of each target where its column predicts; else logits [n, padded vocab] of the last
        column.
        """
        n, s = tokens.shape
        assert self.length + s <= self.columns, "more columns than the cache has"
        self._ragged = self._ragged or (keep and exists is not None)
        outputs = []
        for first in range(0, n, max(1, self.max_tokens_per_forward // s)):
            part = slice(first, first + max(1, self.max_tokens_per_forward // s))
            outputs.append(
                self._slice(
                    tokens[part],
                    positions[part],
                    None if exists is None else exists[part],
                    first_row + first,
                    None if targets is None else targets[part],
                )
            )
        if keep:
            self.length += s
        return None if outputs[0] is None else torch.cat(outputs)

    def prefill(self, prompts: Tensor, lengths: Tensor, first_row: int) -> Tensor | None:
        """Feeds prompts int64 [n, s], padded on the left to s, of `lengths` [n] to rows first_row.., ending in the
        last column in use; with first_row 0 the cache is emptied first. Returns what `forward` does.
        """
        n, s = prompts.shape
        offset = torch.arange(s, device=prompts.device) - (s - lengths)[:, None]  # [n, s], negative where padded
        end = max(self.length, s) if first_row else s
        # What was scored behind the columns in use is none of the rows' own.
        self.exists[:first_row, self.length : end] = False
        self.exists[first_row : first_row + n] = False
        self.length, self._ragged = end - s, first_row > 0
        padded = bool((lengths < s).any())
        return self.forward(prompts, offset.clamp(min=0), offset >= 0 if padded else None, first_row=first_row)

    def _slice(
        self, tokens: Tensor, positions: Tensor, exists: Tensor | None, first_row: int, targets: Tensor | None
    ) -> Tensor | None:
        n, s = tokens.shape
        start, end, rows = self.length, self.length + s, slice(first_row, first_row + n)
        self.positions[rows, start:end] = positions
        self.exists[rows, start:end] = True if exists is None else exists
        self.context.sequence_len_offset, self.context.batch_size_offset = start, first_row
        ragged = self._ragged or exists is not None
        config = self.chunks[0].config
        window = window_of(config)
        mask = None
        if ragged or window or (start > 0 and s > 1):
            hidden = hidden_columns(positions, self.positions[rows, :end], self.exists[rows, :end], window)
            mask = additive(hidden, config.params_dtype)
        labels = None if targets is None else _every_column(targets)
        output = self._through_pipeline(tokens, positions, mask, labels, shared_rows=not ragged)
        return output if output is None or targets is None else output[0].view(n, s)

    def _through_pipeline(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, labels: ScoredTokens | None, shared_rows: bool
    ) -> Tensor | None:
        n, s = tokens.shape
        output, stages = None, self.chunks[0].pg_collection.pp
        # Around the ring: with virtual stages the last rank's first chunk is followed by the first rank's second.
        before, behind = (stages.rank() - 1) % stages.size(), (stages.rank() + 1) % stages.size()
        for chunk in self.chunks:
            first, last = chunk.pre_process, chunk.post_process
            if not first:
                received = torch.empty(s, n, chunk.config.hidden_size, dtype=chunk.config.params_dtype,
                                       device=tokens.device)  # fmt: skip
                dist.recv(received, group=stages, group_src=before)
                chunk.set_input_tensor(received)
            output = chunk(
                tokens,
                positions,
                mask,
                labels=labels,
                shared_rows=shared_rows,
                inference_context=self.context,
                runtime_gather_output=True,
            )
            if not last:
                dist.send(output.contiguous(), group=stages, group_dst=behind)
                output = None
        return output if output is None or labels is not None else output[:, -1]

    def copy_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Row targets[i] becomes what row sources[i] was, int64 [n] both; of rows on both sides, all are read first."""
        used = self.length
        for keys, values in self.context.key_value_memory_dict.values():
            keys[:used, targets] = keys[:used, sources]
            values[:used, targets] = values[:used, sources]
        self.positions[targets] = self.positions[sources]
        self.exists[targets] = self.exists[sources]

    def drop_unused_columns(self, rows: int) -> None:
        """Moves the first `rows` rows to the left by the columns that none of them uses. Waits for the GPU."""
        in_use = self.exists[:rows, : self.length].any(dim=0)
        unused = int(in_use.int().argmax())
        left = self.length - unused
        for keys, values in self.context.key_value_memory_dict.values():
            for kept in (keys, values):
                kept[:left, :rows] = kept[unused : self.length, :rows].clone()  # the two may overlap
        self.positions[:rows, :left] = self.positions[:rows, unused : self.length].clone()
        self.exists[:rows, :left] = self.exists[:rows, unused : self.length].clone()
        self.length = left


def _every_column(targets: Tensor) -> ScoredTokens:
    """Scores targets [n, s], each from the hidden state of its own column."""
    n, s = targets.shape
    rows, columns = torch.arange(n, device=targets.device), torch.arange(s, device=targets.device)
    sources = columns * n + rows[:, None]  # [n, s]
    return ScoredTokens(sources.flatten(), targets.flatten(), torch.ones(n * s, device=targets.device))
