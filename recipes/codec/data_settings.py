"""What can be set about the sounds that a codec is trained on, as a plain dataclass that imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from mm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SoundData:
    """Folders of sounds, of any format, rate and number of channels.

    Args:
        path: the folders.
        val: folders to evaluate on (none: a share of the files of `path`).
        holdout: the share of the files that is held out for evaluation where there is no `val`.
        seconds: length of a training row.
        batch_size: rows of all processes together.
        gain: rows are made louder or softer by up to so many dB.
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
