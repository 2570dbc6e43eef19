"""What the tests of data use: drawn pictures, shards, tables, and stand-ins for a source and for a model."""

import csv
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from open_clip.transform import PreprocessCfg
from PIL import Image

from fomo.datasets.sources.base import Source
from fomo.errors import UserError


def gray(level: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 6), (level,) * 3)


def noise(seed: int, width: int = 12, height: int = 10) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PNG = encoded(gray())


def draw(path: Path, image: Image.Image | None = None) -> Path:
    """Without an image one of noise, another for each path: copies of a picture are not held out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(crc32(str(path).encode()))).save(path)
    return path


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    """A folder of these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def packed(members: dict[str, str | bytes]) -> bytes:
    """A tar file of these members, in their order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def shard(path: Path, members: dict[str, str | bytes]) -> str:
    write(path.parent, {path.name: packed(members)})
    return str(path)


def samples(numbers: int | range, **texts: Callable[[int], str]) -> dict[str, str | bytes]:
    """Members of many samples: picture n is gray n, with a text member for each suffix."""
    members: dict[str, str | bytes] = {}
    for n in range(numbers) if isinstance(numbers, int) else numbers:
        members |= {
            f"{n}.png": encoded(gray(n)),
            **{f"{n}.{suffix}": text(n) for suffix, text in texts.items()},
        }
    return members


def table(path: Path, rows: list[list[str]], separator: str = ",") -> Path:
    """A CSV file, the first row its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


def one_line(call: Callable, *arguments, **fields) -> str:
    """The message of the mistake that a call makes."""
    with pytest.raises(UserError) as error:
        call(*arguments, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


class Drawn(Source):
    """Pictures and captions by functions of their numbers; those in `broken` cannot be read."""

    def __init__(
        self,
        name: str,
        labels: list[int] | np.ndarray,
        image: Callable[[int], Image.Image] = gray,
        captions: Callable[[int], list[str]] = lambda index: [],
        *,
        broken: tuple[int, ...] = (),
        classes: tuple[str, ...] = (),
        cache: str = "auto",
    ):
        self.name, self.labels, self.broken, self.classes = name, np.array(labels), broken, list(classes)
        self.draw, self.texts, self.cache = image, captions, cache

    def image(self, index: int) -> Image.Image:
        if index in self.broken:
            raise OSError("truncated")
        return self.draw(index)

    def captions(self, index: int) -> list[str]:
        return self.texts(index)

    def name_of(self, index: int) -> str:
        return f"{self.name} {index}"

    def key(self) -> str:
        return f"{self.name} {len(self)} {self.broken}"


class Words:
    """Stands for a Clip: token ids are numbers of words, or the numbers themselves; every text is noted."""

    preprocess = PreprocessCfg()

    def __init__(self):
        self.words, self.seen = {}, []

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        self.seen += texts
        return [np.array([self.number(word) for word in text.split()], np.int32) for text in texts]

    def number(self, word: str) -> int:
        return int(word) if word.isdigit() else self.words.setdefault(word, 1000 + len(self.words))

    def text(self, row: np.ndarray) -> str:
        return " ".join(list(self.words)[i - 1000] for i in row)
