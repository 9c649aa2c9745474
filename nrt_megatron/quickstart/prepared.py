"""Directories that are complete or absent: made beside their place, renamed into it, described by PREPARED.json."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nrt_megatron.recipe import ConfigError

RECORD = "PREPARED.json"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_prepared(target: Path, settings: dict[str, Any]) -> bool:
    """Whether `target` was made with `settings` and is unchanged; False when there is nothing.

    Raises ConfigError when something else is there: nothing is ever overwritten or deleted.
    """
    if not target.exists():
        return False
    again = f"delete {target} to have it made again"
    try:
        record = json.loads((target / RECORD).read_text())
        files, made_with = dict(record["files"]), record["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"prepare: {target} exists without a readable {RECORD}; move it away or {again}") from None
    if made_with != settings:
        raise ConfigError(f"prepare: {target} was made with other settings (see its {RECORD}); {again}")
    for name, digest in files.items():
        path = target / name
        if not path.is_file() or sha256(path) != digest:
            raise ConfigError(
                f"prepare: {path} was changed or removed; {again}, or drop `prepare` from the recipe to use it as it is"
            )
    return True


def make(target: Path, settings: dict[str, Any], build: Callable[[Path, Path], dict[str, Any]]) -> None:
    """Runs `build(directory, scratch)` beside `target` and renames the directory into place; scratch is deleted.

    `build` returns what it measured, kept in PREPARED.json next to the settings and the files' digests. When
    another process made the same in the meantime, its result stays. Raises ConfigError when the disk is full or
    closed to us.
    """
    try:
        _make(target, settings, build)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise ConfigError(
            f"prepare: {target} cannot be made ({error.strerror}); make room for it or start in another directory"
        ) from None


def _make(target: Path, settings: dict[str, Any], build: Callable[[Path, Path], dict[str, Any]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new, scratch = work / "new", work / "scratch"
        new.mkdir()
        scratch.mkdir()
        measured = build(new, scratch)
        files = {p.relative_to(new).as_posix(): sha256(p) for p in sorted(new.rglob("*")) if p.is_file()}
        record = {"settings": settings, "measured": measured, "files": files}
        (new / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        try:
            new.rename(target)
        except OSError:
            if not is_prepared(target, settings):
                raise
    finally:
        shutil.rmtree(work)
