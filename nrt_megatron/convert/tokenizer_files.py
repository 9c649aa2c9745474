"""The tokenizer's way from a Hugging Face directory into a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from nrt_megatron.convert.vocabulary import NewTokens
from nrt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from nrt_megatron.recipe import ConfigError
from nrt_megatron.recipe import Tokenizer as TokenizerSettings

VOCABULARIES = ("tokenizer.json", "tokenizer.model")
FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)
"""Everything a tokenizer may consist of, and the stop ids that go with it."""


@dataclass(frozen=True)
class AddedToken:
    """A token of `--add-token`, as `meta.json` records it."""

    text: str
    id: int
    init: str
    """`eos`, `mean`, or the text whose tokens were averaged."""


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files unchanged. Raises ConfigError when there is no tokenizer."""
    if not any((source / name).is_file() for name in VOCABULARIES):
        raise ConfigError(f"{source}: holds no {' or '.join(VOCABULARIES)}; add one, or pass --no-tokenizer")
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def add_tokens(directory: Path, texts: Sequence[str], init: str) -> tuple[list[AddedToken], Optional[NewTokens]]:
    """Extends the tokenizer in `directory` in place by `texts`, as special tokens.

    Returns what was added and how their rows are made: `init` is `eos`, `mean` or a text (see
    `vocabulary`). Raises ConfigError for a text that already is a token or an empty `init`.
    """
    if not texts:
        return [], None
    base: Optional[Tokenizer] = None
    added = []
    for text in texts:
        settings = TokenizerSettings(marker=text, add_marker=True, require_single_token_marker=False)
        try:
            tokenizer = load_tokenizer(directory, settings)
        except ConfigError as error:
            raise ConfigError(f"--add-token {text!r}: cannot be added to this tokenizer.\n{error}") from None
        base = base or tokenizer
        if tokenizer.added_tokens != [text]:
            raise ConfigError(
                f"--add-token {text!r}: the tokenizer already has it as id {tokenizer.marker_ids[0]}; drop it"
            )
        added.append(AddedToken(text, tokenizer.marker_ids[0], init))
        tokenizer.save(directory)
    ids = tuple(token.id for token in added)
    return added, NewTokens(ids, base_size=min(ids), like=_like(base, init))


def _like(tokenizer: Tokenizer, init: str) -> Optional[tuple[int, ...]]:
    if init == "mean":
        return None
    if init == "eos":
        return (tokenizer.eos_id,)
    ids = tuple(tokenizer.encode_user(init))
    if not ids:
        raise ConfigError(f"--init-from {init!r}: has no tokens; use eos, mean or a text")
    return ids
