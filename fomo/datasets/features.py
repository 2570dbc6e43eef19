"""Features of pictures and texts, in batches that the ranks share; testing, orders and reports use them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fomo.clip import Clip, encode_text
from fomo.datasets.crops import crop, per_channel
from fomo.datasets.samples import Samples, canvas_of, padded
from fomo.distributed import ALONE, Ranks
from fomo.errors import Failure

IMAGES, TEXTS = 256, 64  # per forward pass; more texts at once would only be padded more


@torch.no_grad()
def image_features(
    clip: Clip,
    samples: Samples,
    numbers: np.ndarray,
    device: torch.device,
    tick: Callable,
    ranks: Ranks = ALONE,
) -> Tensor:
    """(N, D) on the unit sphere, in the model's precision for scoring."""
    precision = clip.precision_on(device)

    def encode(part: list[int]) -> Tensor:
        images = central_images(clip, [samples.pixels[int(i)] for i in part], device)
        with precision.scoring():
            return clip.model.encode_image(images)

    out = []
    for start in range(0, len(numbers), IMAGES * ranks.world_size):
        block = numbers[start : start + IMAGES * ranks.world_size]
        out.append(encode_block(block, encode, ranks))
        tick(len(block))
    return checked(torch.cat(out), clip, "image")


def encode_block(block: Sequence, encode: Callable[[Sequence], Tensor], ranks: Ranks) -> Tensor:
    """(n, D) on the unit sphere, of the n things in `block`: every rank encodes a part of them and gets all.

    The parts are of one length; beyond the end of the block its last thing stands in.
    """
    positions = range(ranks.rank, len(block) + -len(block) % ranks.world_size, ranks.world_size)
    part = [block[min(position, len(block) - 1)] for position in positions]
    return ranks.all_gather(F.normalize(encode(part).float(), dim=-1))[: len(block)]


def central_images(clip: Clip, pictures: list[np.ndarray], device: torch.device) -> Tensor:
    """The largest central squares, resized and normalised, (B, 3, S, S)."""
    canvas, shapes = canvas_of([central_square(picture) for picture in pictures])
    canvas = canvas.to(device)
    if (shapes == clip.image_size).all():  # of a cache of the model's size: nothing to resize
        images = canvas.permute(0, 3, 1, 2).contiguous().float()
        return images.sub_(per_channel(clip.mean, device)).div_(per_channel(clip.std, device))
    boxes = F.pad(torch.from_numpy(shapes).float(), (2, 0))
    return crop(canvas, boxes.to(device), clip.image_size, clip.mean, clip.std)


def central_square(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)  # halves to even, as torchvision
    return picture[top : top + side, left : left + side]


@torch.no_grad()
def text_features(clip: Clip, rows: list[np.ndarray], device: torch.device, ranks: Ranks = ALONE) -> Tensor:
    """(N, D) on the unit sphere, in large batches of similar length; in float32 always.

    The rounding of a class's features shifts all pictures the same way: in bf16 it moved sets that a model hardly
    knows by up to four standard errors, while that of pictures averages out (docs/performance.md).
    """

    def encode(numbers: list[int]) -> Tensor:
        return encode_text(clip.model, padded([rows[i] for i in numbers]).to(device))

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = None
    for start in range(0, len(rows), TEXTS * ranks.world_size):
        block = order[start : start + TEXTS * ranks.world_size]
        features = encode_block(block, encode, ranks)
        if out is None:
            out = torch.empty(len(rows), features.shape[1], device=device)
        out[torch.tensor(block, device=device)] = features
    return checked(out, clip, "text")


def checked(features: Tensor, clip: Clip, kind: str) -> Tensor:
    """The features, if all are finite: NaN is near to nothing, but what is counted would pass for a score."""
    if not features.isfinite().all():
        raise Failure(f"the model's {kind} features are not finite: {culprit(clip)}")
    return features


def culprit(clip: Clip) -> str:
    """Why features are not finite."""
    for name, tensor in clip.model.state_dict().items():
        if not tensor.isfinite().all():
            return f"its tensor {name} is not"
        if name.endswith("running_var") and (tensor < 0).any():
            return f"its tensor {name} has negative variances"
    return "all its tensors are, so they overflow in the forward pass"
