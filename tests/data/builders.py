"""Tokenizers made by hand or trained on a few sentences, and data files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "What is the capital of Algeria? The capital is Algiers.",
    "user and assistant talk; the system says im_end and s and bos.",
    "Numbers: 12 + 30 = 42. Naïve café, 日本語, emoji 🙂!",
    "def f(x):\n    return x  <  3 | x > 4  # code",
] * 4

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{%- for message in messages %}\n"
    "    {{- '<|start|>' + message.role + '\n' + message.content + '<|eot_id|>\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|start|>assistant\n' }}\n{%- endif %}"
)
INST_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant!') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def write_fast(path: Path, tokenizer: Tokenizer, config: Optional[dict[str, Any]] = None, **state: Any) -> Path:
    """A directory with tokenizer.json (fields in `state` replaced) and tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer.to_str()), **state}))
    if config is None:
        config = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


SPECIALS = ["<s>", "</s>", "<unk>", "<|start|>", "<|end|>", "<|eot_id|>", "<|response_start|>"]


def byte_level_bpe(specials: Iterable[str] = SPECIALS, bos: bool = True) -> Tokenizer:
    """As Llama 3: byte-level BPE, BOS by post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


def llama2_bpe(prepend: bool = True) -> Tokenizer:
    """As Llama 2's tokenizer.json: spaces become U+2581, byte fallback; `prepend`, or Metaspace "first"."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *pieces], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


def word_level(words: Iterable[str], specials: Iterable[str] = ("</s>", "<|response_start|>")) -> Tokenizer:
    """One id a word, words split at white space."""
    vocab = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>" if "<unk>" in vocab else None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def unigram() -> Tokenizer:
    """A Unigram model with control tokens in its vocabulary at score 0, as converters leave them."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<|response_start|>", 0.0), ("▁", -2.0)]
    pieces += [(char, -3.0) for char in sorted(set("".join(CORPUS)) - {" "} | set("</>_|"))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>", "<|response_start|>"])
    return tokenizer


def sentencepiece_model(path: Path, model_type: str = "bpe", **options: Any) -> Path:
    """A directory with a tokenizer.model as Llama 2's: byte fallback, no normalisation, dummy prefix."""
    path.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.99,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, model_type=model_type, **settings
    )
    (path / "tokenizer.model").write_bytes(out.getvalue())
    return path


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One line a row; a str or bytes is written as it is."""
    with path.open("wb") as file:
        for row in rows:
            line = row if isinstance(row, (str, bytes)) else json.dumps(row, ensure_ascii=False)
            file.write((line.encode() if isinstance(line, str) else line) + b"\n")
    return path


def qa(count: int) -> list[dict[str, str]]:
    return [{"question": f"q{index}", "answer": f"a{index}"} for index in range(count)]
