"""Question-answer files as examples in token ids, one row or one batch at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Union

from nrt_megatron.data.example import BadRow, Example
from nrt_megatron.data.limits import Limits
from nrt_megatron.data.marks import Piece
from nrt_megatron.data.source import fingerprint, open_source
from nrt_megatron.data.template import Fields, PromptTemplate
from nrt_megatron.data.tokenizer import Tokenizer
from nrt_megatron.recipe import ConfigError, Data

_CHUNK = 64
"""Rows that are tokenised together while looking for one that fits."""


@dataclass(frozen=True)
class CheckReport:
    """What `QADataset.check` found: rows of the file, and how many of them are malformed."""

    rows: int
    malformed: int


class QADataset:
    """A JSONL or Parquet file of question-answer pairs or chat messages.

    Rows are read and tokenised when asked for. `len(dataset)` counts all rows, bad ones too.

    Args:
        path: the file.
        data: the recipe's `data` section.
        tokenizer: see tokenizer.py.
        limits: what has room.
        key: the recipe's key of the file, for messages.

    Raises:
        ConfigError: the file or the template cannot be used at all; rows are left to `check`.
    """

    def __init__(self, path: str, data: Data, tokenizer: Tokenizer, limits: Limits, key: str = "data.train") -> None:
        self.path = path
        self.limits = limits
        self.strict = data.on_bad_row == "error"
        self.key = key
        self._tokenizer = tokenizer
        self._template = PromptTemplate(data, tokenizer)
        self._source = open_source(path, key, (data.question_key, data.answer_key, data.messages_key))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Example:
        """The example of a row. Raises BadRow where it gives none."""
        (found,) = self.get([range(len(self))[row]])
        if isinstance(found, BadRow):
            raise found
        return found

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identifies the file's content: JSON types only."""
        return fingerprint(self.path, len(self))

    def get(self, rows: Sequence[int]) -> list[Union[Example, BadRow]]:
        """The examples of rows, tokenised together; a BadRow in the place of a row that gives none.

        Raises:
            ConfigError: a row is malformed and `data.on_bad_row` is `error`.
        """
        found = self._examples(rows, self._source.read(rows))
        for row, example in zip(rows, found, strict=True):
            if self.strict and isinstance(example, BadRow) and example.reason == "malformed":
                raise self._malformed(row, example)
        return found

    def take(self, count: int) -> tuple[list[Example], Counter[str]]:
        """The first `count` examples in the order of the file, and the rows passed over, by reason."""
        kept: list[Example] = []
        dropped: Counter[str] = Counter()
        rows = iter(range(len(self)))
        while len(kept) < count and (chunk := list(islice(rows, count - len(kept)))):
            for example in self.get(chunk):
                if isinstance(example, BadRow):
                    dropped[example.reason] += 1
                else:
                    kept.append(example)
        return kept, dropped

    def check(self) -> CheckReport:
        """Parse every row, and tokenise until one fits the limits.

        Raises:
            ConfigError: the first malformed row (with `data.on_bad_row` at `error`), or no usable row.
        """
        malformed, first = 0, None
        for row, found in enumerate(self._parsed(self._source.scan())):
            if isinstance(found, BadRow):
                malformed += 1
                first = first or (row, found)
                if self.strict:
                    raise self._malformed(row, found)
        if first and malformed == len(self):
            raise ConfigError.at(
                self.key,
                self.path,
                f"all {malformed} rows are malformed, the first: {first[1].why}",
                "correct the file, or data.question_key, data.answer_key and data.messages_key",
            )
        self._require_one_that_fits()
        return CheckReport(rows=len(self), malformed=malformed)

    def _parsed(self, rows: Iterable[Any]) -> Iterator[Union[Fields, BadRow]]:
        for row in rows:
            try:
                yield row if isinstance(row, BadRow) else self._template.fields(row)
            except BadRow as bad:
                yield bad

    def _examples(self, rows: Sequence[int], decoded: Sequence[Any]) -> list[Union[Example, BadRow]]:
        found: list[Union[Example, BadRow, None]] = [None] * len(rows)
        todo: list[tuple[int, Fields, list[Piece]]] = []
        for at, fields in enumerate(self._parsed(decoded)):
            if isinstance(fields, BadRow):
                found[at] = fields
                continue
            try:
                todo.append((at, fields, self._template.pieces(fields)))
            except BadRow as bad:
                found[at] = bad
        texts = [pieces for _, _, pieces in todo]
        texts += [[Piece(fields.answer, trusted=False)] for _, fields, _ in todo]
        encoded = self._encode(texts)
        prompts, answers = encoded[: len(todo)], encoded[len(todo) :]
        for (at, fields, _), prompt, answer in zip(todo, prompts, answers, strict=True):
            found[at] = self._finish(rows[at], fields, prompt, answer)
        assert None not in found
        return found

    def _encode(self, texts: list[list[Piece]]) -> list[Union[list[int], BadRow]]:
        """Ids of each text. One that a closed vocabulary does not know spoils only itself."""
        try:
            return self._tokenizer.encode_batch(texts)
        except ValueError as error:
            if len(texts) == 1:
                return [BadRow("malformed", str(error))]
            return [self._encode([text])[0] for text in texts]

    def _finish(
        self, row: int, fields: Fields, prompt: Union[list[int], BadRow], answer: Union[list[int], BadRow]
    ) -> Union[Example, BadRow]:
        for ids in (prompt, answer):
            if isinstance(ids, BadRow):
                return ids
        example = self._template.example(row, fields, prompt, answer)
        try:
            self.limits.check(len(example.prompt_ids), len(example.answer_ids))
        except BadRow as bad:
            return bad
        return example

    def _require_one_that_fits(self) -> None:
        dropped: Counter[str] = Counter()
        shortest: dict[str, BadRow] = {}
        for start in range(0, len(self), _CHUNK):
            for found in self.get(range(start, min(start + _CHUNK, len(self)))):
                if isinstance(found, Example):
                    return
                dropped[found.reason] += 1
                known = shortest.get(found.reason, found)
                shortest[found.reason] = min(known, found, key=lambda bad: bad.tokens or 0)
        raise self._none_fits(dropped, shortest)

    def _none_fits(self, dropped: Counter[str], shortest: dict[str, BadRow]) -> ConfigError:
        reason, _ = dropped.most_common(1)[0]
        bad = shortest[reason]
        counts = ", ".join(f"{count} {name}" for name, count in dropped.items())
        why = bad.why if bad.tokens is None else f"at the shortest {bad.why}"
        remedy = bad.remedy or "correct the rows or data.prompt_template"
        return ConfigError.at(self.key, self.path, f"no row can be used ({counts}): {why}", remedy)

    def _malformed(self, row: int, bad: BadRow) -> ConfigError:
        problem = f"row {row} ({self._source.place(row)}): {bad.why}"
        remedy = f"{bad.remedy or 'fix it'} or set data.on_bad_row=drop"
        return ConfigError.at(self.key, self.path, problem, remedy)
