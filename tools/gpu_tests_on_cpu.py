#!/usr/bin/env python
"""Runs the tests marked `gpu` without one, as far as they go: `tools/gpu_tests_on_cpu.py [-k EXPRESSION]`.

On Transformer Engine's Python with stand-ins for its kernels (tools/te_standins.py): its linear layers in models,
rollout on the cache, tensorwise and blockwise FP8 with its own quantizers and tensors, kept FP8 weights, weights in
FP8, and two ranks that share sequences. Not CUDA, NCCL, its kernels, or delayed scaling.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import te_standins

ROOT = Path(__file__).resolve().parent.parent
OUT_OF_REACH = ("delayed", "adapter", "its_checkpoint[te fp8 weights]")
"""Parts of the names of tests that need a kernel without a stand-in, or a GPU itself: the copy off it that a checkpoint
takes is one out of FP8."""


class Reachable:
    """A pytest plugin that lets the GPU tests run, all but those out of reach."""

    def pytest_collection_modifyitems(self, config, items: list) -> None:
        from tests.distributed import run_ranks

        config.hook.pytest_deselected(items=[i for i in items if any(name in i.name for name in OUT_OF_REACH)])
        items[:] = [i for i in items if not any(name in i.name for name in OUT_OF_REACH)]
        items.sort(key=lambda item: "two_ranks" not in item.name)  # forked, so before this process has threads
        for item in items:
            item.module.HAS_GPU, item.module.needs = True, lambda fields: None
            item.module.RUN = lambda fn, *args: run_ranks(2, fn, *args)


def main() -> int:
    import pytest
    import torch

    te_standins.install()
    import nrt_megatron.mcore  # noqa: F401  the adapter, then what it must not see

    te_standins.pretend_hopper()
    import megatron.core.optimizer

    from nrt_megatron.mcore import model

    model.HAS_GPU = True
    megatron.core.optimizer.Adam, megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "ignore", str(ROOT / "tests" / "gpu"), *sys.argv[1:]]
    return pytest.main(options, plugins=[Reachable()])


if __name__ == "__main__":
    if not sys.flags.optimize:
        os.execv(sys.executable, [sys.executable, "-O", *sys.argv])
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
