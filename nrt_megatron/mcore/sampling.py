"""Drawing one token per row from logits, with randomness that belongs to the trace and not to the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Draw:
    """One token per row."""

    tokens: Tensor
    """int64 [n]"""
    log_probs: Tensor
    """float32 [n], under the tempered distribution before top-k and top-p"""
    entropies: Tensor
    """float32 [n], of the same distribution, in nats"""
    watched: Tensor
    """float32 [n], log-prob of the watched token at temperature 1"""


def uniforms(seed: int, step: int, prompt_indices: list[int], num_generations: int, num_tokens: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [G, K, T]: a pure function of (seed, step, prompt index, k, token).

    numpy's Philox generator keyed by SeedSequence; whatever else is in the batch, and on whichever rank a
    prompt lands, its traces get the same numbers.
    """
    draws = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, index]))).random(
            (num_generations, num_tokens)
        )
        for index in prompt_indices
    ]
    return torch.from_numpy(np.stack(draws))


def _truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zeroes all but the `top_k` most likely tokens and all beyond the first that reach `top_p`; [n, V]."""
    if top_k <= 0 and top_p >= 1.0:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True)
    keep = ordered.cumsum(-1) - ordered < top_p  # the token that crosses top_p stays
    if top_k > 0:
        keep[:, top_k:] = False
    return torch.where(torch.zeros_like(keep).scatter(1, order, keep), probs, 0.0)


@contextlib.contextmanager
def any_kernel() -> Iterator[None]:
    """Lets torch choose its kernels, for what is deterministic without being listed so.

    Along rows CUDA's cumsum is; torch lists it for its flat form and would raise. Writing to distinct rows is;
    the listed kernel would sort them first, for every token drawn.
    """
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)


def draw(
    logits: Tensor,
    uniform: Tensor | None,
    watched: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Draw:
    """Draws by inversion of the cumulative distribution; `uniform` float64 [n] in [0, 1), None: most likely.

    logits float [n, V], real vocabulary only. watched: int64 scalar, a token whose log-prob at temperature 1 is
    wanted as well. Greedy draws report the distribution at temperature 1. Rows are worked through in slices, which
    bounds the buffers of [rows, V].
    """
    parts = []
    for first in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        parts.append(
            _draw_rows(logits[rows], None if uniform is None else uniform[rows], watched, temperature, top_k, top_p)
        )
    return Draw(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _draw_rows(
    logits: Tensor, uniform: Tensor | None, watched: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_probs = plain = torch.log_softmax(logits.float(), dim=-1)
    if uniform is not None and temperature != 1.0:
        log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    probs = log_probs.exp()
    entropies = -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1)
    if uniform is None:
        tokens = log_probs.argmax(-1)
    else:
        with any_kernel():
            cumulative = _truncate(probs, top_k, top_p).double().cumsum(-1)  # [n, V]
            threshold = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
            # First token whose cumulative mass exceeds the threshold; such a token has mass of its own.
            tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.size(1) - 1)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0], entropies, plain.index_select(1, watched.view(1))[:, 0]
