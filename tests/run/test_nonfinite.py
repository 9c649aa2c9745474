"""An update that is not finite changes nothing, is counted, and ends the run after some in a row, its batch kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nrt_megatron import replay
from nrt_megatron.checkpoints import CheckpointMeta, damage
from nrt_megatron.objective.loss import LossOutput, TokenBatch
from nrt_megatron.recipe import ConfigError
from nrt_megatron.report import read_metrics
from tests.run import tiny
from tests.run.tiny import CP, DISTOPT, PP, TP, VPP

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {TP: 2}),
    "dp2": (2, {}),
    "dp2-distopt": (2, {DISTOPT: True}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "cp2-distopt": (2, {CP: 2, DISTOPT: True}),
}


def spoil(updates: set[int], how: str, rank: int) -> Callable[[], None]:
    """Makes the loss of the last micro-batch of some updates, counted from 1, not finite on one rank alone.

    `gradient`: loss and gradient are NaN; `loss`: the loss is infinite, its gradient as it should be.
    """

    def before() -> None:
        from nrt_megatron import update
        from nrt_megatron.mcore.policy import MegatronPolicy

        loss, apply, count = update.nrt_loss, MegatronPolicy.update, [0]

        def spoiled(batch: TokenBatch, settings) -> LossOutput:
            output = loss(batch, settings)
            if count[0] not in updates or dist.get_rank() != rank:
                return output
            bad = output.loss_sum * float("nan") if how == "gradient" else output.loss_sum + float("inf")
            return replace(output, loss_sum=bad)

        def counted(self, batches, loss_fn):
            count[0] += 1
            return apply(self, batches, loss_fn)

        update.nrt_loss, MegatronPolicy.update = spoiled, counted

    return before


@pytest.mark.parametrize(
    ("layout", "how"), [*((name, "gradient") for name in LAYOUTS), ("one", "loss"), ("dp2-distopt", "loss")]
)
def test_a_skipped_update_changes_nothing(tmp_path, layout, how):
    """Two updates a step: with both of step 2 spoiled, its checkpoint has the weights and moments of step 1's."""
    ranks, megatron = LAYOUTS[layout]
    inputs = tiny.write_inputs(tmp_path)
    options = ("checkpointing.every=1", "checkpointing.keep_last=9", "nrt.max_num_steps=3")
    settings = tiny.recipe(inputs, *options, ranks=ranks, **megatron)
    tiny.train_ranks(settings, ranks, spoil({3, 4}, how, ranks - 1))
    first, second, third = (tiny.tensors(tmp_path / f"run/checkpoints/step_0000000{step}") for step in (1, 2, 3))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert not all(torch.equal(tensor, third[key]) for key, tensor in first.items())
    _, one, two, three = read_metrics(tmp_path / "run")
    assert [row["update/skipped_share"] for row in (one, two, three)] == [0, 1, 0]
    assert two["grad_norm"] is None and two["nonfinite"] >= 1
    # The loss of a replica is that of its first tensor and context rank, and the last rank's alone was spoiled.
    assert two["loss"] is None or layout in ("tp2", "cp2-distopt")
    assert three["grad_norm"] > 0 and "nonfinite" not in three
    metas = [CheckpointMeta.read(tmp_path / f"run/checkpoints/step_0000000{step}") for step in (1, 2, 3)]
    assert [meta.progress["skipped_in_a_row"] for meta in metas] == [0, 2, 0]


def test_a_run_whose_first_updates_are_skipped_can_be_continued(tmp_path):
    """Adam has no state then; the checkpoint has zeros, and the steps it counts are none."""
    inputs = tiny.write_inputs(tmp_path)
    options = ("checkpointing.every=1", "nrt.max_num_steps=2")
    whole = tiny.recipe(inputs, f"run_dir={tmp_path}/whole", *options)
    tiny.train_ranks(whole, 1, spoil({1, 2}, "gradient", 0))
    cut = tiny.recipe(inputs, *options)
    with pytest.raises(AssertionError, match="stop here"):
        tiny.train_ranks(cut, 1, lambda: (spoil({1, 2}, "gradient", 0)(), stop_after_save()))
    tiny.train_ranks(cut, 1)
    assert tiny.rows(tmp_path / "run") == tiny.rows(tmp_path / "whole")


def stop_after_save() -> None:
    from nrt_megatron.run import Run

    save = Run.save

    def saving(self: Run) -> None:
        save(self)
        raise RuntimeError("stop here")

    Run.save = saving


@pytest.mark.parametrize("layout", ["one", "dp2", "pp2-vpp2", "cp2-distopt"])
def test_too_many_in_a_row_end_the_run_and_keep_the_batch(tmp_path, layout, capsys):
    ranks, megatron = LAYOUTS[layout]
    inputs = tiny.write_inputs(tmp_path)
    options = ("checkpointing.every=1", "nrt.max_skipped_updates=3")
    settings = tiny.recipe(inputs, *options, ranks=ranks, **megatron)
    codes, said = tiny.work_ranks(settings, ranks, spoil({2, 5, 6, 7}, "gradient", ranks - 1))
    directory = tmp_path / "run/replay/step_00000004"
    assert codes == [2] * ranks and said.count("\n") == 1
    assert said.startswith("nrt: nrt.max_skipped_updates = 3: ") and f"nrt replay {directory}" in said
    assert [row["update/skipped_share"] for row in tiny.rows(tmp_path / "run")[1:]] == [0.5, 0, 1]
    assert damage(directory, contents=True) is None and CheckpointMeta.read(directory).kind == "replay"
    dp = 2 if layout == "dp2" else 1
    assert len(replay.batch_files(directory)) == dp
    weights, last = tiny.tensors(directory), tiny.tensors(tmp_path / "run/checkpoints/step_00000003")
    assert weights and all(torch.equal(tensor, last[key]) for key, tensor in weights.items())
    replayed(directory, settings, capsys)


def replayed(directory: Path, settings, capsys) -> None:
    """Nothing was wrong with the batch itself, so replayed on one rank it has the loss and norm of a sound update."""
    from tests.distributed import run_ranks

    lines = run_ranks(1, replayed_lines, directory, settings)[0]
    assert all("finite" not in line for line in lines) and lines[-1].startswith("gradient norm ")
    assert sum("4 sequences" in line or "1 sequences" in line for line in lines) == len(lines) - 1


def replayed_lines(directory: Path, settings) -> list[str]:
    import builtins
    import os

    lines: list[str] = []
    builtins.print = lambda text, **_: lines.append(text)
    del os.environ["RANK"]
    replay.replay(directory, settings)
    return lines


def test_files_of_a_replay_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no batch_\*.safetensors"):
        replay.batch_files(tmp_path)
    (tmp_path / "batch_0.safetensors").write_text("?")
    with pytest.raises(ConfigError, match="no batch written by"):
        replay.read_batches(tmp_path / "batch_0.safetensors")
