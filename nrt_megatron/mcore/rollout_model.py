"""The weights that a rollout runs on: training's own, or a copy of them at another layout.

The copy is filled by `megatron.core.resharding` before a rollout, when the policy has changed since the last time:
every rank sends the parts that others need and receives its own. Each move is checked by `fingerprint`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding import swap_model_weights
from megatron.core.resharding.copy_services.gloo_copy_service import GlooCopyService
from megatron.core.resharding.copy_services.nccl_copy_service import NCCLCopyService
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nrt_megatron.convert import names
from nrt_megatron.data.traces import Generator
from nrt_megatron.mcore import HAS_GPU, context
from nrt_megatron.mcore.exchange import SharingGenerator
from nrt_megatron.mcore.fingerprint import fingerprint, num_blocks
from nrt_megatron.mcore.hf import global_parameters
from nrt_megatron.mcore.model import PolicyModel, build_chunks
from nrt_megatron.mcore.place import Place, another_layout
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.recipe import has_rollout_layout, rollout_megatron, rollout_sizes


class TrainedWeights:
    """Rollout on the training weights, where they are."""

    moves = False

    def __init__(self, policy: MegatronPolicy):
        self.place: Place = policy.runtime
        self.chunks = policy.chunks

    def refresh(self) -> None:
        """Nothing to do: an update changes these weights themselves."""

    def for_replica(self, generator: Generator) -> Generator:
        """The generator as all ranks of one replica here ask it, for the same prompts."""
        return context.sharing(generator)

    def for_training(self, generator: Generator) -> Generator:
        """That generator as all ranks of one replica of training ask it: they are the same."""
        return generator


class MovedWeights:
    """Rollout on a copy of the weights, at a layout of its own; no gradients and no optimizer."""

    moves = True

    def __init__(self, policy: MegatronPolicy):
        self.policy, recipe = policy, policy.recipe
        training = policy.runtime
        self.place = another_layout(training, *rollout_sizes(recipe), timedelta(seconds=training.timeout_s))
        self.chunks = build_chunks(policy.shape, rollout_megatron(recipe), self.place.groups)
        for chunk in self.chunks:
            chunk.requires_grad_(False).to(chunk.config.params_dtype)
        self._filled_with: int | None = None
        # A replica here takes everything from one replica of training, and these share the work.
        own, source = training.groups.dp_cp.rank(), self.place.dp_rank % training.groups.dp_cp.size()
        trained, here = self._parts(policy.chunks), self._parts(self.chunks)
        alone = self.place.groups.cp
        self._moves = [
            (
                _Part(trained.get(piece, {}), own, training.groups, alone, policy.chunks[0].config),
                _Part(here.get(piece, {}), source, self.place.groups, alone, self.chunks[0].config),
            )
            for piece in range(1 + self._layers_at_once)
        ]
        self._copies = OrderedCopies() if HAS_GPU else GlooCopyService()

    def refresh(self) -> None:
        """Moves the policy's weights here if they have changed since the last time, and checks them. Collective."""
        if self._filled_with == self.policy.version:
            return
        for source, target in self._moves:
            swap_model_weights(source, target, self._copies)
        self.verify()
        self._filled_with = self.policy.version

    def verify(self) -> None:
        """Asserts that every parameter here is the policy's, bit for bit but for a chance of 2^-64. Collective."""
        training, stages = self.policy.runtime, self.policy.chunks
        order = {parameter.name: i for i, parameter in enumerate(names.parameters(self.policy.shape))}
        trained, here = self._fingerprints(stages, training), self._fingerprints(self.chunks, self.place)
        expected = torch.zeros(len(order), dtype=torch.int64, device=self.place.device)
        if training.groups.dp_cp.rank() == training.tp_rank == 0:
            for name, value in trained.items():
                tied_copy = name == names.EMBEDDING and not stages[0].pre_process
                expected[order[name]] = 0 if tied_copy else value
        dist.all_reduce(expected)
        wanted, got = expected.tolist(), torch.stack([*here.values()]).tolist()
        wrong = [name for name, value in zip(here, got, strict=True) if value != wanted[order[name]]]
        assert not wrong, f"{wrong[0]} (of {len(wrong)}) differs from training after it was moved for the rollout"

    def for_replica(self, generator: Generator) -> Generator:
        """The generator as all ranks of one replica here ask it, for the same prompts."""
        return generator

    def for_training(self, generator: Generator) -> Generator:
        """That generator as all ranks of one replica of training ask it: all replicas here draw for all of training."""
        return SharingGenerator(generator, self.place.groups.dp, self.policy.runtime.groups.dp)

    @property
    def _layers_at_once(self) -> int:
        return -(-self.policy.shape.num_layers // self.policy.runtime.pp_size)

    def _parts(self, chunks: list[PolicyModel]) -> dict[int, dict[str, torch.nn.Parameter]]:
        """This rank's parameters by the piece they are moved in: those outside the layers, then one layer of each
        training stage at a time. What arrives is held twice until it is in place, so a piece bounds the memory."""
        parts: dict[int, dict[str, torch.nn.Parameter]] = {}
        for entry, value in self._entries(chunks):
            if entry.tp_axis is not None:
                value.partition_stride = num_blocks(entry)  # what the planner needs to cut gate and up apart
            piece = 0 if entry.layer is None else 1 + entry.layer % self._layers_at_once
            parts.setdefault(piece, {})[entry.name] = value
        return parts

    def _fingerprints(self, chunks: list[PolicyModel], place: Place) -> dict[str, Tensor]:
        """Fingerprint of each parameter of this rank's stage, of all tensor ranks together."""
        found = {e: fingerprint(value, e, place.tp_rank, place.tp_size) for e, value in self._entries(chunks)}
        cut = [entry for entry in found if entry.tp_axis is not None]
        sums = torch.stack([found[entry] for entry in cut])
        dist.all_reduce(sums, group=place.groups.tp)
        return {entry.name: value for entry, value in (found | dict(zip(cut, sums))).items()}

    def _entries(self, chunks: list[PolicyModel]) -> Iterator[tuple[names.Parameter, torch.nn.Parameter]]:
        """Parameters with their entries in the table; the copy of a tied embedding has the embedding's."""
        table = names.by_name(self.policy.shape)
        for chunk in chunks:
            for name, value in global_parameters(chunk):
                yield table[name], value


class OrderedCopies(NCCLCopyService):
    """Megatron's copies over NCCL, where what a rank copies to itself waits for what was queued before.

    Megatron does that on a stream of its own (0.16.1), which would read slices that are not written yet, and write into
    memory that the piece before is still read from.
    """

    def run(self) -> None:
        self._copy_stream.wait_stream(torch.cuda.current_stream())
        super().run()


class _Part(torch.nn.Module):
    """Some of a rank's parameters as the resharding planner wants to see a model.

    Names carry the replica, and to each replica its ranks are `alone`: so a receiver has one replica of training as its
    source. By itself the planner would have the first one send everything.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], replica: int, groups: ProcessGroupCollection,
                 alone: dist.ProcessGroup, config: TransformerConfig):  # fmt: skip
        super().__init__()
        self.config = config
        self.pg_collection = ProcessGroupCollection(tp=groups.tp, pp=groups.pp, dp=alone)
        self._named = {f"replica{replica}.{name}": value for name, value in parameters.items()}

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Under the model's own names: layers are numbered through, tied copies have the embedding's."""
        yield from self._named.items()


def rollout_model(policy: MegatronPolicy) -> TrainedWeights | MovedWeights:
    """What this recipe's rollout runs on. Collective."""
    return MovedWeights(policy) if has_rollout_layout(policy.recipe) else TrainedWeights(policy)
