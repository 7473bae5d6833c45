"""The `mm` command: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "demo": ("mm.recipes.commands.demo:demo", "search emoji pictures in the browser with the weights that ship here"),
    "index": ("mm.recipes.search.index:index", "write or refresh the search index of a folder of pictures or texts"),
    "search": ("mm.recipes.search.query:search", "find the pictures or passages that match a text or a picture"),
    "classify": ("mm.recipes.search.classify:classify", "sort a folder of pictures by labels, zero-shot or as trained"),
    "features": ("mm.recipes.commands.features:features", "vectors and feature maps of a folder of pictures"),
    "generate": ("mm.recipes.commands.generate:generate", "continue a text, or chat"),
    "train": ("mm.recipes.commands.train:train", "train a model: mm train clip --config clip_emoji.yaml"),
    "eval": ("mm.recipes.commands.evaluate:evaluate", "zero-shot accuracy and recall of a model on a data set"),
    "codec": ("mm.recipes.commands.codec:codec", "encode sound files, decode or play codes"),
    "transcribe": ("mm.recipes.commands.transcribe:transcribe", "the words of sound files, with times, by Whisper"),
    "talk": ("mm.recipes.commands.talk:talk", "speak with a duplex model on a web page, or let it answer a sound file"),
    "dialogues": ("mm.recipes.makers.dialogues:dialogues", "make the spoken dialogues that a duplex model learns from"),
    "convert": ("mm.recipes.commands.convert:convert", "write a checkpoint in another layout"),
    "export": ("mm.recipes.commands.export:export", "write the towers of a model as ONNX or torch.export files"),
    "info": ("mm.recipes.commands.info:info", "what a checkpoint is: parts, parameters, memory, FLOPs, preprocessing"),
    "bench": ("mm.recipes.commands.bench:bench", "measure this package against its peers"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; a mistake of the user's is one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from mm import __version__
        print(f"mm {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return complain(f"there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    return run(argv[0], argv[1:])


def run(name: str, argv: list[str]) -> int:
    from mm.errors import InputError
    module, function = COMMANDS[name][0].split(":")
    try:
        return getattr(importlib.import_module(module), function)(argv) or 0
    except InputError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return complain("interrupted", status=130)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        return complain(f"{error.filename}: {error.strerror}")


def complain(sentence: str, status: int = 2) -> int:
    print(f"mm: {sentence}", file=sys.stderr)
    return status


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: mm COMMAND ...\n\n{rows}\n\n`mm COMMAND --help` tells the options of each."


if __name__ == "__main__":
    sys.exit(main())
