"""Megatron checkpoint of any layout to a Hugging Face directory, one chunk in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from nrt_megatron.checkpoints import CheckpointMeta
from nrt_megatron.convert import names
from nrt_megatron.convert.config import DTYPES, ModelShape
from nrt_megatron.convert.layout import pieces, split
from nrt_megatron.convert.output import new_directory
from nrt_megatron.convert.release import (
    Run,
    write_chat_template,
    write_generation_config,
    write_input_names,
    write_model_card,
)
from nrt_megatron.convert.safetensors_io import INDEX
from nrt_megatron.convert.safetensors_writer import SafetensorsWriter
from nrt_megatron.convert.tokenizer_files import FILES
from nrt_megatron.convert.torch_dist import TorchDistReader
from nrt_megatron.recipe import ConfigError


def export_hf(
    checkpoint: Path,
    out_dir: Path,
    *,
    dtype: Optional[str] = None,
    max_shard_size: str = "5GB",
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[Path], None] = lambda release: None,
) -> ModelShape:
    """Writes safetensors with index, `config.json`, `generation_config.json`, tokenizer and model card.

    Without `dtype` a converted checkpoint keeps every tensor's own, and a trained one is released in the
    dtype of its matrices. `progress(done, total)` counts bytes. `check` sees the finished directory before
    it gets its name. Raises ConfigError for a checkpoint that cannot be read or an output that exists.
    """
    meta = CheckpointMeta.read(checkpoint)
    run = Run.of(checkpoint, meta.step)
    shape = ModelShape.from_hf(meta.model)
    reader = TorchDistReader(checkpoint / "dist")
    _check_sizes(reader, shape)
    tensors = _hf_tensors(reader, shape, _dtypes(reader, shape, meta.kind, dtype))
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(kinds) == 1:
        shape = replace(shape, dtype=kinds.pop())
    total = sum(tensor.nbytes for tensor in tensors.values())
    with new_directory(out_dir, total) as partial:
        _write_weights(reader, shape, tensors, partial, max_shard_size, progress)
        _write_json(partial / "config.json", shape.to_hf())
        for name in FILES:
            if (checkpoint / "tokenizer" / name).is_file():
                shutil.copyfile(checkpoint / "tokenizer" / name, partial / name)
        write_generation_config(partial, shape, run)
        write_chat_template(partial, run)
        write_input_names(partial)
        write_model_card(partial, meta, shape, run)
        check(partial)
    return shape


def _check_sizes(reader: TorchDistReader, shape: ModelShape) -> None:
    """The checkpoint's tensors are those of the shape; vocabulary matrices may have padding below."""
    for parameter in names.parameters(shape):
        size = reader.size(parameter.key)
        stack = () if parameter.layer is None else (shape.num_layers,)
        rows = min(size[0], parameter.shape[0]) if parameter.is_vocabulary else size[len(stack)]
        if (*size[: len(stack)], rows, *size[len(stack) + 1 :]) != (*stack, *parameter.shape):
            raise ConfigError(
                f"{reader.directory}: {parameter.key} has size {list(size)}, meta.json says "
                f"{[*stack, *parameter.shape]}; the checkpoint is of another model"
            )


def _dtypes(reader: TorchDistReader, shape: ModelShape, kind: str, dtype: Optional[str]) -> dict[str, torch.dtype]:
    """dtype of each parameter in the release, by checkpoint key."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: not supported; use {' or '.join(DTYPES)}")
    keys = {parameter.key for parameter in names.parameters(shape)}
    if dtype is not None:
        return dict.fromkeys(keys, getattr(torch, dtype))
    if kind == "convert":
        return {key: reader.dtype(key) for key in keys}
    # Megatron's local layers hold norm weights in float32 beside bfloat16 matrices.
    return dict.fromkeys(keys, reader.dtype(names.EMBEDDING))


def _hf_tensors(reader: TorchDistReader, shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Every tensor of the release on the meta device."""
    return {
        source.name: torch.empty(source.shape, dtype=dtypes[parameter.key], device="meta")
        for parameter in names.parameters(shape)
        for source in parameter.sources
    }


def _write_weights(
    reader: TorchDistReader,
    shape: ModelShape,
    tensors: Mapping[str, Tensor],
    directory: Path,
    max_shard_size: str,
    progress: Callable[[int, int], None],
) -> None:
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    files = {
        file: SafetensorsWriter(directory / file, {name: tensors[name] for name in members})
        for file, members in plan.filename_to_tensors.items()
    }
    place = {name: files[file] for file, members in plan.filename_to_tensors.items() for name in members}
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    for parameter in names.parameters(shape):
        for piece in pieces(parameter, reader.chunk_rows(parameter.key)):
            stack = () if parameter.layer is None else (parameter.layer,)
            rest = parameter.shape[1:]
            part = reader.read(
                parameter.key,
                (*stack, piece.start, *(0 for _ in rest)),
                (*(1 for _ in stack), piece.stop - piece.start, *rest),
            )
            part = part.reshape(-1, *rest)  # [rows, ...]
            for rows, values in zip(
                piece.sources, split(part, [r.stop - r.start for r in piece.sources], piece.blocks)
            ):
                values = values.to(tensors[rows.name].dtype)
                place[rows.name].write(rows.name, rows.start, values)
                done += values.nbytes
            del part, values  # before the next ones are read
            progress(done, total)
    for writer in files.values():
        writer.close()
    if plan.is_sharded:
        parameters = sum(tensor.numel() for tensor in tensors.values())
        metadata = {"total_parameters": parameters, **plan.metadata}
        _write_json(directory / INDEX, {"metadata": metadata, "weight_map": plan.tensor_to_filename})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=path.name == INDEX, ensure_ascii=False) + "\n")
