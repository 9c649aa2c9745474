"""The batch of an update whose loss or gradient was not finite: kept with the weights it met, and run again.

A replay directory is a checkpoint of the weights with a file `batch_N.safetensors` for each data-parallel rank N.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nrt_megatron.checkpoints import CheckpointMeta, damage
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.data.batch import MicroBatch
from nrt_megatron.mcore import checkpoint, runtime
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.objective.loss import LossOutput, TokenBatch, nrt_loss
from nrt_megatron.recipe import ConfigError, Recipe, uncut

_NUMBERS = "numbers"


class NotFiniteError(ConfigError):
    """Too many updates in a row were skipped; carries the micro-batches of the last one, of this rank."""

    def __init__(self, batches: list[MicroBatch]) -> None:
        super().__init__("loss or gradient was not finite")
        self.batches = batches


def replay_dir(run_dir: Path, step: int) -> Path:
    """`run_dir/replay/step_00000010`"""
    return run_dir / "replay" / f"step_{step:08d}"


def keep(
    failure: NotFiniteError,
    run_dir: Path,
    policy: MegatronPolicy,
    meta: CheckpointMeta,
    documents: Callable[[Path], None],
    limit: int,
) -> ConfigError:
    """Writes the batch and the weights it met, and returns the error to end the run with. Collective.

    limit: `nrt.max_skipped_updates`. Raises StorageError on all ranks when the disk refuses.
    """
    step, place = meta.step + 1, policy.runtime
    directory = replay_dir(run_dir, step)

    def write(target: Path) -> None:
        if place.speaks_for_replica:
            write_batches(failure.batches, target / f"batch_{place.dp_rank}.safetensors")

    checkpoint.save_weights(directory, policy, meta, documents, write)
    problem = f"so many updates in a row had a loss or gradient that is not finite, the last in step {step}"
    remedy = f"look at it with nrt replay {directory}, or set a lower policy.optimizer.lr"
    return ConfigError.at("nrt.max_skipped_updates", limit, problem, remedy)


def write_batches(batches: list[MicroBatch], path: Path) -> None:
    """Micro-batches as one safetensors file: tensor `I.FIELD` of micro-batch I, its numbers as JSON in the header."""
    tensors, numbers = {}, []
    for index, batch in enumerate(batches):
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors |= {f"{index}.{k}": v.cpu().contiguous() for k, v in values.items() if isinstance(v, Tensor)}
        numbers.append({k: v for k, v in values.items() if not isinstance(v, Tensor)})
    save_file(tensors, path, metadata={_NUMBERS: json.dumps(numbers)})


def read_batches(path: Path) -> list[MicroBatch]:
    """What `write_batches` wrote. Raises ConfigError when the file is not that."""
    try:
        with safe_open(path, "pt") as file:
            numbers: list[dict[str, Any]] = json.loads(file.metadata()[_NUMBERS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        own = [{k.split(".")[1]: v for k, v in tensors.items() if k.startswith(f"{i}.")} for i in range(len(numbers))]
        return [MicroBatch(**{**values, **parts}) for values, parts in zip(numbers, own)]
    except Exception as error:  # safetensors raises its own kind, which is a plain Exception
        raise ConfigError(
            f"{path}: no batch written by `nrt train` ({error}); give a directory below replay/"
        ) from None


def batch_files(directory: Path) -> list[Path]:
    """One file a data-parallel rank, in rank order. Raises ConfigError when there is none."""
    files = sorted(directory.glob("batch_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
    if not files:
        raise ConfigError(f"{directory}: holds no batch_*.safetensors; give a directory below replay/ of a run")
    return files


def examine(
    policy: MegatronPolicy, batches: list[MicroBatch], loss_fn: Callable[[TokenBatch], LossOutput]
) -> Iterator[str]:
    """Runs forward and backward without an update; yields what is not finite, one line each.

    Collective. Lines are about what this rank holds; the last one is the same on all.
    """
    for name, parameter in _parameters(policy):
        if not parameter.isfinite().all():
            yield f"weight {name}: {_share(parameter)}"
    results = policy.gradients(batches, loss_fn)
    for index, result in enumerate(results):
        assert result.loss is not None
        terms = ", ".join(f"{name} {float(term):.4g}" for name, term in result.loss.terms.items())
        yield f"micro-batch {index}: {result.num_sequences} sequences, loss {float(result.loss.loss_sum):.6g} ({terms})"
        if not result.log_probs.isfinite().all():
            rows = batches[index].sequence[~result.log_probs.isfinite().cpu()].unique().tolist()
            yield f"micro-batch {index}: log-probs of {_share(result.log_probs)}, in sequences {rows}"
    for name, parameter in _parameters(policy):
        if not parameter.main_grad.isfinite().all():
            yield f"gradient of {name}: {_share(parameter.main_grad)}"
    norm = policy.grad_norm()
    yield f"gradient norm {norm:.6g}" + ("" if math.isfinite(norm) else ": the update would be skipped")


def replay(directory: Path, recipe: Recipe) -> None:
    """Runs the saved batch on the saved weights and prints what is not finite, and where.

    In one process the model is not cut; under torchrun it is cut as in the recipe. Every rank speaks for its part.
    Raises ConfigError when the directory is no replay, or its batches cannot be dealt to the data-parallel ranks.
    """
    files, meta = batch_files(directory), CheckpointMeta.read(directory)
    if found := damage(directory, contents=True):
        raise ConfigError(f"{directory} is damaged ({found}); give another directory below replay/")
    if "RANK" not in os.environ:
        recipe = replace(recipe, policy=replace(recipe.policy, megatron_cfg=uncut(recipe.policy.megatron_cfg)))
    place = runtime.initialize(recipe)
    if len(files) % place.dp_size:
        problem = f"{place.dp_size} data-parallel ranks cannot share {len(files)} batches"
        raise ConfigError(f"{directory}: {problem}; start a number of replicas that divides {len(files)}")
    policy = MegatronPolicy(place, recipe.policy, ModelShape.from_hf(meta.model), num_updates=1)
    checkpoint.load_weights(directory, policy)
    policy.prepare_for_training()
    batches = [batch for file in files[place.dp_rank :: place.dp_size] for batch in read_batches(file)]
    prefix = f"rank {place.rank}: " if place.world_size > 1 else ""
    for line in examine(policy, batches, partial(nrt_loss, settings=recipe.nrt)):
        print(prefix + line, flush=True)
    runtime.shutdown()


def _parameters(policy: MegatronPolicy) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for chunk in policy.chunks:
        yield from chunk.named_parameters()


def _share(tensor: Tensor) -> str:
    return f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} are not finite"
