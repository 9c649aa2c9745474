"""Chat templates, rendered so that it stays known which text is the template's and which the user's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Optional

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nrt_megatron.data.marks import SLOT, Piece
from nrt_megatron.recipe import ConfigError

Message = Mapping[str, str]
"""`role` and `content`."""

_SLOTS = re.compile(f"{SLOT}([0-9]+){SLOT}")
_TRIMS = (str, str.strip, str.lstrip, str.rstrip)
_TODAY = "26 Jul 2024"


class TemplateRefusal(ValueError):
    """A chat template that does not take these messages."""


class ChatTemplate:
    """A tokenizer's chat template, with the names and filters that transformers gives it.

    Each conversation is rendered twice, with its contents and with a numbered slot in place of each. The
    slots tell user text from template text, and the rendering with the contents proves that the
    template put them there unchanged. Contents that a template trims are trimmed here too.

    One name differs from transformers: `strftime_now` is not the clock but a fixed day (the one Llama
    3's template falls back to), since a prompt must not change when a run resumes.

    Args:
        source: the Jinja template.
        names: texts of tokens such as `bos_token`, which templates refer to.

    Raises:
        ConfigError: the template does not compile.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError.at(
                "data.prompt_template",
                "chat",
                f"the tokenizer's chat template is broken ({error})",
                "restore it",
            ) from None
        self._layout = lru_cache(maxsize=1024)(self._render_slots)

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The prompt up to where the assistant writes next: template text trusted, contents not.

        Raises:
            TemplateRefusal: the template raised an error, or it changes a content beyond trimming it.
        """
        layout = self._layout(tuple(message["role"] for message in messages))
        left_out = set(range(len(messages))) - {number for _, number in layout}
        if left_out:
            raise TemplateRefusal(f"the chat template leaves out or rewrites message {min(left_out)}")
        contents = [message["content"] for message in messages]
        whole = self._render(messages)
        if _fill(layout, contents) != whole:
            contents = [self._trim(messages, index) for index in range(len(messages))]
            if _fill(layout, contents) != whole:
                raise TemplateRefusal("the chat template changes its layout with the contents of the messages")
        return [Piece(text, True) if number is None else Piece(contents[number], False) for text, number in layout]

    def _trim(self, messages: Sequence[Message], index: int) -> str:
        """Content `index` as the template writes it: as it is, or without white space at its ends."""
        content = messages[index]["content"]
        others = [_slot(message, number) for number, message in enumerate(messages)]
        written = self._render([*others[:index], messages[index], *others[index + 1 :]])
        empty = self._render(others)
        for trim in _TRIMS:
            if empty.replace(others[index]["content"], trim(content)) == written:
                return trim(content)
        raise TemplateRefusal(f"the chat template rewrites the content of message {index}")

    def _render_slots(self, roles: tuple[str, ...]) -> list[tuple[str, Optional[int]]]:
        """Template text and slots in order: (text, None) or ("", number of the message)."""
        messages = [_slot({"role": role}, number) for number, role in enumerate(roles)]
        parts = _SLOTS.split(self._render(messages))
        return [(part, None) if at % 2 == 0 else ("", int(part)) for at, part in enumerate(parts) if part]

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._names,
            )
        # Templates run arbitrary expressions: any Python error can come out of them.
        except Exception as error:
            raise TemplateRefusal(f"the chat template fails: {' '.join(str(error).split())}") from None


def _slot(message: Message, number: int) -> dict[str, str]:
    return {"role": message["role"], "content": f"{SLOT}{number}{SLOT}"}


def _fill(layout: Sequence[tuple[str, Optional[int]]], contents: Sequence[str]) -> str:
    return "".join(text if number is None else contents[number] for text, number in layout)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text in some templates; here it only passes it on."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers' `apply_chat_template` offers to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_fixed
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_fixed(form: str) -> str:
    from datetime import datetime

    return datetime.strptime(_TODAY, "%d %b %Y").strftime(form)
