"""Hugging Face directory to Megatron checkpoint, one piece of a matrix in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from nrt_megatron.checkpoints import CheckpointMeta
from nrt_megatron.convert import names
from nrt_megatron.convert.config import DTYPES, ModelShape
from nrt_megatron.convert.layout import Piece, join, pieces
from nrt_megatron.convert.output import new_directory
from nrt_megatron.convert.safetensors_io import HFWeights
from nrt_megatron.convert.tokenizer_files import add_tokens, copy_tokenizer
from nrt_megatron.convert.torch_dist import TorchDistWriter
from nrt_megatron.convert.vocabulary import NewTokens, read_rows
from nrt_megatron.recipe import ConfigError

PIECE_BYTES = 16 << 20
"""Most bytes of a matrix in memory at once (one query group's rows at least)."""


def import_hf(
    hf_dir: Path,
    out_dir: Path,
    *,
    add_token: Sequence[str] = (),
    init_from: str = "mean",
    tokenizer: bool = True,
    dtype: Optional[str] = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[Path], None] = lambda checkpoint: None,
) -> CheckpointMeta:
    """Writes a `torch_dist` checkpoint that loads at any layout, with `meta.json` and `tokenizer/`.

    Without `dtype` every tensor keeps its own. `progress(done, total)` counts bytes of the source. `check`
    sees the finished directory before it gets its name: when it raises, nothing is left behind. Raises
    ConfigError for input that is not exactly a Llama or Mistral checkpoint, or an output that exists.
    """
    shape = ModelShape.from_dir(hf_dir)
    weights = HFWeights(hf_dir)
    weights.check(shape)
    dtypes = _dtypes(weights, shape, dtype)
    if add_token and not tokenizer:
        raise ConfigError("--add-token: needs the tokenizer; drop --no-tokenizer")
    with new_directory(out_dir, _num_bytes(shape, dtypes)) as partial:
        added, new = [], None
        if tokenizer:
            copy_tokenizer(hf_dir, partial / "tokenizer")
            added, new = add_tokens(partial / "tokenizer", add_token, init_from)
        result = replace(
            shape,
            vocab_size=new.vocab_size(shape.vocab_size) if new else shape.vocab_size,
            dtype=dtype or shape.dtype,
        )
        _write_weights(weights, result, partial / "dist", dtypes, new, progress)
        meta = CheckpointMeta(step=0, world_size=1, model=result.to_hf(), kind="convert")
        record = {**json.loads(meta.to_json()), "added_tokens": [asdict(token) for token in added]}
        (partial / "meta.json").write_text(json.dumps(record, indent=1))
        check(partial)
    return meta


def _write_weights(
    weights: HFWeights,
    shape: ModelShape,
    directory: Path,
    dtypes: dict[str, torch.dtype],
    new: Optional[NewTokens],
    progress: Callable[[int, int], None],
) -> None:
    directory.mkdir()
    writer = TorchDistWriter(directory)
    total, done = _num_bytes(shape, dtypes), 0
    for parameter in names.parameters(shape):
        dtype = dtypes[parameter.key]
        row_bytes = parameter.shape[-1] * dtype.itemsize if len(parameter.shape) > 1 else dtype.itemsize
        for piece in pieces(parameter, max(1, PIECE_BYTES // row_bytes)):
            chunk = _read(weights, parameter, piece, new).to(dtype)  # [rows, ...]
            offsets, size = [piece.start] + [0] * (chunk.dim() - 1), parameter.shape
            if parameter.layer is not None:
                chunk, offsets, size = chunk[None], [parameter.layer, *offsets], (shape.num_layers, *size)
            writer.add(parameter.key, chunk, tuple(offsets), size)
            done += chunk.nbytes
            del chunk  # before the next one is read
            progress(done, total)
    writer.add_extra_states(shape.num_layers)
    writer.finish()


def _read(weights: HFWeights, parameter: names.Parameter, piece: Piece, new: Optional[NewTokens]) -> Tensor:
    if parameter.is_vocabulary:
        return read_rows(weights, parameter.sources[0].name, piece.start, piece.stop, new)
    return join([weights.read(rows.name, slice(rows.start, rows.stop)) for rows in piece.sources], piece.blocks)


def _dtypes(weights: HFWeights, shape: ModelShape, dtype: Optional[str]) -> dict[str, torch.dtype]:
    """dtype of every checkpoint key. The layers stacked under one key must agree."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: not supported; use {' or '.join(DTYPES)}")
    found: dict[str, set[str]] = {}
    for parameter in names.parameters(shape):
        for source in parameter.sources:
            found.setdefault(parameter.key, set()).add(dtype or weights.tensors[source.name].dtype)
    mixed = [key for key, kinds in found.items() if len(kinds) > 1]
    if mixed:
        raise ConfigError(f"{weights.directory}: {mixed[0]} is {' and '.join(sorted(found[mixed[0]]))}; pass --dtype")
    return {key: getattr(torch, kinds.pop()) for key, kinds in found.items()}


def _num_bytes(shape: ModelShape, dtypes: dict[str, torch.dtype]) -> int:
    return sum(torch.Size(p.shape).numel() * dtypes[p.key].itemsize for p in names.parameters(shape))
