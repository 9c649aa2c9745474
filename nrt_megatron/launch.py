"""From one `nrt train` to all its ranks: start them here, or join those that torchrun or srun started.

As a module (`python -m nrt_megatron.launch RECIPE_YAML`) it is what the launcher runs on every rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from nrt_megatron import stopping
from nrt_megatron.checkpoints import newest_first
from nrt_megatron.recipe import Cluster, ConfigError, Recipe, to_yaml, world_size

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_USER_MISTAKE = 2
_PARENT = "NRT_LAUNCHER_PID"
_PATIENCE_S = 10
"""What ranks get to end by themselves when another one has failed."""


def adopt_slurm(env: MutableMapping[str, str]) -> None:
    """Gives a rank that srun started torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Only inside a step of several tasks: a batch script carries SLURM_PROCID as well, and there, as under
    torchrun, nothing is changed. Variables that are set stay.
    """
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in env or "SLURM_PROCID" not in env or tasks <= 1:
        return
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
    env["RANK"] = env["SLURM_PROCID"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env["WORLD_SIZE"] = str(tasks)
    env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]))
    # The same on every rank, below the ports that systems hand out, and another one for the next step.
    env.setdefault("MASTER_PORT", str(15000 + (job * 31 + step) % 15000))


def first_host(nodelist: str) -> str:
    """First host of Slurm's compressed list: `node[008-011,020],login` gives `node008`."""
    match = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodelist)
    assert match is not None, "every text matches"
    return "".join(part or "" for part in match.groups())


def is_first_rank(env: Mapping[str, str]) -> bool:
    """Whether this process speaks to the user: rank 0, or the one that will start the ranks."""
    return env.get("RANK", "0") == "0"


def check_ranks(recipe: Recipe, env: Mapping[str, str]) -> None:
    """The ranks that were started, or can be, are those of the recipe. Raises ConfigError."""
    cluster, ranks = recipe.cluster, world_size(recipe)
    key = "cluster.num_nodes x cluster.gpus_per_node" if cluster.gpus_per_node else "cluster.cpu_ranks"
    if "RANK" in env:
        started = int(env.get("WORLD_SIZE", "1"))
        if started != ranks:
            problem = f"{started} ranks were started (WORLD_SIZE)"
            raise ConfigError.at(key, ranks, problem, f"set them to {started} in all, or start {ranks} ranks")
        return
    if cluster.num_nodes > 1:
        remedy = "start nrt train on every node with srun or torchrun, or set cluster.num_nodes=1"
        raise ConfigError.at("cluster.num_nodes", cluster.num_nodes, "ranks are started on this machine alone", remedy)
    if cluster.gpus_per_node:
        import torch

        found = torch.cuda.device_count()
        if found < cluster.gpus_per_node:
            remedy = f"set cluster.gpus_per_node={found}"
            remedy += "" if found else " and cluster.cpu_ranks to the number of ranks"
            default = ", its default" if cluster.gpus_per_node == Cluster().gpus_per_node else ""
            problem = f"this machine has {found} GPUs"
            raise ConfigError(f"cluster.gpus_per_node = {cluster.gpus_per_node}{default}: {problem}; {remedy}")


def prepare_environment(recipe: Recipe, env: MutableMapping[str, str]) -> None:
    """Threads and device of this process and of the ranks below it, before torch loads its libraries."""
    if recipe.cluster.gpus_per_node == 0:
        env.setdefault("NRT_DEVICE", "cpu")  # a machine that has GPUs is asked not to use them
        env.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores, and repeats are equal with one thread
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would take the other ranks' cores
        return
    # A rollout's cache and an update's activations, each of many sizes, take the same memory in turn.
    env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cfg = recipe.policy.megatron_cfg
    if cfg.tensor_model_parallel_size > 1 or cfg.context_parallel_size > 1:
        # Megatron's tensor-parallel layers start an exchange before the product it is to overlap with, and rely on
        # kernels running in that order.
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def run(recipe: Recipe) -> int:
    """Trains, and returns the exit code. In this process when it is a rank already or the only one."""
    if "RANK" not in os.environ and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens where the host's name leads to
    with tempfile.TemporaryDirectory(prefix="nrt-") as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(to_yaml(recipe), encoding="utf-8")
        if "RANK" in os.environ or world_size(recipe) == 1:
            from nrt_megatron import worker

            try:
                return worker.main(str(path)) or 0
            except SystemExit as ended:
                if ended.code == 128 + signal.SIGINT and is_first_rank(os.environ):
                    print(f"nrt: ended by SIGINT; {_left_behind(recipe)}", file=sys.stderr)
                raise
        return _start_ranks(recipe, path, scratch)


def _left_behind(recipe: Recipe) -> str:
    """Where a run that was interrupted goes on; an interrupt, unlike a request to stop, saves nothing."""
    found = newest_first(Path(recipe.run_dir or ".") / "checkpoints")
    if not found:
        return "no checkpoint has been written, the same command begins anew"
    return f"the last checkpoint is {found[0]}, the same command goes on from there"


def _start_ranks(recipe: Recipe, recipe_yaml: Path, scratch: str) -> int:
    """Runs one process a rank with torch's elastic launcher and waits for all of them."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from nrt_megatron import loopback

    _silence_launcher()
    loopback.register()
    os.environ[_PARENT] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size(recipe),
        run_id=uuid.uuid4().hex,
        rdzv_backend=loopback.BACKEND,
        rdzv_endpoint=loopback.ADDRESS,
        local_addr=loopback.ADDRESS,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # these end the ranks; SIGTERM and SIGUSR1 ask them to stop
        **({"shutdown_timeout": _PATIENCE_S} if hasattr(LaunchConfig, "shutdown_timeout") else {}),  # torch 2.10: 30 s
    )
    stopping.listen()
    threading.Thread(target=_pass_stop_on, daemon=True).start()
    try:
        elastic_launch(config, sys.executable)("-m", "nrt_megatron.launch", str(recipe_yaml))
    except ChildFailedError as error:
        return _report(error.failures)
    except SignalException as error:  # the launcher has ended the ranks with the same signal
        print(f"nrt: ended by {error.sigval.name}, all ranks with it; {_left_behind(recipe)}", file=sys.stderr)
        return 128 + error.sigval
    return 0


def _pass_stop_on() -> None:
    """Asks the ranks to stop once this process is asked; again and again, for one may not have started yet."""
    import psutil

    while True:
        time.sleep(0.2)
        if (number := stopping.asked()) is not None:
            for rank in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)


def _silence_launcher() -> None:
    """What failed is said in one line by `_report`. Torch sets a level on each of its loggers, so each one here."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _report(failures: Mapping[int, ProcessFailure]) -> int:
    """Exit code of a failed run; one line names the ranks, unless one of them has told the user already."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    if _USER_MISTAKE in codes.values():
        return _USER_MISTAKE
    if set(codes.values()) <= {stopping.UNFINISHED, *(-number for number in stopping.SIGNALS)}:
        if stopping.UNFINISHED not in codes.values():  # ranks that a signal ended had not started to heed it
            print("nrt: asked to stop before the run had started; the same command starts it", file=sys.stderr)
        return stopping.UNFINISHED
    first = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM}  # those the launcher ended
    said = [f"rank {rank} {_ending(code)}" for rank, code in (first or codes).items()]
    print(f"nrt: {', '.join(said[:4])}{' and others' if len(said) > 4 else ''}", file=sys.stderr)
    return 1


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _end_with_parent() -> None:
    """Linux ends this process when its launcher is gone, even by SIGKILL: no rank may go on writing to the run."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(os.environ[_PARENT]):  # it went before the call above
        os._exit(1)


def _rank_main(recipe_yaml: str) -> int:
    """One rank below `_start_ranks`."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher passes Ctrl-C on; its line is enough
    from nrt_megatron import worker

    return worker.main(recipe_yaml) or 0


if __name__ == "__main__":
    sys.exit(_rank_main(sys.argv[1]))
