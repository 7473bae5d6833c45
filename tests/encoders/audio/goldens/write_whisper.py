"""Writes whisper.json beside it: openai-whisper's greedy transcripts of 40 clips.

python tests/encoders/audio/goldens/write_whisper.py TINY.EN.PT FOLDER   (a folder with ljspeech/ and librispeech/)
"""

import json
import sys
from pathlib import Path

import torch
import whisper

from mm.encoders.audio.spectrogram import read_sound


def clips(folder):
    return [*sorted(folder.glob("ljspeech/wavs/*.*"))[:20], *sorted(folder.glob("librispeech/*/*.flac"))[:20]]


def main(model, folder):
    torch.set_num_threads(1)
    model = whisper.load_model(model, device="cpu")
    out = {}
    for path in clips(Path(folder)):
        found = model.transcribe(read_sound(path, 16000), temperature=0.0, fp16=False)
        times = [[round(one["start"], 2), round(one["end"], 2)] for one in found["segments"]]
        out[str(path.relative_to(folder))] = {"text": found["text"], "times": times}
    Path(__file__).with_name("whisper.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
