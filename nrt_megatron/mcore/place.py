"""Where a rank stands among the replicas of a model, and through which groups it reaches the others."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator
from megatron.core.process_groups_config import ProcessGroupCollection

ORDER = "tp-cp-ep-dp-pp"
"""Megatron's order of ranks, of `parallel_state.initialize_model_parallel`: tensor ranks are neighbours."""


@dataclass
class Place:
    """One rank's place at a layout."""

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    groups: ProcessGroupCollection

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def sampling_rank(self) -> int:
        """Global rank that draws tokens for this rank's tensor and pipeline ranks: tensor rank 0 of the last stage."""
        last = dist.get_process_group_ranks(self.groups.pp)[-1]
        return last - self.tp_rank  # tensor ranks are neighbours in Megatron's order

    @property
    def speaks_for_replica(self) -> bool:
        """Whether this rank, of all that hold one replica of the model, gives its metrics and batches."""
        return self.rank == self.sampling_rank and self.cp_rank == 0


def another_layout(place: Place, tp_size: int, pp_size: int, timeout: timedelta) -> Place:
    """The rank's place where a replica takes `tp_size` x `pp_size` ranks, in Megatron's order, with groups for it.

    Collective. Groups of the same ranks as training's are training's: on GPUs each has buffers of its own.
    (`megatron.core.hyper_comm_grid` would make them as well, but needs einops, which Megatron does not bring along.)
    """
    dp_size = place.world_size // (tp_size * pp_size)
    ranks = RankGenerator(tp=tp_size, ep=1, dp=dp_size, pp=pp_size, cp=1, order=ORDER)
    known = {"tp": place.groups.tp, "pp": place.groups.pp, "tp-pp": place.groups.mp, "dp": place.groups.dp}
    made = {token: _group(ranks.get_ranks(token), known.get(token), timeout) for token in (*known, "cp")}
    groups = ProcessGroupCollection(
        tp=made["tp"],
        pp=made["pp"],
        mp=made["tp-pp"],
        dp=made["dp"],
        cp=made["cp"],
        embd=None,  # a tied embedding's copy on the last stage is filled from training's weights, not over this group
    )
    return Place(
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        tp_rank=groups.tp.rank(),
        tp_size=tp_size,
        pp_rank=groups.pp.rank(),
        pp_size=pp_size,
        dp_rank=groups.dp.rank(),
        dp_size=dp_size,
        cp_rank=0,
        cp_size=1,
        groups=groups,
    )


def _group(ranks: list[list[int]], known: dist.ProcessGroup | None, timeout: timedelta) -> dist.ProcessGroup:
    """This rank's group of a partition of all ranks; `known` where that is its partition on every rank."""
    mine = next(group for group in ranks if dist.get_rank() in group)
    same = torch.tensor(known is not None and dist.get_process_group_ranks(known) == mine, dtype=torch.int32)
    same = same.to(torch.cuda.current_device())
    dist.all_reduce(same, dist.ReduceOp.MIN)
    return known if same else dist.new_subgroups_by_enumeration(ranks, timeout=timeout)[0]
