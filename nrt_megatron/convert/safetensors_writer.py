"""safetensors files whose tensors arrive in parts, in any order.

The library's `save_file` wants a whole file in memory. The format itself is a header with offsets and then
the raw tensors, so parts can be put in their places as they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsWriter:
    """One file of tensors that are known by shape and dtype beforehand."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        """`tensors` are on the meta device: their shapes and dtypes count, and their order."""
        # Wider dtypes first, as the library does, so that every tensor is aligned to its dtype.
        self._tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._begin: dict[str, int] = {}
        self._missing = {name: tensor.nbytes for name, tensor in tensors.items()}
        end = 0
        for name, tensor in self._tensors.items():
            self._begin[name], end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self._begin[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = open(path, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Puts rows [start, start + len(rows)) of tensor `name` in place."""
        whole = self._tensors[name]
        assert rows.dtype == whole.dtype and rows.shape[1:] == whole.shape[1:], name
        row_bytes = whole.nbytes // whole.shape[0]
        self._file.seek(self._data + self._begin[name] + start * row_bytes)
        self._file.write(rows.contiguous().view(torch.uint8).numpy().data)
        self._missing[name] -= rows.nbytes

    def close(self) -> None:
        """Flushes the file. Asserts that every tensor is complete."""
        assert not any(self._missing.values()), f"not written: {self._missing}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
