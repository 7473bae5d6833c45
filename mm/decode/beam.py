"""Beam search: the likeliest continuations of a whole batch, as transformers' `generate(num_beams=k)` finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.decode.requests import LanguageModel, check_prompt, default_eos
from mm.errors import InputError
from mm.nn.memory import Memory
from mm.nn.state import StackState


@dataclass(frozen=True, kw_only=True)
class Beams:
    """Settings of beam search: the number of beams, and the power of its length by which a text's log-probability is
    divided."""

    count: int = 4
    length_penalty: float = 1.0


@dataclass(frozen=True)
class Found:
    """A continuation and its score: the sum of its log-probabilities / length ** length_penalty."""

    ids: list[int]
    score: float
    ended: bool = True


@dataclass
class Search:
    """The beams of one prompt: those that continue (ids, score) and those that ended, best first."""

    running: list[tuple[list[int], float]]
    found: list[Found] = field(default_factory=list)
    done: bool = False


@torch.no_grad()
def beam_search(model: LanguageModel, ids: Tensor | Sequence[Sequence[int]], *, beams: int = 4, max_tokens: int = 128,
                length_penalty: float = 1.0, eos: Sequence[int] | None = None, memory: Memory | None = None
                ) -> list[Found]:
    """Find the best continuation of each row of ids (B, T) or rows of any lengths, without the end token.

    memory: of an encoder, a row for each prompt, for a decoder that reads one. Raises InputError for prompts that do
    not fit.
    """
    rows = ids.tolist() if isinstance(ids, Tensor) else [list(row) for row in ids]
    if beams < 1 or max_tokens < 1:
        raise InputError(f"beam search needs at least 1 beam and 1 token, not {beams} and {max_tokens}")
    for row in rows:
        check_prompt(row, model.spec.context, model.spec.embed.vocab)
    ends = set(default_eos(model) if eos is None else eos)
    room = min(max_tokens, model.spec.context + 1 - max(map(len, rows)))
    state, logits = prefill(model, rows, room, memory)
    device = logits.device
    each = torch.arange(len(rows), device=device).repeat_interleave(beams)
    state, logits = state.select(each), logits.index_select(0, each)
    memory = memory and memory.select(each)
    searches = [Search([([], 0.0)] + [([], -1e9)] * (beams - 1)) for _ in rows]
    longest = max(map(len, rows))
    for step in range(1, room + 1):
        picks = candidates(logits, searches, beams, keep=max(2, 1 + len(ends)) * beams)
        grown = [grow(search, pick, beams, step, ends, step == room, length_penalty)
                 for search, pick in zip(searches, picks, strict=True)]
        if step == room or all(search.done for search in searches):
            break
        origin = [i * beams + source for i, row in enumerate(grown) for source, _ in row]
        token = torch.tensor([last for row in grown for _, last in row], device=device)
        state = state.select(torch.tensor(origin, device=device))
        hidden = model.hidden(token[:, None], state=state, memory=memory, within=longest + step)
        logits = model.logits(hidden)[:, -1]
    return [search.found[0] for search in searches]


def prefill(model: LanguageModel, rows: list[list[int]], room: int, memory: Memory | None
            ) -> tuple[StackState, Tensor]:
    """Read the prompts: the state after them, and the logits (B, V) of each row's next token."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    state = model.init_state(len(rows), length=longest + room, chunk=min(longest, 256))
    device = state.offset.device
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    last = torch.tensor(lengths, device=device)
    mask = torch.arange(longest, device=device) < last[:, None]
    hidden = model.hidden(ids, mask=mask, state=state, memory=memory, within=longest)
    return state, model.logits(hidden[torch.arange(len(rows), device=device), last - 1])


def candidates(logits: Tensor, searches: list[Search], beams: int, keep: int) -> list[list[tuple[float, int, int]]]:
    """logits (B * beams, V) -> for each prompt the `keep` best (score, beam, token), best first."""
    vocab = logits.shape[-1]
    scores = torch.tensor([[score for _, score in search.running] for search in searches], device=logits.device)
    total = logits.float().log_softmax(-1).unflatten(0, (-1, beams)) + scores[..., None]
    best, index = total.flatten(1).topk(min(keep, beams * vocab))
    return [[(score, at // vocab, at % vocab) for score, at in zip(*row, strict=True)]
            for row in zip(best.tolist(), index.tolist(), strict=True)]


def grow(search: Search, picks: list[tuple[float, int, int]], beams: int, step: int, ends: set[int], last: bool,
         length_penalty: float) -> list[tuple[int, int]]:
    """Extend a prompt's beams by one token; returns (source beam, token) for each that continues.

    A candidate ends by an end token or by being the last; it counts when it is among the first `beams`. A search is
    done when no running beam could beat the worst of its `beams` ended ones.
    """
    ended, going = [], []
    for rank, (score, source, token) in enumerate(picks):
        grown = search.running[source][0] + [token]
        if token in ends or last:
            if rank < beams and not search.done:
                out = grown[:-1] if token in ends else grown
                ended.append(Found(out, score / step**length_penalty, token in ends))
        else:
            going.append((grown, score, source))
    search.found = sorted(search.found + ended, key=lambda one: -one.score)[:beams]
    going = going[:beams]
    if len(going) < beams:  # the last step, or a vocabulary of end tokens
        search.done = True
        return [(0, 0)] * beams
    search.running = [(grown, score) for grown, score, _ in going]
    full = len(search.found) == beams
    search.done = search.done or (full and going[0][1] / step**length_penalty <= search.found[-1].score)
    return [(source, grown[-1]) for grown, _, source in going]
