"""Builds one rank of every pipeline stage on the meta device and counts its parameters.

Runs in a process of its own: torch's `fake` process group stands in for the other ranks, and the caller may have a
real one. `python -m nrt_megatron.plan.build` reads a recipe's section and shape as JSON on stdin.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

from nrt_megatron.convert.config import ModelShape
from nrt_megatron.recipe import Megatron


def built_parameters(shape: ModelShape, cfg: Megatron) -> list[int]:
    """Parameters on one rank of each stage, as Megatron builds it.

    Tensor-parallel ranks of a stage hold equal shares and data-parallel ones are copies, so that one rank a stage is
    every distinct rank. Raises RuntimeError with the process's output when the model cannot be built.
    """
    request = json.dumps({"shape": shape.to_hf(), "megatron": dataclasses.asdict(cfg)})
    env = os.environ | {"NRT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "nrt_megatron.plan.build"]
    done = subprocess.run(command, input=request, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the ranks failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _count(shape: ModelShape, cfg: Megatron) -> list[int]:
    import torch

    # Megatron compiles its fused functions while it is imported, which takes longer than all the rest.
    torch.compile = lambda function=None, **_: function if function else lambda f: f
    with torch.device("meta"):
        torch.empty(0)  # torch remembers its factories now, before the CPU adapter wraps them
    return [_count_stage(shape, cfg, stage) for stage in range(cfg.pipeline_model_parallel_size)]


def _count_stage(shape: ModelShape, cfg: Megatron, stage: int) -> int:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nrt_megatron.mcore.model import build_chunks
    from nrt_megatron.mcore.runtime import parallel_state

    tp, pp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=stage * tp, world_size=tp * pp)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=cfg.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=False,
        )
        with torch.device("meta"):
            chunks = build_chunks(
                shape,
                cfg,
                init_model_with_meta_device=True,
                use_cpu_initialization=True,  # leaves the device to the context above
                account_for_embedding_in_pipeline_split=cfg.account_for_embedding_in_pipeline_split,
                account_for_loss_in_pipeline_split=cfg.account_for_loss_in_pipeline_split,
            )
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        assert all(p.is_meta for p in parameters), "a planned model must take no memory"
        return sum(p.numel() for p in parameters)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _main() -> None:
    request = json.load(sys.stdin)
    # Local layers hold what Transformer Engine's hold, and build without it; context-parallel ranks are copies.
    plain = {"transformer_impl": "local", "fp8": None, "context_parallel_size": 1}
    cfg = Megatron(**request["megatron"] | plain)
    print(json.dumps(_count(ModelShape.from_hf(request["shape"]), cfg)))


if __name__ == "__main__":
    _main()
