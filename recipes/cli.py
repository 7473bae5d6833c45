"""The `mm` command: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import sys

from .common.command import dispatch

COMMANDS = {
    "demo": ("mm.recipes.commands.demo:Demo", "search emoji pictures in the browser with the weights that ship here"),
    "index": ("mm.recipes.search.index:IndexFolder", "write or refresh the index of a folder of pictures or texts"),
    "search": ("mm.recipes.search.query:Search", "find the pictures or passages that match a text or a picture"),
    "classify": ("mm.recipes.search.classify:Classify", "sort a folder of pictures by labels, zero-shot or as trained"),
    "features": ("mm.recipes.commands.features:Features", "vectors and feature maps of a folder of pictures"),
    "generate": ("mm.recipes.commands.generate:Generate", "continue a text, or chat"),
    "train": ("mm.recipes.commands.train:KINDS", "train a model: mm train clip --config clip_emoji.yaml"),
    "eval": ("mm.recipes.commands.evaluate:Evaluate", "zero-shot accuracy and recall of a model on a data set"),
    "codec": ("mm.recipes.commands.codec:COMMANDS", "encode sound files, decode or play codes"),
    "transcribe": ("mm.recipes.commands.transcribe:Transcribe", "the words of sound files, with times, by Whisper"),
    "talk": ("mm.recipes.commands.talk:Talk", "speak with a duplex model on a web page, or let it answer a sound file"),
    "dialogues": ("mm.recipes.makers.dialogues:Dialogues", "make the spoken dialogues that a duplex model learns from"),
    "convert": ("mm.recipes.commands.convert:Convert", "write a checkpoint in another layout"),
    "export": ("mm.recipes.commands.export:Export", "write the towers of a model as ONNX or torch.export files"),
    "info": ("mm.recipes.commands.info:Info", "what a checkpoint is: parts, parameters, memory, FLOPs, preprocessing"),
    "bench": ("mm.recipes.commands.bench:BENCHES", "measure this package against its peers"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; a mistake of the user's is one line on stderr and exit status 2."""
    from mm.errors import InputError

    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-V"], ["--version"]):
        from mm import __version__
        print(f"mm {__version__}")
        return 0
    try:
        return dispatch(COMMANDS, "mm", argv)
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


if __name__ == "__main__":
    sys.exit(main())
