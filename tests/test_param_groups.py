"""Learning rates that differ within a model. The oracle of layer decay is timm's own."""

import open_clip
import pytest
import timm.optim
import torch

from fomo.errors import UserError
from fomo.methods import build_method
from fomo.param_groups import depths_of, is_of_text, param_groups
from fomo.recipe import Optimizer

VISION = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 3}
TEXT = {"context_length": 16, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}


def model_of(vision=VISION):
    torch.manual_seed(0)
    return open_clip.CLIP(16, vision, TEXT)


def shares(model, method=None, **settings):
    """By name, of what a method trains."""
    method = method or build_method({"name": "finetune"})
    parameters = method.prepare(model)
    named = list(method.named_parameters(model))
    groups = param_groups(named, parameters, Optimizer(lr=1e-3, **settings))
    found = {p: group["lr_share"] for group in groups for p in group["params"]}
    assert len(found) == len(parameters)
    optimizer = method.optimizer(groups, Optimizer(lr=1e-3))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)
    return {name: found[p] for name, p in named if p in found}


def test_without_a_difference_the_parameters_stay_as_they_are():
    parameters = list(model_of().parameters())
    assert param_groups([], parameters, Optimizer(lr=1e-3)) is parameters


def test_the_text_tower_has_a_peak_of_its_own():
    found = shares(model_of(), lr_text=1e-4)
    text = {name for name, share in found.items() if share == pytest.approx(0.1)}
    assert text == {n for n in found if not n.startswith(("visual.", "logit_"))}
    assert {found[name] for name in found.keys() - text} == {1.0}


def test_blocks_follow_beits_rule():
    found = shares(model_of(), layer_decay=0.5)
    expected = {
        "visual.conv1.weight": 1 / 16,
        "visual.class_embedding": 1 / 16,
        "visual.transformer.resblocks.0.ln_1.weight": 1 / 8,
        "visual.transformer.resblocks.2.mlp.c_proj.weight": 1 / 2,
        "visual.ln_post.weight": 1,
        "visual.proj": 1,
        "token_embedding.weight": 1 / 8,
        "transformer.resblocks.0.attn.out_proj.weight": 1 / 4,
        "transformer.resblocks.1.ln_2.bias": 1 / 2,
        "ln_final.weight": 1,
        "text_projection": 1,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["logit_scale"] == 1


def test_timms_own_layer_decay_falls_alike():
    """It counts the last norm with the last block, where BEiT's code counts it with the head: one layer less."""
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "image_size": 32}
    model = model_of({**vision, "timm_pool": "token", "timm_proj": "linear"})
    trunk = model.visual.trunk
    groups = timm.optim.param_groups_layer_decay(trunk, layer_decay=0.7)
    theirs = {p: group["lr_scale"] for group in groups for p in group["params"]}
    ours = shares(model, layer_decay=0.7)
    for name, parameter in trunk.named_parameters():
        expected = 1 if name.startswith("norm.") else 0.7 * theirs[parameter]
        assert ours[f"visual.trunk.{name}"] == pytest.approx(expected), name


def test_a_tower_without_blocks_is_refused():
    with pytest.raises(UserError, match="the image tower of this model has no blocks"):
        depths_of(["visual.layer1.0.conv1.weight", "transformer.resblocks.0.ln_1.weight"])


@pytest.mark.parametrize("towers", [["image"], ["text"], ["image", "text"]])
def test_adapters_sit_on_the_towers_that_are_said_and_their_factors_have_rates(towers):
    method = build_method({"name": "lora", "rank": 2, "towers": towers})
    found = shares(model_of(), method, lr_text=1e-4)
    assert {"text" if is_of_text(name) else "image" for name in found} == set(towers)
    assert all(share == pytest.approx(0.1 if is_of_text(name) else 1) for name, share in found.items())
