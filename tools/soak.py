#!/usr/bin/env python3
"""Thousands of steps of the tiny run: resident memory, file handles and threads of its ranks must stay flat.

    tools/soak.py [--steps 2000] [--recipe FILE] [KEY=VALUE ...]

The run is `nrt train` with ranks of its own. From outside every rank is looked at once a second: its private resident
memory, which rises and falls within a step and with the length of traces. A leak lifts the least of many looks, so a
line is fitted to the least of every fiftieth part of the steps, after the first tenth, in which caches fill up. The C
library is told to return what is freed at once: by itself it keeps 100 MiB, now more, now less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
EVERY_S = 1.0
RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc's tunables, as environment variables"""
WARM_UP = 0.1
"""Share of the steps before the line begins."""
PARTS = 50
MIN_LOOKS = 4 * PARTS
MAX_GROWTH = 0.02
"""Resident memory may grow by this share over all steps after the warm-up; a leak of a trace a step is far above."""


@dataclass(frozen=True)
class Sample:
    """One look at a rank."""

    step: int
    """Steps done by then."""
    resident: float
    """MiB, without what other processes share: files and libraries"""
    handles: int
    threads: int


def ranks_of(launcher: psutil.Process) -> dict[int, psutil.Process]:
    """Rank -> its process."""
    found = {}
    for process in launcher.children():
        try:
            rank = process.environ().get("RANK")
        except psutil.Error:  # it has just ended
            continue
        if rank is not None:
            found[int(rank)] = process
    return found


def look(process: psutil.Process, step: int) -> Sample | None:
    """None when the rank has just ended."""
    try:
        with process.oneshot():
            memory = process.memory_info()
            resident = (memory.rss - memory.shared) / 2**20
            return Sample(step, resident, process.num_fds(), process.num_threads())
    except psutil.Error:
        return None


def steps_done(run_dir: Path) -> int:
    """Rows of metrics.jsonl, without that before the first step."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def watch(command: list[str], run_dir: Path) -> dict[int, list[Sample]]:
    """Samples of every rank while the command runs. Exits when the run fails."""
    samples: dict[int, list[Sample]] = {}
    with open(run_dir.with_suffix(".log"), "w+") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, **RETURNED_AT_ONCE})
        try:
            launcher, ranks = psutil.Process(run.pid), {}
            while run.poll() is None:
                step = steps_done(run_dir)
                if step < 1:
                    ranks = ranks_of(launcher)
                else:
                    for rank, process in ranks.items():
                        if (sample := look(process, step)) is not None:
                            samples.setdefault(rank, []).append(sample)
                time.sleep(EVERY_S)
        finally:
            run.terminate()
        if run.wait():
            log.seek(0)
            sys.exit(f"soak: the run failed: {log.read()[-2000:]}")
    return samples


def verdict(rank: int, samples: list[Sample], steps: int) -> tuple[str, bool]:
    """One line about a rank, and whether it stayed flat."""
    kept = [s for s in samples if WARM_UP * steps <= s.step < steps]  # after the last step a rank takes itself apart
    if len(kept) < MIN_LOOKS:
        sys.exit(
            f"soak: rank {rank} was looked at {len(kept)} times after the warm-up, too few for a line; set more --steps"
        )
    parts: dict[int, Sample] = {}
    for sample in kept:
        part = sample.step * PARTS // steps
        parts[part] = min(parts.get(part, sample), sample, key=lambda s: s.resident)
    least = list(parts.values())
    slope, start = statistics.linear_regression([s.step for s in least], [s.resident for s in least])
    growth = slope * (least[-1].step - least[0].step) / (start + slope * least[0].step)
    handles, threads = ({getattr(s, what) for s in kept} for what in ("handles", "threads"))
    # A checkpoint that is being written holds some for a moment: what counts is whether the usual number rises.
    half = len(kept) // 2
    rises = any(
        statistics.median(getattr(s, what) for s in kept[half:])
        > statistics.median(getattr(s, what) for s in kept[:half])
        for what in ("handles", "threads")
    )
    line = (
        f"rank {rank}: {least[0].resident:.0f} MiB near step {least[0].step}, {least[-1].resident:.0f} MiB near step "
        f"{least[-1].step}, slope {1000 * slope:+.2f} MiB per 1,000 steps ({growth:+.2%} in all); file handles "
        f"{min(handles)} to {max(handles)}, threads {min(threads)} to {max(threads)}"
    )
    return line, growth <= MAX_GROWTH and not rises


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every rank stayed flat."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--recipe", default=str(ROOT / "recipes/nrt-tiny-1n0g-cpu.yaml"))
    options = parser.parse_args(argv)
    scratch = Path(tempfile.mkdtemp(prefix="nrt-soak-"))
    run_dir = scratch / "run"
    command = [sys.executable, "-m", "nrt_megatron", "train", options.recipe, f"run_dir={run_dir}"]
    command += [f"nrt.max_num_steps={options.steps}", *options.overrides]
    try:
        started = time.monotonic()
        samples = watch(command, run_dir)
        assert samples, "no rank was found among the launcher's children"
        lines = [verdict(rank, of_rank, options.steps) for rank, of_rank in sorted(samples.items())]
        print(f"{options.steps} steps in {time.monotonic() - started:.0f} s, {os.path.basename(options.recipe)}")
        print(*(line for line, _ in lines), sep="\n")
        flat = all(ok for _, ok in lines)
        print("flat" if flat else "FAILED: not flat")
        return 0 if flat else 1
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main())
