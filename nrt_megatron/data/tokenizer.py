"""Text to token ids and back, with the end-of-trace marker. Loads without transformers and torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Protocol, Union

from nrt_megatron.data.chat import ChatTemplate, Message
from nrt_megatron.data.fast import FastBackend
from nrt_megatron.data.files import TokenizerFiles
from nrt_megatron.data.marks import Masker, Piece
from nrt_megatron.data.spm import SentencePieceBackend
from nrt_megatron.recipe import ConfigError
from nrt_megatron.recipe import Tokenizer as TokenizerSettings

END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
"""Special tokens that end an assistant's turn, where a vocabulary has them."""


_MARKER = "policy.tokenizer.marker"


class Backend(Protocol):
    """A tokenizer library with one tokenizer loaded; see fast.py and spm.py."""

    @property
    def known(self) -> dict[str, int]: ...
    @property
    def control(self) -> dict[str, int]: ...
    @property
    def roles(self) -> dict[str, str]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def adds_bos(self) -> bool: ...
    def add(self, text: str) -> tuple[int, bool]: ...
    def protect(self, text: str) -> None: ...
    def prepare(self) -> None: ...
    def id_of(self, text: str) -> Optional[int]: ...
    def encode_batch(self, masked: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def save(self, target: Path) -> None: ...


class Tokenizer:
    """A tokenizer with its marker, stop ids and chat template.

    Special tokens are off for text of users, wherever it stands: `</s>` or the marker written in a
    question become ordinary tokens. They are on for text of templates and of the recipe. A prompt made
    of both is still encoded in one call, so tokens at the seams are those of the whole text.

    Attributes:
        eos_id: ends an answer.
        stop_ids: every id that ends generation: EOS, those of generation_config.json, end-of-turn tokens.
        marker_ids: the end-of-trace marker; one id, or a fixed few.
        added_tokens: texts of the tokens added to the vocabulary: the marker, or none.
        trace_open: text the recipe appends to every prompt.
        bos_ids: what the tokenizer puts before plain text: BOS, or nothing.
        pad_id: for padding; EOS where the tokenizer has no pad token.
        vocab_size: one above the highest id, added tokens included.
        chat_template: None where the tokenizer has none.
    """

    def __init__(self, files: TokenizerFiles, backend: Backend, settings: TokenizerSettings) -> None:
        self._backend = backend
        self.added_tokens = _declare_marker(backend, settings)
        backend.prepare()
        self._masker = Masker(backend.control)
        self.vocab_size = backend.vocab_size
        self.eos_id = self._eos_id(files)
        self.stop_ids = self._stop_ids(files)
        self.trace_open = settings.trace_open
        self.marker_ids = self._marker_ids(settings)
        self.bos_ids = self._bos_ids()
        pad = backend.roles.get("pad_token")
        pad_id = backend.id_of(pad) if pad else None
        self.pad_id = self.eos_id if pad_id is None else pad_id
        template = files.chat_template
        self.chat_template = ChatTemplate(template, backend.roles) if template else None

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode_user(self, text: str) -> list[int]:
        """Ids of a user's text: special tokens off, no BOS, no EOS.

        Raises:
            ValueError: the text holds a lone surrogate, U+FDD0, U+FDD1, or a word that a closed
                vocabulary does not know.
        """
        return self.encode([Piece(text, trusted=False)])

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of one text made of trusted and untrusted pieces; no BOS, no EOS. Raises as `encode_user`."""
        return self.encode_batch([pieces])[0]

    def encode_batch(self, texts: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them one by one."""
        masked = [self._masker.join(pieces) for pieces in texts]
        try:
            return self._backend.encode_batch(masked)
        except Exception as error:  # The libraries raise bare Exceptions.
            reason = str(error)
            if "UNK" in reason:
                reason = "it has characters that the model's tokenizer does not know; train another model on such text"
            raise ValueError(f"cannot be encoded: {reason}") from None

    def apply_chat(self, messages: Sequence[Message], suffix: str = "") -> list[int]:
        """Ids of a conversation up to where the assistant writes next, then of `suffix` (trusted text).

        Raises:
            TemplateRefusal: the template does not take these messages, see ChatTemplate.
            ValueError: as `encode_user`.
        """
        assert self.chat_template is not None, "no chat template"
        return self.encode([*self.chat_template.pieces(messages), Piece(suffix, trusted=True)])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; special tokens are shown unless skipped."""
        return self._backend.decode(list(ids), skip_special_tokens)

    def save(self, target: Union[str, Path]) -> None:
        """Write a directory that this project and transformers' AutoTokenizer load, marker included."""
        self._backend.save(Path(target))

    def _eos_id(self, files: TokenizerFiles) -> int:
        eos = self._backend.roles.get("eos_token")
        if not eos:
            raise files.error("the tokenizer has no EOS", "set eos_token in its tokenizer_config.json")
        index = self._backend.id_of(eos)
        if index is None:
            raise files.error(f"eos_token {eos!r} is not in the vocabulary", "correct it in tokenizer_config.json")
        return index

    def _stop_ids(self, files: TokenizerFiles) -> tuple[int, ...]:
        turns = [self._backend.control[token] for token in END_OF_TURN if token in self._backend.control]
        return tuple(dict.fromkeys([self.eos_id, *files.generation_stop_ids, *turns]))

    def _bos_ids(self) -> tuple[int, ...]:
        bos = self._backend.roles.get("bos_token")
        index = self._backend.id_of(bos) if bos and self._backend.adds_bos else None
        return () if index is None else (index,)

    def _marker_ids(self, settings: TokenizerSettings) -> tuple[int, ...]:
        marker = settings.marker
        index = self._backend.id_of(marker)
        # A vocabulary of bytes may hold the same characters with another meaning.
        if index is not None and (marker in self._backend.known or self.decode([index]) == marker):
            ids: tuple[int, ...] = (index,)
        else:
            try:
                ids = tuple(self.encode([Piece(marker, trusted=True)]))
            except ValueError as error:
                remedy = "set policy.tokenizer.add_marker=true, or name a token of the tokenizer"
                raise ConfigError.at(_MARKER, marker, str(error), remedy) from None
        if len(ids) != 1 and settings.require_single_token_marker:
            raise ConfigError.at(
                _MARKER,
                marker,
                f"it is {len(ids)} tokens in this tokenizer and must be one",
                "set policy.tokenizer.add_marker=true, name a special token of the tokenizer, "
                "or set policy.tokenizer.require_single_token_marker=false",
            )
        stops = set(ids) & set(self.stop_ids)
        if stops:
            raise ConfigError.at(_MARKER, marker, f"token {min(stops)} of it ends generation", "choose another marker")
        return ids


def _declare_marker(backend: Backend, settings: TokenizerSettings) -> list[str]:
    """Make the marker a token that no user's text can spell, as far as it is to be one token."""
    marker = settings.marker
    if not marker.strip():
        raise ConfigError.at(_MARKER, marker, "it is empty", "set the text that ends a trace")
    if marker in backend.known:
        backend.protect(marker)
    elif settings.add_marker:
        return [marker] if backend.add(marker)[1] else []
    return []


def load_tokenizer(path: Union[str, Path], settings: TokenizerSettings) -> Tokenizer:
    """Load a tokenizer from a directory: `tokenizer.json` where there is one, else SentencePiece.

    Args:
        path: directory with `tokenizer.json` or `tokenizer.model`, and the JSON files beside them.
        settings: the recipe's `policy.tokenizer`; its `path` is not looked at.

    Raises:
        ConfigError: no tokenizer there, no EOS, or a marker that cannot be used.
    """
    files = TokenizerFiles(Path(path))
    backend: Any
    if files.has("tokenizer.json"):
        backend = FastBackend(files)
    elif files.has("tokenizer.model"):
        backend = SentencePieceBackend(files)
    else:
        raise files.error("holds neither tokenizer.json nor tokenizer.model", "name a tokenizer's directory")
    return Tokenizer(files, backend, settings)
    return Tokenizer(files, backend, settings)
