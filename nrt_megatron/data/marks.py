"""Private names for control tokens, so that no text of a user can spell one.

A tokenizer knows control tokens (`</s>`, `<|im_end|>`, the end-of-trace marker) by their text, and
would read that text as the token wherever it stands. Here each control token goes by a private name
instead, built on a Unicode noncharacter that is reserved for internal use. Templates are translated
to these names, text of users is not, and both are then encoded together in one call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

MARK = "\ufdd0"
"""Encloses the private name of a control token."""

SLOT = "\ufdd1"
"""Encloses the number of a message whose content a chat template is to leave room for."""


class Piece(NamedTuple):
    """A stretch of text. Only trusted text, which comes from templates and recipes, has control tokens."""

    text: str
    trusted: bool


def private_name(token_id: int) -> str:
    """The name under which a control token is known to the encoders."""
    return f"{MARK}{token_id}{MARK}"


def is_plain_text(token: str) -> bool:
    """Whether an added token is words or white space, which user text may contain, rather than a control."""
    return all(char.isalnum() or char.isspace() for char in token.replace("\u2581", " "))


class Masker:
    """Translates pieces of text to one string in which control tokens go by their private names.

    Args:
        control: text of each control token, and its id.
    """

    def __init__(self, control: Mapping[str, int]) -> None:
        # Longest first: the leftmost-longest match, as the `tokenizers` library does it.
        longest_first = sorted(control, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first))) if control else None

        @lru_cache(maxsize=4096)  # The same few template texts come with every row.
        def translate(text: str) -> str:
            return pattern.sub(lambda match: private_name(control[match[0]]), text) if pattern else text

        self._translate = translate

    def join(self, pieces: Iterable[Piece]) -> str:
        """One text for the encoder.

        Raises:
            ValueError: a text holds one of the two noncharacters, or a lone surrogate.
        """
        parts = []
        for text, trusted in pieces:
            check_text(text)
            parts.append(self._translate(text) if trusted else text)
        return "".join(parts)


def check_text(text: str) -> None:
    """Raise ValueError for text that cannot be encoded safely."""
    if MARK in text or SLOT in text:
        raise ValueError("holds the Unicode noncharacter U+FDD0 or U+FDD1")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not valid Unicode") from None
