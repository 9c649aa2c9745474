"""FP8 rehearsed: rounding by hand, which operand is rounded in which product, and what layers are told."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_align_size

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.importer import import_hf
from nrt_megatron.mcore import runtime
from nrt_megatron.mcore.checkpoint import load_weights
from nrt_megatron.mcore.fp8 import BLOCK, Scaling, _Fp8Matmul, dequantize, quantize
from nrt_megatron.mcore.model import use_transformer_engine
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.mcore.precision import (
    describe,
    pad_tokens,
    rollout_precision,
    set_sequence_parallel,
    transformer_fields,
)
from nrt_megatron.recipe import NRT, ConfigError, Megatron, Policy, SequencePacking, token_multiple
from tests.distributed import run_ranks
from tests.mcore import tiny
from tests.mcore.test_layouts import TP

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TENSORWISE = dict(fp8="hybrid", fp8_recipe="tensorwise", fp8_emulation=True)
BLOCKWISE = dict(fp8="e4m3", fp8_recipe="blockwise", fp8_emulation=True)


def rounded(values: list[float], dtype: torch.dtype, power_of_2: bool = False) -> tuple[list[float], float]:
    """Codes of one row with one scale, as numbers, and the inverse scale."""
    x = torch.tensor([values])
    codes, inverse = quantize(x, dtype, tuple(x.shape), power_of_2)
    return codes.float()[0].tolist(), inverse.item()


def test_e4m3_by_hand():
    """Largest 448, steps of 1/8 of the power of two below: 448 = 1.75 * 2^8."""
    assert rounded([448.0, 17.0, 19.0, -18.0, 0.3], E4M3) == ([448.0, 16.0, 20.0, -18.0, 0.3125], 1.0)  # ties to even
    # 0.3 * 112 = 33.6 lies between 32 and 36.
    assert rounded([4.0, 0.3, -1.0], E4M3) == ([448.0, 32.0, -112.0], pytest.approx(1 / 112))
    assert rounded([3.0, 1.0], E4M3, power_of_2=True) == ([384.0, 128.0], 1 / 128)  # 448 / 3 = 149, down to 128


def test_e5m2_by_hand():
    """Largest 57344 = 1.75 * 2^15, steps of 1/4 of the power of two below."""
    assert rounded([57344.0, 9.0, 11.0, -5.0], E5M2) == ([57344.0, 8.0, 12.0, -5.0], 1.0)
    assert rounded([2.0, 1.0], E5M2, power_of_2=True) == ([32768.0, 16384.0], 2.0**-14)


def test_edges():
    assert rounded([0.0, 0.0], E4M3) == ([0.0, 0.0], 1.0)
    codes, inverse = rounded([1e-40, 0.0], E4M3)  # 448 / 1e-40 overflows: the largest float32 instead
    assert codes[0] == pytest.approx(1e-40 * torch.finfo(torch.float32).max, rel=0.1) and codes[1] == 0
    assert inverse == pytest.approx(1 / torch.finfo(torch.float32).max)
    for bad in (float("inf"), float("nan")):  # must reach the gradient's norm, and be skipped there
        x = torch.tensor([[bad, 1.0]])
        assert not dequantize(*quantize(x, E4M3, (1, 2)), (1, 2)).isfinite().all()


def test_the_scale_is_divided_once():
    """448 / amax as Python writes it is 448 * (1 / amax), rounded twice: another scale for 1 amax in 4."""
    amax = torch.linspace(1, 2, 1001)
    exact = (448 / amax.double()).float()
    scale = torch.cat([1 / quantize(a.view(1, 1), E4M3, (1, 1))[1].double() for a in amax])[:, 0]
    torch.testing.assert_close(scale, exact.double(), rtol=1e-7, atol=0)
    codes = torch.tensor([quantize(a.view(1, 1), E4M3, (1, 1))[0].item() for a in amax])
    assert (codes == 448).all()
    assert ((448 / amax) != torch.div(448, amax)).any(), "then it would not matter"


def test_blocks_have_scales_of_their_own_and_may_be_cut():
    x = torch.ones(BLOCK + 2, BLOCK + 3)
    x[0, 0], x[-1, -1] = 100.0, 1e-3
    _, squares = quantize(x, E4M3, (BLOCK, BLOCK))
    assert (squares * 448).round(decimals=3).tolist() == [[100.0, 1.0], [1.0, 1.0]]
    codes, rows = quantize(x, E4M3, (1, BLOCK))
    assert rows.shape == (BLOCK + 2, 2) and codes.shape == x.shape
    assert (rows[0] * 448).tolist() == pytest.approx([100, 1]) and (rows[1:] * 448 == 1).all()
    codes, columns = quantize(x, E4M3, (BLOCK, 1))
    assert columns.shape == (2, BLOCK + 3) and (columns[:, 0] * 448).tolist() == pytest.approx([100, 1])
    torch.testing.assert_close(dequantize(*quantize(x, E4M3, (1, BLOCK)), (1, BLOCK)), x, rtol=2**-4, atol=1e-4)


def test_relative_error_of_a_product():
    """Rounding to 3 bits of fraction: 3.7% of the product's size, as measured with Transformer Engine's quantizers."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 512, generator=g), torch.randn(256, 512, generator=g)
    exact = x @ w.t()
    for cfg in (TENSORWISE, BLOCKWISE):
        scaling = Scaling.of(Megatron(**cfg))
        error = (scaling.activation(x) @ scaling.weight(w).t() - exact).norm() / exact.norm()
        assert 0.035 < error < 0.039
        dy = torch.randn(256, 256, generator=g)
        error = (scaling.gradient(dy) @ scaling.weight(w) - dy @ w).norm() / (dy @ w).norm()
        assert error == pytest.approx(0.059 if cfg is TENSORWISE else 0.037, abs=0.003)


@pytest.mark.parametrize("cfg", [TENSORWISE, {**TENSORWISE, "fp8": "e4m3"}, BLOCKWISE, {**BLOCKWISE, "fp8": "hybrid"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_operand_is_rounded_how_in_each_product(cfg, dtype):
    g = torch.Generator().manual_seed(1)
    tokens, n, k = 200, 150, 130  # blocks are cut everywhere

    def draw(*size):  # sizes wide apart: scales of powers of two differ for the smallest values of a block alone
        return (torch.randn(*size, generator=g) * (4 * torch.randn(*size, generator=g)).exp()).to(dtype)

    x, w, dy = draw(tokens, k), draw(n, k), draw(tokens, n)
    backward = E5M2 if cfg["fp8"] == "hybrid" else E4M3

    def q(t, kind, tile):
        tile, two = (tile, True) if cfg["fp8_recipe"] == "blockwise" else (tuple(t.shape), False)
        return dequantize(*quantize(t, kind, tile, two), tile)

    weight, along_k, along_n = q(w, E4M3, (128, 128)), q(x, E4M3, (1, 128)), q(dy, backward, (1, 128))
    expected = (
        along_k @ weight.t(),
        along_n @ weight,
        q(dy, backward, (128, 1)).t() @ q(x, E4M3, (128, 1)),  # blocks run along the tokens
    )
    x3, w = x.view(20, 10, k).requires_grad_(), w.requires_grad_()
    y = _Fp8Matmul.apply(x3, w, Scaling.of(Megatron(**cfg)), None)
    dx, dw = torch.autograd.grad(y, (x3, w), dy.view(20, 10, n))
    for got, wanted in zip((y.view(tokens, n), dx.view(tokens, k), dw), expected, strict=True):
        assert got.dtype == dtype and (got - wanted).norm() < (1e-6 if dtype is torch.float32 else 3e-3) * wanted.norm()
    if cfg["fp8_recipe"] == "blockwise":
        columns = [columns.norm(dim=0) for columns in (along_n.t() @ along_k - expected[2], expected[2])]
        assert (columns[0] / columns[1]).max() > 0.02, "then the direction of the blocks would not matter"


def test_scales_of_blocks_are_powers_of_two_unless_transformer_engines_switch_is_set(monkeypatch):
    assert Scaling.of(Megatron(**BLOCKWISE)).power_of_2 and not Scaling.of(Megatron(**TENSORWISE)).power_of_2
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    assert not Scaling.of(Megatron(**BLOCKWISE)).power_of_2
    assert Scaling.of(Megatron()) is None


def test_tokens_are_padded_for_a_layer_and_cut_again():
    class Linear(torch.nn.Linear):
        def forward(self, x):
            assert x.shape[0] % 16 == 0 and x.shape[1] == 1
            return super().forward(x), None

    layer = Linear(4, 6, bias=False)
    x = torch.randn(3, 7, 4)
    hooks = pad_tokens(layer, 16)
    y, bias = layer(x)
    torch.testing.assert_close(y, x @ layer.weight.t())
    assert bias is None and y.shape == (3, 7, 6)
    for hook in hooks:
        hook.remove()
    with pytest.raises(AssertionError):
        layer(x)


BLOCKS = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
SHARED = {TP: 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    "fields, packed, multiple",
    [
        ({}, True, 1),
        ({TP: 4, "sequence_parallel": True}, False, 4),
        ({**SHARED, "context_parallel_size": 2}, False, 8),
        ({**BLOCKWISE, **SHARED}, True, 2),  # the rehearsal needs no padding
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, True, 16),
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise", **SHARED, "context_parallel_size": 2}, True, 64),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, False, 32),
        (BLOCKS, False, 16),
        (BLOCKS, True, 128),
        ({**BLOCKS, **SHARED}, True, 256),
        ({**BLOCKS, **SHARED}, False, 256),
        ({**BLOCKS, **SHARED, "context_parallel_size": 2}, False, 512),
    ],
)
def test_columns_are_aligned_for_transformer_engines_products(fields, packed, multiple):
    policy = Policy(megatron_cfg=Megatron(**fields), sequence_packing=SequencePacking(enabled=packed))
    assert token_multiple(policy) == multiple
    cfg, ranks = policy.megatron_cfg, policy.megatron_cfg.context_parallel_size
    ranks *= cfg.tensor_model_parallel_size if cfg.sequence_parallel else 1
    if cfg.fp8 and not cfg.fp8_emulation:
        assert multiple // ranks % get_fp8_align_size(cfg.fp8_recipe) == 0


@pytest.mark.parametrize(
    "recipe, again", [("tensorwise", True), ("blockwise", True), ("delayed", False), (None, False)]
)
def test_transformer_engine_sets_its_quantizers_again_where_sequence_parallelism_switches(recipe, again):
    """What it looks at is in tests/gpu: its own modules."""
    chunk, layer = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2)
    chunk.config = SimpleNamespace(fp8=recipe and "hybrid", fp8_recipe=recipe or "delayed", sequence_parallel=True)
    chunk.position_embedding_type, layer.sequence_parallel = "rope", True
    chunk.append(layer)
    for on in (False, True):
        layer.fp8_initialized = layer.fp8_meta_tensors_initialized = True
        set_sequence_parallel(chunk, on)
        assert layer.sequence_parallel == chunk.config.sequence_parallel == on
        assert layer.fp8_initialized == layer.fp8_meta_tensors_initialized == (not again)
    assert not hasattr(chunk[0], "fp8_initialized")


def test_megatrons_own_fields_reach_it_and_the_rehearsal_stays_out_of_its_way():
    cfg = Megatron(fp8="hybrid", fp8_recipe="tensorwise", fp8_param=True, first_last_layers_bf16=True, bf16=True)
    assert transformer_fields(cfg) == dict(
        fp8="hybrid", fp8_recipe="tensorwise", fp8_param=True, first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1,
        fp8_margin=0, fp8_amax_history_len=1, fp8_amax_compute_algo="most_recent",
    )  # fmt: skip
    assert "fp8" not in transformer_fields(Megatron(**TENSORWISE)) and transformer_fields(Megatron()) == {}
    assert describe(cfg) == "bf16, FP8 hybrid tensorwise"
    assert describe(Megatron(**BLOCKWISE)) == "fp32, FP8 e4m3 blockwise (emulated)"


def test_a_rollout_leaves_megatrons_config_as_it_was():
    """On Transformer Engine's layers: FP8 is off inside, or its kept weights are said to be old."""
    calls = []
    chunk = torch.nn.Linear(2, 2)
    chunk.config = SimpleNamespace(fp8="hybrid", fp8_recipe="tensorwise")
    chunk.set_is_first_microbatch = lambda: calls.append("weights are new")
    with rollout_precision([chunk], "none"):
        assert chunk.config.fp8 is None
    assert chunk.config.fp8 == "hybrid" and not calls
    with rollout_precision([chunk], "same"):
        assert chunk.config.fp8 == "hybrid"
    assert calls == ["weights are new"]


def test_the_optimizer_begins_from_the_weights_that_were_loaded_where_they_are_kept_in_fp8(tmp_path):
    """As Transformer Engine keeps them: the value before rounding beside the parameter, until it is cleared."""
    (rank,) = run_ranks(1, _noted_values, tiny.save_hf(tiny.LLAMA, tmp_path / "hf"), tmp_path / "converted")
    assert rank == {"hf": True, "checkpoint": True, "cleared": True}


def _noted_values(directory, converted) -> dict[str, bool]:
    shape, names = ModelShape.from_dir(directory), ("linear_fc1.weight", "linear_proj.weight")
    import_hf(directory, converted, tokenizer=False)
    policy = MegatronPolicy(runtime.initialize(tiny.recipe()), tiny.recipe().policy, shape, num_updates=1)
    weights = {n: p for n, p in policy.chunks[0].named_parameters() if n.endswith(names)}
    noted = {n: torch.full_like(p, torch.nan) for n, p in weights.items()}
    for name, parameter in weights.items():
        parameter.get_high_precision_init_val = partial(noted.get, name)
    same = {}
    for way, load in (
        ("hf", lambda: policy.load(directory, shape)),
        ("checkpoint", lambda: load_weights(converted, policy)),
    ):
        load()
        same[way] = all(torch.equal(noted[name], parameter) for name, parameter in weights.items())
        assert not any(value.requires_grad for value in noted.values())
        for value in noted.values():
            value.fill_(torch.nan)
    for parameter in weights.values():
        parameter.get_high_precision_init_val = lambda: None
    load_weights(converted, policy)
    return same | {"cleared": all(value.isnan().all().item() for value in noted.values())}


def test_fp8_without_transformer_engine_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"fp8=hybrid: Transformer Engine .* rehearse it with fp8_emulation=true$"):
        use_transformer_engine(Megatron(fp8="hybrid", bf16=True))
    assert not use_transformer_engine(Megatron(**TENSORWISE))


def test_nothing_of_fp8_is_on_by_default():
    assert not NRT().rollout_importance_sampling and Megatron().fp8 is None
