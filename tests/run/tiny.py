"""Whole runs small enough to repeat: an inline model, a tokenizer of words, questions of a few words."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
import yaml

from nrt_megatron import worker
from nrt_megatron.recipe import Recipe, check, load_recipe, to_yaml
from nrt_megatron.trainer import train
from tests.data.builders import word_level, write_fast, write_jsonl
from tests.distributed import run_ranks
from tools.torture import rows_of

ROOT = Path(__file__).parents[2]
TP, PP, VPP, DISTOPT, SP, CP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "use_distributed_optimizer",
    "sequence_parallel",
    "context_parallel_size",
)
MODEL = {
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "torch_dtype": "float32",
}


def write_inputs(directory: Path) -> dict[str, Any]:
    """Tokenizer and data files in `directory`, and the recipe, as a mapping, of a run on them in `directory/run`."""
    words = [f"w{i}" for i in range(24)]
    write_fast(directory / "tokenizer", word_level(["<unk>", "think", *words]), {"eos_token": "</s>"})
    rows = [
        {"question": f"w{i % 24} w{i * 7 % 24} w{i * 5 % 24}", "answer": f"w{i * 3 % 24} w{i * 11 % 24}"}
        for i in range(40)
    ]
    write_jsonl(directory / "train.jsonl", rows[:32])
    write_jsonl(directory / "validation.jsonl", rows[32:])
    return {
        "run_dir": str(directory / "run"),
        "nrt": {
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 2,
            "max_num_steps": 6,
            "reward_scheme": "geometric_mean",
            "scale_reward_by": "std",
        },
        "policy": {
            "model": {"config": MODEL},
            "tokenizer": {"path": str(directory / "tokenizer"), "trace_open": " think"},
            "train_global_batch_size": 4,
            "train_micro_batch_size": 1,
            "max_total_sequence_length": 32,
            "megatron_cfg": {"make_vocab_size_divisible_by": 6},
            "generation": {"max_new_tokens": 6},
            "optimizer": {"lr": 1e-2, "adam_eps": 1e-5},
            "scheduler": {"lr_decay_style": "linear", "lr_warmup_fraction": 0.2},
        },
        "data": {
            "train": str(directory / "train.jsonl"),
            "validation": str(directory / "validation.jsonl"),
            "prompt_template": "{question}",
        },
        "evaluation": {"num_questions": 4, "max_answer_tokens": 4},
        "checkpointing": {"every": 3},
        "logger": {"samples_every": 2, "tensorboard": False},
        "cluster": {"num_nodes": 1, "gpus_per_node": 0, "cpu_ranks": 1},
    }


def recipe(inputs: Mapping[str, Any], *overrides: str, ranks: int = 1, **megatron: Any) -> Recipe:
    """The recipe of `inputs` at a layout, checked as the command line checks it."""
    path = Path(inputs["run_dir"]).parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(inputs)))
    layout = [f"policy.megatron_cfg.{key}={json.dumps(value)}" for key, value in megatron.items()]
    made = load_recipe(path, [], [*layout, f"cluster.cpu_ranks={ranks}", *overrides])
    check(made)
    return made


def rows(run_dir: Path | str) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    return rows_of(Path(run_dir))


def samples(run_dir: Path | str) -> list[dict[str, Any]]:
    """samples.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "samples.jsonl").read_text().splitlines()]


def train_ranks(
    settings: Recipe, ranks: int, before: Optional[Callable[[], None]] = None, timeout: float = 120.0
) -> list[bool]:
    """Runs the recipe on forked ranks, each calling `before` first; returns what `train` returns on each."""
    return run_ranks(ranks, _train, settings, before, timeout=timeout)


def work_ranks(
    settings: Recipe, ranks: int, before: Optional[Callable[[], None]] = None, timeout: float = 120.0
) -> tuple[list[int], str]:
    """As `train_ranks`, through the worker that every launcher starts: exit codes, and what ranks wrote to stderr."""
    directory = Path(settings.run_dir).parent
    (directory / "worker.yaml").write_text(to_yaml(settings))
    (directory / "stderr").write_text("")
    codes = run_ranks(ranks, _work, directory, before, timeout=timeout)
    return codes, (directory / "stderr").read_text()


def _work(directory: Path, before: Optional[Callable[[], None]]) -> int:
    sys.stderr = open(directory / "stderr", "a", buffering=1)
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    if before is not None:
        before()
    return worker.main(str(directory / "worker.yaml"))


def _train(settings: Recipe, before: Optional[Callable[[], None]]) -> bool:
    if before is not None:
        before()
    return train(settings)


def slow_steps(site: Path, seconds: float, while_: str = "True") -> str:
    """A PYTHONPATH with which ranks take so much longer over every step, as long as an expression of `os` holds."""
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if 'RANK' in os.environ and ({while_}):\n"
        "    import importlib.abc, importlib.util\n"
        "    class Slow(importlib.abc.MetaPathFinder):\n"
        "        def find_spec(self, name, path, target=None):\n"
        "            if name != 'nrt_megatron.trainer': return None\n"
        "            sys.meta_path.remove(self)\n"
        "            import time, nrt_megatron.run as run\n"
        "            finish = run.Run.finish_step\n"
        f"            run.Run.finish_step = lambda *args: (time.sleep({seconds}), finish(*args))[1]\n"
        "            return importlib.util.find_spec(name)\n"
        "    sys.meta_path.insert(0, Slow())\n"
    )
    return f"{site}{os.pathsep}{ROOT}"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: weights and optimizer state."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(checkpoint / "dist")
    entries = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it loads in a single process
        load(state, storage_reader=reader, no_dist=True)
    return state
