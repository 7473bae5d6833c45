"""Continuous batching: a fixed number of rows that start, stop and leave independently, one step for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.decode.requests import Cache, LanguageModel, Prefix, Request, TextStream, check_prompt, default_eos
from mm.decode.sampling import GREEDY, Sampling, choose, controls
from mm.errors import InputError
from mm.nn.memory import Memory
from mm.nn.state import StackState

if TYPE_CHECKING:
    from mm.decode.speculate import Proposer


@dataclass
class Filling:
    """Rows whose prompts are being read, in a state of their own. ids: (n, T) padded, the rest of each prompt behind at
    most `skipped` tokens of a prefix, of which `done` are read. hidden: one (n, t, D) per chunk, for a proposer."""

    slots: list[int]
    state: StackState
    ids: Tensor
    lengths: list[int]
    skipped: int
    done: int = 0
    hidden: list[Tensor] = field(default_factory=list)


class Engine:
    """Rows of a decoder: `submit` puts a prompt in line, `step` reads a chunk of the waiting prompts and makes the next
    token of every running row.

    slots: rows at a time. length: the longest row in tokens (default: the context). chunk: prompt tokens read per step,
    four times as many while no row waits for its next token, where no layer has a window. eos: ids that end a text, by
    default the model's. speculate: a proposer of several tokens, which are verified in one step; texts do not depend on
    it. cache: keys and values as they are or in 8 bits. compiled: a step is one compiled program (`mm.nn.graph`), which
    takes half a minute at first; on a CPU, one row then takes half the time, by weights in their usual order.
    remembered: the longest memory of a request in tokens, for a decoder that reads an encoder. Raises InputError for
    sizes and choices that do not fit the model or each other.
    """

    def __init__(self, model: LanguageModel, slots: int, length: int | None = None, chunk: int = 256, *,
                 eos: Sequence[int] | None = None, speculate: Proposer | None = None,
                 cache: Cache = "full", compiled: bool = False, remembered: int = 0):
        self.length = model.spec.context if length is None else length
        if not 0 < self.length <= model.spec.context:
            raise InputError(f"rows of {self.length} tokens do not fit the model's context of {model.spec.context}")
        if slots < 1 or chunk < 1:
            raise InputError(f"an engine needs at least 1 slot and a chunk of 1, not {slots} and {chunk}")
        if compiled and speculate is not None:
            raise InputError("steps that verify what was speculated are not compiled: choose one of both")
        self.model, self.chunk, self.proposer, self.cache = model, chunk, speculate, cache
        if speculate is not None:
            speculate.start(model, slots, self.length, chunk)
        self.ahead = speculate.tokens if speculate else 0
        self.device = model.embed.tokens.weight.device
        self.vocab = model.spec.embed.vocab
        self.eos = set(default_eos(model) if eos is None else eos)
        self.state = self.new_state(slots)
        self.token = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.active = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.seen: Tensor | None = None
        self.memory = model.stack.room(slots, remembered) if remembered else None
        self.rows: list[Request | None] = [None] * slots
        self.waiting: deque[Request] = deque()
        self.filling: Filling | None = None
        self.settings = controls([GREEDY] * slots, self.device)
        self.decode = self.compiled_step() if compiled else self.eager_step

    def new_state(self, rows: int) -> StackState:
        return self.model.init_state(rows, length=self.length, chunk=max(self.chunk, self.ahead + 1), cache=self.cache)

    # ------------------------------------------------------------------------------------------- requests
    def submit(self, prompt: Sequence[int], sampling: Sampling = GREEDY, *, prefix: Prefix | None = None,
               on_text: Callable[[str], None] | None = None, memory: Callable[[], Memory] | None = None) -> Request:
        """Put a prompt in line for the next free row. prefix: its beginning, already read. on_text: called with every
        piece of text. memory: makes the memory (one row) of an encoder, when the row is free. Raises InputError for a
        prompt that does not fit."""
        prompt = [int(i) for i in prompt]
        check_prompt(prompt, self.length, self.vocab)
        if sampling.stop and self.model.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and the model has none")
        if prefix is not None:
            self.state.match(prefix.state.fingerprint)
            if tuple(prompt[:len(prefix.ids)]) != prefix.ids or len(prompt) == len(prefix.ids):
                raise InputError(f"the prompt must begin with the prefix of {len(prefix.ids)} tokens and go on")
        if (memory is None) != (self.memory is None):
            raise InputError("an engine with room for memories needs one for every prompt, and others take none")
        stream = TextStream(self.model.tokenizer, prompt if memory is None else (), sampling.stop)
        request = Request(prompt, sampling, stream, on_text, prefix, memory)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Free the row of a request at once; its `reason` becomes "stop"."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.rows:
            self.leave(self.rows.index(request))
        request.reason = request.reason or "stop"

    @torch.no_grad()
    def prefix(self, ids: Sequence[int]) -> Prefix:
        """Read the beginning that many prompts share."""
        check_prompt(ids, self.length, self.vocab)
        state = self.new_state(1)
        self.model.hidden(torch.tensor([list(ids)], device=self.device), state=state)
        return Prefix(tuple(ids), state)

    def load_prefix(self, ids: Sequence[int], path: str | Path) -> Prefix:
        """Load a saved prefix, also one of another process with the same model, length and chunk."""
        state = self.new_state(1).load(path)
        if int(state.offset[0]) != len(ids):
            raise InputError(f"{path} holds a prefix of {int(state.offset[0])} tokens, not {len(ids)}")
        return Prefix(tuple(ids), state)

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(row is not None for row in self.rows)

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()

    # ------------------------------------------------------------------------------------------- one step
    @torch.no_grad()
    def step(self) -> None:
        """Admit, read one chunk of the prompts being read, and make the next token of every running row."""
        if self.filling is None:
            self.admit()
        if self.filling is not None:
            self.fill()
        here = [i for i, row in enumerate(self.rows) if running(row)]
        if not here:
            return
        if self.proposer is None:
            tokens = [[token] for token in self.decode().tolist()]
        else:
            tokens = self.verify(self.proposer.propose([row.ids if running(row) else None for row in self.rows],
                                                       self.settings))
        for i in here:
            self.accept(i, tokens[i])

    def eager_step(self) -> Tensor:
        """Run `plain_step` with two facts about the rows: whether all of them run, and how far they reach."""
        return self.plain_step(all(map(running, self.rows)), self.reach())

    def reach(self, more: int = 0) -> int:
        """Bound all positions of the running rows, with `more` tokens in each."""
        return min(self.length, max(len(row.prompt) + len(row.out) for row in self.rows if running(row)) + more)

    def compiled_step(self) -> Callable[[], Tensor]:
        from mm.nn.graph import compiled

        return compiled(self.plain_step, self.device)

    def plain_step(self, all_run: bool = False, within: int | None = None) -> Tensor:
        """Make one token of every row (B,): nothing is read back, and shapes are static by default."""
        rows = None if all_run else self.active
        hidden = self.model.hidden(self.token[:, None], state=self.state, rows=rows, memory=self.memory, within=within)
        token = choose(self.model.logits(hidden)[:, 0], self.settings, self.state.offset, self.seen)
        self.token.copy_(torch.where(self.active, token, self.token))
        self.note(self.token)
        return self.token

    def note(self, token: Tensor, rows: Tensor | None = None) -> None:
        """Tokens (B,) of these rows (B,) bool are seen."""
        if self.seen is not None:
            rows = self.active if rows is None else rows
            mark = self.seen.gather(1, token[:, None]) | rows[:, None]
            self.seen.scatter_(1, token[:, None], mark)

    def verify(self, drafts: Tensor) -> list[list[int]]:
        """Drafts (B, K) -> the tokens that plain decoding would have made, between 1 and K + 1 per row."""
        start = self.state.offset.clone()
        ids = torch.cat([self.token[:, None], drafts], 1)
        fits = start[:, None] + torch.arange(ids.shape[1], device=self.device) < self.length
        hidden = self.model.hidden(ids, mask=fits, state=self.state, rows=self.active, memory=self.memory,
                                   within=self.reach(drafts.shape[1]))
        logits = self.model.logits(hidden)
        right, chosen = self.active, []
        count = torch.zeros_like(start)
        for j in range(ids.shape[1]):
            token = choose(logits[:, j], self.settings, start + j + 1, self.seen)
            self.note(token, right)
            self.token.copy_(torch.where(right, token, self.token))
            chosen.append(token)
            count += right
            if j < drafts.shape[1]:
                right = right & (token == drafts[:, j]) & fits[:, j + 1]
        self.proposer.follow(hidden, count)
        self.state.rewind(torch.where(self.active, start + count, self.state.offset))
        table = torch.cat([count[:, None], torch.stack(chosen, 1)], 1).tolist()
        return [row[1:1 + row[0]] for row in table]

    # ------------------------------------------------------------------------------------------- rows come and go
    def admit(self) -> None:
        """Give the free rows to waiting requests, whose prompts are read in a state of their own."""
        free = [i for i, row in enumerate(self.rows) if row is None][:len(self.waiting)]
        if not free:
            return
        requests = [self.waiting.popleft() for _ in free]
        whole = len(free) == len(self.rows)
        state = self.state if whole else self.new_state(len(free))
        state.reset()
        rest, skipped = [], 0
        for row, (i, request) in enumerate(zip(free, requests, strict=True)):
            self.rows[i] = request
            if request.memory is not None:
                self.memory.insert(i, request.memory())
            skip = 0
            if request.prefix is not None:
                state.insert(torch.tensor([row], device=self.device), request.prefix.state)
                skip = len(request.prefix.ids)
            rest.append(request.prompt[skip:])
            skipped = max(skipped, skip)
        self.change_settings()
        lengths = [len(ids) for ids in rest]
        longest = max(lengths)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rest], device=self.device)
        self.filling = Filling(free, state, ids, lengths, skipped)

    def change_settings(self) -> None:
        """Put settings and seen tokens of the rows into new tensors."""
        if (renew := getattr(self.decode, "renew", None)) is not None:  # a compiled step reads the tensors of before
            renew()
        self.settings = controls([row.sampling if row else GREEDY for row in self.rows], self.device)
        self.seen = None
        if self.settings.penalised:
            seen = torch.zeros(len(self.rows), self.vocab, dtype=torch.bool)
            for i, row in enumerate(self.rows):
                if row is not None:
                    seen[i, row.ids] = True
            self.seen = seen.to(self.device)

    def fill(self) -> None:
        """Read one chunk of the prompts; rows whose prompt ends in it make their first token."""
        work = self.filling
        calm = work.state.chunk is None and not any(map(running, self.rows))
        stop = min(work.done + (4 if calm else 1) * self.chunk, work.ids.shape[1])
        steps = torch.arange(work.done, stop, device=self.device)
        mask = steps < torch.tensor(work.lengths, device=self.device)[:, None] if min(work.lengths) < stop else None
        hidden = self.model.hidden(work.ids[:, work.done:stop], mask=mask, state=work.state,
                                   memory=self.memory and self.memory.select(torch.tensor(work.slots)),
                                   within=work.skipped + stop)
        if self.proposer is not None:
            work.hidden.append(hidden)
        ended = [row for row, length in enumerate(work.lengths)
                 if work.done < length <= stop and self.rows[work.slots[row]] is not None]
        if ended:
            self.begin(work, ended, hidden[ended, [work.lengths[row] - 1 - work.done for row in ended]])
        work.done = stop
        if stop == work.ids.shape[1]:
            self.filling = None

    def begin(self, work: Filling, ended: list[int], hidden: Tensor) -> None:
        """Make the first tokens from hidden (n, D) of the rows that are read; they run from the next step on."""
        slots = torch.tensor([work.slots[row] for row in ended], device=self.device)
        rows = torch.tensor(ended, device=self.device)
        if work.state is not self.state:
            self.state.insert(slots, work.state.select(rows))
        settings = controls([self.rows[work.slots[row]].sampling for row in ended], self.device)
        token = choose(self.model.logits(hidden), settings, self.state.offset[slots],
                       None if self.seen is None else self.seen[slots])
        self.token[slots] = token
        self.active[slots] = True
        if self.seen is not None:
            self.seen[slots, token] = True
        for row, one in zip(ended, token.tolist(), strict=True):
            slot = work.slots[row]
            if self.proposer is not None:
                read = torch.cat([chunk[row] for chunk in work.hidden])[:work.lengths[row]]
                self.proposer.begin(slot, self.rows[slot].prompt, read)
            self.accept(slot, [one])

    def accept(self, slot: int, tokens: list[int]) -> None:
        """Add new tokens to a row, up to the one that ends it."""
        request = self.rows[slot]
        for token in tokens:
            if request.take(token, self.eos, self.length):
                return self.leave(slot)

    def leave(self, slot: int) -> None:
        self.rows[slot] = None
        self.active[slot] = False


def running(row: Request | None) -> bool:
    return row is not None and bool(row.out)
