"""Megatron's `torch_dist` checkpoints without Megatron: written and read one chunk at a time.

The format is torch's distributed checkpoint: `.metadata` maps keys to chunks (an offset and a size in the
whole tensor) and chunks to places in `*.distcp` files, where each is one `torch.save`. Megatron stacks the
layers of a homogeneous model under one key with a leading layer axis, and adds `metadata.json` and
`common.pt`. How a tensor is cut into chunks is free: a reader of any layout takes what overlaps its part.
Megatron's own `dist_checkpointing.save` would need every tensor in memory at once.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nrt_megatron.convert.dcp_metadata import read_metadata
from nrt_megatron.convert.names import LAYER_PREFIX
from nrt_megatron.recipe import ConfigError

_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
FILE_BYTES = 4 << 30
"""A new `.distcp` file is begun after this many bytes."""

# Modules whose `_extra_state` Megatron expects in a checkpoint (empty without FP8), under either layer spec.
_EXTRA_STATE_LAYERS = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


class TorchDistWriter:
    """Writes chunks to `directory`, which must be empty. Until `finish` nothing can load it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._metadata = Metadata(state_dict_metadata={}, storage_data={}, version=CURRENT_DCP_VERSION)
        self._files = 0
        self._stream: Optional[io.BufferedWriter] = None

    def add(self, key: str, chunk: Tensor, offsets: tuple[int, ...], size: tuple[int, ...]) -> None:
        """Writes a chunk that starts at `offsets` of the whole tensor `key` of `size` (same number of axes)."""
        place, whole = torch.Size(offsets), torch.Size(size)
        entry = self._metadata.state_dict_metadata.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), whole, chunks=[])
        )
        assert entry.size == whole and entry.properties.dtype == chunk.dtype, f"{key}: chunks disagree"
        index = MetadataIndex(key, place, index=len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(place, chunk.shape))
        self._store(index, chunk)

    def add_extra_states(self, num_layers: int) -> None:
        """The empty `_extra_state` of every module that has one."""
        keys = [
            f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
            for layer in range(num_layers)
            for module in _EXTRA_STATE_LAYERS
        ]
        for key in [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]:
            self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
            self._store(MetadataIndex(key), [None])

    def finish(self) -> None:
        """Flushes the files and writes the metadata; the directory can be loaded afterwards."""
        self._close()
        torch.save({}, self.directory / "common.pt")
        with open(self.directory / ".metadata", "wb") as file:
            pickle.dump(self._metadata, file)
            _sync(file)
        (self.directory / "metadata.json").write_text(json.dumps(_CONFIG))

    def _store(self, index: MetadataIndex, value: object) -> None:
        if self._stream is None or self._stream.tell() >= FILE_BYTES:
            self._close()
            self._name = f"__0_{self._files}.distcp"
            self._stream = open(self.directory / self._name, "wb")
            self._files += 1
        start = self._stream.tell()
        torch.save(value, self._stream)
        self._metadata.storage_data[index] = _StorageInfo(self._name, start, self._stream.tell() - start)

    def _close(self) -> None:
        if self._stream is not None:
            _sync(self._stream)
            self._stream.close()
            self._stream = None


class _ReadInto(DefaultLoadPlanner):
    """Sends every read into one tensor that is part of a larger one."""

    def __init__(self, target: Tensor):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = zip(read_item.dest_offsets, read_item.lengths)
        return self.target[tuple(slice(start, start + length) for start, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class TorchDistReader:
    """Reads parts of whole tensors from a checkpoint saved at any layout.

    Raises ConfigError when the directory is no such checkpoint, or its metadata is not (see `dcp_metadata`).
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._reader = FileSystemReader(directory)
        metadata = read_metadata(directory)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise ConfigError(f"{self.directory}: holds no {key}; it is a checkpoint of another model")
        return self._tensors[key]

    def size(self, key: str) -> tuple[int, ...]:
        """Size of the whole tensor, layer axis and vocabulary padding included."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def chunk_rows(self, key: str) -> int:
        """Rows of the highest chunk: reading in such steps loads no chunk twice where chunks lie on a grid."""
        axis = 1 if key.startswith(LAYER_PREFIX) else 0
        return max(chunk.sizes[axis] for chunk in self._entry(key).chunks)

    def read(self, key: str, offsets: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The part of `size` at `offsets`. Raises ConfigError when a file is missing or broken."""
        target = torch.empty(size, dtype=self.dtype(key))
        part = ChunkStorageMetadata(torch.Size(offsets), torch.Size(size))
        items = create_read_items_for_chunk_list(key, self._entry(key), [part])
        assert sum(item.lengths.numel() for item in items) == target.numel(), f"{key}: chunks do not cover {part}"
        try:
            self._reader.read_data(LoadPlan(items), _ReadInto(target))
        except (OSError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{self.directory}: {key} cannot be read ({reason}); the checkpoint is damaged") from None
        return target


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
