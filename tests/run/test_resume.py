"""A run that was interrupted and started again ends like one that was not, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.run import tiny
from tests.run.tiny import DISTOPT, PP, TP, VPP

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {TP: 2}),
    "dp2": (2, {}),
    "dp2-distopt": (2, {DISTOPT: True}),
    "pp2": (2, {PP: 2}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
}


def die_after(step: int):
    """Makes this rank fail right after writing the metrics of `step`, before a checkpoint could be saved."""
    from nrt_megatron.run import Run

    write = Run._write

    def dying(self: Run, row: dict) -> None:
        write(self, row)
        if self.step == step:
            raise Crash(f"step {step}")

    Run._write = dying


class Crash(Exception):
    pass


@pytest.mark.parametrize(
    ("layout", "scheme"), [*((name, "geometric_mean") for name in LAYOUTS), ("one", "sft"), ("tp2", "sft")]
)
def test_interrupted_equals_uninterrupted(tmp_path: Path, layout: str, scheme: str):
    ranks, megatron = LAYOUTS[layout]
    inputs = tiny.write_inputs(tmp_path)
    options = [f"nrt.reward_scheme={scheme}"]
    whole = tiny.recipe(inputs, f"run_dir={tmp_path}/whole", *options, ranks=ranks, **megatron)
    tiny.train_ranks(whole, ranks)
    cut = tiny.recipe(inputs, f"run_dir={tmp_path}/cut", *options, ranks=ranks, **megatron)
    with pytest.raises(AssertionError, match="Crash: step 5"):
        tiny.train_ranks(cut, ranks, lambda: die_after(5))
    assert [row["step"] for row in tiny.rows(cut.run_dir)] == [0, 1, 2, 3, 4, 5]
    tiny.train_ranks(cut, ranks)
    assert tiny.rows(cut.run_dir) == tiny.rows(whole.run_dir)
    assert [row["step"] for row in tiny.rows(cut.run_dir)] == list(range(7))
    if scheme != "sft":
        assert tiny.samples(cut.run_dir) == tiny.samples(whole.run_dir) != []
    assert_same_tensors(tmp_path / "cut", tmp_path / "whole")


def assert_same_tensors(run: Path, other: Path, step: int = 6) -> None:
    mine, theirs = (tiny.tensors(r / f"checkpoints/step_{step:08d}") for r in (run, other))
    assert mine.keys() == theirs.keys() and any("exp_avg" in key for key in mine)
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key
