"""Three ratios in one run: `torchrun --standalone --nproc-per-node 2 tools/bench.py` (two pipeline stages).

- packing: an update on trees against the same update on one row per trace;
- scoring: c_i and b_i teacher-forced on the rollout's cache against full forwards of every sequence, the baseline
  once per trace, as the authors' code does;
- turns: a rollout in batches of two prompts that take turns on the stages, against one after the other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.seeded import SeededWeights
from nrt_megatron.data import Example
from nrt_megatron.data.batch import micro_batches
from nrt_megatron.mcore import runtime
from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.recipe import NRT, Generation, Megatron, Policy, Recipe, SequencePacking
from nrt_megatron.rollout import Rollout, rollout
from nrt_megatron.scoring import answers_only, score, sequence_grid
from nrt_megatron.update import update

PROMPT, TRACE, ANSWER, K, PROMPTS, REPEATS = 96, 32, 16, 8, 8, 3
MARKER = (3,)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
RECIPE = Recipe(
    nrt=NRT(num_prompts_per_step=PROMPTS, num_generations_per_prompt=K),
    policy=Policy(
        train_global_batch_size=PROMPTS * K,
        train_micro_batch_size=K,
        megatron_cfg=Megatron(pipeline_model_parallel_size=2),
        generation=Generation(max_new_tokens=TRACE),
    ),
)


def seconds(action: Callable[[], object]) -> float:
    """Best of REPEATS runs, after one to warm up; all ranks start together."""
    times = []
    for _ in range(REPEATS + 1):
        torch.distributed.barrier()
        started = time.perf_counter()
        action()
        torch.distributed.barrier()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def full_forwards(policy: MegatronPolicy, done: Rollout) -> None:
    """The answers' log-probs as K full forwards and K full baseline forwards a prompt."""
    grid = sequence_grid(score(done, RECIPE.nrt), MARKER)
    baseline = answers_only([e for e in done.examples for _ in range(K)], MARKER, policy.runtime.device)
    for rows in (grid, baseline):
        policy.log_probs(micro_batches(rows, torch.arange(len(rows)), K, temperature=1.0))


def main() -> None:
    place = runtime.initialize(RECIPE)
    shape = ModelShape.from_hf(CONFIG)
    policy = MegatronPolicy(place, RECIPE.policy, shape, num_updates=100)
    policy.load(SeededWeights(shape, 1), shape)
    policy.prepare_for_training()
    how = {"marker_ids": MARKER, "stop_ids": (2,), "vocab_size": 8192, "seed": 1}
    generator = MegatronGenerator(place, policy.chunks, RECIPE.policy.generation, **how)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 8192, (PROMPTS, PROMPT + ANSWER), generator=draw).tolist()
    examples = [Example(i, tuple(row[:PROMPT]), tuple(row[PROMPT:]), "", "") for i, row in enumerate(ids)]
    done = rollout(generator, examples, RECIPE, 1)
    grid = sequence_grid(score(done, RECIPE.nrt), MARKER)
    packed = replace(RECIPE, policy=replace(RECIPE.policy, sequence_packing=SequencePacking(enabled=True)))

    def roll(in_flight: int) -> float:
        small = MegatronGenerator(place, policy.chunks, replace(RECIPE.policy.generation, max_batch_size=2 * K), **how)
        small.batches_in_flight = in_flight
        return seconds(lambda: rollout(small, examples, RECIPE, 1))

    in_place = min(rollout(generator, examples, RECIPE, 1).generated.scoring_seconds for _ in range(REPEATS))
    result = {
        "packing": seconds(lambda: update(policy, grid, RECIPE)) / seconds(lambda: update(policy, grid, packed)),
        "scoring": seconds(lambda: full_forwards(policy, done)) / in_place,
        "turns": roll(1) / roll(4),
    }
    if place.is_main:
        print(json.dumps({name: round(ratio, 2) for name, ratio in result.items()}))
    runtime.shutdown()


if __name__ == "__main__":
    main()
