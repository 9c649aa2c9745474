"""The rollbacks of a run on disk: one folder each, `run_dir/rollbacks/1` for the first.

A folder holds the rows of metrics and samples of the steps that were given up and, written last, `rollback.json`.
From then on the rollback counts: a run that is killed in the middle of one either makes it again, from the same
numbers, or finds it here and continues behind it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nrt_megatron.recipe import ConfigError
from nrt_megatron.report.jsonl import read_rows

FOLDER = "rollbacks"
_RECORD = "rollback.json"


@dataclass(frozen=True)
class Rollback:
    """`rollback.json`"""

    number: int
    """From 1."""
    to_step: int
    """Step of the checkpoint that the run went back to."""
    from_step: int
    """The last step that was given up."""
    why: str
    sampler: dict[str, Any]
    """Where the data order stood after the given-up steps, and goes on."""

    def __str__(self) -> str:
        return f"rollback {self.number}: from step {self.from_step} back to step {self.to_step} ({self.why})"


def after(run_dir: Path, number: int) -> list[Rollback]:
    """The rollbacks on disk after the first `number`, in order. Raises ConfigError for one that cannot be read."""
    paths = (run_dir / FOLDER).glob(f"*/{_RECORD}")
    return [found for found in sorted(map(_read, paths), key=lambda rollback: rollback.number) if found.number > number]


def _read(path: Path) -> Rollback:
    try:
        return Rollback(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ConfigError(
            f"{path}: no record of a rollback; restore the file, or remove its folder to continue without it"
        ) from None


def keep_rows(run_dir: Path, rollback: Rollback, files: tuple[str, ...]) -> None:
    """Copies the rows that will be cut from `files` into the rollback's folder. Raises OSError."""
    folder = run_dir / FOLDER / str(rollback.number)
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        with (folder / name).open("wb") as file:
            file.writelines(line for line, row in read_rows(run_dir / name) if row["step"] > rollback.to_step)
            os.fsync(file.fileno())


def write(run_dir: Path, rollback: Rollback) -> None:
    """Makes a rollback count, at once. Raises OSError."""
    path = run_dir / FOLDER / str(rollback.number) / _RECORD
    temporary = path.with_name(f".{_RECORD}.new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(rollback), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def forget(run_dir: Path) -> None:
    """Removes those of an earlier run in the same directory. Raises OSError."""
    if (run_dir / FOLDER).exists():
        shutil.rmtree(run_dir / FOLDER)
