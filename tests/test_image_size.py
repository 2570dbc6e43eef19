"""Models at another resolution: open_clip's own interpolation, kept in what is deployed."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import after_steps, assert_same, invoke, lines, recipe_of, run, terminate, weights_of

from fomo.architectures import configuration
from fomo.clip import load, new, save
from fomo.errors import Interrupted, UserError
from fomo.load_recipe import load as load_recipe

POSITIONS = "visual.positional_embedding"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def small(tmp_path):
    """A model directory, at 32 pixels: 2 x 2 patches."""
    save(new({**CONFIG, "quick_gelu": True}, 0), tmp_path / "small")
    return tmp_path / "small"


def images_of(model, size):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval().encode_image(images)


@pytest.mark.parametrize("size", [16, 48, 64, 112])
@pytest.mark.parametrize("more", [{}, {"custom_text": True}, {"vision": {"pos_embed_type": "sin_cos_2d"}}])
def test_position_embeddings_are_those_of_open_clip(size, more, tmp_path):
    vision = {**CONFIG["vision_cfg"], **more.get("vision", {})}
    save(
        new({**CONFIG, "vision_cfg": vision, **{k: v for k, v in more.items() if k != "vision"}}, 0), tmp_path
    )
    clip = load(None, str(tmp_path), size)
    there, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{tmp_path}", force_image_size=size
    )
    assert clip.model.state_dict()[POSITIONS].shape == (1 + (size // 16) ** 2, 16)
    assert_same(clip.model.state_dict(), there.state_dict())
    assert torch.equal(images_of(clip.model, size), images_of(there, size))
    assert clip.image_size == size and clip.config["preprocess_cfg"]["size"] == [size, size]
    assert transform.transforms[0].size == size
    assert configuration(None, str(tmp_path), size)["model_cfg"] == clip.config["model_cfg"]


def test_the_embeddings_of_a_released_shape_by_torch_alone(tmp_path):
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    save(new(config, 0), tmp_path)
    stored = load_file(tmp_path / "open_clip_model.safetensors")[POSITIONS]
    found = load(None, str(tmp_path), 384).model.state_dict()[POSITIONS]
    grid = stored[1:].reshape(1, 7, 7, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(found[1:], grid.permute(0, 2, 3, 1).reshape(144, -1))
    assert torch.equal(found[0], stored[0])


def test_16_bits_and_the_size_that_a_model_has(small, tmp_path):
    state = load_file(small / "open_clip_model.safetensors")
    assert torch.equal(load(None, str(small), 32).model.state_dict()[POSITIONS], state[POSITIONS])
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, small / "open_clip_model.safetensors")
    expected = load(None, str(small)).model.state_dict()  # in float32
    larger = load(None, str(small), 64)
    open_clip.model.resize_pos_embed(expected, larger.model)
    torch.testing.assert_close(
        larger.model.state_dict()[POSITIONS], expected[POSITIONS], atol=1e-3, rtol=1e-3
    )


def timm(name, size, pool):
    return {"timm_model_name": name, "image_size": size, "timm_pool": pool, "timm_proj": "linear"}


@pytest.mark.parametrize(
    ("vision", "size", "expected"),
    [
        ({}, 40, "image_size: got 40, accepted: a multiple of its patches' 16, as 32 or 48"),
        ({}, 5, "image_size: got 5, accepted: a multiple of its patches' 16, as 16"),
        ({"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]}, 64, "accepted: 32, as its tower is a ResNet"),
        (timm("test_convnext", 64, ""), 96, "accepted: 64, as its tower is test_conv"),
        (timm("test_vit", 160, "token"), 96, "accepted: 160, as its tower is test_vit"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_one_line(vision, size, expected, small_scale, tmp_path):
    save(new({**CONFIG, "vision_cfg": vision or CONFIG["vision_cfg"]}, 0), tmp_path / "model")
    data = ("--data", small_scale.parent / "data.yaml")
    for command in (("eval", *data), ("update", *data, "--dry-run"), ("budget",),
                    ("update", *data, "--out", tmp_path / "run")):  # fmt: skip
        done = invoke(*command, "--scale", small_scale, "--model", tmp_path / "model", "--image-size", size)
        assert done.exit_code == 2 and expected in done.stderr, done.output
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run/recipe.yaml").exists()


@pytest.mark.parametrize("size", ["0", "-32", "large"])
def test_what_is_no_size_is_refused(size, small_scale):
    done = invoke("eval", "--scale", small_scale, "--image-size", size)
    assert done.exit_code == 2 and "--image-size" in done.stderr
    with pytest.raises(UserError, match=r"model\.image_size"):
        recipe_of(small_scale, f"model.image_size={size}")


def test_a_run_at_another_size_resumes_bit_for_bit_and_is_deployed_at_it(small, small_scale, tmp_path):
    command = (
        "update",
        "--scale",
        small_scale,
        "--model",
        small,
        "--image-size",
        64,
        "--set",
        "stream.updates=2",
    )
    done = invoke(*command, "--out", tmp_path / "whole")
    assert done.exit_code == 0, done.output
    with after_steps(6, terminate), pytest.raises(Interrupted):
        run(load_recipe(tmp_path / "whole/recipe.yaml", scale=str(small_scale)), tmp_path / "cut")
    done = invoke(*command, "--out", tmp_path / "cut", "--resume")
    assert done.exit_code == 0, done.output
    assert_same(weights_of(tmp_path / "cut", 2), weights_of(tmp_path / "whole", 2))
    assert_same(weights_of(tmp_path / "cut", 0), load(None, str(small), 64).model.state_dict())
    config = json.loads((tmp_path / "cut/model/open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 64
    assert config["preprocess_cfg"]["size"] == [64, 64]
    there, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/cut/model")
    for place in ("cut/model", "cut/weights/update_002.safetensors"):  # without the option
        again = load(None, str(tmp_path / place))
        assert again.image_size == transform.transforms[0].size == 64
        assert torch.equal(images_of(again.model, 64), images_of(there, 64))
    more = tmp_path / "more.yaml"
    more.write_text("adaptation:\n  icons: {source: world, domain: icons, train: 6, test: 4}\n")
    done = invoke("continue", tmp_path / "cut", "--data", more, "--out", tmp_path / "child")
    assert done.exit_code == 0, done.output
    assert weights_of(tmp_path / "child", 3)[POSITIONS].shape == (17, 16)
    assert load(None, str(tmp_path / "child/model")).image_size == 64


def test_a_scales_own_model_at_another_size(small_scale, tmp_path):
    recipe = recipe_of(small_scale, "model.image_size=48", "stream.updates=1")
    scored = run(recipe, tmp_path / "run")
    assert [line["update"] for line in scored] == [0, 1]
    assert weights_of(tmp_path / "run", 1)[POSITIONS].shape == (10, 16)
    plain = recipe_of(small_scale, "stream.updates=1")
    assert plain.model.pretraining == recipe.model.pretraining  # it is the same model, pretrained once


def test_a_size_in_a_recipe_is_that_of_any_model_unless_it_names_its_own(small, small_scale, tmp_path):
    def size_with(section, **options):
        (tmp_path / "recipe.yaml").write_text(f"model: {section}\n")
        return load_recipe(tmp_path / "recipe.yaml", scale=str(small_scale), **options).model.image_size

    assert size_with("{image_size: 64}", model=str(small)) == 64
    assert size_with("{image_size: 64}", model=str(small), image_size=48) == 48
    assert size_with("{name: ViT-B-16, pretrained: openai, image_size: 384}") == 384
    assert size_with("{name: ViT-B-16, pretrained: openai, image_size: 384}", model=str(small)) is None


def test_costs_are_those_of_the_size(small, small_scale):
    def gflops(*options):
        done = invoke("budget", "--scale", small_scale, "--methods", "finetune", "--json", *options)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["rows"][0]["gflops_per_step"]

    assert gflops("--model", small, "--image-size", 128) > 1.2 * gflops("--model", small)
    assert gflops("--model", "ViT-B-32", "--image-size", 448) > 2 * gflops("--model", "ViT-B-32")


def test_pictures_are_cached_at_the_size(small, small_scale, tmp_path):
    data = tmp_path / "data.yaml"
    data.write_text((small_scale.parent / "data.yaml").read_text())
    folders = []
    for options in ((), ("--image-size", 48)):
        done = invoke("data", "cache", data, "--scale", small_scale, "--model", small, *options)
        assert done.exit_code == 0, done.output
        folders.append(Path(done.stdout.splitlines()[0].split()[-1]))
    sides = [json.loads((folder / "meta.json").read_text())["size"] for folder in folders]
    assert sides == [32, 48]


def test_a_model_of_transformers_at_another_size(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=shape, vision_config={**shape, "image_size": 32, "patch_size": 8})).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "there")
    clip = load(None, str(tmp_path / "there"), 56)
    plain = load(None, str(tmp_path / "there")).model.state_dict()
    open_clip.model.resize_pos_embed(plain, clip.model)
    assert torch.equal(clip.model.state_dict()[POSITIONS], plain[POSITIONS])
    save(clip, tmp_path / "deployed")
    done = invoke("export", tmp_path / "deployed", "--to", "transformers", tmp_path / "out")
    assert done.exit_code == 0, done.output
    larger = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert larger.config.vision_config.image_size == 56
    assert (
        processor.image_processor.crop_size["height"] == processor.image_processor.size["shortest_edge"] == 56
    )
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        found = larger.get_image_features(pixel_values=images)
        torch.testing.assert_close(
            getattr(found, "pooler_output", found), clip.model.eval().encode_image(images)
        )


def test_lines_of_a_run_say_its_size_in_the_recipe(small, small_scale, tmp_path):
    recipe = load_recipe(None, scale=str(small_scale), model=str(small), image_size=48,
                         overrides=["stream.updates=1", "evaluation.frozen=false"])  # fmt: skip
    run(recipe, tmp_path / "run")
    assert "image_size: 48" in (tmp_path / "run/recipe.yaml").read_text()
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 2
