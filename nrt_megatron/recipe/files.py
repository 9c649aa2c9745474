"""The files a recipe names: there, readable, and of a shape that fits the layout. Opens config.json alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nrt_megatron.recipe.errors import ConfigError, MissingFileError
from nrt_megatron.recipe.layout import check_model_shape
from nrt_megatron.recipe.schema import Recipe


def check_files(recipe: Recipe) -> None:
    """Raises ConfigError, MissingFileError where something is absent, for the first file that cannot be used.

    Run it after `prepare`. Relative paths start in the working directory.
    """
    check_run_dir(recipe)
    model, tokenizer = recipe.policy.model, recipe.policy.tokenizer
    if model.path is not None:
        config, source = _read_config(Path(model.path))
        check_model_shape(recipe, config, str(source))
        _check_planned_shape(model.shape or {}, config, str(source))
    if tokenizer.path is not None:
        _check_directory("policy.tokenizer.path", tokenizer.path, "tokenizer.json or tokenizer.model")
    _check_file("data.train", recipe.data.train)
    if recipe.data.validation is not None:
        _check_file("data.validation", recipe.data.validation)


def check_run_dir(recipe: Recipe) -> None:
    """The run directory exists or can be made. Makes nothing. Raises ConfigError."""
    assert recipe.run_dir is not None, "load_recipe fills run_dir in"
    path = Path(recipe.run_dir)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ConfigError.at("run_dir", recipe.run_dir, f"{nearest} is a file", "set another directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError.at("run_dir", recipe.run_dir, f"{nearest} is not writable", "set a directory of your own")


def _check_directory(key: str, path: str, holds: str) -> None:
    if not Path(path).is_dir():
        problem = "not a directory" if Path(path).exists() else f"no such directory in {Path.cwd()}"
        raise MissingFileError.at(key, path, problem, f"give a local directory with {holds} (nothing is downloaded)")


def _read_config(directory: Path) -> tuple[dict[str, Any], Path]:
    """The Hugging Face config of a model directory, or the one inside the `meta.json` of our own checkpoints."""
    key = "policy.model.path"
    _check_directory(key, str(directory), "config.json and *.safetensors")
    found = [path for path in (directory / "config.json", directory / "meta.json") if path.exists()]
    if not found:
        remedy = "give a Hugging Face model directory, or a checkpoint of a run"
        raise MissingFileError.at(key, str(directory), "holds no config.json", remedy)
    try:
        config = json.loads(found[0].read_text(encoding="utf-8"))
        config = config["model"] if found[0].name == "meta.json" else config
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{found[0].name} is not what it should be ({error})"
        raise ConfigError.at(key, str(directory), problem, "restore the file") from None
    except OSError as error:
        raise ConfigError.at(key, str(directory), f"{found[0].name}: {error.strerror}", "make it readable") from None
    if not isinstance(config, dict):
        raise ConfigError.at(key, str(directory), f"{found[0].name} holds no JSON object", "restore the file")
    return config, found[0]


def _check_planned_shape(shape: dict[str, Any], config: dict[str, Any], source: str) -> None:
    """The model that is trained is the one that was planned; an added marker may have enlarged its vocabulary."""
    for key, planned in shape.items():
        found = config.get(key, planned)
        if found != planned and not (key == "vocab_size" and found > planned):
            problem = f"{source} has {found}"
            raise ConfigError.at(
                f"policy.model.shape.{key}", planned, problem, f"set {found}, or the model it describes"
            )


def _check_file(key: str, path: str) -> None:
    remedy = "give the path of a JSONL or Parquet file"
    if not Path(path).exists():
        raise MissingFileError.at(key, path, f"no such file in {Path.cwd()}", remedy)
    if Path(path).is_dir():
        raise ConfigError.at(key, path, "is a directory", remedy)
    if not os.access(path, os.R_OK):
        raise ConfigError.at(key, path, "is not readable", "change its permissions, or " + remedy)
