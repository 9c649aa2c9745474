"""Transformer Engine's Python on a machine without a GPU: stand-ins for what its compiled part holds.

For tools/record_te.py and tools/gpu_tests_on_cpu.py, in an environment of their own that also sees this project's:

    pip install --no-deps transformer-engine==2.11.0 pydantic importlib-metadata zipp einops \\
        onnx onnxscript onnx-ir ml-dtypes

Its modules, FP8 state, tensors and reference quantizer run as they are. Stand-ins: the compiled module (its names; a
kernel that is called and has no stand-in raises), RMSNorm, the product of matrices, norm and scaling of gradients,
casts to FP8 (te_fp8.py), Triton, and the answers of a Hopper GPU. Its asserts that tensors are on a GPU must be off:
`python -O`.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.machinery
import os
import sys
import types
import warnings
from typing import Any

import torch
import torch._inductor.runtime.hints  # looks for Triton itself: before there is a stand-in
from torch import Tensor

import te_fp8

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
    y = (x.float() * reciprocal[:, None] * weight.float()).to(x.dtype)
    return y if quantizer is None else quantizer(y), None, reciprocal


def _rmsnorm_backward(dy: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, margin, zero_centered):
    unit, scaled = x.float() * reciprocal[:, None], weight.float() * dy.float()
    dx = reciprocal[:, None] * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * unit).sum(0).to(weight.dtype)


def _product(
    a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool, out, quantizer, dtype, *rest: Any, **more: Any
):
    """op(b) @ op(a), tokens flattened; added to `out` where the last but one argument of `rest` says so."""
    from transformer_engine.pytorch.constants import TE_DType

    dtypes = {code: dtype for dtype, code in TE_DType.items()}
    rows = () if transpose_b else b.size()[:-1]
    a, b = te_fp8.operand(a, not transpose_a), te_fp8.operand(b, transpose_b)
    y = (b.t() if transpose_b else b).float() @ (a.t() if transpose_a else a).float()
    y = y.to(dtypes.get(dtype, a.dtype))
    if out is not None:
        y = out.add_(y) if rest[-2] else out.copy_(y)
    return y.view(*rows, -1) if rows else y, None, None, None


def _norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False) -> tuple[Tensor, None]:
    return torch.stack([t.float().norm() for t in lists[0]]).norm().view(1), None


def _scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def install() -> None:
    """Imports Transformer Engine on top of the stand-ins. Before Megatron is imported."""
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
    compiled.generic_gemm, compiled.multi_tensor_l2norm, compiled.multi_tensor_scale = _product, _norm, _scale
    compiled.quantize, compiled.dequantize = te_fp8.quantize, te_fp8.dequantize
    compiled.fp8_transpose, compiled.compute_amax = te_fp8.transpose, te_fp8.largest_magnitude
    compiled.multi_tensor_compute_scale_and_scale_inv = te_fp8.scales
    compiled.__all__ = ["rmsnorm_fwd", "rmsnorm_bwd", "layernorm_fwd", "layernorm_bwd"]
    sys.modules["transformer_engine_torch"] = compiled
    common.load_framework_extension = lambda framework: None
    finder = _FindTriton()
    sys.meta_path.insert(0, finder)
    import transformer_engine.pytorch  # noqa: F401

    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        del sys.modules[name]


def _one_after_another(coalescing: Any) -> Any:
    """Gathers that NCCL would do together, over gloo."""

    def manager(group: Any = None, device: Any = None, **options: Any) -> Any:
        done = contextlib.nullcontext(types.SimpleNamespace(wait=lambda: None))
        return coalescing(group, device, **options) if device is None else done

    return manager


def pretend_hopper() -> None:
    """What Transformer Engine asks the GPU, after the CPU adapter is in place."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

    QuantizedTensor.type = lambda self: "torch.cuda.BFloat16Tensor"  # the adapter's answer for one inside another
    torch.distributed._coalescing_manager = _one_after_another(torch.distributed._coalescing_manager)
    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(major=9, minor=0)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
