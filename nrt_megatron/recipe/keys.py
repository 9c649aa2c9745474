"""The tree of recipe keys, read from the schema: which keys exist, what each one wants."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from typing import Any

from nrt_megatron.recipe.errors import ConfigError
from nrt_megatron.recipe.schema import Recipe

_WANTED = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}


@functools.cache
def leaf_types(section: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """Dotted key to type annotation of every key that is not a section, in the schema's order."""
    leaves: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(section).items():
        key = f"{prefix}{name}"
        leaves.update(leaf_types(hint, f"{key}.") if dataclasses.is_dataclass(hint) else {key: hint})
    return leaves


def value_type(key: str) -> tuple[type, bool]:
    """The plain type of a key and whether it may be null: `(int, True)` for an Optional[int]."""
    hint = leaf_types()[key]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        assert len(inner) == 1, f"{key}: a key has one type"
        return typing.get_origin(inner[0]) or inner[0], True
    return typing.get_origin(hint) or hint, False


def wanted(key: str) -> str:
    """`an integer`, `a number or null`, ..."""
    kind, optional = value_type(key)
    return _WANTED[kind] + (" or null" if optional else "")


def check_keys(layer: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns `layer` without empty sections. Raises ConfigError on an unknown key or a value for a section."""
    return _check_section(layer, Recipe, "", source)


def _check_section(node: dict[str, Any], section: type, prefix: str, source: str) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    result = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise _unknown(key, value, list(hints), prefix, source)
        if dataclasses.is_dataclass(hints[name]):
            if value is None:  # `policy:` with every line below it commented out
                continue
            if not isinstance(value, dict):
                keys = ", ".join(typing.get_type_hints(hints[name]))
                raise ConfigError.at(key, value, f"{key} is a section ({source})", f"set keys inside it: {keys}")
            value = _check_section(value, hints[name], f"{key}.", source)
        result[name] = value
    return result


def _unknown(key: str, value: Any, siblings: list[str], prefix: str, source: str) -> ConfigError:
    """Near names of the same section first, then that name elsewhere, then names near it elsewhere."""
    name = key[len(prefix) :]
    near = [prefix + match for match in difflib.get_close_matches(name, siblings, n=3)]
    elsewhere = {leaf.rpartition(".")[2]: leaf for leaf in leaf_types()}
    near += [leaf for leaf in leaf_types() if leaf.rpartition(".")[2] == name]
    if not near:
        near = [elsewhere[match] for match in difflib.get_close_matches(name, elsewhere, n=2)]
    if near:
        remedy = "did you mean " + " or ".join(dict.fromkeys(near)) + "?"
    else:
        remedy = f"{prefix.rstrip('.') or 'a recipe'} has: {', '.join(siblings)}"
    return ConfigError.at(key, value, f"unknown key ({source})", remedy)
