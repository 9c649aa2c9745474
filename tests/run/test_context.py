"""Context-parallel ranks through whole runs: one replica's work is shared, and its numbers are counted once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.quickstart import tiny_sum
from nrt_megatron.recipe import check, load_recipe
from tests.run import tiny
from tests.run.tiny import CP, SP, TP

SETTINGS = (
    *("nrt.rollout_importance_sampling=true", "nrt.sequence_ratio=true"),
    *("nrt.max_num_steps=2", "logger.samples_num_prompts=4"),
)

PACKED = "policy.sequence_packing.enabled=true"


def log_prompts(directory: Path) -> None:
    """Every rank writes down the prompts that it draws for itself."""
    plain = MegatronGenerator.generate

    def generate(self, request):
        with open(directory / f"drawn_{dist.get_rank()}", "a") as file:
            file.writelines(f"{request.step} {request.max_new_tokens} {index}\n" for index in request.indices)
        return plain(self, request)

    MegatronGenerator.generate = generate


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    inputs = tiny.write_inputs(directory)
    tiny.train_ranks(tiny.recipe(inputs, *SETTINGS), 1, lambda: log_prompts(directory))
    return directory, inputs


@pytest.mark.parametrize(
    "ranks,layout,more",
    [
        (2, {CP: 2}, ()),
        (4, {CP: 2, TP: 2, SP: True}, (PACKED, "policy.train_micro_batch_size=2")),
        (4, {CP: 2}, ("policy.generation.tensor_model_parallel_size=2",)),
    ],
    ids=["cp2", "tp2-sp-cp2-packed", "cp2-dp2-rollout-tp2"],
)
def test_a_run_is_that_of_one_rank(alone, tmp_path, ranks, layout, more):
    """Own log-probs of the trainer and whole-sequence ratios included; every metric, every sampled token."""
    directory, inputs = alone
    settings = tiny.recipe(inputs, *SETTINGS, *more, f"run_dir={tmp_path}/run", ranks=ranks, **layout)
    tiny.train_ranks(settings, ranks, lambda: log_prompts(tmp_path))
    expected, found = tiny.rows(directory / "run"), tiny.rows(tmp_path / "run")
    assert len(found) == len(expected) == 3
    for old, new in zip(expected, found):
        assert new.keys() == old.keys()
        for key in new.keys() - {"update/padding_share", "tokens/update"}:
            assert new[key] == pytest.approx(old[key], rel=1e-4, abs=1e-5), key
        if "tokens/update" in old and PACKED not in more:
            assert new["tokens/update"] == old["tokens/update"]
    drawn = {(s["step"], s["index"]): s for s in tiny.samples(directory / "run")}
    samples = tiny.samples(tmp_path / "run")  # of the first replica
    assert samples
    for sample in samples:
        old = drawn[sample["step"], sample["index"]]
        assert [trace["ids"] for trace in sample["traces"]] == [trace["ids"] for trace in old["traces"]]


def test_no_rank_draws_what_another_draws(alone, tmp_path):
    directory, inputs = alone
    settings = tiny.recipe(inputs, *SETTINGS, f"run_dir={tmp_path}/run", ranks=2, **{CP: 2})
    tiny.train_ranks(settings, 2, lambda: log_prompts(tmp_path))
    whole = sorted((directory / "drawn_0").read_text().splitlines())
    parts = [(tmp_path / f"drawn_{rank}").read_text().splitlines() for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == whole
    assert len(parts[0]) == len(parts[1])


ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes/nrt-tiny-1n0g-cpu.yaml"


def test_the_quickstart_through_the_launcher_is_that_of_two_tensor_ranks(tmp_path):
    """`nrt train` as a user starts it, on a base model of one step of training."""
    made = tmp_path / "made"
    tiny_sum.prepare(made, tiny_sum.Settings(steps=1, train_questions=64, validation_questions=8))
    inputs = [f"policy.model.path={made}/base", f"data.train={made}/train.jsonl"]
    inputs += [f"data.validation={made}/validation.jsonl"]
    less = ["nrt.num_prompts_per_step=4", "policy.train_global_batch_size=32", "policy.train_micro_batch_size=16"]
    overrides = ["prepare=null", "nrt.max_num_steps=2", "evaluation.num_questions=8", *less, *inputs]
    tensor = load_recipe(QUICKSTART, [], [*overrides, f"run_dir={tmp_path}/tensor"])
    check(tensor)
    assert tensor.policy.megatron_cfg.tensor_model_parallel_size == tensor.cluster.cpu_ranks == 2
    tiny.train_ranks(tensor, 2)
    layout = [f"policy.megatron_cfg.{TP}=1", f"policy.megatron_cfg.{CP}=2", f"run_dir={tmp_path}/context"]
    command = [sys.executable, "-m", "nrt_megatron", "train", str(QUICKSTART), *overrides, *layout]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NRT_DEVICE": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected, found = tiny.rows(tmp_path / "tensor"), tiny.rows(tmp_path / "context")
    assert [row["step"] for row in found] == [0, 1, 2]
    for old, new in zip(expected, found, strict=True):
        assert new.keys() == old.keys()
        for key in new.keys() - {"update/padding_share"}:
            assert new[key] == pytest.approx(old[key], rel=1e-4, abs=1e-5), key
    assert (
        tiny.samples(tmp_path / "context")[0]["traces"][0]["ids"]
        == (tiny.samples(tmp_path / "tensor")[0]["traces"][0]["ids"])
    )
