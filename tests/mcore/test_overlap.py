"""Exchanges that overlap with the passes, as the recipes for GPUs have them: the same updates, whole weights after."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.mcore import model
from nrt_megatron.mcore.hf import global_parameters
from nrt_megatron.update import update
from tests.distributed import run_ranks
from tests.mcore import tiny
from tests.mcore.test_layouts import PP, SEQUENCES, TP, VPP, compare, hf_tensors, local, settings, train

REDUCE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
GATHER = {**REDUCE, "overlap_param_gather": True}


def train_in_small_buckets(directory, layout: dict):
    """As `train`, with the output layer in a bucket of its own, as that of a large model is."""
    model.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=1000)
    return train(directory, 1, layout)


def train_in_unequal_portions(directory, layout: dict):
    """As `train`, first in micro-batches of one sequence, then in fewer of two: exchanges are in the last one alone."""
    recipe = settings(1, dict(layout))
    policy = tiny.policy(directory, recipe)
    rows = []
    for seed, size in ((3, 1), (4, 2)):
        portions = replace(recipe, policy=replace(recipe.policy, train_micro_batch_size=size))
        grid = local(tiny.grid(SEQUENCES, seed), policy)
        rows.append(update(policy, grid, portions).reduce(policy.runtime))
    parameters = {n: p.detach().clone() for c in policy.chunks for n, p in global_parameters(c)}
    place = policy.runtime
    return (place.tp_rank, place.tp_size, place.dp_rank), rows, parameters


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tiny.save_hf(tiny.MISTRAL, tmp_path_factory.mktemp("mistral"))
    shape = ModelShape.from_dir(directory)
    (result,) = run_ranks(1, train, directory, 1, {})
    return directory, shape, result[1], hf_tensors(shape, [result])


@pytest.mark.parametrize(
    "world,layout",
    [(2, REDUCE), (2, GATHER), (4, {TP: 2, **GATHER}), (4, {PP: 2, **GATHER}), (4, {PP: 2, VPP: 2, **GATHER})],
)
def test_overlapping_exchanges_train_like_one_rank(alone, world, layout):
    compare(alone, run_ranks(world, train_in_small_buckets, alone[0], layout))


@pytest.mark.parametrize("world,layout", [(2, GATHER), (4, {PP: 2, **GATHER}), (4, {PP: 2, VPP: 2, **GATHER})])
def test_the_number_of_micro_batches_may_change(alone, world, layout):
    compare(alone, run_ranks(world, train_in_unequal_portions, alone[0], layout))
