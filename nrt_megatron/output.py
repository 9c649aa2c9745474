"""The files of a run directory, and the lines said while it runs: the main rank's alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Optional

from nrt_megatron.checkpoints import clean, step_of
from nrt_megatron.continuation import record
from nrt_megatron.recipe import ConfigError, Recipe, print_notice
from nrt_megatron.report import MetricsWriter, Progress, SamplesWriter
from nrt_megatron.report.samples import PromptSample
from nrt_megatron.runlock import hold


class Output:
    """Every rank has one; it does something on the main rank, until a write fails there.

    The failure is kept in `failure` and not raised: the other ranks would wait in their next exchange for a rank
    that is gone. `Run` asks for it in an exchange of all ranks.
    """

    def __init__(self, recipe: Recipe, is_main: bool):
        self.directory = Path(recipe.run_dir)
        self.failure: Optional[Exception] = None
        self._recipe, self._is_main = recipe, is_main
        self._open = ExitStack()

    def open(self, resumed_from: Optional[Path], greeting: str) -> None:
        """Locks the directory and opens its files; rows after the checkpoint that the run continues from are cut."""
        with self.writing() as writes:
            if writes:
                self._open.enter_context(hold(self.directory))  # before anything is changed in it
                clean(self.directory / "checkpoints")
                changed = record(self.directory, resumed_from, self._recipe)
                resumed = step_of(resumed_from) if resumed_from else None
                self._metrics = MetricsWriter(self.directory, resumed, self._recipe.logger.tensorboard)
                self._open.callback(self._metrics.close)
                self._samples = SamplesWriter(self.directory, resumed)
                self._open.callback(self._samples.close)
                self._progress = self._open.enter_context(Progress(self._recipe.nrt.max_num_steps, resumed or 0))
                self._progress.say(greeting)
                if changed:
                    print_notice(changed)

    def close(self) -> None:
        """Closes what is open."""
        self._open.close()

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Whether this rank writes. An error of the disk inside becomes the `failure`."""
        try:
            yield self._is_main and self.failure is None
        except ConfigError as error:
            self.failure = error
        except OSError as error:
            self.failure = ConfigError(
                f"run_dir: cannot write to {self.directory} ({error.strerror}); make room or set another run_dir, then "
                "start again: the run continues from its last checkpoint"
            )

    def write_row(self, row: Mapping[str, Any]) -> None:
        """One row of metrics, shown as well."""
        with self.writing() as writes:
            if writes:
                self._progress.show(self._metrics.write(row))

    def write_samples(self, samples: list[PromptSample]) -> None:
        """Lines of samples.jsonl; to be called where `writing` says so."""
        self._samples.write(samples)
