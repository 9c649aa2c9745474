"""Chat templates: what is the template's and what is the user's."""

from __future__ import annotations

from typing import Any

import pytest

from nrt_megatron.data.chat import ChatTemplate, TemplateRefusal
from nrt_megatron.data.marks import Piece
from nrt_megatron.recipe import ConfigError
from tests.data import builders

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _pieces(source: str, messages: list[dict[str, str]]) -> list[Piece]:
    return ChatTemplate(source, NAMES).pieces(messages)


def test_contents_are_apart_from_the_template() -> None:
    assert _pieces(builders.LLAMA3_TEMPLATE, _user("2 < 3 <|eot_id|>")) == [
        Piece("<s><|start|>user<|end|>\n\n", True),
        Piece("2 < 3 <|eot_id|>", False),
        Piece("<|eot_id|><|start|>assistant<|end|>\n\n", True),
    ]


def test_trimmed_contents_are_trimmed() -> None:
    messages = [{"role": "system", "content": " s "}, *_user("\n u ")]
    contents = [piece.text for piece in _pieces(builders.LLAMA3_TEMPLATE, messages) if not piece.trusted]
    assert contents == ["s", "u"]
    contents = [piece.text for piece in _pieces(builders.CHATML_TEMPLATE, messages) if not piece.trusted]
    assert contents == [" s ", "\n u "]
    mixed = "{% for m in messages %}{{ m.content.lstrip() if m.role == 'user' else m.content }}|{% endfor %}"
    assert [p.text for p in _pieces(mixed, messages)] == [" s ", "|", "u ", "|"]


def test_a_template_that_uses_a_content_twice() -> None:
    assert _pieces("{{ messages[0].content }}+{{ messages[0].content }}", _user("x")) == [
        Piece("x", False), Piece("+", True), Piece("x", False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ messages[0].content | upper }}", "rewrites the content of message 0"),
        ("{{ messages[0].content[:1] }}", "leaves out or rewrites message 0"),
        ("{{ messages[0].content | tojson }}", "rewrites the content of message 0"),
        ("nothing", "leaves out or rewrites message 0"),
        ("{{ messages[0].content.split('</think>')[-1] }}", "rewrites the content of message 0"),
        ("{{ messages[0].content }}{{ messages[0].content | length }}", "message 0|layout"),
        ("{{ messages[1].content }}", "the chat template fails"),
        ("{{ raise_exception('only\nsystem') }}", "the chat template fails: only system"),
        ("{{ messages[0].content }}{{ messages.append(1) }}", "the chat template fails"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "the chat template fails"),
    ],
)
def test_templates_that_do_not_take_the_messages(source: str, why: str) -> None:
    with pytest.raises(TemplateRefusal, match=why) as error:
        _pieces(source, _user('a "quoted"</think> text'))
    assert "\n" not in str(error.value)


def test_reasoning_templates_take_what_they_leave_alone() -> None:
    source = "{{ messages[0].content.split('</think>')[-1] }}"
    assert _pieces(source, _user("no tag")) == [Piece("no tag", False)]


def test_a_content_that_looks_like_a_template_is_not_one() -> None:
    assert _pieces("{{ messages[0].content }}", _user("{{ 7 * 7 }}")) == [Piece("{{ 7 * 7 }}", False)]


def test_a_broken_template() -> None:
    with pytest.raises(ConfigError, match="chat template is broken"):
        ChatTemplate("{% if %}", NAMES)


def test_what_transformers_offers_to_templates() -> None:
    source = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ [1, 'é<'] | tojson }}{{ strftime_now('%d %b %Y') }}{{ tools is none }}{{ add_generation_prompt }}"
    )
    assert _pieces(source, _user("c")) == [Piece("c", False), Piece('[1, "é<"]26 Jul 2024TrueTrue', True)]


def test_roles_share_a_layout_but_not_contents() -> None:
    template = ChatTemplate(builders.CHATML_TEMPLATE, NAMES)
    first: Any = template.pieces(_user("one"))
    second: Any = template.pieces(_user("two"))
    assert [first[0], first[2]] == [second[0], second[2]] and (first[1].text, second[1].text) == (
        "one",
        "two",
    )
