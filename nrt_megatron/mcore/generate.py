"""Rollout on Megatron's own model: K traces per prompt, and the answers scored on the traces' own cache.

The prompt is prefilled once per group and its cache spread over the K traces. When traces end, marker and
answer are teacher-forced on what their cache already holds, so that c_i cost one short forward and b_i one
more on the prompt's cache; then the ended rows leave the batch, and prompts that wait take their place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nrt_megatron.data.traces import MARKER, Generated, Request
from nrt_megatron.mcore.cache_shapes import Share, cache_shapes
from nrt_megatron.mcore.kv_cache import KVCache, inference_mode
from nrt_megatron.mcore.model import PolicyModel
from nrt_megatron.mcore.place import Place
from nrt_megatron.mcore.sampling import draw, uniforms
from nrt_megatron.mcore.trace_table import TraceTable
from nrt_megatron.recipe import Generation

LEAVING_SHARE = 0.125
"""Ended rows leave the batch when they are this share of it: each departure costs a forward and a copy of rows."""


class MegatronGenerator:
    """Implements `data.traces.Generator` on model chunks of any tensor and pipeline layout."""

    def __init__(self, place: Place, chunks: list[PolicyModel], cfg: Generation, *, marker_ids: tuple[int, ...],
                 stop_ids: tuple[int, ...], vocab_size: int, seed: int):  # fmt: skip
        self.place, self.chunks, self.cfg, self.seed = place, chunks, cfg, seed
        self.marker = torch.tensor(marker_ids, device=place.device)
        self.stop = torch.tensor(sorted(set(stop_ids) - set(marker_ids)), dtype=torch.int64, device=place.device)
        self.vocab_size = vocab_size
        # With virtual stages a turn visits every stage several times, so turns would not overlap.
        self.batches_in_flight = place.pp_size if len(chunks) == 1 else 1

    def generate(self, request: Request) -> Generated:
        """Traces for every prompt of the request, in its order; the same on all ranks of a model replica.

        At most `max_batch_size` traces share a forward, and at most `max_cache_tokens` rows times columns a cache.
        Where there are more traces, as many batches as there are pipeline stages take turns, so that a stage works on
        one while the others have the next. A batch is never cut for that: decoding is bound by reading the weights,
        and each part would read them again.
        """
        table = TraceTable(request, self.marker, self.stop)
        uniform = self._uniforms(request, table)
        shares = cache_shapes(
            [len(prompt) for prompt in request.prompts],
            [len(answer) for answer in request.answers or [()] * table.G],
            more_columns=table.limit + 1 + table.M,
            num_generations=table.K,
            max_rows=self.cfg.max_batch_size,
            max_tokens=self.cfg.max_cache_tokens,
        )
        with inference_mode(self.chunks, self.cfg.fp8):
            for share in shares:
                waiting = deque(share.prompts)
                caches = min(self.batches_in_flight, -(-len(waiting) // share.at_once))
                _take_turns([_Batch(self, request, table, uniform, share, waiting).decode() for _ in range(caches)])
        return table.collect(self.place)

    @property
    def draws_here(self) -> bool:
        """One rank of a replica draws for all of them."""
        return self.place.rank == self.place.sampling_rank

    def _uniforms(self, request: Request, table: TraceTable) -> Tensor | None:
        """Random numbers of every trace and token, [G * K, T]; None where none are drawn."""
        if not self.draws_here or self.cfg.temperature == 0 or request.greedy:
            return None
        numbers = uniforms(self.seed, request.step, request.indices, table.K, table.ids.size(1))
        return numbers.flatten(0, 1).to(self.place.device)


def _take_turns(batches: list[Iterator[None]]) -> None:
    """Advances each batch by one forward in turn until all have ended; every rank in the same order."""
    while batches:
        batches = [batch for batch in batches if next(batch, _ENDED) is not _ENDED]


_ENDED = object()


@dataclass(frozen=True)
class _Told:
    """One token per row on its way from the rank that draws."""

    tokens: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tokens


class _Batch:
    """What is decoded together on one cache, with prompts coming from the queue `waiting` while there are some."""

    def __init__(self, owner: MegatronGenerator, request: Request, table: TraceTable, uniform: Tensor | None,
                 share: Share, waiting: deque[int]):  # fmt: skip
        self.owner, self.request, self.table, self.uniform = owner, request, table, uniform
        self.waiting, self.at_once, self.device = waiting, min(share.at_once, len(share.prompts)), owner.place.device
        self.cache = KVCache(owner.chunks, self.at_once * table.K, share.columns, owner.cfg.max_tokens_per_forward)
        answers = [len(request.answers[p]) for p in share.prompts] if request.answers else [0]
        self.tail = table.M + max(answers)
        """Columns that scoring needs behind those in use."""
        self.traces = self.tokens = self.positions = torch.empty(0, dtype=torch.int64, device=self.device)
        """Of each row of the cache in use: its trace's row of the table, the token to feed next, and its position."""

    def decode(self) -> Iterator[None]:
        """Decodes until nothing waits or runs. Pauses after each forward: on its turn another batch's forward keeps
        this stage busy, while the last stage draws and tells the tokens that the next one here needs.
        """
        while self._leave() or self.waiting:
            if prompts := self._admitted():
                yield from self._begin(prompts)
                continue
            if self._is_full():
                self.cache.drop_unused_columns(len(self.traces))
            logits = self.cache.forward(self.tokens[:, None], self.positions[:, None], None)
            self.positions = self.positions + 1
            told = self._draw(logits, self.traces)
            yield
            self.tokens = told.wait()
            self.table.append(self.traces, self.tokens)

    def _begin(self, prompts: list[int]) -> Iterator[None]:
        """Prefills prompts behind the rows in use, and draws the first token of their traces."""
        rows, each = torch.tensor(prompts, device=self.device), torch.arange(self.table.K, device=self.device)
        traces = (rows[:, None] * self.table.K + each).flatten()
        told = self._draw(self._prefill(prompts, first_row=len(self.traces)), traces)
        yield
        self.traces, self.tokens = torch.cat([self.traces, traces]), torch.cat([self.tokens, told.wait()])
        self.positions = torch.cat([self.positions, self.table.prompt_lengths[traces // self.table.K]])
        self.table.append(traces, told.tokens)

    def _is_full(self) -> bool:
        return self.cache.length + 1 + self.tail > self.cache.columns

    def _admitted(self) -> list[int]:
        """Prompts that come now: as many as wait and there is room for."""
        room = self.at_once - -(-len(self.traces) // self.table.K)
        return [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]

    def _leave(self) -> int:
        """Ended rows change places with running ones behind them, are scored there, and are let go; rows left."""
        n = len(self.traces)
        ended = self.table.finish[self.traces] >= 0
        num_ended = int(ended.sum()) if n else 0
        if not num_ended or (num_ended < n and num_ended < LEAVING_SHARE * n and not self._is_full()):
            return n
        left = n - num_ended
        gaps, movers = ended[:left].nonzero()[:, 0], left + (~ended[left:]).nonzero()[:, 0]
        order = torch.arange(n, device=self.device)
        order[gaps], order[movers] = movers, gaps
        changed = torch.cat([gaps, movers])
        self.cache.copy_rows(order[changed], changed)
        if self.table.A:
            self._score(self.traces[order[left:]], first_row=left)
        self.traces, self.tokens, self.positions = (x[order[:left]] for x in (self.traces, self.tokens, self.positions))
        return left

    def _prefill(self, prompts: list[int], first_row: int) -> Tensor | None:
        """Feeds each prompt once, scores the baseline on it, and spreads its cache over its traces; their logits."""
        width = max(len(self.request.prompts[p]) for p in prompts)
        rows = torch.tensor(prompts, device=self.device)
        lengths = self.table.prompt_lengths[rows]
        logits = self.cache.prefill(self.table.prompts[rows, -width:], lengths, first_row)
        if self.table.A and self.request.baseline:
            scored, exists = self._score_block(prompts, first_row, lengths, torch.zeros_like(lengths))
            self.table.scored_baseline_tokens[rows] = exists.sum(-1)
            if scored is not None:
                answers = scored[:, self.table.M - 1 :]
                self.table.baseline[rows, : answers.size(1)] = answers
        spread = torch.arange(len(prompts), device=self.device).repeat_interleave(self.table.K)
        self.cache.copy_rows(first_row + spread, first_row + torch.arange(len(spread), device=self.device))
        return None if logits is None else logits[spread]

    def _draw(self, logits: Tensor | None, traces: Tensor) -> _Told:
        """One token per trace, drawn on one rank of the replica and on its way to the others."""
        owner, cfg, place = self.owner, self.owner.cfg, self.owner.place
        tokens = torch.empty(len(traces), dtype=torch.int64, device=self.device)
        if owner.draws_here:
            uniform = None
            if self.uniform is not None:
                column = self.table.drawn[traces].clamp(max=self.uniform.size(1) - 1)
                uniform = self.uniform[traces, column]
            drawn = draw(
                logits[:, : owner.vocab_size],
                uniform,
                owner.marker[0],
                temperature=cfg.temperature,
                top_k=cfg.top_k,
                top_p=cfg.top_p,
            )
            tokens = drawn.tokens
            self.table.record(traces, drawn)
        if place.tp_size * place.pp_size == 1:
            return _Told(tokens, None)
        return _Told(tokens, dist.broadcast(tokens, place.sampling_rank, group=place.groups.mp, async_op=True))

    def _score(self, traces: Tensor, first_row: int) -> None:
        """Teacher-forces marker and answer of the ended `traces`, which lie at first_row.. of the cache."""
        table = self.table
        group, z = traces // table.K, table.trace_lengths(traces)
        # What the cache lacks: the marker's last token if it was drawn, else the whole marker. A trace cut at
        # its limit also had a token drawn beyond it; that draw and its stale columns are dropped.
        fed_marker = torch.where(table.finish[traces] == MARKER, table.M - 1, 0)
        known = table.prompt_lengths[group] + z + fed_marker
        here, used = slice(first_row, first_row + len(traces)), self.cache.length
        self.cache.exists[here, :used] &= self.cache.positions[here, :used] < known[:, None]
        scored, exists = self._score_block(group.tolist(), first_row, known, fed_marker)
        table.scored_tokens[traces] = exists.sum(-1)
        if scored is not None:
            marker, answers = scored.tensor_split([table.M - 1], dim=1)
            table.answer_log_probs[traces, : answers.size(1)] = answers
            table.marker_log_probs[traces, 1:] = marker

    def _score_block(
        self, prompts: list[int], first_row: int, known: Tensor, fed_marker: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Log-probs float32 [n, M - 1 + A'] of marker (its first token excluded) and answer of each row's prompt, A'
        being the longest of them, after `known` [n] tokens, `fed_marker` [n] of them the marker's; and bool [n, M - 1 +
        A'], which columns were fed.
        """
        table, n, started = self.table, len(prompts), self._clock()
        rows = torch.tensor(prompts, device=self.device)
        answers = table.answers[rows, : max(len(self.request.answers[p]) for p in prompts)]
        # [marker (right-aligned where its head is cached) | answer without its last token]
        tokens = torch.cat([table.marker.expand(n, -1), answers[:, :-1]], dim=1)  # [n, M + A' - 1]
        columns = torch.arange(tokens.size(1), device=self.device)
        offset = columns - fed_marker[:, None]  # distance from the first token that is new
        exists = (offset >= 0) & (columns < table.M - 1 + table.answer_lengths[rows, None])
        targets = torch.cat([tokens[:, 1 : table.M], answers], dim=1)  # what each column predicts
        positions = (known[:, None] + offset).clamp(min=0)
        scored = self.cache.forward(tokens, positions, exists, first_row=first_row, targets=targets, keep=False)
        table.scoring_seconds += self._clock() - started
        return scored, exists

    @staticmethod
    def _clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()
