"""A stack of blocks: the body of every model in this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm import spec
from mm.errors import InputError
from mm.kernels.plain import ROWS
from mm.nn.attention import AttentionInputs
from mm.nn.block import Block
from mm.nn.memory import Memory
from mm.nn.moe import Route
from mm.nn.norm import build_norm
from mm.nn.state import Int8Cache, KVCache, Slots, StackState, check_state
from mm.positions import rope as rotary
from mm.positions.absolute import build_bias
from mm.positions.visibility import EMPTY, At, Mask, along, visible
from mm.spec import attention, schema


class Transformer(nn.Module):
    """x: (B, T, D) -> (B, T, D), after the final norm where the stack has one."""

    def __init__(self, stack: spec.Stack):
        super().__init__()
        self.stack, self.fingerprint = stack, schema.fingerprint(stack)
        self.blocks = nn.ModuleList(Block(stack.dim, layer, stack.memory_dim) for layer in stack.layers)
        self.final_norm = build_norm(stack.final_norm, stack.dim)
        self.bias = build_bias(stack.relative, attention(stack.layers[0]).heads) if stack.layers else None
        self.checkpointed: frozenset[int] = frozenset()
        self.known_windows = {0: [attention(layer).window for layer in stack.layers]}
        self.ropes = list(dict.fromkeys(filter(None, map(shared_rope, stack.layers))))
        self.rope_of = [self.ropes.index(rope) if (rope := shared_rope(layer)) else None for layer in stack.layers]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of std D^-0.5 into a branch, D being what they read, and (2 L D)^-0.5 out of it (GPT-2, CLIP);
        the rest as each module begins. Complete: it also fills a stack that was made on the meta device."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        dim, depth = self.stack.dim, max(len(self.blocks), 1)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or not name.endswith("weight") or name.startswith("bias"):
                continue
            shallow = parameter.shape[-1]**-0.5 * (0.5**0.5 if ".mlp." in name else 1.0)
            deep = dim**-0.5 * (2 * depth) ** -0.5
            nn.init.normal_(parameter, std=deep if name.endswith((".out.weight", ".down.weight")) else shallow)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def checkpoint_blocks(self, every: int = 1) -> None:
        """Recompute every n-th block in the backward pass instead of keeping its activations; 0 keeps all."""
        self.checkpointed = frozenset(range(0, len(self.blocks), every)) if every else frozenset()

    def forward(self, x: Tensor, at: At | None = None, *, state: StackState | None = None, rows: Tensor | None = None,
                memory: Tensor | Memory | None = None, memory_at: At | None = None,
                routes: list[Route] | None = None, within: int | None = None) -> Tensor:
        """at: where the tokens are (default 0..T-1). state: continue a stream, rows (B,) bool says which rows advance.
        within: a bound that the caller knows of all positions in the state and the call, so that no more is looked at.
        memory: (B, S, M) for cross-attention, or what `remember` made of it. routes: a list that gets the route of
        every mixture of experts, in layer order, checkpointed blocks included. Raises InputError on wrong shapes or a
        foreign state."""
        boxes = [[] for _ in self.blocks] if routes is not None else None
        out = self.final_norm(self.run(x, at, state, rows, memory, memory_at, boxes=boxes, within=within)[-1])
        if routes is not None:
            routes.extend(box[0] for box in boxes if box)  # a checkpointed block fills its box again, going back
        return out

    def remember(self, memory: Tensor, memory_at: At | None = None) -> Memory:
        """(B, S, M) -> its keys and values in every layer, for many calls. Raises InputError on a wrong width."""
        width = self.stack.memory_dim or self.stack.dim
        if memory.ndim != 3 or memory.shape[-1] != width:
            raise InputError(f"memory should be (B, S, {width}), not {tuple(memory.shape)}")
        at = along(*memory.shape[:2], device=memory.device) if memory_at is None else memory_at
        layers = tuple(block.cross.remember(memory) if block.cross else None for block in self.blocks)
        return Memory(layers, at, self.fingerprint)

    def room(self, rows: int, length: int) -> Memory:
        """An empty memory of as many rows, for up to `length` tokens each, which `Memory.insert` fills."""
        here = next(self.parameters())
        empty = At(torch.full((rows, length), EMPTY, dtype=torch.long, device=here.device))
        layers = tuple(block.cross and tuple(torch.zeros(
            rows, block.cross.cached[0], length, width, dtype=here.dtype, device=here.device)
            for width in block.cross.cached[1:]) for block in self.blocks)
        return Memory(layers, empty, self.fingerprint)

    def features(self, x: Tensor, layers: Sequence[int], at: At | None = None) -> list[Tensor]:
        """The residual stream after each of these blocks (negative counts from the end), before the final norm."""
        outputs = self.run(x, at, None, None, None, None, keep=True)
        return [outputs[i + 1 if i >= 0 else i] for i in layers]

    def run(self, x: Tensor, at: At | None, state: StackState | None, rows: Tensor | None,
            memory: Tensor | Memory | None, memory_at: At | None, keep: bool = False,
            boxes: list[list[Route]] | None = None, within: int | None = None) -> list[Tensor]:
        """[input and output of every block] when they are kept, otherwise [the last]."""
        self.check(x, at, memory)
        if state is not None and boxes is not None:
            raise InputError("routes are those of a whole pass, not of one with a state")
        if state is not None:
            check_state(state, self.fingerprint, len(x), rows)
            if state.chunk is not None and x.shape[1] > state.chunk:
                return [self.in_chunks(x, at, state, rows, memory, memory_at, within)]
            state.check_length(x.shape[1])
            at = state.advance(at, x.shape[1], rows)
        at = along(*x.shape[:2], device=x.device) if at is None else at
        memories = memory.layers if isinstance(memory, Memory) else (memory,) * len(self.blocks)
        if isinstance(memory, Memory):
            memory_at = memory.at
        elif memory is not None and memory_at is None:
            memory_at = along(*memory.shape[:2], device=x.device)
        layer_inputs, outputs = self.layer_inputs(at, state, within), [x]
        if boxes is not None:
            layer_inputs = [replace(inputs, routes=box) for inputs, box in zip(layer_inputs, boxes, strict=True)]
        for i, (block, inputs, memory) in enumerate(zip(self.blocks, layer_inputs, memories, strict=True)):
            if i in self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, inputs, memory, memory_at, use_reentrant=False)
            else:
                x = block(x, inputs, memory, memory_at)
            outputs = [*outputs, x] if keep else [x]
        return outputs

    def layer_inputs(self, at: At, state: StackState | None, within: int | None = None) -> list[AttentionInputs]:
        """What each block is shown; rotations are computed once per distinct rope, slots once per distinct size,
        and once per distinct window what one tile of queries sees."""
        rotations = [rotary.rotation(at.rotary_positions, rope, width) for rope, width in self.ropes]
        windows = self.windows(0 if state is None else state.first)
        early = {(i, window.left): rotary.rotation(at.position.clamp(max=window.left), *self.ropes[i])
                 for i, window in zip(self.rope_of, windows, strict=True) if window.first and i is not None}
        writes = {(slots.size, slots.first): slots.write(at, within) for slots in (state.slots if state else ())}
        one_tile = not torch.compiler.is_exporting() and at.position.shape[1] <= ROWS
        masks: dict[tuple[int, spec.Window], Mask] = {}
        layer_inputs = []
        for k, (i, window) in enumerate(zip(self.rope_of, windows, strict=True)):
            rotated = (None, None) if i is None else (rotations[i], early.get((i, window.left)))
            if state is None:
                layer_inputs.append(AttentionInputs(at, window, *rotated, self.bias))
                continue
            cache = state.caches[k]
            size = cache.k.shape[2] - 1
            write = writes[size, window.first]
            if one_tile and (size, window) not in masks:
                masks[size, window] = Mask.of(visible(at, cache.sees(write), window), at.whole)
            mask = masks.get((size, window))
            layer_inputs.append(AttentionInputs(at, window, *rotated, self.bias, cache, write, mask))
        return layer_inputs

    def windows(self, first: int) -> list[spec.Window]:
        """How far each layer sees where at least so many positions stay in sight. Raises InputError where one has no
        window, or an attention that they do not go with."""
        if first not in self.known_windows:
            stack = replace(self.stack, layers=tuple(keeping(layer, first) for layer in self.stack.layers))
            self.known_windows[first] = [attention(layer).window for layer in stack.layers]
        return self.known_windows[first]

    def in_chunks(self, x: Tensor, at: At | None, state: StackState, rows: Tensor | None,
                  memory: Tensor | Memory | None, memory_at: At | None, within: int | None) -> Tensor:
        out = []
        for start in range(0, x.shape[1], state.chunk):
            stop = start + state.chunk
            piece = None if at is None else at.rows(start, stop)
            out.append(self.run(x[:, start:stop], piece, state, rows, memory, memory_at, within=within)[-1])
        return torch.cat(out, 1)

    def init_state(self, batch: int, *, length: int | None = None, chunk: int = 1, dtype: torch.dtype | None = None,
                   device: torch.device | str | None = None, cache: Literal["full", "int8"] = "full",
                   first: int = 0) -> StackState:
        """An empty stream of `batch` rows. A layer with a window keeps `left + chunk` slots, one without `length`;
        past `length` it forgets its oldest tokens. Inputs longer than `chunk` are split where a window needs it.
        cache: keys and values as they are, or in 8 bits with a scale per token and head. first: so many tokens at the
        beginning stay in sight (`Window.first`), in layers that all have windows. Raises InputError."""
        here = next(self.parameters())
        dtype, device = dtype or here.dtype, device or here.device
        windows = self.windows(first)
        sizes = [cache_size(window, length, chunk) for window in windows]
        kinds = zip(sizes, (window.first for window in windows), strict=True)
        slots = [Slots(torch.full((batch, size + 1, 3), EMPTY, dtype=torch.long, device=device), kept)
                 for size, kept in dict.fromkeys(kinds)]
        caches = []
        for block, size, window, rope in zip(self.blocks, sizes, windows, self.rope_of, strict=True):
            heads, width, value_width = block.mixer.cached
            widths = (2 * width if window.first and rope is not None else width, value_width)
            k, v = (torch.zeros(batch, heads, size + 1, width, dtype=dtype, device=device) for width in widths)
            caches.append(KVCache(k, v) if cache == "full" else Int8Cache.like(k, v))
        ring = any(size != length for size in sizes)
        offset = torch.zeros(batch, dtype=torch.long, device=device)
        return StackState(offset, slots, caches, self.fingerprint, chunk if ring else None, first)

    def check(self, x: Tensor, at: At | None, memory: Tensor | Memory | None) -> None:
        if x.ndim != 3 or x.shape[-1] != self.stack.dim or not x.shape[1]:
            raise InputError(f"expected (B, T, {self.stack.dim}) with T of at least 1, got {tuple(x.shape)}")
        if at is not None and tuple(at.position.shape) not in ((1, x.shape[1]), tuple(x.shape[:2])):
            raise InputError(f"positions {tuple(at.position.shape)} do not fit tokens {tuple(x.shape)}")
        if isinstance(memory, Memory):
            batch = next((pair[0].shape[0] for pair in memory.layers if pair is not None), len(x))
            if memory.fingerprint != self.fingerprint or batch != len(x):
                raise InputError(f"a memory of {batch} rows, made by this or another stack, does not fit {len(x)} rows")
            return
        width = self.stack.memory_dim or self.stack.dim
        if any(layer.cross for layer in self.stack.layers):
            shape = None if memory is None else tuple(memory.shape)
            if shape is None or len(shape) != 3 or (shape[0], shape[2]) != (len(x), width):
                raise InputError(f"cross-attention needs memory ({len(x)}, S, {width}), not {shape}")


def keeping(layer: spec.Layer, first: int) -> spec.Layer:
    """The same layer with at least so many positions that stay in sight."""
    heads = attention(layer)
    if heads.window.first >= first:
        return layer
    kept = replace(heads, window=replace(heads.window, first=first))
    return replace(layer, mixer=kept if heads is layer.mixer else replace(layer.mixer, base=kept))


def shared_rope(layer: spec.Layer) -> tuple[spec.Rope, int] | None:
    """(rope, head width) whose rotations all layers can share; learned frequencies belong to their layer."""
    heads = attention(layer)
    if heads.rope is None or isinstance(heads.rope.axes, spec.Mixed):
        return None
    return heads.rope, heads.head_dim


def cache_size(window: spec.Window, length: int | None, chunk: int) -> int:
    """Slots that make streaming equal to offline at any chunking up to `chunk`."""
    if window.right is None or window.right > 0:
        raise InputError(f"a layer that looks {'ahead' if window.right is None else f'{window.right} tokens ahead'} "
                         "cannot stream: its window must have right=0")
    reach = min(r for r in (window.left, window.chunk and window.chunk - 1, float("inf")) if r is not None)
    if reach == float("inf") and length is None:
        raise InputError("a layer without a window needs init_state(length=...), the longest stream in tokens")
    if length is not None and length <= window.first:
        raise InputError(f"a stream of length {length} is too short for {window.first} positions that stay in sight")
    return int(min(reach + chunk, length or float("inf")))
