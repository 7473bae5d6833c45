"""Who asks, who answers, and what each of them says: the sentences of which dialogues are made.

People are played by the voices of Kokoro 82M (Apache-2.0), of which many are of other languages and speak English with
an accent, by blends of two such voices, and by four talkers of the Modified Rhyme Test (NIST, public domain), recorded
in a booth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations, zip_longest

import numpy as np

from ..data.sampler import generator
from ..duplex.questions import GREETINGS, READ, SUM, WORD, WORDS, Question, answers, greet, repeat, sum_of

OWN = "hibari"  # the model's one voice
VOICES = ("af_alloy", "af_aoede", "af_bella", "af_jessica", "af_kore", "af_nicole", "af_river", "af_sarah", "am_adam",
          "am_eric", "am_fenrir", "am_liam", "am_michael", "am_onyx", "am_santa", "bf_emma", "bf_isabella", "bf_lily",
          "bm_daniel", "bm_fable", "bm_lewis", "ef_dora", "em_alex", "em_santa", "ff_siwis", "hf_alpha", "hf_beta",
          "hm_omega", "hm_psi", "if_sara", "im_nicola", "jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro",
          "jm_kumo", "pf_dora", "pm_alex", "pm_santa", "zf_xiaobei", "zf_xiaoni", "zf_xiaoxiao", "zf_xiaoyi",
          "zm_yunjian", "zm_yunxi", "zm_yunxia", "zm_yunyang")
VOICES_HELD_OUT = ("af_sky", "af_nova", "am_echo", "am_puck", "bf_alice", "bm_george")
BLENDED = 100  # talkers whose voice lies between two of VOICES
PEOPLE = ("F1", "M3")
PEOPLE_HELD_OUT = ("F3", "M4")
HELD_OUT = frozenset(VOICES_HELD_OUT + PEOPLE_HELD_OUT)
SHARES, SHARES_HELD_OUT = (60, 40, len(GREETINGS)), (25, 15, 3)  # sums, words and greetings that a voice says
SHARES_BLENDED = (16, 22, 2)
SLOWEST, FASTEST = 0.85, 1.2
LINES, PAIRS = 40, 44  # the last number of the keys of random generators


@dataclass(frozen=True)
class Line:
    """What one talker says at a speed; `question` is None for the model's answers."""

    talker: str
    text: str
    speed: float = 1.0
    question: Question | None = None

    @property
    def file(self) -> str:
        """Where its sound lies in a folder of utterances: it depends on all that the sound depends on."""
        words = re.sub(r"[^a-z]+", "-", self.text.lower().replace("'", "")).strip("-")
        return f"{self.talker}/{words}_{self.speed:.2f}.flac"


def lines(seed: int, most: int | None = None) -> list[Line]:
    """All that is said, at `most` so many sentences by each talker: the answers, then one of each talker in turn, so
    that a part of the list already holds every voice."""
    shares = {talker: SHARES for talker in VOICES} | {talker: SHARES_HELD_OUT for talker in VOICES_HELD_OUT}
    shares |= {talker: SHARES_BLENDED for talker in blends()}
    scripts = [script(talker, each, generator(seed, index, LINES))
               for index, (talker, each) in enumerate(shares.items())]
    read = [[Line(talker, one.text, question=one) for one in (repeat(word, READ) for word in WORDS)]
            for talker in PEOPLE + PEOPLE_HELD_OUT]
    asked = scripts + read
    turns = zip_longest(*(one[:most] for one in asked))
    return [Line(OWN, text) for text in answers()] + [line for turn in turns for line in turn if line]


def blends() -> list[str]:
    """Pairs of voices, such as "af_bella+am_eric", always the same ones."""
    pairs = list(combinations(VOICES, 2))
    return ["+".join(pairs[i]) for i in generator(PAIRS).permutation(len(pairs))[:BLENDED]]


def script(talker: str, shares: tuple[int, int, int], random: np.random.Generator) -> list[Line]:
    """What a voice says, in random order: different sums, words and greetings, each in one phrasing."""
    digits, words = 10, list(WORDS)
    asked = [sum_of(pair // digits, pair % digits, SUM[random.integers(len(SUM))])
             for pair in random.permutation(digits * digits)[:shares[0]]]
    asked += [repeat(words[i], WORD[random.integers(len(WORD))]) for i in random.permutation(len(words))[:shares[1]]]
    asked += [greet(GREETINGS[i]) for i in random.permutation(len(GREETINGS))[:shares[2]]]
    return [Line(talker, asked[i].text, round(random.uniform(SLOWEST, FASTEST), 2), asked[i])
            for i in random.permutation(len(asked))]
