"""One private Slurm for all tests that ask for it, and what they submit to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tests.slurm.cluster import PrivateSlurm, missing_requirement

ROOT = Path(__file__).parents[2]
STANDIN_RECIPE = {
    "run_dir": "runs/standin",
    "cluster": {"num_nodes": 2, "gpus_per_node": 0, "cpu_ranks": 4},
    "act": {"steps": 4, "seconds": 0.2},
}


@pytest.fixture(scope="session")
def slurm(shared_dir: Path) -> Iterator[PrivateSlurm]:
    """Two nodes, running."""
    with FileLock(shared_dir / "slurm.lock"):
        reason = missing_requirement()
    if reason:
        pytest.skip(f"real-Slurm test: {reason}")
    with PrivateSlurm() as cluster:
        cluster.env["NRT_VENV"] = sys.prefix
        yield cluster
    assert not cluster.survivors()


@pytest.fixture
def standin(tmp_path: Path) -> Path:
    """A repository root with the real scripts, and a program in place of `nrt` that needs no torch."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "nrt_megatron").symlink_to(ROOT / "tests/slurm/standin/nrt_megatron")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(STANDIN_RECIPE, sort_keys=False))
    return tmp_path
