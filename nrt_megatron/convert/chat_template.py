"""Chat templates (Jinja, as transformers renders them) that know the trace and its end marker."""

from __future__ import annotations

import json

_PAST_TRACES = """\
{%- set ns = namespace(traced=[]) -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' and message.reasoning_content -%}
{%- set said = trace_open + message.reasoning_content + trace_end + message.content -%}
{%- set ns.traced = ns.traced + [dict(message, content=said)] -%}
{%- else -%}
{%- set ns.traced = ns.traced + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.traced %}
"""
# The newline behind the last tag is the one that `trim_blocks` takes, so the template below starts as before.


def with_traces(template: str, trace_open: str, marker: str) -> str:
    """The template, with the trace opened behind its generation prompt and past traces before their answers.

    What it renders for messages without `reasoning_content` stays the same, but for `trace_open` at the end.
    """
    # Jinja drops one newline at a template's end; behind it there is something now.
    body = template[:-1] if template.endswith("\n") else template
    return f"{_markers(trace_open, marker)}{_PAST_TRACES}{body}{{{{ trace_open if add_generation_prompt else '' }}}}"


def from_text(text: str, trace_open: str, marker: str, bos: bool) -> str:
    """A chat template from a recipe's text with `{question}`: one question in, or several with their answers."""
    question = " + message.content + ".join(_literal(part) for part in text.split("{question}"))
    start = "{{- bos_token -}}\n" if bos else ""
    return f"""{_markers(trace_open, marker)}{_PAST_TRACES}{start}\
{{%- for message in messages -%}}
{{%- if message.role == 'user' -%}}
{{{{- {question} -}}}}
{{%- elif message.role == 'assistant' -%}}
{{{{- message.content + eos_token -}}}}
{{%- else -%}}
{{{{- raise_exception('this model knows user and assistant messages only') -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{- trace_open if add_generation_prompt else '' -}}}}"""


def _markers(trace_open: str, marker: str) -> str:
    return f"{{%- set trace_open = {_literal(trace_open)} -%}}\n{{%- set trace_end = {_literal(marker)} -%}}\n"


def _literal(text: str) -> str:
    """The text as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)
