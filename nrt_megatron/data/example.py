"""What a row of a data file becomes: an example, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

REASONS = ("malformed", "template", "prompt_too_long", "answer_too_long")
"""Why a row gives no example. `template`: the chat template does not take its messages."""


class BadRow(ValueError):
    """A row that gives no example.

    Attributes:
        reason: one of REASONS.
        why: the same for a user, in words.
        tokens: length of what is too long.
        remedy: what to set, where a setting stands against the row.
    """

    def __init__(self, reason: str, why: str, tokens: Optional[int] = None, remedy: Optional[str] = None) -> None:
        assert reason in REASONS
        super().__init__(why)
        self.reason = reason
        self.why = why
        self.tokens = tokens
        self.remedy = remedy


@dataclass(frozen=True)
class Example:
    """A question with its reference answer, as token ids.

    Attributes:
        index: row in the file, from 0.
        prompt_ids: x, with BOS where the tokenizer puts one, and with the text that opens the trace.
        answer_ids: y*, the answer's text by itself and EOS (`Tokenizer.eos_id`).
        question: what the user said last.
        answer: the answer's text.
    """

    index: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    question: str
    answer: str
