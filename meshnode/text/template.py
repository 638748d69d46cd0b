"""Chat templates: Jinja with what Hugging Face's `apply_chat_template` adds to it.

A template comes from a manifest that a stranger may have written, so it runs in the immutable sandbox that
transformers uses for the same purpose, with the same additions: `{% generation %}` blocks (which mark text for
training and change nothing here), `{% break %}`, `tojson` without HTML escapes, `raise_exception`, `strftime_now`.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def compile_template(text: str) -> jinja2.Template:
    """Raises jinja2.TemplateError for a text that is no template."""
    return _environment().from_string(text)


def variables_of(text: str) -> set[str]:
    """What a template wants to be given. Raises jinja2.TemplateError."""
    return meta.find_undeclared_variables(_environment().parse(text))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _today
    return environment


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` is what stands inside."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def _today(form: str) -> str:
    return datetime.now().strftime(form)
