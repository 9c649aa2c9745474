"""The one table of tensors: Hugging Face Llama/Mistral names and shapes against Megatron's.

It serves both directions, both of Megatron's layer specs and every tensor-parallel size. A Megatron
parameter is made from one or more Hugging Face matrices of equal width. Each is cut along its rows into
`blocks` equal parts, and the parts are laid block by block:

- `linear_qkv`: one block per query group, [q heads of the group | k | v], each head `kv_channels` rows;
- `linear_fc1`: one block per tensor rank, [gate | up];
- all others: one source, one block.

So a tensor rank's share of a parameter is a contiguous run of rows of each source, and nothing else has
to be read. No torch is needed to read the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

from nrt_megatron.convert.config import ModelShape

COLUMN, ROW = 0, 1
"""The axis that tensor parallelism splits: rows of a column-parallel layer, columns of a row-parallel one."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
LAYER_PREFIX = "decoder.layers."

HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"

IGNORED_HF_SUFFIX = ".rotary_emb.inv_freq"
"""A buffer that old Llama checkpoints carry; transformers computes it and ignores the stored one."""


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    name: str
    """Full Megatron name with the global layer number, local spec: `decoder.layers.3.mlp.linear_fc1.weight`."""
    te_name: str
    """The same under the Transformer Engine spec, which keeps norm weights in the linear layer they precede."""
    sources: tuple[Source, ...]
    tp_axis: Optional[int] = None
    """COLUMN, ROW, or None for a replicated tensor."""
    layer: Optional[int] = None
    """Global layer number from 0; None outside the layers."""
    groups: Optional[int] = None
    """Query groups of `linear_qkv`; None elsewhere."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter, over all tensor ranks, vocabulary not padded."""
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])

    @property
    def is_vocabulary(self) -> bool:
        """Rows are tokens: padded with zero rows in Megatron, and extended by added tokens."""
        return self.name in (EMBEDDING, OUTPUT)

    @property
    def key(self) -> str:
        """Key in a `torch_dist` checkpoint: always the Transformer Engine name, layers stacked under one key."""
        return self.te_name if self.layer is None else self.te_name.replace(f".{self.layer}.", ".", 1)

    def blocks(self, tp_size: int) -> int:
        """Parts each source is cut into over all tensor ranks. Asserts that they divide by the ranks."""
        blocks = self.groups or tp_size
        assert blocks % tp_size == 0, f"tensor parallel {tp_size} cuts a query group of {self.name}"
        return blocks


def layer_parameters(shape: ModelShape, layer: int) -> tuple[Parameter, ...]:
    """The parameters of one transformer layer, in Megatron's order."""
    hidden, ffn, head = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
    query, key_value = shape.num_attention_heads * head, shape.num_query_groups * head
    hf, mcore = f"model.layers.{layer}.", f"{LAYER_PREFIX}{layer}."

    def entry(name: str, *sources: tuple[str, tuple[int, ...]], te: str = "", **how: int) -> Parameter:
        pieces = tuple(Source(f"{hf}{source}.weight", size) for source, size in sources)
        return Parameter(f"{mcore}{name}", f"{mcore}{te or name}", pieces, layer=layer, **how)

    return (
        entry(
            "input_layernorm.weight",
            ("input_layernorm", (hidden,)),
            te="self_attention.linear_qkv.layer_norm_weight",
        ),
        entry("self_attention.linear_proj.weight", ("self_attn.o_proj", (hidden, query)), tp_axis=ROW),
        entry(
            "self_attention.linear_qkv.weight",
            ("self_attn.q_proj", (query, hidden)),
            ("self_attn.k_proj", (key_value, hidden)),
            ("self_attn.v_proj", (key_value, hidden)),
            tp_axis=COLUMN,
            groups=shape.num_query_groups,
        ),
        entry(
            "pre_mlp_layernorm.weight",
            ("post_attention_layernorm", (hidden,)),
            te="mlp.linear_fc1.layer_norm_weight",
        ),
        entry(
            "mlp.linear_fc1.weight",
            ("mlp.gate_proj", (ffn, hidden)),
            ("mlp.up_proj", (ffn, hidden)),
            tp_axis=COLUMN,
        ),
        entry("mlp.linear_fc2.weight", ("mlp.down_proj", (hidden, ffn)), tp_axis=ROW),
    )


def parameters(shape: ModelShape) -> Iterator[Parameter]:
    """Every parameter of the model once, in the order of a forward pass."""
    vocabulary = (shape.vocab_size, shape.hidden_size)
    yield Parameter(EMBEDDING, EMBEDDING, (Source(HF_EMBEDDING, vocabulary),), tp_axis=COLUMN)
    for layer in range(shape.num_layers):
        yield from layer_parameters(shape, layer)
    yield Parameter(FINAL_NORM, FINAL_NORM, (Source("model.norm.weight", (shape.hidden_size,)),))
    if not shape.tie_word_embeddings:
        yield Parameter(OUTPUT, OUTPUT, (Source(HF_OUTPUT, vocabulary),), tp_axis=COLUMN)


def by_name(shape: ModelShape) -> dict[str, Parameter]:
    """Parameter of every Megatron name, of either layer spec, with global layer numbers.

    With tied embeddings the last pipeline stage may hold its own copy of the embedding as output layer,
    so that name is listed too.
    """
    table = {}
    for parameter in parameters(shape):
        table[parameter.name] = table[parameter.te_name] = parameter
    table.setdefault(OUTPUT, table[EMBEDDING])
    return table


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint."""
    return {source.name: source.shape for parameter in parameters(shape) for source in parameter.sources}
