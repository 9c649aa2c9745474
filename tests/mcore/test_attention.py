"""The parts of the core attention that only a GPU takes, on tensors of a CPU; and where weights are made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nrt_megatron.mcore.attention import additive, ungrouped
from nrt_megatron.mcore.layers import RMSNorm


@pytest.mark.parametrize("queries", [1, 5])
def test_grouped_heads_attend_the_same_as_plain_ones(queries):
    q, k, v = (torch.randn(3, heads, s, 4) for heads, s in ((6, queries), (2, 7), (2, 7)))
    seen = torch.rand(3, 1, queries, 7) < 0.7
    seen[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    out = F.scaled_dot_product_attention(*ungrouped(q, k, v), attn_mask=seen)
    torch.testing.assert_close(out.reshape(expected.shape), expected)


@pytest.mark.parametrize("columns", [1, 8, 13])
def test_a_mask_is_laid_out_for_the_kernel(columns):
    """Values by definition; every stride but the last a multiple of 8, and the first element at one."""
    hidden = torch.rand(3, 1, 5, columns) < 0.5
    mask = additive(hidden, torch.bfloat16)
    assert mask.dtype == torch.bfloat16
    assert torch.equal(mask, torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill(hidden, -torch.inf))
    *rows, last = mask.stride()
    assert last == 1 and not any(stride % 8 for stride in rows) and not mask.storage_offset()


def test_norms_are_made_where_the_other_layers_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    config = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=True, init_model_with_meta_device=False)
    weight = RMSNorm(config, 8).weight
    assert weight.is_meta and weight.dtype == torch.bfloat16 and weight.sequence_parallel
