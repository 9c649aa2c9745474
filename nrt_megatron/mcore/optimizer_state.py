"""The optimizer's part of a checkpoint, in one form for all of Megatron's optimizers.

Megatron's fp32, bf16 and distributed optimizers each store their state under names and in a shape of their own, so
that a checkpoint of one cannot be loaded by another, and the distributed one does not load at all where Adam is
torch's. Here each weight W has the tensors `optimizer.state.exp_avg.W`, `optimizer.state.exp_avg_sq.W` and, where W
is bf16, `optimizer.state.fp32_param.W`, all in the shape of W and sharded as W is. Beside them stands the number of
updates; everything else about an optimizer is the recipe's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import distribute_shards_to_ranks
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.nn import Parameter

Sharded = Union[ShardedTensor, ShardedTensorFactory]
_MASTER = "fp32_param"
_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class _Slot:
    """What this rank's optimizer holds for one weight."""

    weight: Parameter
    tensors: dict[str, Tensor]
    """name -> fp32 tensor, of the weight's shape or flat; empty where a distributed optimizer holds no part of it"""
    span: Optional[slice]
    """The part of the flattened weight that the tensors are of; None: the whole weight."""


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], loading: bool) -> dict[str, Any]:
    """Sharded state dict of the optimizer's tensors; `model` is the sharded state dict of all model chunks.

    Collective with a distributed optimizer. For loading, tensors are given only where this rank needs them; their
    contents are to be handed to `load_optimizer_state`.
    """
    part = _single(optimizer)
    shards = _shards(model)
    weights = [weight for weight in _weights(part) if id(weight) in shards]
    slots = {id(slot.weight): slot for slot in _slots(part)}
    state, owners = {}, _owners(part, weights)
    for index, weight in enumerate(weights):
        slot = slots.get(id(weight), _Slot(weight, {}, slice(0, 0)))
        if loading and not slot.tensors:
            continue
        for name in _names(weight):
            whole = _target(slot, name) if loading else _whole(part, slot, name, owners.get((index, name), 0))
            if whole is not None:
                state[f"{index}.{name}"] = _sharded(shards[id(weight)], whole, name, _is_distributed(part))
    return state


def load_optimizer_state(
    optimizer: MegatronOptimizer, model: dict[str, Any], loaded: dict[str, Tensor], step: int
) -> None:
    """Copies what `optimizer_state(loading=True)` was filled with into the optimizer, and sets its update count."""
    part = _single(optimizer)
    shards = _shards(model)
    weights = [weight for weight in _weights(part) if id(weight) in shards]
    slots = {id(slot.weight): slot for slot in _slots(part)}
    for index, weight in enumerate(weights):
        slot = slots.get(id(weight))
        for name, tensor in (slot.tensors if slot else {}).items():
            whole = loaded[f"{index}.{name}"]
            tensor.data.copy_(whole if slot.span is None else whole.flatten()[slot.span])
    if part.optimizer is not None:
        _set_step(part.optimizer, step)


def update_count(optimizer: MegatronOptimizer) -> int:
    """Updates that the optimizer has applied, as its bias correction counts them."""
    inner = _single(optimizer).optimizer
    counts = [state["step"] for state in inner.state.values() if "step" in state]  # torch
    counts += [group["step"] for group in inner.param_groups if "step" in group]  # Transformer Engine, Apex
    return int(counts[0]) if counts else 0


def _single(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers  # more than one only with experts
    return optimizer


def _is_distributed(part: MegatronOptimizer) -> bool:
    return isinstance(part, DistributedOptimizer)


def _shards(model: dict[str, Any]) -> dict[int, Sharded]:
    """id of a weight -> how it is sharded."""
    sharded, _ = extract_sharded_tensors_and_factories(model)
    return {id(entry.data): entry for entry in nested_values(sharded)}


def _weights(part: MegatronOptimizer) -> list[Parameter]:
    """The weights that are trained, in the same order on every data-parallel rank."""
    if _is_distributed(part):
        return [weight for buffer in part.buffers for weight in buffer.param_index_map]
    return [slot.weight for slot in _slots(part)]


def _slots(part: MegatronOptimizer) -> Iterator[_Slot]:
    """This rank's slots; the moments of an optimizer that has made no step yet are allocated as zeros."""
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, _TORCH_ADAM):
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.zeros(()))
    if _is_distributed(part):
        for weight in part.model_param_gbuf_map:
            held = part._get_main_param_and_optimizer_states(weight)
            span = part._get_model_param_range_map(weight)["param"]
            yield _slot(weight, held["param"], held, slice(span.start, span.end))
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for weights, masters in zip(part.float16_groups, part.fp32_from_float16_groups):
            for weight, master in zip(weights, masters):
                yield _slot(weight, master, part.optimizer.state[master], None)
        for weight in (weight for group in part.fp32_from_fp32_groups for weight in group):
            yield _slot(weight, weight, part.optimizer.state[weight], None)
    else:
        for weight in part.get_parameters():
            yield _slot(weight, weight, part.optimizer.state[weight], None)


def _slot(weight: Parameter, master: Tensor, moments: dict[str, Tensor], span: Optional[slice]) -> _Slot:
    held = {**moments, _MASTER: master}
    return _Slot(weight, {name: held[name] for name in _names(weight)}, span)


def _names(weight: Parameter) -> tuple[str, ...]:
    """An fp32 weight is its own master copy and is stored with the model."""
    moments = ("exp_avg", "exp_avg_sq")
    return moments if weight.dtype == torch.float32 else (*moments, _MASTER)


def _target(slot: _Slot, name: str) -> Tensor:
    """Where a whole weight's state is read to. Zeros, for rows of a padded vocabulary that are not stored."""
    return slot.tensors[name] if slot.span is None else torch.zeros(slot.weight.shape)


def _owners(part: MegatronOptimizer, weights: list[Parameter]) -> dict[tuple[int, str], int]:
    """Which rank of a distributed optimizer gathers and writes the state `name` of the weight `index`: about as many
    bytes on each, so that memory and writing are spread. Empty for the other optimizers."""
    if not _is_distributed(part):
        return {}
    size = part.data_parallel_group.size()
    numel = {(index, name): weight.numel() for index, weight in enumerate(weights) for name in _names(weight)}
    return distribute_shards_to_ranks({key: range(size) for key in numel}, numel, size, set())


def _whole(part: MegatronOptimizer, slot: _Slot, name: str, owner: int) -> Optional[Tensor]:
    """The state `name` of a whole weight, on the rank `owner` of a distributed optimizer; None on the others."""
    if slot.span is None:
        return slot.tensors[name]
    group = part.data_parallel_group
    flat = torch.zeros(slot.weight.numel(), device=slot.weight.device)
    if slot.tensors:
        flat[slot.span] = slot.tensors[name].detach()
    dist.reduce(flat, dist.get_global_rank(group, owner), group=group)  # all but one summand of an entry are 0
    return flat.view(slot.weight.shape).cpu() if group.rank() == owner else None


def _sharded(shard: Sharded, whole: Tensor, name: str, gathered: bool) -> Sharded:
    made = make_sharded_optimizer_tensor(shard, whole, f"optimizer.state.{name}")
    # A gathered tensor is on one data-parallel rank alone, which then is its main replica.
    return replace(made, replica_id=(*made.replica_id[:-1], 0)) if gathered else made


def _set_step(inner: torch.optim.Optimizer, step: int) -> None:
    if isinstance(inner, _TORCH_ADAM):
        for state in inner.state.values():
            state["step"] = torch.tensor(float(step))
    else:
        for group in inner.param_groups:
            group["step"] = step
