"""What is wrong with the data before anything is trained on it: every file opened, every picture decoded.

Errors keep a run from making sense; warnings are for the user to judge.
"""

import hashlib
import math
import re
import textwrap
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
from PIL import Image, ImageDraw
from tqdm import tqdm

from fomo.datasets.arrays import Calls, cores
from fomo.datasets.cache import LIMIT, PARALLEL, decode, folder_of, open_pixels, opened, summary
from fomo.datasets.datafile import DataFile, Entry, read, wanted
from fomo.datasets.sources.base import UNREADABLE, Source, rgb
from fomo.datasets.sources.webdataset import Shards
from fomo.errors import UserError
from fomo.recipe import Model

CHUNK = 64  # pictures that a process hashes at a time
WORDS = 77  # a caption of more words cannot fit CLIP's context, whatever the words
COLUMNS, ROWS, TILE, TEXT = 6, 4, 128, 48  # of a contact sheet, in pictures and in pixels
HEAD = ("dataset", "split", "pictures", "unreadable", "captions", "without", "concepts", "copies")


@dataclass
class Split:
    """One opened split and what was found in it."""

    entry: Entry
    split: str
    source: Source
    hashes: np.ndarray  # (n,) uint64 of the pixels, 0 where the picture cannot be read
    broken: list[str]
    captions: int  # all of them
    bare: int  # pictures without a caption
    copies: int = 0  # test pictures that are also in what is trained on

    @property
    def name(self) -> str:
        return f"{self.entry.where} ({self.split})"

    @property
    def present(self) -> np.ndarray:
        """The labels that occur."""
        return np.unique(self.source.labels[self.source.labels >= 0])

    def row(self) -> list[str]:
        concepts = len(self.present) or 1
        name = self.entry.where.partition(".")[2] or self.entry.where
        numbers = (len(self.source), len(self.broken), self.captions, self.bare, concepts)
        return [name, self.split, *map(str, numbers), str(self.copies) if self.split == "test" else "-"]


@dataclass
class Findings:
    splits: list[Split] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The table, then the warnings and errors, one line each."""
        rows = [list(HEAD), *(split.row() for split in self.splits)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(pad, row, widths, range(len(row)))).rstrip() for row in rows]
        told = [f"warning: {text}" for text in self.warnings] + [f"error: {text}" for text in self.errors]
        return "\n".join([*lines, *([""] if told else []), *told])


def pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def check(path: str | Path, plot: str | None = None) -> Findings:
    """Open and decode everything that a data file names; `plot`: a folder for a contact sheet of each dataset."""
    data, found = read(path), Findings()
    for entry, split in wanted(data):
        try:
            source = entry.open(split)
        except UserError as error:
            if str(error) not in found.errors:  # class folders open together with those of the other split
                found.errors.append(str(error))
            continue
        if source is not None:
            found.splits.append(scan(entry, split, source))
    for split in found.splits:
        judge(split, data, found)
    compare(found)
    if plot:
        draw(found.splits, Path(plot))
    return found


def scan(entry: Entry, split: str, source: Source) -> Split:
    """Decode every picture, in processes where there are many."""
    calls, total = partial(hash_chunk, source), len(source)
    chunks = Calls.run(calls, math.ceil(total / CHUNK), cores() if total >= PARALLEL else 0)
    hashes, broken = [], []
    with tqdm(total=total, desc=f"{entry.where} ({split})", leave=False, unit="img") as bar:
        for part, problems in chunks:
            hashes.append(part)
            broken += problems
            bar.update(len(part))
    counts = source.caption_counts()
    return Split(
        entry, split, source, np.concatenate(hashes), broken, int(counts.sum()), int((counts == 0).sum())
    )


def hash_chunk(source: Source, chunk: int) -> tuple[np.ndarray, list[str]]:
    numbers = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(source)))
    hashes, problems = np.zeros(len(numbers), np.uint64), []
    for place, index in enumerate(numbers):
        try:
            image = rgb(source.image(index))
            digest = hashlib.blake2b(image.tobytes(), digest_size=8, salt=repr(image.size).encode()[:16])
            hashes[place] = max(int.from_bytes(digest.digest(), "little"), 1)
        except UNREADABLE as error:
            problems.append(f"{source.name_of(index)}: {' '.join(str(error).split())}")
    return hashes, problems


def judge(split: Split, data: DataFile, found: Findings) -> None:
    """What can be said of a split by itself."""
    source, total, warn = split.source, len(split.source), found.warnings
    warn += [f"{split.name}: {note}" for note in source.notes]
    if split.broken:
        line = summary(split.name, split.broken, total)
        too_many = len(split.broken) > LIMIT * total
        (found.errors if too_many else warn).append(f"{line}{f', the limit is {LIMIT:.0%}' * too_many}")
    if isinstance(source, Shards) and source.guessed is not None:
        for label in split.present.tolist():
            if source.classes[label] == f"class {label}":
                found.errors.append(f"{split.name}: label {label} has no name: no classes.txt, no caption")
    if split.entry.task == "retrieval" or not source.classes:
        if split.bare:
            warn.append(f"{split.name}: {split.bare} of {total} pictures have no caption")
    elif unlabelled := int((source.labels < 0).sum()):
        warn.append(f"{split.name}: {unlabelled} of {total} pictures have no class")
    if split.entry.task == "classification" and split.split == "test" and not source.classes:
        found.errors.append(f"{split.name}: no class labels, say `task: retrieval`")
    long = [text for i in range(total) for text in source.captions(i) if text.count(" ") >= WORDS]
    if long:
        words = max(len(text.split()) for text in long)
        warn.append(
            f"{split.name}: {len(long)} captions are longer than a model reads, the longest {words} words"
        )
    if (
        data.image_size
        and (folder := folder_of(source, data.image_size)).exists()
        and not opened(folder, whole=True)
    ):
        warn.append(f"{split.name}: its pixel cache {folder} was altered since it was written, delete it")


def compare(found: Findings) -> None:
    """Splits with each other: copies of test pictures in what is trained on, classes that only one split has."""
    train = {s.entry.where: s for s in found.splits if s.split == "train"}
    for test in (s for s in found.splits if s.split == "test"):
        copied = np.zeros(len(test.hashes), bool)
        for where, other in train.items():
            same = np.isin(test.hashes, other.hashes) & (test.hashes > 0)
            if same.any():
                first = test.source.name_of(int(same.argmax()))
                found.warnings.append(
                    f"{test.name}: {same.sum()} pictures are also in {where} (train), first: {first}"
                )
            copied |= same
        test.copies = int(copied.sum())
        own = train.get(test.entry.where)
        if own is None or not test.source.classes:
            continue
        for one, other, told in (
            (test, own, "scored but never trained"),
            (own, test, "trained but never scored"),
        ):
            names = [one.source.classes[i] for i in np.setdiff1d(one.present, other.present)]
            if names:
                shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
                found.warnings.append(f"{one.name}: {len(names)} classes are {told}: {shown}")


def draw(splits: list[Split], folder: Path) -> None:
    """A contact sheet per dataset: pictures from all over it with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    first = {split.entry.where: split for split in reversed(splits)}  # train before test
    for where, split in first.items():
        name = re.sub(r"[^\w.-]+", "_", where.partition(".")[2] or where).strip("_")
        sheet(split.source).save(folder / f"{name}.png")


def sheet(source: Source) -> Image.Image:
    count = min(COLUMNS * ROWS, len(source))
    page = Image.new("RGB", (COLUMNS * TILE, math.ceil(count / COLUMNS) * (TILE + TEXT)), "white")
    pen = ImageDraw.Draw(page)
    for place, index in enumerate(np.linspace(0, len(source) - 1, count).astype(int).tolist()):
        row, column = divmod(place, COLUMNS)
        left, top = column * TILE, row * (TILE + TEXT)
        pixels, _ = decode(source, TILE, index)
        if pixels.size:
            picture = Image.fromarray(pixels)
            picture.thumbnail((TILE - 6, TILE - 6))
            page.paste(picture, (left + 3, top + 3))
        label = source.labels[index]
        texts = source.captions(index) or [source.classes[label] if label >= 0 else ""]
        pen.multiline_text(
            (left + 3, top + TILE), textwrap.fill(texts[0][:200], 20, max_lines=3), "black", spacing=1
        )
    return page


# --- data cache ---


def fill_caches(path: str | Path, size: int) -> str:
    """Make the cache of every split; -> a table of what is there."""
    data = read(path)
    if data.keep == "never":
        raise UserError(f"{path}: cache: it says never, so there is nothing to make")
    lines = []
    for entry, split in wanted(data):
        if (source := entry.open(split)) is None:
            continue
        source.cache = "always"  # that is what the command is for
        pixels = open_pixels(source, size, f"{entry.where} ({split})")
        place = f"{pixels.meta['bytes'] / 2**20:8.1f} MB  {pixels.folder}"
        lines.append(f"{entry.where:24} {split:5} {len(source):9} pictures  {place}")
    return "\n".join(lines)


def side_of(path: str | Path, model: Model) -> int:
    """The side that `update` would cache pictures at: the data file's image_size, else the model's.

    That is read from its configuration: nothing is loaded or downloaded.
    """
    if side := read(path).image_size:
        return side
    config = model.config or (open_clip.get_model_config(model.name) if model.name else None)
    if config is None:
        what = model.name or model.pretrained
        raise UserError(f"{what}: the image size is not known before the model is loaded, say --size")
    size = config["vision_cfg"].get("image_size", 224)
    return size[0] if isinstance(size, (tuple, list)) else size
