"""The files of sentence-transformers beside an encoder: its modules, the pooling, the longest text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Keys, Opened
from mm.checkpoint.files import Folder, Weights
from mm.checkpoint.hf import FILES
from mm.checkpoint.tables import Table, rule
from mm.errors import InputError
from mm.spec import Dense, EncoderSpec, SentencePooling

MODULES, LIMITS, SETTINGS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
PREFIX = "sentence."  # before the names of the projection's weights, which lie in a file of their own
MODES = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
ACTS = {"Tanh": "tanh", "Identity": "none"}


def complete(folder: Folder, opened: Opened) -> Opened:
    """An encoder with the pooling that its directory describes, if any. Raises InputError for modules, poolings and
    prompts that are not known."""
    if not (folder / MODULES).is_file():
        return opened
    steps = modules_of(folder / MODULES)
    if not steps or steps[0][0] != "Transformer" or steps[0][1] not in ("", "."):
        raise InputError(f"{folder / MODULES}: the first module should be a Transformer in the directory itself")
    pooling, weights, table = None, opened.weights, opened.table
    for kind, path in steps[1:]:
        if kind == "Pooling" and pooling is None:
            pooling = SentencePooling(over=pooled_over(folder.path / path / "config.json"))
        elif kind == "Dense" and pooling is not None and pooling.projection is None and not pooling.normalise:
            pooling = replace(pooling, projection=projection_of(folder.path / path / "config.json"))
            weights, table = with_projection(weights, table, folder.path / path)
        elif kind == "Normalize" and pooling is not None:
            pooling = replace(pooling, normalise=True)
        else:
            raise InputError(f"{folder / MODULES}: the module {kind} at this place is not supported")
    refuse_prompt(folder / SETTINGS)
    if pooling is None:
        return opened
    length, lower = limits(folder / LIMITS)
    spec, extras = replace(opened.spec, pooling=replace(pooling, length=length)), opened.extras
    if lower and extras.tokenizer is not None:
        extras = replace(extras, tokenizer=replace(extras.tokenizer, clean="lowercase"))
    return Opened(spec, weights, table, extras)


def modules_of(path: Path) -> list[tuple[str, str]]:
    """(class name, folder) of each module, in order."""
    try:
        entries = checkpoint.json.loads(path.read_text("utf-8"))
        return [(entry["type"].rsplit(".", 1)[-1], entry["path"]) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no list of modules with a type and a path ({error})") from None


def pooled_over(path: Path) -> str:
    config = checkpoint.read_json(path)
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else [
        name.removeprefix("pooling_mode_") for name, on in config.items() if name.startswith("pooling_mode_") and on]
    modes = [MODES.get(mode, mode) for mode in modes]
    if len(modes) != 1 or modes[0] not in MODES.values():
        raise InputError(f"{path}: the pooling {' with '.join(map(str, modes)) or 'none'} is not known, "
                         "only one of mean, cls and max")
    return modes[0]


def projection_of(path: Path) -> Dense:
    keys = Keys(checkpoint.read_json(path), str(path))
    act = keys.take("activation_function", str, "torch.nn.modules.activation.Tanh").rsplit(".", 1)[-1]
    if act not in ACTS:
        raise InputError(f"{path}: the activation {act} is not known, only {' and '.join(ACTS)}")
    return Dense(inputs=keys.positive("in_features"), outputs=keys.positive("out_features"),
                      bias=keys.take("bias", bool, True), act=ACTS[act])


def with_projection(weights: Weights, table: Table, folder: Path) -> tuple[Weights, Table]:
    """The encoder's weights with those of the projection beside them, under `PREFIX`."""
    more = checkpoint.open_weights(folder, FILES)
    shapes = {**weights.shapes, **{PREFIX + name: shape for name, shape in more.shapes.items()}}

    def read(name: str) -> Any:
        return more.read(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else weights.read(name)
    rules = (*table.rules, rule(PREFIX + "linear.{x}", "pooling.projection.{x}"))
    return Weights(weights.where, shapes, read), Table(rules, table.ignored)


def refuse_prompt(path: Path) -> None:
    config = checkpoint.read_json(path) if path.is_file() else {}
    name = config.get("default_prompt_name")
    if name and (config.get("prompts") or {}).get(name):
        raise InputError(f"{path}: a default prompt ({name}) before every text is not supported")


def limits(path: Path) -> tuple[int | None, bool]:
    """The longest text in tokens and whether texts are lower-cased first."""
    config: Mapping[str, Any] = checkpoint.read_json(path) if path.is_file() else {}
    keys = Keys(config, str(path))
    return keys.take("max_seq_length", int, None), keys.take("do_lower_case", bool, False)


def write_modules(folder: Path, spec: EncoderSpec) -> None:
    """The files that sentence-transformers and `complete` read."""
    pooling = spec.pooling
    kinds = ["Transformer", "Pooling", *(["Normalize"] if pooling.normalise else [])]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    mode = {ours: theirs for theirs, ours in MODES.items()}[pooling.over]
    flags = {f"pooling_mode_{name}": name == mode for name in MODES}
    for path in paths[1:]:
        (folder / path).mkdir(exist_ok=True)
    checkpoint.write_json(folder / paths[1] / "config.json", {"word_embedding_dimension": spec.stack.dim, **flags})
    checkpoint.write_json(folder / LIMITS, {"max_seq_length": pooling.length or spec.context, "do_lower_case": False})
    checkpoint.write_json(folder / MODULES, [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))])
