"""Checkpoints in Megatron's `torch_dist` format: complete or absent, loadable at any layout.

A checkpoint directory `step_00000010` holds `dist/` (weights, optimizer, schedule, random states, sampler),
`meta.json`, `recipe.yaml` and `tokenizer/`. It is written under a temporary name, flushed and renamed; the
file `latest` is replaced after that, and only then are older checkpoints deleted.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nrt_megatron.checkpoints import LATEST, CheckpointMeta, StorageError, step_dir
from nrt_megatron.mcore.policy import MegatronPolicy

# The optimizer state in the shape of the parameters, so that every layout can read it.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def model_state(policy: MegatronPolicy) -> dict[str, Any]:
    """Sharded state dict of the weights, under GPTModel's own names."""
    if len(policy.chunks) == 1:
        return {"model": policy.chunks[0].sharded_state_dict(metadata=_METADATA)}
    return {f"model{i}": chunk.sharded_state_dict(metadata=_METADATA) for i, chunk in enumerate(policy.chunks)}


def _random_state(policy: MegatronPolicy) -> ShardedObject:
    rank, world = dist.get_rank(), dist.get_world_size()
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random_state", state, (world,), (rank,))


def _training_state(policy: MegatronPolicy, common: dict[str, Any], loading: bool) -> dict[str, Any]:
    state = model_state(policy)
    # With several chunks Megatron's optimizer looks their tensors up in one flat dict.
    tensors = {f"{k}.{n}": v for k, chunk in state.items() for n, v in chunk.items()} if len(state) > 1 else state["model"]
    state["optimizer"] = policy.optimizer.sharded_state_dict(tensors, is_loading=loading, metadata=_METADATA)
    state["scheduler"] = policy.scheduler.state_dict()
    state["common"] = common
    return state


def save(
    directory: Path,
    policy: MegatronPolicy,
    meta: CheckpointMeta,
    common: dict[str, Any],
    *,
    recipe_yaml: str,
    save_tokenizer: Callable[[Path], None],
    keep_last: int,
) -> Path:
    """Writes `directory/step_N`, then the marker, then deletes all but `keep_last`; returns its path.

    `common` (sampler state and the like) must be equal on all ranks. Every rank calls it. Raises StorageError
    on all ranks when the disk is full or not writable; the previous checkpoint is then still the latest.
    """
    final = step_dir(directory, meta.step)
    temporary = directory / f".writing-{final.name}"
    main = dist.get_rank() == 0
    failure: Optional[BaseException] = None
    try:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "dist").mkdir(parents=True)
        dist.barrier()
        state = _training_state(policy, common, loading=False)
        state["random_state"] = _random_state(policy)
        dist_checkpointing.save(state, str(temporary / "dist"), content_metadata=_METADATA)
        if main:
            save_tokenizer(temporary / "tokenizer")
            (temporary / "recipe.yaml").write_text(recipe_yaml)
            (temporary / "meta.json").write_text(meta.to_json())
            _flush(temporary)
    except Exception as error:  # Megatron wraps what its writer processes raise
        failure = error
    _raise_together(failure, directory)
    if main:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _replace_text(directory / LATEST, final.name)
        for old in sorted(directory.glob("step_*"))[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def _raise_together(failure: Optional[BaseException], directory: Path) -> None:
    """If saving failed on any rank, every rank raises, so that none waits for the others."""
    messages: list[Optional[str]] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if failure is None else _reason(failure))
    told = next((m for m in messages if m), None)
    if told is None:
        return
    raise StorageError(
        f"checkpointing: could not write to {directory}: {told}. Free space or point run_dir elsewhere, "
        "then start the same command again: the last complete checkpoint is intact"
    ) from failure


def _reason(error: BaseException) -> str:
    seen: Optional[BaseException] = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return f"{os.strerror(seen.errno)} (errno {errno.errorcode.get(seen.errno, seen.errno)})"
        seen = seen.__cause__ or seen.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _flush(directory: Path) -> None:
    """Waits until files and folders below `directory` are on the disk."""
    for path in [*directory.rglob("*"), directory]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_weights(checkpoint: Path, policy: MegatronPolicy) -> None:
    """Fills the weights alone, from a checkpoint of any layout and either layer spec."""
    state = model_state(policy)
    loaded = dist_checkpointing.load(state, str(checkpoint / "dist"), strict=StrictHandling.LOG_UNEXPECTED)
    for key, chunk in zip(state, policy.chunks):
        chunk.load_state_dict(loaded[key])


def load(checkpoint: Path, policy: MegatronPolicy) -> dict[str, Any]:
    """Fills weights, optimizer, schedule and, at an unchanged world size, random states; returns `common`."""
    state = _training_state(policy, {}, loading=True)
    if json.loads((checkpoint / "meta.json").read_text())["world_size"] == dist.get_world_size():
        state["random_state"] = _random_state(policy)
    loaded = dist_checkpointing.load(state, str(checkpoint / "dist"))
    keys = ["model"] if len(policy.chunks) == 1 else [f"model{i}" for i in range(len(policy.chunks))]
    for key, chunk in zip(keys, policy.chunks):
        chunk.load_state_dict(loaded[key])
    policy.optimizer.load_state_dict(loaded["optimizer"])
    policy.scheduler.load_state_dict(loaded["scheduler"])
    if "random_state" in loaded:
        _restore_random_state(loaded["random_state"])
    return loaded["common"]


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])


