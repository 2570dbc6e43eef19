"""Models in and out of transformers, whose own models and processors are the oracle.

CPU, no downloads; skipped where transformers is missing:  python -m pytest tests/test_hugging_face.py
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import assert_same, class_folders, invoke
from timm.models.vision_transformer import VisionTransformer

from fomo.architectures import configuration
from fomo.clip import Clip, load, new, save
from fomo.errors import UserError
from fomo.hugging_face.configs import DEFAULTS
from fomo.hugging_face.export import export
from fomo.hugging_face.names import CLIP, SIGLIP, directed
from fomo.hugging_face.pictures import processor_of

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TOWER = {"width": 32, "layers": 2}
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "head_width": 8, **TOWER},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "heads": 2, **TOWER, "layers": 3},
}
TEXTS = ["a cat", "A photo of TWO large_dogs, on a lawn!", "naïve café 🎈", "", "word " * 100]
SIDE = 64  # of the small SigLIP


def shallow(name: str, layers: int = 2) -> dict:
    """The shape of an open_clip architecture with fewer layers, to be quick."""
    config = open_clip.get_model_config(name)
    for part in ("vision_cfg", "text_cfg"):
        config[part]["layers"] = layers
    return config


def drawn(config: dict, seed: int = 0) -> Clip:
    """A model all of whose tensors are random; new ones have biases of zero, which could be mixed up unseen."""
    clip = new(config, seed)
    with torch.no_grad():
        for tensor in clip.model.state_dict().values():
            tensor.add_(0.03 * torch.randn(tensor.shape))
    clip.model.eval()
    return clip


def pictures(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def output(features):
    """Before version 5 a tensor, since then one of several."""
    return getattr(features, "pooler_output", features)


def features_there(model, images, texts) -> tuple:
    """As transformers computes them. texts: what a processor returns."""
    with torch.no_grad():
        return output(model.get_image_features(pixel_values=images)), output(model.get_text_features(**texts))


def features_here(clip: Clip, images, texts: list[str]) -> tuple:
    with torch.no_grad():
        return clip.model.eval().encode_image(images), clip.model.encode_text(clip.tokenizer(texts))


def assert_features(got: tuple, expected: tuple, atol: float = 1e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def opened_there(folder: Path):
    """What the generic classes of transformers make of a directory."""
    model, processor = (
        cls.from_pretrained(folder) for cls in (transformers.AutoModel, transformers.AutoProcessor)
    )
    return model.eval(), processor


def padded(processor, texts: list[str], context: int) -> dict:
    return padded_by(processor.tokenizer, texts, context)


def padded_by(tokenizer, texts: list[str], context: int) -> dict:
    how = {"padding": "max_length", "truncation": True, "max_length": context, "return_tensors": "pt"}
    return dict(tokenizer(texts, **how))


# --- the table -------------------------------------------------------------------------------------------


def sides(table, layers):
    pairs = [(theirs, ours) for ours, theirs, _ in directed(table, "transformers", layers)]
    return [{name for pair in pairs for name in pair[side]} for side in range(2)]


def test_the_table_has_every_tensor_of_both_sides_once():
    config = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "layers": 2}}
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 2}))  # fmt: skip
    theirs, ours = sides(CLIP, 2)
    assert theirs == set(clip.state_dict()) and ours == set(open_clip.CLIP(**config).state_dict())
    siglip = transformers.SiglipModel(transformers.SiglipConfig(
        text_config={"num_hidden_layers": 2, "vocab_size": 9},
        vision_config={"num_hidden_layers": 2}))  # fmt: skip
    assert sides(SIGLIP, 2)[0] == set(siglip.state_dict())


def test_what_a_config_leaves_out_is_what_transformers_takes():
    for kind, classes in (
        ("clip", (transformers.CLIPTextConfig, transformers.CLIPVisionConfig)),
        ("siglip", (transformers.SiglipTextConfig, transformers.SiglipVisionConfig)),
    ):
        for default, cls in zip(DEFAULTS[kind], classes, strict=True):
            there = cls()
            differing = {k for k, v in vars(default).items() if getattr(there, k) != v}
            assert differing <= {"eos_token_id"}, (kind, differing)  # SigLIP pools the last token


# --- out -------------------------------------------------------------------------------------------------

OUT = {
    "small": SMALL,
    "QuickGELU": {**SMALL, "quick_gelu": True},
    "custom text": {**SMALL, "custom_text": True},
    "eps and tanh": {
        **SMALL,
        "vision_cfg": {
            **SMALL["vision_cfg"],
            "norm_kwargs": {"eps": 1e-3},
            "act_kwargs": {"approximate": "tanh"},
        },
    },
    "sines": {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "pos_embed_type": "sin_cos_2d"}},
    "eos": {**SMALL, "text_cfg": {**SMALL["text_cfg"], "pool_type": "eos", "eos_id": 49407}},
    "ViT-B-32": shallow("ViT-B-32"),
    "ViT-B-32-quickgelu": shallow("ViT-B-32-quickgelu"),
    "ViT-B-16": shallow("ViT-B-16"),
    "ViT-L-14-336-quickgelu": shallow("ViT-L-14-336-quickgelu", 1),
}


@pytest.mark.parametrize("name", OUT)
def test_an_exported_model_is_the_same_in_transformers_and_back(name, tmp_path):
    clip = drawn(OUT[name])
    save(clip, tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out")
    model, processor = opened_there(tmp_path / "out")
    images, here = pictures(clip.image_size), features_here(clip, pictures(clip.image_size), TEXTS)
    context = clip.config["model_cfg"]["text_cfg"].get("context_length", 77)
    assert_features(features_there(model, images, padded(processor, TEXTS, context)), here)
    assert torch.equal(model.logit_scale, clip.model.logit_scale)
    again = load(None, str(tmp_path / "out"))
    assert type(again.tokenizer) is open_clip.SimpleTokenizer
    assert_features(features_here(again, images, TEXTS), here)
    assert again.config["preprocess_cfg"] == clip.config["preprocess_cfg"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu"])
def test_a_whole_model_is_the_same_in_transformers(name, tmp_path):
    clip = drawn(open_clip.get_model_config(name))
    save(clip, tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out")
    model, processor = opened_there(tmp_path / "out")
    here = features_here(clip, pictures(224, 1), TEXTS[:2])
    assert_features(features_there(model, pictures(224, 1), padded(processor, TEXTS[:2], 77)), here)
    assert load(None, str(tmp_path / "out")).config["model_cfg"] == open_clip.get_model_config(name)


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_processor_prepares_pictures_as_the_model_does(resize_mode, interpolation, tmp_path):
    clip = new(SMALL, 0)
    clip.model.visual.preprocess_cfg |= {"resize_mode": resize_mode, "interpolation": interpolation}
    clip.config["preprocess_cfg"] |= {
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
        "resize_mode": resize_mode, "interpolation": interpolation,
    }  # fmt: skip
    save(clip, tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out")
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/model")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "out")
    got = processor(images=photo(), return_tensors="pt")["pixel_values"][0]
    # One level of 255, where it resizes by torchvision and not by Pillow.
    torch.testing.assert_close(got, transform(photo()), atol=1.01 / 255 / 0.4, rtol=0)
    assert load(None, str(tmp_path / "out")).config["preprocess_cfg"] == clip.config["preprocess_cfg"]
    (tmp_path / "out/processor_config.json").unlink(missing_ok=True)  # as older versions have it
    assert load(None, str(tmp_path / "out")).config["preprocess_cfg"] == clip.config["preprocess_cfg"]


def test_the_tokenizer_has_the_ids_of_open_clips_own(tmp_path):
    save(new({**SMALL, "text_cfg": {**SMALL["text_cfg"], "context_length": 77}}, 0), tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = open_clip.SimpleTokenizer()
    names = {name.replace("_", " ") for name in timm.list_models()[:500]}
    templates = [t(word) for t in open_clip.OPENAI_IMAGENET_TEMPLATES for word in ("cat", "Tench", "T-shirt")]
    draw = np.random.default_rng(0)
    noise = ["".join(map(chr, draw.integers(32, 127, 40))) for _ in range(300)]
    noise += ["".join(map(chr, draw.integers(0xA1, 0x2FF, 30))) for _ in range(100)]  # letters of Europe
    noise += ["".join(map(chr, draw.integers(0x4E00, 0x9FFF, 20))) for _ in range(100)]
    fixed = [
        "DON'T you'LL WE'VE",
        "tab\tand\nline",
        "١٢٣ ½ ²",
        "🎈🎈 👩‍👩‍👧",
        "e\u0301 é",
        "long " * 200,
        "",
        " ",
        "?!...",
    ]
    texts = [*fixed, *TEXTS, *names, *templates, *open_clip.IMAGENET_CLASSNAMES, *noise]
    texts = [
        text for text in texts if "&" not in text and open_clip.tokenizer.basic_clean(text) == text.strip()
    ]
    assert len(texts) > 1800
    found = theirs(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    ends = ours(texts).argmax(-1)
    assert found.shape[1] == 77  # the model's context
    for text, a, b, end in zip(texts, ours(texts), found, ends, strict=True):
        assert torch.equal(a[: end + 1], b[: end + 1]) and b[end] == theirs.eos_token_id, text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_keep_their_dtype_both_ways(dtype, tmp_path):
    clip = drawn(SMALL)
    clip.model.to(dtype)
    save(clip, tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    done = invoke("merge", "--rule", "interpolate", "--set", "keep=1", *[tmp_path / "out"] * 2,
                  "-o", tmp_path / "merged.safetensors")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert_same(load_file(tmp_path / "merged.safetensors"), clip.model.state_dict())


VISION, TEXT = SMALL["vision_cfg"], SMALL["text_cfg"]
REFUSED = {
    "ls_init_value": {"vision_cfg": {**VISION, "ls_init_value": 0.1}},
    "no_ln_pre": {"vision_cfg": {**VISION, "no_ln_pre": True}},
    "pool_type: got 'avg'": {"vision_cfg": {**VISION, "pool_type": "avg"}},
    "a ResNet": {"vision_cfg": {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]}},
    "test_convnext": {"vision_cfg": {"timm_model_name": "test_convnext", "image_size": 64, "timm_pool": "",
                                     "timm_proj": "linear"}},
    "test_vit": {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token",
                                "timm_proj": "linear"}},
    "CoCa": {"vision_cfg": {**VISION, "output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2},
             "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True}, "custom_text": True,
             "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2}},
    "no_causal_mask": {"text_cfg": {**TEXT, "no_causal_mask": True}, "custom_text": True},
    "proj_bias": {"text_cfg": {**TEXT, "proj_bias": True}},
    "init_logit_bias": {"init_logit_bias": -10.0},
    "qk_norm": {"vision_cfg": {**VISION, "qk_norm": True}},
    "tokenizer_kwargs.clean": {"text_cfg": {**TEXT, "tokenizer_kwargs": {"clean": "whitespace"}}},
    "eos_id: got 2": {"text_cfg": {**TEXT, "pool_type": "eos"}},
}  # fmt: skip


@pytest.mark.parametrize("named", REFUSED)
def test_what_transformers_cannot_express_is_refused_in_one_line(named, tmp_path):
    save(new({**SMALL, **REFUSED[named]}, 0), tmp_path / "model")
    done = invoke("export", tmp_path / "model", "--to", "transformers", tmp_path / "out")
    assert done.exit_code == 2 and named in done.stderr, done.output
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_pictures_that_are_padded_are_refused(tmp_path):
    clip = new(SMALL, 0)
    clip.config["preprocess_cfg"]["resize_mode"] = "longest"
    save(clip, tmp_path / "model")
    with pytest.raises(UserError, match=r"resize_mode.*'longest', accepted: shortest, squash"):
        export(str(tmp_path / "model"), tmp_path / "out")


def test_an_export_needs_transformers_and_a_new_folder(tmp_path, monkeypatch):
    save(new(SMALL, 0), tmp_path / "model")
    for out in (tmp_path / "model", tmp_path / "model/open_clip_config.json"):
        done = invoke("export", tmp_path / "model", "--to", "transformers", out)
        assert done.exit_code == 2 and "exists already" in done.stderr
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = invoke("export", tmp_path / "model", "--to", "transformers", tmp_path / "out")
    assert done.exit_code == 2 and "pip install -r requirements-hf.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- in --------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}


def directory(
    path: Path, text: dict | None = None, vision: dict | None = None, processor: bool = True, **saving
):
    """A CLIPModel with random weights as transformers saves it; -> the model."""
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config={**SIZES, "num_hidden_layers": 3, **(text or {})}, projection_dim=24,
        vision_config={**SIZES, "image_size": 32, "patch_size": 8, **(vision or {})},
    )).eval()  # fmt: skip
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.03 * torch.randn(tensor.shape))
    model.save_pretrained(path, **saving)
    if processor:
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        images.save_pretrained(path)
        for name in ("vocab.json", "merges.txt"):
            (path / name).write_text(words()[name], encoding="utf-8")
    return model


def words() -> dict[str, str]:
    tokenizer = open_clip.SimpleTokenizer()
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    pairs = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    vocabulary = {marks.get(word, word): number for word, number in tokenizer.encoder.items()}
    return {"vocab.json": json.dumps(vocabulary), "merges.txt": "\n".join(["#version: 0.2", *pairs])}


IN = {
    "QuickGELU": {},
    "GELU": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}},
    "tanh in one tower": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu_pytorch_tanh"}},
    "eps": {"text": {"layer_norm_eps": 1e-3}, "vision": {"layer_norm_eps": 1e-4}},
    "eos of older files": {"text": {"eos_token_id": 2}},
    "short texts": {"text": {"max_position_embeddings": 12}},
    "shards": {"max_shard_size": "300KB"},
    "other widths": {"text": {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 111}},
}


@pytest.mark.parametrize("case", IN)
def test_a_model_of_transformers_is_opened_as_what_it_is(case, tmp_path):
    model = directory(tmp_path, **IN[case])
    clip = load(None, str(tmp_path))
    ids = {"input_ids": clip.tokenizer(TEXTS)}
    assert_features(features_here(clip, pictures(32), TEXTS), features_there(model, pictures(32), ids))
    assert torch.equal(clip.model.logit_scale, model.logit_scale)
    assert configuration(None, str(tmp_path))["model_cfg"] == clip.config["model_cfg"]
    save(clip, tmp_path / "deployed")
    there, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/deployed")
    with torch.no_grad():
        torch.testing.assert_close(
            there.eval().encode_image(pictures(32)), clip.model.encode_image(pictures(32))
        )
    export(str(tmp_path / "deployed"), tmp_path / "out")
    assert_features(features_there(opened_there(tmp_path / "out")[0], pictures(32), ids),
                    features_there(model, pictures(32), ids))  # fmt: skip


def test_a_clip_with_a_word_of_its_own(tmp_path):
    """Whose id is above that of a text's end."""
    model = directory(tmp_path / "there", text={"vocab_size": 49409})
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "there")
    tokenizer.add_tokens("<sks>")
    tokenizer.save_pretrained(tmp_path / "there")
    texts = ["a photo of a <sks> dog", "A Cat"]
    clip = load(None, str(tmp_path / "there"))
    assert clip.config["model_cfg"]["text_cfg"]["pool_type"] == "eos"
    expected = padded_by(tokenizer, texts, 77)
    assert (
        torch.equal(clip.tokenizer(texts), expected["input_ids"]) and (expected["input_ids"] == 49408).any()
    )
    assert_features(features_here(clip, pictures(32), texts), features_there(model, pictures(32), expected))
    save(clip, tmp_path / "deployed")
    export(str(tmp_path / "deployed"), tmp_path / "out")
    again, processor = opened_there(tmp_path / "out")
    inputs = padded_by(processor.tokenizer, texts, 77)
    assert_features(
        features_there(again, pictures(32), inputs), features_there(model, pictures(32), expected)
    )


def test_files_of_torch_in_one_or_several_and_a_file_by_its_own_name(tmp_path, capsys):
    model = directory(tmp_path / "whole")
    state = load_file(tmp_path / "whole/model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # of versions before 4.31
    for name in ("bin", "parts"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    torch.save({f"module.{name}": t for name, t in state.items()}, tmp_path / "bin/pytorch_model.bin")
    names = [sorted(state)[:20], sorted(state)[20:]]
    for i, part in enumerate(names):
        torch.save({n: state[n] for n in part}, tmp_path / f"parts/pytorch_model-{i}.bin")
    index = {"weight_map": {n: f"pytorch_model-{i}.bin" for i, part in enumerate(names) for n in part}}
    (tmp_path / "parts/pytorch_model.bin.index.json").write_text(json.dumps(index))
    for place in ("bin", "parts", "bin/pytorch_model.bin", "whole/model.safetensors"):
        clip = load(None, str(tmp_path / place))
        assert torch.equal(
            clip.model.visual.conv1.weight, model.vision_model.embeddings.patch_embedding.weight
        )
        ids = {"input_ids": clip.tokenizer(TEXTS)}
        assert_features(features_here(clip, pictures(32), TEXTS), features_there(model, pictures(32), ids))
    assert "position_ids" in capsys.readouterr().err


def test_a_model_without_tokenizer_and_processor_is_taken_as_usual_and_that_is_said(tmp_path, capsys):
    directory(tmp_path, processor=False)
    assert load(None, str(tmp_path)).config["preprocess_cfg"]["resize_mode"] == "shortest"
    told = capsys.readouterr().err
    assert "no tokenizer lies beside it" in told and "no preprocessor_config.json" in told


def test_pictures_that_open_clip_prepares_otherwise_are_named(tmp_path, capsys):
    directory(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    said = processor_of(tmp_path) | {"size": 36, "crop_size": 32, "resample": 1, "do_rescale": True}
    file.write_text(json.dumps(said))
    assert load(None, str(tmp_path)).config["preprocess_cfg"]["interpolation"] == "bicubic"
    told = capsys.readouterr().err
    assert "size {'shortest_edge': 36} is {'shortest_edge': 32} here, resample 1 is 3 here" in told


MISTAKES = {
    "accepted: clip (CLIPModel) and siglip (SiglipModel)": {"model_type": "blip"},
    "text_config.hidden_act: unknown 'relu'": {"text_config": {"hidden_act": "relu"}},
    "accepted: quick_gelu in both or in neither": {"vision_config": {"hidden_act": "gelu"}},
    "vision_config.num_channels: got 4": {"vision_config": {"num_channels": 4}},
    "vision_config.image_size: got [32, 48]": {"vision_config": {"image_size": [32, 48]}},
    "text_config.num_attention_heads: got 5": {"text_config": {"num_attention_heads": 5}},
    "text_config: expected named fields": {"text_config": [1]},
    "text_config.hidden_size: expected a whole number": {"text_config": {"hidden_size": "wide"}},
    "projection_dim": {"projection_dim": -1},
    "visual.positional_embedding is (17, 32), not": {"vision_config": {"image_size": 64}},
    "visual.transformer.resblocks.2.ln_1.weight is missing": {"vision_config": {"num_hidden_layers": 3}},
}


@pytest.mark.parametrize("expected", MISTAKES)
def test_a_wrong_configuration_is_one_line(expected, tmp_path):
    directory(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in MISTAKES[expected].items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = invoke("eval", "--model", tmp_path, "--data", "none.yaml")
    assert done.exit_code == 2
    with pytest.raises(UserError) as caught:
        load(None, str(tmp_path))
    assert expected in str(caught.value) and str(tmp_path) in str(caught.value)


def test_incomplete_directories_are_one_line(tmp_path):
    directory(tmp_path / "whole")
    cases = {"config.json": "expected its config.json", "model.safetensors": "expected model.safetensors or"}
    for missing, expected in cases.items():
        shutil.copytree(tmp_path / "whole", tmp_path / missing)
        (tmp_path / missing / missing).unlink()
        with pytest.raises(UserError, match=expected):
            load(None, str(tmp_path / missing))
    index = tmp_path / "model.safetensors/model.safetensors.index.json"
    for weight_map, expected in (
        ({"a": "../whole/model.safetensors"}, "accepted: names of files beside it"),
        ({"a": "gone.safetensors"}, "gone.safetensors: cannot be read: No such file"),
        ([], "expected weight_map"),
        ({"a": 1}, "1: cannot be read: No such file"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=expected):
            load(None, str(index.parent))


# --- in commands -----------------------------------------------------------------------------------------


def test_a_model_of_transformers_is_updated_scored_merged_and_exported(tmp_path):
    directory(tmp_path / "there")
    photos = class_folders(tmp_path / "photos", ["red", "blue"], 6)
    settings = ("budget.steps=2", "evaluation.keeps=[]", "evaluation.frozen=false")
    done = invoke("update", "--model", tmp_path / "there", "--data", photos, "--out", tmp_path / "run",
                  *(word for setting in settings for word in ("--set", setting)))  # fmt: skip
    assert done.exit_code == 0, done.output
    done = invoke("eval", "--model", tmp_path / "there", "--data", tmp_path / "run/data.yaml", "--json")
    assert done.exit_code == 0 and "ka" in json.loads(done.stdout)
    for command in (
        ("stream", "--updates", 1),
        ("data", "cache"),
        ("data", "check"),
        ("budget", "--methods", "finetune"),
    ):
        last = () if command[0] == "budget" else (tmp_path / "run/data.yaml",)
        data = ("--data", *last) if command[0] == "stream" else last
        done = invoke(*command, "--model", tmp_path / "there", *data)
        assert done.exit_code == 0, done.output
    done = invoke("merge", "--rule", "interpolate", "--set", "keep=0.5", tmp_path / "there",
                  tmp_path / "run/model", "-o", tmp_path / "merged")  # fmt: skip
    assert done.exit_code == 0, done.output
    for source in ("run", "merged"):
        done = invoke("export", tmp_path / source, "--to", "transformers", tmp_path / f"{source} out")
        assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / f"{source} out"), done.output
        clip = load(None, str(tmp_path / source / ("model" if source == "run" else "")))
        model, processor = opened_there(tmp_path / f"{source} out")
        there = features_there(model, pictures(32), padded(processor, TEXTS, 77))
        assert_features(there, features_here(clip, pictures(32), TEXTS))


def test_a_run_that_has_deployed_nothing_is_no_export(tmp_path):
    (tmp_path / "run/state").mkdir(parents=True)
    (tmp_path / "run/recipe.yaml").write_text("{}")
    done = invoke("export", tmp_path / "run", "--to", "transformers", tmp_path / "out")
    assert done.exit_code == 2 and "first go on with" in done.stderr


# --- the hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A hub that has one repository, ORG/NAME: what is in this folder."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    there, here, asked = tmp_path / "there", tmp_path / "snapshot", []
    here.mkdir()

    def snapshot(name, allow_patterns):
        assert name == "ORG/NAME"
        for file in there.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                asked.append(file.name)
                shutil.copy(file, here / file.name)
        return str(here)

    def one(name, file, **_):
        if not (there / file).exists():
            raise LocalEntryNotFoundError(f"{name} has no {file}")
        return str(there / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    return there, asked


@pytest.mark.parametrize("how", ["whole", "parts", "bin"])
def test_a_repository_of_transformers_on_the_hub(how, repository, capsys):
    there, asked = repository
    model = directory(there, **({"max_shard_size": "300KB"} if how == "parts" else {}))
    if how == "bin":
        torch.save(load_file(there / "model.safetensors"), there / "pytorch_model.bin")
        (there / "model.safetensors").unlink()
    (there / "tf_model.h5").write_bytes(b"")
    config = configuration("hf-hub:ORG/NAME", None)
    assert not any(name.startswith(("model-", "model.safetensors", "pytorch")) and "json" not in name
                   for name in asked)  # fmt: skip
    clip = load("hf-hub:ORG/NAME", None)
    assert clip.config["model_cfg"] == config["model_cfg"] and "tf_model.h5" not in asked
    ids = {"input_ids": clip.tokenizer(TEXTS)}
    assert_features(features_here(clip, pictures(32), TEXTS), features_there(model, pictures(32), ids))
    done = invoke("budget", "--model", "hf-hub:ORG/NAME", "--methods", "finetune")
    assert done.exit_code == 0, done.output


def test_what_is_no_model_on_the_hub_is_one_line(repository):
    there, _ = repository
    there.mkdir()
    with pytest.raises(UserError, match=r"hf-hub:ORG/NAME: cannot be had: ORG/NAME has neither"):
        load("hf-hub:ORG/NAME", None)
    done = invoke("eval", "--model", "ORG/NAME", "--data", "none.yaml")
    assert done.exit_code == 2 and "hf-hub:ORG/NAME" in done.stderr, done.output


# --- SigLIP ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def small_towers():
    """SigLIP's tower at a small size, as timm has it at large ones, with either activation."""
    for patch, act in ((16, "gelu"), (32, "gelu_tanh")):

        def entry(pretrained=False, pretrained_cfg=None, patch=patch, act=act, **kwargs):
            shape = {"img_size": SIDE, "patch_size": patch, "embed_dim": 48, "depth": 2, "num_heads": 3}
            known = {k: v for k, v in kwargs.items() if k in ("num_classes", "global_pool")}
            return VisionTransformer(**shape, class_token=False, act_layer=act, **known)

        entry.__name__ = f"vit_test_patch{patch}_siglip_{SIDE}"
        timm.models.register_model(entry)


def word_tokenizer():
    """A small tokenizer of the kind that SigLIP has: pieces of words, an end, padding."""
    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁photo", "▁of", "▁two", "▁large", "▁cat", "▁dogs", "▁on", "▁lawn",
              "▁caf", "é", "▁na", "ï", "ve", "▁word", "▁"]  # fmt: skip
    scores = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="</s>", eos_token="</s>", unk_token="<unk>"
    )


def siglip_cfg(patch: int) -> dict:
    tower = {"timm_model_name": f"vit_test_patch{patch}_siglip_{SIDE}", "timm_model_pretrained": False}
    return {
        "embed_dim": 48,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": SIDE, **tower, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            "context_length": 16, "vocab_size": 19, "hf_tokenizer_name": "nobody/nothing",
            "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 40, "heads": 2, "layers": 2,
            "mlp_ratio": 3.7362, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    }  # fmt: skip


def siglip_here(path: Path, patch: int = 16) -> Clip:
    """As open_clip has it."""
    path.mkdir()
    word_tokenizer().save_pretrained(path)
    config = siglip_cfg(patch)
    pictures = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pictures}))
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    state = {name: t + 0.03 * torch.randn(t.shape) for name, t in model.state_dict().items()}
    torch.save(state, path / "open_clip_pytorch_model.bin")
    return load(None, str(path))


@pytest.mark.parametrize("patch", [16, 32])
def test_a_siglip_is_the_same_in_transformers_and_back(patch, tmp_path):
    clip = siglip_here(tmp_path / "siglip", patch)
    export(str(tmp_path / "siglip"), tmp_path / "out")
    model, processor = opened_there(tmp_path / "out")
    assert type(model) is transformers.SiglipModel and type(processor) is transformers.SiglipProcessor
    inputs = dict(
        processor(text=TEXTS, images=photo(), padding="max_length", truncation=True, return_tensors="pt")
    )
    assert set(inputs) == {"input_ids", "pixel_values"}  # no mask
    assert torch.equal(inputs["input_ids"], clip.tokenizer(TEXTS))
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/siglip")
    torch.testing.assert_close(
        inputs.pop("pixel_values")[0], transform(photo()), atol=1.01 / 255 / 0.5, rtol=0
    )
    here = features_here(clip, pictures(SIDE), TEXTS)
    assert_features(features_there(model, pictures(SIDE), inputs), here)
    assert (model.logit_scale, model.logit_bias) == (clip.model.logit_scale, clip.model.logit_bias)
    again = load(None, str(tmp_path / "out"))
    assert_features(features_here(again, pictures(SIDE), TEXTS), here)
    assert again.config["preprocess_cfg"] == clip.config["preprocess_cfg"]


def siglip_directory(path: Path, patch: int, vocab_size: int):
    """A SiglipModel with random weights as transformers saves it; -> the model."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = transformers.SiglipModel(transformers.SiglipConfig(
        text_config={**SIZES, "vocab_size": vocab_size, "max_position_embeddings": 16, "projection_size": 48},
        vision_config={**shape, "image_size": SIDE, "patch_size": patch},
    )).eval()  # fmt: skip
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.03 * torch.randn(tensor.shape))
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("patch", [16, 32])
def test_a_siglip_of_transformers_is_opened_and_lives(patch, small_scale, tmp_path, capsys):
    model = siglip_directory(tmp_path / "siglip", patch, vocab_size=19)
    word_tokenizer().save_pretrained(tmp_path / "siglip")
    clip = load(None, str(tmp_path / "siglip"))
    exact = "with gelu in place of gelu_pytorch_tanh" not in capsys.readouterr().err
    assert exact == (patch == 32)  # the tower that timm has with this activation
    ids = {"input_ids": clip.tokenizer(TEXTS)}
    here, there = features_here(clip, pictures(SIDE), TEXTS), features_there(model, pictures(SIDE), ids)
    assert_features(here[1:], there[1:])
    assert_features(here[:1], there[:1], 1e-5 if exact else 2e-2)
    assert clip.config["preprocess_cfg"]["resize_mode"] == "squash"
    done = invoke("update", "--scale", small_scale, "--model", tmp_path / "siglip", "--out", tmp_path / "run",
                  "--set", "stream.updates=1", "--set", "evaluation.frozen=false")  # fmt: skip
    assert done.exit_code == 0, done.output
    export(str(tmp_path / "run"), tmp_path / "out")
    deployed = load(None, str(tmp_path / "run/model"))
    here = features_here(deployed, pictures(SIDE), TEXTS)
    assert_features(features_there(opened_there(tmp_path / "out")[0], pictures(SIDE), ids), here)


def test_a_tokenizer_on_sentencepiece_keeps_its_class(tmp_path, capsys):
    """As google/siglip-* have it."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    corpus = (Path(__file__).parents[1] / "README.md").read_text().lower().splitlines()
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    spm.SentencePieceTrainer.train(sentence_iterator=filter(None, corpus), model_prefix=str(tmp_path / "spiece"),
                                   vocab_size=300, minloglevel=2, **special)  # fmt: skip
    directory = siglip_directory(tmp_path / "siglip", 32, vocab_size=300)
    transformers.SiglipTokenizer(str(tmp_path / "spiece.model")).save_pretrained(tmp_path / "siglip")
    clip = load(None, str(tmp_path / "siglip"))
    export(str(tmp_path / "siglip"), tmp_path / "out")
    assert "drops _, which" in capsys.readouterr().err
    model, processor = opened_there(tmp_path / "out")
    texts = [text.replace("_", " ") for text in TEXTS]
    inputs = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")
    assert set(inputs) == {"input_ids"} and torch.equal(inputs["input_ids"], clip.tokenizer(texts))
    here = features_here(clip, pictures(SIDE), texts)
    assert_features(features_there(model, pictures(SIDE), inputs), here)
    assert_features(features_there(directory, pictures(SIDE), inputs), here)


@pytest.mark.slow
def test_the_shape_of_a_released_siglip(tmp_path):
    """google/siglip-base-patch16-224's, its text tower cut to two layers and 99 words."""
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={"vocab_size": 99, "num_hidden_layers": 2}, vision_config={"hidden_act": "gelu"}
    )
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    clip = load(None, str(tmp_path))
    assert clip.config["model_cfg"]["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_224"
    ids = {"input_ids": clip.tokenizer(TEXTS)}
    assert_features(
        features_here(clip, pictures(224, 1), TEXTS), features_there(model, pictures(224, 1), ids)
    )
