"""Rows of a data file to prompts and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nrt_megatron.data.chat import Message, TemplateRefusal
from nrt_megatron.data.example import BadRow, Example
from nrt_megatron.data.marks import Piece, check_text
from nrt_megatron.data.tokenizer import Tokenizer
from nrt_megatron.recipe import ConfigError, Data

QUESTION = "{question}"
"""Where a text template takes the question. No other brace in it has a meaning."""


@dataclass(frozen=True)
class Fields:
    """The checked texts of a row: the conversation up to the answer, and the answer."""

    messages: tuple[Message, ...]
    question: str
    answer: str


class PromptTemplate:
    """Turns rows into pieces of text, by the tokenizer's chat template or by a text of the recipe.

    Raises:
        ConfigError: the template asked for does not exist, or a text has no place for the question.
    """

    def __init__(self, data: Data, tokenizer: Tokenizer) -> None:
        wanted = data.prompt_template or ("chat" if tokenizer.has_chat_template else QUESTION)
        if wanted == "chat" and not tokenizer.has_chat_template:
            raise ConfigError.at(
                "data.prompt_template",
                wanted,
                "the tokenizer has no chat template",
                "set a text with {question}, or put chat_template.jinja beside the tokenizer",
            )
        if wanted != "chat" and QUESTION not in wanted:
            raise ConfigError.at(
                "data.prompt_template", wanted, "no {question} in it", "put it where the question goes"
            )
        self._data = data
        self._tokenizer = tokenizer
        self._text = None if wanted == "chat" else wanted.split(QUESTION)

    def fields(self, row: Any) -> Fields:
        """Check a decoded row without tokenising it. Raises BadRow("malformed")."""
        if not isinstance(row, Mapping):
            raise _malformed(f"the row is {_kind(row)}, not an object with named fields")
        data = self._data
        if row.get(data.question_key) is not None and row.get(data.answer_key) is not None:
            question = _text(row[data.question_key], f"'{data.question_key}'")
            answer = _text(row[data.answer_key], f"'{data.answer_key}'")
            return Fields(({"role": "user", "content": question},), question, answer)
        if row.get(data.messages_key) is not None:
            fields = _conversation(row[data.messages_key], data.messages_key)
            if self._text is not None and [message["role"] for message in fields.messages] != ["user"]:
                raise _malformed("a text as data.prompt_template takes one user message, not a longer conversation")
            return fields
        missing = {name: getattr(data, name) for name in ("question_key", "answer_key")}
        missing = {name: key for name, key in missing.items() if row.get(key) is None}
        there = ", ".join(repr(name) for name, value in row.items() if value is not None) or "nothing"
        raise BadRow(
            "malformed",
            f"no {' and no '.join(map(repr, missing.values()))}, and no {data.messages_key!r}; "
            f"the row has {there:.200}",
            remedy=f"set {' and '.join(f'data.{name}' for name in missing)} to names that are there, correct the row",
        )

    def pieces(self, fields: Fields) -> list[Piece]:
        """The prompt as text, with the text that opens the trace. Raises BadRow("template")."""
        opening = Piece(self._tokenizer.trace_open, trusted=True)
        if self._text is None:
            try:
                return [*self._tokenizer.chat_template.pieces(fields.messages), opening]
            except TemplateRefusal as refusal:
                raise BadRow("template", str(refusal)) from None
        pieces = [Piece(self._text[0], trusted=True)]
        for text in self._text[1:]:
            pieces += [Piece(fields.question, trusted=False), Piece(text, trusted=True)]
        return [*pieces, opening]

    def example(self, row: int, fields: Fields, prompt: Sequence[int], answer: Sequence[int]) -> Example:
        """An example from the ids of `pieces(fields)` and of the answer's text.

        A text prompt gets the tokenizer's BOS, unless it begins with it; a chat template writes its own.
        """
        bos = self._tokenizer.bos_ids
        starts = self._text is None or tuple(prompt[: len(bos)]) == bos
        return Example(
            index=row,
            prompt_ids=(*prompt,) if starts else (*bos, *prompt),
            answer_ids=(*answer, self._tokenizer.eos_id),
            question=fields.question,
            answer=fields.answer,
        )


def _conversation(messages: Any, key: str) -> Fields:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise _malformed(f"{key!r} is {_kind(messages)}, not a list of messages")
    turns: list[Message] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise _malformed(f"message {number} is {_kind(message)}, not an object")
        role = message.get("role")
        # Roles are written into the prompt as template text.
        if not isinstance(role, str) or not role.isidentifier():
            raise _malformed(f"message {number} has the role {role!r}, not a word such as 'user'")
        # A system prompt may be empty, a question or an answer may not.
        content = _text(message.get("content"), f"the content of message {number}", may_be_empty=role == "system")
        turns.append({"role": role, "content": content})
    if turns[-1]["role"] != "assistant":
        raise _malformed(f"the last message is from {turns[-1]['role']!r}, not from 'assistant'")
    questions = [turn["content"] for turn in turns[:-1] if turn["role"] == "user"]
    if not questions:
        raise _malformed("no user message before the answer")
    return Fields(tuple(turns[:-1]), questions[-1], turns[-1]["content"])


def _text(value: Any, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _malformed(f"{name} is {_kind(value)}, not text")
    if not may_be_empty and not value.strip():
        raise _malformed(f"{name} is empty")
    try:
        check_text(value)
    except ValueError as error:
        raise _malformed(f"{name} {error}") from None
    return value


def _malformed(why: str) -> BadRow:
    return BadRow("malformed", why)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, (list, tuple)):
        return "an empty list" if not value else "a list"
    return "an object" if isinstance(value, Mapping) else f"{type(value).__name__} {value!r:.40}"
