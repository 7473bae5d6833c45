"""Kyutai's websocket protocol: binary messages, of which the first byte says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple


class Kind(IntEnum):
    """All that the published clients know. Coloured text is only ever sent by Kyutai's own servers."""

    HANDSHAKE = 0
    AUDIO = 1
    TEXT = 2
    CONTROL = 3
    METADATA = 4
    ERROR = 5
    PING = 6
    COLOURED_TEXT = 7


class Control(IntEnum):
    START = 0
    END_TURN = 1
    PAUSE = 2
    RESTART = 3


class Message(NamedTuple):
    kind: Kind
    payload: bytes


KINDS, CONTROLS = frozenset(Kind), frozenset(Control)
HANDSHAKE = bytes([Kind.HANDSHAKE])  # without version and model, as the python server sends it
PING = bytes([Kind.PING])


def parse(data: bytes) -> Message | None:
    """None for an empty message and for a kind that is not known: both are to be passed over."""
    if not data or data[0] not in KINDS:
        return None
    return Message(Kind(data[0]), data[1:])


def control(payload: bytes) -> Control | None:
    return Control(payload[0]) if len(payload) == 1 and payload[0] in CONTROLS else None


def audio(data: bytes) -> bytes:
    return bytes([Kind.AUDIO]) + data


def text(words: str) -> bytes:
    return bytes([Kind.TEXT]) + words.encode()


def metadata(facts: Mapping[str, Any]) -> bytes:
    return bytes([Kind.METADATA]) + json.dumps(facts).encode()


def facts(payload: bytes) -> dict[str, Any]:
    """What `metadata` told."""
    return json.loads(payload)


def error(sentence: str) -> bytes:
    return bytes([Kind.ERROR]) + sentence.encode()
