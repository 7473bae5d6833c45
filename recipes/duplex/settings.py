"""What can be set about the training of a duplex model, as plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm.errors import InputError

from ..train.settings import Export, Lora, Optim, Trainer


@dataclass(frozen=True, kw_only=True)
class DuplexData:
    """Conversations with the time of every word.

    Args:
        path: a .jsonl file with a conversation a line: `path`, a stereo sound file (the left channel speaks, the
            right one is the user), or `own` and `heard`, two .mimi files; `alignments`, a .json file (none: that
            beside the sound) which holds a list `alignments` of [word, [start, end], speaker] in seconds, where
            SPEAKER_MAIN speaks; `conditions`, words by name, for a model with conditions. Paths are from that file's
            folder.
        val: another such file, to evaluate on.
        drill: another such file, which alone is trained on at first.
        drill_steps: steps in which `drill` is trained on.
        holdout: the share of the conversations that is held out where there is no `val`.
        codec: a Mimi to encode sound files with, a directory, a hub name or codec_small.
        cache: the folder that keeps their codes (none: one in the run's directory).
        tokenizer: a directory with the tokenizer of the text (none: the model's).
        late: whether a word that is still being written when the next one begins is dropped, or shifts it.
        drop: the share of the codes that the model hears which is hidden from it in training, others in every pass.
        length: frames of a row.
        batch_size: rows of a step, all processes together.
        workers: processes that encode sound files, and that make batches.
    """

    path: str
    val: str | None = None
    drill: str | None = None
    drill_steps: int = 0
    holdout: float = 0.05
    codec: str | None = None
    cache: str | None = None
    tokenizer: str | None = None
    late: Literal["drop", "shift"] = "drop"
    drop: float = 0.0
    length: int = 250
    batch_size: int = 8
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("holdout", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"data.{name} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if (self.drill is not None) != (self.drill_steps > 0):
            raise InputError("data.drill and a positive data.drill_steps go together")


@dataclass(frozen=True, kw_only=True)
class DuplexShape:
    """A model to be trained from scratch, in the layout of Moshi.

    Args:
        own: codebooks of the model's voice and of the other one, where the data hold as many.
        heard: codebooks of the model's voice and of the other one, where the data hold as many.
        width: width of the temporal stack.
        depth: layers of the temporal stack.
        heads: query heads of the temporal stack.
        kv_heads: key and value heads of the temporal stack (none: as many as heads).
        mlp: ratio of the hidden width of the temporal stack's gated MLPs to its width.
        context: frames that it sees.
        deep_width: width of the depth transformer.
        deep_depth: layers of the depth transformer.
        deep_heads: heads of the depth transformer.
        sets: sets of weights that the steps of the depth transformer have; later steps share the last (none: one each).
        rank: width of its embedding tables before a projection (none: its own width).
        delay: in frames, of all codebooks but a voice's first.
        hears: what its tables of heard codes are made of in training, a learned projection of the codec's own
            vectors, or rows of their own for codes.
    """

    own: int = 8
    heard: int = 8
    width: int = 320
    depth: int = 6
    heads: int = 5
    kv_heads: int | None = None
    mlp: float = 2.75
    context: int = 250
    deep_width: int = 192
    deep_depth: int = 2
    deep_heads: int = 3
    sets: int | None = None
    rank: int | None = None
    delay: int = 1
    hears: Literal["vectors", "codes"] = "codes"

    def __post_init__(self) -> None:
        for name in ("own", "heard", "width", "depth", "heads", "kv_heads", "deep_width", "deep_depth", "deep_heads",
                     "sets"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise InputError(f"shape.{name} must be at least 1, not {count}")
        for width, heads in ((self.width, self.heads), (self.deep_width, self.deep_heads)):
            if width % heads or width // heads % 2:
                raise InputError(f"a width of {width} does not give {heads} heads of one even width")


@dataclass(frozen=True, kw_only=True)
class DuplexLoss:
    """Cross-entropy of the text plus that of the codes, each a weighted mean over the model's own streams.

    Args:
        first_codebook: weight of a code of the first codebook; the others have weight 1.
        text_padding: weight of the padding of the text; words have weight 1.
        depth: the share of the frames, others in every step, whose codes count and from which the depth transformer
            learns; the text counts in all. Less than 1 costs less (Schalkwyk et al., 2025, CSM).
        still: how likely such a frame is one in which the model's first code stays the same for the third time, as in
            silence, against any other frame. Less than 1 learns more from the same number of frames.
    """

    first_codebook: float = 100.0
    text_padding: float = 0.5
    depth: float = 1.0
    still: float = 1.0

    def __post_init__(self) -> None:
        for name in ("depth", "still"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"loss.{name} must lie in (0, 1], not {getattr(self, name)}")
        if min(self.first_codebook, self.text_padding) < 0:
            raise InputError("loss.first_codebook and text_padding must not be negative")


@dataclass(frozen=True, kw_only=True)
class DuplexOptim(Optim):
    """AdamW as for every run, with the values that suit a duplex model."""

    lr: float = 1e-3
    beta2: float = 0.95
    eps: float = 1e-8
    ema: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DuplexExport(Export):
    """The model directory written at the end.

    Args:
        dtype: the type of its weights.
        temp: the temperatures of codes and text which its config tells to speak with, 0 takes the likeliest (none:
            what the config of `model` says, else the usual ones).
        temp_text: the temperatures of codes and text which its config tells to speak with, 0 takes the likeliest
            (none: what the config of `model` says, else the usual ones).
    """

    temp: float | None = None
    temp_text: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.temperatures().items():
            if not 0 <= value < float("inf"):
                raise InputError(f"export.{name} must be 0 or more, not {value}")

    def temperatures(self) -> dict[str, float]:
        """Those that are given."""
        given = {"temp": self.temp, "temp_text": self.temp_text}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class DuplexJob:
    """Train a duplex model on conversations, or go on with one.

    Args:
        out: the directory of the run; the same command continues what is there.
        model: a checkpoint (directory or hub name) to go on from, with its own tokenizer, instead of a new `shape`.
        lora: none trains the model itself.
        checkpointing: recompute every n-th block in the backward pass instead of keeping its activations (0: none).
        compile: the blocks of the temporal stack, by torch.compile.
        shard: spread weights, gradients and optimizer state over the devices (FSDP2) instead of a copy on each (DDP).
    """

    data: DuplexData
    out: str = "runs/duplex"
    model: str | None = None
    shape: DuplexShape = DuplexShape()
    loss: DuplexLoss = DuplexLoss()
    lora: Lora | None = None
    checkpointing: int = 0
    compile: bool = False
    shard: bool = False
    optim: DuplexOptim = DuplexOptim()
    trainer: Trainer = Trainer()
    export: DuplexExport = DuplexExport()

    def __post_init__(self) -> None:
        if self.checkpointing < 0:
            raise InputError(f"checkpointing must not be negative, not {self.checkpointing}")
        if self.model is None and self.data.tokenizer is None:
            raise InputError("a new model needs data.tokenizer, a directory with the tokenizer of the text")
