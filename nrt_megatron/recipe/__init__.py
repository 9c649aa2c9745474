"""Recipes: YAML to frozen dataclasses, and every check that needs no model and no GPU. Imports no torch."""

from nrt_megatron.recipe.checks import check, check_training
from nrt_megatron.recipe.errors import ConfigError, MissingFileError, SeveralErrors, check_all
from nrt_megatron.recipe.files import check_files, check_run_dir
from nrt_megatron.recipe.layout import (
    data_parallel_size,
    num_sequences_per_step,
    num_traces_per_prompt,
    num_updates_per_step,
    token_multiple,
    uncut,
    world_size,
)
from nrt_megatron.recipe.limits import check_values
from nrt_megatron.recipe.load import from_yaml, load_recipe, print_notice, to_yaml
from nrt_megatron.recipe.presets import PRESETS
from nrt_megatron.recipe.rollout_layout import (
    check_model_shape,
    has_rollout_layout,
    rollout_megatron,
    rollout_sizes,
)
from nrt_megatron.recipe.schema import (
    NRT,
    Checkpointing,
    Cluster,
    Data,
    Evaluation,
    Generation,
    Logger,
    Megatron,
    Model,
    Optimizer,
    Policy,
    Recipe,
    Scheduler,
    SequencePacking,
    Tokenizer,
)
from nrt_megatron.recipe.watch import Sign, Watch
