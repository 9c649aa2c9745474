"""Tiny random models of each family, made by transformers, and tokenizers to go with them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

VOCAB = 331
"""Odd, so that every tensor-parallel size pads."""

_TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VARIANTS: dict[str, dict] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "llama3": {"model_type": "llama", "rope_theta": 500000.0},
    "llama3.1": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama3.2": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "head_dim": 16,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": 24, "rope_theta": 10000.0},
}


def save_model(
    directory: Path,
    variant: str,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    seed: int = 0,
    **changes,
) -> Path:
    """A model whose every weight matters for its logits, saved by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**_TINY, **VARIANTS[variant], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


def save_tokenizer(directory: Path, template: str | None = None) -> Path:
    """A byte-level BPE tokenizer of about 300 tokens with `<s>` and `</s>`, in the files transformers reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from nrt_megatron.convert.sample_text import SAMPLE_TEXT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([SAMPLE_TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


def save_sentencepiece(directory: Path) -> Path:
    """`tokenizer.model` alone, as Llama 2 came."""
    import sentencepiece

    from nrt_megatron.convert.sample_text import SAMPLE_TEXT

    directory.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE_TEXT.splitlines()),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=380,
        character_coverage=1.0,
        byte_fallback=True,
        model_type="bpe",
        normalization_rule_name="identity",  # as in Llama 2: newlines stay
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    return directory


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor in a directory's safetensors files."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
