"""What only two GPUs can show: whole steps of two tensor-parallel ranks that share sequences, on Transformer Engine's
layers. None of it has been run where this was written, but on stand-ins (tools/gpu_tests_on_cpu.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nrt_megatron.mcore import HAS_GPU, runtime
from nrt_megatron.recipe import Recipe
from tests.gpu.test_gpu import BLOCKS, HYBRID, TE, needs, settings, steps
from tests.mcore import tiny
from tests.mcore.test_layouts import TP

pytestmark = pytest.mark.gpu

WIDE = tiny.LLAMA | {"hidden_size": 128, "intermediate_size": 256}
"""Blocks of 128 that ranks gather must be whole."""
FORMATS = {
    "te bf16": ({"bf16": True}, "same", 0.1),
    "te fp8 tensorwise": (HYBRID, "same", 1.0),
    "te fp8 tensorwise, rollout in bf16": (HYBRID, "none", 1.0),
    "te fp8 blockwise": (BLOCKS, "same", 0.5),
}


def on_two_gpus(fn: Callable, *args: Any) -> list[Any]:
    """Results of `fn(*args)` on two ranks, in their order; processes of their own, since CUDA does not fork."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="two", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": 60}, max_restarts=0, start_method="spawn",
    )  # fmt: skip
    results = elastic_launch(config, fn)(*args)
    return [results[rank] for rank in range(2)]


RUN = on_two_gpus


@pytest.fixture(autouse=True)
def two_gpus() -> None:
    if not HAS_GPU:
        pytest.skip("no GPU")
    if RUN is on_two_gpus and torch.cuda.device_count() < 2:
        pytest.skip("one GPU: two ranks need two")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.save_hf(WIDE, tmp_path_factory.mktemp("llama"))


def told(chunk: torch.nn.Module) -> list[bool]:
    """Whether the quantizers of what ranks gather were told so in the last forward: of the inputs of column-parallel
    layers, and of the gradients that reach row-parallel ones."""
    layers = [module for module in chunk.modules() if getattr(module, "fp8_initialized", False)]
    gathered = [m.quantizers["scaling_fwd" if m.parallel_mode == "column" else "scaling_bwd"][0] for m in layers]
    return [getattr(q, "with_amax_reduction", False) or getattr(q, "all_gather_usage", False) for q in gathered]


def two_steps(directory: Path, recipe: Recipe) -> dict[str, Any]:
    """On one of the ranks: the rows of two steps, the weights that both ranks hold, and what quantizers were told."""
    torch.backends.cuda.matmul.allow_tf32 = False
    policy = tiny.policy(directory, recipe)
    rows = steps(policy, recipe, 2)
    (chunk,) = policy.chunks
    shared = {name: p for name, p in chunk.named_parameters() if not getattr(p, "tensor_model_parallel", False)}
    weights = {name: p.detach().float().cpu().tolist() for name, p in shared.items()}
    result = {"rows": rows, "weights": weights, "told": told(chunk)}
    runtime.shutdown()
    return result


@pytest.mark.parametrize("name", FORMATS)
def test_steps_of_two_ranks_that_share_sequences(llama, name):
    """Rollout without sequence parallelism, log-probs and update with it, twice: the second rollout comes after it.

    The gap shows whether both compute the same; that replicated weights stay equal, whether the gradients are whole.
    """
    number_format, rollout, bound = FORMATS[name]
    fields = {**TE, **number_format, TP: 2, "sequence_parallel": True}
    needs(fields)
    recipe = settings(fields, fp8=rollout, weighted="fp8" in fields)
    first, second = RUN(two_steps, llama, recipe)
    assert first["weights"] == second["weights"] and any("layer_norm_weight" in name for name in first["weights"])
    assert first["told"] == [True] * (4 * WIDE["num_hidden_layers"] if "fp8" in fields else 0)
    rows = first["rows"]
    for row in rows:
        assert row["update/skipped_share"] == 0 and row["grad_norm"] > 0 and torch.tensor(row["loss"]).isfinite()
        assert row["logprob_gap/max"] < bound and row["ratio/mean"] == pytest.approx(1, abs=0.1)
        assert row["logprob_gap/abs_mean"] < 3 * rows[0]["logprob_gap/abs_mean"] + 1e-5
        print({key: row[key] for key in ("loss", "grad_norm", "logprob_gap/abs_mean", "logprob_gap/max")})
