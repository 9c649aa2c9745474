"""Transformer Engine's layers, from what `tools/record_te.py` recorded of them: names, shapes, and FP8 numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from nrt_megatron.convert import names
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.importer import import_hf
from nrt_megatron.mcore import runtime
from nrt_megatron.mcore.model import build_chunks
from nrt_megatron.mcore.precision import TE_LINEAR
from nrt_megatron.recipe import Megatron
from tests.distributed import run_ranks
from tests.mcore import te_case, tiny

RECORDED = json.loads((Path(__file__).parent / "te_layers.json").read_text())
CONFIGS = {"llama": tiny.LLAMA, "mistral": tiny.MISTRAL}
CASES = [(name, tp) for name in CONFIGS for tp in (1, 2)]


def padded(parameter: names.Parameter, tp: int) -> tuple[int, ...]:
    """The whole parameter with the vocabulary rows that Megatron adds."""
    rows = -(-tiny.VOCAB // (8 * tp)) * 8 * tp
    return (rows, *parameter.shape[1:]) if parameter.is_vocabulary else parameter.shape


@pytest.mark.parametrize("name, tp", CASES)
def test_the_state_dict_is_what_the_conversion_table_says(name, tp):
    expected = {}
    for parameter in names.parameters(ModelShape.from_hf(CONFIGS[name])):
        shape = list(padded(parameter, tp))
        if parameter.tp_axis is not None:
            shape[parameter.tp_axis] //= tp
        expected[parameter.te_name] = str(shape)
    recorded = RECORDED["layers"][f"{name}, tp {tp}"]["state"]
    assert {key: shape for key, shape in recorded.items() if not key.endswith("._extra_state")} == expected
    # The rest is state of FP8's scaling: none at all, or empty where the scaling is of the current tensor.
    assert {shape for key, shape in recorded.items() if key.endswith("._extra_state")} <= {None, "[0]"}


@pytest.mark.parametrize("name, tp", CASES)
def test_checkpoint_keys_are_what_the_converter_writes(name, tp):
    shape = ModelShape.from_hf(CONFIGS[name])
    expected = {}
    for parameter in names.parameters(shape):
        layers = [] if parameter.layer is None else [shape.num_layers]
        expected[parameter.key] = str([*layers, *padded(parameter, tp)])
    recorded = RECORDED["layers"][f"{name}, tp {tp}"]["checkpoint"]
    assert {key: shape for key, shape in recorded.items() if not key.endswith("._extra_state")} == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_the_converter_writes_every_key(name, tmp_path):
    import_hf(tiny.save_hf(CONFIGS[name], tmp_path / "hf"), tmp_path / "converted", tokenizer=False)
    written = FileSystemReader(tmp_path / "converted" / "dist").read_metadata().state_dict_metadata
    keys = {key.split("/")[0] for key in written}  # of states that are no tensors, `/shard_3_4`
    assert keys == set(RECORDED["layers"][f"{name}, tp 1"]["checkpoint"])


def rehearse(config: dict, bf16: bool) -> dict:
    shape = ModelShape.from_hf(config)
    runtime.initialize(tiny.recipe())
    fp8 = dict(fp8="hybrid", fp8_recipe="tensorwise", fp8_emulation=True)
    (chunk,) = build_chunks(shape, Megatron(make_vocab_size_divisible_by=8, bf16=bf16, **fp8))
    return te_case.measure(chunk, shape)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_rehearsal_computes_what_transformer_engine_does(name, dtype):
    """Every tensor was equal bit for bit in bf16; fp32 gradients were to rounding."""
    (got,) = run_ranks(1, rehearse, CONFIGS[name], dtype == "bf16")
    recorded = RECORDED["fp8"][f"{name}, {dtype}"]
    assert got["log_prob"] == pytest.approx(recorded["log_prob"], rel=1e-6)
    assert got["gradients"].keys() == recorded["gradients"].keys()
    # A last bit before a rounding to FP8 can tip a value over; sums of another order have other last bits.
    assert got["gradients"] == pytest.approx(recorded["gradients"], rel=1e-3)


def test_megatrons_layers_have_the_names_that_are_looked_for():
    source = Path(torch.__file__).parents[1] / "megatron" / "core" / "extensions" / "transformer_engine.py"
    text = source.read_text()
    assert all(f"class {name}(" in text for name in TE_LINEAR)
