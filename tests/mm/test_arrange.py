"""Weights in another order in memory: the same model."""

import pytest
import torch
from support import attention, close, redraw, stack

from mm import TextDecoder, spec
from mm.arrange import arrange
from mm.spec import CAUSAL, DecoderSpec, Embed, Rope


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_values_names_and_files_stay(tied, tmp_path):
    model = redraw(TextDecoder(DecoderSpec(embed=Embed(vocab=61), context=64, head=spec.LMHead(tied=tied), stack=stack(
        attention(sight=CAUSAL, rope=Rope()), final_norm=spec.RMSNorm()))))
    ids, before = torch.randint(61, (2, 9)), model.fingerprint()
    logits = model(ids)
    head = (model.embed.tokens if tied else arrange(model).head).weight
    arrange(model)
    assert head.stride(0) == 1 == model.stack.blocks[0].mixer.qkv.weight.stride(0)
    assert model.fingerprint() == before
    close(model(ids), logits)
    model.save_pretrained(tmp_path)
    assert TextDecoder.from_pretrained(tmp_path).fingerprint() == before
