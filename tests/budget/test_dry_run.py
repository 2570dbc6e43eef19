"""What a dry run says beforehand is what the run then does, and nothing is written."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fomo.budget.dry_run import dry_run
from fomo.errors import UserError
from fomo.load_recipe import load
from fomo.recipe import Model

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "vit": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "resnet": {"image_size": 32, "patch_size": None, "width": 8, "layers": [1, 1, 1, 1]},
}
for tower in ("test_vit", "fastvit_t8", "test_convnext", "test_resnet", "test_byobnet"):
    VISION[tower] = {"timm_model_name": tower, "timm_model_pretrained": False, "timm_pool": "avg"}
    VISION[tower] |= {"timm_proj": "linear", "image_size": 32, "timm_drop_path": 0.1}


def test_a_dry_run_says_steps_sets_and_the_missing_pool(small_scale, tmp_path):
    recipe = load(None, scale=str(small_scale))
    text = dry_run(recipe, "cpu")
    assert "learns 20 concepts with 120 pictures in 3 updates; a pretraining pool of 1 source" in text
    assert "scored on 3 test sets with 120 pictures" in text
    assert "steps: 4 of 12 pairs per update, 12 in all" in text and "without a pretraining pool" not in text
    lines = (small_scale.parent / "data.yaml").read_text().split("adaptation:")
    (tmp_path / "bare.yaml").write_text(f"adaptation:{lines[1]}")
    bare = load(None, scale=str(small_scale), data=str(tmp_path / "bare.yaml"))
    assert "bare.yaml: without a pretraining pool" in dry_run(bare, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["bare.yaml"]


@pytest.fixture(params=VISION)
def architecture(request, tmp_path):
    """The name of a small one that open_clip knows during a test, and the file of its weights."""
    name = f"small-{request.param}"
    config = {"embed_dim": 64, "vision_cfg": VISION[request.param], "text_cfg": TEXT}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    model = open_clip.create_model(name)
    save_file(
        {key: t.contiguous() for key, t in model.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    yield name, tmp_path / "weights.safetensors", sum(p.numel() for p in model.parameters())
    open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path / f"{name}.json")
    open_clip.factory._MODEL_CONFIGS.pop(name)


def test_a_dry_run_of_a_checkpoint_file_of_any_tower(small_scale, architecture):
    name, file, parameters = architecture
    named = replace(load(None, scale=str(small_scale)), model=Model(name=name, pretrained=str(file)))
    gib = (2 * 4 + 2 * 3 + 1) * parameters * 4 / 2**30
    assert f"disk: about {gib:.2g} GiB" in dry_run(named, "cpu")
    assert dry_run(load(None, scale=str(small_scale), model=str(file)), "cpu").endswith("run folder")


@pytest.mark.parametrize("model", ["PE-Core-T-16-384/meta"])
def test_a_dry_run_of_an_open_clip_tag_with_a_timm_tower(small_scale, model):
    assert "memory: " in dry_run(load(None, scale=str(small_scale), model=model), "cpu")


@pytest.mark.parametrize("model", ["ViT-B-32/nonsense", "ViT-B-32", "nosuchmodel/x", "MobileCLIP-S1/openai"])
def test_a_dry_run_refuses_weights_that_are_not_there(small_scale, model):
    with pytest.raises(UserError) as error:
        dry_run(load(None, scale=str(small_scale), model=model), "cpu")
    assert model.partition("/")[0] in str(error.value) and len(str(error.value)) < 1000


def test_a_dry_run_refuses_a_model_directory_without_weights(small_scale, tmp_path):
    clip = load(None, scale=str(small_scale)).model.config
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip, "preprocess_cfg": {}}))
    for model in (str(tmp_path), f"local-dir:{tmp_path}"):
        with pytest.raises(UserError, match="no file of weights"):
            dry_run(load(None, scale=str(small_scale), model=model), "cpu")
    torch.save(open_clip.CLIP(**clip).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    assert "disk: " in dry_run(load(None, scale=str(small_scale), model=str(tmp_path)), "cpu")
