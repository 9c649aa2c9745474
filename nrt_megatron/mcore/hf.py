"""Filling Megatron modules from a Hugging Face directory, each rank reading only its own part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional, Union

import torch
from torch import Tensor

from nrt_megatron.convert import names
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.layout import read_shard
from nrt_megatron.convert.safetensors_io import HFWeights, TensorReader
from nrt_megatron.convert.vocabulary import NewTokens, read_rows
from nrt_megatron.mcore.precision import set_weight

WeightSource = Union[str, Path, TensorReader]
"""A Hugging Face directory, or something that reads like one."""


def global_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of one GPTModel (a pipeline stage or a virtual chunk of it) with global layer numbers.

    Megatron numbers the layers of a chunk from 0; `layer_number` says where a layer is in the model, from 1.
    """
    for name, parameter in chunk.named_parameters():
        if name.startswith(names.LAYER_PREFIX):
            local, rest = name.removeprefix(names.LAYER_PREFIX).split(".", 1)
            name = f"{names.LAYER_PREFIX}{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
        yield name, parameter


def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module],
    shape: ModelShape,
    source: WeightSource,
    tp_rank: int,
    tp_size: int,
    *,
    new_token_init: Optional[NewTokens] = None,
) -> None:
    """Fills the parameters of unwrapped GPTModels in place from Hugging Face tensors.

    Works for either layer spec at any tensor, pipeline and virtual pipeline size; values are cast to each
    parameter's dtype. `shape` is the source's own (its vocabulary as stored); rows of the model beyond it
    and not in `new_token_init` are padding and become zero. Raises ConfigError when the files do not fit
    `shape`; asserts that every parameter has an entry in the table and the shape the table says.
    """
    weights = HFWeights(source) if isinstance(source, (str, Path)) else source
    weights.check(shape)
    table = names.by_name(shape)
    rows = new_token_init.vocab_size(shape.vocab_size) if new_token_init else shape.vocab_size
    for chunk in model_chunks:
        for name, target in global_parameters(chunk):
            assert name in table, f"parameter {name} is not in the table of names"
            value = _local_value(weights, table[name], target, tp_rank, tp_size, rows, new_token_init)
            assert value.shape == target.shape, f"{name}: {tuple(value.shape)} for {tuple(target.shape)}"
            set_weight(target, value)


def _local_value(
    weights: TensorReader,
    parameter: names.Parameter,
    target: Tensor,
    tp_rank: int,
    tp_size: int,
    rows: int,
    new: Optional[NewTokens],
) -> Tensor:
    if not parameter.is_vocabulary:
        return read_shard(weights, parameter, tp_rank, tp_size)
    share = target.shape[0]
    assert share * tp_size >= rows, f"{parameter.name}: {share} x {tp_size} rows for {rows} tokens"
    return read_rows(weights, parameter.sources[0].name, tp_rank * share, (tp_rank + 1) * share, new)
