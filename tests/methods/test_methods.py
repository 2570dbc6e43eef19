"""The contract of every method, through two tiny updates of a real run."""

import re
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from small_models import vit_b16
from small_runs import assert_same, run_method

import fomo.methods
from fomo.clip import contrastive_loss, encode
from fomo.errors import FieldError
from fomo.load_recipe import load
from fomo.methods import METHODS, build_method
from fomo.pretrain import starting_model
from fomo.recipe import Optimizer
from fomo.update import run_recipe

FOMO = Path(fomo.methods.__file__).parents[1]
DOCS = FOMO.parent / "docs"
# Settings under which what a method remembers shows in the weights.
SETTINGS = {
    "merge": "{name: merge, tune: {name: lora}}",
    "ewc": "{name: ewc, strength: 100, decay: 0.9, samples: 24}",
    "si": "{name: si, strength: 50}",
    "distill": "{name: distill, weight: 5}",
    "galore": "{name: galore, rank: 4, gap: 3}",
}


def recipe_of(name, scale, **options):
    overrides = [f"method={{name: {name}}}", "stream.updates=2", "budget.steps=3"]
    return load(None, scale=str(scale), overrides=overrides, **options)


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


@pytest.mark.parametrize(("name", "cut"), [*((name, 6) for name in METHODS), ("si", 2)])
def test_a_run_cut_within_an_update_ends_bit_identical_and_opens_in_open_clip(
    name, cut, small_scale, tmp_path
):
    """SI is cut in the first update, too: what its path is worth shows in the second."""
    method = SETTINGS.get(name, f"{{name: {name}}}")
    whole = run_method(small_scale, tmp_path / "whole", method)
    assert_same(whole, run_method(small_scale, tmp_path / "cut", method, cut=cut))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/whole/model")
    assert_same(whole, model.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_that_prepare_returns_gets_a_gradient(name, small_scale):
    clip = starting_model(recipe_of(name, small_scale).model, torch.device("cpu"))
    parameters = build_method({"name": name}).prepare(clip.model)
    tokens = clip.tokenizer(["a cat", "two dogs"])
    contrastive_loss(encode(clip.model, torch.randn(2, 3, 32, 32), tokens)).backward()
    assert parameters and all(p.grad is not None for p in parameters)


def test_penalties_without_strength_are_finetuning(small_scale, tmp_path):
    finetuned = run_method(small_scale, tmp_path / "finetune", "{name: finetune}")
    for method in ("{name: ewc, strength: 0}", "{name: si, strength: 0}", "{name: distill, weight: 0}"):
        assert_same(finetuned, run_method(small_scale, tmp_path / method[7:10], method))


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


# ViT-B-16: 12 blocks in each tower, widths 768 and 512; embedding 512, vocabulary 49408, context 77.
BLOCK = {d: 12 * d * d + (3 + 1 + 4 + 1 + 4) * d for d in (768, 512)}  # matrices; biases and LayerNorms
IMAGE = 768 * 3 * 16 * 16 + 768 + 197 * 768 + 2 * 2 * 768 + 12 * BLOCK[768] + 768 * 512  # 86,192,640
TEXT = 49408 * 512 + 77 * 512 + 12 * BLOCK[512] + 2 * 512 + 512 * 512  # 63,428,096
WIDTHS = 12 * (768 + 512)  # of all blocks; adapters sit on q, k and v: (d, d) each, and c_proj: (d, 4d)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ({"name": "finetune"}, IMAGE + TEXT + 1),  # 149,620,737
        ({"name": "locked", "tower": "text"}, IMAGE),
        ({"name": "locked", "tower": "image"}, TEXT + 1),  # with the logit scale
        ({"name": "lnfit"}, 2 * (26 * 768 + 25 * 512)),  # 65,536
        # ln_1, in_proj, out_proj, ln_2, c_fc, c_proj: (1 + 3 + 1 + 1 + 4 + 1) d; ln_pre, ln_post, ln_final
        ({"name": "bitfit"}, 11 * WIDTHS + 2 * 768 + 512),  # 171,008
        ({"name": "lora", "rank": 4}, (3 * 2 + 1 + 4) * 4 * WIDTHS),  # 675,840
        ({"name": "lora", "rank": 64}, (3 * 2 + 1 + 4) * 64 * WIDTHS),  # 10,813,440
        ({"name": "dora", "rank": 4}, (3 * 2 + 1 + 4) * 4 * WIDTHS + (3 + 1) * WIDTHS),  # 737,280
        ({"name": "dora", "rank": 64}, (3 * 2 + 1 + 4) * 64 * WIDTHS + (3 + 1) * WIDTHS),  # 10,874,880
        ({"name": "vera", "rank": 4}, (3 + 1) * WIDTHS + 2 * 12 * (3 + 1) * 4),  # 61,824
        ({"name": "vera", "rank": 64}, (3 + 1) * WIDTHS + 2 * 12 * (3 + 1) * 64),  # 67,584
    ],
    ids=str,
)
def test_counts_of_trained_parameters_of_vit_b16(spec, expected):
    assert sum(p.numel() for p in build_method(spec).prepare(vit_b16())) == expected


@pytest.mark.parametrize(
    "spec, field",
    [
        ({"name": "ewcc"}, "method.name"),
        ({"name": "ewc", "strength": -1}, "method.strength"),
        ({"name": "ewc", "decay": 1.5}, "method.decay"),
        ({"name": "ewc", "samples": 0}, "method.samples"),
        ({"name": "si", "strength": -0.5}, "method.strength"),
        ({"name": "si", "damping": 0}, "method.damping"),
        ({"name": "distill", "weight": -1}, "method.weight"),
        ({"name": "distill", "temperature": 0}, "method.temperature"),
        ({"name": "galore", "rank": 0}, "method.rank"),
        ({"name": "galore", "gap": 0}, "method.gap"),
        ({"name": "galore", "scale": -1}, "method.scale"),
        ({"name": "lora", "rank": 0}, "method.rank"),
        ({"name": "lora", "targets": []}, "method.targets"),
        ({"name": "lora", "targets": ["in_proj", "c_fcc"]}, "method.targets[1]"),
        ({"name": "locked", "tower": "txt"}, "method.tower"),
        ({"name": "locked", "tower": "text", "freeze": ["x"]}, "method.freeze"),
        ({"name": "locked", "freeze": ["a", "("]}, "method.freeze[1]"),
        ({"name": "merge", "recency": "newest"}, "method.recency"),
        ({"name": "merge", "partner": "zeroshot"}, "method.partner"),
        ({"name": "merge", "keep": 2}, "method.keep"),
        ({"name": "merge", "include_zero_shot": True}, "method.include_zero_shot"),
        ({"name": "merge", "first_ema": "expert", "partner": "base"}, "method.first_ema"),
        ({"name": "merge", "first_ema": "expert", "deploy": "all", "init": "all"}, "method.first_ema"),
        ({"name": "merge", "rule": "slerp", "deploy": "all"}, "method.rule"),
        ({"name": "merge", "rule": "task_arithmetic", "scale": 0.6}, "method.scale"),
        ({"name": "merge", "tune": {"name": "ewc", "strength": -1}}, "method.tune.strength"),
        ({"name": "merge", "tune": {"name": "lora", "targets": []}}, "method.tune.targets"),
        ({"name": "merge", "tune": {"name": "ewc", "keep": 1}}, "method.tune.keep"),
    ],
    ids=str,
)
def test_a_mistake_is_named_where_it_stands(spec, field):
    with pytest.raises(FieldError) as error:
        build_method(spec)
    assert str(error.value).startswith(f"{field}: ")


def test_every_row_of_the_table_of_differences_names_code_that_is_there():
    section = (DOCS / "methods.md").read_text().split("## Where we differ")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 30
    for row in rows:
        file, names = row.strip("| ").split(" | ")[-1].strip("`").split(": ")
        (path,) = [p for p in (FOMO / file, FOMO / "methods" / file) if p.exists()]
        for name in names.split(", "):
            assert all(re.search(rf"\b{part}\b", path.read_text()) for part in name.split(".")), row
