"""One forward and backward that both kinds of layers run; `tools/record_te.py` records it for Transformer Engine's."""

from __future__ import annotations

import torch

from nrt_megatron.convert import names
from nrt_megatron.convert.config import ModelShape
from nrt_megatron.convert.seeded import SeededWeights
from nrt_megatron.mcore.hf import load_hf_weights
from nrt_megatron.mcore.model import PolicyModel, ScoredTokens
from tests.mcore import tiny

ROWS, COLUMNS = 2, 16


def measure(chunk: PolicyModel, shape: ModelShape) -> dict:
    """Sum of log-probs of fixed tokens, and the norm of every gradient by its name in Transformer Engine's layers."""
    load_hf_weights([chunk], shape, SeededWeights(shape, 1), 0, 1)
    generator, device = torch.Generator().manual_seed(0), next(chunk.parameters()).device

    def draw(*size: int) -> torch.Tensor:
        return torch.randint(0, tiny.VOCAB, size, generator=generator).to(device)

    positions = torch.arange(COLUMNS, device=device).expand(ROWS, COLUMNS)
    n = ROWS * COLUMNS
    labels = ScoredTokens(torch.arange(n, device=device), draw(n), torch.ones(n, device=device))
    log_probs, _ = chunk(draw(ROWS, COLUMNS), positions, None, labels=labels, shared_rows=True)
    log_probs.sum().backward()
    table = names.by_name(shape)
    return {
        "log_prob": log_probs.sum().item(),
        "gradients": {table[n].te_name: p.grad.double().norm().item() for n, p in chunk.named_parameters()},
    }
