"""Recipes: YAML to frozen dataclasses, and every check that needs no model and no GPU. Imports no torch."""

from nrt_megatron.recipe.errors import ConfigError, MissingFileError
from nrt_megatron.recipe.load import from_yaml, load_recipe, print_notice, to_yaml
from nrt_megatron.recipe.presets import PRESETS
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
