"""LoRA, DoRA and VeRA against peft, autograd, closed forms, and the promises of a method.

CPU, no downloads:  python -m pytest tests/methods/test_adapters.py
"""

import copy
import re

import peft
import pytest
import torch
from small_models import changed, pairs, small_model, take_step, take_steps, weights_of
from torch import nn
from torch.func import functional_call

from fomo.clip import contrastive_loss, encode
from fomo.errors import UserError
from fomo.methods import build_method
from fomo.recipe import Optimizer

ADAPTERS = ("lora", "dora", "vera")
FAMILIES = ("vit", "resnet", "custom", "convnext", "siglip")
ALL = ["in_proj", "out_proj", "c_fc", "c_proj"]


def adapt(model, name="lora", seed=0, **fields):
    """-> (method, its parameters) on `model`."""
    method = build_method({"name": name, **fields})
    torch.manual_seed(seed)
    return method, method.prepare(model)


def shake(method, model, parameters, seed=1):
    """Move all trained factors somewhere, as an optimizer would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.3)
    method.after_step(model, lr=0.0)


# --- the formulas, against peft ---


class Linears(nn.Module):
    """Two towers of one matrix each, under names that adapters look for."""

    def __init__(self):
        super().__init__()
        self.visual = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"mlp": self.mlp()})])})
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": self.mlp()})])

    def mlp(self):
        return nn.ModuleDict({"c_proj": nn.Linear(7, 7)})

    def forward(self, x):
        for block in (self.visual["blocks"][0], self.blocks[0]):
            x = torch.tanh(block["mlp"]["c_proj"](x))
        return x


NAMES = ("visual.blocks.0.mlp.c_proj", "blocks.0.mlp.c_proj")
PEFT_CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=0.7 * 3, target_modules=["c_proj"]),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=0.7 * 3, target_modules=["c_proj"], use_dora=True),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=["c_proj"]),
}
PEFT_NAMES = {
    "A": lambda layer: layer.lora_A["default"].weight,
    "B": lambda layer: layer.lora_B["default"].weight,
    "m": lambda layer: layer.lora_magnitude_vector["default"].weight,
    "d": lambda layer: layer.vera_lambda_d["default"],
    "b": lambda layer: layer.vera_lambda_b["default"],
}


def as_peft(name, method, model):
    """peft's wrapping of a copy of the base model, with the method's factors copied in."""
    base = copy.deepcopy(model)
    for layer in NAMES:
        base.get_submodule(layer).weight.data.copy_(method.adapted[f"{layer}.weight"].base[0])
    theirs = peft.get_peft_model(base, PEFT_CONFIGS[name]()).base_model.model
    with torch.no_grad():
        for layer in NAMES:
            factors = method.adapted[f"{layer}.weight"].factors
            for key in method.TRAINED:
                target = PEFT_NAMES[key](theirs.get_submodule(layer))
                target.copy_(factors[key].reshape(target.shape))
            if name == "vera":
                theirs.get_submodule(layer).vera_A["default"].copy_(factors["A"])
                theirs.get_submodule(layer).vera_B["default"].copy_(factors["B"])
    return theirs


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_forward_gradients_and_folded_weights_equal_pefts(name):
    torch.manual_seed(2)
    model = Linears()
    fields = {} if name == "vera" else {"alpha": 0.7}
    method, parameters = adapt(model, name, rank=3, targets=["c_proj"], **fields)
    shake(method, model, parameters)
    theirs = as_peft(name, method, model)
    x = torch.randn(5, 7)
    torch.testing.assert_close(model(x), theirs(x))
    model(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for layer in NAMES:
        wrapped = theirs.get_submodule(layer)
        for key in method.TRAINED:
            expected = PEFT_NAMES[key](wrapped).grad
            ours = method.adapted[f"{layer}.weight"].factors[key].grad
            torch.testing.assert_close(ours.reshape(expected.shape), expected)
        assert model.get_submodule(layer).weight.grad is None  # the dense gradient is not kept
        wrapped.merge()
        torch.testing.assert_close(model.get_submodule(layer).weight, wrapped.get_base_layer().weight)


def test_lora_on_open_clips_attention_equals_an_explicit_w_plus_ba():
    model = small_model("vit")
    start = weights_of(model)
    method, parameters = adapt(model, "lora", targets=["in_proj"], alpha=0.5)
    shake(method, model, parameters)
    block = "visual.transformer.resblocks.1.attn"
    W0, bias = (start[f"{block}.{n}"] for n in ("in_proj_weight", "in_proj_bias"))
    A, B = (method.adapted[f"{block}.in_proj_weight"].factors[k] for k in "AB")
    x = torch.randn(2, 5, 16)
    q, k, v = (
        (x @ (W0[16 * i : 16 * i + 16] + 0.5 * B[i] @ A[i]).T + bias[16 * i : 16 * i + 16])
        .unflatten(-1, (2, 8))
        .transpose(1, 2)
        for i in range(3)
    )
    mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
    out = mixed.transpose(1, 2).flatten(2)
    expected = out @ start[f"{block}.out_proj.weight"].T + start[f"{block}.out_proj.bias"]
    attention = model.get_submodule(block)
    for training in (True, False):  # in eval mode torch takes its fast path
        with torch.no_grad():
            given = attention.train(training)(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_of_factors_equal_autograds_through_the_whole_model(name, family):
    """The hook's chain rule, against weights built within the graph."""
    model = small_model(family).eval()
    targets = [t for t in ALL if family != "resnet" or t != "c_fc"]
    method, parameters = adapt(model, name, targets=targets)
    shake(method, model, parameters)
    images, tokens = pairs(model)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return contrastive_loss(encode(self.model, images, tokens))

    built = {
        f"model.{n}": method.fold(a.base, **a.factors).view_as(a.weight) for n, a in method.adapted.items()
    }
    expected = torch.autograd.grad(functional_call(Loss(), built, ()), parameters)
    contrastive_loss(encode(model, images, tokens)).backward()
    assert expected and any(g.abs().max() > 1e-4 for g in expected)
    for p, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


def test_gradients_add_up_over_two_backward_passes():
    model = small_model("vit").eval()
    method, parameters = adapt(model)
    shake(method, model, parameters)
    losses = [contrastive_loss(encode(model, *pairs(model, seed=i))) for i in range(2)]
    sum(losses).backward()
    together = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    for i in range(2):
        contrastive_loss(encode(model, *pairs(model, seed=i))).backward()
    torch.testing.assert_close([p.grad for p in parameters], together)


# --- what the model is before, during and after ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_model_starts_as_it_was_and_only_adapted_weights_move(name, family):
    model, base = small_model(family), small_model(family)
    before = weights_of(base)
    method, parameters = adapt(model, name)
    method.after_step(model, lr=0.0)  # folds
    for training in (False, True):
        features, expected = (encode(m.train(training), *pairs(base)) for m in (model, base))
        if not (training and family == "resnet"):  # a frozen batch norm does not train
            assert torch.equal(features.image_features, expected.image_features)
        assert torch.equal(features.text_features, expected.text_features)
    assert changed(before, model) == set()
    take_steps(model, method, parameters)
    assert changed(before, model) == set(method.adapted)
    towers = {name.startswith("visual.") for name in method.adapted}
    assert towers == {True, False}
    grads = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grads == set(method.adapted)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_model_holds_the_folded_weights_after_every_step(name):
    model = small_model("vit")
    method, parameters = adapt(model, name, targets=ALL)
    optimizer = method.optimizer(parameters, Optimizer(lr=0.02))
    losses = [take_step(model, method, optimizer, 0) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    for n, a in method.adapted.items():
        assert torch.equal(model.state_dict()[n], method.fold(a.base, **a.factors).view_as(a.weight))
    exported = method.export(model)
    assert list(exported) == list(small_model("vit").state_dict())
    assert all(torch.equal(exported[n], t) for n, t in model.state_dict().items())
    fresh = small_model("vit", seed=5)
    fresh.load_state_dict(exported)  # deployed without the method
    a, b = (encode(m.eval(), *pairs(model)) for m in (model, fresh))
    assert torch.equal(a.image_features, b.image_features) and torch.equal(a.text_features, b.text_features)


@pytest.mark.parametrize("name", ADAPTERS)
def test_unfolding_gives_the_base_back(name):
    """load(export): the folded weights become W0, with fresh factors that leave them as they are."""
    model = small_model("vit")
    method, parameters = adapt(model, name)
    first = {n: {k: f.detach().clone() for k, f in a.factors.items()} for n, a in method.adapted.items()}
    take_steps(model, method, parameters)
    tuned = method.export(model)
    method.load(model, tuned)
    method.after_step(model, lr=0.0)
    assert changed(tuned, model) == set()
    n, a = next(iter(method.adapted.items()))
    assert torch.equal(a.base.view_as(a.weight), tuned[n])
    if name == "vera":
        assert not a.factors["d"].any() and (a.factors["b"] == 0.1).all()
        assert torch.equal(a.factors["A"], first[n]["A"])  # frozen for good
    else:
        assert not a.factors["B"].any() and not torch.equal(a.factors["A"], first[n]["A"])
    take_steps(model, method, parameters)  # the same parameters go on training
    assert changed(tuned, model) == set(method.adapted)


def test_factors_depend_on_the_seed_alone():
    models = [small_model("vit") for _ in range(3)]
    methods = [adapt(m, seed=seed)[0] for m, seed in zip(models, (3, 3, 4), strict=True)]
    torch.rand(1)
    factors = [next(iter(m.adapted.values())).factors["A"] for m in methods]
    assert torch.equal(factors[0], factors[1]) and not torch.equal(factors[0], factors[2])


def test_vera_shares_its_random_matrices_between_weights_of_one_shape():
    method, _ = adapt(small_model("vit"), "vera", targets=ALL)
    A = {n: a.factors["A"] for n, a in method.adapted.items()}
    block, other = "visual.transformer.resblocks.0", "transformer.resblocks.1"
    assert A[f"{block}.attn.in_proj_weight"] is A[f"{other}.attn.out_proj.weight"]  # widths are equal here
    assert A[f"{block}.mlp.c_fc.weight"] is not A[f"{block}.mlp.c_proj.weight"]
    assert len({id(a) for a in A.values()}) == 3


def test_a_row_of_zeros_does_no_harm_to_dora():
    model = small_model("vit")
    weight = model.visual.transformer.resblocks[0].mlp.c_proj.weight
    weight.data[3] = 0
    method, parameters = adapt(model, "dora")
    take_steps(model, method, parameters)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


# --- checkpoints, merges, runs ---


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merge_starts_each_update_from_its_weights_with_fresh_factors(name):
    model = small_model("vit")
    start = weights_of(model)
    method, parameters = adapt(model, "merge", tune={"name": name}, keep=0.75)
    ema = start
    for _ in range(2):
        method.before_update(model)
        assert changed(ema, model) == set()
        assert all(torch.equal(a.base.view_as(a.weight), ema[n]) for n, a in method.tune.adapted.items())
        take_steps(model, method, parameters)
        tuned = weights_of(model)
        assert changed(ema, model) == set(method.tune.adapted)
        method.after_update(model, [])
        expected = {n: torch.lerp(tuned[n], ema[n], 0.75) for n in start}
        torch.testing.assert_close(weights_of(model), expected)
        ema = weights_of(model)


# --- sizes and costs ---


WIDTHS = 12 * (768 + 512)


# --- mistakes: one line that names the field ---


@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("vit", {"rank": 17}, r"method.rank: 17 is above the rank of .*in_proj_weight, which is 16 x 16"),
        ("convnext", {"targets": ["in_proj"]}, r"method.targets.*: the image tower .*ConvNeXt.* has none"),
        ("resnet", {"targets": ["c_fc"]}, r"method.targets.*: the image tower .*ModifiedResNet.* has none"),
    ],
)
def test_mistakes_are_named(family, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        adapt(small_model(family), "lora", **fields)
    assert "\n" not in str(caught.value)


def test_a_target_that_no_tower_has_is_named():
    model = nn.ModuleDict({"visual": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=re.escape("method.targets[0]: this model has no in_proj")):
        adapt(model)
