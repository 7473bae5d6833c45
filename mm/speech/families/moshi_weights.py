"""Kyutai's weights of a duplex model: their names in its files and in its package's memory, int8 matrices, and low-rank
changes as moshi-finetune saves them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Keys
from mm.checkpoint.files import Weights
from mm.checkpoint.tables import GATE_UP, STACKED, Rule, Table, WeightTransform, fused, rule
from mm.errors import InputError
from mm.spec import Depth, DuplexSpec, Layer, Norm, RMSNorm

ALPHA = WeightTransform(lambda xs: [xs[0].reshape(-1)], lambda xs: [xs[0].reshape(1, 1, -1)])
SCALES = "_scb"
CHANGES, MERGED = "lora.safetensors", "consolidated.safetensors"  # moshi-finetune writes the one or the other
DOWN, UP, FROZEN = ".lora_A.weight", ".lora_B.weight", ".frozen_W.weight"
UNUSED = "an input of a depth transformer that the model does not have"


def table(spec: DuplexSpec, names: Iterable[str]) -> Table:
    """Attention's projections have three spellings: joined (`in_proj_weight` or `in_proj.weight`) or one per set."""
    names = list(names)
    memory = any(".in_projs." in name for name in names)
    joined = "in_proj.weight" if any(name.endswith(".in_proj.weight") for name in names) else "in_proj_weight"
    rules = [rule(each("emb.{}.weight", spec.codebooks), "codes.weight", STACKED), *text_rules("text_emb", "text"),
             rule("text_linear.{x}", "head.{x}"), rule("extra_heads.{n}.weight", "extra.{n}.weight"),
             *norm_rules("out_norm", "stack.final_norm", spec.stack.final_norm)]
    for layer in dict.fromkeys(spec.stack.layers):
        rules += layer_rules("transformer.layers.{n}.", "stack.blocks.{n}.", layer, joined, memory)
    if spec.depth is not None:
        rules += depth_rules(spec.depth, joined, memory)
    if spec.conditioning is not None:
        for one in spec.conditioning.conditions:
            theirs, ours = f"condition_provider.conditioners.{one.name}.", f"conditions.of.{one.name}."
            rules += [rule(theirs + "embed.weight", ours + "table"), rule(theirs + "output_proj.weight",
                      ours + "out.weight"), rule(theirs + "learnt_padding", ours + "absent", ALPHA)]
    return Table(tuple(dict.fromkeys(rules)), {} if spec.depth else {"depformer_in.{n}.weight": UNUSED})


def each(pattern: str, count: int) -> tuple[str, ...]:
    """The pattern with 0, 1, ... in its place `{}`."""
    return tuple(pattern.replace("{}", str(i)) for i in range(count))


def text_rules(theirs: str, ours: str) -> list[Rule]:
    names = {"weight": "weight", "low_rank.weight": "up.weight", "out1.weight": "first.weight",
             "out2.weight": "second.weight"}
    return [rule(f"{theirs}.{name}", f"{ours}.{mine}") for name, mine in names.items()]


def norm_rules(theirs: str, ours: str, norm: Norm | None) -> list[Rule]:
    if isinstance(norm, RMSNorm):
        return [rule(theirs + ".alpha", ours + ".weight", ALPHA)]
    return [rule(theirs + ".{x}", ours + ".{x}")]


def layer_rules(theirs: str, ours: str, layer: Layer, joined: str, memory: bool) -> list[Rule]:
    """The temporal stack's."""
    into, out = ("in_projs.0.weight", "out_projs.0.weight") if memory else (joined, "out_proj.weight")
    rules = [rule(f"{theirs}self_attn.{into}", ours + "mixer.qkv.weight"),
             rule(f"{theirs}self_attn.{out}", ours + "mixer.out.weight"),
             *norm_rules(theirs + "norm1", ours + "mixer_norm", layer.norm),
             *norm_rules(theirs + "norm2", ours + "mlp_norm", layer.norm)]
    if layer.mlp.gated:
        rules += [rule(theirs + "gating.linear_in.weight", (ours + "mlp.gate.weight", ours + "mlp.up.weight"), GATE_UP),
                  rule(theirs + "gating.linear_out.weight", ours + "mlp.down.weight")]
    else:
        rules += [rule(theirs + "linear1.weight", ours + "mlp.up.weight"),
                  rule(theirs + "linear2.weight", ours + "mlp.down.weight")]
    rules += scale_rules(theirs, ours)
    if layer.cross is not None:
        width = layer.cross.heads * layer.cross.head_dim
        back = fused(width, 2 * layer.cross.kv_heads * layer.cross.head_dim).inverse()  # one of theirs, two of ours
        rules += [rule(f"{theirs}cross_attention.{into}", (ours + "cross.q.weight", ours + "cross.kv.weight"), back),
                  rule(f"{theirs}cross_attention.{out}", ours + "cross.out.weight"),
                  rule(theirs + "norm_cross.{x}", ours + "cross_norm.{x}")]
    return rules


def scale_rules(theirs: str, ours: str) -> list[Rule]:
    names = {"layer_scale_1": "mixer_scale", "layer_scale_2": "mlp_scale", "layer_scale_cross": "cross_scale"}
    return [rule(f"{theirs}{name}.scale", ours + mine) for name, mine in names.items()]


def depth_rules(depth: Depth, joined: str, memory: bool) -> list[Rule]:
    count, sets, layer = depth.codebooks, depth.sets, depth.stack.layers[0]
    inputs = 1 if depth.one_input else sets
    rules = [rule(each("depformer_in.{}.weight", inputs), "depth.input.weight", STACKED),
             *text_rules("depformer_text_emb", "depth.text"),
             rule(each("linears.{}.weight", count), "depth.head.weight", STACKED),
             rule(each("linears.{}.bias", count), "depth.head.bias", STACKED)]
    if count > 1:
        rules += [rule(each("depformer_emb.{}.weight", count - 1), "depth.codes.weight", STACKED),
                  rule(each("depformer_emb.{}.low_rank.weight", count - 1), "depth.up.weight", STACKED)]
    rules += [rule(each(f"depformer_norms.{{}}.{x}", count), f"depth.stack.final_norm.{x}", STACKED)
              for x in ("weight", "bias")]
    theirs, ours = "depformer.layers.{n}.", "depth.stack.blocks.{n}."
    for name, one, mine in (("in", joined, "qkv"), ("out", "out_proj.weight", "out")):
        per_set = each(f"{theirs}self_attn.{name}_projs.{{}}.weight", sets)
        rules.append(rule(per_set, f"{ours}mixer.{mine}.weight", STACKED) if memory else
                     rule(f"{theirs}self_attn.{one}", f"{ours}mixer.{mine}.weight", in_sets(sets)))
    gates = each(theirs + "gating.{}.linear_in.weight", sets), each(theirs + "gating.{}.linear_out.weight", sets)
    widths = depth.hidden or (layer.mlp.hidden,) * sets
    return [*rules, rule(gates[0], ours + "mlp.up.weight", padded(widths, 2)),
            rule(gates[1], ours + "mlp.down.weight", padded(widths, 1)), *scale_rules(theirs, ours),
            *norm_rules(theirs + "norm1", ours + "mixer_norm", layer.norm),
            *norm_rules(theirs + "norm2", ours + "mlp_norm", layer.norm)]


def in_sets(sets: int) -> WeightTransform:
    """One matrix of all sets' rows, and (sets, rows, D)."""
    return WeightTransform(lambda xs: [xs[0].unflatten(0, (sets, -1))], lambda xs: [xs[0].flatten(0, 1)])


def padded(widths: Sequence[int], parts: int) -> WeightTransform:
    """Projections of a gated MLP per set, of these widths, and all of them as wide as the widest: (sets, 2 H, D) from
    two `parts` into it, (sets, D, H) out of it."""
    most = max(widths)

    def load(xs: Sequence[Tensor]) -> list[Tensor]:
        if parts == 1:
            return [torch.stack([torch.nn.functional.pad(x, (0, most - w)) for x, w in zip(xs, widths, strict=True)])]
        rows = [torch.nn.functional.pad(x.unflatten(0, (2, w)), (0, 0, 0, most - w)).flatten(0, 1)
                for x, w in zip(xs, widths, strict=True)]
        return [torch.stack(rows)]

    def save(xs: Sequence[Tensor]) -> list[Tensor]:
        if parts == 1:
            return [x[:, :w] for x, w in zip(xs[0], widths, strict=True)]
        return [x.unflatten(0, (2, most))[:, :w].flatten(0, 1) for x, w in zip(xs[0], widths, strict=True)]
    return WeightTransform(load, save)


def dequantised(weights: Weights) -> Weights:
    """The same with every int8 matrix times the scale of its rows, which lies beside it under its name and `_scb`."""
    scaled = {name for name in weights.shapes if name + SCALES in weights.shapes}
    if not scaled:
        return weights

    def read(name: str) -> Tensor:
        value = weights.read(name)
        if name not in scaled:
            return value
        return value.float() * (weights.read(name + SCALES).float() / 127).reshape(-1, *[1] * (value.ndim - 1))
    shapes = {name: shape for name, shape in weights.shapes.items() if name.removesuffix(SCALES) not in scaled
              or name in scaled}
    return Weights(weights.where, shapes, read)


# ----------------------------------------------------------------------------------------- low-rank changes
def with_changes(folder: Path, config: Mapping[str, Any], weights: Weights) -> Weights:
    """The weights of a directory whose config says `lora`, with the changes beside them. Raises InputError."""
    opened, keys = Path(weights.where), Keys(config, str(folder / checkpoint.CONFIG))
    file = folder / keys.take("lora_name", str, CHANGES)
    if opened.name == MERGED:
        return weights
    if opened == file:
        name = keys.take("moshi_name", str, checkpoint.WEIGHTS)
        raise InputError(f"{file} holds changes of another model's weights: put those beside it as {name}, or let "
                         f"moshi_name in {folder / checkpoint.CONFIG} say where they are")
    if not file.is_file():
        raise InputError(f"{folder / checkpoint.CONFIG} says lora, but there is no {file}")
    return merged(weights, checkpoint.open_files([file], False), keys.positive("lora_rank", 128),
                  float(keys.take("lora_scaling", (int, float), 2.0)))


def merged(weights: Weights, changes: Weights, rank: int, scale: float) -> Weights:
    """A weight plus `scale` times up @ down where a layer has that pair, in float32, and tensors that the changes hold
    whole, such as embeddings, in place of the model's. Raises InputError for what does not fit."""
    pairs: dict[str, list[str]] = defaultdict(list)
    for name in sorted(changes.shapes, key=lambda name: (len(name), name)):  # numbers at their end in order
        if name.endswith(DOWN):
            pairs[target(name.removesuffix(DOWN), weights, changes.where)].append(name.removesuffix(DOWN))
    whole = {target(name.removesuffix(FROZEN).removesuffix(".weight"), weights, changes.where): name
             for name in changes.shapes if not name.endswith((DOWN, UP))}
    for name, layers in pairs.items():
        check(name, layers, weights, changes, rank)
    for name, theirs in whole.items():
        if changes.shapes[theirs] != weights.shapes[name]:
            raise InputError(f"{changes.where}: {theirs} is {changes.shapes[theirs]}, in {weights.where} it is "
                             f"{weights.shapes[name]}")

    def read(name: str) -> Tensor:
        value = changes.read(whole[name]) if name in whole else weights.read(name)
        if name not in pairs:
            return value
        change = [changes.read(layer + UP).float() @ changes.read(layer + DOWN).float() for layer in pairs[name]]
        return value.float() + scale * torch.cat(change)
    return Weights(weights.where, weights.shapes, read, weights.read(next(iter(pairs))).dtype if pairs else None)


def target(layer: str, weights: Weights, where: str) -> str:
    """The weight that a layer is, under its own name or, with further ones, joined as `in_proj_weight`."""
    place, _, number = layer.rpartition("projs.")
    joined = [place + end for end in ("proj_weight", "proj.weight")] if number.isdigit() else []
    found = [name for name in (layer + ".weight", *joined) if name in weights.shapes]
    if not found:
        raise InputError(f"{where} changes {layer}, which is not in {weights.where}")
    return found[0]


def check(name: str, layers: Iterable[str], weights: Weights, changes: Weights, rank: int) -> None:
    rows = 0
    for layer in layers:
        down, up = changes.shapes[layer + DOWN], changes.shapes.get(layer + UP)
        if up is None:
            raise InputError(f"{changes.where} holds {layer + DOWN} without {layer + UP}")
        if len(down) != 2 or len(up) != 2 or (down[0], up[1]) != (rank, rank) or down[1] != weights.shapes[name][1]:
            raise InputError(f"{changes.where}: {layer} is changed by {up} times {down}, which by a lora_rank of "
                             f"{rank} is not for a weight {weights.shapes[name]}")
        rows += up[0]
    if rows != weights.shapes[name][0]:
        raise InputError(f"{changes.where}: {rows} rows of {name} are changed, it has {weights.shapes[name][0]}")
