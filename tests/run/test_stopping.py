"""SIGTERM and SIGUSR1: the step is finished, a checkpoint saved, exit code 75, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nrt_megatron.checkpoints import newest_first
from tests.run import tiny
from tests.run.test_resume import assert_same_tensors
from tests.run.tiny import DISTOPT, ROOT, TP

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run on two tensor-parallel ranks that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    tiny.train_ranks(tiny.recipe(tiny.write_inputs(directory), ranks=2, **{TP: 2}), 2)
    return directory / "run"


def assert_equal_runs(run: Path, whole: Path) -> None:
    assert tiny.rows(run) == tiny.rows(whole)
    assert tiny.samples(run) == tiny.samples(whole)
    assert_same_tensors(run, whole)


def send(sent: signal.Signals, rank: int, step: int, when: str) -> Callable[[], None]:
    """Signals one rank alone, while it is in `when` of a step; step 0: before it has built anything."""

    def before() -> None:
        from nrt_megatron import run

        def deliver() -> None:
            if int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), sent)

        if step == 0:
            load = run.load_inputs
            run.load_inputs = lambda recipe: (deliver(), load(recipe))[1]
            return
        original = getattr(run.Run, when)

        def signalled(self, *args):
            if self.step + (when != "save") == step:
                deliver()
            return original(self, *args)

        setattr(run.Run, when, signalled)

    return before


@pytest.mark.parametrize(
    ("sent", "rank", "step", "when", "left"),
    [
        (signal.SIGUSR1, 1, 2, "note", [2]),
        (signal.SIGTERM, 0, 4, "finish_step", [4, 3]),
        (signal.SIGTERM, 1, 3, "save", [3]),
        (signal.SIGUSR1, 0, 0, "", []),
    ],
)
def test_a_signal_to_any_rank_stops_all(whole, tmp_path, sent, rank, step, when, left):
    inputs = tiny.write_inputs(whole.parent) | {"run_dir": str(tmp_path / "run")}
    settings = tiny.recipe(inputs, f"checkpointing.async_save={when == 'save'}", ranks=2, **{TP: 2})
    codes, said = tiny.work_ranks(settings, 2, send(sent, rank, step, when))
    assert codes == [75, 75]
    assert said.startswith(f"nrt: asked to stop: step {step} of 6, checkpoint ") and said.count("\n") == 1
    assert [int(path.name[5:]) for path in newest_first(tmp_path / "run/checkpoints")] == left
    assert tiny.train_ranks(settings, 2) == [True, True]
    assert_equal_runs(tmp_path / "run", whole)


def test_a_signal_in_the_last_step_leaves_a_complete_run(tmp_path):
    settings = tiny.recipe(tiny.write_inputs(tmp_path), ranks=2, **{DISTOPT: True})
    codes, said = tiny.work_ranks(settings, 2, send(signal.SIGTERM, 1, 6, "finish_step"))
    assert (codes, said) == ([0, 0], "")


# --- through the command line


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m COMMAND`; whatever still runs when the test ends is ended."""
    started = []

    def run(*command: str) -> subprocess.Popen[str]:
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=env, text=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until the row of a step is written."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) <= step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_idle(process: psutil.Process) -> None:
    """Until it has hardly used a processor for a second: it waits for something."""
    used, now = 0.0, 1.0
    while now - used > 0.05:
        used = now
        time.sleep(1)
        times = process.cpu_times()
        now = times.user + times.system


@pytest.fixture
def slow_steps(tmp_path, monkeypatch) -> None:
    """Every step of every process started from here takes at least half a second."""
    monkeypatch.setenv("PYTHONPATH", tiny.slow_steps(tmp_path / "site", 0.5))


def test_the_launcher_passes_the_signal_on(whole, tmp_path, slow_steps, start):
    inputs = tiny.write_inputs(whole.parent) | {"run_dir": str(tmp_path / "run")}
    tiny.recipe(inputs, ranks=2, **{TP: 2})  # writes recipe.yaml
    command = ("nrt_megatron", "train", str(tmp_path / "recipe.yaml"), "cluster.cpu_ranks=2")
    command += ("policy.megatron_cfg.tensor_model_parallel_size=2",)
    process = start(*command)
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and said.startswith("nrt: asked to stop: step ") and said.count("\n") == 1
    assert tiny.work_ranks(tiny.recipe(inputs, ranks=2, **{TP: 2}), 2) == ([0, 0], "")
    assert_equal_runs(tmp_path / "run", whole)


def test_a_launcher_whose_ranks_have_not_started(whole, tmp_path, start):
    """Nothing is lost, for nothing has begun: 75 as well, so that the job is queued again."""
    inputs = tiny.write_inputs(whole.parent) | {"run_dir": str(tmp_path / "run")}
    tiny.recipe(inputs, ranks=2, **{TP: 2})
    process = start("nrt_megatron", "train", str(tmp_path / "recipe.yaml"), "cluster.cpu_ranks=2")
    time.sleep(1.5)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and said.count("\n") <= 1
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


@pytest.fixture
def slow_start(tmp_path, monkeypatch) -> None:
    """Rank 1 of what is started from here imports for a minute, rank 0 waits for it; files `here0`, `here1` say so."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'RANK' in os.environ:\n"
        "    import importlib.abc, pathlib, time\n"
        "    rank = os.environ['RANK']\n"
        f"    here = pathlib.Path({str(tmp_path)!r}, 'here' + rank).touch\n"
        "    class Slow(importlib.abc.MetaPathFinder):\n"
        "        def find_spec(self, name, path, target=None):\n"
        "            if name != 'nrt_megatron.trainer': return None\n"
        "            sys.meta_path.remove(self)\n"
        "            if rank == '1':\n"
        "                here(), time.sleep(60)\n"
        "            import nrt_megatron.mcore.runtime as runtime\n"
        "            initialize = runtime.initialize\n"
        "            runtime.initialize = lambda recipe: (here(), initialize(recipe))[1]\n"
        "    sys.meta_path.insert(0, Slow())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{ROOT}")


@pytest.mark.parametrize(
    ("torchrun", "asked"),
    [(False, [0]), (False, [1]), (True, [0, 1])],
    ids=["waiting", "importing", "torchrun"],
)
def test_ranks_that_have_not_met_leave_at_once(tmp_path, slow_start, start, torchrun, asked):
    """Rank 0 waits for rank 1, which still imports: whoever is asked leaves, and the other one after it."""
    inputs = tiny.write_inputs(tmp_path)
    tiny.recipe(inputs, ranks=2, **{TP: 2})
    command = ["nrt_megatron", "train", str(tmp_path / "recipe.yaml"), "cluster.cpu_ranks=2"]
    command = [*(("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m") if torchrun else ()), *command]
    process = start(*command, "policy.megatron_cfg.tensor_model_parallel_size=2")
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("here?"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}
    wait_until_idle(ranks[0])
    for rank in asked:
        ranks[rank].send_signal(signal.SIGUSR1)
    sent = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert time.monotonic() - sent < 20  # on a busy machine; 3 s to leave, as much for the one that is told to
    assert not (tmp_path / "run/metrics.jsonl").exists() and not any(rank.is_running() for rank in ranks.values())
    if torchrun:
        assert process.returncode == 1 and said.count("exitcode  : 75") == 2
    else:
        assert (process.returncode, said) == (75, "")


def test_under_torchrun(whole, tmp_path, slow_steps, start):
    """Ranks get the signal themselves, as Slurm sends it; torchrun itself knows no exit code but 1."""
    inputs = tiny.write_inputs(whole.parent) | {"run_dir": str(tmp_path / "run")}
    tiny.recipe(inputs, ranks=2, **{TP: 2})
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    command = ("nrt_megatron", "train", str(tmp_path / "recipe.yaml"), "cluster.cpu_ranks=2")
    process = start(*torchrun, *command, "policy.megatron_cfg.tensor_model_parallel_size=2")
    wait_for_step(process, tmp_path / "run", 1)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "nrt: asked to stop: step " in said and "exitcode  : 75" in said
    assert tiny.train_ranks(tiny.recipe(inputs, ranks=2, **{TP: 2}), 2) == [True, True]
    assert_equal_runs(tmp_path / "run", whole)
