"""Locked towers, LNFit, BitFit: what trains, and that the rest stays bit by bit.

CPU, no downloads:  python -m pytest tests/methods/test_subsets.py
"""

import re

import pytest
import torch
from small_models import changed, pairs, small_model, take_steps, weights_of
from torch import nn

from fomo.clip import contrastive_loss, encode
from fomo.errors import UserError
from fomo.load_recipe import load
from fomo.methods import build_method
from fomo.pretrain import starting_model
from fomo.runs.folder import Run
from fomo.update import Trainer

CPU = torch.device("cpu")
FAMILIES = ("vit", "resnet", "custom", "convnext", "siglip")
LOCKED_TEXT, LOCKED_IMAGE = {"name": "locked", "tower": "text"}, {"name": "locked", "tower": "image"}
SPECS = {"text": LOCKED_TEXT, "image": LOCKED_IMAGE, "lnfit": {"name": "lnfit"}, "bitfit": {"name": "bitfit"}}


def trained_names(model, spec):
    build_method(spec).prepare(model)
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", SPECS)
def test_frozen_tensors_are_the_same_bits_after_training(kind, family):
    if (kind, family) == ("lnfit", "resnet"):
        return  # refused, see below
    model, spec = small_model(family), SPECS[kind]
    before = weights_of(model)
    method = build_method(spec)
    parameters = method.prepare(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert [id(p) for p in parameters] == [id(p) for n, p in model.named_parameters() if n in trained]
    take_steps(model, method, parameters)
    statistics = {name for name, _ in model.named_buffers() if "running" in name or "num_batches" in name}
    moving = statistics if kind in ("text", "bitfit") else set()  # something of the batch norms is trained
    assert changed(before, model) == trained | moving
    assert list(method.export(model)) == list(before)


def test_a_locked_batch_norm_normalises_with_the_statistics_it_keeps():
    model = small_model("resnet")
    images, _ = pairs(model)
    with torch.no_grad():
        expected = model.eval().encode_image(images)
        build_method(LOCKED_IMAGE).prepare(model)
        assert torch.equal(model.train().encode_image(images), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_locked_leaves_one_tower_and_the_logit_scale_belongs_to_the_text(family):
    names = {name for name, _ in small_model(family).named_parameters()}
    image = {name for name in names if name.startswith("visual.")}
    assert trained_names(small_model(family), LOCKED_TEXT) == image
    assert trained_names(small_model(family), LOCKED_IMAGE) == names - image
    assert "logit_scale" in names - image
    assert trained_names(small_model(family), {"name": "locked"}) == image


def test_locked_by_patterns():
    names = {name for name, _ in small_model("vit").named_parameters()}
    spec = {"name": "locked", "freeze": [r"^visual\.conv1", r"resblocks\.0\.", "logit_scale"]}
    frozen = names - trained_names(small_model("vit"), spec)
    assert frozen == {n for n in names if "resblocks.0." in n} | {"visual.conv1.weight", "logit_scale"}


def test_a_parameter_that_open_clip_freezes_stays_frozen():
    model = small_model("vit")
    model.visual.positional_embedding.requires_grad_(False)  # as with sin-cos embeddings
    assert "visual.positional_embedding" not in trained_names(model, LOCKED_TEXT)


@pytest.mark.parametrize("family", ["vit", "custom"])
def test_sets_of_open_clip_vits_are_those_the_released_code_picks_by_name(family):
    names = {name for name, _ in small_model(family).named_parameters()}
    assert trained_names(small_model(family), {"name": "lnfit"}) == {n for n in names if "ln_" in n}
    assert trained_names(small_model(family), {"name": "bitfit"}) == {n for n in names if "bias" in n}


def test_sets_of_other_towers():
    convnext = trained_names(small_model("convnext"), {"name": "lnfit"})
    assert "visual.trunk.stages.0.blocks.0.norm.weight" in convnext and "text.ln_final.bias" in convnext
    assert all("ln_" in n or "norm" in n or ".downsample.0." in n or ".stem.1." in n for n in convnext)
    siglip = trained_names(small_model("siglip"), {"name": "bitfit"})
    assert "visual.trunk.blocks.0.attn.qkv.bias" in siglip and "logit_bias" not in siglip
    resnet = trained_names(small_model("resnet"), {"name": "bitfit"})
    assert {"visual.bn1.bias", "visual.attnpool.q_proj.bias"} <= resnet and "visual.bn1.weight" not in resnet


@pytest.mark.parametrize("spec", [*SPECS.values(), {"name": "lora"}], ids=str)
@pytest.mark.parametrize("learn", [None, True, False])
def test_the_recipe_decides_about_the_logit_scale(small_scale, tmp_path, spec, learn):
    flow = ", ".join(f"{k}: {v}" for k, v in spec.items())
    overrides = [f"method={{{flow}}}", "optimizer.lr=0.01", f"temperature.learn={str(learn).lower()}"]
    recipe = load(None, scale=str(small_scale), overrides=[o.replace("none", "null") for o in overrides])
    run, _ = Run.open(tmp_path / "run", recipe, resume=False)
    trainer = Trainer(recipe, starting_model(recipe.model, CPU), run, CPU)
    learned = spec == LOCKED_IMAGE if learn is None else learn
    assert sum(p is trainer.model.logit_scale for p in trainer.parameters) == learned
    before = trainer.model.logit_scale.item()
    optimizer = trainer.method.optimizer(trainer.parameters, recipe.optimizer)
    contrastive_loss(
        encode(trainer.model, torch.randn(4, 3, 32, 32), torch.randint(1, 9, (4, 77)))
    ).backward()
    optimizer.step()
    assert (trainer.model.logit_scale.item() != before) == learned


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_merge_around_a_subset_leaves_the_rest_alone(spec):
    model = small_model("vit")
    before = weights_of(model)
    method = build_method({"name": "merge", "tune": spec})
    parameters = method.prepare(model)
    for _ in range(2):
        method.before_update(model)
        take_steps(model, method, parameters)
        method.after_update(model, [])
    assert changed(before, model) == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"freeze": ["ln_", "nobody"]}, "method.freeze[1]: 'nobody' matches no parameter of this model"),
        ({"freeze": ["."]}, "method.freeze: ['.'] leave nothing to train"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        build_method({"name": "locked", **fields}).prepare(small_model("vit"))
    assert "\n" not in str(caught.value)


def test_a_tower_without_layer_norms_is_named():
    with pytest.raises(UserError, match=r"lnfit .*: the image tower of .* \(ModifiedResNet\) has none"):
        build_method({"name": "lnfit"}).prepare(small_model("resnet"))
    model = small_model("vit")
    model.visual = nn.Linear(2, 2, bias=False)
    with pytest.raises(UserError, match=r"bitfit .*: the image tower of .* \(Linear\) has none"):
        build_method({"name": "bitfit"}).prepare(model)
