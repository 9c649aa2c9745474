"""How the tensors of a checkpoint reach the disk, and how an error on one rank becomes the same error on all."""

from __future__ import annotations

import errno
import io
import os
import queue
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from nrt_megatron.checkpoints import StorageError

T = TypeVar("T")
_FORMAT = ("torch_dist", 1)
_FILES_PER_RANK = 2
_FULL = 1 << 20
"""A disk with fewer free bytes than this counts as full when a library does not say why it could not write."""


def together(directory: Path, action: Callable[[], T]) -> T:
    """Runs `action` on this rank. Collective: when it fails on any, every rank raises the same StorageError.

    directory: where checkpoints lie, for the message.
    Only what a disk or a library that writes to it raises counts as a failure; a mistake in the program passes
    through.
    """
    failure, result = None, None
    try:
        result = action()
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, (OSError, RuntimeError)):
            raise
        failure = error
    reasons: list[Optional[str]] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if failure is None else _reason(failure, directory))
    told = next((reason for reason in reasons if reason), None)
    if told is not None:
        raise StorageError(
            f"run_dir: cannot write a checkpoint to {directory}: {told}; make room or set another run_dir, then start "
            "again: the run continues from its last complete checkpoint"
        ) from failure
    return result  # type: ignore[return-value]


def _reason(error: BaseException, directory: Path) -> str:
    """Why a write failed, in the system's words where they can be found."""
    seen: Optional[BaseException] = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return f"{os.strerror(seen.errno)} ({errno.errorcode.get(seen.errno, seen.errno)})"
        seen = seen.__cause__ or seen.__context__
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if shutil.disk_usage(there).free < _FULL:
        return f"{os.strerror(errno.ENOSPC)} (ENOSPC)"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class _PlannedWrite(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the plan of who writes what; the writing is `StateWriter`'s."""

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: tuple) -> AsyncRequest:
        self.writer = writer
        _, self.metadata, self.group = planned
        return AsyncRequest(None, (), [])


class StateWriter:
    """Writes a sharded state dict to the empty `directory` in Megatron's format `torch_dist`.

    As `dist_checkpointing.save`, but from threads of this process: Megatron forks a process for each file, off a
    process with a GPU and threads, and gathers results through a server process. Those live on when their rank is
    killed, and lose the cause of an error.

    Ranks that hold copies of the same tensors share the writing, by bytes.

    Making one plans the files and writes what is equal on all ranks, and is collective like `finish`; what may fail
    on one rank is run by `on_all` (see `together`). `copy` and `write` are this rank's own affair.
    """

    def __init__(self, state: dict[str, Any], directory: Path, on_all: Callable[[Callable[[], Any]], Any]) -> None:
        # Megatron asks for a queue between processes while it plans; one that starts no process will do.
        filesystem_async._results_queue = queue.SimpleQueue()
        self._on_all, self._main = on_all, dist.get_rank() == 0
        # That every shard is written once is checked behind the sharing.
        sharded, common = save_preprocess(state, validate_access_integrity=False)
        on_all((lambda: _write_common(common, directory)) if self._main else lambda: None)
        self._plan = _PlannedWrite(*_FORMAT, thread_count=_FILES_PER_RANK)
        copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
        FullyParallelSaveStrategyWrapper(self._plan, copies).async_save(sharded, directory)
        self._buckets = self._plan.writer.write_buckets or []
        self._plan.writer.write_buckets = []  # or they would hold the tensors until the end

    def copy(self) -> None:
        """Takes the tensors to host memory of their own, so that training can go on changing the model's."""
        self._buckets = [(*names, (blobs, _copies(tensors))) for *names, (blobs, tensors) in self._buckets]
        torch.cuda.synchronize()

    def write(self) -> list[WriteResult]:
        """Writes and flushes this rank's files side by side. Raises the first error."""
        buckets, self._buckets = self._plan.writer.preload_tensors(self._buckets, non_blocking=False), []
        if not buckets:
            return []
        with ThreadPoolExecutor(len(buckets)) as pool:
            written = list(pool.map(partial(_write_file, [self._plan.writer.transforms]), buckets))
        return [item for results in written for item in results]

    def finish(self, results: list[WriteResult]) -> None:
        """Writes the metadata, which says where every rank's tensors lie. results: of `write`."""
        gathered = self._plan.group.gather_object(results)
        plan = self._plan
        self._on_all((lambda: plan.writer.finish(plan.metadata, gathered)) if self._main else lambda: None)


def _copies(tensors: list[tuple[WriteItem, torch.Tensor]]) -> list[tuple[WriteItem, torch.Tensor]]:
    """On the host; off a GPU through pinned memory and, until it is synchronised, still on their way."""
    return [(item, tensor.to("cpu", non_blocking=True, copy=True)) for item, tensor in tensors]


def _write_common(common: dict[str, Any], directory: Path) -> None:
    """What is equal on all ranks. Small: serialised in memory first, so that an error of the disk is its own."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    (directory / COMMON_STATE_FNAME).write_bytes(buffer.getbuffer())
    save_config(CheckpointingConfig(*_FORMAT), str(directory))


def _write_file(transforms: list[Any], bucket: WriteBucket) -> list[WriteResult]:
    results: queue.SimpleQueue = queue.SimpleQueue()
    pending: queue.Queue = queue.Queue()
    pending.put(0)
    # Not as decorated: that stops the garbage collection of the whole process, which a forked writer needs.
    FileSystemWriterAsync.write_preloaded_data.__wrapped__(transforms, 0, bucket, results, pending, use_fsync=True)
    written = results.get()[1]
    if isinstance(written, Exception):
        raise written
    return written


def flush(directory: Path) -> None:
    """Waits until files and folders below `directory` are on the disk. Raises OSError."""
    for path in [*directory.rglob("*"), directory]:
        flush_one(path)


def flush_one(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_text(path: Path, text: str) -> None:
    """Replaces a small file as a whole. Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
