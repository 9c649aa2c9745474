"""The traces of a request while they are drawn: tokens, log-probs, how each ended, and its answer's log-probs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nrt_megatron.data.batch import pad
from nrt_megatron.data.traces import EOS, LENGTH, MARKER, Generated, Request
from nrt_megatron.mcore.place import Place
from nrt_megatron.mcore.sampling import Draw, any_kernel


class TraceTable:
    """N = G * K traces of at most L tokens; row g * K + k is trace k of prompt g, wherever it is decoded.

    Every rank of a replica keeps the tokens; the log-probs are filled in on the one that draws, until `collect`.
    Nothing here waits for the GPU but `collect`.
    """

    def __init__(self, request: Request, marker: Tensor, stop: Tensor):
        """marker int64 [M], stop int64 [S]: ids that end a trace; both on the device of the tables."""
        device = marker.device
        self.marker, self.stop = marker, stop
        self.G, self.K, self.M, self.limit = (
            len(request.prompts),
            request.num_generations,
            len(marker),
            request.max_new_tokens,
        )
        prompts, lengths = pad(request.prompts, left=True)
        self.prompts, self.prompt_lengths = prompts.to(device), lengths.to(device)  # [G, P], [G]
        answers, lengths = pad(request.answers if request.answers is not None else [()] * self.G)
        self.answers, self.answer_lengths = answers.to(device), lengths.to(device)  # [G, A], [G]
        self.A = self.answers.size(1)

        def full(*shape, fill=0.0, dtype=torch.float32):
            return torch.full(shape, fill, dtype=dtype, device=device)

        rows = self.G * self.K
        self.ids = full(rows, self.limit + self.M, fill=-1, dtype=torch.int64)
        self.log_probs, self.entropies = full(*self.ids.shape), full(*self.ids.shape)
        self.finish = full(rows, fill=-1, dtype=torch.int64)
        self.drawn = full(rows, fill=0, dtype=torch.int64)
        """Tokens drawn per row, marker and end token included."""
        self.marker_log_probs = full(rows, self.M)
        self.answer_log_probs = full(rows, self.A)
        self.baseline = full(self.G, self.A)
        self.scored_tokens = full(rows, fill=0, dtype=torch.int64)
        self.scored_baseline_tokens = full(self.G, fill=0, dtype=torch.int64)
        self.scoring_seconds = 0.0

    def record(self, rows: Tensor, drawn: Draw) -> None:
        """Log-probs and entropies of one more token for each of `rows` [n], before it is appended; what was drawn for
        rows that have ended is ignored."""
        running = self.finish[rows] < 0
        self._put(self.log_probs, rows, running, drawn.log_probs)
        self._put(self.entropies, rows, running, drawn.entropies)
        # If the trace ends here without the marker, this is the forced marker's first log-prob.
        self._put(self.marker_log_probs[:, :1], rows, running & (self.drawn[rows] <= self.limit), drawn.watched)

    def append(self, rows: Tensor, tokens: Tensor) -> None:
        """Appends tokens [n] to the rows [n] that run, and marks those that end: marker, end token or limit."""
        running = self.finish[rows] < 0
        self._put(self.ids, rows, running, tokens)
        with any_kernel():
            self.drawn[rows] += running
        drawn = self.drawn[rows]
        columns = torch.arange(self.M, device=rows.device)
        tail = self.ids[rows[:, None], (drawn[:, None] - self.M + columns).clamp(min=0)]  # [n, M]
        ends = torch.where((tail == self.marker).all(-1) & (drawn >= self.M), MARKER, -1)
        ends = torch.where((ends < 0) & torch.isin(tokens, self.stop), EOS, ends)
        # A trace of `limit` tokens may still be closed by the marker, but not go on.
        beyond = drawn - self.limit
        opens_marker = ((self.ids[:, self.limit :][rows] == self.marker) | (columns >= beyond[:, None])).all(-1)
        ends = torch.where((ends < 0) & (beyond > 0) & ~(opens_marker & (beyond < self.M)), LENGTH, ends)
        with any_kernel():
            self.finish[rows] = torch.where(running, ends, self.finish[rows])

    def _put(self, table: Tensor, rows: Tensor, running: Tensor, values: Tensor) -> None:
        """Writes values [n] to the next column of the rows that run; no boolean index, which would wait for the GPU."""
        column = self.drawn[rows].clamp(max=table.size(1) - 1)
        with any_kernel():
            table[rows, column] = torch.where(running, values.to(table.dtype), table[rows, column])

    def trace_lengths(self, rows: Tensor) -> Tensor:
        """Tokens of each trace: without marker, end token and what was drawn beyond the limit; int64 [n]."""
        drawn, finish = self.drawn[rows], self.finish[rows]
        without = torch.where(finish == MARKER, self.M, (finish == EOS).long())
        return (drawn - without).clamp(max=self.limit)

    def collect(self, place: Place) -> Generated:
        """Shares the drawing rank's numbers with its replica and shapes everything by prompt."""
        rows = torch.arange(len(self.ids), device=self.ids.device)
        floats = [self.log_probs, self.entropies, self.marker_log_probs, self.answer_log_probs, self.baseline]
        if place.tp_size * place.pp_size > 1:
            flat = torch.cat([f.flatten() for f in floats])
            dist.broadcast(flat, place.sampling_rank, group=place.groups.mp)
            floats = [part.view_as(f) for f, part in zip(floats, flat.split([f.numel() for f in floats]))]
        log_probs, entropies, marker, answer, baseline = floats
        by_group = (self.G, self.K, -1)
        z, produced = self.trace_lengths(rows), self.finish == MARKER
        columns = torch.arange(self.ids.size(1), device=rows.device)
        # The log-probs of a marker that was drawn are the sampler's.
        drawn_marker = log_probs.gather(1, (z[:, None] + columns[: self.M]).clamp(max=self.ids.size(1) - 1))
        marker = torch.where(produced[:, None], drawn_marker, marker)
        answered = torch.arange(self.A, device=rows.device) < self.answer_lengths[:, None]  # [G, A]
        answer = torch.where(answered.repeat_interleave(self.K, dim=0), answer, 0.0)
        last = (self.drawn - 1).clamp(min=0)[:, None]
        return Generated(
            trace_ids=torch.where(columns < z[:, None], self.ids, -1)[:, : self.limit].view(by_group),
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
