"""Models of every family of open_clip: what goes in comes out with the function it had, plus the update."""

import json
import sys
from itertools import pairwise

import open_clip
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from small_runs import assert_same, invoke

from fomo.architectures import build
from fomo.clip import Clip, load, save
from fomo.datasets.samples import Batch
from fomo.devices import Precision
from fomo.errors import UserError
from fomo.methods import Method
from fomo.recipe import Optimizer
from fomo.train import train
from fomo.weights import is_statistic

CPU = torch.device("cpu")
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}
SIGLIP_TEXT = {**TEXT, "width": 64, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}


def timm(name, size, **more):
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": size, **more}


FAMILIES = {
    "ViT": {"vision_cfg": VIT},
    "QuickGELU": {"vision_cfg": VIT, "quick_gelu": True},
    "CustomText": {"vision_cfg": VIT, "custom_text": True},
    "RN50": {"vision_cfg": {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]}},
    "ConvNeXt": {"vision_cfg": timm("test_convnext", 64, timm_pool="", timm_proj="linear", timm_drop_path=0.1)},
    "timm ViT": {"vision_cfg": timm("test_vit", 160, timm_pool="token", timm_proj="linear")},
    "MobileCLIP": {"vision_cfg": timm("fastvit_t8", 64, timm_pool="avg", timm_proj=None), "custom_text": True},
    "EVA": {"vision_cfg": timm("eva02_tiny_patch14_224", 224, timm_pool="token", timm_proj=None),
            "custom_text": True},
    "SigLIP": {"vision_cfg": timm("test_vit", 160, timm_pool="map", timm_proj="none"), "text_cfg": SIGLIP_TEXT,
               "custom_text": True, "init_logit_bias": -10.0},
    "CoCa": {"vision_cfg": {**VIT, "output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2},
             "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True}, "custom_text": True,
             "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2}},
}  # fmt: skip
PICTURES = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bilinear", "resize_mode": "squash"}


def directory(path, config, **text):
    """A model with random weights as its family's programs write it, without us."""
    torch.manual_seed(0)
    config = {"embed_dim": 64, "text_cfg": TEXT, **config}
    config["text_cfg"] = {**config["text_cfg"], **text}
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PICTURES}))
    state = build(config, "model").state_dict()
    save_file({name: t.contiguous() for name, t in state.items()}, path / "open_clip_model.safetensors")
    return path


def features(path) -> torch.Tensor:
    """As open_clip computes them for a model directory."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
    assert list(transform.transforms[-1].mean) == PICTURES["mean"]
    tokens = open_clip.get_tokenizer(f"local-dir:{path}")(["a cat", "two dogs on a lawn"])
    size = model.visual.image_size
    images = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)),
                         generator=torch.Generator().manual_seed(0))  # fmt: skip
    with torch.no_grad():
        return torch.cat([model.eval().encode_image(images), model.encode_text(tokens)])


def trained(clip: Clip, lr: float) -> Clip:
    """Two steps on two pairs."""
    side = float(clip.image_size)
    canvas = torch.randint(0, 256, (2, clip.image_size, clip.image_size, 3), dtype=torch.uint8)
    tokens = clip.tokenizer(["a cat", "a dog"])
    batch = Batch(canvas, torch.tensor([[0, 0, side, side]] * 2), tokens, torch.ones(2, dtype=torch.int64))
    optimizer = Method().optimizer(list(clip.model.parameters()), Optimizer(lr=1e-3))
    steps = train(clip, Method(), optimizer, [batch, batch], lambda _: lr, device=CPU,
                  precision=Precision("float32", CPU), clip_norm=1.0, max_scale=None)  # fmt: skip
    assert all(step.loss.isfinite() for step in steps)
    return clip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_is_loaded_updated_deployed_and_merged(family, tmp_path):
    source = directory(tmp_path / "source", FAMILIES[family])
    before, state = features(source), load_file(source / "open_clip_model.safetensors")
    (tmp_path / "run/weights").mkdir(parents=True)
    clip = load(None, str(source))
    save(clip, tmp_path / "run/model")
    torch.save({"state_dict": state}, tmp_path / "run/weights/update_001.pt")
    for lr in (None, 0.0, 1e-2):
        clip = load(None, str(tmp_path / "run/weights/update_001.pt"))
        if family == "CoCa" and lr is not None:
            continue  # its captioner has a loss of its own: `update` refuses it
        out = tmp_path / f"lr {lr}"
        save(clip if lr is None else trained(clip, lr), out)
        after = features(out)
        if lr == 1e-2:
            assert after.isfinite().all() and (after - before).abs().max() > 1e-3
        elif lr is None or not any(map(is_statistic, state)):
            torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        else:  # the statistics of a batch are measured whatever the learning rate
            for name in state.keys() - set(filter(is_statistic, state)):
                assert torch.equal(clip.model.state_dict()[name], state[name]), name
    file = tmp_path / "lr None/open_clip_model.safetensors"
    merged(file, file, tmp_path / "itself")
    torch.testing.assert_close(features(tmp_path / "itself"), before, atol=1e-5, rtol=1e-5)


def merged(old, new, out) -> Result:
    done = invoke("merge", "--rule", "interpolate", "--set", "keep=0.5", old, new, "-o", out)
    assert done.exit_code == 0, done.output
    return done


# --- SigLIP ----------------------------------------------------------------------------------------------


def life(siglip, small_scale, tmp_path) -> None:
    """Two updates, a merge of the first and the last weights, both deployed and reopened by open_clip."""
    run = tmp_path / "run"
    settings = ("stream.updates=2", "budget.steps=2", "evaluation.frozen=false")
    done = invoke("update", "--scale", small_scale, "--model", siglip, "--out", run,
                  *(word for setting in settings for word in ("--set", setting)))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["update"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
        2,
    ]
    weights = [load_file(run / f"weights/update_00{n}.safetensors") for n in range(3)]
    assert all(not torch.equal(a["logit_bias"], b["logit_bias"]) for a, b in pairwise(weights))
    assert (features(run / "model") - features(siglip)).abs().max() > 1e-4
    merged(
        run / "weights/update_000.safetensors", run / "weights/update_002.safetensors", tmp_path / "merged"
    )
    assert_same(load_file(tmp_path / "merged/open_clip_model.safetensors"),
                {name: (t + weights[2][name]) / 2 for name, t in weights[0].items()})  # fmt: skip
    written = [
        json.loads((p / "open_clip_config.json").read_text()) for p in (run / "model", tmp_path / "merged")
    ]
    assert written[0] == written[1] and features(tmp_path / "merged").isfinite().all()


def test_a_siglip_lives_through_updates_a_merge_and_its_deployment(small_scale, tmp_path):
    life(directory(tmp_path / "siglip", FAMILIES["SigLIP"]), small_scale, tmp_path)


def test_a_siglip_with_a_tokenizer_of_hugging_face_lives_too(small_scale, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<unk>", "</s>", "a", "photo", "of", "two", "cat", "dogs", "red", "blue", "circle"]
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    core = tokenizers.Tokenizer(vocabulary)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    siglip = directory(tmp_path / "siglip", FAMILIES["SigLIP"], hf_tokenizer_name="nobody/nothing",
                       vocab_size=len(words), tokenizer_kwargs={"clean": "canonicalize"})  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    fast.save_pretrained(siglip)
    life(siglip, small_scale, tmp_path)
    assert load(None, str(tmp_path / "run/weights/update_001.safetensors")).tokenizer(["two cat"])[0, 0] == 6


@pytest.mark.parametrize(
    "text", [{"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}, {"hf_model_name": "roberta-base"}]
)
def test_without_transformers_a_model_that_needs_it_is_one_line(text, tmp_path, monkeypatch):
    siglip = directory(tmp_path / "siglip", FAMILIES["SigLIP"])
    config = json.loads((siglip / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= text
    (siglip / "open_clip_config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(open_clip.hf_model, "transformers", None)
    for model in (siglip, siglip / "open_clip_model.safetensors"):
        with pytest.raises(UserError, match=r"model .*siglip.*pip install -r requirements-hf\.txt"):
            load(None, str(model))
    done = invoke("eval", "--model", siglip, "--data", "none.yaml")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1
