"""Samples: pictures and captions ready for batches, addressed by number."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fomo.clip import Clip
from fomo.datasets.pixels import Pixels, open_pixels
from fomo.datasets.sources import Source


class Batch(NamedTuple):
    """B pairs. The pictures share a canvas and are cropped on the training device."""

    canvas: Tensor  # (B, H, W, 3) uint8, each picture at the top left
    boxes: Tensor  # (B, 4) float32, the crop: top, left, height, width
    tokens: Tensor  # (B, L) int64, L the longest caption of the batch
    pools: Tensor  # (B,) int64, position in mixture.POOLS


class Ragged:
    """Rows of different length in one flat array."""

    def __init__(self, rows: list[np.ndarray]):
        self.flat = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        self.offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


class Samples:
    """One split: cached pixels, and captions that were tokenised once."""

    def __init__(self, source: Source, clip: Clip, size: int, name: str):
        self.labels = source.labels
        self.pixels: Pixels = open_pixels(source, size, name)
        texts = [self.describe(source, index) for index in range(len(source))]
        numbers = {text: n for n, text in enumerate(dict.fromkeys(t for ts in texts for t in ts))}
        self.captions = Ragged([np.array([numbers[t] for t in ts], dtype=np.int32) for ts in texts])
        self.tokens = Ragged(clip.tokenize(list(numbers))) if numbers else Ragged([])

    @staticmethod
    def describe(source: Source, index: int) -> list[str]:
        """The captions of a picture; without any, or with the bare class name as the only one, the prompt."""
        captions = source.captions(index)
        if (label := source.labels[index]) >= 0 and captions in ([], [source.classes[label]]):
            return [prompt.replace("{}", source.classes[label]) for prompt in source.prompts]
        return captions

    def __len__(self) -> int:
        return len(self.labels)

    def caption(self, index: int, draw: float) -> np.ndarray:
        """Token ids of one of the sample's captions; `draw` in [0, 1) picks which, 0 the first."""
        numbers = self.captions[index]
        return self.tokens[numbers[int(draw * len(numbers))]]


class Collection:
    """Several splits end to end, with one number per sample."""

    def __init__(self, parts: list[Samples]):
        self.parts = parts
        self.offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def locate(self, number: int) -> tuple[Samples, int]:
        part = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return self.parts[part], int(number - self.offsets[part])

    def usable(self) -> np.ndarray:
        """(n,) bool: the picture can be read and has a caption."""
        flags = [(p.pixels.shapes[:, 0] > 0) & (np.diff(p.captions.offsets) > 0) for p in self.parts]
        return np.concatenate(flags) if flags else np.zeros(0, bool)


def canvas_of(pictures: list[np.ndarray]) -> tuple[Tensor, np.ndarray]:
    """Pictures (h, w, 3) of different shape -> (B, H, W, 3) uint8 and their (B, 2) heights and widths."""
    shapes = np.array([picture.shape[:2] for picture in pictures])
    canvas = np.zeros((len(pictures), *shapes.max(0), 3), dtype=np.uint8)
    for place, picture in zip(canvas, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return torch.from_numpy(canvas), shapes


def padded(rows: list[np.ndarray]) -> Tensor:
    """Token ids of different length -> (B, L) int64, zeros after each end."""
    out = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(out)
