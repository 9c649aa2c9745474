"""The end-of-trace marker, EOS and the stop ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nrt_megatron.data import load_tokenizer
from nrt_megatron.data.marks import Piece
from nrt_megatron.recipe import ConfigError
from nrt_megatron.recipe import Tokenizer as Settings
from tests.data import builders


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A byte-level tokenizer that does not know the marker."""
    made = builders.byte_level_bpe(specials=["<s>", "</s>"])
    return builders.write_fast(tmp_path / "tok", made, {"eos_token": "</s>", "bos_token": "<s>"})


def test_an_existing_token(tmp_path: Path) -> None:
    made = builders.byte_level_bpe()
    tokenizer = load_tokenizer(builders.write_fast(tmp_path, made), Settings(add_marker=True))
    assert tokenizer.marker_ids == (made.token_to_id("<|response_start|>"),)
    assert tokenizer.added_tokens == []
    assert tokenizer.vocab_size == made.get_vocab_size()


def test_an_added_token_takes_the_next_id(plain: Path) -> None:
    before = load_tokenizer(plain, Settings(require_single_token_marker=False))
    after = load_tokenizer(plain, Settings(add_marker=True))
    assert after.marker_ids == (before.vocab_size,)
    assert after.added_tokens == ["<|response_start|>"]
    assert after.vocab_size == before.vocab_size + 1
    assert after.decode([*after.encode_user("ab"), *after.marker_ids]) == "ab<|response_start|>"
    assert after.decode(after.marker_ids, skip_special_tokens=True) == ""


def test_a_vocabulary_entry_becomes_a_special_token_without_growth(tmp_path: Path) -> None:
    made = builders.word_level(["=>", "a"])
    path = builders.write_fast(tmp_path, made, {"eos_token": "</s>"})
    assert load_tokenizer(path, Settings(marker="=>")).encode_user("a =>") == [3, 2]
    tokenizer = load_tokenizer(path, Settings(marker="=>", add_marker=True))
    assert (tokenizer.marker_ids, tokenizer.added_tokens, tokenizer.vocab_size) == ((2,), [], 4)
    with pytest.raises(ValueError, match="cannot be encoded"):  # It has no <unk>.
        tokenizer.encode_user("a =>")


def test_a_fixed_few_tokens(plain: Path) -> None:
    with pytest.raises(ConfigError, match=r"marker = '### Answer:': it is \d+ tokens.*add_marker=true") as error:
        load_tokenizer(plain, Settings(marker="### Answer:"))
    assert "\n" not in str(error.value)
    tokenizer = load_tokenizer(plain, Settings(marker="### Answer:", require_single_token_marker=False))
    assert len(tokenizer.marker_ids) > 1
    assert tokenizer.decode(tokenizer.marker_ids) == "### Answer:"


def test_bytes_in_the_vocabulary_are_not_taken_for_characters(plain: Path) -> None:
    # "é" is the vocabulary's name of the byte 0xE9, not of the letter, which is two bytes.
    tokenizer = load_tokenizer(plain, Settings(marker="é", require_single_token_marker=False))
    assert tokenizer.decode(tokenizer.marker_ids) == "é"


def test_special_tokens_work_in_a_marker_of_several(plain: Path) -> None:
    settings = Settings(marker="done<s>", require_single_token_marker=False)
    tokenizer = load_tokenizer(plain, settings)
    assert tokenizer.marker_ids[-1] == 0 and tokenizer.marker_ids[:-1] == tuple(tokenizer.encode_user("done"))


@pytest.mark.parametrize("marker", ["", " \n", "</s>"])
def test_markers_that_cannot_be(plain: Path, marker: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.tokenizer\.marker = "):
        load_tokenizer(plain, Settings(marker=marker, require_single_token_marker=False))


def test_no_eos(tmp_path: Path) -> None:
    made = builders.byte_level_bpe()
    with pytest.raises(ConfigError, match=r"no EOS; set eos_token in its tokenizer_config\.json"):
        load_tokenizer(builders.write_fast(tmp_path, made, {}), Settings())
    with pytest.raises(ConfigError, match="'<eos>' is not in the vocabulary"):
        load_tokenizer(builders.write_fast(tmp_path, made, {"eos_token": "<eos>"}), Settings())
    bare = builders.sentencepiece_model(tmp_path / "spm", eos_id=-1)
    with pytest.raises(ConfigError, match="no EOS"):
        load_tokenizer(bare, Settings(add_marker=True))


def test_eos_written_as_an_object_or_in_the_older_file(tmp_path: Path) -> None:
    made = builders.byte_level_bpe()
    path = builders.write_fast(tmp_path, made, {"eos_token": {"content": "</s>", "__type": "AddedToken"}})
    assert load_tokenizer(path, Settings()).eos_id == 1
    (path / "tokenizer_config.json").unlink()
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|eot_id|>", "pad_token": "<s>"}))
    tokenizer = load_tokenizer(path, Settings())
    assert (tokenizer.eos_id, tokenizer.pad_id) == (made.token_to_id("<|eot_id|>"), 0)


def test_stop_ids(tmp_path: Path) -> None:
    made = builders.byte_level_bpe()
    path = builders.write_fast(tmp_path, made)
    turn = made.token_to_id("<|eot_id|>")
    assert load_tokenizer(path, Settings()).stop_ids == (1, turn)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    assert load_tokenizer(path, Settings()).stop_ids == (1, 9, turn)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_tokenizer(path, Settings()).stop_ids == (1, 7, turn)
    with pytest.raises(ConfigError, match="ends generation"):
        load_tokenizer(path, Settings(marker="<|eot_id|>"))


def test_end_of_turn_text_that_is_no_special_token_does_not_stop(tmp_path: Path) -> None:
    made = builders.word_level(["<|im_end|>", "a"])
    path = builders.write_fast(tmp_path, made, {"eos_token": "</s>"})
    assert load_tokenizer(path, Settings()).stop_ids == (0,)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": "{}"}, "has no model"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}}}'}, "no EOS|does not load"),
        ({"tokenizer.model": "bytes of tiktoken 1\n"}, "not a SentencePiece model"),
    ],
)
def test_broken_directories(tmp_path: Path, files: dict[str, str], why: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=why):
        load_tokenizer(tmp_path, Settings())


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        load_tokenizer(tmp_path / "none", Settings())


def test_tokens_declared_only_in_tokenizer_config(tmp_path: Path) -> None:
    made = builders.byte_level_bpe()
    size = made.get_vocab_size()
    config = {
        "eos_token": "<|new|>",
        "added_tokens_decoder": {str(size): {"content": "<|new|>", "special": True}},
    }
    path = builders.write_fast(tmp_path, made, config)
    tokenizer = load_tokenizer(path, Settings())
    assert tokenizer.eos_id == size and tokenizer.vocab_size == size + 1
    assert tokenizer.encode([Piece("a<|new|>", True)])[-1] == size
    assert size not in tokenizer.encode_user("a<|new|>")
    config["added_tokens_decoder"] = {str(size + 5): {"content": "<|new|>", "special": True}}
    path = builders.write_fast(tmp_path, made, config)
    with pytest.raises(ConfigError, match="declared with id"):
        load_tokenizer(path, Settings())


def test_trace_open_is_kept(plain: Path) -> None:
    assert load_tokenizer(plain, Settings(add_marker=True, trace_open="<think>")).trace_open == "<think>"


def test_saved_and_loaded_again(plain: Path, tmp_path: Path) -> None:
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    (plain / "chat_template.jinja").write_text(builders.CHATML_TEMPLATE)
    first = load_tokenizer(plain, Settings(add_marker=True))
    first.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved", Settings())
    assert again.marker_ids == first.marker_ids and again.added_tokens == []
    assert (again.vocab_size, again.stop_ids, again.bos_ids) == (
        first.vocab_size,
        first.stop_ids,
        first.bos_ids,
    )
    messages = [{"role": "user", "content": "Hi <|response_start|>"}]
    assert again.apply_chat(messages) == first.apply_chat(messages)


def test_saved_over_itself(plain: Path) -> None:
    (plain / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (plain / "chat_template.jinja").write_text(builders.CHATML_TEMPLATE)
    first = load_tokenizer(plain, Settings(add_marker=True))
    first.save(plain)
    again = load_tokenizer(plain, Settings())
    assert again.marker_ids == first.marker_ids and again.has_chat_template
