"""Settings of the training of a codec: plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from mm.errors import InputError

from ...codecs.spec import Learning
from ..train.settings import Export, Optim, Trainer


@dataclass(frozen=True, kw_only=True)
class SoundData:
    """Folders of sounds, of any format, rate and number of channels.

    Args:
        path: the folders.
        val: folders to evaluate on (none: a share of the files of `path`).
        holdout: the share of the files that is held out for evaluation where there is no `val`.
        seconds: length of a training row.
        batch_size: rows of a step, all processes together.
        gain: rows are made louder or softer by up to this many dB.
        lowpass: the probability that a row loses what lies above a random frequency, from 3.4 kHz on, in what the
            codec hears and in what it should give back alike; sounds of a lower rate than the codec's have lost it
            already.
        limit: most files of a folder that are held out (they are evaluated as a whole).
        workers: processes that read.
    """

    path: tuple[str, ...]
    val: tuple[str, ...] = ()
    holdout: float = 0.02
    limit: int = 16
    seconds: float = 2.0
    batch_size: int = 8
    gain: float = 6.0
    lowpass: float = 0.1
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.path:
            raise InputError("data.path should name at least one folder of sounds")
        if not 0 <= self.holdout < 1 or not 0 <= self.lowpass <= 1:
            raise InputError("data.holdout must lie in [0, 1) and data.lowpass in [0, 1], not "
                             f"{self.holdout} and {self.lowpass}")
        if self.seconds <= 0 or self.gain < 0:
            raise InputError(f"data.seconds must be positive and data.gain not negative, not {self.seconds} and "
                             f"{self.gain}")
        for name in ("batch_size", "limit"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CodecShape:
    """A Mimi to be trained from scratch; the default is the published size, with 8 codebooks.

    Args:
        rate: in Hz.
        filters: channels of the convolutions at that rate, doubled at every stride.
        ratios: the decoder's strides in order.
        width: width of the transformers on either side.
        depth: layers of the transformers on either side.
        heads: heads of the transformers on either side.
        hidden: hidden width of the MLPs of the transformers on either side.
        window: steps that they see, of which there are `stride` in a frame. codebooks, the first of them semantic, of
            `size` entries of `dim` numbers.
    """

    rate: int = 24000
    filters: int = 64
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    width: int = 512
    depth: int = 8
    heads: int = 8
    hidden: int = 2048
    window: int = 250
    stride: int = 2
    codebooks: int = 8
    size: int = 2048
    dim: int = 256


@dataclass(frozen=True, kw_only=True)
class CodecLoss:
    """What each term is multiplied by.

    Args:
        mel: the distance of log-mel spectrograms at several resolutions; 0 trains by the discriminators alone, as the
            published codec was.
        commit: the distance of vectors to their entries.
        adversarial: weight of the discriminators' judgement of the output (0: there are none)
        features: weight of the distance between the discriminators' features of the output and of the original.
        adversarial_from: the step at which these two begin.
        teacher: a speech encoder whose hearing the semantic codebook should hold: a Whisper (directory, hub name, or
            OpenAI's .pt file) or a HuBERT directory (none: no such term).
        semantic: its weight.
    """

    mel: float = 15.0
    commit: float = 0.25
    adversarial: float = 1.0
    features: float = 2.0
    adversarial_from: int = 0
    teacher: str | None = None
    semantic: float = 4.0

    def __post_init__(self) -> None:
        for name in ("mel", "commit", "adversarial", "features", "adversarial_from", "semantic"):
            if getattr(self, name) < 0:
                raise InputError(f"loss.{name} must not be negative, not {getattr(self, name)}")
        if not self.mel and not self.adversarial:
            raise InputError("loss.mel and loss.adversarial are both 0: nothing measures the output")


@dataclass(frozen=True, kw_only=True)
class Critics:
    """The discriminators, one for each window of `windows` samples.

    Args:
        filters: their channels.
        lr: their learning rate, as a share of the codec's.
    """

    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    filters: int = 32
    lr: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CodecOptim(Optim):
    """As for every run."""

    lr: float = 8e-4
    weight_decay: float = 0.05
    beta1: float = 0.8
    beta2: float = 0.99
    eps: float = 1e-8
    warmup: int = 500
    clip: float = 10.0
    ema: float = 0.999


@dataclass(frozen=True, kw_only=True)
class CodecJob:
    """Train a neural codec on folders of sounds.

    Args:
        out: the directory of the run; the same command continues what is there.
        model: a Mimi (directory, hub name, Kyutai's file, or codec_small) to go on from, instead of a new `shape`.
        decoder_only: train the decoder alone; the encoder stays as it is, and with it every code.
        books: settings of the codebooks' learning.
        critics: the discriminators.
    """

    data: SoundData
    out: str = "runs/codec"
    model: str | None = None
    decoder_only: bool = False
    shape: CodecShape = CodecShape()
    books: Learning = Learning()
    loss: CodecLoss = CodecLoss()
    critics: Critics = Critics()
    optim: CodecOptim = CodecOptim()
    trainer: Trainer = Trainer()
    export: Export = Export()

    def __post_init__(self) -> None:
        if self.decoder_only and self.model is None:
            raise InputError("decoder_only needs a model whose codes there are")
