"""Mixtures of experts against a plain loop over tokens and experts, in float64 with gradients."""

import pytest
import torch
from support import close, redraw

from mm import spec
from mm.errors import InputError
from mm.lowbit import quantize
from mm.nn.grouped import by_group, by_kernel
from mm.nn.lora import add_lora, merge_lora
from mm.nn.mlp import Mlp
from mm.nn.moe import Moe
from mm.nn.transformer import Transformer

DIM, EXPERTS, CHOSEN = 12, 8, 3
PLAIN = spec.Mlp(hidden=10, act="silu", gated=True, up_bias=False, down_bias=False)
CLAMPED = spec.Mlp(hidden=10, act="quick_gelu", gated=True, clamp=spec.Clamp(limit=0.7))
UNGATED = spec.Mlp(hidden=10, act="gelu")
ROUTERS = {
    "softmax": spec.Router(),
    "qwen3": spec.Router(renormalise=True),
    "gpt_oss": spec.Router(score="softmax_chosen", bias=True),
    "deepseek_v2": spec.Router(scale=2.5, groups=spec.Groups(count=4, chosen=2)),
    "deepseek_v3": spec.Router(score="sigmoid", renormalise=True, scale=2.5, correction=True,
                               groups=spec.Groups(count=4, chosen=2, by="top2")),
    "llama4": spec.Router(score="sigmoid"),
}


def mixture(kind="softmax", expert=PLAIN, **more):
    torch.manual_seed(0)
    settings = spec.Moe(experts=EXPERTS, chosen=CHOSEN, expert=expert, router=ROUTERS[kind], **more)
    made = redraw(Moe(DIM, settings))
    if made.router.correction is not None:
        made.router.correction.normal_(std=0.3)
    return made


def score(router, x):
    """The weight of every expert for one token, 0 for those not chosen: each rule in its own words."""
    kind, logits = router.settings, router.weight @ x + (0 if router.bias is None else router.bias)
    scores = torch.softmax(logits, 0) if kind.score == "softmax" else torch.sigmoid(logits)
    merit = (scores if router.correction is None else scores + router.correction).tolist()
    allowed = range(EXPERTS)
    if kind.groups:
        size = EXPERTS // kind.groups.count
        groups = [range(g * size, (g + 1) * size) for g in range(kind.groups.count)]
        top = 1 if kind.groups.by == "max" else 2
        groups.sort(key=lambda group: -sum(sorted((merit[e] for e in group), reverse=True)[:top]))
        allowed = [e for group in groups[:kind.groups.chosen] for e in group]
    best = sorted(allowed, key=lambda e: -(logits[e] if kind.score == "softmax_chosen" else merit[e]))[:CHOSEN]
    if kind.score == "softmax_chosen":
        weights = dict(zip(best, torch.softmax(logits[best], 0), strict=True))
    else:
        weights = {e: scores[e] for e in best}
    total = sum(weights.values()) if kind.renormalise else 1
    return {e: w / total * kind.scale for e, w in weights.items()}


def one_expert(experts, e):
    mlp = Mlp(DIM, experts.settings).double()
    state = {name: value[e] for name, value in experts.state_dict(keep_vars=True).items()}
    return lambda x: torch.func.functional_call(mlp, state, (x,))


def reference(moe, x):
    rows = []
    for token in x.reshape(-1, DIM):
        row = 0 if moe.shared is None else moe.shared(token)
        for e, weight in score(moe.router, token).items():
            f = one_expert(moe.experts, e)
            row = row + (f(weight * token) if moe.settings.weigh == "input" else weight * f(token))
        rows.append(row)
    return torch.stack(rows).view(x.shape)


CASES = [(kind, expert, {}) for kind in ROUTERS for expert in (PLAIN, CLAMPED)] + [
    ("softmax", UNGATED, {}), ("llama4", PLAIN, {"weigh": "input", "shared": PLAIN})]


@pytest.mark.parametrize("kind, expert, more", CASES)
def test_equals_a_loop_over_tokens_with_gradients(kind, expert, more):
    moe, x = mixture(kind, expert, **more).double(), torch.randn(2, 7, DIM).double().requires_grad_()
    inputs = [x, *moe.parameters()]
    probe = torch.randn(2, 7, DIM).double()
    ours = torch.autograd.grad((moe(x) * probe).sum(), inputs)
    theirs = torch.autograd.grad((reference(moe, x) * probe).sum(), inputs)
    assert (moe(x) - reference(moe, x)).abs().max() <= 1e-12
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-12


def test_the_grouped_kernel_equals_the_loop():
    """The kernel that a GPU runs has a bfloat16 form on the CPU."""
    torch.manual_seed(0)
    x, weight = torch.randn(11, 16).bfloat16(), torch.randn(4, 24, 16).bfloat16()
    ends, probe = torch.tensor([0, 5, 5, 11], dtype=torch.int32), torch.randn(11, 24).bfloat16()
    results = []
    for product in (by_kernel, by_group):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = product(*inputs, ends)
        results.append([out, *torch.autograd.grad(out, inputs, probe)])
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-2)
    assert not results[0][2][0].any() and results[0][2][1].any()


def test_the_clamp_is_reached():
    loose = spec.Mlp(hidden=10, act="quick_gelu", gated=True, clamp=spec.Clamp(limit=1e6))
    x = torch.randn(1, 7, DIM)
    assert (mixture(expert=CLAMPED)(x) - mixture(expert=loose)(x)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_token_alone_equals_the_same_token_in_a_batch(kind):
    moe, x = mixture(kind, shared=PLAIN), torch.randn(4, 9, DIM)
    together = moe(x)
    for row in range(4):
        for token in range(9):
            assert (moe(x[row:row + 1, token:token + 1]) - together[row, token]).abs().max() <= 1e-5


def test_only_chosen_experts_are_read():
    moe, x = mixture(), torch.randn(1, 1, DIM)
    chosen = set(moe.router(x[0]).chosen.flatten().tolist())
    expected = moe(x).detach()
    with torch.no_grad():
        for e in set(range(EXPERTS)) - chosen:
            moe.experts.down.weight[e] = float("nan")
    close(moe(x), expected, 0)
    moe(x).sum().backward()
    touched = moe.experts.up.weight.grad.flatten(1).abs().sum(1) > 0
    assert set(touched.nonzero().flatten().tolist()) == chosen


def test_the_correction_changes_the_choice_but_no_weight():
    moe, x = mixture("deepseek_v3"), torch.randn(20, DIM)
    plain = spec.Router(score="sigmoid", correction=True)
    moe.router.settings = plain
    moe.router.correction.zero_()
    before = moe.router(x)
    moe.router.correction[5] = 10.0
    after = moe.router(x)
    assert (after.chosen == 5).any(-1).all() and not (before.chosen == 5).any(-1).all()
    close(after.weights, before.logits.sigmoid().gather(-1, after.chosen), 0)


def test_a_saturated_score_still_chooses_the_best_logit():
    moe = mixture("llama4")
    with torch.no_grad():
        moe.router.weight.zero_()[:, 0] = torch.arange(EXPERTS) + 30.0  # every sigmoid rounds to 1
    assert moe.router(torch.eye(DIM)[:1]).chosen.tolist() == [[7, 6, 5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_counts_in_float32(dtype):
    moe = mixture("deepseek_v3").to(dtype)
    x = torch.randn(5, DIM, dtype=dtype)
    assert moe.router(x).weights.dtype == torch.float32 and moe(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        moe = mixture()
        assert moe(x.float()).dtype == torch.bfloat16 and moe.router(x.float()).logits.dtype == torch.float32


def test_a_stack_begins_as_a_dense_one_does():
    torch.manual_seed(0)
    wide = spec.Mlp(hidden=256, gated=True)
    moe = spec.Moe(experts=4, chosen=2, expert=wide)
    attention = spec.Attention(heads=2, kv_heads=2, head_dim=64)
    stack = spec.Stack(dim=128, layers=(spec.Layer(mixer=attention, mlp=wide), spec.Layer(mixer=attention, mlp=moe)))
    with torch.device("meta"):
        made = Transformer(stack)
    made.to_empty(device="cpu").reset_parameters()
    dense, mixed = made.blocks
    for part in ("up", "gate", "down"):
        std = getattr(dense.mlp, part).weight.std()
        for expert in getattr(mixed.mlp.experts, part).weight:
            assert abs(expert.std() / std - 1) < 0.05
        assert not getattr(mixed.mlp.experts, part).bias.any()
    assert not made(torch.randn(1, 3, 128)).isnan().any()


def test_compiled_and_exported_it_stays_one_graph():
    moe, x = mixture("gpt_oss", CLAMPED, shared=PLAIN), torch.randn(2, 5, DIM)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(x), moe(x)
    close(ours, theirs, 1e-6)
    parameters = list(moe.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (ours, theirs)), strict=True):
        close(a, b, 1e-5)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(moe, (x,), dynamic_shapes=({1: length},)).module()
    longer = torch.randn(2, 11, DIM)
    close(exported(longer), moe(longer), 1e-6)


@torch.no_grad()
def test_lora_adapts_every_expert_and_merges():
    moe, x = mixture(expert=CLAMPED), torch.randn(2, 7, DIM)
    before = moe(x)
    names = add_lora(moe, rank=2)
    assert names == ["experts.up", "experts.gate", "experts.down"]
    close(moe(x), before, 1e-6)
    redraw(moe.experts.up.lora), redraw(moe.experts.down.lora)
    adapted = moe(x)
    assert (adapted - before).abs().max() > 1e-2
    merge_lora(moe)
    close(moe(x), adapted, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("expert", [PLAIN, CLAMPED])
def test_int8_experts_are_near(expert):
    moe, x = mixture(expert=expert, shared=PLAIN), torch.randn(3, 6, DIM)
    exact, chosen = moe(x), moe.router(x.view(-1, DIM)).chosen
    quantize(moe)
    assert torch.equal(moe.router(x.view(-1, DIM)).chosen, chosen)
    assert (moe(x) - exact).norm() < 0.03 * exact.norm()


@torch.no_grad()
def test_an_int8_product_of_a_row_does_not_depend_on_its_neighbours():
    up, x = quantize(mixture(expert=CLAMPED)).experts.up, torch.randn(9, DIM)
    group, ends = torch.tensor([0, 0, 0, 2, 2, 2, 2, 7, 7]), torch.tensor([3, 3, 7, 7, 7, 7, 7, 9], dtype=torch.int32)
    together = up(x, group, ends)
    for row in range(9):
        alone = up(x[row:row + 1], group[row:row + 1], (torch.arange(EXPERTS) >= group[row]).int())
        assert torch.equal(alone[0], together[row])


@torch.no_grad()
def test_an_empty_batch_stays_empty():
    moe = mixture()
    assert moe(torch.zeros(0, 4, DIM)).shape == (0, 4, DIM)
    assert quantize(moe)(torch.zeros(0, 4, DIM)).shape == (0, 4, DIM)


@pytest.mark.parametrize("wrong, told", [
    ({"chosen": 9}, "1 to 8"),
    ({"expert": spec.Mlp(hidden=4, inner_norm=spec.LayerNorm())}, "inner_norm"),
    ({"router": spec.Router(groups=spec.Groups(count=3, chosen=1))}, "equal groups"),
    ({"router": spec.Router(groups=spec.Groups(count=8, chosen=2, by="top2"))}, "equal groups"),
    ({"router": spec.Router(groups=spec.Groups(count=4, chosen=1))}, "no 3 experts"),
])
def test_contradictions_are_named(wrong, told):
    with pytest.raises(InputError, match=told):
        spec.Moe(**({"experts": EXPERTS, "chosen": CHOSEN, "expert": PLAIN} | wrong))


def test_more_groups_than_there_are():
    with pytest.raises(InputError, match="1 to 4"):
        spec.Groups(count=4, chosen=5)
