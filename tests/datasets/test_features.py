"""Features of pictures are those that open_clip computes with the deployed model's own preprocessing."""

from dataclasses import asdict, replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from PIL import Image

from fomo.clip import load, new, save
from fomo.datasets.features import image_features
from fomo.datasets.samples import Samples
from tests.datasets.inputs import Drawn, noise

VISION = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SIZES = [(32, 32), (96, 32), (33, 95), (300, 20), (7, 5), (1, 1), (640, 427), (427, 641), (31, 200), (3, 90)]


def smooth(seed: int, width: int, height: int) -> Image.Image:
    return noise(seed, 6, 5).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [make(i, *size) for i, size in enumerate(SIZES) for make in (noise, smooth)]
PICTURES += [noise(50, 70, 40).convert(mode) for mode in ("L", "P", "1", "CMYK", "RGBA")]


def configs_of_tags() -> list[dict]:
    """Every preprocessing that open_clip's pretrained tags name, and some that none has, once each."""
    tags = (open_clip.get_pretrained_cfg(*tag) for tag in open_clip.list_pretrained())
    found = [merge_preprocess_dict(PreprocessCfg(), tag or {}) for tag in tags]
    odd = {"resize_mode": "longest", "fill_color": 200, "mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)}
    found += [
        merge_preprocess_dict(PreprocessCfg(), {**odd, **more})
        for more in ({}, {"interpolation": "bilinear"})
    ]
    return list({str(sorted(config.items())): config for config in found}.values())


def shown(config: dict) -> str:
    return "{resize_mode} {interpolation} {mean} {std}".format(**config)


@pytest.mark.parametrize("config", configs_of_tags(), ids=shown)
def test_features_are_open_clips_for_the_preprocessing_of_every_tag(config, tmp_path):
    clip = new({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}, seed=0)
    clip.config["preprocess_cfg"] = {**config, "size": 32}
    save(clip, tmp_path / "brought")
    save(load(None, str(tmp_path / "brought")), tmp_path / "deployed")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'deployed'}")
    clip = load(None, str(tmp_path / "deployed"))
    assert replace(clip.preprocess, size=224) == PreprocessCfg(
        **{**config, "mean": [*config["mean"]], "std": [*config["std"]]}
    )
    clip.model.eval()
    source = Drawn(f"pictures {tmp_path}", [-1] * len(PICTURES), PICTURES.__getitem__)
    samples, device = Samples(source, clip, clip.image_size, "pictures"), torch.device("cpu")
    ours = image_features(clip, samples, np.arange(len(source)), device, lambda n: None)
    with torch.no_grad():
        theirs = model.eval().encode_image(torch.stack([preprocess(picture) for picture in PICTURES]))
    torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), rtol=0, atol=1e-5)


def test_there_are_squashing_and_bilinear_tags_and_all_keys_are_known():
    configs = configs_of_tags()
    assert {config["resize_mode"] for config in configs} == {"shortest", "squash", "longest"}
    assert {config["interpolation"] for config in configs} == {"bicubic", "bilinear"}
    assert all(config.keys() == asdict(PreprocessCfg()).keys() for config in configs)
