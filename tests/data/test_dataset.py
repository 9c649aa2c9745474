"""Files of rows: reading, templates, limits, and what is said about bad rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nrt_megatron.data import BadRow, Limits, QADataset, Tokenizer, load_tokenizer
from nrt_megatron.recipe import ConfigError, Data, Recipe
from nrt_megatron.recipe import Tokenizer as Settings
from tests.data import builders

ROOMY = Limits(total=1000, trace=100, marker=1)
MARKER = "<|response_start|>"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": builders.LLAMA3_TEMPLATE}
    path = builders.write_fast(tmp_path_factory.mktemp("chat"), builders.byte_level_bpe(), config)
    return load_tokenizer(path, Settings())


def _dataset(tmp_path: Path, rows: Any, tokenizer: Tokenizer, limits: Limits = ROOMY, **data: Any) -> QADataset:
    path = builders.write_jsonl(tmp_path / "data.jsonl", rows)
    return QADataset(str(path), Data(train=str(path), **data), tokenizer, limits)


def test_an_example(tmp_path: Path, words: Tokenizer) -> None:
    rows = [{"question": "w0 w1", "answer": "w2", "id": 7}]
    dataset = _dataset(tmp_path, rows, words, prompt_template="Q: {question} A: {question} {other}")
    example = dataset[0]
    unknown = 2
    assert example.prompt_ids == (3, 6, 7, 4, 6, 7, unknown, 5)  # Q: w0 w1 A: w0 w1 {other} think
    assert example.answer_ids == (8, words.eos_id)
    assert (example.index, example.question, example.answer) == (0, "w0 w1", "w2")
    assert dataset[-1] == example
    with pytest.raises(IndexError):
        dataset[1]


def test_control_tokens_of_the_template_and_of_the_user(tmp_path: Path, words: Tokenizer) -> None:
    rows = [{"question": MARKER, "answer": f"{MARKER} </s>"}]
    example = _dataset(tmp_path, rows, words, prompt_template=f"{MARKER} {{question}}")[0]
    assert example.prompt_ids == (1, 2, 5)
    assert example.answer_ids == (2, 2, 0)


def test_a_text_template_gets_bos_once(tmp_path: Path, chat: Tokenizer) -> None:
    rows = [{"question": "Hi", "answer": "Ho"}]
    plain = _dataset(tmp_path, rows, chat, prompt_template="{question}")[0]
    assert plain.prompt_ids == (0, *chat.encode_user("Hi"))
    own = _dataset(tmp_path, rows, chat, prompt_template="<s>{question}")[0]
    assert own.prompt_ids == plain.prompt_ids


def test_the_chat_template_is_the_default_where_there_is_one(tmp_path: Path, chat: Tokenizer) -> None:
    conversation = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    rows = [
        {"question": "Hi", "answer": "Ho"},
        {"messages": [*conversation, {"role": "assistant", "content": "Ho"}]},
        {"messages": [*conversation, {"role": "assistant", "content": "Ho"}] * 2},
    ]
    dataset = _dataset(tmp_path, rows, chat)
    assert dataset[0].prompt_ids == tuple(chat.apply_chat(conversation[1:]))
    assert dataset[1].prompt_ids == tuple(chat.apply_chat(conversation))
    assert dataset[1].answer_ids == dataset[0].answer_ids == (*chat.encode_user("Ho"), chat.eos_id)
    assert chat.decode(dataset[2].prompt_ids).count("Ho") == 1
    assert dataset[2].question == "Hi"


@pytest.mark.parametrize("template", ["chat", "no place"])
def test_templates_that_cannot_be(tmp_path: Path, words: Tokenizer, template: str) -> None:
    with pytest.raises(ConfigError, match=f"data.prompt_template = '{template}'"):
        _dataset(tmp_path, builders.qa(1), words, prompt_template=template)


USER, REPLY = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "not JSON: each row must stand on a line"),
        ('{"question": "a",', "not JSON: "),
        (b'{"question": "\xff"}', "not JSON: "),
        ("[1]", "the row is a list"),
        ("17", "the row is int 17"),
        ({"question": "w1"}, "no 'answer', and no 'messages'"),
        ({"q": 1}, "no 'question' and no 'answer', and no 'messages'"),
        ({"question": "w1", "answer": None}, "no 'answer'"),
        ({"question": "w1", "answer": ""}, "'answer' is empty"),
        ({"question": "w1", "answer": " \n"}, "'answer' is empty"),
        ({"question": "", "answer": "w1"}, "'question' is empty"),
        ({"question": "w1", "answer": 5}, "'answer' is int 5, not text"),
        ({"question": ["w1"], "answer": "w2"}, "'question' is a list, not text"),
        ('{"question": "w1", "answer": "\\ud800"}', "'answer' holds a lone surrogate"),
        ({"question": "w1 \ufdd0", "answer": "w2"}, "'question' holds the Unicode noncharacter"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "w1"}, "'messages' is str 'w1'"),
        ({"messages": ["w1"]}, "message 0 is str 'w1'"),
        ({"messages": [REPLY]}, "no user message"),
        ({"messages": [USER, REPLY, USER]}, "the last message is from 'user'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "the content of message 1 is empty"),
        ({"messages": [USER, {"role": "assistant", "content": [1]}]}, "the content of message 1 is a list"),
        ({"messages": [{"role": "a<|b|>", "content": "w1"}, REPLY]}, "message 0 has the role"),
        ({"messages": [USER, REPLY, USER, REPLY]}, "takes one user message"),
    ],
)
def test_malformed_rows(tmp_path: Path, words: Tokenizer, row: Any, why: str) -> None:
    rows = [*builders.qa(2), "  ", row, *builders.qa(1)]
    with pytest.raises(ConfigError) as error:
        _dataset(tmp_path, rows, words).check()
    message = str(error.value)
    assert message.startswith(f"data.train = '{tmp_path}/data.jsonl': row 2 (line 4): ") or "..." in message
    assert why in message and message.endswith(" or set data.on_bad_row=drop") and "\n" not in message
    assert ("; fix it or" in message) != ("to names that are there, correct the row or" in message)

    dataset = _dataset(tmp_path, rows, words, on_bad_row="drop")
    report = dataset.check()
    assert (report.rows, report.malformed) == (4, 1)
    with pytest.raises(BadRow) as bad:
        dataset[2]
    assert bad.value.reason == "malformed" and why in bad.value.why


def test_a_row_that_a_closed_vocabulary_does_not_know(tmp_path: Path) -> None:
    path = builders.write_fast(tmp_path, builders.word_level(["a", "b"]), {"eos_token": "</s>"})
    tokenizer = load_tokenizer(path, Settings())
    rows = [
        {"question": "a", "answer": "b"},
        {"question": "c", "answer": "b"},
        {"question": "b", "answer": "a"},
    ]
    found = _dataset(tmp_path, rows, tokenizer, on_bad_row="drop").get([0, 1, 2])
    assert [type(one).__name__ for one in found] == ["Example", "BadRow", "Example"]
    with pytest.raises(ConfigError, match=r"row 1 \(line 2\): cannot be encoded"):
        _dataset(tmp_path, rows, tokenizer).get([0, 1, 2])


def test_rows_that_a_chat_template_refuses_are_counted(tmp_path: Path) -> None:
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": builders.INST_TEMPLATE}
    path = builders.write_fast(tmp_path, builders.byte_level_bpe(), config)
    rows = [{"messages": [{"role": "system", "content": "s"}, USER, REPLY]}, {"messages": [USER, REPLY]}]
    kept, dropped = _dataset(tmp_path, rows, load_tokenizer(path, Settings())).take(5)
    assert [example.index for example in kept] == [1]
    assert dropped == Counter(template=1)
    with pytest.raises(ConfigError, match=r"no row can be used \(1 template\): .*must alternate"):
        _dataset(tmp_path, rows[:1], load_tokenizer(path, Settings())).check()


def test_limits_by_hand() -> None:
    limits = Limits(total=20, trace=8, marker=2)
    assert limits.room == 10
    limits.check(8, 2)
    limits.check(1, 9)
    with pytest.raises(BadRow, match="the prompt has 9 tokens, the limit is 8"):
        limits.check(9, 2)
    with pytest.raises(BadRow, match="the answer has 3 tokens, the limit is 2") as bad:
        limits.check(8, 3)
    assert (bad.value.reason, bad.value.tokens) == ("answer_too_long", 3)
    with pytest.raises(BadRow, match="prompt has 4 tokens, the limit is 3"):
        replace(limits, prompt=3).check(4, 2)
    with pytest.raises(BadRow, match="answer has 5 tokens, the limit is 4"):
        replace(limits, answer=4).check(1, 5)
    replace(limits, prompt=100, answer=100).check(8, 2)
    with pytest.raises(ConfigError, match="max_total_sequence_length = 12: 2 tokens are left"):
        replace(limits, total=12)


def test_limits_of_a_recipe(words: Tokenizer) -> None:
    recipe = Recipe()
    limits = Limits.of(recipe, words)
    assert (limits.total, limits.trace, limits.marker) == (8192, 2048, 1)
    sft = replace(recipe, nrt=replace(recipe.nrt, reward_scheme="sft"))
    assert Limits.of(sft, words).trace == 0


def test_rows_that_are_too_long_are_dropped_never_cut(tmp_path: Path, words: Tokenizer) -> None:
    rows = [
        {"question": "w0 w1 w2 w3 w4", "answer": "w1"},
        {"question": "w0", "answer": "w1 w2 w3 w4 w5 w6"},
        {"question": "w0", "answer": "w1"},
    ]
    dataset = _dataset(tmp_path, rows, words, Limits(total=12, trace=4, marker=1))
    kept, dropped = dataset.take(3)
    assert [example.index for example in kept] == [2]
    assert dropped == Counter(prompt_too_long=1, answer_too_long=1)
    dataset.check()


def test_every_prompt_too_long(tmp_path: Path, words: Tokenizer) -> None:
    rows = [{"question": "w1 " * (9 - row % 3), "answer": "w1"} for row in range(200)]
    limits = Limits(total=12, trace=4, marker=1)
    with pytest.raises(ConfigError) as error:
        _dataset(tmp_path, rows, words, limits).check()
    text = str(error.value)
    assert "no row can be used (200 prompt_too_long)" in text
    assert "at the shortest the prompt has 8 tokens, the limit is 5" in text
    assert "policy.max_total_sequence_length = 12 less an answer and a trace of 4 and a marker of 1" in text
    assert text.endswith("raise policy.max_total_sequence_length or lower policy.generation.max_new_tokens")
    with pytest.raises(ConfigError, match=r"\(data.max_prompt_tokens = 3\); raise data.max_prompt_tokens"):
        _dataset(tmp_path, rows, words, replace(limits, total=100, prompt=3)).check()
    with pytest.raises(ConfigError, match=r"\(data.max_answer_tokens = 1\); raise data.max_answer_tokens"):
        _dataset(tmp_path, rows, words, replace(limits, total=100, answer=1)).check()
    # One that fits, in the last row, is enough.
    _dataset(tmp_path, [*rows, {"question": "w1", "answer": "w1"}], words, limits).check()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "has no rows"),
        ("blank.jsonl", b"\n \n", "has no rows"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "compressed"),
        ("a.parquet", b"not parquet at all", "not a Parquet file"),
        ("b.parquet", b"PAR1 and then nothing", "not a Parquet file"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, words: Tokenizer, name: str, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=why) as error:
        QADataset(str(tmp_path / name), Data(), words, ROOMY, key="data.validation")
    assert str(error.value).startswith("data.validation = ")


def test_all_rows_malformed(tmp_path: Path, words: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="all 3 rows are malformed, the first: no 'question'"):
        _dataset(tmp_path, [{"x": 1}] * 3, words, on_bad_row="drop").check()
