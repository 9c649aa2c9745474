"""One run at a time in a run directory: a second one would cut metrics and delete checkpoints under the first."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from nrt_megatron.recipe import ConfigError, print_notice

LOCK_FILE = ".lock"
PATIENCE_S = 5.0
"""For a killed run's last process to be gone when the next one starts at once."""


def hold(run_dir: Path) -> IO[str]:
    """Locks a run directory until the file is closed, or the process ends in whatever way.

    Raises ConfigError when another process has it locked, and OSError when the directory cannot be written. On a
    file system without locks it says so in one line, and nothing is locked.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = open(run_dir / LOCK_FILE, "a+")
    try:
        if not _locked(file, fcntl.LOCK_EX):
            file.seek(0)
            raise _in_use(run_dir, file)
    except OSError as error:
        print_notice(f"{run_dir} cannot be locked ({error.strerror}); start no second run in it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def check_free(run_dir: Path) -> None:
    """Raises ConfigError when a run is using the directory. Writes nothing."""
    try:
        with open(run_dir / LOCK_FILE) as file:
            if not _locked(file, fcntl.LOCK_SH):
                raise _in_use(run_dir, file)
    except OSError:
        pass  # no run has been here, or there are no locks, which `hold` says


def _locked(file: IO[str], kind: int) -> bool:
    """Whether the lock was to be had. Raises OSError where there are no locks."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def _in_use(run_dir: Path, file: IO[str]) -> ConfigError:
    holder = file.read().strip() or "another process"
    remedy = "wait until it has ended, or set another run_dir"
    return ConfigError.at("run_dir", str(run_dir), f"in use by {holder}", remedy)
