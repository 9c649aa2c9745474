"""The one error type for mistakes of the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_LONGEST_VALUE = 100  # characters of a value shown in a message


class ConfigError(ValueError):
    """The recipe, or a file it names, cannot be used as it is; the message says what to set instead.

    Shown as it is on stderr, without a traceback, with exit code 2: one or two lines that name the key, its
    value and the remedy. `ConfigError.at` puts these three in order.
    """

    @classmethod
    def at(cls, key: str, value: Any, problem: str, remedy: str) -> ConfigError:
        """`KEY = VALUE: PROBLEM; REMEDY`, the value shortened to 100 characters."""
        return cls(f"{key} = {show(value)}: {problem}; {remedy}")


class MissingFileError(ConfigError):
    """A file or directory that the recipe names is not there."""


class SeveralErrors(ConfigError):
    """Mistakes that have nothing to do with each other: the first on a line, the others on a second one."""

    def __init__(self, errors: list[ConfigError]) -> None:
        self.errors = [
            one for error in errors for one in (error.errors if isinstance(error, SeveralErrors) else [error])
        ]
        first, *others = map(str, self.errors)
        super().__init__(f"{first}\nalso: {' | '.join(others)}")


def check_all(*checks: Callable[[], None]) -> None:
    """Runs checks that do not need each other, and raises what they raise: one ConfigError, or SeveralErrors."""
    errors = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            errors.append(error)
    if len(errors) > 1:
        raise SeveralErrors(errors)
    if errors:
        raise errors[0]


def show(value: Any) -> str:
    """A value on one line, as a recipe would write it and shortened to 100 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
