"""Weights in another order in memory: the same model."""

import copy

import pytest
import torch
from support import attention, close, redraw, stack

from mm import TextDecoder, spec
from mm.decode import Sampling
from mm.errors import InputError
from mm.lowbit import arrange, arrange_for_rows
from mm.spec import CAUSAL, DecoderSpec, Embed, Rope


def make(tied, **more):
    return redraw(TextDecoder(DecoderSpec(embed=Embed(vocab=61), context=64, head=spec.LMHead(tied=tied), stack=stack(
        attention(window=CAUSAL, rope=Rope(), **more), final_norm=spec.RMSNorm()))))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_values_names_and_files_stay(tied, tmp_path):
    model = make(tied)
    ids, before = torch.randint(61, (2, 9)), model.fingerprint()
    logits = model(ids)
    head = (model.embed.tokens if tied else arrange(model).head).weight
    arrange(model)
    assert head.stride(0) == 1 == model.stack.blocks[0].mixer.qkv.weight.stride(0)
    assert model.fingerprint() == before
    close(model(ids), logits)
    model.save_pretrained(tmp_path)
    assert TextDecoder.from_pretrained(tmp_path).fingerprint() == before


@pytest.mark.parametrize("tied, biases", [(True, False), (False, True)])
@torch.no_grad()
def test_a_model_for_many_rows_computes_the_same(tied, biases):
    model = make(tied, q_bias=biases, k_bias=biases, v_bias=biases, out_bias=biases)
    ids, prompts = torch.randint(61, (2, 9)), [[3], [4, 8, 15], list(range(30)), [7, 7], [60, 0]]
    logits, texts = model(ids), [out.ids for out in model.generate(prompts, Sampling(max_tokens=9))]
    model = arrange_for_rows(model)
    close(model(ids), logits)
    assert [out.ids for out in copy.deepcopy(model).generate(prompts, Sampling(max_tokens=9))] == texts
    with pytest.raises(InputError, match="float32 on a CPU"):
        arrange_for_rows(make(tied).bfloat16())
