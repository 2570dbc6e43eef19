"""The contract of every method, through two tiny updates of a real run."""

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from small_runs import assert_same, run_method

from fomo.clip import contrastive_loss, encode
from fomo.errors import FieldError
from fomo.load_recipe import load
from fomo.methods import METHODS, build_method
from fomo.pretrain import starting_model
from fomo.recipe import Optimizer
from fomo.runs.folder import Run
from fomo.update import Life, run_recipe

CPU = torch.device("cpu")


def recipe_of(name, scale, **said):
    overrides = [f"method={{name: {name}}}", "stream.updates=2", "budget.steps=3"]
    return load(None, scale=str(scale), overrides=overrides, **said)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_weights(name, small_scale, tmp_path):
    recipe = recipe_of(name, small_scale)
    for run in ("a", "b"):
        run_recipe(recipe, tmp_path / run, resume=False, device="cpu")
    a, b = (load_file(tmp_path / run / "weights/update_002.safetensors") for run in ("a", "b"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    start = load_file(tmp_path / "a/weights/update_000.safetensors")
    assert any(not torch.equal(a[n], start[n]) for n in a)
    run_recipe(recipe_of(name, small_scale, seed=1), tmp_path / "c", resume=False, device="cpu")
    c = load_file(tmp_path / "c/weights/update_002.safetensors")
    assert any(not torch.equal(a[n], c[n]) for n in a)


@pytest.mark.parametrize("name", METHODS)
def test_a_life_cut_in_the_middle_ends_bit_identical_and_opens_in_open_clip(name, small_scale, tmp_path):
    whole = run_method(small_scale, tmp_path / "whole", f"{{name: {name}}}")
    assert_same(whole, run_method(small_scale, tmp_path / "cut", f"{{name: {name}}}", cut=6))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/whole/model")
    assert_same(whole, model.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_that_prepare_returns_gets_a_gradient(name, small_scale):
    clip = starting_model(recipe_of(name, small_scale).model, CPU)
    parameters = build_method({"name": name}).prepare(clip.model)
    tokens = clip.tokenizer(["a cat", "two dogs"])
    contrastive_loss(encode(clip.model, torch.randn(2, 3, 32, 32), tokens)).backward()
    assert parameters and all(p.grad is not None for p in parameters)


@pytest.mark.parametrize("name", METHODS)
def test_state_survives_a_checkpoint_with_plain_tensors(name, small_scale, tmp_path):
    recipe = recipe_of(name, small_scale)
    run, _ = Run.open(tmp_path / "run", recipe, resume=False)
    life = Life(recipe, starting_model(recipe.model, CPU), run, CPU)
    torch.save(life.method.state(), tmp_path / "state.pt")
    life.method.load_state(torch.load(tmp_path / "state.pt", weights_only=True))


def test_finetuning_is_adamw_with_decay_on_everything():
    model = torch.nn.Linear(3, 2)
    settings = Optimizer(lr=0.1, weight_decay=0.2)
    ours = build_method({"name": "finetune"}).optimizer(list(model.parameters()), settings)
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    theirs = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.2)
    for _ in range(3):
        for net, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            net(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, other.weight)
    torch.testing.assert_close(model.bias, other.bias)


def test_a_mistake_under_a_merge_is_named_where_it_stands():
    with pytest.raises(FieldError, match=r"^method\.tune\.strength: must be at least 0"):
        build_method({"name": "merge", "tune": {"name": "ewc", "strength": -1}})
