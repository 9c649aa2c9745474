#!/usr/bin/env python
"""Records what Transformer Engine's layers hold and compute: `tools/record_te.py tests/mcore/te_layers.json`.

No GPU is needed; tools/te_standins.py says what has to be installed. Tests compare the conversion table and the FP8
rehearsal with the file: names and shapes of the state dict and of the checkpoint's keys for Llama and Mistral, at
tensor parallel 1 and 2, and for a forward and backward in FP8 the sum of log-probs and the norms of gradients.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import te_standins

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def record() -> dict[str, Any]:
    """The contents of the file."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nrt_megatron.convert.config import ModelShape
    from nrt_megatron.mcore import model
    from nrt_megatron.recipe import Megatron
    from tests.mcore import te_case, tiny

    te_standins.pretend_hopper()
    model.use_transformer_engine = lambda cfg: True
    packages = ("transformer-engine", "megatron-core", "torch")
    out: dict[str, Any] = {"versions": {name: version(name) for name in packages}, "layers": {}, "fp8": {}}
    for tp in (1, 2):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
        parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1)
        for name, config in (("llama", tiny.LLAMA), ("mistral", tiny.MISTRAL)):
            shape = ModelShape.from_hf(config)
            cfg = Megatron(tensor_model_parallel_size=tp, make_vocab_size_divisible_by=8, bf16=True)
            (chunk,) = model.build_chunks(shape, cfg)
            stored = chunk.sharded_state_dict(metadata=None)
            apply_factories(stored)
            keys = {value.key: str(list(value.global_shape)) for value in _flat(stored)}
            state = {
                key: value if value is None else str(list(value.shape)) for key, value in chunk.state_dict().items()
            }
            out["layers"][f"{name}, tp {tp}"] = {"state": state, "checkpoint": keys}
            if tp == 1:
                fp8 = dict(fp8="hybrid", fp8_recipe="custom", fp8_quantizer_factory=te_standins.REFERENCE)
                for dtype in ("bf16", "fp32"):
                    (chunk,) = model.build_chunks(
                        shape, Megatron(make_vocab_size_divisible_by=8, bf16=dtype == "bf16"), **fp8
                    )
                    out["fp8"][f"{name}, {dtype}"] = te_case.measure(chunk, shape)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return out


def _flat(tree: Any) -> list[Any]:
    if isinstance(tree, (dict, list)):
        return [leaf for branch in (tree.values() if isinstance(tree, dict) else tree) for leaf in _flat(branch)]
    return [tree]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if not sys.flags.optimize:  # Transformer Engine asserts that its tensors are on a GPU: without asserts
        os.execv(sys.executable, [sys.executable, "-O", *sys.argv])
    te_standins.install()
    Path(sys.argv[1]).write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
