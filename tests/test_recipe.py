"""Recipes: precedence, repair of YAML's numbers, and one clear line for every mistake."""

from pathlib import Path

import pytest
import yaml

from fomo.errors import UserError
from fomo.load_recipe import load
from fomo.recipe import dump

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml")) + sorted((ROOT / "recipes/methods").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads(path):
    assert load(path).method["name"]


def test_precedence_is_scale_recipe_command_line(tmp_path, small_scale):
    assert load(None, scale=str(small_scale)).optimizer.batch_size == 12
    path = tmp_path / "r.yaml"
    path.write_text(f"scale: {small_scale}\noptimizer: {{batch_size: 20}}\n")
    assert load(path).optimizer.batch_size == 20
    assert load(path).optimizer.lr == 1e-2  # the scale's default for finetune
    assert load(path, overrides=["optimizer.batch_size=30"]).optimizer.batch_size == 30
    assert load(path, scale="tiny").stream.updates == load(None).stream.updates


def test_yaml_numbers_without_a_dot_are_numbers(small_scale):
    recipe = load(None, scale=str(small_scale), overrides=["optimizer.lr=1e-5", "budget.samples=1_200"])
    assert recipe.optimizer.lr == 1e-5
    assert recipe.steps == 100


def test_scale_defaults_reach_only_methods_that_have_the_field(small_scale):
    assert "keep" not in load(None, scale=str(small_scale)).method
    assert load(None, scale=str(small_scale), overrides=["method={name: merge}"]).method["keep"] == 0.5
    assert (
        load(None, scale=str(small_scale), overrides=["method={name: merge, keep: 0.9}"]).method["keep"]
        == 0.9
    )


def test_a_budget_replaces_the_scales_budget(small_scale):
    recipe = load(None, scale=str(small_scale), overrides=["budget.samples=24", "budget.fisher=per_step"])
    assert recipe.budget.steps is None and recipe.steps == 2 and recipe.budget.fisher == "per_step"
    assert load(None, scale=str(small_scale), overrides=["budget.fisher=per_step"]).budget.steps == 4
    assert load(None, scale=str(small_scale), overrides=["budget.gflops=1e6"]).steps is None


def test_a_model_that_is_not_the_scales_gets_the_peak_of_pretrained_models(small_scale):
    """1e-5 at a batch of 512, by a square root to the scale's 12; a named peak stays."""
    model = {"scale": str(small_scale), "model": "ViT-B-32/laion2b_s34b_b79k"}
    assert load(None, **model).optimizer.lr == pytest.approx(1e-5 * (12 / 512) ** 0.5, rel=1e-3)
    assert load(None, **model, overrides=["optimizer.lr=3e-6"]).optimizer.lr == 3e-6
    assert load(None, scale=str(small_scale)).optimizer.lr == 1e-2


def test_the_resolved_recipe_repeats_itself(tmp_path, small_scale):
    recipe = load(None, scale=str(small_scale), seed=3, overrides=["method={name: merge, rule: slerp}"])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    assert load(path) == recipe


def test_data_paths_are_relative_to_the_file_that_says_them(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data: mine/data.yaml\n")
    assert load(path).data == str(tmp_path / "mine/data.yaml")
    assert load(path, data="other.yaml").data == str(Path("other.yaml").resolve())


MISTAKES = {
    "optimizer.lr=fast": "optimizer.lr: expected a number, got 'fast'",
    "optimizer.lr=-1": "optimizer.lr: must be positive",
    "optimizer.lr=.nan": "optimizer.lr: expected a number",
    "optimizer.betas=0.9": "optimizer.betas: expected",
    "optimiser.lr=1": "optimiser: unknown field (did you mean optimizer?)",
    "mixture.update=0.54": "mixture: shares must sum to 1, got 1.2",
    "mixture.update=1.34": "mixture.update: got 1.34",
    "method.name=finetun": "method.name: unknown 'finetun' (did you mean finetune?)",
    "method={name: merge, kep: 0.3}": "method.kep: unknown field (did you mean keep?)",
    "method={name: merge, keep: 1.3}": "method.keep: got 1.3, accepted: a number from 0 to 1",
    "method={name: merge, rule: tie}": "method.rule: unknown 'tie' (did you mean ties?)",
    "method={name: merge, init: base}": "method.init: unknown 'base', accepted: zeroshot, finetuned, ema",
    "method={name: merge, tune: {name: nope}}": "method.tune.name: unknown 'nope'",
    "method=finetune": "method: expected named fields with `name`, got 'finetune'",
    "schedule.name=cosin": "schedule.name: unknown 'cosin'",
    "schedule.meta=matched": "schedule.meta: ",
    "schedule={name: linear, meta: infinite}": "schedule.meta: 'infinite' does not exist for name 'linear'",
    "budget={samples: 3, steps: 4}": "exactly one of gflops, samples, steps, hours, got samples, steps",
    "budget.gflops=-1": "budget.gflops: must be positive, got -1",
    "budget.hours=0": "budget.hours: must be positive, got 0",
    "budget.fisher=twice": "budget.fisher: unknown 'twice'",
    "budget.steps=0": "budget.steps: must be at least 1, got 0",
    "budget.samples=11": "budget.samples: 11 is less than one batch of 12",
    "stream.updates=2.5": "stream.updates: expected a whole number, got 2.5",
    "stream.order=sideways": "stream.order: unknown 'sideways'",
    "seed=true": "seed: expected a whole number, got True",
    "evaluation.subset=2": "evaluation.subset: a share in (0, 1]",
    "temperature.init=0": "temperature.init: must be positive",
    "precision=fp8": "precision: unknown 'fp8'",
    "stream=5": "stream: expected named fields, got 5",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_field(override, small_scale):
    with pytest.raises(UserError) as caught:
        load(None, scale=str(small_scale), overrides=[override])
    assert MISTAKES[override] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_names_the_file_it_is_in(tmp_path, small_scale):
    path = tmp_path / "mine.yaml"
    path.write_text(f"scale: {small_scale}\noptimizer: {{lr: fast}}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: optimizer\.lr"):
        load(path)
    broken = tmp_path / "broken.yaml"
    broken.write_text(small_scale.read_text().replace("steps: 4", "steps: many"))
    with pytest.raises(UserError, match=r"broken\.yaml: budget\.steps"):
        load(None, scale=str(broken))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "!!python/object/apply:os.system ['true']", "\x00"])
def test_what_is_not_a_recipe_is_refused(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        load(path)


def test_an_unknown_scale_names_the_known_ones():
    with pytest.raises(UserError, match=r"unknown 'tny' \(did you mean tiny\?\)"):
        load(None, scale="tny")


def test_no_learning_rate_for_a_method_is_said(tmp_path, small_scale):
    values = yaml.safe_load(small_scale.read_text())
    values["defaults"] = {}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"optimizer\.lr: not given"):
        load(None, scale=str(path))


def test_a_peak_may_belong_to_a_rank(small_scale, tmp_path):
    """The name with its rank, then the name, then finetune's; a merge asks for the method inside it."""
    text = small_scale.read_text().replace("finetune: 1e-2", "finetune: 1e-2, lora: 2e-2, lora-8: 3e-2")
    (tmp_path / "small.yaml").write_text(
        text.replace("data: data.yaml", f"data: {small_scale.parent / 'data.yaml'}")
    )
    for spec, peak in (
        ("{name: lora, rank: 8}", 3e-2),
        ("{name: lora, rank: 4}", 2e-2),
        ("{name: merge, tune: {name: lora, rank: 8}}", 3e-2),
        ("{name: vera}", 1e-2),
    ):
        recipe = load(None, scale=str(tmp_path / "small.yaml"), overrides=[f"method={spec}"])
        assert recipe.optimizer.lr == peak, spec
