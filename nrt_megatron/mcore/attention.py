"""Core attention on torch's `scaled_dot_product_attention`, for layer specs, and the masks it takes.

Megatron's local `DotProductAttention` materialises [b, n, s, s] scores and knows causal masks and padding
only; rollout and scoring need "this row has 3 padding columns and its cache ends at 17", and packing needs
trees. Transformer Engine's module takes arbitrary masks in its unfused path alone. So one module serves
training, rollout and scoring, and the sampler's log-probs are the trainer's to rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nrt_megatron.mcore import context

_ALIGNMENT = 8
"""Elements."""


class SDPACoreAttention(MegatronModule):
    """Drop-in for Megatron's `core_attention` modules (same constructor, same layouts).

    With an `attention_mask` (`additive`, [b, 1, sq, sk] in the queries' dtype) exactly that mask acts: it is made once
    for all layers, and autograd keeps one. Without one attention is causal within the sliding window of the config, if
    any: the queries are the last of the keys' positions.

    Under context parallelism queries, keys and values are those of this rank's two chunks (`context`), a mask is
    [b, 1, s / cp, s], and keys and values of the whole sequence are gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        assert not config.attention_dropout and not attention_dropout, "dropout would part sampler and trainer"
        group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()
        self.shared_by = group if group.size() > 1 else None
        """Ranks that share a sequence; None while each has whole ones."""
        self.softmax_scale = softmax_scale
        self.window = window_of(config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: None = None,
    ) -> Tensor:
        """query [sq, b, heads, d], key and value [sk, b, kv_heads, d] -> [sq, b, heads * d]."""
        assert attention_bias is None and packed_seq_params is None
        if self.shared_by is None:
            if torch.is_grad_enabled():
                value = value.contiguous()  # a view would keep query, key and value together alive for the backward
            return self._attend(query, key, value, attention_mask)
        own = torch.stack([key, value], dim=1)
        return context.with_whole(own, self.shared_by, lambda both: self._on_whole(query, both, attention_mask))

    def _on_whole(self, query: Tensor, key_value: Tensor, attention_mask: Tensor | None) -> Tensor:
        """This rank's queries on the sequence's keys and values [s, 2, b, kv_heads, d]."""
        key, value = key_value.unbind(1)
        if attention_mask is not None:
            return self._attend(query, key, value, attention_mask)
        chunk_size = query.size(0) // 2
        outputs = []
        for part, chunk in zip(query.split(chunk_size), context.chunks_of(self.shared_by), strict=True):
            first, end = chunk * chunk_size, (chunk + 1) * chunk_size
            seen = slice(max(0, first - self.window + 1) if self.window else 0, end)
            outputs.append(self._attend(part, key[seen], value[seen], None))
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Of what is on this rank: as `forward`."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        sq, sk = q.size(2), k.size(2)
        if attention_mask is None and self.window and sk > self.window:
            attention_mask = _within_window(sq, sk, self.window, q.dtype, q.device)
        heads, mask = q.shape, attention_mask
        assert mask is None or mask.dtype == q.dtype, "any other mask would be converted, and kept, in every layer"
        if mask is not None and q.is_cuda:
            q, k, v = ungrouped(q, k, v)
        if mask is None and 1 < sq < sk:
            mask = causal_lower_right(sq, sk)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and sq > 1,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.reshape(*heads[:3], -1).permute(2, 0, 1, 3).flatten(2)  # [sq, b, heads * d]


@contextlib.contextmanager
def whole_sequences(model: torch.nn.Module) -> Iterator[None]:
    """Inside, each context-parallel rank feeds whole sequences of its own."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, SDPACoreAttention):
                stack.callback(setattr, module, "shared_by", module.shared_by)
                module.shared_by = None
        yield


def ungrouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query attention as plain one, [b, heads, s, d]: torch's memory-efficient kernel for GPUs takes masks, but
    no groups, and the path it falls back to holds all scores in float32.

    A single query, with one mask for all heads, is as many queries of a key's head as it has heads in the group;
    where there are more, keys and values are repeated.
    """
    groups = query.size(1) // key.size(1)
    if groups == 1:
        return query, key, value
    if query.size(2) == 1:
        return query.reshape(query.size(0), key.size(1), groups, -1), key, value
    key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
    return query, key, value


class CachingSelfAttention(SelfAttention):
    """SelfAttention whose KV cache holds keys with RoPE already applied.

    Megatron's static cache keeps them bare and rotates all of them again, in every layer and for every token
    drawn: several passes over the cache where attention itself reads it once. Training is untouched.
    """

    def _adjust_key_value_for_inference(
        self, inference_context, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb, *args, **kwargs
    ):
        if inference_context is not None and rotary_pos_emb is not None:
            angles, _ = rotary_pos_emb  # of the tokens that are fed, [s, b or 1, 1, d]
            query, key = (
                apply_rotary_pos_emb(x, angles, config=self.config, cp_group=self.pg_collection.cp)
                for x in (query, key)
            )
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )


def window_of(config: TransformerConfig) -> int | None:
    """Positions that a token may look back on, itself counted; None: all. Megatron counts those to its left."""
    return config.window_size[0] + 1 if config.window_size else None


def hidden_columns(
    query_positions: Tensor,
    key_positions: Tensor,
    key_exists: Tensor | None = None,
    window: int | None = None,
    branches: Tensor | None = None,
    query_branches: Tensor | None = None,
) -> Tensor:
    """Mask of what a query may not see: bool [b, 1, sq, sk], True = hidden.

    query_positions [b, sq], key_positions [b, sk]: position of each token in its own sequence.
    key_exists bool [b, sk]: False for padding and stale cache columns. window: a key further back than
    this many positions (the query itself counted) is hidden, as in Mistral. branches int64 [b, sk] of a packed
    tree, and query_branches [b, sq]: a token sees its own branch and branch 0, the prompt.
    A query that may see nothing (padding) is given its first column, so that no softmax is 0/0; its output
    is never read.
    """
    # Positions are compared without their difference, which takes eight times the memory.
    hidden = key_positions[:, None, :] > query_positions[:, :, None]  # [b, sq, sk]
    if window is not None:
        hidden |= key_positions[:, None, :] <= (query_positions - window)[:, :, None]
    if key_exists is not None:
        hidden |= ~key_exists[:, None, :]
    if branches is not None and query_branches is not None:
        own, seen = query_branches[:, :, None], branches[:, None, :]
        foreign = seen != own
        foreign &= seen != 0
        hidden |= foreign
    blind = hidden.all(dim=-1)
    hidden[..., 0] &= ~blind
    return hidden[:, None]


def additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: `dtype` in the shape of `hidden` (bool [..., sk]), -inf where that is True.

    Rows begin at multiples of 8 elements: torch's memory-efficient kernel for GPUs takes such a mask as it is, and of
    any other a padded copy in each layer (`preprocess_mask` in aten/src/ATen/native/transformers/attention.cpp).
    """
    *rows, columns = hidden.shape
    padded = torch.zeros(*rows, -(-columns // _ALIGNMENT) * _ALIGNMENT, dtype=dtype, device=hidden.device)
    return padded[..., :columns].masked_fill_(hidden, -torch.inf)


@functools.lru_cache(maxsize=2)  # a context-parallel rank has two chunks
def _within_window(queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mask [1, 1, sq, sk] of the last `queries` of `keys` positions, kept for the next layer until `forget_windows`."""
    rows = torch.arange(keys, device=device)[None]
    return additive(hidden_columns(rows[:, keys - queries :], rows, window=window), dtype)


def forget_windows() -> None:
    """Frees the masks of sliding windows that layers share."""
    _within_window.cache_clear()
