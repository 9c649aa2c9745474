"""Rollout and scoring: lengths, the batch that is decoded together, its memory and its seconds.

Mirrors `mcore/generate.py`: a rank decodes its prompts in batches on a static KV cache, every pipeline stage in turn,
one token a step; marker and answer are then fed to what the cache holds, and prompts that wait take the place of traces
that ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nrt_megatron.mcore.sampling import ROWS_AT_ONCE
from nrt_megatron.plan.costs import Costs, Pass
from nrt_megatron.plan.layout import Stage
from nrt_megatron.plan.parameters import vocab_matrix
from nrt_megatron.recipe import Recipe, num_traces_per_prompt, rollout_megatron

MARKER = 1
"""Tokens of the end-of-trace marker."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sequence: prompt, trace, and answer with its end token."""

    prompt: float
    trace: float
    answer: float

    @property
    def total(self) -> float:
        return self.prompt + self.trace + MARKER + self.answer

    @property
    def columns(self) -> float:
        """Of a cache for it: one token is drawn beyond the limit."""
        return self.total + 1

    @classmethod
    def limits(cls, recipe: Recipe) -> Lengths:
        """The longest of each that a batch may hold; not all in one sequence."""
        trace = 0 if recipe.nrt.reward_scheme == "sft" else recipe.policy.generation.max_new_tokens
        room = recipe.policy.max_total_sequence_length - trace - MARKER
        prompt, answer = recipe.data.max_prompt_tokens, recipe.data.max_answer_tokens
        return cls(min(prompt or room, room - 2), trace, min(answer or room, room - 1))

    @classmethod
    def typical(cls, recipe: Recipe, prompt: float, trace: float | None, answer: float) -> Lengths:
        """Averages within the limits; `trace` None: every trace runs to its limit."""
        most = cls.limits(recipe)
        wanted = cls(
            min(prompt, most.prompt),
            most.trace if trace is None else min(trace, most.trace),
            min(answer, most.answer),
        )
        over = wanted.total / recipe.policy.max_total_sequence_length
        if over <= 1:
            return wanted
        room = recipe.policy.max_total_sequence_length - wanted.trace - MARKER
        share = room / (wanted.prompt + wanted.answer)
        return cls(wanted.prompt * share, wanted.trace, wanted.answer * share)


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts of one replica that are decoded together, with their traces."""

    prompts: int
    traces: int
    """Of each prompt."""
    lengths: Lengths
    in_flight: int = 1
    """Such batches that take turns on the pipeline's stages, each with a cache."""
    max_tokens_per_forward: float = float("inf")
    max_cache_tokens: float = float("inf")
    most_prompts: int = 0
    """That a batch of short ones may hold."""
    fp8: bool = False
    """Layers that train in FP8 sample in it as well."""

    @classmethod
    def of(cls, recipe: Recipe, prompts_of_rank: int, lengths: Lengths) -> RolloutBatch:
        generation, megatron = recipe.policy.generation, rollout_megatron(recipe.policy)
        traces, tokens = num_traces_per_prompt(recipe), generation.max_cache_tokens or float("inf")
        most = min(max(1, generation.max_batch_size // traces), prompts_of_rank)
        prompts = int(min(most, max(1, tokens / (lengths.columns * traces))))
        turns = megatron.pipeline_model_parallel_size if megatron.virtual_pipeline_model_parallel_size is None else 1
        return cls(
            prompts,
            traces,
            lengths,
            min(turns, -(-prompts_of_rank // prompts)),
            generation.max_tokens_per_forward,
            tokens,
            most,
            generation.fp8 == "same",
        )

    @property
    def rows(self) -> int:
        return self.prompts * self.traces

    def cache_bytes(self, costs: Costs, stage: Stage) -> float:
        """Keys and values of the stage's layers for every row and column of the batches in flight, the largest that
        prompts of any length up to `lengths` lead to."""
        shape = costs.shape
        width = 2 * shape.num_query_groups * shape.kv_channels / costs.layout.tp
        tokens = min(self.max_cache_tokens, self.most_prompts * self.traces * self.lengths.columns)
        return self.in_flight * stage.layers * width * costs.element * tokens

    def _slice(self, rows: int, width: float) -> float:
        """Tokens of the slice of rows that goes through the model at once."""
        return min(rows, max(1, self.max_tokens_per_forward // width)) * width

    def workspace_bytes(self, costs: Costs, stage: Stage) -> float:
        """The larger of the prompts' forward pass, that of marker and answer on all rows, and drawing a token.

        A forward pass holds one layer at a time, and one mask; sequence parallelism is off. Drawing holds the gathered
        logits in several types.
        """
        shape, lengths, element = costs.shape, self.lengths, costs.element
        rows = self.most_prompts * self.traces
        token = element * (4 * shape.hidden_size + 4 * shape.ffn_hidden_size / costs.layout.tp)
        prefill = self._slice(self.most_prompts, lengths.prompt) * (token + element * lengths.prompt)
        scoring = self._slice(rows, MARKER + lengths.answer) * (token + element * lengths.columns)
        logits = vocab_matrix(shape, costs.cfg) / shape.hidden_size / costs.layout.tp * costs.cfg.logprob_chunk_size
        drawing = (element * rows + 28 * min(rows, ROWS_AT_ONCE)) * shape.vocab_size
        return max(prefill, scoring + stage.last * 8 * logits, stage.last * drawing)


@dataclass(frozen=True)
class RolloutWork:
    """Seconds on every rank and model FLOPs of all of them, for the batches of a step."""

    sampling_seconds: float
    sampling_flops: float
    scoring_seconds: float
    scoring_flops: float


def rollout_work(costs: Costs, batch: RolloutBatch, prompts_of_rank: float) -> RolloutWork:
    """At `Layout.of_rollout`. `batch` holds average lengths: decoding ends when its traces do. A last batch that is
    smaller takes as long. prompts_of_rank: on average, where some ranks have one more."""
    lengths, tail = batch.lengths, MARKER + batch.lengths.answer
    prefill = Pass(batch.prompts, lengths.prompt, scored=1)
    step = Pass(batch.rows, 1, cached=lengths.prompt + lengths.trace / 2)
    scoring = [
        Pass(batch.rows, tail, cached=lengths.prompt + lengths.trace),
        Pass(batch.prompts, tail, cached=lengths.prompt),
    ]
    sampling = _turn(costs, batch, prefill) + lengths.trace * _turn(costs, batch, step, draws=True)
    batches = math.ceil(prompts_of_rank / batch.prompts)
    waves, everywhere = (
        math.ceil(batches / batch.in_flight),
        prompts_of_rank / batch.prompts * costs.layout.dp,
    )
    return RolloutWork(
        sampling_seconds=waves * sampling,
        sampling_flops=everywhere * (costs.model_flops(prefill) + lengths.trace * costs.model_flops(step)),
        scoring_seconds=waves * sum(_turn(costs, batch, work) for work in scoring),
        scoring_flops=everywhere * sum(costs.model_flops(work) for work in scoring),
    )


def _turn(costs: Costs, batch: RolloutBatch, work: Pass, draws: bool = False) -> float:
    """One forward pass of each batch in flight.

    A batch needs every stage in turn, and a stage serves every batch in turn: whichever takes longer. Drawing (softmax,
    entropy and the cumulative distribution over the gathered logits, `mcore/sampling.py`) is work of the last stage.
    """
    layout = costs.layout
    transfer = costs.stage_transfer_bytes(work.sequences * work.tokens, inference=True) / layout.pipeline_bandwidth
    stages = []
    for stage in layout.stages:
        fp8 = stage.fp8_layers if batch.fp8 else 0
        layers = costs.layer(work, inference=True) * (stage.layers - fp8)
        layers += costs.layer(work, inference=True, fp8=True) * fp8
        stages.append(layers.total + (0 if stage.last else transfer))
    stages[-1] += costs.output_layer(work.num_scored).total
    if draws:
        stages[-1] += costs.memory_seconds(80 * batch.rows * costs.shape.vocab_size)
    return max(sum(stages), batch.in_flight * max(stages))
