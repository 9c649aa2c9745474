"""Lets Megatron-Core 0.16 run on a machine without a GPU; imported only there.

Megatron allocates on `torch.cuda.current_device()` or the literal `"cuda"`, calls `.cuda()`, keeps CUDA
random states and compares type names such as `torch.cuda.FloatTensor`. Each of these is pointed at its
CPU counterpart here, once, before Megatron is imported. Nothing of the project depends on it.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.utils._device

CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")
_TENSOR_TYPES = ("FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor", "LongTensor", "IntTensor", "ByteTensor")
_installed = False


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory):
    """`factory` with a CUDA `device=` replaced by the CPU."""

    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return wrapper


class _NoStream:
    """A CUDA stream or event where everything is already synchronous."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    def wait_event(self, *args):
        pass

    def record_event(self, *args):
        return self

    def record(self, *args):
        pass

    def wait(self, *args):
        pass

    def synchronize(self):
        pass


def _patch_tensors() -> None:
    # Torch keeps the set of its factories, for `with torch.device(...)`, from the first time it is asked.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    plain_type = torch.Tensor.type

    def type_name(self, *args, **kwargs):
        # The optimizers ask `param.type() == 'torch.cuda.FloatTensor'`.
        result = plain_type(self, *args, **kwargs)
        if not args and not kwargs and self.device.type == "cpu":
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_name
    for name in _TENSOR_TYPES:
        setattr(torch.cuda, name, getattr(torch, name))


def _patch_cuda() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda device=None: 0
    cuda.memory_reserved = cuda.max_memory_reserved = lambda device=None: 0
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda device=None: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    # Random states: Megatron's tracker saves and restores "the" CUDA generator; here it is the CPU one.
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda.default_generators = {CPU: torch.default_generator}
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: None  # torch.manual_seed calls it, having seeded the CPU itself
    for namespace in (cuda, cuda.random):
        namespace.get_rng_state = lambda device=None: torch.get_rng_state()
        namespace.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _without_compiler(function=None, **options):
    """`torch.compile` that compiles nothing. Megatron decorates functions with it at import, which loads the
    compiler (seconds); none of them is called here."""
    return function if function is not None else lambda f: f


def install() -> None:
    """Installs the adapter once. Asserts that there is no GPU in use."""
    global _installed
    if _installed:
        return
    _patch_tensors()
    _patch_cuda()
    torch.compile = _without_compiler
    _installed = True
