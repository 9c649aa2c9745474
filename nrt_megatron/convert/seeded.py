"""Random weights that depend on the seed and the tensor's name alone, so on no layout."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.names import hf_shapes
from nrt_megatron.convert.safetensors_io import TensorInfo


class SeededWeights:
    """Reads like `HFWeights` of a fresh transformers model: normal with `initializer_range`, norms at 1.

    A tensor is drawn whole whenever a part of it is read; models of a size that matters start from files.
    """

    def __init__(self, shape: ModelShape, seed: int):
        self.seed = seed
        self.std = float(shape.original.get("initializer_range", 0.02))
        self.tensors = {name: TensorInfo(Path("seeded"), size, "float32") for name, size in hf_shapes(shape).items()}

    def check(self, shape: ModelShape) -> None:
        """Nothing to check: the tensors are made from the shape."""

    def read(self, name: str, *index: slice) -> Tensor:
        """float32 part `index` of tensor `name`."""
        size = self.tensors[name].shape
        if len(size) == 1:
            return torch.ones(size)[index]
        generator = torch.Generator().manual_seed(self.seed * 2**32 + zlib.crc32(name.encode()))
        return (torch.randn(size, generator=generator) * self.std)[index]
