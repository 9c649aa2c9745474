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
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
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
    """Megatron's strategy up to the plan of who writes what; the writing is `write_state`'s."""

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: tuple) -> AsyncRequest:
        self.writer = writer
        _, self.metadata, self.group = planned
        return AsyncRequest(None, (), [])


def write_state(state: dict[str, Any], directory: Path, on_all: Callable[[Callable[[], T]], T]) -> None:
    """Writes a sharded state dict to the empty `directory` in Megatron's format `torch_dist`. Collective.

    As `dist_checkpointing.save`, but from threads of this process: Megatron forks a process for each file, off a
    process with a GPU and threads, and gathers results through a server process. Those live on when their rank is
    killed, and lose the cause of an error. What may fail on one rank is run by `on_all` (see `together`).
    """
    # Megatron asks for a queue between processes while it plans; one that starts no process will do.
    filesystem_async._results_queue = queue.SimpleQueue()
    main = dist.get_rank() == 0
    sharded, common = save_preprocess(state, validate_access_integrity=True)
    on_all((lambda: _write_common(common, directory)) if main else lambda: None)
    plan = _PlannedWrite(*_FORMAT, thread_count=_FILES_PER_RANK)
    plan.async_save(sharded, directory)
    results = on_all(lambda: _write_files(plan.writer))
    gathered = plan.group.gather_object(results)
    on_all((lambda: plan.writer.finish(plan.metadata, gathered)) if main else lambda: None)


def _write_common(common: dict[str, Any], directory: Path) -> None:
    """What is equal on all ranks. Small: serialised in memory first, so that an error of the disk is its own."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    (directory / COMMON_STATE_FNAME).write_bytes(buffer.getbuffer())
    save_config(CheckpointingConfig(*_FORMAT), str(directory))


def _write_files(writer: FileSystemWriterAsync) -> list[WriteResult]:
    """Writes and flushes this rank's files side by side. Raises the first error."""
    if not writer.write_buckets:
        return []
    buckets = writer.preload_tensors(writer.write_buckets)
    results: queue.SimpleQueue = queue.SimpleQueue()
    pending: queue.Queue = queue.Queue()
    with ThreadPoolExecutor(len(buckets)) as pool:
        write = partial(writer.write_preloaded_data, [writer.transforms], use_fsync=True)
        for index, _ in enumerate(buckets):
            pending.put(index)
        for _ in pool.map(lambda bucket: write(*bucket, results, pending), enumerate(buckets)):
            pass  # what it could not hand over in `results` is raised here
    written = [results.get()[1] for _ in buckets]
    for result in written:
        if isinstance(result, Exception):
            raise result
    return [item for result in written for item in result]


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
