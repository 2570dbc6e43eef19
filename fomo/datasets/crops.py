"""Crops: random ones for training, central ones for testing, resized and normalised on the device in batches.

B pictures on a common canvas, S the side of the result.
"""

import math

import numpy as np
import torch
from torch import Tensor

SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)  # of the paper's RandomResizedCrop


def random_crops(shapes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """torchvision's RandomResizedCrop for a whole batch: (B, 2) heights, widths -> (B, 4) top, left, h, w.

    Ten attempts of random area and aspect ratio, the first that fits; else the largest central crop whose
    aspect ratio is allowed.
    """
    height, width = shapes[:, 0].astype(np.float64), shapes[:, 1].astype(np.float64)
    area = height * width * rng.uniform(*SCALE, size=(10, len(shapes)))
    aspect = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), size=area.shape))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, each = fits.argmax(0), np.arange(len(shapes))
    h, w = h[first, each], w[first, each]
    offset = rng.random((2, len(shapes)))
    top, left = np.floor(offset[0] * (height - h + 1)), np.floor(offset[1] * (width - w + 1))
    random = np.stack([top, left, h, w], 1)
    return np.where(fits.any(0)[:, None], random, central_crops(height, width, RATIO)).astype(np.float32)


def central_crops(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float] = (1, 1)) -> np.ndarray:
    """The largest central crops whose width / height lies in `ratio`, (B, 4) top, left, h, w."""
    h = np.minimum(height, np.rint(width / ratio[0]))
    w = np.minimum(width, np.rint(height * ratio[1]))
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], 1).astype(np.float32)


def crop(canvas: Tensor, boxes: Tensor, size: int, mean: tuple, std: tuple) -> Tensor:
    """canvas (B, H, W, 3) uint8, boxes (B, 4) top, left, h, w -> (B, 3, S, S) float32, normalised.

    Bicubic with antialiasing, as torchvision's resized_crop, written as two small matrix products per picture:
    R (S, H) mixes rows, C (S, W) mixes columns, picture -> R picture C^T.
    """
    rows = resampling(boxes[:, 0], boxes[:, 2], canvas.shape[1], size)  # (B, S, H)
    columns = resampling(boxes[:, 1], boxes[:, 3], canvas.shape[2], size)  # (B, S, W)
    count, _, width, _ = canvas.shape
    short = rows @ canvas.flatten(2).float()  # (B, S, W * 3)
    short = short.view(count, size, width, 3).permute(0, 3, 1, 2).reshape(count, 3 * size, width)
    resized = (short @ columns.mT).view(count, 3, size, size).clamp_(0, 255)  # bicubic overshoots
    return resized.sub_(per_channel(mean, canvas.device)).div_(per_channel(std, canvas.device))


def per_channel(values: tuple, device: torch.device) -> Tensor:
    """(3, 1, 1) of a 0 to 255 scale, filled in on the device: a copy from the host would wait for it."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values]) * 255


def resampling(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Bicubic (a = -0.5) weights from [start, start + length) of `source` positions to `size`: (B, S, source).

    The kernel is stretched when shrinking (antialiasing); positions outside the crop weigh nothing, and each
    row sums to 1.
    """
    scale = (length / size)[:, None, None]  # (B, 1, 1)
    target = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    position = torch.arange(source, device=start.device) + 0.5
    x = ((position - target) / scale.clamp(min=1)).abs()  # (B, S, source)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    inside = (position > start[:, None, None]) & (position < (start + length)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True)
