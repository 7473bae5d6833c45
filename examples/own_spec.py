"""A model of your own shape: layers alternate between a window and the whole text. Trains for 20 steps.

    python examples/own_spec.py
"""

import torch
import torch.nn.functional as F

from mm import TextDecoder
from mm.spec import CAUSAL, Attention, DecoderSpec, Embed, Layer, LMHead, Mlp, RMSNorm, Rope, Stack, Window
from mm.spec.schema import to_json


def spec(width: int = 64, depth: int = 4, heads: int = 4, vocab: int = 256) -> DecoderSpec:
    """Every second layer sees the last 16 tokens only."""
    def layer(window: Window) -> Layer:
        mixer = Attention(heads=heads, kv_heads=heads, head_dim=width // heads, window=window, rope=Rope(), sinks=True)
        return Layer(mixer=mixer, mlp=Mlp(hidden=3 * width, act="silu", gated=True), norm=RMSNorm())
    windows = [Window(left=15, right=0), CAUSAL] * (depth // 2)
    stack = Stack(dim=width, layers=tuple(map(layer, windows)), final_norm=RMSNorm())
    return DecoderSpec(embed=Embed(vocab=vocab), stack=stack, head=LMHead(tied=True), context=512)


def main() -> None:
    torch.manual_seed(0)
    model = TextDecoder(spec())
    ids = torch.tensor([list(b"the sun and the moon and the stars and the sea " * 4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, a spec of {len(to_json(model.spec))} characters")
    model.save_pretrained("own_spec")          # mm generate, mm info and mm train lm --model open it
    assert TextDecoder.from_pretrained("own_spec").spec == model.spec


if __name__ == "__main__":
    main()
