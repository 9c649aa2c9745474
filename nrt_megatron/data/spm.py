"""Tokenizers of SentencePiece's `tokenizer.model`, run by the `sentencepiece` library itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import sentencepiece

from nrt_megatron.data.files import TokenizerFiles
from nrt_megatron.data.marks import MARK, is_plain_text, private_name

_MARKED = re.compile(f"{MARK}([0-9]+){MARK}")
_SPACE = "\u2581"
_DEFAULTS = {"bos_token": "bos_id", "eos_token": "eos_id", "unk_token": "unk_id", "pad_token": "pad_id"}


class SentencePieceBackend:
    """A `tokenizer.model`, read as transformers' `LlamaTokenizer` reads it.

    Text is cut at its control tokens and each stretch goes through SentencePiece by itself. With
    `legacy` (the default of that class, and what the Llama 2 code does) each stretch gets the dummy
    prefix space; with `legacy: false` in tokenizer_config.json only the first one does.

    Unlike transformers, every CONTROL piece of the model is a control token in trusted text, also those
    that tokenizer_config.json does not list, such as `[INST]` of Mistral.

    Raises:
        ConfigError: the file is no SentencePiece model (the one of Llama 3 is in tiktoken's format), or
            tokenizer_config.json adds tokens at ids that the model uses.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        try:
            model = str(files.path / "tokenizer.model")
            self._decoder = sentencepiece.SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError):
            raise files.error(
                "tokenizer.model is not a SentencePiece model", "name a directory with tokenizer.json instead"
            ) from None
        self._size: int = self._decoder.get_piece_size()
        self._legacy = bool(files.config.get("legacy", True))
        self._added: dict[str, int] = {}
        for index, token in files.added_tokens.items():
            if index >= self._size:
                self._added[token["content"]] = index
            elif self._decoder.id_to_piece(index) != token["content"]:
                piece = self._decoder.id_to_piece(index)
                raise files.error(
                    f"tokenizer_config.json has {token['content']!r} at id {index}, tokenizer.model {piece!r}",
                    "correct added_tokens_decoder in tokenizer_config.json",
                )
        self._known = {**self._pieces_matched_whole(), **self._added}
        self._protected: set[str] = set()

    @property
    def known(self) -> dict[str, int]:
        """Tokens matched as a whole in trusted text."""
        return self._known

    @property
    def control(self) -> dict[str, int]:
        """Tokens that text of a user must never become."""
        return {
            text: index
            for text, index in self._known.items()
            if text in self._protected or self._is_reserved(index) or not is_plain_text(text)
        }

    def add(self, text: str) -> tuple[int, bool]:
        """Make `text` a special token; returns its id, and whether the vocabulary grew."""
        index = self.id_of(text)
        grows = index is None
        if grows:
            index = self._added[text] = self.vocab_size
        self._known[text] = index
        self.protect(text)
        return index, grows

    def protect(self, text: str) -> None:
        """Treat a known token as a control token even when it reads like plain text."""
        assert text in self._known and "_encoders" not in self.__dict__
        self._protected.add(text)

    def prepare(self) -> None:
        """Build what encodes; from here on the vocabulary is fixed."""
        _ = self._encoders

    def id_of(self, text: str) -> Optional[int]:
        """Id of a token by its text in the vocabulary."""
        if text in self._added:
            return self._added[text]
        index = self._decoder.piece_to_id(text)
        return index if self._decoder.id_to_piece(index) == text else None

    @cached_property
    def roles(self) -> dict[str, str]:
        """Texts of the tokens with a role, such as `eos_token`: by the model, and above it by the JSON files."""
        ids = {name: getattr(self._decoder, getter)() for name, getter in _DEFAULTS.items()}
        own = {name: self._decoder.id_to_piece(index) for name, index in ids.items() if index >= 0}
        return {**own, **self.files.named_tokens}

    @property
    def vocab_size(self) -> int:
        """One above the highest id."""
        return max([self._size - 1, *self._added.values()]) + 1

    @property
    def adds_bos(self) -> bool:
        return bool(self.files.config.get("add_bos_token", True)) and "bos_token" in self.roles

    def encode_batch(self, masked: Sequence[str]) -> list[list[int]]:
        """Ids of texts whose control tokens go by private names; nothing is added, nothing is cut."""
        return [self._encode(text) for text in masked]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        parts, run = [], []
        for index in [*ids, -1]:
            if 0 <= index < self._size and index not in self._shown:
                run.append(index)
                continue
            parts.append(self._decoder.decode(run))
            run = []
            if index in self._shown and not skip_special_tokens:
                parts.append(self._shown[index])
        return "".join(parts)

    def save(self, target: Path) -> None:
        """Write a directory that transformers' AutoTokenizer loads."""
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
        tokens = {index: {"content": text, **flags} for text, index in self.control.items()}
        declared = {i: {**flags, **token} for i, token in self.files.added_tokens.items()}
        config: dict[str, Any] = {
            "tokenizer_class": "LlamaTokenizer",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.adds_bos,
            "add_eos_token": False,
            "legacy": self._legacy,
            **self.files.config,
            **self.roles,
            "added_tokens_decoder": {str(i): token for i, token in sorted({**tokens, **declared}.items())},
        }
        self.files.copy_to(target, config)

    @cached_property
    def _shown(self) -> dict[int, str]:
        """Texts of the ids that SentencePiece itself decodes to nothing."""
        return {index: text for text, index in self.control.items()}

    @cached_property
    def _proto(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self._decoder.serialized_model_proto())

    @cached_property
    def _encoders(self) -> tuple[sentencepiece.SentencePieceProcessor, sentencepiece.SentencePieceProcessor]:
        """Encoders with and without dummy prefix, in which no control piece can be spelled."""
        # SentencePiece never finds CONTROL pieces in text but always USER_DEFINED ones: rename them.
        edited = type(self._proto).FromString(self._proto.SerializeToString())
        for index in self.control.values():
            if index < self._size and not self._is_reserved(index):
                edited.pieces[index].piece = private_name(index)
        first = sentencepiece.SentencePieceProcessor(model_proto=edited.SerializeToString())
        edited.normalizer_spec.add_dummy_prefix = False
        return first, sentencepiece.SentencePieceProcessor(model_proto=edited.SerializeToString())

    def _encode(self, masked: str) -> list[int]:
        ids: list[int] = []
        for position, part in enumerate(_MARKED.split(masked)):  # text, id, text, id, ..., text
            if position % 2:
                ids.append(int(part))
            elif part:
                ids.extend(self._encode_stretch(part, first=position == 0))
        return ids

    def _encode_stretch(self, text: str, first: bool) -> list[int]:
        with_prefix, bare = self._encoders
        if self._legacy:
            return with_prefix.encode(text)
        text = text.replace(_SPACE, " ")
        if first and self.files.config.get("add_prefix_space", True):
            text = " " + text
        if not text.startswith(" "):
            return bare.encode(text)
        # SentencePiece may strip a leading space; behind other text it stays (as transformers does it).
        guard = "<unk>"
        return bare.encode(guard + text)[len(bare.encode(guard)) :]

    def _is_reserved(self, index: int) -> bool:
        """Whether SentencePiece itself never finds this id in text (or the id is not one of its own)."""
        return index >= self._size or self._decoder.is_control(index) or self._decoder.is_unknown(index)

    def _pieces_matched_whole(self) -> dict[str, int]:
        user_defined = self._proto.SentencePiece.USER_DEFINED
        return {
            piece.piece: index
            for index, piece in enumerate(self._proto.pieces)
            if self._is_reserved(index) or piece.type == user_defined
        }
