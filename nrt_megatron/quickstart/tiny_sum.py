"""The quickstart's task: the sum of twelve digits modulo ten, and the base model that goes with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from nrt_megatron.quickstart.prepared import is_prepared, make
from nrt_megatron.quickstart.rows import is_held_out, write_jsonl

TRACE_OPEN, MARKER, EOS, PAD = "<think>", "</think>", "<eos>", "<pad>"
LEAD_WORDS = ("so", "thus", "hence", "then")
"""One opens each answer, drawn at random: tokens that no trace can make more likely."""
STYLES = {"sums": "s", "copy": "a", "random": "n", "reversed": "e", "empty": ""}
"""The kinds of trace the base model sees. Each opens with a letter of its own, without which the base model
forgets the skill once running sums become rare."""


@dataclass(frozen=True)
class Settings:
    """Everything the prepared bytes depend on, library versions aside."""

    digits: int = 12
    largest_digit: int = 4
    hold_out_one_in: int = 8
    """Questions whose hash is 0 modulo this are seen neither by the base model nor in NRT training."""
    train_questions: int = 8000
    validation_questions: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    steps: int = 300
    sequences_per_step: int = 64
    lr: float = 2e-3
    """Peak of a cosine to 0."""
    sums_early: float = 0.7
    """Share of running-sum traces in the first `early` part of the steps."""
    sums_late: float = 0.1
    early: float = 0.6
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One question with its answer, `lead word = digit`."""

    question: str
    answer: str


def solve(question: str) -> int:
    """The sum of the digits modulo ten."""
    return sum(map(int, question)) % 10


def rows(settings: Settings, rng: Random, held_out: bool) -> Iterator[Row]:
    """An endless stream of rows, all of them held out or none of them."""
    while True:
        question = "".join(str(rng.randint(0, settings.largest_digit)) for _ in range(settings.digits))
        if is_held_out(question, settings.hold_out_one_in) == held_out:
            yield Row(question, f"{rng.choice(LEAD_WORDS)}={solve(question)}")


def distinct_rows(settings: Settings, rng: Random, held_out: bool, count: int) -> list[Row]:
    """`count` rows, no question twice."""
    found: dict[str, Row] = {}
    for row in rows(settings, rng, held_out):
        found.setdefault(row.question, row)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("rows() never ends")


def trace(question: str, style: str, rng: Random) -> str:
    """A trace of one of the STYLES, its letter first."""
    body = {
        "sums": lambda: "".join(str(s % 10) for s in accumulate(map(int, question))),
        "copy": lambda: question,
        "random": lambda: "".join(str(rng.randint(0, 9)) for _ in question),
        "reversed": lambda: question[::-1],
        "empty": lambda: "",
    }[style]()
    return STYLES[style] + body


def draw_style(settings: Settings, step: int, rng: Random) -> str:
    """Running sums with the share of this step's phase, else one of the other styles evenly."""
    sums = settings.sums_early if step < settings.early * settings.steps else settings.sums_late
    return "sums" if rng.random() < sums else rng.choice([s for s in STYLES if s != "sums"])


def build(directory: Path, settings: Settings) -> dict[str, Any]:
    """Writes base/, train.jsonl and validation.jsonl; returns what was measured on the base model."""
    from nrt_megatron.quickstart import tiny_model

    validation = distinct_rows(settings, Random(f"validation {settings.seed}"), True, settings.validation_questions)
    write_jsonl(directory / "validation.jsonl", map(asdict, validation))
    train = distinct_rows(settings, Random(f"train {settings.seed}"), False, settings.train_questions)
    write_jsonl(directory / "train.jsonl", map(asdict, train))
    return tiny_model.build(directory / "base", settings, validation)


def prepare(target: Path, settings: Settings) -> None:
    """Makes `target` with a progress bar, or says in one line that it is there already."""
    if is_prepared(target, asdict(settings)):
        print(f"prepare: {target} is there already")
        return
    start, measured = time.perf_counter(), {}

    def build_and_keep(directory: Path, _scratch: Path) -> dict[str, Any]:
        measured.update(build(directory, settings))
        return measured

    make(target, asdict(settings), build_and_keep)
    print(
        f"prepare: made {target} in {time.perf_counter() - start:.0f} s; given correct running sums the base model"
        f" answers {measured['accuracy_given_sums']:.0%} of {settings.validation_questions} held-out questions"
    )
