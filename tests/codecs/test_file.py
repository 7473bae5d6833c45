"""The `.mimi` file: codes come back, foreign and broken files do not."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.codecs.file import Header, Reader, Writer
from mm.errors import InputError

HEADER = Header(model="kyutai/mimi ü", weights="0" * 16, rate=24000, frame=1920, channels=1, codebooks=8, size=2048)


def written(path, codes, header=HEADER, samples=None, cuts=()):
    with open(path, "wb") as file:
        writer = Writer(file, header)
        for piece in codes.tensor_split(cuts, 1):
            writer.write(piece)
        return writer.finish(codes.shape[1] * header.frame if samples is None else samples)


@settings(max_examples=20)
@given(st.integers(1, 9), st.sampled_from([2, 3, 64, 1000, 2048]), st.integers(1, 30), st.integers(1, 7))
def test_codes_come_back(tmp_path_factory, codebooks, size, frames, block):
    path = tmp_path_factory.mktemp("file") / "a.mimi"
    header = Header(**vars(HEADER) | {"codebooks": codebooks, "size": size})
    codes = torch.randint(size, (codebooks, frames))
    done = written(path, codes, header, cuts=(frames // 2,))
    reader = Reader(path)
    assert reader.header == done and torch.equal(torch.cat(list(reader.blocks(block)), 1), codes)
    assert path.stat().st_size == len(header.pack()) + frames * -(-codebooks * (size - 1).bit_length() // 8)


def test_eight_codebooks_of_2048_are_11_bytes_a_frame():
    assert HEADER.frame_bytes == 11  # 1.1 kbit/s at 12.5 frames a second


def changed(path, **fields):
    content = path.read_bytes()
    length = int.from_bytes(content[5:9], "little")
    text = json.dumps({name: value for name, value in (json.loads(content[9 : 9 + length]) | fields).items()
                       if value is not None}).encode()
    path.write_bytes(content[:5] + len(text).to_bytes(4, "little") + text + content[9 + length :])


@pytest.mark.parametrize("spoil, message", [
    (lambda p: p.write_bytes(b"RIFF" + b"0" * 50), "is not a .mimi file"),
    (lambda p: p.write_bytes(b""), "is not a .mimi file"),
    (lambda p: p.write_bytes(b"MIMI\x02" + b"0" * 50), "is of version 2"),
    (lambda p: p.write_bytes(p.read_bytes()[:7]), r"broken header \(it ends early\)"),
    (lambda p: p.write_bytes(p.read_bytes()[:60]), r"broken header \(it ends early\)"),
    (lambda p: p.write_bytes(p.read_bytes()[:5] + b"\xff" * 4 + p.read_bytes()[9:]), "broken header"),
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated: 54 bytes of codes where 5 frames take 55"),
    (lambda p: p.write_bytes(p.read_bytes() + b"0"), "longer than it says"),
    (lambda p: changed(p, rate=0), "a field has no sense"),
    (lambda p: changed(p, codebooks="8"), "a field has no sense"),
    (lambda p: changed(p, codebooks=True), "a field has no sense"),
    (lambda p: changed(p, frame=None), "broken header"),
    (lambda p: changed(p, colour="red"), "broken header"),
])
def test_foreign_and_broken_files(tmp_path, spoil, message):
    path = tmp_path / "a.mimi"
    written(path, torch.randint(2048, (8, 5)))
    spoil(path)
    with pytest.raises(InputError, match=message):
        Reader(path)


def test_a_code_outside_its_codebook(tmp_path):
    path = tmp_path / "a.mimi"
    written(path, torch.full((8, 5), 2047), Header(**vars(HEADER) | {"size": 2000}))
    with pytest.raises(InputError, match="the code 2047 is not in a codebook of 2000"):
        list(Reader(path).blocks(5))
