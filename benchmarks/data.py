"""How fast batches come from the pixel cache, beside torchvision's own pipeline over the same JPEG files.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--pictures 4000] [--seconds 6]

Targets: random batches of 512 at 64 px, 20,000 pictures/s on one core before augmentation and 5 times what
ImageFolder + RandomResizedCrop + DataLoader(2 workers) gives; a pool of 15 million entries under 200 MB.
The JPEG files are drawn noise, 96 x 80: a decoder has more work with photographs, which are larger.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fomo.datasets.crops import crop  # noqa: E402
from fomo.datasets.mixture import Batches, Pool, pool_of  # noqa: E402
from fomo.datasets.samples import Collection, Samples  # noqa: E402
from fomo.datasets.sources.base import Source  # noqa: E402
from fomo.datasets.sources.folders import Folder  # noqa: E402

SIZE, BATCH, MANY = 64, 512, 15_000_000
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


class Words:
    """Stands for a Clip: twelve tokens a caption."""

    preprocess = PreprocessCfg()

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        return [np.arange(12, dtype=np.int32)] * len(texts)


@dataclass
class Imagined(Source):
    """Pictures and captions, or pictures of so many concepts, none of which exists before it is drawn."""

    pictures: int = MANY
    concepts: int = 0
    split_field = "pictures"

    def __post_init__(self):
        self.classes, self.cache = [f"thing {i}" for i in range(self.concepts)], "never"
        unlabelled = np.broadcast_to(np.int64(-1), self.pictures)
        self.labels = np.arange(self.pictures) % self.concepts if self.concepts else unlabelled

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (SIZE, SIZE))

    def captions(self, index: int) -> list[str]:
        return [] if self.concepts else [f"picture {index}"]

    def caption_counts(self) -> np.ndarray:
        return np.broadcast_to(np.int64(not self.concepts), self.pictures)

    def name_of(self, index: int) -> str:
        return f"picture {index}"

    def key(self) -> str:
        return f"imagined {self.pictures} {self.concepts}"


def write_pictures(folder: Path, count: int) -> None:
    """Ten classes of smooth noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"class {i % 10}"
        place.mkdir(exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
        noise.resize((80, 96), Image.Resampling.BICUBIC).save(place / f"{i}.jpg", quality=90)


def rate(batches: Iterator, seconds: float, use: Callable = len) -> float:
    """Pictures per second after a batch to warm up."""
    next(batches)
    start, seen = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        use(next(batches))
        seen += BATCH
    return seen / (time.perf_counter() - start)


def endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def of_torchvision(folder: Path, workers: int) -> Iterator:
    interpolation = v2.InterpolationMode.BICUBIC
    resized = v2.RandomResizedCrop(SIZE, (0.9, 1.0), (3 / 4, 4 / 3), interpolation, antialias=True)
    steps = [resized, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    data = ImageFolder(str(folder), v2.Compose(steps))
    return endless(
        DataLoader(
            data, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )
    )


def ours(folder: Path) -> Batches:
    samples = Samples(Folder(str(folder)), Words(), SIZE, "noise")
    return Batches([("update", pool_of(Collection([samples]), (0, 0)), BATCH)], 0, 0, 10**6)


def memory_of_a_large_pool() -> tuple[float, float, int]:
    """-> MB that it adds to this process, pictures per second, distinct numbers among those drawn."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    pool = pool_of(Collection([Samples(Imagined(), Words(), SIZE, "imagined")]), (0, 0))
    batches = Batches([("pretraining", pool, BATCH)], 0, 0, 1000)
    start, drawn = time.perf_counter(), set()
    for step in range(20):
        assert len(batches[step].canvas) == BATCH
        drawn.update(pool.take(step * BATCH, BATCH).tolist())
        peak = max(peak, process.memory_info().rss)
    return (peak - before) / 1e6, 20 * BATCH / (time.perf_counter() - start), len(drawn)


def main(count: int, seconds: float) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FOMO_CACHE"] = f"{scratch}/cache"
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        write_pictures(folder, count)
        megabytes, large, distinct = memory_of_a_large_pool()
        start = time.perf_counter()
        batches = ours(folder)
        built = count / (time.perf_counter() - start)
        plain = rate((batches[i] for i in range(10**6)), seconds)
        whole = rate(
            (batches[i] for i in range(10**6)), seconds, lambda b: crop(b.canvas, b.boxes, SIZE, MEAN, STD)
        )
        theirs = {workers: rate(of_torchvision(folder, workers), seconds) for workers in (0, 2)}
    rows = [
        ("torchvision, in this process", theirs[0]),
        ("torchvision, DataLoader of 2 workers", theirs[2]),
        ("ours, one core, batches and crop boxes", plain),
        ("ours, one core, cropped and normalised too", whole),
        ("ours, building the cache", built),
        (f"ours, no cache, from a pool of {MANY:,}", large),
    ]
    print(f"{count} JPEG files, batches of {BATCH} at {SIZE} px")
    for what, speed in rows:
        print(f"{what:44} {speed:10,.0f} pictures/s  x{speed / theirs[2]:.2f}")
    assert distinct == 20 * BATCH
    print(
        f"a pool of {MANY:,}: {megabytes:.0f} MB (numbers of {Pool.__name__}, captions' places, 20 batches)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    main(options.pictures, options.seconds)
