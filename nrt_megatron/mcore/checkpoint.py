"""Checkpoints in Megatron's `torch_dist` format: complete or absent, loadable at any layout.

A checkpoint is written under a temporary name, flushed and renamed; the file `latest` is replaced after that, and
only then are older checkpoints deleted. What lies in one and when it counts as whole: `nrt_megatron.checkpoints`.
"""

from __future__ import annotations

import json
import os
import random
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nrt_megatron import checkpoints
from nrt_megatron.checkpoints import LATEST, MANIFEST, CheckpointMeta, StorageError, step_dir
from nrt_megatron.mcore import storage
from nrt_megatron.mcore.optimizer_state import load_optimizer_state, optimizer_state, update_count
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.recipe import Checkpointing


def model_state(policy: MegatronPolicy) -> dict[str, Any]:
    """Sharded state dict of the weights, under GPTModel's own names, one entry for each model chunk."""
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}


def _random_state() -> ShardedObject:
    rank, world = dist.get_rank(), dist.get_world_size()
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random_state", state, (world,), (rank,))


def save(
    directory: Path, policy: MegatronPolicy, meta: CheckpointMeta, documents: Callable[[Path], None], cfg: Checkpointing
) -> Path:
    """Writes `directory/step_N`, then the marker, then deletes checkpoints that need not be kept; returns its path.

    Collective; `meta` is equal on all ranks. `documents` adds files to the directory it is given, on the main rank.
    Raises StorageError on all ranks when the disk is full or not writable; the previous checkpoint then still is the
    latest.
    """
    final = step_dir(directory, meta.step)
    _write(final, meta, partial(_training_state, policy), documents, lambda _: None)
    storage.together(directory, partial(_retire, final, cfg) if dist.get_rank() == 0 else lambda: None)
    return final


def save_weights(
    final: Path,
    policy: MegatronPolicy,
    meta: CheckpointMeta,
    documents: Callable[[Path], None],
    parts: Callable[[Path], None],
) -> None:
    """Writes a checkpoint of the weights alone as `final`. Collective; raises StorageError on all ranks.

    `parts` adds files to the directory it is given, on every rank.
    """
    _write(final, meta, partial(model_state, policy), documents, parts)


def _write(
    final: Path,
    meta: CheckpointMeta,
    state: Callable[[], dict[str, Any]],
    documents: Callable[[Path], None],
    parts: Callable[[Path], None],
) -> None:
    directory, main = final.parent, dist.get_rank() == 0
    # A name of its own for every attempt: what a killed one may still be writing does not get in here.
    name = [f".writing-{final.name}-{uuid.uuid4().hex[:8]}" if main else None]
    dist.broadcast_object_list(name)
    temporary = directory / str(name[0])
    on_all = partial(storage.together, directory)

    def on_main(action: Callable[..., None], *args: Any) -> None:
        on_all(partial(action, *args) if main else lambda: None)

    try:
        on_main(_begin, temporary)
        storage.write_state(state(), temporary / "dist", on_all)
        on_all(partial(parts, temporary))
        on_main(documents, temporary)
        on_main((temporary / "meta.json").write_text, meta.to_json())
        sums = _gathered(on_all(partial(_checksums_of_own_files, temporary)))
        on_main(_write_manifest, temporary, sums)
        on_main(_publish, temporary, final)
    except StorageError:
        if main:
            checkpoints.clean(directory)  # makes room for the metrics of what comes next
        raise


def _training_state(policy: MegatronPolicy) -> dict[str, Any]:
    model = model_state(policy)
    return {
        **model,
        "optimizer": optimizer_state(policy.optimizer, model, loading=False),
        "optimizer_step": update_count(policy.optimizer),
        "scheduler": policy.scheduler.state_dict(),
        "random_state": _random_state(),
    }


def _begin(temporary: Path) -> None:
    checkpoints.clean(temporary.parent)
    (temporary / "dist").mkdir(parents=True)


def _publish(temporary: Path, final: Path) -> None:
    """Gives a complete checkpoint its name."""
    directory = final.parent
    if final.exists():  # a damaged one, which the run went back behind
        final.rename(directory / f".deleting-{final.name}")
    os.replace(temporary, final)
    storage.flush_one(directory)
    checkpoints.clean(directory)


def _retire(final: Path, cfg: Checkpointing) -> None:
    """Gives a complete checkpoint the marker, then lets older ones go."""
    directory = final.parent
    storage.replace_text(directory / LATEST, final.name)
    storage.flush_one(directory)
    checkpoints.prune(directory, checkpoints.step_of(final), cfg.keep_last, cfg.keep_every)


def _checksums_of_own_files(checkpoint: Path) -> dict[str, list[int]]:
    """Each rank reads back what it wrote: most likely it still is in the memory of its node."""
    return checkpoints.checksums(
        checkpoint, [f for f in checkpoints.files_of(checkpoint) if _writer(f) == dist.get_rank()]
    )


def _gathered(mine: dict[str, Any]) -> dict[str, Any]:
    """The dictionaries of all ranks in one, on the main rank; empty elsewhere."""
    parts: Optional[list[Any]] = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts)
    return {key: value for part in parts or [] for key, value in part.items()}


def _write_manifest(checkpoint: Path, files: dict[str, list[int]]) -> None:
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True))
    storage.flush(checkpoint)


def _writer(file: str) -> int:
    """The rank that wrote a file: `dist/__3_0.distcp` is rank 3's, all that is not sharded the main rank's."""
    name = Path(file).name
    return int(name.split("_")[2]) if name.startswith("__") else 0


def find(directory: Path, say: Callable[[str], None]) -> Optional[Path]:
    """The newest checkpoint that is whole, every byte of it read; None when there is none at all.

    Collective: ranks share the reading, and agree. `say` gets one line for every damaged one passed over, on the
    main rank. Raises StorageError when there are checkpoints and none is whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found = [checkpoints.newest_first(directory)]
    dist.broadcast_object_list(found)
    reasons: list[str] = []
    for checkpoint in found[0]:
        findings: list[Optional[str]] = [None] * world
        dist.all_gather_object(findings, checkpoints.damage(checkpoint, contents=True, part=(rank, world)))
        reason = next((finding for finding in findings if finding), None)
        if reason is None:
            return checkpoint
        reasons.append(reason)
        if rank == 0:
            say(f"{checkpoint} is damaged ({reason}); looking for an earlier one")
    if reasons:
        raise checkpoints.none_whole(directory, reasons[0])
    return None


def _zero_weights(policy: MegatronPolicy) -> None:
    """Before loading: rows that pad the vocabulary further than the stored one's would keep what memory held."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()


def load_weights(checkpoint: Path, policy: MegatronPolicy) -> None:
    """Fills the weights alone, from a checkpoint of any layout and either layer spec."""
    _zero_weights(policy)
    strict = StrictHandling.LOG_UNEXPECTED
    _fill_weights(policy, dist_checkpointing.load(model_state(policy), str(checkpoint / "dist"), strict=strict))


def _fill_weights(policy: MegatronPolicy, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(loaded[f"model{index}"])


def load(checkpoint: Path, policy: MegatronPolicy) -> CheckpointMeta:
    """Fills weights, optimizer, schedule and, at an unchanged world size, random states."""
    meta = CheckpointMeta.read(checkpoint)
    _zero_weights(policy)
    model = model_state(policy)
    state = {**model, "optimizer": optimizer_state(policy.optimizer, model, loading=True)}
    if meta.world_size == dist.get_world_size():
        state["random_state"] = _random_state()
    # What a rank reads is its own affair: a part of the optimizer may be read by several ranks, or not by the first.
    loaded = dist_checkpointing.load(state, str(checkpoint / "dist"), validate_access_integrity=False)
    _fill_weights(policy, loaded)
    load_optimizer_state(policy.optimizer, model_state(policy), loaded["optimizer"], loaded["optimizer_step"])
    policy.scheduler.load_state_dict(loaded["scheduler"])
    if "random_state" in loaded:
        _restore_random_state(loaded["random_state"])
    return meta


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])
