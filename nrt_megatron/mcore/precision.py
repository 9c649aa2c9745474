"""Which number formats the layers run in: Megatron's FP8 fields, the precision of a rollout, and what FP8 asks of
layers and shapes then.

What concerns Transformer Engine follows Megatron-Core 0.16.1 and Transformer Engine 2.11 as documented and read. It has
run on Transformer Engine's Python with stand-ins for its kernels (tools/gpu_tests_on_cpu.py), and not on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from nrt_megatron.mcore.fp8 import rehearsed_layers
from nrt_megatron.recipe import Megatron

TE_LINEAR = ("TELinear", "TEColumnParallelLinear", "TERowParallelLinear", "TELayerNormColumnParallelLinear")
"""Megatron's linear layers on Transformer Engine, by name: their module cannot be imported without it."""


def has_te_fp8(cfg: Megatron) -> bool:
    """Whether Transformer Engine's own FP8 runs, and not the rehearsal or none."""
    return cfg.fp8 is not None and not cfg.fp8_emulation


def describe(cfg: Megatron) -> str:
    """`bf16, FP8 hybrid blockwise (emulated)`"""
    fp8 = f", FP8 {cfg.fp8} {cfg.fp8_recipe}{' (emulated)' if cfg.fp8_emulation else ''}" if cfg.fp8 else ""
    return f"{'bf16' if cfg.bf16 else 'fp32'}{fp8}"


def transformer_fields(cfg: Megatron) -> dict[str, Any]:
    """The FP8 fields of `TransformerConfig`.

    For the rehearsal `fp8` itself stays unset: with it Megatron recomputes activations through Transformer Engine.
    """
    if cfg.fp8 is None:
        return {}
    edges = dict(
        first_last_layers_bf16=cfg.first_last_layers_bf16,
        num_layers_at_start_in_bf16=cfg.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=cfg.num_layers_at_end_in_bf16,
    )
    names = ("fp8", "fp8_recipe", "fp8_param", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
    return edges if cfg.fp8_emulation else edges | {name: getattr(cfg, name) for name in names}


def set_sequence_parallel(chunk: torch.nn.Module, on: bool) -> None:
    """Switches sequence parallelism of all layers of a model chunk.

    Transformer Engine (2.11) lets its quantizers know about it (how data lie that are to be gathered, whether ranks
    share a scale) in a layer's first forward in FP8 alone, and has no public way to repeat that. Delayed scaling does
    not ask, and keeps its history where the others would get new quantizers.
    """
    set_model_to_sequence_parallel(chunk, on)
    if chunk.config.fp8 is None or chunk.config.fp8_recipe == "delayed":
        return
    for module in chunk.modules():
        if hasattr(module, "fp8_meta_tensors_initialized"):
            module.fp8_initialized = module.fp8_meta_tensors_initialized = False


def set_weight(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Gives a weight a value of its shape, also where it is kept in FP8."""
    with torch.no_grad():
        parameter.copy_(value)
    _note(parameter, value)


def load_state(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict`, also where weights are kept in FP8."""
    chunk.load_state_dict(state)
    for name, parameter in chunk.named_parameters():
        _note(parameter, state[name])


@torch.no_grad()
def _note(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Says what a weight kept in FP8 was before it was rounded, until the optimizer is built.

    Megatron makes the optimizer's float32 copy from what Transformer Engine noted of it at construction (Megatron
    0.16.1, `DistributedOptimizer`): no weight yet, but what memory held.
    """
    noted = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if noted is not None:
        noted.copy_(value)


@contextlib.contextmanager
def rollout_precision(chunks: list[torch.nn.Module], fp8: str) -> Iterator[None]:
    """Linear layers as a rollout wants them: `fp8` is `same` as in training, or `none`. No weight may change inside."""
    with contextlib.ExitStack() as stack:
        for chunk in chunks:
            for layer in rehearsed_layers(chunk):
                stack.callback(vars(layer).update, scaling=layer.scaling, kept=None)
                layer.kept = []
                layer.scaling = layer.scaling if fp8 == "same" else None
            if chunk.config.fp8 is not None:
                _prepare_te(chunk, fp8, stack)
        yield


def _prepare_te(chunk: torch.nn.Module, fp8: str, stack: contextlib.ExitStack) -> None:
    if fp8 == "none":
        stack.callback(setattr, chunk.config, "fp8", chunk.config.fp8)
        chunk.config.fp8 = None
        return
    # Transformer Engine keeps FP8 copies of the weights from the last update's first micro-batch on; the schedules say
    # when one begins, and a rollout has to say it itself.
    chunk.set_is_first_microbatch()
    multiple = get_fp8_align_size(chunk.config.fp8_recipe)
    for module in chunk.modules():
        if type(module).__name__ in TE_LINEAR:
            for hook in pad_tokens(module, multiple):
                stack.callback(hook.remove)


def pad_tokens(module: torch.nn.Module, multiple: int) -> tuple[Any, Any]:
    """Hooks that feed a linear layer its tokens [s, b, h] as [s * b filled up with zeros to `multiple`, 1, h], and give
    [s, b, n] back.

    Megatron's own `prepare_model_for_fp8_inference` pads s alone, which makes 16 tokens of each one that is drawn.
    Tokens must be whole on the rank: not for sequence parallelism.
    """
    shapes: list[torch.Size] = []

    def before(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        shapes.append(x.shape)
        tokens = x.flatten(0, 1)
        return torch.nn.functional.pad(tokens, (0, 0, 0, -len(tokens) % multiple))[:, None], *args[1:]

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        s, b, _ = shapes.pop()
        return output[0][: s * b, 0].unflatten(0, (s, b)), output[1]

    return module.register_forward_pre_hook(before), module.register_forward_hook(after)
