"""`sbatch slurm/nrt_70b.sh recipes/nrt-tiny-2n0g-cpu.yaml` on a real Slurm: two nodes, one rank on each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import pytest

from tests.run import tiny
from tests.slurm.cluster import Job, PrivateSlurm
from tests.slurm.conftest import ROOT
from tools.torture import REDUCED, differences

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 30
SLOW_S = 3
"""Added to a step where a job is to be disturbed: slurmctld looks at time limits every 30 s, and machines are busy."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that put the quickstart's task, with a base model that has hardly been trained, into a directory."""
    from nrt_megatron.quickstart import tiny_sum

    made = tmp_path_factory.mktemp("inputs") / "tiny-sum"
    tiny_sum.prepare(made, tiny_sum.Settings(steps=1, train_questions=500, validation_questions=64))
    return [
        *REDUCED,
        "prepare=null",
        f"policy.model.path={made}/base",
        f"data.train={made}/train.jsonl",
        f"data.validation={made}/validation.jsonl",
        "checkpointing.every=10",
        f"nrt.max_num_steps={STEPS}",
    ]


def submit(slurm: PrivateSlurm, run_dir: Path, *overrides: str, env: Optional[dict[str, str]] = None) -> str:
    """The command of the README, with the log beside the run directory."""
    script = ("slurm/nrt_70b.sh", "recipes/nrt-tiny-2n0g-cpu.yaml")
    output = f"--output={run_dir.parent}/%x-%j.log"
    return slurm.submit("--nodes=2", output, *script, f"run_dir={run_dir}", *overrides, cwd=ROOT, env=env)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, [] before there is one."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def undisturbed(slurm: PrivateSlurm, inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A run from the first step to the last."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    return slurm.wait(submit(slurm, run_dir, *inputs)), run_dir


def test_two_nodes_train_to_the_end(undisturbed: tuple[Job, Path]):
    job, run_dir = undisturbed
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", "0:0", 0), job.log()
    assert [row["step"] for row in rows(run_dir)] == list(range(STEPS + 1))
    assert (run_dir / "checkpoints/latest").read_text().strip() == f"step_{STEPS:08d}"
    logs = run_dir / f"logs/{job.id}-0"
    assert {path.name for path in logs.glob("torchrun-*.log")} == {"torchrun-n1.log", "torchrun-n2.log"}
    assert (logs / "rank-0000.log").exists() and (logs / "rank-0001.log").exists()
    assert not list(logs.glob("*.exit"))


def test_at_its_time_limit_and_requeued_in_the_middle_it_ends_the_same(
    slurm: PrivateSlurm, undisturbed: tuple[Job, Path], inputs: list[str], tmp_path: Path
):
    run_dir = tmp_path / "run"
    slow = tiny.slow_steps(tmp_path / "site", SLOW_S, "int(os.environ.get('SLURM_RESTART_COUNT', 0)) < 2")
    job_id = submit(slurm, run_dir, *inputs, env={"PYTHONPATH": slow})
    slurm.wait_until(job_id, lambda job: len(rows(run_dir)) >= 2)
    set_time_limit(slurm, job_id, "5")  # below the 1800 s before the limit at which the script wants its signal
    slurm.wait_until(job_id, lambda job: job.restarts == 1)
    set_time_limit(slurm, job_id, "60")
    done = len(rows(run_dir))
    slurm.wait_until(job_id, lambda job: job.state == "RUNNING" and len(rows(run_dir)) >= done + 3)
    slurm.run("scontrol", "requeue", job_id)
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", "0:0", 2), job.log()
    assert "SIGUSR1" in job.log() and "nrt: unfinished; requeued" in job.log()
    assert job.log().count("continuing from") == 2, "it began again"
    assert differences(run_dir, undisturbed[1]) == []


def set_time_limit(slurm: PrivateSlurm, job_id: str, minutes: str) -> None:
    """As an administrator can: of a job in the queue or running."""
    slurm.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}")


def test_a_bad_recipe_fails_at_once_with_its_message(slurm: PrivateSlurm, inputs: list[str], tmp_path: Path):
    job = slurm.wait(submit(slurm, tmp_path / "run", *inputs, "nrt.num_generations_per_promt=4"), timeout=30)
    assert (job.state, job.exit_code) == ("FAILED", "2:0")
    lines = job.log().splitlines()
    assert 1 <= len(lines) <= 2 and "nrt.num_generations_per_prompt" in job.log()
    assert not (tmp_path / "run").exists()
