"""Tests run on CPU ranks, also where there is a GPU; `pytest -m gpu` runs those that need one on it."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["NRT_DEVICE"] = "cpu"  # read when nrt_megatron.mcore is imported
