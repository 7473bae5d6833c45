"""LoRA on any module: it changes nothing at first, trains alone, merges exactly and keeps a small state."""

from __future__ import annotations

import copy

import pytest
import torch
from support import attention, close, model, stack
from torch import nn

from mm.errors import InputError
from mm.nn.lora import add_lora, load_lora_state, lora_state, merge_lora

X = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))


def adapted(*layers: str, rank: int = 4) -> nn.Module:
    """A stack with low-rank changes that are not zero."""
    module = model(stack(attention(gate="head"), attention()))
    add_lora(module, rank, 8.0, layers)
    with torch.no_grad():
        for tensor in lora_state(module).values():
            tensor.normal_(std=0.3)
    return module


def test_nothing_changes_at_first_and_only_the_adapters_train():
    module = model(stack(attention(), attention()))
    before, plain = module(X), dict(module.named_parameters())
    names = add_lora(module, rank=4)
    assert len(names) == 8 and "blocks.0.mixer.qkv" in names
    assert torch.equal(module(X), before)
    module(X).square().sum().backward()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == set(lora_state(module)) and all(p.grad is None for p in plain.values())
    assert all(p.grad is not None for name, p in module.named_parameters() if name in trained)


def test_every_part_of_a_fused_weight_has_a_pair_of_its_own():
    layer = adapted("qkv").blocks[0].mixer.qkv
    part, base = layer.lora, layer.base
    wanted, row = base.clone(), 0
    for i, size in enumerate(layer.sizes):
        wanted[row : row + size] += 2.0 * part.up[row : row + size] @ part.down[i]
        row += size
    assert torch.linalg.matrix_rank(layer.weight - base) == 12
    close(layer.weight, wanted, 1e-6)


def test_merged_is_the_adapted_module_with_the_plain_names():
    module, plain = adapted(), model(stack(attention(gate="head"), attention()))
    wanted = module(X)
    twin = copy.deepcopy(module)
    merge_lora(module)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert type(module.blocks[0].mlp.up) is type(plain.blocks[0].mlp.up) and not lora_state(module)
    close(module(X), wanted, 1e-6)
    plain.load_state_dict(module.state_dict())
    close(plain(X), wanted, 1e-6)
    close(twin(X), wanted, 1e-6)
    assert len(add_lora(module, rank=2)) == 9  # and again


def test_the_state_is_small_and_resumes(tmp_path):
    first = adapted("qkv", "mlp.up", rank=1)
    state = lora_state(first)
    assert sum(t.numel() for t in state.values()) < 0.1 * sum(p.numel() for p in first.parameters())
    torch.save(state, tmp_path / "lora.pt")
    second = model(stack(attention(gate="head"), attention()))
    second.load_state_dict({name.replace("base", "weight"): value for name, value in first.state_dict().items()
                            if name not in state})
    add_lora(second, 1, 8.0, ("qkv", "mlp.up"))
    load_lora_state(second, torch.load(tmp_path / "lora.pt", weights_only=True))
    assert torch.equal(second(X), first(X))


def test_training_moves_towards_a_target():
    torch.manual_seed(1)
    module = model(stack(attention(), attention()))
    target = model(stack(attention(), attention()))(X).detach()
    add_lora(module, rank=4)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        loss = (module(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_half_precision_keeps_its_type_and_trains_in_float32():
    layer = nn.Linear(8, 8).to(torch.bfloat16)
    add_lora(layer, rank=2)
    assert layer.weight.dtype == torch.bfloat16
    assert {t.dtype for t in lora_state(layer).values()} == {torch.float32}
    merge_lora(layer)
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("module", "options", "says"), [
    (nn.LayerNorm(4), {}, "has no linear layer"),
    (nn.Sequential(nn.Linear(4, 4)), {"layers": ["qkv"]}, "no linear layer is called 'qkv'; there are 0"),
    (nn.Linear(4, 4), {"rank": 0}, "positive rank and alpha")])
def test_bad_settings_are_one_sentence(module, options, says):
    with pytest.raises(InputError, match=says):
        add_lora(module, **options)


def test_adapting_twice_and_a_foreign_state_are_refused():
    module = adapted("qkv")
    with pytest.raises(InputError, match="adapted already"):
        add_lora(module, layers=["qkv"])
    with pytest.raises(InputError, match="on one side only"):
        load_lora_state(module, {})
    wide = {name: torch.cat([t, t]) for name, t in lora_state(module).items()}
    with pytest.raises(InputError, match="expected"):
        load_lora_state(module, wide)
