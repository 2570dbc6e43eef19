"""Studies say what they mean at every scale: which recipes, which seeds, which claims."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from fomo.datasets.datafile import read
from fomo.errors import UserError
from fomo.guide.inequalities import PAPER_JOINT, PAPER_START
from fomo.guide.studies import FOLDER, data_text, find_studies, read_study, resolve
from fomo.load_recipe import load
from fomo.pretrain import stored_hash
from fomo.recipe import dump

RECIPES = FOLDER.parent
CLAIMS = [*map(str, range(1, 25)), "T1", "T2", "T3", "T4", "T5", "trap"]
NAMES = [path.stem for path in sorted(FOLDER.glob("*.yaml"))]


def study_of(folder: Path, **content):
    """A study file with one variant unless `content` says otherwise."""
    variants = {"finetune": {"recipe": str(RECIPES / "finetune.yaml")}}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"title": "T", "variants": variants, **content}))
    return read_study(path)


def variant(folder: Path, scale: str = "tiny", seed: int = 0, study: dict | None = None, **says):
    """-> the recipe of a variant of finetuning, and the files it takes."""
    path = says.pop("recipe", "finetune.yaml")
    made = study_of(folder, variants={"v": {"recipe": str(RECIPES / path), **says}}, **(study or {}))
    return resolve(made, "v", scale, seed, folder)


def claim(*needs: str) -> dict:
    return {"id": "1", "says": "s", "place": "p", "needs": list(needs)}


# --- the shipped ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["tiny", "b32", "b16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_study_resolves_at_every_scale(tmp_path, name, scale):
    (study,) = find_studies([name])
    present = study.variants_at(scale)
    for of_variant in present:
        recipe, files = resolve(study, of_variant, scale, study.seeds[0], tmp_path)
        assert recipe.evaluation.keep_weights == 1 and not recipe.evaluation.frozen
        assert not [path for path in files if path.parent != tmp_path]
    if scale == "tiny":
        assert present == list(study.variants) or name == "model-scale"  # which has five sizes at b16
    compared = {v for c in study.claims for comparison in c.comparisons() for v in comparison.mentioned}
    assert compared <= set(present) or (name, scale) == ("model-scale", "tiny")


def test_every_claim_of_the_guide_has_a_study():
    ids = [claim.id for study in find_studies() for claim in study.claims]
    assert set(CLAIMS) <= set(ids)
    assert sorted({i for i in ids if ids.count(i) > 1}) == ["T5"]  # with model size, and with compute


def test_every_study_shows_the_pretraining_only_control(tmp_path):
    for study in find_studies():
        recipe, _ = resolve(study, "control", "tiny", 0, tmp_path)
        assert (recipe.mixture.pretraining, recipe.mixture.update, recipe.mixture.buffer) == (1, 0, 0)


def test_the_joint_run_is_the_recipe_of_that_name_at_tiny(tmp_path):
    (study,) = find_studies(["merging"])
    recipe, _ = resolve(study, "joint", "tiny", 0, tmp_path)
    known = load(RECIPES / "joint.yaml", overrides=["evaluation.keep_weights=1", "evaluation.frozen=false"])
    assert dump(recipe) == dump(known)


def test_every_study_that_compares_orders_by_time_has_years():
    data = yaml.safe_load((RECIPES / "data/world.yaml").read_text())
    assert len({entry["year"] for entry in data["adaptation"].values()}) == 5


def test_margins_lie_outside_no_trade_off_of_the_paper():
    """A margin of more than the whole way to the joint run could not be met."""
    for study in find_studies():
        for comparison in (c for claim in study.claims for c in claim.comparisons()):
            for _, metric, _ in comparison.terms:
                whole = math.inf if metric == "line" else abs(PAPER_JOINT[metric] - PAPER_START[metric])
                assert abs(comparison.margin) <= whole or study.name == "trap", comparison.text


def test_peaks_are_tuned_with_equally_many_trials_on_a_seed_that_no_study_uses():
    (tune,) = find_studies(["tune"])
    assert tune not in find_studies() and not set(tune.seeds) & {
        s for study in find_studies() for s in study.seeds
    }
    assert {len(peaks) for peaks in tune.peaks.values()} == {4}
    for peaks in tune.peaks.values():  # a geometric ladder, to two digits
        ratios = [float(b) / float(a) for a, b in pairwise(peaks)]
        assert max(ratios) / min(ratios) < 1.2
    assert "lora-64@0.3" in tune.variants and "lora-64" not in tune.variants


@pytest.mark.parametrize("scale", ["tiny", "b16"])
def test_a_trial_keeps_the_product_of_peak_and_decay_and_the_length_of_updates(tmp_path, scale):
    (tune,) = find_studies(["tune"])
    plain = load(RECIPES / "methods/lora-64.yaml", scale=scale)
    trial, _ = resolve(tune, "lora-64@3", scale, 100, tmp_path)
    assert trial.optimizer.lr == pytest.approx(3 * plain.optimizer.lr)
    product = plain.optimizer.lr * plain.optimizer.weight_decay
    assert trial.optimizer.lr * trial.optimizer.weight_decay == pytest.approx(product)
    assert trial.budget.gflops / trial.stream.updates == plain.budget.gflops / plain.stream.updates


def test_tuning_scores_training_pictures_of_real_data(tmp_path):
    file = tmp_path / "data.yaml"
    sets = {"source": "torchvision", "root": "/data"}
    content = {
        "adaptation": {
            "flowers": {**sets, "dataset": "flowers102"},
            "shop": {"source": "folder", "train": "/a", "test": "/b"},
            "drawn": {"source": "world", "domain": "symbols", "train": 4, "test": 4},
        },
        "evaluation": {
            "pets": {**sets, "dataset": "oxford_pets"},
            "letters": {"source": "folder", "train": "/c", "test": "/d"},
            "imagenet": {"source": "clip_benchmark", "dataset": "imagenet"},
            "test_only": {"source": "folder", "test": "/e"},
        },
    }
    file.write_text(yaml.safe_dump(content))
    assert data_text(file, 1, "null").count("seed: 1") == 1  # a study's
    copy = tmp_path / "copy.yaml"
    copy.write_text(data_text(file, 100, "null"))
    data = read(copy)
    assert data.adaptation["flowers"].spec["train"] == "test"  # as the paper has them
    assert data.adaptation["drawn"].spec == {**content["adaptation"]["drawn"], "seed": 100}
    for name in ("flowers", "shop"):
        spec = data.adaptation[name].spec
        assert "test" not in spec and spec["holdout"] == 0.1
    assert {name: entry.spec["test"] for name, entry in data.evaluation.items()} == {
        "pets": "trainval",
        "letters": "/c",
    }


def test_tuning_refuses_a_set_whose_test_pictures_are_training_pictures(tmp_path):
    file = tmp_path / "data.yaml"
    file.write_text("adaptation: {a: {source: folder, train: /a, holdout: 0.2}}\n")
    with pytest.raises(UserError, match=r"adaptation\.a\.holdout"):
        data_text(file, 100, "null")


# --- variants --------------------------------------------------------------------------------------------


def test_set_and_times_change_what_the_scale_says(tmp_path):
    recipe, _ = variant(tmp_path, set={"stream.order": "time"}, times={"optimizer.lr": 10})
    plain = load(RECIPES / "finetune.yaml")
    assert recipe.stream.order == "time" and recipe.optimizer.lr == pytest.approx(10 * plain.optimizer.lr)


def test_a_life_costs_the_same_however_many_updates_it_has(tmp_path):
    plain = load(RECIPES / "finetune.yaml")
    samples = {"budget.samples": 4_000}
    whole = 4_000 * plain.stream.updates
    for says in ({"times": {"stream.updates": 2.5}}, {"set": {"stream.updates": 1}}):
        recipe, _ = variant(tmp_path, **{**says, "set": {**samples, **says.get("set", {})}})
        assert recipe.stream.updates != plain.stream.updates
        assert recipe.budget.samples * recipe.stream.updates == whole
    recipe, _ = variant(tmp_path, set=samples, times={"stream.updates": 2, "budget": 3})
    assert recipe.budget.samples * recipe.stream.updates == 3 * whole


def test_a_budget_in_gflops_is_a_lifes_already(tmp_path):
    recipe, _ = variant(tmp_path, set={"budget.gflops": 1e6}, times={"stream.updates": 2, "budget": 3})
    assert recipe.budget.gflops == 3e6 and recipe.budget.samples is None


def test_a_seed_varies_the_stream_and_the_pictures_but_not_the_base_model(tmp_path):
    same, files = variant(tmp_path)
    assert same.seed == 0 and Path(same.data) == RECIPES / "data" / "world.yaml" and not files
    recipe, files = variant(tmp_path, seed=3)
    assert recipe.seed == 3 and recipe.model == same.model
    ((path, text),) = files.items()
    written, original = yaml.safe_load(text), yaml.safe_load(Path(same.data).read_text())
    for role in ("adaptation", "evaluation"):
        assert all(entry.pop("seed") == 3 for entry in written[role].values())
        assert written[role] == original[role]
    assert written["pretraining"] == original["pretraining"] and str(path) == recipe.data


def test_a_base_other_than_the_first_is_pretrained_from_another_seed(tmp_path):
    study = study_of(tmp_path)
    models = [resolve(study, "finetune", "tiny", 4, tmp_path, base)[0].model for base in (0, 1)]
    assert [model.pretraining.seed for model in models] == [0, 1]
    assert stored_hash(models[0]) and stored_hash(models[1]) is None


def test_powers_change_what_the_scale_says(tmp_path):
    recipe, _ = variant(
        tmp_path, recipe="methods/ema-merge.yaml", times={"stream.updates": 5}, powers={"method.keep": 0.2}
    )
    plain = load(RECIPES / "methods/ema-merge.yaml")
    untouched = recipe.method["keep"] ** recipe.stream.updates  # its share after the last update
    assert untouched == pytest.approx(plain.method["keep"] ** plain.stream.updates)


def test_a_pool_of_null_is_that_of_the_scale(tmp_path):
    recipe, files = variant(tmp_path, study={"pools": {"tiny": {"broad": None}}}, pool="broad")
    assert not files and dump(recipe) == dump(variant(tmp_path)[0])


def test_another_pool_is_replayed_on_the_same_base_model(tmp_path):
    pool = [{"source": "world", "domain": "faces", "per_concept": 4}]
    for seed in (0, 1):
        recipe, files = variant(tmp_path, seed=seed, study={"pools": {"tiny": {"few": pool}}}, pool="few")
        written = yaml.safe_load(files[Path(recipe.data)])
        assert written["pretraining"] == pool
        plain, _ = variant(tmp_path, seed=seed)
        assert recipe.model == plain.model and recipe.data != plain.data


def test_a_variant_that_the_scale_has_no_file_for_is_left_out(tmp_path):
    says = {"recipe": str(RECIPES / "finetune.yaml"), "scale": "large"}
    study = study_of(tmp_path, variants={"big": says}, scales={"tiny": {"large": "tiny-wide"}})
    assert study.variants_at("tiny") == ["big"] and study.variants_at("b32") == []
    recipe, _ = resolve(study, "big", "tiny", 0, tmp_path)
    assert recipe.model.config["embed_dim"] == 128


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, problem",
    [
        ({"titel": "x"}, "titel: unknown field (did you mean title?)"),
        ({"variants": {"a": {"recipy": "x"}}}, "variants.a.recipy: unknown field (did you mean recipe?)"),
        ({"variants": {"a": {"recipe": "x", "scale": "huge"}}}, "variants.a.scale: unknown 'huge'"),
        ({"claims": [claim("ka(finetun) > 0")]}, "claim 1: unknown 'finetun' (did you mean finetune?)"),
        ({"claims": [claim("line(finetune) > 0")]}, "claim 1: unknown 'joint'"),
        ({"claims": [claim("ka(finetune) >")]}, "claim 1: 'ka(finetune) >', column 15: expected"),
        ({"seeds": [0, -1]}, "seeds[1]: got -1, accepted: at least 0"),
        ({"peaks": {"lora": [1]}}, "peaks: unknown 'lora', accepted: finetune"),
    ],
)
def test_a_mistake_in_a_study_is_one_line_that_names_it(tmp_path, content, problem):
    with pytest.raises(UserError) as caught:
        study_of(tmp_path, **content)
    assert str(caught.value).startswith(f"{tmp_path / 'study.yaml'}: {problem}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "says, problem",
    [
        ({"times": {"optimizer.momentum": 2}}, "times.optimizer.momentum: names no number of the recipe"),
        ({"times": {"method.name": 2}}, "times.method.name: names no number of the recipe"),
        ({"powers": {"method.keep": 2}}, "powers.method.keep: names no number of the recipe"),
        ({"times": {"budget": "much"}}, "times.budget: expected a number, got 'much'"),
        ({"set": {"stream.order": "alphabetical"}}, "unknown 'alphabetical'"),
        ({"recipe": "nothing.yaml"}, "nothing.yaml: no such file"),
    ],
)
def test_a_mistake_in_a_variant_is_one_line(tmp_path, says, problem):
    with pytest.raises(UserError) as caught:
        variant(tmp_path, **says)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_a_study_that_does_not_exist_is_named_with_its_nearest():
    with pytest.raises(UserError, match=r"unknown 'mergin' .did you mean merging"):
        find_studies(["mergin"])


def test_pictures_of_relative_files_cannot_be_copied_elsewhere(tmp_path):
    data = tmp_path / "data.yaml"
    pool = [{"source": "webdataset", "path": "a.tar"}]
    faces = {"source": "world", "domain": "faces", "test": 4}
    data.write_text(yaml.safe_dump({"pretraining": pool, "evaluation": {"faces": faces}}))
    with pytest.raises(UserError, match=r"'a\.tar' is relative"):
        variant(tmp_path, seed=1, set={"data": str(data)})
    variant(tmp_path, seed=0, set={"data": str(data)})
