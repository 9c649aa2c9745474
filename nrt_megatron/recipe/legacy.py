"""Old NeMo spellings (Hydra recipes with `trainer` and `model` sections), read as the keys of today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nrt_megatron.recipe.errors import ConfigError, show

RENAMED: dict[str, str] = {
    "trainer.num_nodes": "cluster.num_nodes",
    "trainer.devices": "cluster.gpus_per_node",
    "trainer.max_steps": "nrt.max_num_steps",
    "trainer.val_check_interval": "evaluation.every",
    "trainer.gradient_clip_val": "policy.optimizer.clip_grad",
    "trainer.precision": "policy.megatron_cfg.bf16",
    "model.tensor_model_parallel_size": "policy.megatron_cfg.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size": "policy.megatron_cfg.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size": "policy.megatron_cfg.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size": "policy.megatron_cfg.context_parallel_size",
    "model.sequence_parallel": "policy.megatron_cfg.sequence_parallel",
    "model.global_batch_size": "policy.train_global_batch_size",
    "model.micro_batch_size": "policy.train_micro_batch_size",
    "model.encoder_seq_length": "policy.max_total_sequence_length",
    "model.seed": "nrt.seed",
    "model.optim.lr": "policy.optimizer.lr",
    "model.optim.weight_decay": "policy.optimizer.weight_decay",
    "exp_manager.explicit_log_dir": "run_dir",
}
"""Old key to new key; the sections `trainer`, `model` and `exp_manager` hold nothing else."""

_PRECISIONS: dict[str, bool] = {
    "bf16": True,
    "bf16-mixed": True,
    "bf16-true": True,
    "32": False,
    "32-true": False,
}


def translate(layer: dict[str, Any], source: str, notify: Callable[[str], None]) -> dict[str, Any]:
    """Returns `layer` (one recipe file, or the command line) with old spellings moved to the new keys.

    Each one found is said in one line through `notify`. Old and new key in the same layer must agree; between
    layers the usual precedence decides. Raises ConfigError on a contradiction and on a precision that has no
    new counterpart. An unknown key of an old section stays, to be refused with the other unknown keys.
    """
    result = _copy(layer)
    for old, new in RENAMED.items():
        found, value = _pop(result, old.split("."))
        if not found:
            continue
        value = _precision(value) if old == "trainer.precision" else value
        present, current = _get(result, new.split("."))
        if present and current != value:
            problem = f"contradicts {new} = {show(current)} ({source} sets both)"
            raise ConfigError.at(old, value, problem, f"keep {new} alone")
        _put(result, new.split("."), value)
        notify(f"{source}: {old} is the old spelling of {new}, read as {new} = {show(value)}")
    return result


def _precision(value: Any) -> bool:
    if str(value) not in _PRECISIONS:
        choices = ", ".join(_PRECISIONS)
        raise ConfigError.at(
            "trainer.precision", value, f"not one of {choices}", "set policy.megatron_cfg.bf16 instead"
        )
    return _PRECISIONS[str(value)]


def _copy(node: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in node.items()}


def _get(node: Any, path: list[str]) -> tuple[bool, Any]:
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return False, None
        node = node[part]
    return True, node


def _pop(node: dict[str, Any], path: list[str]) -> tuple[bool, Any]:
    """Removes the leaf at `path`, and the sections that it leaves empty."""
    head, *rest = path
    if head not in node:
        return False, None
    if not rest:
        return True, node.pop(head)
    if not isinstance(node[head], dict):
        return False, None
    found, value = _pop(node[head], rest)
    if found and not node[head]:
        del node[head]
    return found, value


def _put(node: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        child = node.get(part)
        if not isinstance(child, dict):  # absent, or an empty section
            node[part] = {}
        node = node[part]
    node[path[-1]] = value
