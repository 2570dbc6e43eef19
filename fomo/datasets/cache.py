"""Pictures as pixels: decoded and resized once into a memory-mapped uint8 file per dataset and split.

A cached picture has the model's image size S on its short side. The long side is cut to about 1.5 S around the
centre: RandomResizedCrop with scale >= 0.9 and ratio <= 4/3 can only fall back to its central crop on anything
wider than 1.48, so the crops are the same as from the whole picture.
"""

import hashlib
import json
import math
import shutil
import sys
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from fomo.atomic import cache_root, make
from fomo.datasets.arrays import Arrays, in_chunks, read_array
from fomo.datasets.sources.base import UNREADABLE, Source, rgb
from fomo.errors import UserError

VERSION = 3  # of the file layout and of `shrink`
LIMIT = 0.01  # share of pictures that may be unreadable
AUTO_LIMIT = 64 * 2**30  # bytes of all pixel caches together up to which `cache: auto` makes a new one
NOTHING = np.zeros((0, 0, 3), np.uint8)  # what stands for a picture that cannot be read


def shrink(image: Image.Image, size: int) -> np.ndarray:
    """-> (h, w, 3) uint8 with min(h, w) == size and max(h, w) <= 1.5 size + 3; bicubic, antialiased."""
    image = rgb(image)
    width, height = image.size
    scale = size / min(width, height)
    if scale != 1:
        shape = (max(size, round(width * scale)), max(size, round(height * scale)))
        image = image.resize(shape, Image.Resampling.BICUBIC)
        width, height = image.size
    h, w = cut_side(height, size), cut_side(width, size)
    top, left = (height - h) // 2, (width - w) // 2
    return np.asarray(image)[top : top + h, left : left + w]


def cut_side(side: int, size: int) -> int:
    """What is left of a side: so much that no random crop fits, even rounded; the centre stays the centre."""
    enough = (3 * size + 4) // 2
    return min(side, enough + (side - enough) % 2)


class Pixels:
    """The pictures of one source at one size, by index. Opened lazily, so that worker processes may have it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self.shapes = read_array(folder, "shapes", np.uint16).reshape(-1, 2)  # height, width; 0: unreadable
        sizes = self.shapes.astype(np.int64).prod(1) * 3
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.memory = None

    def __getstate__(self):
        return {**self.__dict__, "memory": None}

    def __getitem__(self, index: int) -> np.ndarray:
        """-> (h, w, 3) uint8, a view; NOTHING if it cannot be read."""
        if self.memory is None:
            self.memory = read_array(self.folder, "pixels", np.uint8)
        height, width = self.shapes[index]
        return self.memory[self.offsets[index] : self.offsets[index + 1]].reshape(height, width, 3)

    def complete(self) -> bool:
        """Whether its files are as long as they were written."""
        file = self.folder / "pixels.bin"
        size = file.stat().st_size if file.exists() else 0
        return size == self.meta["bytes"] == self.offsets[-1] and len(self.shapes) == self.meta["count"]


class Decoded:
    """The same pictures without a cache: each is decoded when it is asked for, in whichever process that is."""

    def __init__(self, source: Source, size: int, name: str):
        self.source, self.size, self.name = source, size, name
        self.drawn, self.broken = 0, set()

    def __getitem__(self, index: int) -> np.ndarray:
        """-> (h, w, 3) uint8; NOTHING if it cannot be read, which is reported once."""
        self.drawn += 1
        if index in self.broken:
            return NOTHING
        pixels, problem = decode(self.source, self.size, index)
        if problem:
            self.report(index, problem)
        return pixels

    def report(self, index: int, problem: str) -> None:
        """Past the limit by more than chance explains (three standard deviations), it is an error."""
        self.broken.add(index)
        expected = LIMIT * self.drawn
        found = f"{self.name}: {len(self.broken)} pictures cannot be read among {self.drawn} drawn"
        if len(self.broken) > expected + 3 * math.sqrt(expected) + 5:
            raise UserError(f"{found}, last: {problem}; more than the limit of {LIMIT:.0%}")
        tqdm.write(f"{found}, last: {problem}; another stands in", file=sys.stderr)

    @cached_property
    def shapes(self) -> np.ndarray:
        """(n, 2) as of Pixels. Costs one pass over all pictures, whose result is stored."""
        folder = folder_of(self.source, self.size, "shapes")
        if not folder.exists():
            build(self.source, self.size, self.name, folder, pixels=False)
        return read_array(folder, "shapes", np.uint16).reshape(-1, 2)


def open_pixels(source: Source, size: int, name: str) -> Pixels | Decoded:
    """The source's pixel cache, built now if it is not there yet. `name` is shown and used in messages.

    With `cache: never`, and with `auto` once all caches together would pass AUTO_LIMIT or fill the disk,
    pictures are decoded when drawn: slower, and the same pictures.
    """
    if source.cache == "never":
        return Decoded(source, size, name)
    folder = folder_of(source, size)
    if not folder.exists():
        if source.cache == "auto" and (reason := too_large(source, size)):
            tqdm.write(f"{name}: {reason}; pictures are decoded when drawn", file=sys.stderr)
            return Decoded(source, size, name)
        build(source, size, name, folder)
    pixels = open_complete(folder)
    if pixels is None:
        tqdm.write(f"{name}: its cache {folder} is not as it was written; made again", file=sys.stderr)
        shutil.rmtree(folder)
        build(source, size, name, folder)
        pixels = Pixels(folder)
    if broken := pixels.meta["unreadable"]:
        tqdm.write(f"{summary(name, broken, len(source))}; skipped", file=sys.stderr)
    return pixels


def folder_of(source: Source, size: int, kind: str = "pixels") -> Path:
    key = f"{VERSION} {size} pillow {PIL.__version__} {source.key()}"
    return cache_root() / kind / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def open_complete(folder: Path) -> Pixels | None:
    """None if a file is missing, cut off, or of something else."""
    try:
        pixels = Pixels(folder)
        return pixels if pixels.complete() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def too_large(source: Source, size: int) -> str | None:
    """Why `cache: auto` makes no cache of this source, None if it does."""
    wanted = int(len(source) * size * size * 3 * 1.25)  # pictures are 1.25 times as long as wide, or so
    root = cache_root()
    there = sum(file.stat().st_size for file in root.glob("pixels/*/pixels.bin"))
    if there + wanted > AUTO_LIMIT:
        return f"with its {gigabytes(wanted)} the pixel caches would pass {gigabytes(AUTO_LIMIT)}"
    existing = next((folder for folder in (root, *root.parents) if folder.exists()), Path("/"))
    free = shutil.disk_usage(existing).free
    return f"its cache of {gigabytes(wanted)} would fill the disk" if wanted > 0.9 * free else None


def gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB"


def build(source: Source, size: int, name: str, folder: Path, pixels: bool = True) -> None:
    make(folder, partial(write, source, size, name, pixels))


def write(source: Source, size: int, name: str, pixels: bool, folder: Path) -> None:
    """Decode everything into `folder`; without `pixels` only the shapes are written."""
    total, seen, length, broken = len(source), 0, 0, []
    arrays = Arrays(folder)
    decode_numbers = partial(decode_chunk, source, size)
    for shapes, flat, problems in in_chunks(decode_numbers, total, f"pictures of {name}"):
        arrays.append(shapes=shapes, **({"pixels": flat} if pixels else {}))
        seen, length = seen + len(shapes), length + len(flat)
        broken += problems
        if len(broken) > LIMIT * total:
            of = f"{total}" if seen == total else f"the first {seen}"
            raise UserError(f"{summary(name, broken, of)}; more than the limit of {LIMIT:.0%}")
    meta = {"source": source.key()[:1000], "size": size, "version": VERSION, "count": total}
    arrays.finish(**meta, bytes=length, unreadable=broken)


def decode(source: Source, size: int, index: int) -> tuple[np.ndarray, str | None]:
    """-> the picture, and what is wrong with it."""
    try:
        return shrink(source.image(index), size), None
    except UNREADABLE as error:
        return NOTHING, f"{source.name_of(index)}: {' '.join(str(error).split())}"


def decode_chunk(source: Source, size: int, numbers: range) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """-> shapes (k, 2), all pixels in a row, and what is wrong with the pictures that cannot be read."""
    decoded = [decode(source, size, index) for index in numbers]
    shapes = np.array([pixels.shape[:2] for pixels, _ in decoded], np.uint16)
    flat = np.concatenate([pixels.reshape(-1) for pixels, _ in decoded])
    return shapes, flat, [problem for _, problem in decoded if problem]


def summary(name: str, broken: list[str], total: int | str) -> str:
    return f"{name}: {len(broken)} of {total} pictures cannot be read, first: {broken[0]}"
