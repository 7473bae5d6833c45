"""Conversations as text: the chat template that a checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mm.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]


def render(template: str, messages: Sequence[Message], names: Mapping[str, Any], *, generate: bool = True) -> str:
    """The text of a conversation ({role, content} each), and with `generate` the beginning of an answer. `names` are
    what the template may use beside it (bos_token and the like). The template runs in a sandbox. Raises InputError."""
    from jinja2 import TemplateError

    try:
        return compiled(template).render(messages=list(messages), add_generation_prompt=generate, **names)
    except (TemplateError, TypeError) as error:
        raise InputError(f"the chat template refuses this conversation: {error}") from None


@lru_cache(maxsize=8)
def compiled(template: str) -> Template:
    """The template in its sandbox."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(sentence: str) -> None:
        raise TemplateError(sentence)
    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    room.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    room.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return room.from_string(template)


def answers(template: str, messages: Sequence[Message], names: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the spans [a, b) of it that the assistant is to write, each with what ends its
    turn. Raises InputError for a template whose text of the first messages changes when others follow."""
    text, spans = render(template, messages, names, generate=False), []
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            before = render(template, messages[:i], names)
            after = render(template, messages[: i + 1], names, generate=False)
            if not (text.startswith(after) and after.startswith(before)):
                raise InputError(f"the chat template words message {i + 1} otherwise when others follow, so that the "
                                 "assistant's answer cannot be told from the rest")
            spans.append((len(before), len(after.rstrip())))
    return text, spans


def template_of(settings: Mapping[str, Any]) -> str:
    """The template in a tokenizer's settings, the one named `default` where there are several. Raises InputError."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    if not found:
        raise InputError("the model has no chat template: it continues texts, and does not answer messages")
    return found
