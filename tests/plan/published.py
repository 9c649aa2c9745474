"""Published runs as recipes with `policy` and `cluster` alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Run:
    """One row of published.yaml."""

    source: str
    row: int
    model: str
    hardware: str
    gpus: int
    precision: str
    global_batch: int
    micro_batch: int
    sequence: int
    tp: int
    pp: int
    cp: int
    vpp: int
    tokens_per_second_per_gpu: float

    @property
    def name(self) -> str:
        layout = f"tp{self.tp}pp{self.pp}cp{self.cp}vpp{self.vpp}"
        return f"{self.source}-{self.row}-{self.model}-{self.hardware}x{self.gpus}-{self.precision}-{layout}"


def load() -> tuple[list[Run], list[Run], dict[str, dict[str, int]]]:
    """Runs that must be met within 15%, runs known to be outside, and the models' shapes."""
    table = yaml.safe_load(_FILE.read_text())
    runs = [Run(source, row, *values) for source, rows in table["runs"].items() for row, values in enumerate(rows)]
    outside = {tuple(entry) for entry in table["outside"]}
    assert set(table["runs"]) == set(table["sources"])
    missed = [run for run in runs if (run.source, run.row) in outside]
    return [run for run in runs if run not in missed], missed, table["models"]


def recipe(run: Run, models: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The run as NeMo's performance recipes set it, in the keys of a recipe."""
    shape = {"model_type": "llama", "max_position_embeddings": 131072, **models[run.model]}
    counted = shape["num_hidden_layers"] % (run.pp * run.vpp) != 0
    megatron: dict[str, Any] = {
        "tensor_model_parallel_size": run.tp,
        "pipeline_model_parallel_size": run.pp,
        "context_parallel_size": run.cp,
        "virtual_pipeline_model_parallel_size": run.vpp if run.vpp > 1 else None,
        "account_for_embedding_in_pipeline_split": counted,
        "account_for_loss_in_pipeline_split": counted,
        "sequence_parallel": run.tp > 1,
        "bf16": True,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
    if run.precision != "bf16":
        megatron |= {"fp8": "hybrid", "fp8_recipe": run.precision}
    return {
        "policy": {
            "model": {"config": shape},
            "train_global_batch_size": run.global_batch,
            "train_micro_batch_size": run.micro_batch,
            "max_total_sequence_length": run.sequence,
            "megatron_cfg": megatron,
        },
        "cluster": {"num_nodes": run.gpus // 8, "gpus_per_node": 8},
    }
