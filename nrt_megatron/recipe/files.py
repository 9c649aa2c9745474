"""The files a recipe names: there, readable, and of a shape that fits the layout. Opens config.json alone."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from nrt_megatron.recipe.errors import ConfigError, MissingFileError, check_all
from nrt_megatron.recipe.rollout_layout import check_model_shape
from nrt_megatron.recipe.schema import Recipe

MADE_BY = {
    "tiny-sum": "nrt train recipes/nrt-tiny-1n0g-cpu.yaml makes it",
    "smollm2": "make smollm2, or tools/fetch_smollm2.py, fetches it",
}
"""Directories below `runs` that come from this project -> what makes them."""


def hint(path: str) -> str:
    """What makes a path of this project that is not there, as the end of a remedy; empty for a path of the user."""
    parts = Path(path).parts
    return f"; {MADE_BY[parts[1]]}" if len(parts) > 1 and parts[0] == "runs" and parts[1] in MADE_BY else ""


def check_files(recipe: Recipe, to_be_made: Path | None = None) -> None:
    """Raises ConfigError, MissingFileError where something is absent, for every file that cannot be used.

    Run it after `prepare`, or before it with the directory that it will make: what lies in there may be absent.
    Relative paths start in the working directory.
    """
    data, tokenizer = recipe.data, recipe.policy.tokenizer

    def there(path: str | None) -> bool:
        return path is not None and (to_be_made is None or to_be_made.exists() or to_be_made not in Path(path).parents)

    check_all(
        partial(check_run_dir, recipe),
        *([partial(_check_model, recipe)] if there(recipe.policy.model.path) else []),
        *([partial(_check_tokenizer, str(tokenizer.path))] if there(tokenizer.path) else []),
        *([partial(_check_file, "data.train", data.train)] if there(data.train) else []),
        *([partial(_check_file, "data.validation", str(data.validation))] if there(data.validation) else []),
    )


def _check_model(recipe: Recipe) -> None:
    model = recipe.policy.model
    config, source = _read_config(Path(str(model.path)))
    check_model_shape(recipe, config, str(source))
    _check_planned_shape(model.shape or {}, config, str(source))


def _check_tokenizer(path: str) -> None:
    _check_directory("policy.tokenizer.path", path, "tokenizer.json or tokenizer.model")


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
        remedy = f"give a local directory with {holds} (nothing is downloaded){hint(path)}"
        raise MissingFileError.at(key, path, problem, remedy)


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
        raise MissingFileError.at(key, path, f"no such file in {Path.cwd()}", remedy + hint(path))
    if Path(path).is_dir():
        raise ConfigError.at(key, path, "is a directory", remedy)
    if not os.access(path, os.R_OK):
        raise ConfigError.at(key, path, "is not readable", "change its permissions, or " + remedy)
