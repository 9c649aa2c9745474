"""The order of questions: pure, resumable, and honest about what it passes over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nrt_megatron.data import BadRow, Example, Limits, PromptSampler, QADataset, load_tokenizer
from nrt_megatron.data.sampler import epoch_order
from nrt_megatron.recipe import ConfigError, Data
from nrt_megatron.recipe import Tokenizer as Settings
from tests.data import builders


class Rows:
    """Stands for a QADataset: rows whose number is in `bad` give no example."""

    path, key = "rows.jsonl", "data.train"

    def __init__(self, count: int, bad: dict[int, str] | None = None) -> None:
        self.count, self.bad = count, bad or {}
        self.fingerprint = {"bytes": count, "rows": count, "sha256": "0"}
        self.largest_request = 0

    def __len__(self) -> int:
        return self.count

    def get(self, rows: Sequence[int]) -> list[Any]:
        self.largest_request = max(self.largest_request, len(rows))
        return [
            BadRow(self.bad[row], "why") if row in self.bad else Example(row, (1,), (2, 0), "q", "a") for row in rows
        ]


def _sampler(count: int, bad: dict[int, str] | None = None, seed: int = 3, shuffle: bool = True) -> PromptSampler:
    return PromptSampler(Rows(count, bad), seed, shuffle)  # type: ignore[arg-type]


def _indices(sampler: PromptSampler, *sizes: int) -> list[int]:
    return [example.index for size in sizes for example in sampler.next(size)]


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    assert epoch_order(8, 1234, 0, True).tolist() == [1, 6, 4, 0, 3, 5, 2, 7]  # Pinned: it must never change.
    assert epoch_order(8, 1234, 1, True).tolist() != epoch_order(8, 1234, 0, True).tolist()
    assert epoch_order(8, 1235, 0, True).tolist() != epoch_order(8, 1234, 0, True).tolist()
    assert epoch_order(5, 1234, 1, False).tolist() == [0, 1, 2, 3, 4]


def test_an_epoch_holds_every_row_once_whatever_the_batch_size() -> None:
    whole = _indices(_sampler(10), 10)
    assert sorted(whole) == list(range(10))
    assert _indices(_sampler(10), 3, 4, 3) == whole
    assert _indices(_sampler(10), *[1] * 10) == whole
    first, second = whole, _indices(_sampler(10), 20)[10:]
    assert sorted(second) == list(range(10)) and second != first


def test_a_batch_reaches_over_the_end_of_an_epoch() -> None:
    sampler = _sampler(4, shuffle=False)
    assert _indices(sampler, 3) == [0, 1, 2]
    assert _indices(sampler, 3) == [3, 0, 1] and sampler.epoch == 1
    assert _indices(sampler, 11) == [2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0] and sampler.epoch == 4


def test_bad_rows_are_passed_over_and_counted() -> None:
    sampler = _sampler(6, {1: "prompt_too_long", 3: "answer_too_long", 4: "malformed"}, shuffle=False)
    assert _indices(sampler, 2) == [0, 2]
    assert sampler.dropped == {"malformed": 0, "template": 0, "prompt_too_long": 1, "answer_too_long": 0}
    assert _indices(sampler, 2, 2) == [5, 0, 2, 5]
    assert sampler.dropped == {"malformed": 2, "template": 0, "prompt_too_long": 2, "answer_too_long": 2}


def test_an_epoch_without_an_example_ends() -> None:
    sampler = _sampler(5, dict.fromkeys(range(5), "template"))
    with pytest.raises(ConfigError, match=r"a whole epoch gave no example \(5 template\)"):
        sampler.next(1)


@pytest.mark.parametrize("before", range(14))
def test_resume_anywhere(before: int) -> None:
    bad = {1: "prompt_too_long", 5: "malformed"}
    whole = _sampler(7, bad)
    _indices(whole, *[1] * before)
    state = json.loads(json.dumps(whole.state_dict()))
    rest = [_indices(whole, 3) for _ in range(4)]

    resumed = _sampler(7, bad)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert [_indices(resumed, 3) for _ in range(4)] == rest
    assert resumed.dropped == whole.dropped and resumed.state_dict() == whole.state_dict()


def test_the_guard_against_empty_epochs_survives_a_restart() -> None:
    bad = dict.fromkeys(range(1, 4), "malformed")
    first = _sampler(4, bad, shuffle=False)
    first.next(1)
    second = _sampler(4, bad, shuffle=False)
    second.load_state_dict(first.state_dict())
    assert _indices(second, 1) == [0]  # The rest of the epoch gives nothing, but the epoch did.


def test_a_million_rows() -> None:
    sampler = _sampler(1_000_000)
    assert len(set(_indices(sampler, 256))) == 256
    assert sampler._dataset.largest_request == 256  # type: ignore[attr-defined]


def test_states_of_another_run_are_refused(tmp_path: Path) -> None:
    made = builders.word_level([f"{kind}{row}" for kind in "qa" for row in range(4)])
    tokenizer = load_tokenizer(builders.write_fast(tmp_path, made, {"eos_token": "</s>"}), Settings())
    limits = Limits(total=100, trace=10, marker=1)

    def sampler(name: str, rows: list[dict[str, str]], seed: int = 1, shuffle: bool = True) -> PromptSampler:
        path = builders.write_jsonl(tmp_path / name, rows)
        return PromptSampler(QADataset(str(path), Data(), tokenizer, limits), seed, shuffle)

    rows = builders.qa(4)
    state = sampler("one.jsonl", rows).state_dict()
    sampler("moved.jsonl", rows).load_state_dict(state)
    changed = [*rows[:3], {"question": "q3", "answer": "a0"}]  # same size, same number of rows
    for other in (changed, rows[:3]):
        with pytest.raises(ConfigError, match=r"data.train = .*started on another file \(4 rows, \d+ bytes\)"):
            sampler("two.jsonl", other).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"nrt\.seed = 2: the run was started with 1"):
        sampler("one.jsonl", rows, seed=2).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"data\.shuffle = false: the run was started with true"):
        sampler("one.jsonl", rows, shuffle=False).load_state_dict(state)
