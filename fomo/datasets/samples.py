"""Samples: pictures and captions ready for batches, addressed by number."""

import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fomo.clip import Clip
from fomo.datasets.cache import Decoded, Pixels, open_pixels
from fomo.datasets.sources.base import Source, unread_texts

TOKENISED = 200_000  # pictures of a split up to which all captions are tokenised when it is opened


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


class Runs:
    """Row i holds the numbers from offsets[i] up to offsets[i + 1]: the captions of a picture, in order."""

    def __init__(self, counts: np.ndarray):
        self.offsets = np.zeros(len(counts) + 1, np.int32 if counts.sum() < 2**31 else np.int64)
        np.cumsum(counts, out=self.offsets[1:])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> range:
        return range(self.offsets[index], self.offsets[index + 1])


class TokensWhenAsked:
    """The token ids of caption number n, in the order of Runs, for sets too large to tokenise beforehand."""

    def __init__(self, source: Source, runs: Runs, tokenize: Callable):
        self.source, self.runs, self.tokenize = source, runs, tokenize

    def __getitem__(self, number: int) -> np.ndarray:
        offsets = self.runs.offsets
        wanted = offsets.dtype.type(number)  # another type would have numpy convert the whole array
        index = int(np.searchsorted(offsets, wanted, side="right")) - 1
        return self.tokenize([Samples.describe(self.source, index)[number - offsets[index]]])[0]


class Samples:
    """One split: pixels, and captions that were tokenised once (beyond TOKENISED pictures: when drawn)."""

    def __init__(self, source: Source, clip: Clip, size: int, name: str):
        self.labels, self.weight = source.labels, source.weight
        self.pixels: Pixels | Decoded = open_pixels(source, replace(clip.preprocess, size=size), name)
        if len(source) > TOKENISED:
            self.captions = Runs(counts_of(source))
            self.tokens = TokensWhenAsked(source, self.captions, clip.tokenize)
        else:
            texts = [self.describe(source, index) for index in range(len(source))]
            numbers = {text: n for n, text in enumerate(dict.fromkeys(t for ts in texts for t in ts))}
            self.captions = Ragged([np.array([numbers[t] for t in ts], dtype=np.int32) for ts in texts])
            self.tokens = Ragged(clip.tokenize(list(numbers))) if numbers else Ragged([])
        for line in unread_texts(source):
            tqdm.write(f"{name}: {line}", file=sys.stderr)
        if missing := len(self) - np.count_nonzero(self.described()):
            tqdm.write(f"{name}: {missing} of {len(self)} pictures have no caption", file=sys.stderr)

    @staticmethod
    def describe(source: Source, index: int) -> list[str]:
        """The captions of a picture; without any, or with the bare class name as the only one, the prompt."""
        captions = source.captions(index)
        if (label := source.labels[index]) >= 0 and captions in ([], [source.classes[label]]):
            return [prompt.replace("{}", source.classes[label]) for prompt in source.prompts]
        return captions

    def __len__(self) -> int:
        return len(self.labels)

    def described(self) -> np.ndarray:
        """(n,) bool: which pictures have a caption."""
        return self.captions.offsets[1:] > self.captions.offsets[:-1]

    def complete(self) -> np.ndarray:
        """(n,) bool: which have a caption and a picture that can be read; without a cache this decodes all."""
        return self.described() & (self.pixels.shapes[:, 0] > 0)

    def caption(self, index: int, draw: float) -> np.ndarray:
        """Token ids of one of the sample's captions; `draw` in [0, 1) picks which, 0 the first."""
        numbers = self.captions[index]
        return self.tokens[numbers[int(draw * len(numbers))]]


def counts_of(source: Source) -> np.ndarray:
    """(n,) int32: how many texts `describe` gives each picture."""
    counts = source.caption_counts().astype(np.int32)
    labelled = source.labels >= 0
    if labelled.any() and len(source.prompts) > 1:
        for index in np.flatnonzero(labelled & (counts == 1)):  # the bare class name stands for the prompts
            counts[index] = len(Samples.describe(source, int(index)))
    counts[labelled & (counts == 0)] = len(source.prompts)
    return counts


class Collection:
    """Several splits end to end, with one number per sample."""

    def __init__(self, parts: list[Samples]):
        self.parts = parts
        self.offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        self.starts = self.offsets.tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, number: int) -> tuple[Samples, int]:
        part = bisect_right(self.starts, number) - 1
        return self.parts[part], int(number) - self.starts[part]

    def usable(self) -> np.ndarray:
        """(n,) bool: the sample has a caption. Of a picture that cannot be read this is not known beforehand."""
        return np.concatenate([part.described() for part in self.parts]) if self.parts else np.zeros(0, bool)


def by_label(labels: np.ndarray, numbers: np.ndarray) -> dict[int, np.ndarray]:
    """Label -> those of `numbers` that have it, in their order: one sort, however many labels there are."""
    order = numbers[np.argsort(labels[numbers], kind="stable")]
    found, starts = np.unique(labels[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts)[1:], strict=True))


def canvas_of(pictures: list[np.ndarray]) -> tuple[Tensor, np.ndarray]:
    """Pictures (h, w, 3) of different shape -> (B, H, W, 3) uint8 and their (B, 2) heights and widths."""
    shapes = np.array([picture.shape[:2] for picture in pictures])
    canvas = np.zeros((len(pictures), *shapes.max(0), 3), dtype=np.uint8)
    for row, picture in zip(canvas, pictures, strict=True):
        row[: picture.shape[0], : picture.shape[1]] = picture
    return torch.from_numpy(canvas), shapes


def padded(rows: list[np.ndarray]) -> Tensor:
    """Token ids of different length -> (B, L) int64, zeros after each end."""
    out = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)
