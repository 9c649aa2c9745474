"""Checkpoints in Megatron's `torch_dist` format: complete or absent, loadable at any layout.

A checkpoint is written under a temporary name, flushed and renamed; the file `latest` is replaced after that, and
only then are older checkpoints deleted. What lies in one and when it counts as whole: `nrt_megatron.checkpoints`.
"""

from __future__ import annotations

import json
import os
import random
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
from nrt_megatron.convert.dcp_metadata import read_metadata
from nrt_megatron.mcore import storage
from nrt_megatron.mcore.optimizer_state import load_optimizer_state, optimizer_state, update_count
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.mcore.precision import load_state
from nrt_megatron.mcore.reduce import reduce_max
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


class Saver:
    """Writes the checkpoints of a run as `directory/step_N`, one at a time. Every method is collective.

    With `async_save` training goes on while threads write a copy of the tensors; a checkpoint gets its name and the
    marker, and older ones go, in the first `poll` or `finish` after every rank's part is on the disk. All methods
    raise StorageError on all ranks when the disk is full or not writable; the previous checkpoint then still is the
    latest.
    """

    def __init__(self, directory: Path, cfg: Checkpointing) -> None:
        self._directory, self._cfg = directory, cfg
        self._save: Optional[_Save] = None
        """The one being written."""
        self.spared: Collection[int] = ()
        """Steps whose checkpoints are kept whatever the recipe says."""

    def save(self, policy: MegatronPolicy, meta: CheckpointMeta, documents: Callable[[Path], None]) -> Path:
        """Begins a checkpoint, after the one before it is complete; completes it unless `async_save` is set.

        `meta` is equal on all ranks. `documents` adds files to the directory it is given, on the main rank.
        """
        self.finish()
        final = step_dir(self._directory, meta.step)
        self._save = _Save(final, meta, partial(_training_state, policy), documents, ahead=self._cfg.async_save)
        if not self._cfg.async_save:
            self.finish()
        return final

    def poll(self) -> None:
        """Completes the checkpoint being written if that has not to wait for the disk of any rank."""
        if self._save is not None:
            (writing,) = reduce_max([not self._save.written], torch.device(torch.cuda.current_device()))
            if not writing:
                self.finish()

    def finish(self) -> None:
        """Completes the checkpoint being written, if there is one."""
        save, self._save = self._save, None
        if save is not None:
            save.finish()
            _on_main(self._directory, _retire, save.final, self._cfg, self.spared)


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
    _Save(final, meta, partial(model_state, policy), documents, parts).finish()


class _Save:
    """A checkpoint on its way to the disk: begun here and finished by all ranks, written by each in between."""

    def __init__(
        self,
        final: Path,
        meta: CheckpointMeta,
        state: Callable[[], dict[str, Any]],
        documents: Callable[[Path], None],
        parts: Callable[[Path], None] = lambda _: None,
        ahead: bool = False,
    ) -> None:
        """ahead: begin to write at once, in a thread, a copy of the tensors."""
        self.final = final
        # A name of its own for every attempt: what a killed one may still be writing does not get in here.
        name = [f".writing-{final.name}-{uuid.uuid4().hex[:8]}" if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(name)
        self._temporary = temporary = final.parent / str(name[0])
        self._on_all = partial(storage.together, final.parent)
        self._future: Optional[Future[tuple[list[Any], dict[str, list[int]]]]] = None
        with _removed_on_failure(final.parent):
            _on_main(final.parent, _begin, temporary, meta, documents)
            self._on_all(partial(parts, temporary))
            self._state = storage.StateWriter(state(), temporary / "dist", self._on_all)
            if ahead:
                self._on_all(self._state.copy)
                pool = ThreadPoolExecutor(1, "checkpoint")
                self._future = pool.submit(self._write)
                pool.shutdown(wait=False)  # the thread ends with its work

    @property
    def written(self) -> bool:
        """Whether this rank's part is on the disk, or has failed."""
        return self._future is not None and self._future.done()

    def _write(self) -> tuple[list[Any], dict[str, list[int]]]:
        """Each rank reads back what it wrote: most likely it still is in the memory of its node."""
        results = self._state.write()
        own = [f for f in checkpoints.files_of(self._temporary) if _writer(f) == dist.get_rank()]
        return results, checkpoints.checksums(self._temporary, own)

    def finish(self) -> None:
        """Waits for this rank's part; the checkpoint has its name when all ranks return."""
        with _removed_on_failure(self.final.parent):
            results, sums = self._on_all(self._write if self._future is None else self._future.result)
            self._state.finish(results)
            _on_main(self.final.parent, _write_manifest, self._temporary, _gathered(sums))
            _on_main(self.final.parent, _publish, self._temporary, self.final)


def _on_main(directory: Path, action: Callable[..., None], *args: Any) -> None:
    storage.together(directory, partial(action, *args) if dist.get_rank() == 0 else lambda: None)


@contextmanager
def _removed_on_failure(directory: Path) -> Iterator[None]:
    """A checkpoint that the disk did not take makes room for the metrics of what comes next."""
    try:
        yield
    except StorageError:
        if dist.get_rank() == 0:
            checkpoints.clean(directory)
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


def _begin(temporary: Path, meta: CheckpointMeta, documents: Callable[[Path], None]) -> None:
    checkpoints.clean(temporary.parent)
    (temporary / "dist").mkdir(parents=True)
    documents(temporary)
    (temporary / "meta.json").write_text(meta.to_json())


def _publish(temporary: Path, final: Path) -> None:
    """Gives a complete checkpoint its name."""
    directory = final.parent
    if final.exists():  # a damaged one, which the run went back behind
        final.rename(directory / f".deleting-{final.name}")
    os.replace(temporary, final)
    storage.flush_one(directory)
    checkpoints.clean(directory)


def _retire(final: Path, cfg: Checkpointing, spared: Collection[int]) -> None:
    """Gives a complete checkpoint the marker, then lets older ones go."""
    directory = final.parent
    storage.replace_text(directory / LATEST, final.name)
    storage.flush_one(directory)
    checkpoints.prune(directory, checkpoints.step_of(final), cfg.keep_last, cfg.keep_every, spared)


def _gathered(mine: dict[str, Any]) -> dict[str, Any]:
    """The dictionaries of all ranks in one, on the main rank; empty elsewhere."""
    parts: Optional[list[Any]] = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts)
    return {key: value for part in parts or [] for key, value in part.items()}


def _write_manifest(checkpoint: Path, files: dict[str, list[int]]) -> None:
    """files: checksums of all but what was written last."""
    files |= checkpoints.checksums(checkpoint, (f for f in checkpoints.files_of(checkpoint) if f not in files))
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True))
    storage.flush(checkpoint)


def _writer(file: str) -> int:
    """The rank that wrote a file: `dist/__3_0.distcp` is rank 3's, all that is not sharded the main rank's."""
    name = Path(file).name
    return int(name.split("_")[2]) if name.startswith("__") else 0


def find(directory: Path, say: Callable[[str], None], until: Optional[int] = None) -> Optional[Path]:
    """The newest checkpoint, of step `until` at most, that is whole, every byte of it read; None when there is none.

    Collective: ranks share the reading, and agree. `say` gets one line for every damaged one passed over, on the
    main rank. Raises StorageError when there are checkpoints and none is whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found = [[c for c in checkpoints.newest_first(directory) if until is None or checkpoints.step_of(c) <= until]]
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
    """Fills the weights alone, from a checkpoint of any layout and either layer spec.

    Raises ConfigError, before anything is unpickled, when its metadata is not that of a checkpoint.
    """
    read_metadata(checkpoint / "dist")
    _zero_weights(policy)
    strict = StrictHandling.LOG_UNEXPECTED
    _fill_weights(policy, dist_checkpointing.load(model_state(policy), str(checkpoint / "dist"), strict=strict))


def _fill_weights(policy: MegatronPolicy, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(policy.chunks):
        load_state(chunk, loaded[f"model{index}"])
    policy.version += 1


def load(checkpoint: Path, policy: MegatronPolicy) -> CheckpointMeta:
    """Fills weights, optimizer, schedule and, at an unchanged world size, random states."""
    meta = CheckpointMeta.read(checkpoint)
    read_metadata(checkpoint / "dist")
    _zero_weights(policy)
    model = model_state(policy)
    state = {**model, "optimizer": optimizer_state(policy.optimizer, model, loading=True)}
    if meta.world_size == dist.get_world_size():
        state["random_state"] = _random_state()
    # What a rank reads is its own affair: a part of the optimizer may be read by several ranks, or not by the first.
    loaded = dist_checkpointing.load(state, str(checkpoint / "dist"), validate_access_integrity=False)
    _fill_weights(policy, loaded)
    load_optimizer_state(policy.optimizer, model_state(policy), loaded["optimizer"], loaded["optimizer_step"])
    policy.scheduler.num_steps = 0  # Megatron adds what it loads: a rollback loads in the middle of a run
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
