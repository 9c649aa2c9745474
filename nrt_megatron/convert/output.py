"""Directories that are complete or absent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nrt_megatron.recipe import ConfigError


@contextmanager
def new_directory(path: Path, num_bytes: int) -> Iterator[Path]:
    """Yields an empty directory beside `path` that becomes `path` when the block ends without an error.

    On an error, or an interrupt, it is removed. A killed process leaves `.NAME.partial-PID`, which nothing
    loads. Raises ConfigError when `path` is in use or the disk has no room for `num_bytes`, at the start
    where that can be known.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path}: exists and is not an empty directory; name another one or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise ConfigError(f"{path}: needs {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; use another disk")
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"{path}: the disk is full; use another disk") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
