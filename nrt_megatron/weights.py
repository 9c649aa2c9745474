"""The weights that a run starts from."""

from __future__ import annotations

from pathlib import Path

from nrt_megatron.checkpoints import is_checkpoint
from nrt_megatron.convert.seeded import SeededWeights
from nrt_megatron.convert.vocabulary import NewTokens
from nrt_megatron.mcore import checkpoint
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.preflight import Inputs
from nrt_megatron.recipe import Recipe


def fill_weights(policy: MegatronPolicy, recipe: Recipe, inputs: Inputs) -> None:
    """Initial weights: from `policy.model`, with rows for added tokens; seeded by name where it is inline."""
    model, stored = recipe.policy.model, inputs.stored_shape
    if model.config is not None:
        policy.load(SeededWeights(inputs.shape, recipe.nrt.seed), inputs.shape)
    elif is_checkpoint(Path(model.path)):
        checkpoint.load_weights(Path(model.path), policy)
    else:
        policy.load(model.path, stored, new_tokens(recipe, inputs))


def new_tokens(recipe: Recipe, inputs: Inputs) -> NewTokens | None:
    """How the embeddings of added tokens start, None when the vocabulary is the checkpoint's."""
    tokenizer, init = inputs.tokenizer, recipe.policy.tokenizer.marker_init
    if not tokenizer.added_tokens:
        return None
    ids = tuple(range(tokenizer.vocab_size - len(tokenizer.added_tokens), tokenizer.vocab_size))
    if init == "mean":
        like = None
    else:
        like = (tokenizer.eos_id,) if init == "eos" else tuple(tokenizer.encode_user(init))
    return NewTokens(ids=ids, base_size=ids[0], like=like)
