"""Four ratios in one run: `torchrun --standalone --nproc-per-node 2 tools/bench.py` (two pipeline stages).

- packing: an update on trees against the same update on one row per trace;
- scoring: c_i and b_i teacher-forced on the rollout's cache against full forwards of every sequence, the baseline
  once per trace, as the authors' code does;
- turns: a rollout in batches of two prompts that take turns on the stages, against one after the other;
- saving: for how long training stands still for a checkpoint that is written meanwhile, against one it waits for.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from nrt_megatron.checkpoints import CheckpointMeta
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.seeded import SeededWeights
from nrt_megatron.data import Example
from nrt_megatron.data.batch import micro_batches
from nrt_megatron.mcore import checkpoint, runtime
from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.recipe import NRT, Checkpointing, Generation, Megatron, Policy, Recipe, SequencePacking
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


def standstill(policy: MegatronPolicy, directory: Path, async_save: bool) -> float:
    """Seconds that saving takes of the training loop, the best of REPEATS: to begin a checkpoint and to complete it."""
    saver = checkpoint.Saver(directory, Checkpointing(keep_last=1, async_save=async_save))
    times = []
    for step in range(1, REPEATS + 2):
        dist.barrier()
        started = time.perf_counter()
        saved = saver.save(policy, CheckpointMeta(step, dist.get_world_size(), CONFIG), lambda _: None)
        begun = time.perf_counter() - started
        completed, done = 0.0, [not async_save]
        while not done[0]:
            time.sleep(0.05)  # of a training step
            dist.barrier()
            started = time.perf_counter()
            saver.poll()
            completed = time.perf_counter() - started
            done = [saved.exists()]
            dist.broadcast_object_list(done)
        times.append(begun + completed)
    return min(times[1:])


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
    with tempfile.TemporaryDirectory() as mine:
        names = [mine]
        dist.broadcast_object_list(names)
        waits, goes_on = (standstill(policy, Path(names[0]) / str(ahead), ahead) for ahead in (False, True))
    result = {
        "packing": seconds(lambda: update(policy, grid, RECIPE)) / seconds(lambda: update(policy, grid, packed)),
        "scoring": seconds(lambda: full_forwards(policy, done)) / in_place,
        "turns": roll(1) / roll(4),
        "saving": waits / goes_on,
    }
    if place.is_main:
        print(json.dumps({name: round(ratio, 2) for name, ratio in result.items()}))
    runtime.shutdown()


if __name__ == "__main__":
    main()
