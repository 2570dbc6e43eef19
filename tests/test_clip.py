"""Models against open_clip itself: loss, trimmed text, saving and loading."""

import json
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from small_runs import assert_same

from fomo.clip import Features, contrastive_loss, encode, encode_text, load, new, save, trimmable
from fomo.errors import UserError

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a cat", "a photo of two large dogs on a lawn", "naïve café 🎈", ""]


@pytest.fixture(scope="module")
def clip():
    clip = new(CONFIG, seed=1)
    clip.model.eval()
    return clip


def features(seed=0, n=8, bias=None):
    draw = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(n, 6, generator=draw), dim=-1) for _ in range(2))
    return Features(image, text, torch.tensor(14.3), bias)


def test_contrastive_loss_equals_open_clips():
    f = features()
    expected = open_clip.ClipLoss()(f.image_features, f.text_features, f.logit_scale)
    torch.testing.assert_close(contrastive_loss(f), expected)


def test_models_with_a_logit_bias_get_siglips_loss():
    f = features(bias=torch.tensor(-10.0))
    expected = open_clip.loss.SigLipLoss()(f.image_features, f.text_features, f.logit_scale, f.logit_bias)
    torch.testing.assert_close(contrastive_loss(f), expected)


def test_contrastive_loss_of_two_orthogonal_pairs_is_known():
    eye = torch.eye(2)
    loss = contrastive_loss(Features(eye, eye, torch.tensor(1.0)))
    assert loss.item() == pytest.approx(np.log(1 + np.exp(-1)))


@pytest.mark.parametrize("model_class", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_trimmed_text_features_equal_open_clips(clip, model_class):
    torch.manual_seed(0)
    model = model_class(**CONFIG).eval()
    tokens = clip.tokenizer(TEXTS)
    longest = int(tokens.argmax(-1).max()) + 1
    assert longest < 20
    with torch.no_grad():
        torch.testing.assert_close(encode_text(model, tokens[:, :longest]), model.encode_text(tokens))


def test_towers_that_see_behind_a_captions_end_are_not_trimmed():
    torch.manual_seed(0)
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "no_causal_mask": True, "pool_type": "last"}}
    model = open_clip.CustomTextCLIP(**config).eval()
    assert not trimmable(model.text)
    tokens = open_clip.SimpleTokenizer()(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens))


def test_tokens_end_where_their_caption_ends(clip):
    rows = clip.tokenize(TEXTS)
    full = clip.tokenizer(TEXTS).numpy()
    for row, whole in zip(rows, full, strict=True):
        assert row[-1] == clip.tokenizer.eot_token_id
        assert (whole[: len(row)] == row).all() and not whole[len(row) :].any()


def test_a_saved_model_is_the_same_in_open_clip_in_another_process(clip, tmp_path):
    save(clip, tmp_path / "model")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenizer(TEXTS)
    torch.save({"images": images, "tokens": tokens}, tmp_path / "in.pt")
    code = f"""
import open_clip, torch
model, _, transform = open_clip.create_model_and_transforms("local-dir:{tmp_path}/model")
x = torch.load("{tmp_path}/in.pt")
assert (open_clip.get_tokenizer("local-dir:{tmp_path}/model")({TEXTS!r}) == x["tokens"]).all()
model.eval()
with torch.no_grad():
    torch.save([model.encode_image(x["images"]), model.encode_text(x["tokens"])], "{tmp_path}/out.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    image_features, text_features = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        torch.testing.assert_close(clip.model.encode_image(images), image_features, atol=1e-6, rtol=0)
        torch.testing.assert_close(encode_text(clip.model, tokens), text_features, atol=1e-6, rtol=0)


@pytest.mark.parametrize("more", [{}, {"quick_gelu": True}])
def test_loading_gives_back_what_was_saved(more, tmp_path):
    clip = new({**CONFIG, **more}, seed=0)
    save(clip, tmp_path)
    again = load(None, str(tmp_path))
    assert again.config == clip.config
    assert (again.image_size, again.mean, again.std) == (32, clip.mean, clip.std)
    assert_same(again.model.state_dict(), clip.model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        a, b = (c.model.eval().encode_image(images) for c in (clip, again))
    torch.testing.assert_close(a, b)


def test_features_lie_on_the_unit_sphere(clip):
    f = encode(clip.model, torch.randn(3, 3, 32, 32), clip.tokenizer(TEXTS[:3]))
    for x in (f.image_features, f.text_features):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(3))


def test_mistakes_are_one_line(tmp_path):
    """Pickles that would run code: tests/test_hostile.py."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.pt").write_bytes(b"not tensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "alien.pt")
    cases = [
        ("ViT-B-23", "laion2b_s34b_b79k", "ViT-B-32"),
        ("ViT-B-32", None, "accepted: ViT-B-32/"),
        ("ViT-B-32", "nope", "'nope'"),
        (None, str(tmp_path / "gone.pt"), "gone.pt"),
        (None, str(tmp_path / "empty"), "open_clip_config.json"),
        (None, str(tmp_path / "other.pt"), "not a file of tensors"),
        (None, str(tmp_path / "alien.pt"), "alien.pt"),
    ]
    for name, pretrained, expected in cases:
        with pytest.raises(UserError, match=expected) as caught:
            load(name, pretrained)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_checkpoint_file_of_open_clip_is_recognised_by_its_shapes(tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32")
    torch.save(
        {"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "epoch_1.pt"
    )
    clip = load(None, str(tmp_path / "epoch_1.pt"))
    assert clip.config["model_cfg"] == open_clip.get_model_config("ViT-S-32")
    assert torch.equal(clip.model.visual.proj, model.visual.proj)
    json.dumps(clip.config)
