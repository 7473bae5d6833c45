"""Conversations as text: the chat template that a checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from mm.errors import InputError

Message = Mapping[str, Any]


def render(template: str, messages: Sequence[Message], names: Mapping[str, Any], *, generate: bool = True) -> str:
    """The text of a conversation ({role, content} each), and with `generate` the beginning of an answer. `names` are
    what the template may use beside it (bos_token and the like). The template runs in a sandbox. Raises InputError."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(sentence: str) -> None:
        raise TemplateError(sentence)
    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    room.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    room.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return room.from_string(template).render(messages=list(messages), add_generation_prompt=generate, **names)
    except (TemplateError, TypeError) as error:
        raise InputError(f"the chat template refuses this conversation: {error}") from None


def template_of(settings: Mapping[str, Any]) -> str:
    """The template in a tokenizer's settings, the one named `default` where there are several. Raises InputError."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    if not found:
        raise InputError("the model has no chat template: it continues texts, and does not answer messages")
    return found
