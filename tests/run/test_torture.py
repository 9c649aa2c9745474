"""`make torture` in small: three kills, every restart goes on, nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.run import tiny

ROOT = Path(__file__).parents[2]


def test_three_kills(tmp_path):
    inputs = tiny.write_inputs(tmp_path)
    inputs["cluster"]["cpu_ranks"] = inputs["policy"]["megatron_cfg"]["tensor_model_parallel_size"] = 2
    inputs["checkpointing"]["every"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(inputs))
    command = [sys.executable, str(ROOT / "tools/torture.py"), "--kills=3", f"--recipe={tmp_path}/recipe.yaml"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "nrt.max_num_steps=12"], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "metrics, samples, weights and optimizer equal, no checkpoint lost" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[1:4]] == ["1", "2", "3"]
