"""Where checkpoints lie, what their `meta.json` says and whether they are whole; readable without torch.

A checkpoint directory `step_00000010` holds `dist/` (weights, optimizer, schedule, random states), `meta.json`,
`recipe.yaml`, `tokenizer/` and, written last, `manifest.json` with the size and CRC-32 of every other file. It is
written under a temporary name and renamed, so that a name `step_*` that is not whole has been damaged since.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from nrt_megatron.recipe import ConfigError

FORMAT = "nrt-megatron/1"
LATEST = "latest"
MANIFEST = "manifest.json"
_UNFINISHED = (".writing-*", ".deleting-*")
_BLOCK = 1 << 22


class StorageError(ConfigError):
    """The disk did not take a checkpoint, or holds a damaged one; exit code 2 like every error the user can mend."""


@dataclass(frozen=True)
class CheckpointMeta:
    """`meta.json` of a checkpoint."""

    step: int
    world_size: int
    model: dict[str, Any]
    """The model's Hugging Face config, vocabulary as trained."""
    kind: str = "train"
    """`train`, or `convert` and `replay` for weights alone."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Of a training run, in JSON types: where the sampler stands, and what else is equal on all ranks."""
    format: str = FORMAT

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, checkpoint: Path) -> CheckpointMeta:
        """Raises ConfigError when the directory is not a complete checkpoint of this format."""
        path = checkpoint / "meta.json"
        try:
            meta = json.loads(path.read_text())
        except (OSError, ValueError):
            of_run = newest_first(checkpoint / "checkpoints")
            named = f", such as {of_run[0]}" if of_run else " written by `nrt train` or `nrt convert`"
            is_hf = (checkpoint / "config.json").is_file() and not path.exists()
            problem = f"{checkpoint}: a Hugging Face model already" if is_hf else f"{path}: not readable"
            raise ConfigError(f"{problem}; give a checkpoint{named}") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            found = meta.get("format") if isinstance(meta, dict) else None
            raise ConfigError(f"{path}: format {found!r} is not {FORMAT!r}; convert the checkpoint again")
        try:
            return cls(
                **{key: meta[key] for key in ("step", "world_size", "model", "kind")}, progress=meta.get("progress", {})
            )
        except KeyError as error:
            raise ConfigError(f"{path}: has no {error}; convert the checkpoint again") from None


def step_dir(directory: Path, step: int) -> Path:
    """`directory/step_00000010`"""
    return directory / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_first(directory: Path) -> list[Path]:
    """Every checkpoint below `directory` by its name, whole or not."""
    found = [path for path in directory.glob("step_*") if path.name.removeprefix("step_").isdecimal() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint of this project rather than a Hugging Face directory."""
    return (path / "meta.json").is_file() and (path / "dist").is_dir()


def files_of(checkpoint: Path) -> list[str]:
    """Names of its files relative to it, the manifest left out, sorted."""
    files = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def checksums(checkpoint: Path, files: Iterable[str]) -> dict[str, list[int]]:
    """name -> [bytes, CRC-32] as in the manifest. Holds one block in memory. Raises OSError."""
    return {name: _checksum(checkpoint / name) for name in files}


def _checksum(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def damage(checkpoint: Path, *, contents: bool = False, part: tuple[int, int] = (0, 1)) -> Optional[str]:
    """What is wrong with a checkpoint in a few words, None when nothing is found.

    Compares its files with the manifest: that all are there with the right size and, with `contents`, the right
    checksum. Of `part` = (i, n) only every n-th file from the i-th on is looked at, so that n ranks share the work.
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name in sorted(listed)[part[0] :: part[1]]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST} names files outside the checkpoint"
            size, crc = listed[name]
            there = (checkpoint / name).stat().st_size
            if there != size:
                return f"{name} has {there} of {size} bytes"
            if contents and _checksum(checkpoint / name)[1] != crc:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is broken"
    return None


def newest_whole(directory: Path) -> Optional[Path]:
    """The newest checkpoint whose files are all there in full length, None when there is no checkpoint at all.

    Contents are not read. Raises StorageError when there are checkpoints and none is whole.
    """
    found = newest_first(directory)
    whole = next((checkpoint for checkpoint in found if damage(checkpoint) is None), None)
    if found and whole is None:
        raise none_whole(directory, damage(found[0]) or "")
    return whole


def none_whole(directory: Path, newest: str) -> StorageError:
    """The error for a run that has lost every checkpoint; `newest` is what is wrong with the newest one."""
    return StorageError(
        f"run_dir: no checkpoint in {directory} is whole (of the newest, {newest}); "
        f"restore one, or move {directory} away to begin again"
    )


def prune(directory: Path, step: int, keep_last: int, keep_every: int, spared: Collection[int] = frozenset()) -> None:
    """Deletes checkpoints before `step`, of which one is complete, but the `keep_last` newest, multiples of
    `keep_every` (0: none of these) and the steps `spared`; and those after it, which the run found damaged and went
    back behind. Raises OSError.
    """
    found = newest_first(directory)
    kept = [path for path in found if step_of(path) <= step]
    stay = {step_of(path) for path in kept if keep_every and step_of(path) % keep_every == 0}.union(spared)
    kept = kept[:keep_last] + [path for path in kept[keep_last:] if step_of(path) in stay]
    _let_go(path for path in found if path not in kept)
    clean(directory)


def abandon(directory: Path, step: int) -> None:
    """Deletes checkpoints after `step`, newest first: whichever moment this is cut short in, the newest that is left is
    one of the same run. Raises OSError."""
    found = newest_first(directory)
    _let_go(path for path in found if step_of(path) > step)
    clean(directory)


def _let_go(checkpoints: Iterable[Path]) -> None:
    """A directory loses its name first, so that a half-deleted one is never taken for a checkpoint."""
    for path in checkpoints:
        path.rename(path.with_name(f".deleting-{path.name}"))


def clean(directory: Path) -> None:
    """Removes what a killed run left half written or half deleted. What cannot be removed now is left for later."""
    for pattern in _UNFINISHED:
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
