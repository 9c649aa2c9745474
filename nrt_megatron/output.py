"""The files of a run directory, and the lines said while it runs: the main rank's alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Optional

from nrt_megatron.checkpoints import LATEST, abandon, clean, step_dir, step_of
from nrt_megatron.continuation import record
from nrt_megatron.mcore import storage
from nrt_megatron.recipe import ConfigError, Recipe, print_notice
from nrt_megatron.report import MetricsWriter, Progress, SamplesWriter, print_summary, read_metrics
from nrt_megatron.report.metrics import METRICS_FILE
from nrt_megatron.report.samples import SAMPLES_FILE, PromptSample
from nrt_megatron.runlock import hold
from nrt_megatron.watch import Rollback, rollbacks


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
                if resumed is None:
                    rollbacks.forget(self.directory)
                self._open_logs(resumed)
                self._progress = self._open.enter_context(Progress(self._recipe.nrt.max_num_steps, resumed or 0))
                self._progress.say(greeting)
                if changed:
                    print_notice(changed)

    def _open_logs(self, resumed: Optional[int]) -> None:
        self._metrics = MetricsWriter(self.directory, resumed, self._recipe.logger.tensorboard)
        self._open.callback(self._metrics.close)
        self._samples = SamplesWriter(self.directory, resumed)
        self._open.callback(self._samples.close)

    def go_back(self, rollback: Rollback) -> None:
        """Makes a rollback count on disk: its checkpoint is the newest, and rows after it are in its folder alone."""
        checkpoints = self.directory / "checkpoints"
        with self.writing() as writes:
            if writes:
                rollbacks.keep_rows(self.directory, rollback, (METRICS_FILE, SAMPLES_FILE))
                storage.replace_text(checkpoints / LATEST, step_dir(checkpoints, rollback.to_step).name)
                abandon(checkpoints, rollback.to_step)
                rollbacks.write(self.directory, rollback)
                self._metrics.close()
                self._samples.close()
                self._open_logs(rollback.to_step)
                where = self.directory / rollbacks.FOLDER / str(rollback.number)
                self._progress.say(f"{rollback}; what was given up is in {where}")

    def say(self, *lines: str) -> None:
        """Lines that stay."""
        with self.writing() as writes:
            for line in lines if writes else ():
                self._progress.say(line)

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

    def conclude(self, step: int, last_checkpoint: Optional[Path]) -> None:
        """Closes the files, and shows the summary of the whole run or where it was left."""
        total = self._recipe.nrt.max_num_steps
        self.close()
        if self._is_main and step == total:
            print_summary(read_metrics(self.directory), self.directory, last_checkpoint)
        elif self._is_main:
            where = f"step {step} of {total}, checkpoint {last_checkpoint or 'none'}"
            print_notice(f"asked to stop: {where}; the same command goes on from there")
