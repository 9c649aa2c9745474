"""Tokenizers of Hugging Face's `tokenizer.json`, run by the `tokenizers` library without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from tokenizers import Tokenizer as FastTokenizer

from nrt_megatron.data.files import LLAMA_CLASSES, TokenizerFiles, write_json
from nrt_megatron.data.marks import is_plain_text, private_name

_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


class FastBackend:
    """A `tokenizer.json`, with what transformers would change in it after loading.

    Two copies run: the file as it is decodes, and a copy in which every control token goes by its
    private name (see marks.py) encodes. Encoding a text with masked control tokens is therefore the
    same call, with the same rules around added tokens, as transformers makes. (It differs only for
    control tokens that are matched after normalisation, which some normalizers hide from transformers.)

    Raises:
        ConfigError: the file cannot be read, or declares tokens at other ids than its vocabulary has.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self._state = files.read_json("tokenizer.json")
        if not isinstance(self._state.get("model"), dict):
            raise files.error("tokenizer.json has no model", "restore the file")
        self._vocab = _vocabulary(self._state["model"])
        self._state["added_tokens"] = self._state.get("added_tokens") or []
        self._added: dict[str, int] = {token["content"]: token["id"] for token in self._state["added_tokens"]}
        self._protected: set[str] = set()
        self._declare_named_tokens()
        self._set_prefix_space()

    @property
    def known(self) -> dict[str, int]:
        """Tokens matched as a whole in trusted text, whatever the model would make of them."""
        return self._added

    @property
    def control(self) -> dict[str, int]:
        """Tokens that text of a user must never become."""
        named = {token["content"] for token in self._state["added_tokens"] if token["special"]} | self._protected
        return {text: index for text, index in self._added.items() if text in named or not is_plain_text(text)}

    def add(self, text: str) -> tuple[int, bool]:
        """Make `text` a special token; returns its id, and whether the vocabulary grew."""
        index, grows = self.id_of(text), self.id_of(text) is None
        index = self.vocab_size if grows else index
        self._declare({"id": index, "content": text, **_SPECIAL})
        return index, grows

    def protect(self, text: str) -> None:
        """Treat a known token as a control token even when it reads like plain text."""
        assert text in self._added and "_encoder" not in self.__dict__
        self._protected.add(text)

    def prepare(self) -> None:
        """Build what encodes and decodes; from here on the vocabulary is fixed."""
        # The copy that decodes comes first: its errors name the tokens as the user knows them.
        _ = self._decoder, self._encoder

    def id_of(self, text: str) -> Optional[int]:
        """Id of a token by its text in the vocabulary."""
        return self._added.get(text, self._vocab.get(text))

    @property
    def vocab_size(self) -> int:
        """One above the highest id."""
        return max(max(self._vocab.values(), default=-1), max(self._added.values(), default=-1)) + 1

    @property
    def roles(self) -> dict[str, str]:
        """Texts of the tokens with a role, such as `eos_token`."""
        return self.files.named_tokens

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS before plain text, as transformers would make it."""
        if self.files.config.get("tokenizer_class") in LLAMA_CLASSES:
            return bool(self.files.config.get("add_bos_token", True))
        bos = self.id_of(self.files.named("bos_token") or "")
        return bos is not None and self._decoder.encode("").ids[:1] == [bos]

    def encode_batch(self, masked: Sequence[str]) -> list[list[int]]:
        """Ids of texts whose control tokens go by private names; nothing is added, nothing is cut."""
        encodings = self._encoder.encode_batch_fast(masked, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._decoder.decode(ids, skip_special_tokens=skip_special_tokens)

    def save(self, target: Path) -> None:
        """Write a directory that transformers' AutoTokenizer loads."""
        config = dict(self.files.config)
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in sorted(self._state["added_tokens"], key=lambda token: token["id"])
        }
        self.files.copy_to(target, config)
        write_json(target / "tokenizer.json", self._state)

    @cached_property
    def _decoder(self) -> FastTokenizer:
        return self._build({**self._state, "truncation": None, "padding": None}, self._added)

    @cached_property
    def _encoder(self) -> FastTokenizer:
        names = {text: private_name(index) for text, index in self.control.items()}
        state = {
            **self._state,
            # A length limit left in the file by its author would cut texts silently.
            "truncation": None,
            "padding": None,
            "post_processor": None,
            "model": _rename(self._state["model"], names),
            "added_tokens": [_hide(token, names) for token in self._state["added_tokens"]],
        }
        return self._build(state, {names.get(text, text): index for text, index in self._added.items()})

    def _build(self, state: dict[str, Any], expected: dict[str, int]) -> FastTokenizer:
        try:
            built = FastTokenizer.from_str(json.dumps(state))
        except Exception as error:  # The library raises bare Exceptions.
            raise self.files.error(f"tokenizer.json does not load ({error})", "restore the file") from None
        for text, index in expected.items():
            if built.token_to_id(text) != index:
                raise self.files.error(
                    f"token {text!r} is declared with id {index} but gets {built.token_to_id(text)}",
                    "correct added_tokens in tokenizer.json",
                )
        return built

    def _declare(self, token: dict[str, Any]) -> None:
        assert token["content"] not in self._added and "_decoder" not in self.__dict__
        self._state["added_tokens"] = sorted([*self._state["added_tokens"], token], key=lambda other: other["id"])
        self._added[token["content"]] = token["id"]

    def _declare_named_tokens(self) -> None:
        """Special tokens that only the other JSON files declare, which transformers adds on loading."""
        special_tokens = self.files.special_tokens
        for index, token in self.files.added_tokens.items():
            if token["content"] not in self._added:
                special = token["content"] in special_tokens
                self._declare({**_SPECIAL, "special": special, **token, "id": index})
        for text in special_tokens:
            if text not in self._added and text in self._vocab:
                self._declare({"id": self._vocab[text], "content": text, **_SPECIAL})

    def _set_prefix_space(self) -> None:
        """`add_prefix_space` of tokenizer_config.json (default: off) wins, as in transformers."""
        config, pre_tokenizer = self.files.config, self._state.get("pre_tokenizer") or {}
        if "add_prefix_space" in pre_tokenizer and config.get("tokenizer_class") not in LLAMA_CLASSES:
            wanted = bool(config.get("add_prefix_space", False))
            self._state["pre_tokenizer"] = {**pre_tokenizer, "add_prefix_space": wanted}


def _hide(token: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """An added token under its private name, which must be found as it stands, whatever surrounds it."""
    if token["content"] not in names:
        return token
    return {**token, "content": names[token["content"]], "normalized": False, "single_word": False}


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab") or {}
    return {piece: index for index, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab


def _rename(model: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The model with tokens renamed, so that it cannot build them from plain text either.

    A Unigram or WordLevel model finds every token of its vocabulary in the text, and a BPE model does
    where merges lead to it.
    """
    vocab = model.get("vocab") or {}
    if isinstance(vocab, list):
        return {**model, "vocab": [[names.get(piece, piece), score] for piece, score in vocab]}
    renamed = {**model, "vocab": {names.get(piece, piece): index for piece, index in vocab.items()}}
    if model.get("unk_token") in names:
        renamed["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        renamed["merges"] = [
            [left, right]
            for left, right in pairs
            if not (left in names or right in names or left + right.removeprefix(prefix) in names)
        ]
    return renamed
