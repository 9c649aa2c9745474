"""What can be said about a run before its ranks start: data, tokenizer, model and earlier checkpoints fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from nrt_megatron.checkpoints import MANIFEST, CheckpointMeta, damage, is_checkpoint, newest_whole
from nrt_megatron.continuation import check_continues
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.data import Limits, PromptSampler, QADataset, Tokenizer, load_tokenizer
from nrt_megatron.recipe import ConfigError, Recipe, print_notice
from nrt_megatron.report.jsonl import read_rows
from nrt_megatron.report.metrics import METRICS_FILE
from nrt_megatron.report.samples import SAMPLES_FILE
from nrt_megatron.runlock import check_free

_VOCABULARY_MARGIN = 1.5


@dataclass(frozen=True)
class Inputs:
    """Everything a run is made from, checked."""

    tokenizer: Tokenizer
    stored_shape: ModelShape
    """The model as its files have it."""
    shape: ModelShape
    """The model as it is trained: with rows for added tokens."""
    train: QADataset
    validation: Optional[QADataset]


def load_inputs(recipe: Recipe) -> Inputs:
    """Opens tokenizer, model shape and data files; reads no weights. Raises ConfigError."""
    tokenizer = load_tokenizer(_tokenizer_dir(recipe), recipe.policy.tokenizer)
    stored = stored_shape(recipe)
    rows = max(stored.vocab_size, tokenizer.vocab_size)
    if tokenizer.vocab_size - len(tokenizer.added_tokens) > stored.vocab_size:
        raise ConfigError(
            f"policy.tokenizer: {tokenizer.vocab_size} tokens, but the model's vocab_size is {stored.vocab_size}; "
            "use the tokenizer that belongs to policy.model"
        )
    if tokenizer.added_tokens and recipe.policy.model.path and is_checkpoint(Path(recipe.policy.model.path)):
        # Its vocabulary is padded, so a new row would load as padding without a complaint.
        raise ConfigError(
            f"policy.tokenizer.add_marker=true: the converted checkpoint has no row for {tokenizer.added_tokens[0]!r}; "
            f"convert again with --add-token '{tokenizer.added_tokens[0]}'"
        )
    shape = ModelShape.from_hf({**stored.to_hf(), "vocab_size": rows})
    if recipe.policy.max_total_sequence_length > shape.max_position_embeddings:
        raise ConfigError(
            f"policy.max_total_sequence_length={recipe.policy.max_total_sequence_length} is longer than the model's "
            f"max_position_embeddings ({shape.max_position_embeddings}); set at most that"
        )
    limits = Limits.of(recipe, tokenizer)
    validation = recipe.data.validation
    return Inputs(
        tokenizer=tokenizer,
        stored_shape=stored,
        shape=shape,
        train=QADataset(recipe.data.train, recipe.data, tokenizer, limits),
        validation=QADataset(validation, recipe.data, tokenizer, limits, "data.validation") if validation else None,
    )


def preflight(recipe: Recipe) -> None:
    """Every check that needs files: parses all rows, and compares the recipe with the run it would continue.

    Raises ConfigError. Writes nothing; to be called once, before any rank starts.
    """
    check_free(Path(recipe.run_dir))
    inputs = load_inputs(recipe)
    _say_rows_without_token(recipe, inputs)
    inputs.train.check()
    if inputs.validation is not None:
        inputs.validation.check()
    if not _continues(recipe, inputs):
        _check_weights(recipe, inputs)


def _say_rows_without_token(recipe: Recipe, inputs: Inputs) -> None:
    """Published models pad their vocabulary by a few rows; an inline one with many more was meant otherwise."""
    tokens, rows = inputs.tokenizer.vocab_size, inputs.shape.vocab_size
    if recipe.policy.model.config is not None and rows > _VOCABULARY_MARGIN * tokens:
        print_notice(
            f"policy.model.config.vocab_size = {rows}: the tokenizer has {tokens} tokens; the rows above them cost "
            "memory and can be sampled, and no text stands for them"
        )


def _continues(recipe: Recipe, inputs: Inputs) -> bool:
    """Whether the run directory holds a run to continue. Raises ConfigError when this recipe cannot continue it."""
    directory = Path(recipe.run_dir)
    for name in (METRICS_FILE, SAMPLES_FILE):
        for _ in read_rows(directory / name):
            pass
    checkpoint = newest_whole(directory / "checkpoints")
    if checkpoint is None:
        return False
    check_same_model(checkpoint, inputs.shape)
    meta = CheckpointMeta.read(checkpoint)
    if meta.step > recipe.nrt.max_num_steps:
        problem = f"the run in {recipe.run_dir} has done {meta.step} steps"
        remedy = f"set at least {meta.step}, or another run_dir"
        raise ConfigError.at("nrt.max_num_steps", recipe.nrt.max_num_steps, problem, remedy)
    bf16, started = recipe.policy.megatron_cfg.bf16, meta.progress["bf16"]
    if bf16 != started:
        problem = f"the run was started with {str(started).lower()}, and its weights and optimizer are stored so"
        raise ConfigError.at("policy.megatron_cfg.bf16", bf16, problem, "set that, or start a new run_dir")
    sampler = PromptSampler(inputs.train, recipe.nrt.seed, recipe.data.shuffle)
    sampler.load_state_dict(meta.progress["sampler"])
    check_continues(checkpoint, recipe)
    return True


def _check_weights(recipe: Recipe, inputs: Inputs) -> None:
    """The weights of `policy.model.path` are there and of the model's shapes; headers are read, and no tensor."""
    if recipe.policy.model.path is None:
        return
    path, key = Path(recipe.policy.model.path), f"policy.model.path = {recipe.policy.model.path!r}: "
    if not is_checkpoint(path):
        from nrt_megatron.convert.safetensors_io import HFWeights  # loads torch

        _named(key, lambda: HFWeights(path).check(inputs.stored_shape))
        return
    if (path / MANIFEST).exists() and (found := damage(path)):
        raise ConfigError.at("policy.model.path", str(path), f"the checkpoint is damaged ({found})", "give another one")
    from nrt_megatron.convert.dcp_metadata import read_metadata

    _named(key, lambda: read_metadata(path / "dist"))


def check_same_model(checkpoint: Path, shape: ModelShape) -> None:
    """Raises ConfigError when the checkpoint holds a model of another shape."""
    saved = ModelShape.from_hf(CheckpointMeta.read(checkpoint).model)
    for name in shape.__dataclass_fields__:
        theirs, ours = getattr(saved, name), getattr(shape, name)
        if name not in ("original", "dtype") and theirs != ours:
            raise ConfigError(
                f"run_dir: its checkpoint {checkpoint} is of another model ({name} {theirs}, policy.model has {ours}); "
                "set another run_dir, or the model it was started with"
            )


def stored_shape(recipe: Recipe) -> ModelShape:
    """The model's shape from `policy.model`: a Hugging Face directory, a converted checkpoint, or inline."""
    model = recipe.policy.model
    if model.config is not None:
        return _named("policy.model.config.", lambda: ModelShape.from_hf(model.config))
    path = Path(model.path)
    if is_checkpoint(path):
        return ModelShape.from_hf(_config(path))
    return _named(f"policy.model.path = {model.path!r}: ", lambda: ModelShape.from_dir(path))


def _named(key: str, read: Callable[[], Any]) -> Any:
    """What `read` returns; its errors, which are about a file, say where the recipe names it."""
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(f"{key}{error}") from None


def _config(checkpoint: Path) -> dict[str, Any]:
    return CheckpointMeta.read(checkpoint).model


def _tokenizer_dir(recipe: Recipe) -> Path:
    if recipe.policy.tokenizer.path:
        return Path(recipe.policy.tokenizer.path)
    if recipe.policy.model.path is None:
        raise ConfigError(
            "policy.tokenizer.path is not set; name a tokenizer directory for the inline policy.model.config"
        )
    path = Path(recipe.policy.model.path)
    return path / "tokenizer" if is_checkpoint(path) else path
