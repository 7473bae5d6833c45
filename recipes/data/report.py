"""Problems with the input of a long piece of work: counted by kind, the first cases kept as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_TOLD = 5  # sentences of one kind
Note = tuple[str, str, str]  # kind, key and sentence of a problem: to be counted once per key


@dataclass
class Account:
    """`counts` by kind ("lines of broken JSON"), and the first sentences of each, which name file and line."""

    counts: dict[str, int] = field(default_factory=dict)
    told: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, sentence: str, count: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        sentences = self.told.setdefault(kind, [])
        if len(sentences) < MOST_TOLD:
            sentences.append(sentence)

    def sentences(self) -> list[str]:
        """Lines for a person: of each kind the count and the first cases."""
        return [line for kind, count in self.counts.items() for line in [f"{count} {kind}:", *(
            f"  {sentence}" for sentence in self.told[kind]), *(["  ..."] if count > len(self.told[kind]) else [])]]

    def to_data(self) -> dict[str, Any]:
        return {"counts": self.counts, "told": self.told}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Account:
        return cls(dict(data["counts"]), {kind: list(said) for kind, said in data["told"].items()})
