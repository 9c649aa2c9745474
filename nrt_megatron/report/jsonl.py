"""Files of one JSON object a line that survive a killed run and are cut back when one is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nrt_megatron.recipe import ConfigError


def read_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line as it is in the file, its object), in order; nothing when there is no file.

    A last line without its newline is what a killed run leaves, and is left out. Raises ConfigError for any
    other line that is no JSON object with a whole-numbered `step`.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ConfigError(
                    f"{path} line {number} is no metrics row of this program; restore the file or move it away"
                )
            yield line, row


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); make room or correct run_dir, then start again: the run"
            " continues from its last checkpoint"
        ) from None


class StepLog:
    """Appends rows to a file; each is on disk when `append` returns. Raises ConfigError when the disk refuses.

    resume_step: rows of later steps are removed first (all rows when None, which is a new run). The rows that
    stay keep their bytes, and the file is replaced as a whole or not at all.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._keep_until(-1 if resume_step is None else resume_step)
            # Unbuffered: a row that could not be written must not come back when the file is closed.
            self._file = path.open("ab", buffering=0)

    def _keep_until(self, step: int) -> None:
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with temporary.open("wb") as file:
            if step >= 0:
                file.writelines(line for line, row in read_rows(self._path) if row["step"] <= step)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row."""
        rest = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with _disk_errors(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; rows are on disk already."""
        self._file.close()
