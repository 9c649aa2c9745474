"""Multi-process tests as ordinary functions: ranks are forked after one import of torch and Megatron."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.torture import reserved_port


def _rank_main(fn: Callable, rank: int, world_size: int, port: int, out: Path, args: tuple) -> int:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    log = open(out / f"{rank}.log", "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.enable(file=log)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    try:
        result = fn(*args)
        (out / f"{rank}.pkl").write_bytes(pickle.dumps(result))
        return 0
    except BaseException:
        traceback.print_exc(file=log)
        return 1
    finally:
        log.flush()


def run_ranks(world_size: int, fn: Callable, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Runs `fn(*args)` on `world_size` forked ranks and returns their results in rank order.

    torchrun's variables are set; `fn` joins the group itself (`runtime.initialize`). When a rank fails or
    `timeout` seconds pass, all ranks are ended and the failure shows every rank's output and stack.
    """
    import torch

    torch.set_num_threads(1)  # a forked child must not inherit a live OpenMP pool
    with tempfile.TemporaryDirectory() as tmp, reserved_port() as reserved:
        out, port = Path(tmp), reserved.getsockname()[1]
        sys.stdout.flush()
        sys.stderr.flush()
        pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                os._exit(_rank_main(fn, rank, world_size, port, out, args))
            pids.append(pid)
        failure = _wait(pids, timeout)
        if failure:
            logs = "\n".join(f"--- rank {r}\n{(out / f'{r}.log').read_text()}" for r in range(world_size))
            raise AssertionError(f"{failure}\n{logs}")
        return [pickle.loads((out / f"{r}.pkl").read_bytes()) for r in range(world_size)]


def _wait(pids: list[int], timeout: float) -> str:
    """'' when all ranks exit 0, else what went wrong; no rank is left running."""
    deadline, failure, alive = time.monotonic() + timeout, "", dict(enumerate(pids))
    while alive and not failure:
        for rank, pid in list(alive.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del alive[rank]
                if status:
                    failure = f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}"
        if time.monotonic() > deadline:
            failure = f"timeout after {timeout} s, still running: ranks {sorted(alive)}"
        time.sleep(0.01)
    if alive:
        for pid in alive.values():
            os.kill(pid, signal.SIGUSR1)  # stack into the rank's log
        time.sleep(0.5)
        for pid in alive.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return failure
