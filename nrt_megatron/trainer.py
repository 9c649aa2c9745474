"""The training loop."""

from __future__ import annotations

from nrt_megatron.recipe import Recipe
from nrt_megatron.rollout import local_share, rollout
from nrt_megatron.run import Run
from nrt_megatron.scoring import answers_only, score, sequence_grid
from nrt_megatron.update import update


def train(recipe: Recipe) -> bool:
    """Runs a recipe on this rank from where its run directory stands to `nrt.max_num_steps`.

    Returns whether it got there: False when a signal asked it to stop. Raises ConfigError for what the user can
    mend (a full disk, a data row that turns out broken, updates that are not finite).
    """
    with Run.start(recipe) as run:
        if run.step == 0:
            run.evaluate()
        while run.goes_on():
            prompts = local_share(run.sampler.next(recipe.nrt.num_prompts_per_step), recipe, run.runtime)
            if recipe.nrt.reward_scheme == "sft":
                grid = answers_only(prompts, run.marker_ids, run.runtime.device)
            else:
                run.refresh_rollout()  # the weights, where rollout has a layout of its own
                with run.timed("rollout"):
                    traces = rollout(run.generator, prompts, recipe, run.draw)  # K per prompt, scored in place
                scored = score(traces, recipe.nrt)  # c_i, b_i -> rewards -> group-relative advantages
                grid = sequence_grid(scored, run.marker_ids)
                run.note(scored)
            with run.timed("update"), run.replayable():
                metrics = update(run.policy, grid, recipe)
            run.finish_step(metrics)
        return run.finish()
