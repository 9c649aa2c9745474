"""What the JSON files beside a tokenizer say: named tokens, chat template, stop ids."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from nrt_megatron.recipe import ConfigError, MissingFileError

KEY = "policy.tokenizer.path"
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_COPIED = ("special_tokens_map.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's directory in the layout of Hugging Face.

    Raises:
        ConfigError: the directory is missing, or a JSON file in it cannot be read.
    """

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise MissingFileError.at(
                KEY, str(self.path), "no such directory", "name one with tokenizer.json or tokenizer.model"
            )

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def error(self, problem: str, remedy: str) -> ConfigError:
        """A mistake in the directory, in words."""
        return ConfigError.at(KEY, str(self.path), problem, remedy)

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; {} where there is no such file."""
        if not self.has(name):
            return {}
        try:
            value = json.loads((self.path / name).read_bytes())
        except ValueError as error:
            raise self.error(f"{name} is not JSON ({error})", "restore the file") from None
        if not isinstance(value, dict):
            raise self.error(f"{name} holds no JSON object", "restore the file")
        return value

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, over the older special_tokens_map.json."""
        config = self.read_json("tokenizer_config.json")
        return {
            **self.read_json("special_tokens_map.json"),
            **{k: v for k, v in config.items() if v is not None},
        }

    def named(self, name: str) -> Optional[str]:
        """Text of a token with a role, such as `eos_token`; None where it is not set."""
        return _content(self.config.get(name))

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """Texts of all tokens with a role, as chat templates see them."""
        found = {name: self.named(name) for name in _NAMED}
        extra = self.config.get("extra_special_tokens")
        if isinstance(extra, dict):
            found.update({name: _content(token) for name, token in extra.items()})
        return {name: token for name, token in found.items() if token}

    @cached_property
    def special_tokens(self) -> list[str]:
        """Texts of all tokens the files call special, without repetition."""
        extra = self.config.get("additional_special_tokens") or []
        return list(dict.fromkeys([*self.named_tokens.values(), *filter(None, map(_content, extra))]))

    @cached_property
    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Tokens outside the base vocabulary that the files declare: id -> flags with `content`."""
        declared = self.config.get("added_tokens_decoder")
        if declared:
            return {int(index): dict(declared[index]) for index in sorted(declared, key=int)}
        older = self.read_json("added_tokens.json")
        return {older[text]: {"content": text} for text in sorted(older, key=older.__getitem__)}

    @cached_property
    def chat_template(self) -> Optional[str]:
        """The default chat template; chat_template.jinja wins over tokenizer_config.json, as in transformers."""
        if self.has("chat_template.jinja"):
            return (self.path / "chat_template.jinja").read_text("utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        if isinstance(template, dict):
            template = template.get("default")
        return template

    @cached_property
    def generation_stop_ids(self) -> list[int]:
        """`eos_token_id` of generation_config.json: an id, a list, or none."""
        ids = self.read_json("generation_config.json").get("eos_token_id")
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def copy_to(self, target: Path, config: dict[str, Any]) -> None:
        """Write the directory again at `target`, with `config` as its tokenizer_config.json."""
        chat_template = self.chat_template
        target.mkdir(parents=True, exist_ok=True)
        for name in _COPIED:
            if self.has(name) and target.resolve() != self.path.resolve():
                shutil.copyfile(self.path / name, target / name)
        config = {key: value for key, value in config.items() if key != "chat_template"}
        if chat_template is not None:
            (target / "chat_template.jinja").write_text(chat_template, "utf-8")
        write_json(target / "tokenizer_config.json", config)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _content(token: Any) -> Optional[str]:
    """A token is its text, or an object with the text under `content`."""
    return token.get("content") if isinstance(token, dict) else token
