"""Who holds what: the stages of a replica, and how fast the ranks of each group reach one another."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.plan import efficiency
from nrt_megatron.plan.gpus import Hardware
from nrt_megatron.recipe import Recipe, data_parallel_size, world_size


@dataclass(frozen=True)
class Stage:
    """One pipeline stage; all its tensor- and data-parallel ranks hold equal shares."""

    index: int
    layers: int
    fp8_layers: int
    """Of these, the ones whose linear layers run in FP8."""
    first: bool
    last: bool


@dataclass(frozen=True)
class Layout:
    """A recipe's ranks, in Megatron's order: tensor ranks are neighbours, then context, data, pipeline."""

    gpus: int
    tp: int
    cp: int
    dp: int
    chunks: int
    """Chunks of layers a stage (virtual pipeline size); 1 without interleaving."""
    sequence_parallel: bool
    node: int
    """GPUs of a node."""
    stages: tuple[Stage, ...]
    hardware: Hardware

    @classmethod
    def of(cls, recipe: Recipe, shape: ModelShape, hardware: Hardware) -> Layout:
        cfg = recipe.policy.megatron_cfg
        return cls(
            gpus=world_size(recipe),
            tp=cfg.tensor_model_parallel_size,
            cp=cfg.context_parallel_size,
            dp=data_parallel_size(recipe),
            chunks=cfg.virtual_pipeline_model_parallel_size or 1,
            sequence_parallel=cfg.sequence_parallel,
            node=recipe.cluster.gpus_per_node or hardware.gpus_per_node,
            stages=_stages(recipe, shape),
            hardware=hardware,
        )

    @property
    def pp(self) -> int:
        return len(self.stages)

    @property
    def sizes(self) -> dict[str, int]:
        """Of each kind of parallelism, by name."""
        return {"tensor": self.tp, "context": self.cp, "data": self.dp, "pipeline": self.pp, "chunks": self.chunks}

    @property
    def shards(self) -> int:
        """Ranks that share the gradients and the sharded optimizer state of a parameter."""
        return self.dp * self.cp

    def of_rollout(self) -> Layout:
        """Where sequences are whole: context-parallel ranks draw for prompts of their own, as replicas do."""
        return replace(self, cp=1, dp=self.shards)

    @property
    def norm_split(self) -> int:
        """Ranks that share norms and residuals."""
        return self.tp if self.sequence_parallel else 1

    @property
    def tensor_bandwidth(self) -> float:
        return self._bandwidth(self.tp, stride=1)

    @property
    def context_bandwidth(self) -> float:
        return self._bandwidth(self.cp, stride=self.tp)

    @property
    def data_bandwidth(self) -> float:
        return self._bandwidth(self.shards, stride=self.tp)

    @property
    def pipeline_bandwidth(self) -> float:
        """Bytes a second from a rank to its peer on the next stage."""
        near = self.tp * self.shards < self.node
        rate = self.hardware.nvlink_gb_per_second if near else self.hardware.network_gb_per_second
        return rate * 1e9 * efficiency.NETWORK

    def _bandwidth(self, members: int, stride: int) -> float:
        """Bytes a second through each rank of a group in a ring collective (nccl-tests' bus bandwidth).

        Within a node NVLink; across nodes a ring enters and leaves each node once, so that the members that share a
        node also share all their network cards, up to the rate of NVLink.
        """
        hardware = self.hardware
        if members * stride <= self.node:
            rate = hardware.nvlink_gb_per_second
        else:
            together = max(1, self.node // stride)
            rate = min(hardware.nvlink_gb_per_second, together * hardware.network_gb_per_second)
        return rate * 1e9 * efficiency.NETWORK


def _stages(recipe: Recipe, shape: ModelShape) -> tuple[Stage, ...]:
    """Layers dealt to stages chunk by chunk, as `megatron.core.transformer.transformer_block` does."""
    cfg = recipe.policy.megatron_cfg
    pp, chunks = cfg.pipeline_model_parallel_size, cfg.virtual_pipeline_model_parallel_size or 1
    embedding, loss = cfg.account_for_embedding_in_pipeline_split, cfg.account_for_loss_in_pipeline_split
    places = ["embedding"] * embedding + list(range(shape.num_layers)) + ["loss"] * loss
    size = len(places) // (pp * chunks)
    layers: list[list[int]] = [[] for _ in range(pp)]
    for position, layer in enumerate(places):
        if isinstance(layer, int):
            layers[position // size % pp].append(layer)
    fp8 = _fp8_layers(recipe, shape)
    return tuple(
        Stage(i, len(mine), len(fp8.intersection(mine)), first=i == 0, last=i == pp - 1)
        for i, mine in enumerate(layers)
    )


def _fp8_layers(recipe: Recipe, shape: ModelShape) -> set[int]:
    cfg = recipe.policy.megatron_cfg
    if cfg.fp8 is None or cfg.fp8_emulation:
        return set()
    if not cfg.first_last_layers_bf16:
        return set(range(shape.num_layers))
    return set(range(cfg.num_layers_at_start_in_bf16, shape.num_layers - cfg.num_layers_at_end_in_bf16))
