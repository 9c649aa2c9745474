"""Rollout on Megatron's own model: K traces per prompt, and the answers scored on the traces' own cache.

The prompt is prefilled once per group and its cache spread over the K traces. When traces end, marker and
answer are teacher-forced on what their cache already holds, so that c_i cost one short forward and b_i one
more on the prompt's cache; then the ended rows leave the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from nrt_megatron.data.batch import pad
from nrt_megatron.data.traces import EOS, LENGTH, MARKER, Generated, Request
from nrt_megatron.mcore.kv_cache import KVCache, inference_mode
from nrt_megatron.mcore.model import PolicyModel
from nrt_megatron.mcore.place import Place
from nrt_megatron.mcore.sampling import any_kernel, draw, uniforms
from nrt_megatron.recipe import Generation

COMPACT_SHARE = 0.25
"""Ended rows leave the batch when they are this share of it: each departure costs a copy of the cache."""


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

        At most `max_batch_size` traces share a forward. Where there are more, as many batches as there are
        pipeline stages take turns, so that a stage works on one while the others have the next. A batch is never
        cut for that: decoding is bound by reading the weights, and each part would read them again.
        """
        groups = max(1, self.cfg.max_batch_size // request.num_generations)
        lengths = torch.tensor([len(p) for p in request.prompts])
        # Prompts of similar length together: columns are shared, so a short prompt is padded to the longest.
        order = lengths.argsort(stable=True)
        done: list[Generated] = []
        with inference_mode(self.chunks, self.cfg.fp8):
            parts = order.split(groups)
            for first in range(0, len(parts), self.batches_in_flight):
                wave = parts[first : first + self.batches_in_flight]
                batches = [_Batch(self, request.subset(part.tolist())) for part in wave]
                _take_turns([batch.decode() for batch in batches])
                done += [batch.collect() for batch in batches]
        return Generated.concatenate(done, order.argsort())


def _take_turns(decoders: list[Iterator[None]]) -> None:
    """Advances each decoder by one forward in turn until all have ended; every rank in the same order."""
    while decoders:
        decoders = [decoder for decoder in decoders if next(decoder, _ENDED) is not _ENDED]


_ENDED = object()


class _Batch:
    """The decoding of one batch of groups that share a cache."""

    def __init__(self, owner: MegatronGenerator, request: Request):
        self.owner, self.request = owner, request
        device = owner.place.device
        self.K, self.G = request.num_generations, len(request.prompts)
        self.rows = self.G * self.K
        self.limit, self.M = request.max_new_tokens, len(owner.marker)
        prompts, lengths = pad(request.prompts, left=True)
        self.prompts, self.prompt_lengths = prompts.to(device), lengths.to(device)  # [G, P], [G]
        scoring = request.answers is not None
        answers, answer_lengths = pad(request.answers if scoring else [()] * self.G)
        self.answers, self.answer_lengths = answers.to(device), answer_lengths.to(device)  # [G, A], [G]
        self.A = self.answers.size(1)
        columns = self.prompts.size(1) + self.limit + 1 + self.M + self.A
        self.cache = KVCache(owner.chunks, self.rows, columns, owner.cfg.max_tokens_per_forward)

        def empty(*shape, fill=0.0, dtype=torch.float32):
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.ids = empty(self.rows, self.limit + self.M, fill=-1, dtype=torch.int64)
        self.log_probs, self.entropies = empty(*self.ids.shape), empty(*self.ids.shape)
        self.finish = empty(self.rows, fill=-1, dtype=torch.int64)
        self.drawn = empty(self.rows, fill=0, dtype=torch.int64)
        """Tokens drawn per row, marker and end token included."""
        self.marker_log_probs = empty(self.rows, self.M)
        self.answer_log_probs = empty(self.rows, self.A)
        self.baseline = empty(self.G, self.A)
        self.scored_tokens = empty(self.rows, fill=0, dtype=torch.int64)
        self.scored_baseline_tokens = empty(self.G, fill=0, dtype=torch.int64)
        self.scoring_seconds = 0.0
        self.draws_here = owner.place.rank == owner.place.sampling_rank
        greedy = owner.cfg.temperature == 0 or request.greedy
        self.uniform = None
        if self.draws_here and not greedy:
            self.uniform = uniforms(owner.seed, request.step, request.indices, self.K, self.ids.size(1)).flatten(0, 1)
            self.uniform = self.uniform.to(device)  # [G * K, T]

    def decode(self) -> Iterator[None]:
        """Runs the batch, pausing after each forward: its results are not needed before the next turn."""
        logits = self._prefill()
        yield
        active = torch.arange(self.rows, device=self.finish.device)  # cache row -> trace
        for step in range(self.limit + self.M):
            tokens = self._draw(logits, active, step)
            self._finish(tokens, active, step)
            ended = self.finish[active] >= 0
            num_ended = int(ended.sum())
            if num_ended == len(active) or num_ended >= COMPACT_SHARE * len(active):
                order = torch.cat([(~ended).nonzero()[:, 0], ended.nonzero()[:, 0]])
                self.cache.select(order)
                active, tokens = active[order], tokens[order]
                left = len(active) - num_ended
                self._score(active[left:], first_row=left)
                active, tokens = active[:left], tokens[:left]
            if not len(active):
                break
            group = active // self.K
            logits = self.cache.forward(tokens[:, None], (self.prompt_lengths[group] + step)[:, None], None)
            yield

    def _prefill(self) -> Tensor | None:
        """Feeds each prompt once, scores the baseline on it, and spreads its cache over the group."""
        width = self.prompts.size(1)
        columns = torch.arange(width, device=self.prompts.device)
        positions = columns - (width - self.prompt_lengths)[:, None]  # [G, P]
        padded = bool((self.prompt_lengths < width).any())
        logits = self.cache.forward(self.prompts, positions.clamp(min=0), positions >= 0 if padded else None)
        spread = torch.arange(self.rows, device=self.prompts.device) // self.K
        if self.A and self.request.baseline:
            self._score_baseline()
        self.cache.select(spread)
        return None if logits is None else logits[spread]

    def _draw(self, logits: Tensor | None, active: Tensor, step: int) -> Tensor:
        """One token per active row, drawn on one rank of the replica and told to the others."""
        tokens = torch.empty(len(active), dtype=torch.int64, device=active.device)
        if self.draws_here:
            logits, cfg = logits[:, : self.owner.vocab_size], self.owner.cfg
            uniform = None if self.uniform is None else self.uniform[active, step]
            drawn = draw(
                logits, uniform, self.owner.marker[0], temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p
            )
            tokens = drawn.tokens
            # Rows that ended earlier and have not left yet are computed and ignored.
            running = self.finish[active] < 0
            self._record(self.log_probs, active, step, running, drawn.log_probs)
            self._record(self.entropies, active, step, running, drawn.entropies)
            if step <= self.limit:
                # If the trace ends here without the marker, this is the forced marker's first log-prob.
                self._record(self.marker_log_probs, active, 0, running, drawn.watched)
        place = self.owner.place
        if place.tp_size * place.pp_size > 1:
            dist.broadcast(tokens, place.sampling_rank, group=place.groups.mp)
        return tokens

    @staticmethod
    def _record(table: Tensor, rows: Tensor, column: int, running: Tensor, values: Tensor) -> None:
        """table[rows, column] = values where `running`; no boolean index, which would wait for the GPU."""
        with any_kernel():
            table[rows, column] = torch.where(running, values.to(table.dtype), table[rows, column])

    def _finish(self, tokens: Tensor, active: Tensor, step: int) -> None:
        """Records the tokens of running rows and marks those that end: marker, end token or limit."""
        running = self.finish[active] < 0
        self._record(self.ids, active, step, running, tokens)
        with any_kernel():
            self.drawn[active] += running
        ends = torch.full_like(active, -1)
        if step + 1 >= self.M:
            tail = self.ids[active, step + 1 - self.M : step + 1]  # [n, M]
            ends = torch.where((tail == self.owner.marker).all(-1), MARKER, ends)
        ends = torch.where((ends < 0) & torch.isin(tokens, self.owner.stop), EOS, ends)
        if step + 1 > self.limit:
            # A trace of `limit` tokens may still be closed by the marker, but not go on.
            ends = torch.where((ends < 0) & ~self._tail_opens_marker(active, step), LENGTH, ends)
        with any_kernel():
            self.finish[active] = torch.where(running, ends, self.finish[active])

    def _tail_opens_marker(self, rows: Tensor, step: int) -> Tensor:
        """Whether what lies beyond the limit is, so far, the beginning of the marker; bool [n]."""
        beyond = step + 1 - self.limit
        if beyond >= self.M:
            return torch.zeros_like(rows, dtype=torch.bool)
        return (self.ids[rows, self.limit : step + 1] == self.owner.marker[:beyond]).all(-1)

    def trace_lengths(self, rows: Tensor) -> Tensor:
        """Tokens of each trace: without marker, end token and what was drawn beyond the limit; int64 [n]."""
        drawn, finish = self.drawn[rows], self.finish[rows]
        without = torch.where(finish == MARKER, self.M, (finish == EOS).long())
        return (drawn - without).clamp(max=self.limit)

    def _score(self, rows: Tensor, first_row: int) -> None:
        """Teacher-forces marker and answer of the ended traces `rows`, which lie at first_row.. of the cache."""
        if not self.A:
            return
        group, z = rows // self.K, self.trace_lengths(rows)
        produced = self.finish[rows] == MARKER
        # What the cache lacks: the marker's last token if it was drawn, else the whole marker. A trace cut at
        # its limit also had a token drawn beyond it; that draw and its stale columns are dropped.
        fed_marker = torch.where(produced, self.M - 1, 0)
        known = self.prompt_lengths[group] + z + fed_marker
        here = slice(first_row, first_row + len(rows))
        used = self.cache.length
        self.cache.exists[here, :used] &= self.cache.positions[here, :used] < known[:, None]
        self._score_block(rows, first_row, known, fed_marker, self.answers[group], self.answer_lengths[group])

    def _score_block(self, rows, first_row, known, fed_marker, answers, answer_lengths) -> None:
        n = len(known)
        started = self._clock()
        # [marker (right-aligned where its head is cached) | answer without its last token]
        tokens = torch.cat([self.owner.marker.expand(n, -1), answers[:, :-1]], dim=1)  # [n, M + A - 1]
        columns = torch.arange(tokens.size(1), device=tokens.device)
        offset = columns - fed_marker[:, None]  # distance from the first token that is new
        exists = (offset >= 0) & (columns < self.M - 1 + answer_lengths[:, None])
        targets = torch.cat([tokens[:, 1 : self.M], answers], dim=1)  # [n, M - 1 + A]: what each column predicts
        scored = self.cache.forward(
            tokens, (known[:, None] + offset).clamp(min=0), exists, first_row=first_row, targets=targets, keep=False
        )
        self.scoring_seconds += self._clock() - started
        if rows is None:
            self.scored_baseline_tokens = exists.sum(-1)
        else:
            self.scored_tokens[rows] = exists.sum(-1)
        if scored is None:
            return
        if rows is None:
            self.baseline = scored[:, self.M - 1 :]
        else:
            self.answer_log_probs[rows] = scored[:, self.M - 1 :]
            self.marker_log_probs[rows, 1:] = scored[:, : self.M - 1]

    @staticmethod
    def _clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def _score_baseline(self) -> None:
        """b_i: marker and answer straight after the prompt, once per group."""
        self._score_block(None, 0, self.prompt_lengths, torch.zeros_like(self.prompt_lengths), self.answers,
                          self.answer_lengths)  # fmt: skip

    def collect(self) -> Generated:
        """Shares the sampling rank's numbers with its replica and shapes everything by group."""
        rows = torch.arange(self.rows, device=self.finish.device)
        place = self.owner.place
        floats = [self.log_probs, self.entropies, self.marker_log_probs, self.answer_log_probs, self.baseline]
        if place.tp_size * place.pp_size > 1:
            flat = torch.cat([f.flatten() for f in floats])
            dist.broadcast(flat, place.sampling_rank, group=place.groups.mp)
            floats = [part.view_as(f) for f, part in zip(floats, flat.split([f.numel() for f in floats]))]
        log_probs, entropies, marker, answer, baseline = floats
        by_group = (self.G, self.K, -1)
        traces, z = self.ids, self.trace_lengths(rows)
        produced = self.finish == MARKER
        columns = torch.arange(self.ids.size(1), device=rows.device)
        # The log-probs of a marker that was drawn are the sampler's.
        drawn_marker = log_probs.gather(1, (z[:, None] + columns[: self.M]).clamp(max=self.ids.size(1) - 1))
        marker = torch.where(produced[:, None], drawn_marker, marker)
        answered = torch.arange(self.A, device=rows.device) < self.answer_lengths[:, None]  # [G, A]
        answer = torch.where(answered.repeat_interleave(self.K, dim=0), answer, 0.0)
        last = (self.drawn - 1).clamp(min=0)[:, None]
        return Generated(
            trace_ids=torch.where(columns < z[:, None], traces, -1)[:, : self.limit].view(by_group),
            trace_log_probs=torch.where(columns < z[:, None], log_probs, 0.0)[:, : self.limit].view(by_group),
            trace_entropies=torch.where(columns < z[:, None], entropies, 0.0)[:, : self.limit].view(by_group),
            trace_lengths=z.view(self.G, self.K),
            finish=self.finish.view(self.G, self.K),
            stop_ids=self.ids.gather(1, last).view(self.G, self.K),
            stop_log_probs=log_probs.gather(1, last).view(self.G, self.K),
            marker_log_probs=marker.view(by_group),
            answer_log_probs=answer.view(by_group),
            baseline_log_probs=torch.where(answered, baseline, 0.0),
            sampled_tokens=self.drawn.view(self.G, self.K).sum(-1),
            scored_tokens=self.scored_tokens.view(self.G, self.K).sum(-1) + self.scored_baseline_tokens,
            scoring_seconds=self.scoring_seconds,
        )
