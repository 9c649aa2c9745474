"""The job scripts on a real Slurm of two nodes, with a stand-in for `nrt`: signals, failures, chains."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Job, PrivateSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SUBMIT = ("--nodes=2", "slurm/nrt_70b.sh", "recipe.yaml")


def steps(root: Path, run: str, rank: int) -> list[int]:
    """The steps a rank has done, over all starts."""
    return [int(line) for line in (root / run / f"steps-{rank}.txt").read_text().split()]


def stepping(root: Path, run: str) -> Callable[[Job], bool]:
    """Whether every rank has done a step, so that none is deaf to signals any more."""
    return lambda job: all((root / run / f"steps-{rank}.txt").exists() for rank in range(4))


def test_sigusr1_checkpoints_requeues_and_continues(slurm: PrivateSlurm, standin: Path):
    job_id = slurm.submit(*SUBMIT, "act.steps=12", "act.seconds=0.5", "run_dir=runs/a", cwd=standin)
    slurm.wait_until(job_id, stepping(standin, "runs/a"))
    slurm.run("scancel", "--batch", "--signal=USR1", job_id)
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", "0:0", 1), job.log()
    for rank in range(4):
        assert steps(standin, "runs/a", rank) == list(range(1, 13))
    assert "SIGUSR1: the ranks are asked to checkpoint and stop" in job.log()
    assert "nrt: unfinished; requeued" in job.log()  # appended to, not truncated, by the second start
    assert job.log().rstrip().endswith("nrt: complete")
    for start in (f"{job_id}-0", f"{job_id}-1"):
        logs = standin / "runs/a/logs" / start
        hosts = [(logs / f"rank-{rank:04d}.log").read_text().split()[-1] for rank in range(4)]
        if start.endswith("-1"):
            assert hosts == ["n1", "n1", "n2", "n2"]
        facts = (logs / "environment.txt").read_text()
        assert f"job: {job_id}, restart {start[-1]}, nodes n[1-2]" in facts and "PyYAML==" in facts


def test_a_failing_rank_ends_the_job_and_is_named(slurm: PrivateSlurm, standin: Path):
    started = time.monotonic()
    job_id = slurm.submit(*SUBMIT, "act.steps=1000", "act.fail_rank=2", "act.fail_code=7", cwd=standin)
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", "1:0", 0), job.log()
    assert "nrt: rank-0002 on n2 ended with exit code 7" in job.log()
    assert "rank 2 gives up" in job.log()  # the end of its log
    assert time.monotonic() - started < 60, "the other ranks would have gone on for 200 s"


def test_a_cancelled_job_checkpoints_and_stays_cancelled(slurm: PrivateSlurm, standin: Path):
    job_id = slurm.submit(*SUBMIT, "act.steps=1000", "act.seconds=0.1", "run_dir=runs/c", cwd=standin)
    slurm.wait_until(job_id, stepping(standin, "runs/c"))
    slurm.run("scancel", job_id)
    job = slurm.wait(job_id)
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.log()
    for rank in range(4):
        assert "stops after step" in (standin / f"runs/c/logs/{job_id}-0/rank-{rank:04d}.log").read_text()


@pytest.mark.parametrize(
    "nodes, override, message",
    [
        (
            1,
            "cluster.cpu_ranks=4",
            "cluster.num_nodes=2, but the job has 1 nodes; submit with sbatch --nodes=2, or set cluster.num_nodes=1",
        ),
        (
            2,
            "cluster.gpus_per_node=4",
            "cluster.gpus_per_node=4, but the job has 8 GPUs on a node; set cluster.gpus_per_node=8,"
            " or submit to nodes with 4",
        ),
    ],
    ids=["nodes", "gpus"],
)
def test_an_allocation_of_another_size_ends_before_ranks(
    slurm: PrivateSlurm, standin: Path, nodes: int, override: str, message: str
):
    job = slurm.wait(slurm.submit(f"--nodes={nodes}", "slurm/nrt_70b.sh", "recipe.yaml", override, cwd=standin))
    assert (job.state, job.exit_code) == ("FAILED", "2:0"), job.log()
    assert job.log() == f"nrt: {message}\n"
    assert not (standin / "runs").exists()


def test_release_chains_convert_train_export(slurm: PrivateSlurm, standin: Path):
    (standin / "hf").mkdir()
    command = ["slurm/release.sh", "hf", "work", "recipe.yaml", "cluster.num_nodes=1"]
    env = {**slurm.env, "NRT_JOB": "slurm/nrt_8b.sh"}
    done = subprocess.run(command, cwd=standin, env=env, capture_output=True, text=True, check=True)
    jobs = re.match(r"convert (\d+), train (\d+), export (\d+);", done.stdout).groups()
    for name, job_id in zip(("convert", "train", "export"), jobs):
        job = slurm.wait(job_id)
        assert (name, job.state) == (name, "COMPLETED"), job.log()
    assert (standin / "work/base/meta.json").read_text() == str(standin / "hf")
    assert steps(standin, "work/run", 0) == [1, 2, 3, 4]
    assert (standin / "work/release/meta.json").read_text() == str(standin / "work/run/checkpoints/step_00000004")
