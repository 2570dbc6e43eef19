"""Crops against torchvision's transforms, which the paper used, and against PIL's resampling."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from fomo.datasets.crops import RATIO, SCALE, central_crops, crop, random_crops
from fomo.datasets.samples import canvas_of

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # leaves values from 0 to 255


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def torchvision_crop(picture: np.ndarray, box: list[int], size: int) -> torch.Tensor:
    """(3, S, S), from 0 to 255."""
    image = torch.from_numpy(picture).permute(2, 0, 1).float()
    bicubic = InterpolationMode.BICUBIC
    return resized_crop(image, *box, [size, size], interpolation=bicubic, antialias=True).clamp(0, 255)


def random_boxes(shapes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Any box inside each picture, down to a single pixel."""
    sides = rng.integers(1, shapes, endpoint=True)
    return np.concatenate([rng.integers(0, shapes - sides, endpoint=True), sides], axis=1)


@pytest.mark.parametrize("size", [7, 32, 60])
def test_any_box_of_pictures_on_a_common_canvas_is_cropped_as_torchvision_crops_it(size):
    rng = np.random.default_rng(size)
    pictures = [noise(*rng.integers(3, 90, 2), seed=i) for i in range(60)]
    canvas, shapes = canvas_of(pictures)
    assert len({tuple(shape) for shape in shapes}) > 50
    canvas[0, shapes[0, 0] :] = 255  # what surrounds a picture must not matter
    boxes = random_boxes(shapes, rng)
    assert ((boxes[:, 2:] < size).any() and (boxes[:, 2:] > 2 * size).any()) or size == 60
    ours = crop(canvas, torch.from_numpy(boxes).float(), size, **PLAIN)
    for picture, box, result in zip(pictures, boxes.tolist(), ours, strict=True):
        expected = torchvision_crop(picture, box, size)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-3, msg=f"{picture.shape} {box}")


def test_bytes_from_the_cache_give_what_pil_gives_to_within_its_rounding():
    picture = 64 + noise(50, 75) // 2  # no overshoot, which PIL cuts off after each of its two passes
    boxes = torch.tensor([[3.0, 10.0, 44.0, 60.0]])
    ours = crop(torch.from_numpy(picture)[None], boxes, 32, **PLAIN)[0]
    pil = Image.fromarray(picture).crop((10, 3, 70, 47)).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(pil)).permute(2, 0, 1).float()
    assert (ours - expected).abs().max() < 1.5


def test_the_whole_picture_at_its_own_size_is_left_as_it_is():
    pictures = torch.from_numpy(np.stack([noise(24, 24, seed=i) for i in range(3)]))
    boxes = torch.tensor([[0.0, 0.0, 24.0, 24.0]]).repeat(3, 1)
    result = crop(pictures, boxes, 24, **PLAIN)
    torch.testing.assert_close(result, pictures.permute(0, 3, 1, 2).float(), rtol=0, atol=1e-3)


def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel():
    picture = np.full((1, 5, 5, 3), [255, 0, 51], dtype=np.uint8)
    result = crop(torch.from_numpy(picture), torch.tensor([[1.0, 0.0, 3.0, 4.0]]), 8, MEAN, STD)
    expected = [(1 - MEAN[0]) / STD[0], -MEAN[1] / STD[1], (0.2 - MEAN[2]) / STD[2]]
    for channel, value in zip(result[0], expected, strict=True):
        torch.testing.assert_close(channel, torch.full((8, 8), value), rtol=0, atol=1e-5)


def test_bicubic_overshoot_is_cut_to_what_a_picture_can_hold():
    edge = np.zeros((1, 16, 16, 3), dtype=np.uint8)
    edge[:, :, 8:] = 255
    result = crop(torch.from_numpy(edge), torch.tensor([[0.0, 0.0, 16.0, 16.0]]), 61, **PLAIN)
    assert result.min() == 0 and result.max() == 255


def test_random_crops_lie_inside_and_have_area_and_aspect_ratio_in_the_papers_range():
    assert (SCALE, RATIO) == ((0.9, 1.0), (3 / 4, 4 / 3))
    rng = np.random.default_rng(0)
    shapes = np.stack([rng.integers(400, 440, 3000), rng.integers(400, 500, 3000)], 1)
    top, left, h, w = random_crops(shapes, rng).T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= shapes[:, 0]).all() and (left + w <= shapes[:, 1]).all()
    area, aspect = h * w / shapes.prod(1), w / h
    rounding = 1 / 400  # half a pixel on either side of 400
    assert area.min() > 0.9 - 2 * rounding and area.max() < 1 + 2 * rounding
    assert aspect.min() > 3 / 4 - rounding and aspect.max() < 4 / 3 + 2 * rounding
    assert area.min() < 0.91 and area.max() > 0.97  # and they use the range
    assert len(np.unique(top)) > 15 and len(np.unique(left)) > 15
    assert (top == 0).any() and (top + h == shapes[:, 0]).any()


@pytest.mark.parametrize("shape", [(64, 64), (100, 120), (130, 100)])
def test_random_crops_are_distributed_as_torchvisions(shape):
    draws = 4000
    ours = random_crops(np.array([shape] * draws), np.random.default_rng(1)).astype(float)
    torch.manual_seed(1)
    image = torch.empty(3, *shape)
    theirs = np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(draws)], dtype=float)
    for column in range(4):
        a, b = ours[:, column], theirs[:, column]
        noise_of_means = math.sqrt((a.var() + b.var()) / draws)
        assert abs(a.mean() - b.mean()) < 4 * noise_of_means
        assert abs(a.std() / b.std() - 1) < 0.08
        top = int(max(a.max(), b.max())) + 1
        cumulated = [np.cumsum(np.bincount(c.astype(int), minlength=top)) / draws for c in (a, b)]
        assert np.abs(cumulated[0] - cumulated[1]).max() < 0.043  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize(
    "shape", [(40, 100), (40, 101), (101, 40), (41, 62), (224, 336), (336, 224), (1, 9), (500, 7)]
)
def test_very_wide_and_tall_pictures_fall_back_to_torchvisions_central_crop(shape):
    assert random_crops(np.array([shape]), np.random.default_rng(0)).tolist() == [
        list(RandomResizedCrop.get_params(torch.empty(3, *shape), SCALE, RATIO))
    ]


def test_a_fallback_among_others_changes_only_its_own_row():
    shapes = np.array([(64, 64), (50, 60), (64, 60)])
    alone = random_crops(shapes, np.random.default_rng(5))
    shapes[1] = (20, 100)
    mixed = random_crops(shapes, np.random.default_rng(5))
    assert (mixed[[0, 2]] == alone[[0, 2]]).all()
    assert mixed[1].tolist() == [0, (100 - 27) // 2, 20, 27]


def test_the_test_crop_is_the_central_square():
    height, width = np.array([32, 32, 48, 33]), np.array([32, 48, 32, 40])
    assert central_crops(height, width).tolist() == [
        [0, 0, 32, 32],
        [0, 8, 32, 32],
        [8, 0, 32, 32],
        [0, 3, 33, 33],
    ]
