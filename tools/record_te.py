#!/usr/bin/env python
"""Records what Transformer Engine's layers hold and compute, on a machine without a GPU: `tools/record_te.py FILE`.

Once, in an environment of its own that also sees this project's:

    pip install --no-deps transformer-engine==2.11.0 pydantic importlib-metadata zipp einops onnx onnxscript onnx-ir ml-dtypes

It writes tests/mcore/te_layers.json, which tests compare the conversion table and the FP8 rehearsal with: names and
shapes of the state dict and of the checkpoint's keys for Llama and Mistral, at tensor parallel 1 and 2, and for a forward
and backward in FP8 the sum of log-probs and the norms of gradients.

The layers are Transformer Engine's own Python, and FP8 is its reference quantizer with torch's `_scaled_mm`. Stand-ins:
the compiled module (its names; a kernel that is called raises), RMSNorm, Triton, and the answers of a Hopper GPU.
"""

from __future__ import annotations

import enum
import importlib.machinery
import json
import os
import sys
import types
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch._inductor.runtime.hints  # looks for Triton itself: before there is a stand-in
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

REFERENCE = (
    "transformer_engine.pytorch.custom_recipes.quantization_current_scaling.current_scaling_ref_quantizer_factory"
)


class _Named(type):
    """A class whose attributes are made when they are asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, cls())
        return getattr(cls, name)


class _Kernel:
    """A function, or a module of functions, that is not there."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> _Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kernel(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self._name} is a CUDA kernel")


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Named(name, (), {"__init__": lambda self, *a, **k: None}) if name[0].isupper() else _Kernel(name)
        setattr(self, name, value)
        return value


class _FindTriton:
    """Finds `triton` and all below it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "triton" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandIn(spec.name)
        if spec.name == "triton":
            module.__version__ = "3.0"
            module.jit = module.autotune = lambda *a, **k: a[0] if a and callable(a[0]) else lambda f: f
            module.Config = lambda *a, **k: None
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _rmsnorm_forward(x: Tensor, weight: Tensor, eps: float, out, quantizer, dtype, margin, zero_centered):
    """x [n, h] -> (y, no mean, reciprocal root mean square [n])"""
    reciprocal = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    return (x.float() * reciprocal[:, None] * weight.float()).to(x.dtype), None, reciprocal


def _rmsnorm_backward(dy: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, margin, zero_centered):
    unit, scaled = x.float() * reciprocal[:, None], weight.float() * dy.float()
    dx = reciprocal[:, None] * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * unit).sum(0).to(weight.dtype)


def import_transformer_engine() -> None:
    """Puts the stand-ins in place and imports Transformer Engine on top of them."""
    os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_TORCH_COMPILE": "0"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_engine.common as common  # the framework part fails, and is imported again below
    compiled = _StandIn("transformer_engine_torch")
    # What a linear layer numbers its tensors by: three forward, two backward for each product.
    forward = {f"GEMM{i + 1}_{n}": 3 * i + j for i in range(3) for j, n in enumerate(("INPUT", "WEIGHT", "OUTPUT"))}
    backward = {f"GRAD_{n}{i + 1}": 2 * i + j for i in range(3) for j, n in enumerate(("OUTPUT", "INPUT"))}
    compiled.FP8FwdTensors, compiled.FP8BwdTensors = (enum.IntEnum("Tensors", t) for t in (forward, backward))
    compiled.rmsnorm_fwd, compiled.rmsnorm_bwd = _rmsnorm_forward, _rmsnorm_backward
    compiled.__all__ = ["rmsnorm_fwd", "rmsnorm_bwd", "layernorm_fwd", "layernorm_bwd"]
    sys.modules["transformer_engine_torch"] = compiled
    common.load_framework_extension = lambda framework: None
    finder = _FindTriton()
    sys.meta_path.insert(0, finder)
    import transformer_engine.pytorch  # noqa: F401

    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        del sys.modules[name]


def pretend_hopper() -> None:
    """What Transformer Engine asks the GPU, after the CPU adapter is in place."""
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(major=9, minor=0)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


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

    pretend_hopper()
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
            state = {key: value if value is None else str(list(value.shape)) for key, value in chunk.state_dict().items()}
            out["layers"][f"{name}, tp {tp}"] = {"state": state, "checkpoint": keys}
            if tp == 1:
                fp8 = dict(fp8="hybrid", fp8_recipe="custom", fp8_quantizer_factory=REFERENCE)
                for dtype in ("bf16", "fp32"):
                    (chunk,) = model.build_chunks(shape, Megatron(make_vocab_size_divisible_by=8, bf16=dtype == "bf16"), **fp8)
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
    import_transformer_engine()
    Path(sys.argv[1]).write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
