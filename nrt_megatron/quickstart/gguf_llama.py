"""A GGUF file of the Llama family to a Hugging Face directory: weights dequantised, tokenizer rebuilt.

transformers can load such files itself, but its tokenizer for this one prepends a BOS, takes `<|im_start|>` for
the end of sequence and eats spaces; and it holds the model twice in float32. So both are done here from the
fields of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

CONTROL = 3
"""`tokenizer.ggml.token_type` of a special token."""
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def _field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def hf_name(name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`. KeyError for a tensor not known here."""
    if name in _TOP:
        return _TOP[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_BLOCK[part]}.{kind}"


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from GGUF's order to Hugging Face's.

    weight: [heads * d, hidden]. GGUF interleaves the two halves of each head (rotating neighbours); Hugging Face
    rotates the first half against the second.
    """
    return weight.view(heads, -1, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def read_config(reader: GGUFReader) -> LlamaConfig:
    """The model's shape; embeddings are tied when the file has no output matrix."""
    if (architecture := _field(reader, "general.architecture")) != "llama":
        raise ValueError(f"GGUF architecture {architecture!r}, expected 'llama'")
    return LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rope_theta=_field(reader, "llama.rope.freq_base"),
        # Stored as float32: 9.99999974e-06 is 1e-05.
        rms_norm_eps=float(str(np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon")))),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def read_weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    """All tensors under their Hugging Face names, bfloat16."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        weights[hf_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    return weights


def read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Byte-level BPE from the file's tokens and merges, each digit a token, specials by token type."""
    kind = (_field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"GGUF tokenizer {kind}, expected ('gpt2', 'smollm')")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    specials = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        chat_template=_field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=_field(reader, "llama.context_length"),
    )


def convert(gguf_file: Path, directory: Path) -> PreTrainedTokenizerFast:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer; returns the tokenizer."""
    reader = GGUFReader(gguf_file)
    config = read_config(reader)
    directory.mkdir(parents=True)
    save_file(read_weights(reader, config), directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    tokenizer = read_tokenizer(reader)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    return tokenizer
