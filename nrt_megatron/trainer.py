"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from nrt_megatron.mcore import distributed
from nrt_megatron.recipe import Recipe
from nrt_megatron.rollout import local_share, rollout
from nrt_megatron.run import Run
from nrt_megatron.scoring import answers_only, rollout_metrics, score, sequence_grid
from nrt_megatron.update import update


def train(recipe: Recipe) -> None:
    """Runs a recipe on this rank from where its run directory stands to `nrt.max_num_steps`.

    Raises ConfigError for what the user can mend (a full disk, a data row that turns out broken).
    """
    run = Run.start(recipe)
    cfg = recipe.nrt
    sft = cfg.reward_scheme == "sft"
    try:
        if run.step == 0:
            run.evaluate()
        while run.step < cfg.max_num_steps:
            with run.timed("data"):
                prompts = run.sampler.next(cfg.num_prompts_per_step)
                mine = local_share(prompts, recipe, run.runtime.dp_rank, run.runtime.dp_size)
            if sft:
                grid, metrics = answers_only(mine, run.marker_ids, run.runtime.device), {}
            else:
                with run.timed("rollout"):
                    traces = rollout(run.generator, mine, recipe, run.step + 1)
                scored = score(traces, cfg)
                grid, metrics = sequence_grid(scored, run.marker_ids), rollout_metrics(scored)
                run.keep_samples(scored)
            with run.timed("update"):
                metrics |= update(run.policy, grid, recipe)
            run.finish_step(metrics)
        run.finish()
    finally:
        run.close()
