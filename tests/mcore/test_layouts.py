"""One data set through many layouts and micro-batch sizes: same loss, gradient norm and updated weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nrt_megatron.convert import names
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.layout import split
from nrt_megatron.data.batch import SequenceGrid
from nrt_megatron.mcore import attention
from nrt_megatron.mcore.hf import global_parameters
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.recipe import NRT, Recipe, SequencePacking
from nrt_megatron.update import update
from tests.distributed import run_ranks
from tests.mcore import tiny

SEQUENCES = 8
TP, PP, VPP, CP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
)
LAYOUTS = {
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2": (2, {TP: 2}),
    "tp4": (4, {TP: 4}),
    "pp2": (2, {PP: 2}),
    "tp2-pp2": (4, {TP: 2, PP: 2}),
    "tp2-dp2": (4, {TP: 2}),
    "pp2-dp2": (4, {PP: 2}),
    "tp2-sp": (2, {TP: 2, "sequence_parallel": True}),
    "tp2-sp-pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "dp2-distopt": (2, {"use_distributed_optimizer": True}),
    "tp2-dp2-distopt": (4, {TP: 2, "use_distributed_optimizer": True}),
    "pp2-vpp2-dp2-distopt": (4, {PP: 2, VPP: 2, "use_distributed_optimizer": True}),
    "pp3-ends-counted": (
        3,
        {PP: 3, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
    ),
    "cp2": (2, {CP: 2}),
    "cp4": (4, {CP: 4}),
    "cp2-dp2": (4, {CP: 2}),
    "tp2-cp2": (4, {TP: 2, CP: 2}),
    "tp2-sp-cp2": (4, {TP: 2, CP: 2, "sequence_parallel": True}),
    "cp2-pp2": (4, {CP: 2, PP: 2}),
    "cp2-pp2-vpp2": (4, {CP: 2, PP: 2, VPP: 2}),
    "cp2-dp2-distopt": (4, {CP: 2, "use_distributed_optimizer": True}),
    "cp2-recompute": (
        2,
        {CP: 2, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "cp2-recompute-attention": (2, {CP: 2, "recompute_granularity": "selective"}),
    "recompute": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "recompute-tp2": (2, {TP: 2, "recompute_granularity": "selective"}),
}


def settings(mbs: int, layout: dict) -> Recipe:
    packing = SequencePacking(enabled=layout.pop("packing", False))
    recipe = tiny.recipe(mbs=mbs, **layout)
    nrt = NRT(
        num_prompts_per_step=2, num_generations_per_prompt=4, max_num_steps=2, ratio_drop_max=1e9, ratio_drop_min=0.0
    )
    return replace(
        recipe, nrt=nrt, policy=replace(recipe.policy, train_global_batch_size=SEQUENCES, sequence_packing=packing)
    )


def local(grid: SequenceGrid, policy: MegatronPolicy) -> SequenceGrid:
    rows = torch.arange(len(grid)).chunk(policy.runtime.dp_size)[policy.runtime.dp_rank]
    return grid.rows(rows)


def train(directory, mbs: int, layout: dict):
    """Two updates; returns this rank's place, metrics, and parameters."""
    recipe = settings(mbs, dict(layout))
    policy = tiny.policy(directory, recipe)
    rows = []
    for seed in (3, 4):
        grid = local(tiny.grid(SEQUENCES, seed), policy)
        rows.append(update(policy, grid, recipe).reduce(policy.runtime))
    parameters = {n: p.detach().clone() for c in policy.chunks for n, p in global_parameters(c)}
    place = policy.runtime
    return (place.tp_rank, place.tp_size, place.dp_rank), rows, parameters


def hf_tensors(shape: ModelShape, results) -> dict[str, torch.Tensor]:
    """The ranks' parameters put together under Hugging Face names; every replica must agree bit for bit."""
    table, shards = names.by_name(shape), {}
    for (tp_rank, tp_size, _), _, parameters in results:
        for name, value in parameters.items():
            entry = table[name]
            share = tp_size if entry.tp_axis == names.COLUMN else 1
            rows = [source.shape[0] // share for source in entry.sources]
            pieces = split(value, rows, entry.blocks(tp_size) // tp_size)
            for source, piece in zip(entry.sources, pieces):
                known = shards.setdefault(source.name, {}).setdefault(tp_rank, piece)
                assert torch.equal(known, piece), f"replicas of {source.name} differ"
                if entry.tp_axis is None:
                    shards[source.name] = {0: piece}
    whole = {}
    for name, parts in shards.items():
        axis = next(p.tp_axis for p in table.values() if name in [s.name for s in p.sources])
        ordered = [parts[rank] for rank in sorted(parts)]
        whole[name] = torch.cat(ordered, dim=axis) if axis is not None else ordered[0]
        if next(p for p in table.values() if name in [s.name for s in p.sources]).is_vocabulary:
            whole[name] = whole[name][: shape.vocab_size]
    return whole


@pytest.fixture(scope="module", params=["llama", "mistral"])
def alone(request, tmp_path_factory):
    config = {"llama": tiny.LLAMA, "mistral": tiny.MISTRAL}[request.param]
    directory = tiny.save_hf(config, tmp_path_factory.mktemp(request.param))
    shape = ModelShape.from_dir(directory)
    (result,) = run_ranks(1, train, directory, 1, {})
    return directory, shape, result[1], hf_tensors(shape, [result])


def compare(alone, results) -> None:
    _, shape, rows, weights = alone
    for _, got, _ in results:
        for expected, row in zip(rows, got):
            assert row.keys() == expected.keys()
            for key in ("loss", "loss/trace", "loss/format", "loss/token", "grad_norm", "ratio/mean", "answer/nll"):
                assert row[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
    for name, value in hf_tensors(shape, results).items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_like_one_rank(alone, name):
    world, layout = LAYOUTS[name]
    compare(alone, run_ranks(world, train, alone[0], 1, layout))


@pytest.mark.parametrize(
    "mbs,name",
    [
        (2, None),
        (4, None),
        (8, None),
        (2, "dp2"),
        (4, "tp2"),
        (2, "pp2"),
        (2, "tp2-sp-pp2"),
        (4, "cp2"),
        (2, "cp2-pp2"),
    ],
)
def test_the_micro_batch_size_changes_nothing(alone, mbs, name):
    world, layout = LAYOUTS[name] if name else (1, {})
    compare(alone, run_ranks(world, train, alone[0], mbs, layout))


@pytest.mark.parametrize(
    "mbs,name",
    [
        *((4, None), (8, None), (4, "dp2"), (8, "tp2"), (4, "pp2"), (4, "tp2-sp"), (4, "pp2-vpp2")),
        *((4, "cp4"), (8, "cp2"), (4, "tp2-sp-cp2")),
    ],
)
def test_packing_the_traces_of_a_prompt_as_a_tree_changes_nothing(alone, mbs, name):
    world, layout = LAYOUTS[name] if name else (1, {})
    compare(alone, run_ranks(world, train, alone[0], mbs, {**layout, "packing": True}))


def masks_of_an_update(directory, mbs: int, layout: dict) -> tuple[int, int, int]:
    """Masks that the kernel was given in an update, told apart by their memory; those autograd kept; micro-batches."""
    recipe = settings(mbs, dict(layout))
    policy = tiny.policy(directory, recipe)
    given, kept, plain = {}, set(), F.scaled_dot_product_attention

    def spy(*inputs, attn_mask, **how):
        if type(attn_mask) is torch.Tensor:  # and no causal bias, which holds nothing
            given[attn_mask.untyped_storage().data_ptr()] = attn_mask  # held: no other one gets its address
        return plain(*inputs, attn_mask=attn_mask, **how)

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.is_floating_point() and saved.isneginf().any():
            kept.add(saved.untyped_storage().data_ptr())
        return saved

    attention.F = SimpleNamespace(scaled_dot_product_attention=spy)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        update(policy, local(tiny.grid(SEQUENCES), policy), recipe)
    assert kept <= set(given) and all(mask.is_floating_point() for mask in given.values())
    return len(given), len(kept), SEQUENCES // policy.runtime.dp_size // mbs


@pytest.mark.parametrize("name", [None, "recompute", "recompute-tp2", "pp2-vpp2", "cp2", "cp2-recompute-attention"])
def test_layers_and_chunks_share_the_mask_of_a_packed_micro_batch(alone, name):
    world, layout = LAYOUTS[name] if name else (1, {})
    for given, kept, micro_batches in run_ranks(world, masks_of_an_update, alone[0], 4, {**layout, "packing": True}):
        assert given == micro_batches == 2
        assert kept == given or "cp2" in name  # there other hooks see what is saved


@pytest.mark.parametrize("name", [None, "recompute", "cp2"])
def test_layers_share_the_mask_of_a_sliding_window(alone, name):
    """One for each width: a context-parallel rank has two, of which the first may be within the window."""
    directory, shape, _, _ = alone
    world, layout = LAYOUTS[name] if name else (1, {})
    for given, _, _ in run_ranks(world, masks_of_an_update, directory, 8, layout):
        assert given == 0 if shape.sliding_window is None else 1 <= given <= world


def test_the_weights_did_move(alone):
    directory, _, rows, weights = alone
    from safetensors.torch import load_file

    before = load_file(directory / "model.safetensors")
    moved = [name for name in weights if not torch.allclose(before[name], weights[name], atol=1e-4)]
    assert set(moved) == set(weights)
    assert all(row["grad_norm"] > 1e-4 for row in rows)
