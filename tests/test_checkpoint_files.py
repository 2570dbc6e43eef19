"""What a file of weights says of its model, what it lacks, and how files of other programs differ."""

import json
import os
import stat

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import assert_same, class_folders, invoke

from fomo.architectures import configuration
from fomo.budget.dry_run import dry_run
from fomo.checkpoint_files import open_checkpoint
from fomo.clip import load, new, save
from fomo.errors import UserError
from fomo.load_recipe import load as load_recipe

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
QUICK = {**CONFIG, "quick_gelu": True}


@pytest.fixture
def known(tmp_path):
    """Small architectures that open_clip knows during a test; the first two have equal tensors."""
    shallow = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "layers": 2}}
    configs = {"small": CONFIG, "small-quickgelu": QUICK, "small-other": shallow}
    paths = [tmp_path / f"{name}.json" for name in configs]
    for path in paths:
        path.write_text(json.dumps(configs[path.stem]))
        open_clip.add_model_config(path)
    yield
    for path in paths:
        open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
        open_clip.factory._MODEL_CONFIGS.pop(path.stem)


def write(path, config=CONFIG, seed=0, name=lambda n: n, around=lambda s: s, **more):
    """A file of tensors that says nothing else."""
    state = {name(n): t for n, t in new(config, seed).model.state_dict().items()}
    torch.save(around({**state, **more}), path)
    return path


def images_of(model):
    with torch.no_grad():
        return model.eval().encode_image(torch.ones(1, 3, 32, 32))


def merge(*arguments):
    return invoke("merge", "--rule", "interpolate", *arguments)


# --- what is no tensor -----------------------------------------------------------------------------------


def test_a_file_of_weights_is_opened_as_what_it_was_wherever_it_lies(tmp_path):
    clip = new(QUICK, 0)
    clip.model.visual.preprocess_cfg |= {"resize_mode": "squash"}
    clip.config["preprocess_cfg"] |= {"mean": [0.5] * 3, "resize_mode": "squash"}
    save(clip, tmp_path / "model")
    (tmp_path / "model/open_clip_model.safetensors").rename(tmp_path / "moved.safetensors")
    again = load(None, str(tmp_path / "moved.safetensors"))
    assert again.config == clip.config
    assert list(again.config["preprocess_cfg"]) == list(clip.config["preprocess_cfg"])
    assert torch.equal(images_of(again.model), images_of(clip.model))


@pytest.mark.parametrize("folder", ["weights", "experts"])
def test_weights_of_an_older_run_are_opened_as_the_runs_model(tmp_path, folder):
    clip = new(QUICK, 0)
    save(clip, tmp_path / "model")
    (tmp_path / folder).mkdir()
    save_file(clip.model.state_dict(), tmp_path / folder / "update_001.safetensors")
    assert load(None, str(tmp_path / folder / "update_001.safetensors")).config == clip.config


def test_a_runs_weights_merge_into_the_runs_model(tmp_path):
    save(new({**QUICK, "init_logit_scale": 3.0}, 0), tmp_path / "small")
    photos = class_folders(tmp_path / "photos", ["red", "blue"], 6)
    settings = ("budget.steps=1", "evaluation.keeps=[]", "evaluation.frozen=false")
    done = invoke("update", "--model", tmp_path / "small", "--data", photos, "--out", tmp_path / "run",
                  *(word for setting in settings for word in ("--set", setting)))  # fmt: skip
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "run/weights").iterdir())
    for out in ("merged-v1.2", "deep/merged.safetensors"):
        done = merge("--set", "keep=0.5", *files, "-o", tmp_path / out)
        assert done.exit_code == 0, done.output
    (tmp_path / "run/model/open_clip_model.safetensors").rename(tmp_path / "last.safetensors")
    written = (tmp_path / "run/model/open_clip_config.json").read_text()
    assert (tmp_path / "merged-v1.2/open_clip_config.json").read_text() == written
    assert load(None, str(tmp_path / "deep/merged.safetensors")).config == json.loads(written)
    assert_same(load(None, str(files[-1])).model.state_dict(), load_file(tmp_path / "last.safetensors"))


def test_the_same_model_is_the_same_bytes(tmp_path):
    for out in ("a", "b"):
        save(new(CONFIG, 0), tmp_path / out)
    a, b = ((tmp_path / out / "open_clip_model.safetensors").read_bytes() for out in ("a", "b"))
    assert a == b


def test_equal_tensors_of_several_architectures_are_not_guessed(tmp_path, known, capsys):
    file = write(tmp_path / "tuned.pt", QUICK)
    with pytest.raises(UserError, match=r"small, small-quickgelu.*quick_gelu.*model\.name=NAME"):
        load(None, str(file))
    for done in (
        invoke("eval", "--model", file, "--data", "none.yaml"),
        merge(file, file, "-o", tmp_path / "merged"),
        invoke("budget", "--model", file),
    ):
        assert done.exit_code == 2, done.output
    named = load("small-quickgelu", str(file))
    assert torch.equal(images_of(named.model), images_of(new(QUICK, 0).model))
    done = merge(f"small-quickgelu/{file}", f"small-quickgelu/{file}", "-o", tmp_path / "merged")
    assert done.exit_code == 0 and load(None, str(tmp_path / "merged")).config["model_cfg"]["quick_gelu"]


def test_an_inferred_architecture_is_shown(tmp_path, known, capsys):
    shallow = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "layers": 2}}
    assert load(None, str(write(tmp_path / "x.pt", shallow))).config["model_cfg"] == shallow
    assert "taken as small-other" in capsys.readouterr().err


def test_tags_of_one_name_that_want_other_pictures_are_not_guessed(tmp_path):
    with torch.device("meta"):
        shapes = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14")).state_dict()
    torch.save({name: torch.zeros(()).expand(t.shape) for name, t in shapes.items()}, tmp_path / "l14.pt")
    with pytest.raises(UserError, match=r"ViT-L-14/laion2b_s32b_b82k.*preprocess_cfg\.mean"):
        configuration("ViT-L-14", str(tmp_path / "l14.pt"))
    said = configuration("ViT-L-14/laion2b_s32b_b82k", str(tmp_path / "l14.pt"))
    assert said["preprocess_cfg"]["mean"] == [0.5] * 3
    assert said == configuration("ViT-L-14", f"laion2b_s32b_b82k/{tmp_path}/l14.pt")


def test_a_name_with_a_file_is_honoured_and_has_to_fit(tmp_path, known, small_scale, capsys):
    file = write(tmp_path / "tuned.pt")
    data = small_scale.parent / "data.yaml"
    options = {"scale": str(small_scale), "model": str(file), "data": str(data)}
    recipe = load_recipe(None, **options, overrides=["model.name=small-quickgelu"])
    assert (recipe.model.name, recipe.model.pretrained) == ("small-quickgelu", str(file))
    assert "disk: " in dry_run(recipe, "cpu")
    wrong = load_recipe(None, **options, overrides=["model.name=small-other"])
    for refused in (lambda: dry_run(wrong, "cpu"), lambda: load("small-other", str(file))):
        with pytest.raises(UserError, match=r"resblocks\.1\.\S+ is missing"):
            refused()
    save(new(CONFIG, 0), tmp_path / "model")
    assert load("small-quickgelu", str(tmp_path / "model")).config["model_cfg"]["quick_gelu"]
    assert "its own configuration differs in model_cfg.quick_gelu" in capsys.readouterr().err


# --- what other programs write ---------------------------------------------------------------------------

VARIANTS = {
    "module": {"name": lambda n: f"module.{n}"},
    "compiled": {"name": lambda n: f"_orig_mod.{n}"},
    "both": {"name": lambda n: f"module._orig_mod.{n}", "around": lambda s: {"epoch": 3, "model": s}},
    "compiled tower": {"name": lambda n: n.replace("visual.", "visual._orig_mod.")},
    "lightning": {"name": lambda n: f"model.{n}", "around": lambda s: {"state_dict": s, "callbacks": {}}},
    "position_ids": {"text.transformer.embeddings.position_ids": torch.arange(77)[None]},
    "mask and counter": {"attn_mask": torch.zeros(77, 77), "n_averaged": torch.tensor(3)},
    "scale of one dimension": {"logit_scale": torch.full((1,), 2.0)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_versions_of_a_file_are_opened_and_merged_as_the_plain_one(tmp_path, variant, known, capsys):
    plain, odd = write(tmp_path / "plain.pt"), write(tmp_path / "odd.pt", seed=1, **VARIANTS[variant])
    want = new(CONFIG, 1).model.state_dict()
    assert torch.equal(load("small", str(odd)).model.state_dict()["visual.proj"], want["visual.proj"])
    told = capsys.readouterr().err
    assert "odd.pt: " in told or "scale" in variant
    for first, second in ((plain, odd), (odd, plain)):
        done = merge("--set", "keep=0.5", first, second, "-o", tmp_path / "out.safetensors")
        assert done.exit_code == 0, done.output
        merged, old = load_file(tmp_path / "out.safetensors"), torch.load(plain)
        assert merged.keys() == old.keys()
        torch.testing.assert_close(merged["visual.proj"], (old["visual.proj"] + want["visual.proj"]) / 2)


def test_tensors_that_would_be_lost_by_taking_off_prefixes_are_refused(tmp_path):
    torch.save({"module.a": torch.zeros(1), "a": torch.ones(1)}, tmp_path / "twice.pt")
    with pytest.raises(UserError, match="twice"):
        open_checkpoint(tmp_path / "twice.pt")


def test_models_of_pictures_that_are_not_square_are_refused(tmp_path):
    save(new({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": [32, 48]}}, 0), tmp_path)
    for place in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        with pytest.raises(UserError, match="32 x 48, accepted: square ones"):
            load(None, str(place))


def test_what_is_no_file_of_tensors_is_told_in_our_words(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "script.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    (tmp_path / "pointer.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for name, content in {
        "text.pt": b"hello",
        "101.bin": b"e101",
        "empty.ckpt": b"",
        "page.pth": b"<html>",
    }.items():
        (tmp_path / name).write_bytes(content)
    save_file({"a": torch.zeros(99)}, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 99)
    expected = {
        "script.pt": "TorchScript", "module.pt": "torch.nn.modules.linear.Linear", "list.pt": "of a list",
        "none.pt": "of a dict", "pointer.bin": "git lfs pull",
    }  # fmt: skip
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=expected.get(path.name, "not a file of tensors")) as caught:
            open_checkpoint(path)
        line = str(caught.value)
        assert path.name in line and "weights_only" not in line and "trust" not in line and len(line) < 400


# --- the rest --------------------------------------------------------------------------------------------


def test_the_mode_of_what_is_deployed_is_the_umasks(tmp_path):
    before = os.umask(0o027)
    try:
        save(new(CONFIG, 0), tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o640}
    with safe_open(tmp_path / "open_clip_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["open_clip_config"])["model_cfg"] == CONFIG


def test_an_input_of_a_merge_is_not_overwritten(tmp_path):
    for seed, place in enumerate(("old", "new")):
        save(new(CONFIG, seed), tmp_path / place)
    file = tmp_path / "new/open_clip_model.safetensors"
    before = file.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for models, out in (
        ((tmp_path / "old", tmp_path / "new"), tmp_path / "new"),
        ((tmp_path / "old", file), tmp_path / "new"),
        ((file, tmp_path / "old"), file),
        ((tmp_path / "old", tmp_path / "old", "--base", tmp_path / "new"), tmp_path / "link"),
    ):
        done = merge(*models, "-o", out)
        assert done.exit_code == 2 and f"-o {out}" in done.stderr, done.output
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "model", ["ViT-B-32/opanai", "ViT-B-32", "ViT-B-23/openai", "runs/typo/model", "./no.pt"]
)
def test_a_model_that_is_not_there_is_reported_as_given_with_a_few_names(model, small_scale):
    data = small_scale.parent / "data.yaml"
    for command in (("eval",), ("update", "--dry-run"), ("budget",)):
        if command == ("budget",) and model == "ViT-B-32":
            continue  # a name has its costs
        options = () if command == ("budget",) else ("--data", data)
        done = invoke(*command, "--scale", small_scale, *options, "--model", model)
        assert done.exit_code == 2 and model.removeprefix("./") in done.stderr, done.output
        assert len(done.stderr) < 400
