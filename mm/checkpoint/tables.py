"""A checkpoint family is a table of (theirs, ours) names, run in both directions and strict in both.

Names are patterns: `{n}` stands for a number and `{x}` for `weight` or `bias`, the same on both sides of a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mm.errors import InputError

Shape = tuple[int, ...]
Change = Callable[[Sequence[Tensor]], list[Tensor]]
HOLES = {"n": r"(?P<n>\d+)", "x": r"(?P<x>weight|bias)", "name": r"(?P<name>.+)"}


@dataclass(frozen=True)
class WeightTransform:
    """The change of the tensors of one rule: `load` makes ours from theirs, `save` theirs from ours, exact inverses.
    `name` is for people. `loose`: theirs may carry any number of dimensions of size 1."""

    load: Change
    save: Change
    name: str = "changed"
    loose: bool = False

    def inverse(self) -> WeightTransform:
        """The same change where ours are theirs."""
        return replace(self, load=self.save, save=self.load)


SAME = WeightTransform(list, list, "")
TRANSPOSED = WeightTransform(lambda xs: [xs[0].T], lambda xs: [xs[0].T], "transposed")
STACKED = WeightTransform(lambda xs: [torch.stack(list(xs))], lambda xs: list(xs[0].unbind()), "stacked")
GATE_UP = WeightTransform(lambda xs: list(xs[0].chunk(2)), lambda xs: [torch.cat(list(xs))], "two halves")
SCALAR = WeightTransform(lambda xs: [xs[0].reshape(())], list, "one number", loose=True)


def fused(*sizes: int) -> WeightTransform:
    """Several of theirs, `sizes` long in their first dimension, are one of ours (query, key and value projections)."""
    return WeightTransform(lambda xs: [torch.cat(list(xs))], lambda xs: list(xs[0].split(sizes)), "side by side")


def reshaped(ours: Shape, theirs: Shape) -> WeightTransform:
    return WeightTransform(lambda xs: [xs[0].reshape(ours)], lambda xs: [xs[0].reshape(theirs)], "reshaped")


def halves(heads: int) -> WeightTransform:
    """Rows of a query or key projection from interleaved rotary pairs (theirs) to two halves per head (ours)."""
    def order(x: Tensor, shape: tuple[int, int]) -> Tensor:
        return x.unflatten(0, (heads, *shape)).transpose(1, 2).flatten(0, 2)
    return WeightTransform(lambda xs: [order(xs[0], (-1, 2))], lambda xs: [order(xs[0], (2, -1))], "rotary pairs")


def rotary(heads: int, kv_heads: int, width: int, interleaved: bool = True) -> WeightTransform:
    """Query, key and value projections side by side, the rotary pairs of the first two from theirs (interleaved, or two
    halves per head) to the other order."""
    q, k = (halves(count) if interleaved else halves(count).inverse() for count in (heads, kv_heads))
    sizes = [heads * width, kv_heads * width, kv_heads * width]

    def save(xs: Sequence[Tensor]) -> list[Tensor]:
        parts = xs[0].split(sizes)
        return [*q.save(parts[:1]), *k.save(parts[1:2]), parts[2]]
    return WeightTransform(lambda xs: [torch.cat([*q.load(xs[:1]), *k.load(xs[1:2]), xs[2]])], save,
                           "side by side, rotary pairs")


@dataclass(frozen=True)
class Rule:
    """`theirs` and `ours` are one pattern or several; the first of each finds the rest."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: WeightTransform = SAME


def rule(theirs: str | tuple[str, ...], ours: str | tuple[str, ...], transform: WeightTransform = SAME) -> Rule:
    return Rule((theirs,) if isinstance(theirs, str) else theirs, (ours,) if isinstance(ours, str) else ours, transform)


def rules_of(rows: Mapping[str, str], transforms: Mapping[str, WeightTransform] | None = None,
             count: int = 0) -> tuple[Rule, ...]:
    """Rules from rows of names, theirs: ours, or theirs: ours | the name of one of the `transforms`. In a name, [a b]
    stands for several names, a and b in its place, and [*] for the numbers below `count`. Rows without ours are left
    out."""
    found = []
    for theirs, row in rows.items():
        ours, _, name = (part.strip() for part in row.partition("|"))
        if ours:
            transform = (transforms or {})[name] if name else SAME
            found.append(Rule(spread(theirs, count), spread(ours, count), transform))
    return tuple(found)


def spread(pattern: str, count: int) -> tuple[str, ...]:
    """The names that a pattern with one [a b] or [*] stands for."""
    before, bracket, rest = pattern.partition("[")
    if not bracket:
        return (pattern,)
    inside, _, after = rest.partition("]")
    return tuple(f"{before}{one}{after}" for one in (map(str, range(count)) if inside == "*" else inside.split()))


@dataclass(frozen=True)
class Step:
    """One rule applied to one layer: full names."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: WeightTransform


@dataclass(frozen=True)
class Table:
    """Rules, and patterns of their names that are left out on purpose, each with its reason."""

    rules: tuple[Rule, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)

    def load(self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor], wanted: Mapping[str, Shape],
             where: str, cast: Callable[[str, Tensor], Tensor] = lambda name, value: value) -> dict[str, Tensor]:
        """Ours from theirs. `shapes` are theirs, `wanted` ours; names and shapes are checked before anything is read.
        `cast` gives each of ours, by its name, its dtype. Raises InputError that names missing, unknown and wrongly
        shaped weights of the file `where`."""
        steps, unknown = self.match([name for name in shapes if not self.ignores(name)], "theirs")
        unknown += [name for step in steps if not set(step.ours) <= set(wanted) for name in step.theirs]
        steps = [step for step in steps if set(step.ours) <= set(wanted)]
        made = {name for step in steps for name in step.ours}
        absent, _ = self.match([name for name in wanted if name not in made], "ours")
        missing = [name for step in absent for name in step.theirs]
        missing += [name for step in steps for name in step.theirs if name not in shapes]
        missing += [name for name in wanted if name not in made and not any(name in step.ours for step in absent)]
        complain(where, missing, [name for name in unknown if name in shapes])
        out: dict[str, Tensor] = {}
        for step in steps:
            self.check(step, shapes, wanted, where)
        for step in steps:
            made = zip(step.ours, step.transform.load([read(name) for name in step.theirs]), strict=True)
            out.update((name, cast(name, value)) for name, value in made)
        return out

    def save(self, state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
        """Theirs from ours; raises InputError that names the weights for which the layout has no place."""
        steps, unplaced = self.match(list(state), "ours")
        unplaced += [name for step in steps for name in step.ours if name not in state]
        if unplaced:
            raise InputError(f"the {layout} layout has no place for {listed(unplaced)}")
        out: dict[str, Tensor] = {}
        for step in steps:
            out.update(zip(step.theirs, step.transform.save([state[name] for name in step.ours]), strict=True))
        return out

    def rows(self, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
        """(name in the file, names here, the transform) of every weight of a file, in the file's order. A weight that
        is left out has the reason in place of names."""
        steps, _ = self.match([name for name in names if not self.ignores(name)], "theirs")
        of = {theirs: step for step in steps for theirs in step.theirs}
        for name in names:
            if (reason := self.reason(name)) is not None:
                yield name, f"left out: {reason}", ""
            elif name not in of:
                yield name, "not known", ""
            else:
                step = of[name]
                yield name, " + ".join(step.ours), step.transform.name and f", {step.transform.name}"

    def reason(self, name: str) -> str | None:
        """Why a weight of a file is left out, None where it is not."""
        return next((why for pattern, why in self.ignored.items() if re.fullmatch(compiled(pattern), name)), None)

    def renamed(self, change: Callable[[str], str]) -> Table:
        """The same table for a file whose names, and those that are left out, are changed."""
        rules = (replace(one, theirs=tuple(change(name) for name in one.theirs)) for one in self.rules)
        return Table(tuple(rules), {change(name): why for name, why in self.ignored.items()})

    def ignores(self, name: str) -> bool:
        return self.reason(name) is not None

    def match(self, names: list[str], side: str) -> tuple[list[Step], list[str]]:
        """(the steps that these names start, the names that no step uses); `side` says whose names they are."""
        steps, left = [], dict.fromkeys(names)
        for entry in self.rules:
            first = re.compile(compiled(getattr(entry, side)[0]))
            for found in [found for name in left if (found := first.fullmatch(name))]:
                theirs, ours = (tuple(fill(pattern, found.groupdict()) for pattern in patterns)
                                for patterns in (entry.theirs, entry.ours))
                steps.append(Step(theirs, ours, entry.transform))
                for name in theirs if side == "theirs" else ours:
                    left.pop(name, None)
        return steps, list(left)

    def check(self, step: Step, shapes: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> None:
        expected = step.transform.save([torch.empty(wanted[name], device="meta") for name in step.ours])
        for name, tensor in zip(step.theirs, expected, strict=True):
            right, came = tuple(tensor.shape), tuple(shapes[name])
            same = squeezed(came) == squeezed(right) if step.transform.loose else came == right
            if not same:
                raise InputError(f"{where}: {name} should have shape {right} by the config, but has {came}")


def compiled(pattern: str) -> str:
    """A pattern as a regular expression."""
    pieces = re.split(r"\{(\w+)\}", pattern)
    return "".join(HOLES[piece] if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))


def fill(pattern: str, found: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda hole: found[hole[1]], pattern)


def squeezed(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


def listed(names: Sequence[str], most: int = 3) -> str:
    """A few names and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def complain(where: str, missing: list[str], unknown: list[str]) -> None:
    wrongs = ((missing, "missing"), (unknown, "not expected by the config"))
    parts = [f"{len(names)} of the weights {'is' if len(names) == 1 else 'are'} {what} ({listed(names)})"
             for names, what in wrongs if names]
    if parts:
        raise InputError(f"{where}: {' and '.join(parts)}")


IDENTITY = Table((rule("{name}", "{name}"),))
