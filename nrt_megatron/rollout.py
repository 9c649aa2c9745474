"""K reasoning traces per question, and the reference answer scored after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nrt_megatron.data import Example
from nrt_megatron.data.traces import Generated, Generator, Request
from nrt_megatron.recipe import Recipe, num_traces_per_prompt


@dataclass(frozen=True)
class Rollout:
    """G questions with their traces."""

    examples: list[Example]
    generated: Generated


def rollout(generator: Generator, examples: Sequence[Example], recipe: Recipe, draw: int) -> Rollout:
    """Samples `num_generations_per_prompt` traces for each example and teacher-forces its answer after them.

    The traces depend on (seed, draw, example.index, k) and the weights only: not on what else is in the batch,
    and not on which data-parallel rank draws them. In the same pass the answer is scored once per prompt
    after the empty trace (b_i).
    """
    request = Request(
        prompts=[example.prompt_ids for example in examples],
        indices=[example.index for example in examples],
        answers=[example.answer_ids for example in examples],
        num_generations=recipe.nrt.num_generations_per_prompt,
        max_new_tokens=recipe.policy.generation.max_new_tokens,
        step=draw,
    )
    return Rollout(list(examples), generator.generate(request))


class Place(Protocol):
    """Where a rank stands among the replicas of the model."""

    dp_rank: int
    dp_size: int


def local_share(prompts: Sequence[Example], recipe: Recipe, place: Place) -> list[Example]:
    """This data-parallel rank's prompts of a global batch, mini-batch by mini-batch.

    A mini-batch is a contiguous run of the global batch at every data-parallel size, so that the same
    prompts are updated on together whatever the layout; each rank takes an equal run of each mini-batch.
    """
    per_update = recipe.policy.train_global_batch_size // num_traces_per_prompt(recipe)
    per_rank = per_update // place.dp_size
    starts = range(0, len(prompts), per_update)
    return [
        p
        for start in starts
        for p in prompts[start + place.dp_rank * per_rank : start + (place.dp_rank + 1) * per_rank]
    ]
