"""Rows of JSONL and Parquet files at random, without holding the file in memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, Union

from nrt_megatron.data.example import BadRow
from nrt_megatron.recipe import ConfigError, MissingFileError

CACHED_BYTES = 256 * 2**20
"""Decoded Parquet row groups that are kept, at least one."""

_SAMPLED_BYTES = 2**16


class Source(Protocol):
    """A file of rows. What cannot be decoded comes as a BadRow in the row's place."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[Any]:
        """Decoded rows, in the order asked for."""
        ...

    def scan(self) -> Iterator[Any]:
        """All decoded rows, in the order of the file."""
        ...

    def place(self, row: int) -> str:
        """Where a user finds the row in the file."""
        ...


class JsonLines:
    """One JSON object a line; lines of white space are no rows. Keeps 8 bytes a row in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._starts = array("q")
        offset = 0
        for line in self._file:
            if not line.isspace():
                self._starts.append(offset)
            offset += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, rows: Sequence[int]) -> list[Any]:
        decoded = []
        for row in rows:
            self._file.seek(self._starts[row])
            decoded.append(_decode(self._file.readline()))
        return decoded

    def scan(self) -> Iterator[Any]:
        with self._path.open("rb") as lines:
            yield from (_decode(line) for line in lines if not line.isspace())

    def place(self, row: int) -> str:
        with self._path.open("rb") as lines:
            offset = 0
            for number, line in enumerate(lines, start=1):
                if offset == self._starts[row]:
                    return f"line {number}"
                offset += len(line)
        raise AssertionError(f"row {row} is not in the index")


class Parquet:
    """A Parquet file, read by row groups. Only the columns asked for are read.

    Shuffled reading decodes a row group for each few rows, so row groups of about 1,000 rows serve best.

    Args:
        columns: names of the columns with questions, answers and messages.

    Raises:
        ConfigError: the file cannot be read as Parquet, or has neither questions with answers nor messages.
    """

    def __init__(self, path: Path, key: str, columns: tuple[str, str, str]) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError.at(key, str(path), f"not a Parquet file ({reason:.120})", "write it again") from None
        there = self._file.schema_arrow.names
        self._columns = [name for name in there if name in columns]
        question, answer, messages = columns
        if not {question, answer} <= set(there) and messages not in there:
            problem = f"no {question!r} and {answer!r}, and no {messages!r}, among its columns {', '.join(there):.200}"
            remedy = "set data.question_key and data.answer_key, or data.messages_key, to names that are there"
            raise ConfigError.at(key, str(path), problem, remedy)
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._ends = list(accumulate(sizes))
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, rows: Sequence[int]) -> list[Any]:
        found: dict[int, Any] = {}
        for row in sorted(set(rows)):  # Each row group is decoded once for all its rows.
            group = bisect_right(self._ends, row)
            start = self._ends[group - 1] if group else 0
            found[row] = self._group(group).slice(row - start, 1).to_pylist()[0]
        return [found[row] for row in rows]

    def scan(self) -> Iterator[Any]:
        for batch in self._file.iter_batches(batch_size=1024, columns=self._columns):
            yield from batch.to_pylist()

    def place(self, row: int) -> str:
        return f"row group {bisect_right(self._ends, row)}"

    def _group(self, group: int) -> Any:
        if group not in self._cache:
            self._cache[group] = self._file.read_row_group(group, columns=self._columns)
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > CACHED_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def open_source(path: Union[str, Path], key: str, columns: tuple[str, str, str]) -> Source:
    """Open a data file by its first bytes, whatever its name.

    Raises:
        ConfigError: no such file, no rows, or neither JSONL nor Parquet.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError.at(key, str(path), "no such file", "name a JSONL or Parquet file")
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK", b"BZh")):
        raise ConfigError.at(key, str(path), "the file is compressed", "unpack it to JSONL or Parquet")
    is_parquet = head == b"PAR1" or path.suffix == ".parquet"
    source: Source = Parquet(path, key, columns) if is_parquet else JsonLines(path)
    if len(source) == 0:
        raise ConfigError.at(key, str(path), "the file has no rows", "name a file with question-answer pairs")
    return source


def fingerprint(path: Union[str, Path], rows: int) -> dict[str, Any]:
    """What tells a data file from another: its size, its rows, and a hash of its first and last 64 KiB."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_SAMPLED_BYTES))
        file.seek(max(0, size - _SAMPLED_BYTES))
        digest.update(file.read(_SAMPLED_BYTES))
    return {"bytes": size, "rows": rows, "sha256": digest.hexdigest()}


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        if line.strip() in (b"[", b"{"):
            reason = "each row must stand on a line of its own, as one JSON object"
        return BadRow("malformed", f"not JSON: {reason}")
