"""The tests for a GPU, on layers that also run without one: else nobody notices when they no longer fit the code."""

from __future__ import annotations

import pytest

from tests.distributed import run_ranks
from tests.gpu import test_gpu
from tests.gpu.test_gpu import LOCAL
from tests.mcore import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_hf(tiny.MISTRAL, tmp_path_factory.mktemp("mistral"))


def test_forward(checkpoint):
    run_ranks(1, test_gpu.test_forward_equals_transformers, checkpoint, LOCAL, 2e-4)


def test_steps(checkpoint):
    run_ranks(1, test_gpu.test_steps_on_nccl_and_the_gap_of_their_rollouts, checkpoint, "local fp32")


def test_conversion(checkpoint, tmp_path):
    run_ranks(1, test_gpu.test_a_converted_checkpoint_loads, checkpoint, tmp_path, LOCAL)


def test_checkpoint(checkpoint, tmp_path):
    run_ranks(1, test_gpu.test_a_run_goes_on_from_its_checkpoint, checkpoint, tmp_path, "local fp32")
