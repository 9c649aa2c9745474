#!/usr/bin/env python3
"""Kills a run again and again and shows that nothing is lost: `make torture`.

    tools/torture.py [--kills 50] [--recipe FILE] [--seed 0] [KEY=VALUE ...]

Ranks of the run are killed with SIGKILL, one of them at a time, every other time while a checkpoint is being saved.
After each kill the same run is started again; in the end its metrics, samples, weights and optimizer must equal those
of a run that nobody disturbed, bit for bit. A run that ends before all kills are spent is followed by another one.

Ranks are forked from this process, which has imported what they need, and run what `nrt train` starts on every
rank; every tenth start goes through `nrt train` itself.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

ROOT = Path(__file__).parents[1]
REDUCED = (
    "nrt.num_prompts_per_step=4",
    "nrt.num_generations_per_prompt=4",
    "nrt.max_num_steps=40",
    "policy.train_global_batch_size=8",
    "policy.train_micro_batch_size=4",
    "evaluation.num_questions=8",
    "checkpointing.every=1",
    "logger.samples_every=3",
    "logger.tensorboard=false",
)
"""What makes the recipe's steps short, so that kills and not training take the time."""
VARYING = ("time/", "memory/", "straggler/")
"""Metrics that differ from run to run."""
PATIENCE_S = 300.0
GRACE_S = 10.0
"""For the other ranks to end when one was killed; `nrt train` gives them as much."""


@dataclass
class Kill:
    """One line of the table."""

    number: int
    start: str
    """`fork` or `nrt train`"""
    rank: int
    seconds: float
    """After the start."""
    during: str
    resumed: int
    """Step of the newest checkpoint when the ranks were started."""
    saved: int
    """The same when one of them was killed."""
    steps: int
    """Steps whose metrics were written by then."""


class Ranks:
    """The ranks of one start, and how to end them."""

    def __init__(self, recipe_yaml: Path, world_size: int, through_cli: bool) -> None:
        self.started, self.through_cli = time.monotonic(), through_cli
        self.launcher: Optional[subprocess.Popen[bytes]] = None
        if through_cli:
            command = [sys.executable, "-m", "nrt_megatron", "train", str(recipe_yaml)]
            self.launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.pids: list[int] = []
        else:
            with reserved_port() as reserved:
                port = reserved.getsockname()[1]
                self.pids = [_fork_rank(recipe_yaml, rank, world_size, port) for rank in range(world_size)]
        self.alive = dict(enumerate(self.pids))
        self.ended: list[int] = []
        """Ranks that did not end by themselves."""

    def poll(self) -> Optional[int]:
        """The exit code of the run once all its ranks have ended: 0, or that of a rank that failed."""
        if self.launcher is not None:
            return self.launcher.poll()
        for rank, pid in list(self.alive.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.alive[rank]
                self.code = os.waitstatus_to_exitcode(status) or getattr(self, "code", 0)
        return None if self.alive else self.code

    def kill(self, rank: int) -> bool:
        """SIGKILL to one rank; whether it was there."""
        if self.launcher is not None:
            import psutil

            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.launcher.pid).children()
                found = [c for c in children if c.environ().get("RANK") == str(rank)]
                for child in found:
                    child.kill()
                return bool(found)
            return False
        if rank not in self.alive:
            return False
        os.kill(self.alive[rank], signal.SIGKILL)
        return True

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """The exit code, when all ranks have ended; those that do not by themselves are ended, as a launcher does."""
        deadline = time.monotonic() + patience_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline and not self.ended:
                self.ended = sorted(self.alive) or [-1]
                self.end()
            time.sleep(0.005)
        return code

    def end(self) -> None:
        """Ends whatever is left; each rank's stack goes to its log first."""
        for sent in (signal.SIGUSR2, signal.SIGKILL):
            for pid in self.alive.values():
                os.kill(pid, sent)
            time.sleep(0.5)
        if self.launcher is not None:
            self.launcher.kill()


def reserved_port() -> socket.socket:
    """Holds a port of 127.0.0.1 that nobody else is given while the socket is open, here or in a forked rank.

    Sockets with SO_REUSEADDR, as torch's store makes them, may listen on it meanwhile.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _fork_rank(recipe_yaml: Path, rank: int, world_size: int, port: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives this tool
    if os.getppid() != parent:
        os._exit(1)
    _be_rank(recipe_yaml, rank, world_size, port)


def _be_rank(recipe_yaml: Path, rank: int, world_size: int, port: int) -> NoReturn:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({key: str(value) for key, value in place.items()})
    log = open(recipe_yaml.with_name(f"rank{rank}.log"), "w", buffering=1)
    sys.stdout = sys.stderr = log
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR2, file=log, all_threads=True)
    try:
        from nrt_megatron import worker

        os._exit(worker.main(str(recipe_yaml)))
    except BaseException:
        traceback.print_exc(file=log)
        os._exit(1)


def newest(run: Path) -> int:
    """Step of the newest checkpoint whose files are all there, 0 when there is none."""
    from nrt_megatron.checkpoints import damage, newest_first, step_of

    return next((step_of(path) for path in newest_first(run / "checkpoints") if damage(path) is None), 0)


def steps_written(run: Path) -> int:
    """The last step with metrics."""
    from nrt_megatron.report import read_metrics

    return max((row["step"] for row in read_metrics(run)), default=0)


def unfinished(run: Path) -> set[str]:
    """Checkpoints that are half written, and those that a kill left so."""
    return {path.name for path in (run / "checkpoints").glob(".writing-*")}


def kill_once(
    number: int, ranks: Ranks, run: Path, draw: random.Random, world_size: int, window: float
) -> Optional[Kill]:
    """Kills a rank at a random moment, every other time of a save; None when the run ended before."""
    resumed, rank, left = newest(run), draw.randrange(world_size), unfinished(run)
    until = ranks.started + draw.uniform(0.0, window)
    aim_at_save = number % 2 == 0
    pause = draw.uniform(0.0, 0.06) if aim_at_save else 0.0
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if ranks.poll() is not None or (len(ranks.alive) < world_size and not ranks.through_cli):
            return None
        if time.monotonic() >= until and (unfinished(run) - left or not aim_at_save):
            time.sleep(pause)
            during = "saving" if unfinished(run) - left else "a step" if steps_written(run) > resumed else "start"
            saved, steps, seconds = newest(run), steps_written(run), time.monotonic() - ranks.started
            if ranks.kill(rank):
                start = "nrt train" if ranks.through_cli else "fork"
                return Kill(number, start, rank, seconds, during, resumed, saved, steps)
        time.sleep(0.002)
    sys.exit("torture: a run went on for too long without a moment to kill it")


def last_lines(scratch: Path, count: int = 30) -> str:
    """The end of every rank's log."""
    logs = sorted(scratch.glob("rank*.log"))
    return "\n".join(f"--- {log.stem}\n" + "\n".join(log.read_text().splitlines()[-count:]) for log in logs)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    from nrt_megatron.report import read_metrics

    return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in read_metrics(run)]


def tensors_of(run: Path) -> dict[str, Any]:
    """Weights and optimizer of the last checkpoint."""
    import warnings

    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(run / "checkpoints" / (run / "checkpoints/latest").read_text() / "dist")
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {
        k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in entries if isinstance(e, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it loads in a single process
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def differences(run: Path, whole: Path) -> list[str]:
    """In what a run differs from the undisturbed one."""
    import torch

    found = [] if rows_of(run) == rows_of(whole) else ["metrics"]
    samples = [(path / "samples.jsonl").read_text() for path in (run, whole)]
    found += [] if samples[0] == samples[1] else ["samples"]
    ours, theirs = tensors_of(run), tensors_of(whole)
    same = ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())
    return found + ([] if same else ["weights or optimizer"])


def check_checkpoints(run: Path, kill: Kill) -> Optional[str]:
    """What a kill destroyed, if anything: the checkpoint that was the newest must be there, every byte of it."""
    from nrt_megatron.checkpoints import damage, newest_first

    broken = [
        f"{path.name}: {found}" for path in newest_first(run / "checkpoints") if (found := damage(path, contents=True))
    ]
    lost = [] if newest(run) >= kill.saved else [f"step {kill.saved} is gone"]
    return "; ".join(broken + lost) or None


def torture(recipe: Any, scratch: Path, kills: int, seed: int) -> int:
    """Prints the table; returns 0 when every run came out as the undisturbed one."""
    from dataclasses import replace

    from nrt_megatron.recipe import to_yaml, world_size

    ranks, draw, count, problems, seconds = world_size(recipe), random.Random(seed), 0, [], time.monotonic()
    recipe_yaml = scratch / "recipe.yaml"

    def prepare(name: str) -> Path:
        recipe_yaml.write_text(to_yaml(replace(recipe, run_dir=str(scratch / name))))
        return scratch / name

    whole = prepare("undisturbed")
    started = Ranks(recipe_yaml, ranks, through_cli=False)
    if started.wait():
        sys.exit(f"torture: the undisturbed run failed: {last_lines(scratch)}")
    window = (time.monotonic() - started.started) / 6
    print("kill  start      rank  after s  during   resumed  saved  steps done")
    runs = 0
    while count < kills or runs == 0:
        runs += 1
        run, code = prepare(f"run{runs}"), 1
        while code:
            cli = count % 10 == 9
            started = Ranks(recipe_yaml, ranks, through_cli=cli)
            kill = kill_once(count + 1, started, run, draw, ranks, window + 8 * cli) if count < kills else None
            code = started.wait(GRACE_S if kill else PATIENCE_S)
            if kill is None:
                if code:
                    sys.exit(f"torture: a run failed by itself with exit code {code}: {last_lines(scratch)}")
                continue
            count += 1
            harm = check_checkpoints(run, kill)
            problems += [f"kill {count}: {harm}"] if harm else []
            print(
                f"{kill.number:4d}  {kill.start:9s}  {kill.rank:4d}  {kill.seconds:7.2f}  {kill.during:7s}  "
                f"{kill.resumed:7d}  {kill.saved:5d}  {kill.steps:10d}{'  LOST: ' + harm if harm else ''}"
                f"{f'  rank {started.ended} had to be ended' if started.ended else ''}",
                flush=True,
            )
            if started.ended:
                print(last_lines(scratch), file=sys.stderr)
        found = differences(run, whole)
        problems += [f"run {runs} differs in {', '.join(found)}"] if found else []
        shutil.rmtree(run)
    print(f"{count} kills in {runs} runs of {recipe.nrt.max_num_steps} steps, {time.monotonic() - seconds:.0f} s")
    print(
        "FAILED: " + "; ".join(problems)
        if problems
        else "metrics, samples, weights and optimizer equal, no checkpoint lost"
    )
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--recipe", default=str(ROOT / "recipes/nrt-tiny-1n0g-cpu.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    os.environ.update(NRT_DEVICE="cpu", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    import torch

    import nrt_megatron.trainer  # noqa: F401 (what forked ranks need is imported once)
    from nrt_megatron.quickstart import prepare
    from nrt_megatron.recipe import check, load_recipe

    torch.set_num_threads(1)  # a forked rank must not inherit a pool of threads
    reduced = REDUCED if options.recipe == parser.get_default("recipe") else ()
    recipe = load_recipe(options.recipe, [], [*reduced, *options.overrides])
    check(recipe)
    if recipe.prepare:
        prepare(recipe.prepare)
    with tempfile.TemporaryDirectory(prefix="nrt-torture-") as scratch:
        return torture(recipe, Path(scratch), options.kills, options.seed)


if __name__ == "__main__":
    sys.exit(main())
