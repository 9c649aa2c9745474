"""Which questions come when: the same order for any number of ranks, and after any restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from nrt_megatron.data.dataset import QADataset
from nrt_megatron.data.example import REASONS, BadRow, Example
from nrt_megatron.recipe import ConfigError
from nrt_megatron.recipe.errors import show


@lru_cache(maxsize=1)
def epoch_order(rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Rows of a file in the order of an epoch: [rows] int64, a pure function of the arguments.

    The generator is numpy's frozen one (NEP 19), whose stream is the same in every version.
    """
    if not shuffle:
        order = np.arange(rows)
    else:
        bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
        order = np.random.RandomState(bits).permutation(rows)
    order.setflags(write=False)  # It is shared through the cache.
    return order


class PromptSampler:
    """Endless batches of examples, epoch after epoch.

    Every rank holds the same sampler and draws the same global batch; what a rank works on is a slice of
    it. Rows that give no example are passed over and counted, so that a batch always is full. A batch may
    reach over the end of an epoch, and then holds a row twice if the file is smaller than the batch.

    Args:
        dataset: the rows.
        seed: `nrt.seed`, at least 0.
        shuffle: a new order every epoch, instead of the file's.

    Attributes:
        epoch: the current epoch, from 0.
        dropped: rows passed over since the start of the run, by reason (REASONS), over all epochs.
    """

    def __init__(self, dataset: QADataset, seed: int, shuffle: bool = True) -> None:
        self._dataset = dataset
        self._seed = seed
        self._shuffle = shuffle
        self.epoch = 0
        self._position = 0  # rows of the epoch already taken
        self._kept = 0  # examples they gave
        self._dropped = Counter(dict.fromkeys(REASONS, 0))

    @property
    def dropped(self) -> dict[str, int]:
        return dict(self._dropped)

    def next(self, n: int) -> list[Example]:
        """The next `n` examples, in global order.

        Raises:
            ConfigError: a row is malformed and `data.on_bad_row` is `error`, or a whole epoch gave nothing.
        """
        batch: list[Example] = []
        while len(batch) < n:
            order = epoch_order(len(self._dataset), self._seed, self.epoch, self._shuffle)
            rows = order[self._position : self._position + n - len(batch)].tolist()
            for found in self._dataset.get(rows):
                if isinstance(found, BadRow):
                    self._dropped[found.reason] += 1
                else:
                    batch.append(found)
                    self._kept += 1
            self._position += len(rows)
            if self._position == len(order):
                self._end_epoch()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the run, in JSON types."""
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self.epoch,
            "position": self._position,
            "kept": self._kept,
            "dropped": self.dropped,
            "data": dict(self._dataset.fingerprint),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the place of `state`.

        Raises:
            ConfigError: the state is of another data file, seed or kind of order.
        """
        data = state["data"]
        if dict(data) != self._dataset.fingerprint:
            raise ConfigError.at(
                self._dataset.key,
                self._dataset.path,
                f"the run was started on another file ({data['rows']} rows, {data['bytes']} bytes)",
                "name that file, or start a new run_dir",
            )
        for key, own, started in (
            ("nrt.seed", self._seed, state["seed"]),
            ("data.shuffle", self._shuffle, state["shuffle"]),
        ):
            if own != started:
                remedy = "set that, or start a new run_dir"
                raise ConfigError.at(key, own, f"the run was started with {show(started)}", remedy)
        self.epoch, self._position, self._kept = state["epoch"], state["position"], state["kept"]
        self._dropped = Counter({reason: state["dropped"].get(reason, 0) for reason in REASONS})

    def _end_epoch(self) -> None:
        if self._kept == 0:
            counts = ", ".join(f"{count} {reason}" for reason, count in self._dropped.items() if count)
            raise ConfigError.at(
                self._dataset.key,
                self._dataset.path,
                f"a whole epoch gave no example ({counts})",
                "correct the rows, or the limits under data and policy",
            )
        self.epoch, self._position, self._kept = self.epoch + 1, 0, 0
