"""Pictures as pixels: decoded and resized once into a memory-mapped uint8 file per dataset and split.

A picture is read, resized and padded as open_clip's own transform of the deployed model does it. For a model that
squashes or pads (resize_mode squash, longest) S x S pixels are cached, S the model's image size, and training
crops are cut from those: it learns from what it is scored on. (open_clip's transform for training has no
resize_mode: of a picture three times as wide as high it would never show such a model the sides.)

Where open_clip cuts the central square out (shortest), the short side is S and the long side is cut to about 1.5 S
around the centre: RandomResizedCrop with scale >= 0.9 and ratio <= 4/3 can only fall back to its central crop on
anything wider than 1.48, so the crops are the same as from the whole picture.
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
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tqdm import tqdm

from fomo.atomic import cache_root, make
from fomo.cache_folder import hold_pixels
from fomo.datasets.arrays import Arrays, in_chunks, read_array
from fomo.datasets.sources.base import UNREADABLE, Source
from fomo.errors import UserError
from fomo.text import plural

VERSION = 4  # of the file layout and of `shrink`; 3 turned, flattened and rounded otherwise
LIMIT = 0.01  # share of pictures that may be unreadable
NAMED = 3  # of them, in messages
AUTO_LIMIT = 64 * 2**30  # bytes of all pixel caches together up to which `cache: auto` makes a new one
NOTHING = np.zeros((0, 0, 3), np.uint8)  # what stands for a picture that cannot be read


def shrink(image: Image.Image, how: PreprocessCfg) -> np.ndarray:
    """-> (h, w, 3) uint8, (S, S) or in the mode shortest min(h, w) == S and max(h, w) <= 1.5 S + 5."""
    steps = image_transform_v2(how, is_train=False).transforms[:-2]  # but to a tensor and to normalise
    if how.resize_mode == "shortest":
        steps[1] = partial(cut, size=how.size)  # which is the central square there
    for step in steps:
        image = step(image)
    return np.asarray(image)


def cut(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    w, h = cut_side(width, size), cut_side(height, size)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def cut_side(side: int, size: int) -> int:
    """What is left of a side: so much that no random crop fits, even rounded.

    A multiple of 4 goes, so that the centre stays the centre: torchvision rounds its corner half to even.
    """
    enough = (3 * size + 4) // 2
    return min(side, enough + (side - enough) % 4)


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

    def __init__(self, source: Source, how: PreprocessCfg, name: str):
        self.source, self.how, self.name = source, how, name
        self.drawn, self.broken = 0, set()

    def __getitem__(self, index: int) -> np.ndarray:
        """-> (h, w, 3) uint8; NOTHING if it cannot be read, which is reported once."""
        self.drawn += 1
        if index in self.broken:
            return NOTHING
        pixels, problem = decode(self.source, self.how, index)
        if problem:
            self.report(index, problem)
        return pixels

    def report(self, index: int, problem: str) -> None:
        """Past the limit by more than chance explains (three standard deviations), it is an error."""
        self.broken.add(index)
        expected = LIMIT * self.drawn
        found = f"{self.name}: {plural(len(self.broken), 'picture')} cannot be read among {self.drawn} drawn"
        if len(self.broken) > expected + 3 * math.sqrt(expected) + 5 and not self.source.skip_bad:
            raise UserError(f"{found}, last: {problem}; {beyond(self.source)}")
        tqdm.write(f"{found}, last: {problem}; another stands in", file=sys.stderr)

    @cached_property
    def shapes(self) -> np.ndarray:
        """(n, 2) as of Pixels. Costs one pass over all pictures, whose result is stored."""
        folder = folder_of(self.source, self.how, "shapes")
        if not folder.exists():
            build(self.source, self.how, self.name, folder, pixels=False)
        return read_array(folder, "shapes", np.uint16).reshape(-1, 2)


def open_pixels(source: Source, how: PreprocessCfg, name: str) -> Pixels | Decoded:
    """The source's pixel cache, built now if it is not there yet. `name` is shown and used in messages.

    With `cache: never`, and with `auto` once all caches together would pass AUTO_LIMIT or fill the disk,
    pictures are decoded when drawn: slower, and the same pictures.
    """
    if source.cache == "never":
        return Decoded(source, how, name)
    hold_pixels()
    folder = folder_of(source, how)
    if not folder.exists():
        if source.cache == "auto" and (reason := too_large(source, how.size)):
            tqdm.write(f"{name}: {reason}; pictures are decoded when drawn", file=sys.stderr)
            return Decoded(source, how, name)
        build(source, how, name, folder)
    pixels = open_complete(folder)
    if pixels is None:
        tqdm.write(f"{name}: its cache {folder} is not as it was written; made again", file=sys.stderr)
        shutil.rmtree(folder)
        build(source, how, name, folder)
        pixels = Pixels(folder)
    if broken := pixels.meta["unreadable"]:
        check_limit(source, name, broken)
        tqdm.write(f"{summary(name, broken, len(source))}; skipped", file=sys.stderr)
    return pixels


def folder_of(source: Source, how: PreprocessCfg, kind: str = "pixels") -> Path:
    version = 3 if source.rendered else VERSION  # squares without a turn or transparency are as they were
    key = f"{version} {how.size} {resizing(how)}pillow {PIL.__version__} {source.key()}"
    return cache_root() / kind / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def resizing(how: PreprocessCfg) -> str:
    """What of the preprocessing decides the pixels besides the size; nothing for what most models do."""
    names = [] if how.resize_mode == "shortest" else [how.resize_mode]
    names += ["bilinear"] if how.interpolation == "bilinear" else []
    names += [f"on {how.fill_color}"] if how.resize_mode == "longest" else []
    return "".join(f"{name} " for name in names)


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


def build(source: Source, how: PreprocessCfg, name: str, folder: Path, pixels: bool = True) -> None:
    make(folder, partial(write, source, how, name, pixels))


def write(source: Source, how: PreprocessCfg, name: str, pixels: bool, folder: Path) -> None:
    """Decode everything into `folder`; without `pixels` only the shapes are written."""
    total, seen, length, broken = len(source), 0, 0, []
    arrays = Arrays(folder)
    decode_numbers = partial(decode_chunk, source, how)
    for shapes, flat, problems in in_chunks(decode_numbers, total, f"pictures of {name}"):
        arrays.append(shapes=shapes, **({"pixels": flat} if pixels else {}))
        seen, length = seen + len(shapes), length + len(flat)
        broken += problems
        check_limit(source, name, broken, seen)
    meta = {"source": source.key()[:1000], "size": how.size, "version": VERSION, "count": total}
    arrays.finish(**meta, bytes=length, unreadable=broken)


def decode(source: Source, how: PreprocessCfg, index: int) -> tuple[np.ndarray, str | None]:
    """-> the picture, and what is wrong with it."""
    try:
        return shrink(source.image(index), how), None
    except UNREADABLE as error:
        return NOTHING, f"{source.name_of(index)}: {' '.join(str(error).split())}"


def decode_chunk(
    source: Source, how: PreprocessCfg, numbers: range
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """-> shapes (k, 2), all pixels in a row, and what is wrong with the pictures that cannot be read."""
    decoded = [decode(source, how, index) for index in numbers]
    shapes = np.array([pixels.shape[:2] for pixels, _ in decoded], np.uint16)
    flat = np.concatenate([pixels.reshape(-1) for pixels, _ in decoded])
    return shapes, flat, [problem for _, problem in decoded if problem]


def check_limit(source: Source, name: str, broken: list[str], seen: int | None = None) -> None:
    """A UserError where more pictures cannot be read than may be, of the first `seen`; by default of all."""
    total = len(source)
    of = total if seen in (None, total) else f"the first {seen}"
    if len(broken) == total:
        raise UserError(f"{summary(name, broken, total)}; there is nothing to go on with")
    if len(broken) > LIMIT * total and not source.skip_bad:
        raise UserError(f"{summary(name, broken, of)}; {beyond(source)}")


def beyond(source: Source) -> str:
    """What to do beyond the limit."""
    listing = f"data check {source.data_file or 'FILE'} --bad LIST.txt"
    going_on = "`update --skip-bad` (or `skip_bad: true` in the data file) goes on without them"
    return f"more than the limit of {LIMIT:.0%}; `{listing}` lists all, {going_on}"


def summary(name: str, broken: list[str], total: int | str) -> str:
    more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    first = f"first: {'; '.join(broken[:NAMED])}{more}"
    return f"{name}: {len(broken)} of {total} pictures cannot be read, {first}"
