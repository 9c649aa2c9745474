"""From YAML files and the command line to a `Recipe`, and back to YAML.

Precedence, lowest first: schema, preset, `defaults:` chain, recipe, overlays, command line. Values may
interpolate other keys (`${nrt.seed}`) and the environment (`${oc.env:SCRATCH}`): a recipe for a cluster needs
its scratch directory. The resolved recipe holds the results. YAML tags construct nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from nrt_megatron.recipe.checks import check
from nrt_megatron.recipe.errors import ConfigError, MissingFileError, check_all
from nrt_megatron.recipe.keys import check_keys, leaf_types, value_type, wanted
from nrt_megatron.recipe.legacy import translate
from nrt_megatron.recipe.presets import PRESETS
from nrt_megatron.recipe.schema import Recipe

Layer = tuple[dict[str, Any], str]
"""Nested keys as written, and where they come from (for messages)."""

_MANDATORY = "data.train"
"""The one key without a default. Where it is not set, what else is wrong is said with it."""


def print_notice(line: str) -> None:
    """Shows a notice the way the command line does: one line on stderr."""
    print(f"nrt: {line}", file=sys.stderr, flush=True)


def load_recipe(
    path: str | Path,
    overlays: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    notify: Callable[[str], None] = print_notice,
) -> Recipe:
    """Reads a recipe with its `defaults:` chain, overlay files and `key=value` overrides.

    `run_dir` defaults to `runs/<recipe name>`. `notify` receives one line for every old spelling. Types and
    keys are checked here, values by `check` and `check_files`. Raises ConfigError.
    """
    layers = [layer for file in (path, *overlays) for layer in _read_chain(Path(file), ())]
    layers.append((_parse_overrides(overrides), "command line"))
    layers = [(check_keys(translate(layer, source, notify), source), source) for layer, source in layers]
    return _resolve(layers, default_run_dir=f"runs/{Path(path).stem}")


def from_yaml(text: str, source: str = "recipe.yaml") -> Recipe:
    """Reads what `to_yaml` wrote. Raises ConfigError."""
    return _resolve([(check_keys(_parse(text, source), source), source)])


def to_yaml(recipe: Recipe) -> str:
    """Every key with its resolved value, as a recipe that reads back as the same `Recipe`."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(dataclasses.asdict(recipe))))


def _escape(node: Any) -> Any:
    """A literal `${` of a resolved value must not become an interpolation when it is read again."""
    if isinstance(node, dict):
        return {key: _escape(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escape(value) for value in node]
    if isinstance(node, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", node)
    return node


def _read_chain(path: Path, parents: tuple[Path, ...]) -> list[Layer]:
    """The file's layers, parents first. `defaults:` is a path or a list of paths, relative to the file."""
    resolved = path.resolve()
    if resolved in parents:
        chain = " -> ".join(parent.name for parent in (*parents[parents.index(resolved) :], resolved))
        raise ConfigError.at("defaults", parents[-1].name, f"files inherit in a circle: {chain}", "remove one of them")
    layer = _parse(_read_text(path, parents), str(path))
    defaults = layer.pop("defaults", None)
    names = [defaults] if isinstance(defaults, str) else defaults or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        remedy = "set a path or a list of paths, relative to the file"
        raise ConfigError.at("defaults", defaults, f"not a path ({path})", remedy)
    inherited = [file for name in names for file in _read_chain(path.parent / name, (*parents, resolved))]
    return [*inherited, (layer, str(path))]


def _read_text(path: Path, parents: tuple[Path, ...]) -> str:
    what = f"defaults = {path}, named in {parents[-1].name}" if parents else f"recipe {path}"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        candidates = [file.name for file in path.parent.glob("*.yaml")]
        near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, candidates)]
        hint = f"did you mean {' or '.join(near)}?" if near else "give the path of a YAML file"
        raise MissingFileError(f"{what}: no such file; {hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{what}: cannot be read ({error.strerror}); give the path of a YAML file") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        parsed = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except YAMLError as error:
        raise ConfigError(f"{source}: {_yaml_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise _config_error(error, source) from None
    except OSError:  # OmegaConf's answer to a file that holds one number
        parsed = None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{source}: holds no mapping; write keys such as `nrt:` at the top level")
    return parsed


def _yaml_problem(error: YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return f"not valid YAML ({str(error).splitlines()[0]}); save it as plain text"
    return f"line {mark.line + 1}: not valid YAML, {problem}; correct that line"


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            hint = "give overlay files with --config" if text.endswith((".yaml", ".yml")) else "write key=value"
            raise ConfigError(f"{text!r}: not an override; {hint}, e.g. nrt.seed=7")
        try:
            parsed = OmegaConf.merge(OmegaConf.create(layer), OmegaConf.from_dotlist([text]))
        except YAMLError as error:
            problem = f"not a YAML value ({getattr(error, 'problem', None) or 'unreadable'})"
            raise ConfigError.at(key, value, problem, f"quote it inside: '{key}=\"...\"'") from None
        except OmegaConfBaseException as error:
            raise _config_error(error, "command line") from None
        layer = OmegaConf.to_container(parsed, resolve=False)
    return layer


def _resolve(layers: list[Layer], default_run_dir: str | None = None) -> Recipe:
    merged = _merge([*_preset_layer(layers), *layers])
    try:
        if merged.run_dir is None:
            merged.run_dir = default_run_dir
        recipe = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        missing = _config_error(error, "resolved recipe")
        if error.full_key != _MANDATORY:
            raise missing from None
        filled = ({"data": {"train": "unset"}}, "resolved recipe")
        check_all(partial(_raise, missing), partial(check, _resolve([*layers, filled], default_run_dir)))
    except OmegaConfBaseException as error:
        raise _config_error(error, "resolved recipe") from None
    assert isinstance(recipe, Recipe)
    return recipe


def _raise(error: ConfigError) -> NoReturn:
    raise error


def _preset_layer(layers: list[Layer]) -> list[Layer]:
    """What the preset named in the highest layer sets; it lies below all of them."""
    named = [layer["nrt"]["preset"] for layer, _ in layers if "preset" in layer.get("nrt", {})]
    if not named or named[-1] is None:
        return []
    if not isinstance(named[-1], str) or named[-1] not in PRESETS:
        raise ConfigError.at("nrt.preset", named[-1], "unknown preset", f"choose {', '.join(PRESETS)} or null")
    return [({"nrt": PRESETS[named[-1]]}, f"preset {named[-1]}")]


def _merge(layers: list[Layer]) -> Any:
    """Layer by layer on the schema, so that a wrong type can be traced to its file."""
    merged = OmegaConf.structured(Recipe)
    OmegaConf.set_readonly(merged, None)  # frozen dataclasses make read-only nodes
    for layer, source in layers:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(layer))
        except OmegaConfBaseException as error:
            raise _config_error(error, source) from None
    return merged


def _config_error(error: OmegaConfBaseException, source: str) -> ConfigError:
    """OmegaConf's several lines as one, with the key, its value and the type it wants."""
    key = error.full_key or "recipe"
    if isinstance(error, MissingMandatoryValue):
        value = "FILE" if key == _MANDATORY else wanted(key).replace(" ", "_").upper()
        return ConfigError.at(key, "???", "must be set", f"add {key}={value}")
    problem = str(error).splitlines()[0]
    if isinstance(error, ValidationError) and key in leaf_types():
        return ConfigError.at(
            key, error.value, f"wrong type ({source})", f"set {wanted(key)}{_quoted(key, error.value)}"
        )
    return ConfigError(f"{key}: {problem} ({source}); correct the value, or escape a literal ${{ as \\${{")


def _quoted(key: str, value: Any) -> str:
    """How to write a text that YAML reads as something else: `[END]` is a list to it, `{x}` a mapping."""
    if value_type(key)[0] is not str or not OmegaConf.is_config(value):
        return ""
    name = key.rpartition(".")[2]
    return f', quoted where it begins with a bracket: \'{key}="[...]"\', or {name}: "[...]" in YAML'
