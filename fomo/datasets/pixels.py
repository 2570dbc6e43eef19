"""Pictures as pixels: decoded and resized once into a memory-mapped uint8 file per dataset and split.

A cached picture has the model's image size S on its short side. The long side is cut to about 1.5 S around the
centre: RandomResizedCrop with scale >= 0.9 and ratio <= 4/3 can only fall back to its central crop on anything
wider than 1.48, so the crops are the same as from the whole picture.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fomo.datasets.sources import UNREADABLE, Source, rgb
from fomo.errors import UserError

VERSION = 2  # of the file layout and of `shrink`
LIMIT = 0.01  # share of pictures that may be unreadable


def cache_root() -> Path:
    """Where everything that can be made again is kept: $FOMO_CACHE or ~/.cache/fomo."""
    return Path(os.environ.get("FOMO_CACHE") or "~/.cache/fomo").expanduser()


def shrink(image: Image.Image, size: int) -> np.ndarray:
    """-> (h, w, 3) uint8 with min(h, w) == size and max(h, w) <= 1.5 size + 3; bicubic, antialiased."""
    image = rgb(image)
    width, height = image.size
    scale = size / min(width, height)
    if scale != 1:
        shape = (max(size, round(width * scale)), max(size, round(height * scale)))
        image = image.resize(shape, Image.Resampling.BICUBIC)
        width, height = image.size
    h, w = kept(height, size), kept(width, size)
    top, left = (height - h) // 2, (width - w) // 2
    return np.asarray(image)[top : top + h, left : left + w]


def kept(side: int, size: int) -> int:
    """How much of a side stays: so much that no random crop fits, even rounded; the centre stays the centre."""
    enough = (3 * size + 4) // 2
    return min(side, enough + (side - enough) % 2)


class Pixels:
    """The pictures of one source at one size, by index. Opened lazily, so that worker processes may have it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes = np.load(folder / "shapes.npy")  # (n, 2) height, width; 0 where unreadable
        sizes = self.shapes.astype(np.int64).prod(1) * 3
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.memory = None

    def __getstate__(self):
        return {**self.__dict__, "memory": None}

    def __getitem__(self, index: int) -> np.ndarray:
        """-> (h, w, 3) uint8, a view."""
        if self.memory is None:
            self.memory = np.memmap(self.folder / "pixels.bin", dtype=np.uint8, mode="r")
        height, width = self.shapes[index]
        return self.memory[self.offsets[index] : self.offsets[index + 1]].reshape(height, width, 3)

    def readable(self, index: int) -> bool:
        return self.shapes[index, 0] > 0


def open_pixels(source: Source, size: int, name: str) -> Pixels:
    """The source's pixel cache, built now if it is not there yet. `name` is shown and used in messages."""
    key = hashlib.sha256(f"{VERSION} {size} {source.key()}".encode()).hexdigest()[:20]
    folder = cache_root() / "pixels" / key
    if not (folder / "meta.json").exists():
        build(source, size, name, folder)
    if broken := json.loads((folder / "meta.json").read_text())["unreadable"]:
        tqdm.write(f"{summary(name, broken, len(source))}; skipped", file=sys.stderr)
    return Pixels(folder)


def build(source: Source, size: int, name: str, folder: Path) -> None:
    """Write the cache beside its place and rename it: it is complete or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".part", dir=folder.parent))
    try:
        shapes = np.zeros((len(source), 2), dtype=np.uint16)
        broken = []
        with open(staging / "pixels.bin", "wb") as file:
            for index in tqdm(range(len(source)), desc=f"pictures of {name}", leave=False, unit="img"):
                try:
                    pixels = shrink(source.image(index), size)
                except UNREADABLE as error:
                    broken.append(f"{source.name_of(index)}: {error}")
                    continue
                shapes[index] = pixels.shape[:2]
                file.write(pixels.tobytes())
            file.flush()
            os.fsync(file.fileno())
        if len(broken) > LIMIT * len(source):
            raise UserError(f"{summary(name, broken, len(source))}; more than the limit of {LIMIT:.0%}")
        np.save(staging / "shapes.npy", shapes)
        meta = {"source": source.key(), "size": size, "version": VERSION, "unreadable": broken}
        (staging / "meta.json").write_text(json.dumps(meta, indent=1))
        if not folder.exists():  # another process may have been faster
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def summary(name: str, broken: list[str], total: int) -> str:
    return f"{name}: {len(broken)} of {total} pictures cannot be read, first: {broken[0]}"
