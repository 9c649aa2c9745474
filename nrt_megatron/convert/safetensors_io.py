"""Lazy reading of a Hugging Face directory's safetensors files, checked against the table before use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nrt_megatron.convert import names
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.recipe import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """`float32`, `bfloat16`, `float16`, or the safetensors code of a dtype that is not supported."""


class TensorReader(Protocol):
    """Named tensors of which parts can be read."""

    tensors: dict[str, TensorInfo]

    def check(self, shape: ModelShape) -> None:
        """Raises ConfigError unless the tensors are those of a model of this shape."""

    def read(self, name: str, *index: slice) -> Tensor:
        """The tensor, or the part that `index` selects."""


class HFWeights:
    """The tensors of a Hugging Face directory. Opening it reads headers only; `read` reads one slice."""

    def __init__(self, directory: str | Path):
        """Raises ConfigError for a missing or truncated file, or a directory without safetensors."""
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        index = self.directory / INDEX
        if index.is_file():
            self._open_sharded(index)
        elif (self.directory / SINGLE).is_file():
            self.tensors = _headers(self.directory / SINGLE)
        else:
            raise ConfigError(_no_weights(self.directory))

    def _open_sharded(self, index: Path) -> None:
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
            raise ConfigError(f"{index}: not a safetensors index; download it again") from None
        for name in sorted(set(weight_map.values())):
            path = self.directory / name
            if path.name != name or not path.is_file():
                raise ConfigError(f"{path}: missing, but {INDEX} names it; download the shard")
            found = _headers(path)
            for tensor in found:
                if weight_map.get(tensor) != name:
                    raise ConfigError(f"{path}: holds {tensor}, which {INDEX} does not place there")
            self.tensors.update(found)
        absent = sorted(set(weight_map) - set(self.tensors))
        if absent:
            raise ConfigError(
                f"{self.directory / weight_map[absent[0]]}: lacks {absent[0]}, which {INDEX} places there"
            )

    def check(self, shape: ModelShape) -> None:
        """Every tensor of the table is there with its shape, and no other one. Raises ConfigError.

        A tied checkpoint may carry an `lm_head.weight`, which transformers ignores too.
        """
        expected = names.hf_shapes(shape)
        for name, size in expected.items():
            info = self.tensors.get(name)
            if info is None:
                raise ConfigError(f"{self.directory}: tensor {name} is missing; the checkpoint is incomplete")
            if info.shape != size:
                problem = f"{name} has shape {list(info.shape)}, config.json says {list(size)}"
                raise ConfigError(f"{info.file}: {problem}; put the config.json of these weights beside them")
            if info.dtype not in _DTYPES.values():
                raise ConfigError(
                    f"{info.file}: {name} is {info.dtype}; save the model in float32, bfloat16 or float16"
                )
        for name, info in self.tensors.items():
            tied_copy = name == names.HF_OUTPUT and shape.tie_word_embeddings
            if name in expected or tied_copy or name.endswith(names.IGNORED_HF_SUFFIX):
                continue
            what = "a bias, which is not supported" if name.endswith(".bias") else f"not part of a {shape.family} model"
            raise ConfigError(f"{info.file}: tensor {name} is {what}; use a checkpoint that matches its config.json")

    def read(self, name: str, *index: slice) -> Tensor:
        """The tensor, or the part that `index` selects, in the file's dtype and in memory of its own.

        The file is opened for this one read: pages of a mapping that stays open count as resident memory.
        """
        with safe_open(str(self.tensors[name].file), framework="pt") as file:
            part = file.get_slice(name)
            return part[index or slice(None)].clone()


def _headers(path: Path) -> dict[str, TensorInfo]:
    """What the header of one file says. Opening also checks the file's length against it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: TensorInfo(path, tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: truncated or not a safetensors file ({error}); download it again") from None


def _no_weights(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: not a directory"
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        return (
            f"{directory}: pickle weights (.bin) are refused because loading them can run code;\n"
            "load the model with transformers where you trust it and save_pretrained(..., safe_serialization=True)"
        )
    return f"{directory}: holds neither {SINGLE} nor {INDEX}; give a directory with the model's weights"
