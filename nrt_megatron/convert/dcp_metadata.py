"""The `.metadata` of a `torch_dist` checkpoint, which is a pickle, read as data.

Torch and Megatron unpickle it as it comes, so that a checkpoint could run whatever its author put there. Here it is
unpickled with a list of the classes that torch's checkpoints are made of, before Megatron sees it.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from nrt_megatron.recipe import ConfigError

_DCP = "torch.distributed.checkpoint."
ALLOWED: dict[str, tuple[str, ...]] = {
    f"{_DCP}metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}filesystem": ("_StorageInfo",),
    f"{_DCP}planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
}
"""Module -> names that a `.metadata` may refer to, beside torch's dtypes."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Looks up what the pickle names. Raises UnpicklingError for all that is not on the list."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_metadata(directory: Path) -> Metadata:
    """The metadata of a checkpoint's `dist` directory.

    Raises ConfigError when it is missing or broken, refers to anything but a checkpoint's classes, or places tensors
    in files outside the directory.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path}: not the metadata of a checkpoint ({error}); use another checkpoint") from None
    except (OSError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError):
        raise ConfigError(f"{directory}: no complete torch_dist checkpoint; give one written by nrt") from None
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"{path}: not the metadata of a checkpoint; use another checkpoint")
    for info in (metadata.storage_data or {}).values():
        if PurePath(info.relative_path).name != info.relative_path:
            raise ConfigError(f"{path}: names a file outside its directory; use another checkpoint")
    return metadata
