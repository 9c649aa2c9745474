"""Row order by hand on matrices small enough to read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from nrt_megatron.convert import names
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.layout import join, pieces, read_shard, split
from nrt_megatron.convert.safetensors_io import HFWeights
from nrt_megatron.convert.vocabulary import NewTokens, initial_row, read_rows

# 4 query heads in 2 groups, heads of 1 row: rows are easy to name.
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 1,
    "vocab_size": 5,
}
SHAPE = ModelShape.from_hf(CONFIG)
LAYER = {p.name.removeprefix("decoder.layers.0."): p for p in names.layer_parameters(SHAPE, 0)}


@pytest.fixture
def weights(tmp_path) -> HFWeights:
    """Every tensor filled with row * 10 + column, plus 100 per tensor of a layer in the table's order."""
    tensors = {}
    for index, (name, size) in enumerate(sorted(names.hf_shapes(SHAPE).items())):
        columns = size[1] if len(size) > 1 else 1
        values = 100 * index + 10 * torch.arange(size[0])[:, None] + torch.arange(columns)
        tensors[name] = values.float().reshape(size)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = HFWeights(tmp_path)
    found.check(SHAPE)
    return found


def rows(tensor: torch.Tensor) -> list[float]:
    """First column."""
    return tensor[:, 0].tolist()


def test_qkv_is_laid_out_group_by_group(weights) -> None:
    q, k, v = (weights.read(source.name) for source in LAYER["self_attention.linear_qkv.weight"].sources)
    joined = join([q, k, v], blocks=2)
    expected = [q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]]
    assert torch.equal(joined, torch.stack(expected))
    assert all(torch.equal(a, b) for a, b in zip(split(joined, [4, 2, 2], blocks=2), (q, k, v)))


def test_a_tensor_rank_gets_whole_groups(weights) -> None:
    parameter = LAYER["self_attention.linear_qkv.weight"]
    whole = read_shard(weights, parameter, 0, 1)
    assert torch.equal(read_shard(weights, parameter, 1, 2), whole[4:])


def test_gate_and_up_are_halves_of_every_rank(weights) -> None:
    parameter = LAYER["mlp.linear_fc1.weight"]
    gate, up = (weights.read(source.name) for source in parameter.sources)
    assert torch.equal(read_shard(weights, parameter, 0, 1), torch.cat([gate, up]))
    assert torch.equal(read_shard(weights, parameter, 1, 3), torch.cat([gate[2:4], up[2:4]]))


def test_row_parallel_layers_are_cut_by_columns(weights) -> None:
    parameter = LAYER["mlp.linear_fc2.weight"]
    whole = weights.read(parameter.sources[0].name)
    assert torch.equal(read_shard(weights, parameter, 1, 2), whole[:, 3:])


def test_norms_are_whole_on_every_rank(weights) -> None:
    parameter = LAYER["input_layernorm.weight"]
    assert torch.equal(read_shard(weights, parameter, 1, 2), weights.read("model.layers.0.input_layernorm.weight"))


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("name", LAYER)
def test_pieces_cover_a_parameter_once(weights, name: str, max_rows: int) -> None:
    parameter = LAYER[name]
    whole = read_shard(weights, parameter, 0, 1)
    found, end = [], 0
    for piece in pieces(parameter, max_rows):
        assert piece.start == end
        parts = [weights.read(r.name, slice(r.start, r.stop)) for r in piece.sources]
        joined = join(parts, piece.blocks)
        back = split(joined, [len(part) for part in parts], piece.blocks)
        assert all(torch.equal(a, b) for a, b in zip(back, parts))
        found.append(joined)
        end = piece.stop
    assert torch.equal(torch.cat(found), whole)


def test_vocabulary_rows_are_padded_with_zeros(weights) -> None:
    padded = read_rows(weights, names.HF_EMBEDDING, 3, 8)
    assert torch.equal(padded[:2], weights.read(names.HF_EMBEDDING, slice(3, 5)))
    assert padded.shape == (5, 4) and not padded[2:].any()
    assert not read_rows(weights, names.HF_EMBEDDING, 8, 10).any()


def test_added_rows_are_means_of_the_rows_asked_for(weights) -> None:
    table = weights.read(names.HF_EMBEDDING)
    eos = NewTokens((5,), base_size=5, like=(2,))
    text = NewTokens((5,), base_size=5, like=(1, 4))
    mean = NewTokens((5,), base_size=5)
    assert torch.equal(read_rows(weights, names.HF_EMBEDDING, 4, 8, eos)[1], table[2])
    assert torch.equal(initial_row(weights, names.HF_EMBEDDING, text), (table[1] + table[4]) / 2)
    assert torch.equal(initial_row(weights, names.HF_EMBEDDING, mean), table.mean(0))
    assert mean.vocab_size(5) == 6


def test_an_added_token_may_take_a_row_the_tokenizer_left_unused(weights) -> None:
    new = NewTokens((3,), base_size=3)
    table = read_rows(weights, names.HF_EMBEDDING, 0, 5, new)
    before = weights.read(names.HF_EMBEDDING)
    assert new.vocab_size(5) == 5
    assert torch.equal(table[3], before[:3].mean(0))
    assert torch.equal(table[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


def test_a_read_owns_its_memory(weights) -> None:
    part = weights.read(names.HF_EMBEDDING, slice(1, 2))
    assert part.untyped_storage().nbytes() == part.nbytes
