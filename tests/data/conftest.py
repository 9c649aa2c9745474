"""Tokenizers that several files of tests share."""

from __future__ import annotations

import pytest

from nrt_megatron.data import Tokenizer, load_tokenizer
from nrt_megatron.recipe import Tokenizer as Settings
from tests.data import builders


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A word is a token: </s> 0, the marker 1, then <unk>, Q:, A:, think, w0, w1, ..."""
    made = builders.word_level(["<unk>", "Q:", "A:", "think", *(f"w{i}" for i in range(40))])
    path = builders.write_fast(tmp_path_factory.mktemp("words"), made, {"eos_token": "</s>"})
    return load_tokenizer(path, Settings(trace_open=" think"))
