"""Which precision `auto` is, and that it is that of training and of scoring alike."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import CPU, assert_same, invoke, lines, recipe_of, run, run_until, terminate, weights_of

import fomo.devices
from fomo.datasets import datafile
from fomo.datasets.features import central_images, image_features, text_features
from fomo.datasets.samples import Samples
from fomo.devices import Precision
from fomo.errors import Interrupted
from fomo.pretrain import starting_model

MPS = torch.device("mps")
OVERRIDES = ("method={name: merge}", "stream.updates=2", "optimizer.lr=1e-2", "evaluation.within=2")


def pretend(patch: pytest.MonkeyPatch) -> None:
    """This CPU has the instructions, and the small model is wide."""
    patch.setattr(fomo.devices, "cpu_multiplies_bf16", lambda: True)
    patch.setattr(Precision, "WIDE", 1)


@pytest.fixture
def wide_on_a_cpu_with_bf16(monkeypatch):
    pretend(monkeypatch)


@pytest.mark.parametrize(
    ("instructions", "width", "device", "name"),
    [
        (True, 512, CPU, "bf16"),
        (True, 256, CPU, "bf16"),
        (True, 64, CPU, "float32"),  # tiny
        (False, 512, CPU, "float32"),
        (True, 512, MPS, "float32"),
    ],
)
def test_auto_is_bf16_on_a_cpu_where_that_is_faster(monkeypatch, instructions, width, device, name):
    monkeypatch.setattr(fomo.devices, "cpu_multiplies_bf16", lambda: instructions)
    assert Precision("auto", device, width).name == name
    assert Precision("float32", device, width).name == "float32"


def test_a_machine_says_whether_it_has_instructions_for_bf16():
    """As Linux does of its first core."""
    about = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)", about.read_text(), re.M) if about.exists() else None
    if flags is None:
        pytest.skip("no flags of an x86 CPU in /proc/cpuinfo")
    assert fomo.devices.cpu_multiplies_bf16() == bool({"avx512_bf16", "amx_tile"} & set(flags[1].split()))


def test_pictures_are_scored_in_the_precision_of_the_model_and_texts_in_float32(
    small_scale, wide_on_a_cpu_with_bf16
):
    recipe = recipe_of(small_scale)
    clip = starting_model(recipe.model, CPU)
    clip.model.eval()
    source = datafile.read(recipe.data).pool()[0]
    samples, numbers = Samples(source, clip, clip.image_size, "pool"), np.arange(8)
    images = central_images(clip, [samples.pixels[i] for i in range(8)], CPU)
    tokens = clip.tokenizer(["a red circle", "two small squares"])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            wanted = F.normalize(clip.model.encode_image(images).float(), dim=-1)
        of_texts = F.normalize(clip.model.encode_text(tokens), dim=-1)
    found = image_features(clip, samples, numbers, CPU, lambda n: None)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(text_features(clip, list(tokens.numpy()), CPU), of_texts, rtol=0, atol=1e-6)
    clip.precision = "float32"
    plain = image_features(clip, samples, numbers, CPU, lambda n: None)
    assert found.dtype == plain.dtype == torch.float32 and not found.equal(plain)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-2)
    clip.precision = "fp16"  # in which features may overflow
    assert image_features(clip, samples, numbers, CPU, lambda n: None).equal(plain)


def scores(metrics: list[dict]) -> list[tuple]:
    return [(line["ka"], line["zs"], line["details"], line.get("drift")) for line in metrics]


def test_a_run_in_bf16_that_was_stopped_ends_bit_identical(
    small_scale, tmp_path, wide_on_a_cpu_with_bf16, capsys
):
    recipe = recipe_of(small_scale, *OVERRIDES)
    whole = run(recipe, tmp_path / "whole")
    assert ", in bf16" in capsys.readouterr().err
    with pytest.raises(Interrupted):
        run_until(recipe, tmp_path / "cut", 6, terminate)
    assert scores(run(recipe, tmp_path / "cut", resume=True)) == scores(whole)
    assert "last bits" not in capsys.readouterr().err
    assert_same(weights_of(tmp_path / "whole", 2), weights_of(tmp_path / "cut", 2))
    full = run(recipe_of(small_scale, *OVERRIDES, "precision=float32"), tmp_path / "full")
    assert scores(full) != scores(whole) and "bf16" not in capsys.readouterr().err


def test_eval_repeats_the_last_scores_of_a_run_in_bf16(small_scale, tmp_path, wide_on_a_cpu_with_bf16):
    last = run(recipe_of(small_scale, *OVERRIDES), tmp_path)[-1]
    done = invoke("eval", "--scale", small_scale, "--model", tmp_path / "model", "--json")
    found = json.loads(done.stdout)
    assert found["ka"] == pytest.approx(last["ka"]) and found["zs"] == pytest.approx(last["zs"])


def test_going_on_without_the_instructions_is_said(small_scale, tmp_path, monkeypatch, capsys):
    recipe = recipe_of(small_scale, *OVERRIDES)
    with monkeypatch.context() as patch:
        pretend(patch)
        with pytest.raises(Interrupted):
            run_until(recipe, tmp_path, 2, terminate)
    run(recipe, tmp_path, resume=True)
    assert "'precision': 'bf16'" in capsys.readouterr().err
    assert len(lines(tmp_path / "metrics.jsonl")) > 2
