"""A checkpoint saved at any layout loads at every other, and training goes on from it as if nothing had changed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from nrt_megatron.checkpoints import step_dir
from nrt_megatron.mcore import checkpoint, runtime
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.preflight import load_inputs
from nrt_megatron.recipe import Checkpointing, Recipe, to_yaml
from tests.distributed import run_ranks
from tests.run import tiny
from tests.run.tiny import CP, DISTOPT, PP, SP, TP, VPP

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp4": (4, {TP: 4}),
    "pp2": (2, {PP: 2}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "dp2-distopt": (2, {DISTOPT: True}),
    "tp2-sp-pp2": (4, {TP: 2, PP: 2, SP: True}),
    "tp2-dp2": (4, {TP: 2}),
    "pp2-vpp2-dp2-distopt": (4, {PP: 2, VPP: 2, DISTOPT: True}),
    "cp2-distopt": (2, {CP: 2, DISTOPT: True}),
    "tp2-sp-cp2": (4, {TP: 2, SP: True, CP: 2}),
}
UNTIED = {**tiny.MODEL, "tie_word_embeddings": False}
"""The vocabulary of 30 has 30, 36 or 48 rows at TP 1, 2 and 4."""


BF16 = ("one", "tp2", "dp2-distopt", "pp2-vpp2-dp2-distopt", "cp2-distopt")
"""Where weights are bf16, the three optimizers keep fp32 copies in three ways."""


@dataclass(frozen=True)
class Case:
    """A run on one rank that was not interrupted, and its checkpoint of step 3 saved at every layout."""

    inputs: dict
    run: Path
    saved: dict[str, Path]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("fp32"), False, tuple(LAYOUTS))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("bf16"), True, BF16)


def make_case(directory: Path, bf16: bool, names: tuple[str, ...]) -> Case:
    inputs = tiny.write_inputs(directory)
    inputs["policy"]["model"] = {"config": UNTIED}
    inputs["policy"]["megatron_cfg"]["bf16"] = bf16
    tiny.train_ranks(tiny.recipe(inputs), 1)
    source = directory / "run/checkpoints/step_00000003"
    for name in names:
        ranks, layout = LAYOUTS[name]
        run_ranks(ranks, reload, tiny.recipe(inputs, ranks=ranks, **layout), {name: source}, directory)
    return Case(inputs, directory / "run", {name: step_dir(directory / name, 3) for name in names})


def reload(settings: Recipe, sources: Mapping[str, Path], target: Path) -> None:
    """Loads each source at this layout, over weights that are not numbers, and saves it again in `target/name`."""
    place = runtime.initialize(settings)
    inputs = load_inputs(settings)
    policy = MegatronPolicy(place, settings.policy, inputs.shape, num_updates=100)
    policy.prepare_for_training()
    for name, source in sources.items():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        meta = checkpoint.load(source, policy)
        for chunk in policy.chunks:
            assert all(parameter.isfinite().all() for parameter in chunk.parameters())
        saver = checkpoint.Saver(target / name, Checkpointing())
        saver.save(
            policy,
            replace(meta, world_size=place.world_size),
            lambda directory: (directory / "recipe.yaml").write_text(to_yaml(settings)),
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_checkpoint_loads(fp32, name, tmp_path):
    assert_loads_all(fp32, name, tmp_path)


@pytest.mark.parametrize("name", BF16)
def test_every_bf16_checkpoint_loads(bf16, name, tmp_path):
    assert_loads_all(bf16, name, tmp_path)


def assert_loads_all(case: Case, name: str, directory: Path) -> None:
    """Weights, moments and fp32 copies are the same, bit for bit, after a way over any two layouts."""
    ranks, layout = LAYOUTS[name]
    run_ranks(ranks, reload, tiny.recipe(case.inputs, ranks=ranks, **layout), case.saved, directory)
    reference = tiny.tensors(case.run / "checkpoints/step_00000003")
    for other in case.saved:
        found = tiny.tensors(step_dir(directory / other, 3))
        assert found.keys() == reference.keys(), other
        for key, tensor in reference.items():
            whole = found[key]
            if "embeddings" in key or "output_layer" in key:
                assert not whole[30:].any(), f"{other}: {key} has values in the padding"
                whole, tensor = whole[:30], tensor[:30]
            assert torch.equal(whole, tensor), f"{other}: {key}"


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_training_goes_on_at_another_layout(fp32, name, tmp_path):
    """Loss and gradient norm of the steps after the change are those of the run that was not interrupted."""
    ranks, layout = LAYOUTS[name]
    settings = tiny.recipe(fp32.inputs, f"run_dir={tmp_path}/run", ranks=ranks, **layout)
    other = {"pp2-vpp2-dp2-distopt": "tp4"}.get(name, "pp2-vpp2-dp2-distopt")
    shutil.copytree(fp32.saved[other], tmp_path / "run/checkpoints/step_00000003")
    tiny.train_ranks(settings, ranks)
    expected, found = (
        {row["step"]: row for row in tiny.rows(directory) if row["step"] > 3}
        for directory in (fp32.run, tmp_path / "run")
    )
    assert found.keys() == expected.keys() == {4, 5, 6}
    for step, row in found.items():
        for key in ("loss", "grad_norm", "lr", "reward/trace_mean", "trace/length_mean", "answer/nll"):
            assert row[key] == pytest.approx(expected[step][key], rel=1e-5, abs=1e-6), (step, key)
        for key in (key for key in row if key.startswith(("tokens/", "eval/"))):
            assert row[key] == pytest.approx(expected[step][key], rel=1e-5), (step, key)


def test_fewer_questions_than_replicas_with_weights_gathered_by_the_forward(tmp_path):
    """A replica without a question runs no forward, in which the others would wait for its share of the weights."""
    inputs = tiny.write_inputs(tmp_path)
    overlap = {DISTOPT: True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    short = (
        "evaluation.num_questions=2",
        "evaluation.every=1",
        "nrt.max_num_steps=2",
        "policy.train_global_batch_size=8",
    )
    tiny.train_ranks(tiny.recipe(inputs, *short, ranks=4, **overlap), 4, timeout=60)
    overlapped = tiny.rows(tmp_path / "run")
    tiny.train_ranks(tiny.recipe(inputs, *short, f"run_dir={tmp_path / 'one'}"), 1)
    for expected, row in zip(tiny.rows(tmp_path / "one"), overlapped, strict=True):
        assert row["eval/answer_prob"] == pytest.approx(expected["eval/answer_prob"], rel=1e-4)
