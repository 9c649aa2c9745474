"""JSONL and Parquet: the same rows, read at random, in flat memory."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nrt_megatron.data import Limits, QADataset, Tokenizer
from nrt_megatron.recipe import ConfigError, Data
from tests.data import builders

ROOMY = Limits(total=1000, trace=100, marker=1)
USER, REPLY = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


def test_odd_lines_of_jsonl(tmp_path: Path, words: Tokenizer) -> None:
    row = '{"question": "w1", "answer": "w2"}'
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n{row}\n\n{row}".encode())
    dataset = QADataset(str(path), Data(), words, ROOMY)
    assert len(dataset) == 3 and dataset.check().malformed == 0
    assert [dataset[row].answer for row in (2, 0, 1)] == ["w2"] * 3


def _parquet(path: Path, rows: list[dict[str, Any]], group: int) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def test_parquet_gives_what_jsonl_gives(tmp_path: Path, words: Tokenizer) -> None:
    rows = [{"question": f"w{i}", "answer": f"w{i + 1}", "other": i} for i in range(25)]
    lines = QADataset(str(builders.write_jsonl(tmp_path / "x.jsonl", rows)), Data(), words, ROOMY)
    table = QADataset(_parquet(tmp_path / "x.bin", rows, group=4), Data(), words, ROOMY)
    assert len(table) == 25 and table.check() == lines.check()
    order = [24, 0, 3, 4, 4, 17]
    assert table.get(order) == lines.get(order)
    assert table.fingerprint["rows"] == 25


def test_parquet_chat_and_bad_rows(tmp_path: Path, words: Tokenizer) -> None:
    rows = [{"messages": [USER, REPLY]}, {"messages": [USER, REPLY]}, {"messages": None}]
    path = _parquet(tmp_path / "chat.parquet", rows, group=2)
    dataset = QADataset(path, Data(), words, ROOMY)
    assert dataset[1].prompt_ids == (7, 5)
    with pytest.raises(ConfigError, match=r"row 2 \(row group 1\): no 'question' and no 'answer', and no 'messages'"):
        dataset.check()
    wrong = _parquet(tmp_path / "wrong.parquet", [{"prompt": "w1"}], group=2)
    with pytest.raises(ConfigError, match="no 'question'"):
        QADataset(wrong, Data(), words, ROOMY).check()


def test_parquet_keeps_a_bounded_number_of_row_groups(
    tmp_path: Path, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"w{i}", "answer": "w1"} for i in range(32)]
    dataset = QADataset(_parquet(tmp_path / "x.parquet", rows, group=4), Data(), words, ROOMY)
    monkeypatch.setattr("nrt_megatron.data.source.CACHED_BYTES", 1)
    assert [example.question for example in dataset.get(list(range(32)))] == [f"w{i}" for i in range(32)]
    assert len(dataset._source._cache) == 1  # type: ignore[attr-defined]


def test_a_large_file_is_checked_fast_and_in_flat_memory(tmp_path: Path, words: Tokenizer) -> None:
    line = b'{"question": "w1 w2 w3 %06d", "answer": "' + b"w1 " * 60 + b'"}'
    path = builders.write_jsonl(tmp_path / "large.jsonl", (line % row for row in range(100_000)))
    assert path.stat().st_size > 20 * 2**20
    started = time.process_time()
    dataset = QADataset(str(path), Data(), words, ROOMY)
    assert dataset.check().rows == 100_000
    assert time.process_time() - started < 2.0

    tracemalloc.start()
    dataset = QADataset(str(path), Data(), words, ROOMY)
    dataset[99_999]
    assert tracemalloc.get_traced_memory()[1] < 3 * 2**20  # 8 bytes a row, one buffer and one row
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    for _, row in zip(range(2_000), dataset._source.scan(), strict=False):
        assert isinstance(row, dict)
    assert tracemalloc.get_traced_memory()[1] - before < 2**20
    tracemalloc.stop()
