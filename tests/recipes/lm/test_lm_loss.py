"""The loss over the vocabulary in chunks is the cross-entropy of all logits, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F

from mm.errors import InputError
from mm.recipes.lm.loss import decoder_loss, vocabulary_loss
from mm.spec import CAUSAL, Attention, DecoderSpec, Embed, Layer, LMHead, Mlp, RMSNorm, Stack
from mm.text.decoder import TextDecoder

CASES = [(0.0, 0.0, False), (0.0, 0.0, True), (3.0, 0.0, True), (3.0, 0.01, False), (0.0, 0.01, True)]


def drawn(bias: bool = False, kind: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden, weight, offset = (torch.randn(*shape, dtype=kind, requires_grad=True) for shape in ((7, 5), (11, 5), (11,)))
    targets = torch.randint(11, (7,))
    targets[2] = -100
    return hidden, weight, offset if bias else None, targets


def plain(hidden, weight, bias, targets, softcap, z_loss):
    logits = F.linear(hidden, weight, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    square = logits.logsumexp(-1)[targets != -100].square().mean()
    return F.cross_entropy(logits, targets) + z_loss * square


@pytest.mark.parametrize(("softcap", "z_loss", "bias"), CASES)
@pytest.mark.parametrize("rows", [3, 100])
def test_equals_cross_entropy_of_all_logits(softcap, z_loss, bias, rows):
    hidden, weight, offset, targets = drawn(bias)
    inputs = [x for x in (hidden, weight, offset) if x is not None]
    loss, entropy = vocabulary_loss(hidden, weight, targets, offset, softcap=softcap, z_loss=z_loss, rows=rows)
    wanted = plain(hidden, weight, offset, targets, softcap, z_loss)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(entropy, plain(hidden, weight, offset, targets, softcap, 0.0).detach())
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("softcap", "z_loss", "bias"), CASES)
def test_gradcheck(softcap, z_loss, bias):
    hidden, weight, offset, targets = drawn(bias)

    def loss(*inputs):
        return vocabulary_loss(inputs[0], inputs[1], targets, *inputs[2:], softcap=softcap, z_loss=z_loss, rows=3)[0]

    assert torch.autograd.gradcheck(loss, [x for x in (hidden, weight, offset) if x is not None])


def test_no_targets_give_zero_and_zero_gradients():
    hidden, weight, _, targets = drawn()
    loss, entropy = vocabulary_loss(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == entropy.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_frozen_weight_gets_no_gradient_and_none_are_made_without_grad():
    hidden, weight, _, targets = drawn()
    vocabulary_loss(hidden, weight.detach(), targets)[0].backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not vocabulary_loss(hidden, weight, targets)[0].requires_grad


def test_autocast_keeps_gradients_in_the_weights_dtype():
    hidden, weight, _, targets = drawn(kind=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocabulary_loss(hidden, weight, targets, rows=3)[0]
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    assert abs(loss.item() - plain(hidden, weight, None, targets, 0.0, 0.0).item()) < 0.05


def test_bad_shapes():
    hidden, weight, _, targets = drawn()
    with pytest.raises(InputError, match="do not fit"):
        vocabulary_loss(hidden, weight, targets[:-1])


@pytest.mark.parametrize("tied", [True, False])
def test_loss_of_a_decoder_is_that_of_its_logits(tied):
    torch.manual_seed(0)
    layer = Layer(mixer=Attention(heads=2, kv_heads=1, head_dim=8, window=CAUSAL), mlp=Mlp(hidden=32), norm=RMSNorm())
    model = TextDecoder(DecoderSpec(embed=Embed(vocab=40), stack=Stack(dim=16, layers=(layer,), final_norm=RMSNorm()),
                                    context=12, head=LMHead(tied=tied, softcap=2.0)))
    ids = torch.randint(40, (2, 12))
    loss, _ = decoder_loss(model, model.hidden(ids[:, :-1]), ids[:, 1:])
    wanted = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)
    parameters = list(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters),
                            strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
