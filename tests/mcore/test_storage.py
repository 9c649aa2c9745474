"""Who writes what of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from nrt_megatron.checkpoints import CheckpointMeta, damage
from nrt_megatron.mcore import checkpoint
from nrt_megatron.recipe import Checkpointing
from tests.distributed import run_ranks
from tests.mcore import tiny

TP, CP, DISTOPT = "tensor_model_parallel_size", "context_parallel_size", "use_distributed_optimizer"
LAYOUTS = {
    "dp2": (2, {}),
    "dp4-bf16": (4, {"bf16": True}),
    "dp4-distopt": (4, {DISTOPT: True}),
    "dp4-distopt-bf16": (4, {DISTOPT: True, "bf16": True}),
    "cp2": (2, {CP: 2}),
    "tp2-dp2": (4, {TP: 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_hf(tiny.LLAMA, tmp_path_factory.mktemp("llama"))


def save(model: Path, directory: Path, async_save: bool, layout: dict) -> tuple[int, int]:
    """Writes a checkpoint; this rank's place among those that hold other tensors."""
    policy = tiny.policy(model, tiny.recipe(**layout))
    saver = checkpoint.Saver(directory, Checkpointing(async_save=async_save))
    meta = CheckpointMeta(1, policy.runtime.world_size, tiny.LLAMA)
    saver.save(policy, meta, lambda _: None)
    saver.finish()
    return policy.runtime.tp_rank, policy.runtime.pp_rank


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_with_the_same_tensors_write_as_many_bytes(model, tmp_path, name, async_save):
    world, layout = LAYOUTS[name]
    places = run_ranks(world, save, model, tmp_path, async_save, layout)
    written = tmp_path / "step_00000001"
    assert damage(written, contents=True) is None
    sizes = [0] * world
    for file in (written / "dist").glob("*.distcp"):
        sizes[checkpoint._writer(file.name)] += file.stat().st_size
    for place in set(places):
        copies = [size for size, at in zip(sizes, places) if at == place]
        mean = sum(copies) / len(copies)
        assert all(abs(size / mean - 1) < 0.25 for size in copies), copies
