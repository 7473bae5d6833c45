"""Dataclasses of tensors as pytrees, so that compile, export, vmap and files of exported programs see through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def register(cls: type, meta: tuple[str, ...] = ()) -> type:
    """Make a dataclass a pytree; the fields in `meta` are constants, all others are children."""
    names = [f.name for f in dataclasses.fields(cls) if f.name not in meta]

    def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(x, name) for name in names], tuple(getattr(x, name) for name in meta)

    def unflatten(children: list[Any], context: tuple[Any, ...]) -> Any:
        return cls(**dict(zip(names, children, strict=True)), **dict(zip(meta, context, strict=True)))

    def flatten_with_keys(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [(pytree.GetAttrKey(name), getattr(x, name)) for name in names], flatten(x)[1]

    pytree.register_pytree_node(cls, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys,
                                serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
                                to_dumpable_context=list, from_dumpable_context=tuple)
    torch.serialization.add_safe_globals([cls])
    return cls


def tensors(x: Any) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) for every tensor in a tree."""
    def step(key: Any) -> str:
        return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))
    for path, leaf in pytree.tree_flatten_with_path(x)[0]:
        if isinstance(leaf, Tensor):
            yield ".".join(map(step, path)), leaf
