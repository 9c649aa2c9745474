"""Models whose linear layers rehearse FP8: layouts, rollouts and their gap to the trainer, learning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.mcore.fp8 import BLOCK, Scaling, rehearsed_layers
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.mcore.precision import rollout_precision
from nrt_megatron.update import update
from tests.distributed import run_ranks
from tests.mcore import test_layouts, test_on_policy, tiny
from tests.mcore.test_fp8 import BLOCKWISE, TENSORWISE
from tests.mcore.test_layouts import CP, PP, TP, VPP


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_hf(tiny.LLAMA, tmp_path_factory.mktemp("llama"))


def layers_in_fp8(directory, megatron: dict) -> list[tuple[int, list[str]]]:
    policy = tiny.policy(directory, tiny.recipe(**megatron))
    found = []
    for chunk in policy.chunks:
        for layer in chunk.decoder.layers:
            names = [n for n, m in layer.named_modules() if m in set(rehearsed_layers(layer))]
            found.append((layer.layer_number - 1, names))
    assert sum(len(names) for _, names in found) == sum(1 for c in policy.chunks for _ in rehearsed_layers(c))
    return found


def test_linear_layers_alone_but_for_those_left_out(checkpoint):
    edges = dict(first_last_layers_bf16=True, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
    four = ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"]
    everywhere = run_ranks(1, layers_in_fp8, checkpoint, TENSORWISE)[0]
    assert everywhere == [(i, four) for i in range(4)]
    for world, layout in ((1, {}), (2, {PP: 2}), (2, {PP: 2, VPP: 2})):
        ranks = run_ranks(world, layers_in_fp8, checkpoint, {**TENSORWISE, **edges, **layout})
        assert sorted(layer for rank in ranks for layer in rank) == [(0, []), (1, four), (2, []), (3, [])]


TRAINED_ALIKE = {
    # Micro-batches of one sequence: the same tensors are rounded on one rank and on several.
    "dp2-distopt": (2, {"use_distributed_optimizer": True}, 1e-4),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}, 1e-4),
    # A power of two is the same scale on a shard but for the smallest values, and rounding may tip a value over.
    "tp2": (2, {TP: 2}, 5e-3),
    "tp2-sp-pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}, 5e-3),
    # Sequences of a block at most: cutting them leaves scales of powers of two as they were.
    "cp2": (2, {CP: 2}, 1e-4),
    "recompute": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 1e-6),
}


@pytest.fixture(scope="module")
def alone(checkpoint):
    (result,) = run_ranks(1, test_layouts.train, checkpoint, 1, BLOCKWISE)
    return result[1]


@pytest.mark.parametrize("name", TRAINED_ALIKE)
def test_a_layout_trains_like_one_rank(checkpoint, alone, name):
    world, layout, tolerance = TRAINED_ALIKE[name]
    # Chunks of one shape pad the rows, and what pads them shares blocks along the tokens.
    for _, rows, _ in run_ranks(world, test_layouts.train, checkpoint, 1, {**BLOCKWISE, **layout}):
        for expected, row in zip(alone, rows, strict=True):
            for key in ("loss", "grad_norm", "answer/nll"):
                assert row[key] == pytest.approx(expected[key], rel=tolerance), key


def train_in_shares(directory, ranks: int, mbs: int, layout: dict):
    """Without context parallelism, but padded as with it, and the tokens that one of its ranks would hold are scaled by
    themselves."""
    whole = Scaling._rounded

    def rounded(self: Scaling, x: torch.Tensor, dtype: torch.dtype, tile: tuple[int, int]) -> torch.Tensor:
        if tile == (BLOCK, BLOCK):  # a weight
            return whole(self, x, dtype, tile)
        chunks = x.chunk(2 * ranks)
        shares = [whole(self, torch.cat([chunks[r], chunks[-1 - r]]), dtype, tile).chunk(2) for r in range(ranks)]
        return torch.cat([front for front, _ in shares] + [back for _, back in reversed(shares)])

    Scaling._rounded = rounded
    multiple = 2 * ranks * layout.get(TP, 1)
    MegatronPolicy.pad_multiple = property(lambda self: multiple)
    return test_layouts.train(directory, mbs, layout)


@pytest.mark.parametrize(
    "scaling,ranks,mbs,layout",
    [
        (TENSORWISE, 4, 4, {"packing": True}),
        (TENSORWISE, 2, 2, {TP: 2, "sequence_parallel": True}),
        (BLOCKWISE, 2, 1, {}),
    ],
)
def test_a_context_parallel_rank_has_scales_of_its_own(checkpoint, scaling, ranks, mbs, layout):
    """As on Transformer Engine's layers; loss, gradient and updated weights are those of one rank but for that.

    Measured 6e-7 and, in weights, 6e-5 where rounding tips a value over; with scales of the whole 8e-3 and 3e-2.
    """
    layout, tp = {**scaling, **layout}, layout.get(TP, 1)
    expected = run_ranks(tp, train_in_shares, checkpoint, ranks, mbs, layout)
    got = run_ranks(tp * ranks, test_layouts.train, checkpoint, mbs, {**layout, CP: ranks})
    for _, rows, _ in got:
        for wanted, row in zip(expected[0][1], rows, strict=True):
            for key in ("loss", "grad_norm", "answer/nll"):
                assert row[key] == pytest.approx(wanted[key], rel=1e-3), key
    shape = ModelShape.from_dir(checkpoint)
    weights, wanted = (test_layouts.hf_tensors(shape, results) for results in (got, expected))
    assert all((weights[name] - wanted[name]).abs().max() < 1e-3 for name in wanted)


def test_scales_of_a_whole_tensor_depend_on_who_shares_a_sequence(checkpoint):
    """Then the test above would be the same without its shares."""
    (alone,), (row, _) = (run_ranks(cp, test_layouts.train, checkpoint, 1, {**TENSORWISE, CP: cp}) for cp in (1, 2))
    assert 1e-3 < abs(row[1][0]["grad_norm"] / alone[1][0]["grad_norm"] - 1) < 0.2


def sampled(directory, megatron: dict, fp8: str, weighted: bool = False) -> dict[str, float]:
    """One step; the metrics of its update."""
    settings = test_on_policy.settings
    recipe = settings(megatron, 1.0)
    recipe = replace(recipe, nrt=replace(recipe.nrt, rollout_importance_sampling=weighted))
    generation = replace(recipe.policy.generation, fp8=fp8)
    recipe = replace(recipe, policy=replace(recipe.policy, generation=generation))
    test_on_policy.settings = lambda layout, temperature: recipe
    return test_on_policy.step(directory, megatron, 1.0)


@pytest.mark.parametrize(
    "layout", [(1, {}), (2, {TP: 2}), (2, {TP: 2, "sequence_parallel": True}), (2, {PP: 2}), (2, {CP: 2})]
)
def test_scales_of_a_tokens_own_keep_sampler_and_trainer_together(checkpoint, layout):
    world, megatron = layout
    row = run_ranks(world, sampled, checkpoint, {**BLOCKWISE, **megatron}, "same")[0]
    assert row["logprob_gap/max"] < 0.1 and row["logprob_gap/abs_mean"] < 1e-3


def test_a_scale_for_the_whole_batch_parts_sampler_and_trainer_and_the_gap_is_reported(checkpoint):
    """What else is in the batch moves a token's rounding."""
    (row,) = run_ranks(1, sampled, checkpoint, TENSORWISE, "same")
    assert 1e-3 < row["logprob_gap/abs_mean"] < row["logprob_gap/max"] < 1


def test_importance_sampling_takes_the_gap_out_of_the_ratio(checkpoint):
    (plain,) = run_ranks(1, sampled, checkpoint, BLOCKWISE, "none")
    assert plain["ratio/max"] > 1.01 and "rollout_weight/mean" not in plain
    for world, layout in ((1, {}), (2, {PP: 2, VPP: 2}), (2, {})):
        row = run_ranks(world, sampled, checkpoint, {**BLOCKWISE, **layout}, "none", True)[0]
        assert row["ratio/max"] == row["ratio/mean"] == 1  # the trainer's own log-probs, bit for bit
        assert row["logprob_gap/abs_mean"] == pytest.approx(plain["logprob_gap/abs_mean"], rel=1e-3)
        assert row["rollout_weight/mean"] == pytest.approx(1, abs=0.1) and row["rollout_weight/cap_share"] == 0


def greedy(directory, megatron: dict, fp8: str) -> dict[str, float]:
    """Metrics of a rollout alone, before any update."""
    row = sampled(directory, megatron, fp8)
    return {k: v for k, v in row.items() if k.startswith(("reward/", "trace/", "answer/prob"))}


def test_a_rollout_without_fp8_is_that_of_a_model_without_fp8(checkpoint):
    plain, without = (
        run_ranks(1, greedy, checkpoint, cfg, fp8)[0] for cfg, fp8 in (({}, "same"), (TENSORWISE, "none"))
    )
    differing = {k for k in plain if plain[k] != without[k]}
    assert differing <= {"trace/entropy"}  # of the update's forward
    assert run_ranks(1, greedy, checkpoint, TENSORWISE, "same")[0]["reward/trace_mean"] != plain["reward/trace_mean"]


def learn(directory, megatron: dict) -> list[float]:
    """Answers' nll over twenty updates on the same sequences."""
    recipe = test_layouts.settings(8, megatron)
    recipe = replace(recipe, nrt=replace(recipe.nrt, reward_scheme="sft", num_prompts_per_step=8, loss_normalizer=8.0))
    policy, grid = tiny.policy(directory, recipe), tiny.grid(8)
    return [update(policy, grid, recipe).reduce(policy.runtime)["answer/nll"] for _ in range(20)]


@pytest.mark.parametrize("cfg", [TENSORWISE, BLOCKWISE])
def test_training_learns_as_without_fp8(checkpoint, cfg):
    plain, fp8 = (run_ranks(1, learn, checkpoint, megatron)[0] for megatron in ({}, cfg))
    assert plain[0] > 4 and fp8[0] == pytest.approx(plain[0], abs=0.3)
    assert plain[-1] < 0.1 * plain[0] and fp8[-1] < 1.25 * plain[-1]


def keeps_weights(directory) -> list:
    policy = tiny.policy(directory, tiny.recipe(**TENSORWISE))
    layers = list(rehearsed_layers(policy.chunks[0]))
    with rollout_precision(policy.chunks, "same"):
        x = torch.randn(3, 1, layers[0].weight.size(1))
        first, second = layers[0](x)[0], layers[0](x)[0]
        kept = [len(layer.kept) for layer in layers[:2]]
    with torch.no_grad():
        layers[0].weight.mul_(2.0)
    with rollout_precision(policy.chunks, "same"):
        third = layers[0](x)[0]
    off = [layer.scaling for layer in layers] if not all(layer.scaling for layer in layers) else []
    return [torch.equal(first, second), kept, torch.equal(third, 2 * first), layers[0].kept, off]


def test_weights_are_rounded_once_a_rollout_and_again_in_the_next(checkpoint):
    assert run_ranks(1, keeps_weights, checkpoint)[0] == [True, [1, 0], True, None, []]
