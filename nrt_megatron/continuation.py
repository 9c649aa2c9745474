"""A run that is continued with another recipe: what may change is said and kept on record, never taken over silently.

What no continuation can change is refused elsewhere: model, precision, data, seed and order (`preflight`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from nrt_megatron.checkpoints import step_of
from nrt_megatron.recipe import ConfigError, Recipe, from_yaml, to_yaml
from nrt_megatron.recipe.changes import changes, described, is_layout

RECIPE_FILE = "recipe.yaml"


def earlier_recipe(run_dir: Path, step: int) -> Path:
    """`run_dir/recipe.step_00000040.yaml`: the recipe of the steps up to 40, where later steps have another one."""
    return run_dir / f"recipe.step_{step:08d}.yaml"


def recipe_of(checkpoint: Path) -> Recipe:
    """The recipe that a checkpoint was trained with. Raises ConfigError when this version cannot read it."""
    return from_yaml(_text_of(checkpoint), str(checkpoint / RECIPE_FILE))


def _text_of(checkpoint: Path) -> str:
    path = checkpoint / RECIPE_FILE
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}), so that nobody knows what the checkpoint was trained with; "
            f"restore the file, or move {checkpoint} away to continue from the one before"
        ) from None


def check_continues(checkpoint: Path, recipe: Recipe) -> None:
    """Raises ConfigError when the checkpoint's recipe is gone, and when its run has no step left in which changed keys
    could have an effect."""
    step, _ = step_of(checkpoint), _text_of(checkpoint)
    if step < recipe.nrt.max_num_steps:
        return
    try:
        changed = changes(recipe_of(checkpoint), recipe)
    except ConfigError:
        return  # of another version: nothing can be compared, and nothing will be trained
    unused = {key: pair for key, pair in changed.items() if key != "nrt.max_num_steps" and not is_layout(key)}
    if unused:
        problem = f"its run has done all {step} steps, without {described(unused)}"
        raise ConfigError.at("run_dir", recipe.run_dir, problem, "set another run_dir, or a higher nrt.max_num_steps")


def record(run_dir: Path, checkpoint: Optional[Path], recipe: Recipe) -> Optional[str]:
    """Writes `recipe.yaml` for the steps to come; returns what differs from the steps so far, as one line.

    checkpoint: what the run continues from, None for a new run. Its recipe, where it differs, is kept as
    `earlier_recipe`. A run without a step left keeps the `recipe.yaml` it was trained with. Raises OSError, and
    ConfigError as `check_continues` does.
    """
    line = None
    if checkpoint is not None:
        step = step_of(checkpoint)
        if step == recipe.nrt.max_num_steps:
            return None
        line = _keep_earlier(earlier_recipe(run_dir, step), checkpoint, recipe)
    (run_dir / RECIPE_FILE).write_text(to_yaml(recipe), encoding="utf-8")
    return line


def _keep_earlier(kept: Path, checkpoint: Path, recipe: Recipe) -> Optional[str]:
    text = _text_of(checkpoint)
    try:
        changed = changes(recipe_of(checkpoint), recipe)
        what = described(changed)
    except ConfigError as error:
        changed, what = {"?": (None, None)}, f"another recipe, which cannot be compared ({error})"
    if not changed:
        return None
    kept.write_text(text, encoding="utf-8")
    return f"from step {step_of(checkpoint) + 1} on: {what}; the recipe until then is kept in {kept}"
