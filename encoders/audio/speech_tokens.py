"""Whisper's special tokens, which follow its vocabulary of text in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mm.errors import InputError
from mm.tokenizer.tokenizer import Tokenizer

MULTILINGUAL = 51865  # entries from which on a vocabulary is multilingual
TASKS = ("translate", "transcribe")
MARKS = 1501  # from <|0.00|> to <|30.00|>
SECONDS = 0.02  # between two marks
LANGUAGES = tuple("""
    en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi ml cy
    sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am yi lo
    uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue
""".split())  # noqa: SIM905
SYMBOLS = [*'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
           *"<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split()]  # noqa: SIM905
MUSIC = "♩♪♫♬♭♮♯"


@dataclass(frozen=True)
class SpeechTokens:
    """Ids by the size of the whole vocabulary: text, end, start, languages, tasks, four marks of the prompt, times."""

    vocab: int

    @property
    def multilingual(self) -> bool:
        return self.vocab >= MULTILINGUAL

    @property
    def end(self) -> int:
        return 50257 if self.multilingual else 50256

    @property
    def start(self) -> int:
        return self.end + 1

    @property
    def languages(self) -> tuple[str, ...]:
        return LANGUAGES[: self.vocab - self.end - 8 - MARKS]

    @property
    def translate(self) -> int:
        """The first after the languages; transcribe, start of LM, start of previous text, no speech and no times
        follow."""
        return self.start + 1 + len(self.languages)

    @property
    def previous(self) -> int:
        return self.translate + 3

    @property
    def no_speech(self) -> int:
        return self.translate + 4

    @property
    def no_times(self) -> int:
        return self.translate + 5

    @property
    def times(self) -> int:
        """<|0.00|>"""
        return self.translate + 6

    def begin(self, language: str | None, task: str) -> list[int]:
        """What stands before the first word. Raises InputError for a language or task that the model does not know."""
        if task not in TASKS:
            raise InputError(f"the task should be transcribe or translate, not {task!r}")
        if not self.multilingual:
            if language not in (None, "en") or task != "transcribe":
                raise InputError("this model only transcribes English")
            return [self.start]
        return [self.start, self.language(language or "en"), self.translate + TASKS.index(task)]

    def language(self, code: str) -> int:
        if code not in self.languages:
            raise InputError(f"the language {code!r} is not one of {', '.join(self.languages)}")
        return self.start + 1 + self.languages.index(code)

    def names(self) -> list[str]:
        marks = [f"<|{i * SECONDS:.2f}|>" for i in range(MARKS)]
        others = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
        return [*(f"<|{name}|>" for name in ("endoftext", "startoftranscript", *self.languages, *others)), *marks]

    def silent(self, tokenizer: Tokenizer) -> list[int]:
        """Ids that transcripts never use: brackets, notes and other marks of what is not said, and special tokens."""
        ids = {tokenizer.encode(" -")[0], tokenizer.encode(" '")[0]}
        for symbol in [*SYMBOLS, *MUSIC]:
            for pieces in (tokenizer.encode(symbol), tokenizer.encode(" " + symbol)):
                if len(pieces) == 1 or symbol in MUSIC:
                    ids.add(pieces[0])
        return sorted({*ids, self.start, *range(self.translate, self.no_times)})

    @cached_property
    def ready(self) -> bool:
        """Whether the vocabulary is one of Whisper's."""
        return self.times + MARKS == self.vocab and len(self.languages) in (99, 100)
