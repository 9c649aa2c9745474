"""The job scripts without Slurm: commands stand in for Slurm's, and write down how they were called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
RESOLVED = {
    "run_dir": "runs/a b",
    "nrt": {"num_nodes": 99},  # a key of that name elsewhere
    "cluster": {"num_nodes": 2, "gpus_per_node": 8, "cpu_ranks": 1},
}
STUB = """\
#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
"""


@dataclass
class Allocation:
    """A job's surroundings; `run` is the job."""

    root: Path
    calls: Path = field(init=False)
    env: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.calls = self.root / "calls"
        (self.root / "slurm").symlink_to(ROOT / "slurm")
        self.env = {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "NRT_VENV": str(self.root / "venv"),
            "SLURM_SUBMIT_DIR": str(self.root),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_GPUS_ON_NODE": "8",
        }
        self.stub("bin/srun")
        self.stub("bin/scancel")
        self.stub("bin/squeue", "echo RUNNING")
        self.stub("bin/scontrol", "echo n1")
        self.recipe(RESOLVED)

    def stub(self, name: str, script: str = "") -> None:
        """A command in place of Slurm's or of the environment's."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB + script)
        path.chmod(0o755)

    def recipe(self, resolved: dict) -> None:
        """What `nrt train ... --dry-run` prints."""
        (self.root / "resolved.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
        script = f'[[ "$*" != *--dry-run* ]] || cat {self.root}/resolved.yaml'
        self.stub("venv/bin/python", script)

    def run(self, *args: str, script: str = "nrt_70b.sh") -> subprocess.CompletedProcess[str]:
        """`sbatch SCRIPT ARGS`, as the batch script runs."""
        command = ["bash", f"slurm/{script}", *args]
        return subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=30)

    def called(self, start: str) -> list[str]:
        """The calls that begin with `start`."""
        return [line for line in self.calls.read_text().splitlines() if line.startswith(start)]


@pytest.fixture
def job(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    command = ["shellcheck", "--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["nrt_70b.sh", "nrt_8b.sh"])
def test_header_asks_for_what_the_default_recipe_needs(script: str):
    text = (ROOT / "slurm" / script).read_text()
    recipe = ROOT / re.search(r"nrt_train (\S+)", text).group(1)
    if not recipe.exists():
        pytest.skip(f"{recipe.relative_to(ROOT)} is not there yet")
    from nrt_megatron.recipe import load_recipe

    cluster = load_recipe(str(recipe), [], []).cluster
    assert f"#SBATCH --nodes={cluster.num_nodes}\n" in text
    assert f"#SBATCH --gpus-per-node={cluster.gpus_per_node}\n" in text


@pytest.mark.parametrize(
    "args, passed",
    [
        ((), "recipes/nrt-llama3.1-70b-16n8g-tp8pp4-fp8.yaml"),
        (("nrt.seed=7",), "recipes/nrt-llama3.1-70b-16n8g-tp8pp4-fp8.yaml nrt.seed=7"),
        (("my.yaml", "nrt.seed=7"), "my.yaml nrt.seed=7"),
        (("my.yml", "--config", "over.yaml"), "my.yml --config over.yaml"),
        (
            ("policy.model.path=a.yaml",),
            "recipes/nrt-llama3.1-70b-16n8g-tp8pp4-fp8.yaml policy.model.path=a.yaml",
        ),
    ],
)
def test_everything_after_the_scripts_name_reaches_the_recipe(job: Allocation, args: tuple[str, ...], passed: str):
    assert job.run(*args).returncode == 0
    assert job.called("python -m nrt_megatron train") == [f"python -m nrt_megatron train {passed} --dry-run"]


def test_prints_recipe_and_plan_and_keeps_them_with_the_environment(job: Allocation):
    job.env["NCCL_DEBUG"] = "INFO"
    job.env["WANDB_API_KEY"] = "secret"
    done = job.run()
    logs = job.root / "runs/a b/logs/42-0"
    assert yaml.safe_load((logs / "recipe.yaml").read_text()) == RESOLVED
    assert "num_nodes: 2" in done.stdout
    assert job.called("python -m nrt_megatron plan") == [f"python -m nrt_megatron plan {logs}/recipe.yaml"]
    facts = (logs / "environment.txt").read_text()
    assert "NCCL_DEBUG=INFO" in facts and "secret" not in facts


def test_a_plan_that_fails_is_one_line_and_no_obstacle(job: Allocation):
    job.stub("venv/bin/python", f'case "$*" in *--dry-run*) cat {job.root}/resolved.yaml;; *plan*) exit 1;; esac')
    done = job.run()
    assert done.returncode == 0 and "nrt: nrt plan failed; going on\n" in done.stdout
    assert job.called("srun")


def test_one_torchrun_a_node_and_one_failure_ends_all(job: Allocation):
    job.run()
    (call,) = job.called("srun")
    for option in ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"):
        assert f" {option} " in call
    assert call.endswith(f"bash slurm/node.sh 8 {job.root}/runs/a b/logs/42-0")


def test_container_for_every_process(job: Allocation):
    job.env |= {"NRT_CONTAINER": "/images/nrt.sqsh", "NRT_CONTAINER_MOUNTS": "/data:/data"}
    job.stub("bin/srun", f'[[ "$*" != *--dry-run* ]] || cat {job.root}/resolved.yaml')
    assert job.run().returncode == 0
    assert len(job.called("srun")) == 4  # dry run, environment, plan, ranks
    mounts = f"--container-mounts={job.root}:{job.root},/data:/data"
    for call in job.called("srun"):
        assert f"--container-image=/images/nrt.sqsh {mounts} --container-workdir={job.root}" in call
    assert not job.called("python")


@pytest.mark.parametrize(
    "cluster, message",
    [
        (
            {"num_nodes": 16},
            "cluster.num_nodes=16, but the job has 2 nodes; submit with sbatch --nodes=16, or set cluster.num_nodes=2",
        ),
        (
            {"gpus_per_node": 4},
            "cluster.gpus_per_node=4, but the job has 8 GPUs on a node; set cluster.gpus_per_node=8,"
            " or submit to nodes with 4",
        ),
        (
            {"gpus_per_node": 0, "cpu_ranks": 3},
            "cluster.cpu_ranks=3: does not divide over 2 nodes; set a multiple of 2",
        ),
    ],
)
def test_mismatch_is_one_line_before_anything_is_written(job: Allocation, cluster: dict[str, int], message: str):
    job.recipe({**RESOLVED, "cluster": {**RESOLVED["cluster"], **cluster}})
    done = job.run()
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"nrt: {message}\n")
    assert not (job.root / "runs").exists() and not job.called("srun")


@pytest.mark.parametrize("gpus, code", [(8, 0), (6, 2)])
def test_where_slurm_does_not_manage_gpus_the_driver_is_asked(job: Allocation, gpus: int, code: int):
    del job.env["SLURM_GPUS_ON_NODE"]
    job.stub("bin/nvidia-smi", f'for i in $(seq {gpus}); do echo "GPU $i: NVIDIA H100"; done')
    assert job.run().returncode == code


def test_cpu_recipe_on_gpu_nodes_says_so(job: Allocation):
    job.recipe({**RESOLVED, "cluster": {"num_nodes": 2, "gpus_per_node": 0, "cpu_ranks": 4}})
    done = job.run()
    assert done.stdout.startswith("nrt: the recipe runs on CPUs: 8 GPUs on each node stay idle\n")
    assert "bash slurm/node.sh 2 " in job.called("srun")[0]


def test_a_recipe_refused_by_nrt_ends_the_job_with_its_words(job: Allocation):
    job.stub("venv/bin/python", 'echo "nrt: no such key" >&2; exit 2')
    done = job.run()
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "nrt: no such key\n")


def test_a_missing_environment_is_one_line(job: Allocation):
    job.env["NRT_VENV"] = "/nowhere"
    done = job.run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "NRT_VENV=/nowhere" in done.stderr


@pytest.mark.parametrize(
    "srun, ends, code, requeued",
    [
        (0, {}, 0, False),
        (0, {"0000": "75 n1", "0001": "75 n2"}, 75, True),
        (1, {"0000": "2 n1"}, 2, False),
        (1, {"0000": "75 n1", "0001": "1 n2"}, 1, False),
        (137, {}, 1, False),
    ],
    ids=["complete", "unfinished", "mistake", "failure", "killed"],
)
def test_only_an_unfinished_run_is_requeued(
    job: Allocation, srun: int, ends: dict[str, str], code: int, requeued: bool
):
    logs = '"${@: -1}"'
    writes = "".join(
        f"echo {end} > {logs}/rank-{rank}.exit; echo said-{rank} > {logs}/rank-{rank}.log\n"
        for rank, end in ends.items()
    )
    job.stub("bin/srun", f"{writes}exit {srun}")
    done = job.run()
    assert done.returncode == code
    assert bool(job.called("scontrol requeue 42")) == requeued
    if code == 1 and ends:
        assert "nrt: rank-0001 on n2 ended with exit code 1\nsaid-0001\n" in done.stdout


@pytest.mark.parametrize(
    "squeue, scontrol, says",
    [
        ("COMPLETING", "", "the job is COMPLETING and left alone"),
        ("RUNNING", "exit 1", "submit the same command again"),
    ],
)
def test_no_requeue_of_a_cancelled_job_or_where_it_is_refused(job: Allocation, squeue: str, scontrol: str, says: str):
    job.stub("bin/squeue", f"echo {squeue}")
    job.stub("bin/scontrol", f"echo n1; [[ $1 != requeue ]] || {scontrol or 'true'}")
    job.stub("bin/srun", 'echo 75 n1 > "${@: -1}"/rank-0000.exit')
    done = job.run()
    assert done.returncode == 75 and says in done.stdout


def test_a_signal_reaches_ranks_through_scancel_and_requeues(job: Allocation):
    # The batch script gets the signal while its ranks run; they are told by scancel, never through srun.
    script = 'kill -USR1 $PPID; until grep -q ^scancel "$CALLS"; do sleep 0.05; done; '
    job.stub("bin/srun", script + 'echo 75 n1 > "${@: -1}"/rank-0000.exit')
    done = job.run()
    assert done.returncode == 75 and job.called("scontrol requeue 42")
    assert job.called("scancel") == ["scancel --signal=USR1 42"]


def test_no_request_to_stop_outlives_its_attempt(job: Allocation):
    # scancel repeats for a minute what Slurm refuses for a job that is completing, and a requeued job has the same id.
    job.stub("bin/scancel", 'sleep 3; echo "scancel came late" >> "$CALLS"')
    script = 'kill -USR1 $PPID; until grep -q ^scancel "$CALLS"; do sleep 0.05; done; '
    job.stub("bin/srun", script + 'echo 75 n1 > "${@: -1}"/rank-0000.exit')
    assert job.run().returncode == 75
    time.sleep(4)
    assert job.called("scancel") == ["scancel --signal=USR1 42"]


def test_a_rank_that_missed_one_that_left_does_not_prevent_the_requeue(job: Allocation):
    script = 'cd "${@: -1}"; kill -USR1 $PPID; until grep -q ^scancel "$CALLS"; do sleep 0.05; done; '
    job.stub("bin/srun", script + "echo 75 n1 > rank-0000.exit; echo 1 n2 > rank-0001.exit; exit 1")
    done = job.run()
    assert done.returncode == 75 and job.called("scontrol requeue 42")
    assert "nrt: rank-0001 on n2 ended with exit code 1\n" in done.stdout


def test_a_signal_before_the_ranks_start_requeues_without_starting_them(job: Allocation):
    to_the_script = "kill -USR1 $(ps -o ppid= $PPID)"  # above the $(...) that catches the output
    job.stub("venv/bin/python", f'case "$*" in *--dry-run*) cat {job.root}/resolved.yaml; {to_the_script};; esac')
    done = job.run()
    assert done.returncode == 75 and job.called("scontrol requeue 42") and not job.called("srun")


def test_export_takes_the_latest_checkpoint_of_a_run(job: Allocation):
    (job.root / "run/checkpoints").mkdir(parents=True)
    (job.root / "run/checkpoints/latest").write_text("step_00000060\n")
    assert job.run("run", "out", "--verify", script="export.sh").returncode == 0
    assert job.called("python") == ["python -m nrt_megatron export run/checkpoints/step_00000060 out --verify"]
