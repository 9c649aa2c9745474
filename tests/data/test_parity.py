"""The same ids as transformers, which the package itself does not need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, LlamaTokenizerFast

from nrt_megatron.data import Tokenizer, load_tokenizer
from nrt_megatron.data.marks import Piece
from nrt_megatron.recipe import Tokenizer as Settings
from tests.data import builders

PLAIN = [
    "The capital of Algeria is Algiers.",
    " leading and trailing ",
    "two  spaces\n\nlines\ttabs",
    "12+30=42, naïve café 日本語 🙂",
    "x",
    "",
    "  ",
    "\nnew",
]
MARKED = ["<s>The</s> fox", "a <s> b", "<s>[x] </s><s> y", "</s>", "say <s>", "<s>\nx"]

CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital?"}],
    [{"role": "user", "content": "  padded \n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello.\n"},
        {"role": "user", "content": "again {{ 7 * 7 }} {x}"},
    ],
]
WITH_SYSTEM = [[{"role": "system", "content": "Be brief. "}, *CONVERSATIONS[0]]]


def _theirs(path: Path, **kwargs: Any) -> Any:
    return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False, **kwargs)


def _compare_texts(ours: Tokenizer, theirs: Any) -> None:
    for text in PLAIN:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_user(text) == expected, text
        assert ours.encode([Piece(text, True)]) == expected, text
        assert ours.decode(expected) == theirs.decode(expected), text
    for text in MARKED:
        assert ours.encode([Piece(text, True)]) == theirs(text, add_special_tokens=False)["input_ids"], text


def _compare_chats(ours: Tokenizer, theirs: Any, conversations: list[Any]) -> None:
    for messages in conversations:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        assert ours.apply_chat(messages) == expected, messages


def _compare_bos(ours: Tokenizer, theirs: Any) -> None:
    assert [*ours.bos_ids, *ours.encode_user("fox")] == theirs("fox")["input_ids"]


FAST = {
    "byte_level": (builders.byte_level_bpe, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "byte_level_no_bos": (
        lambda: builders.byte_level_bpe(bos=False),
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "llama2": (builders.llama2_bpe, {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}),
    "llama2_no_bos": (builders.llama2_bpe, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}),
    "metaspace": (lambda: builders.llama2_bpe(prepend=False), {"tokenizer_class": "PreTrainedTokenizerFast"}),
}


@pytest.mark.parametrize("kind", FAST)
def test_tokenizer_json(tmp_path: Path, kind: str) -> None:
    make, config = FAST[kind]
    made = make()
    made.add_tokens([AddedToken("<tool>", rstrip=True, normalized=False), AddedToken("Algiers")])
    base = {"eos_token": "</s>", "bos_token": "<s>", "clean_up_tokenization_spaces": False}
    path = builders.write_fast(tmp_path / "base", made, {**base, **config})
    ours, theirs = load_tokenizer(path, Settings(add_marker=True)), _theirs(path)
    _compare_texts(ours, theirs)
    _compare_bos(ours, theirs)
    for text in ("a<tool>  b", "in Algiers now"):
        assert ours.encode([Piece(text, True)]) == theirs(text, add_special_tokens=False)["input_ids"], text

    # The marker, saved, is the same special token there; on the way the user's text holds it as text.
    ours.save(tmp_path / "saved")
    theirs = _theirs(tmp_path / "saved")
    assert theirs.convert_tokens_to_ids("<|response_start|>") == ours.marker_ids[0]
    assert theirs("fox<|response_start|>", add_special_tokens=False)["input_ids"][-1] == ours.marker_ids[0]
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.eos_id
    _compare_texts(ours, theirs)


@pytest.mark.parametrize("prefix", [True, False])
def test_prefix_space_of_tokenizer_config_wins(tmp_path: Path, prefix: bool) -> None:
    made = builders.byte_level_bpe()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    path = builders.write_fast(tmp_path, made, {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    if prefix:
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": True}))
    _compare_texts(load_tokenizer(path, Settings()), _theirs(path))


@pytest.mark.parametrize(
    ("template", "conversations"),
    [
        (builders.LLAMA3_TEMPLATE, CONVERSATIONS + WITH_SYSTEM),
        (builders.CHATML_TEMPLATE, CONVERSATIONS + WITH_SYSTEM),
        (builders.INST_TEMPLATE, CONVERSATIONS),
    ],
)
@pytest.mark.parametrize("kind", ["byte_level", "llama2", "metaspace"])
def test_chat_templates(tmp_path: Path, kind: str, template: str, conversations: list[Any]) -> None:
    make, config = FAST[kind]
    made = make()
    made.add_special_tokens(["<|start|>", "<|end|>", "<|eot_id|>"])
    base = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template}
    path = builders.write_fast(tmp_path / "base", made, {**base, **config})
    ours = load_tokenizer(path, Settings(add_marker=True))
    _compare_chats(ours, _theirs(path), conversations)
    ours.save(tmp_path / "saved")
    _compare_chats(ours, _theirs(tmp_path / "saved"), conversations)


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece(tmp_path: Path, model_type: str, legacy: bool | None) -> None:
    path = builders.sentencepiece_model(tmp_path, model_type)
    if legacy is not None:
        (path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    ours = load_tokenizer(path, Settings(add_marker=True))
    theirs = LlamaTokenizer(str(path / "tokenizer.model"), legacy=legacy)
    _compare_bos(ours, theirs)
    for text in [*PLAIN, *MARKED]:
        assert ours.encode([Piece(text, True)]) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        if legacy is not False:
            assert ours.decode(ours.encode_user(text)) == text


def test_sentencepiece_against_its_own_library_and_the_fast_conversion(tmp_path: Path) -> None:
    path = builders.sentencepiece_model(tmp_path / "base")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    ours = load_tokenizer(path, Settings(add_marker=True))
    slow = _theirs(path, use_fast=False)
    for text in PLAIN:
        assert ours.encode_user(text) == slow.sp_model.encode(text)
    fast = LlamaTokenizerFast.from_pretrained(str(path))
    for text in [*PLAIN, *MARKED]:
        if text.strip(" ") or not text:  # White space alone comes out differently within transformers itself.
            assert ours.encode([Piece(text, True)]) == fast(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.parametrize("use_fast", [True, False])
def test_sentencepiece_saved(tmp_path: Path, use_fast: bool) -> None:
    path = builders.sentencepiece_model(tmp_path / "base")
    (path / "chat_template.jinja").write_text(builders.INST_TEMPLATE)
    ours = load_tokenizer(path, Settings(add_marker=True))
    ours.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (path / "tokenizer.model").read_bytes()
    theirs = _theirs(tmp_path / "saved", use_fast=use_fast)
    marker = "<|response_start|>"
    assert (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.eos_id)
    assert theirs(f"a{marker}b", add_special_tokens=False)["input_ids"] == ours.encode([Piece(f"a{marker}b", True)])
    _compare_chats(ours, theirs, CONVERSATIONS)
    again = load_tokenizer(tmp_path / "saved", Settings())
    assert (again.marker_ids, again.added_tokens, again.vocab_size) == (ours.marker_ids, [], ours.vocab_size)


def test_tokens_of_a_tuned_sentencepiece_model(tmp_path: Path) -> None:
    path = builders.sentencepiece_model(tmp_path)
    size = load_tokenizer(path, Settings(add_marker=True)).marker_ids[0]
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": "<|im_end|>",
        "legacy": True,
        "added_tokens_decoder": {
            str(size): {"content": "<|im_end|>", "special": True, "normalized": False},
            str(size + 1): {"content": "<|im_start|>", "special": True, "normalized": False},
        },
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(path, Settings(add_marker=True)), _theirs(path, use_fast=False)
    text = "<|im_start|>user\nfox<|im_end|>\n"
    assert ours.encode([Piece(text, True)]) == theirs(text, add_special_tokens=False)["input_ids"]
    assert not {size, size + 1} & set(ours.encode_user(text))
    assert (ours.eos_id, ours.stop_ids, ours.marker_ids) == (size, (size,), (size + 2,))
