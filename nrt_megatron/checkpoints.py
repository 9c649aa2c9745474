"""Where checkpoints lie and what their `meta.json` says; readable without torch, so before ranks start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from nrt_megatron.recipe import ConfigError

FORMAT = "nrt-megatron/1"
LATEST = "latest"


class StorageError(ConfigError):
    """The disk did not take a checkpoint; exit code 2 like every error that the user can mend."""


@dataclass(frozen=True)
class CheckpointMeta:
    """`meta.json` of a checkpoint."""

    step: int
    world_size: int
    model: dict[str, Any]
    """The model's Hugging Face config, vocabulary as trained."""
    kind: str = "train"
    """`train`, or `convert` for weights alone."""
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
            raise ConfigError(f"{path}: not readable; give a checkpoint written by `nrt train` or `nrt convert`") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ConfigError(f"{path}: format {meta.get('format')!r} is not {FORMAT!r}; convert the checkpoint again")
        return cls(**{key: meta[key] for key in ("step", "world_size", "model", "kind")})


def step_dir(directory: Path, step: int) -> Path:
    """`directory/step_00000010`"""
    return directory / f"step_{step:08d}"


def latest(directory: Path) -> Optional[Path]:
    """The newest complete checkpoint below `directory`, None when there is none.

    Normally the one that the marker names; the marker is written last, so after a crash between rename and
    marker the directory that is newer than it counts too.
    """
    complete = sorted(path for path in directory.glob("step_*") if (path / "meta.json").is_file())
    return complete[-1] if complete else None


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint of this project rather than a Hugging Face directory."""
    return (path / "meta.json").is_file() and (path / "dist").is_dir()
