"""What is wrong with the data before anything is trained on it: every file opened, every picture decoded.

Errors keep a run from making sense; warnings are for the user to judge.
"""

import hashlib
import itertools
import math
import re
import textwrap
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from PIL import Image, ImageDraw

from fomo.architectures import configuration
from fomo.atomic import write_atomically
from fomo.budget.mafs import architecture
from fomo.datasets.arrays import in_chunks
from fomo.datasets.cache import check_limit, decode, folder_of, open_complete, open_pixels, summary
from fomo.datasets.datafile import DataFile, Entry, read, splits_of
from fomo.datasets.remarks import Reader, of_classes, of_model, of_pictures, of_texts, reader_of
from fomo.datasets.sources.base import UNREADABLE, Source, peculiarities, unread_texts
from fomo.datasets.sources.webdataset import Shards
from fomo.datasets.understood import overlaps, problems, say
from fomo.errors import UserError
from fomo.recipe import Model
from fomo.text import aligned, plural

COLUMNS, ROWS, TILE, TEXT = 6, 4, 128, 48  # of a contact sheet, in pictures and in pixels
HEAD = ("dataset", "split", "pictures", "unreadable", "captions", "without", "concepts", "copies")


@dataclass
class Split:
    """One opened split and what was found in it."""

    entry: Entry
    split: str
    source: Source
    hashes: np.ndarray  # (n,) uint64 of the pixels, 0 where the picture cannot be read
    broken: list[tuple[str, str]]  # name and reason of each picture that cannot be read
    captions: int  # all of them
    bare: int  # pictures without a caption
    peculiar: Counter  # pictures by what open_clip does not see of them
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
        table = aligned([list(HEAD), *(split.row() for split in self.splits)], left=2)
        lines = [f"warning: {text}" for text in self.warnings] + [f"error: {text}" for text in self.errors]
        return "\n".join([table, *([""] if lines else []), *lines])

    def write_bad(self, path: Path) -> str:
        """A line for each picture that cannot be read: its path, a tab, why; -> how many."""
        bad = dict(pair for split in self.splits for pair in split.broken)
        lines = (f"{name}\t{reason}".replace("\n", "\\n") + "\n" for name, reason in bad.items())
        write_atomically(path, "".join(lines).encode("utf-8", "surrogateescape"))
        return f"{path}: {len(bad)} pictures that cannot be read"


def check(path: str | Path, plot: str | None = None, model: Model | None = None) -> Findings:
    """Open and decode everything that a data file names; `plot`: a folder for a contact sheet of each dataset.

    model: whose tokenizer and context captions must fit; by default those of CLIP.
    """
    data, found, reader = read(path), Findings(), reader_of(model) if model else Reader()
    found.warnings += of_model(data, reader)
    for entry, split in splits_of(data):
        try:
            source = entry.open(split)
        except UserError as error:
            if str(error) not in found.errors:  # class folders open together with those of the other split
                found.errors.append(str(error))
            continue
        if source is not None:
            found.splits.append(scan(entry, split, source))
    for split in found.splits:
        judge(split, data, found, reader)
    opened = []
    for _, splits in itertools.groupby(found.splits, key=lambda split: split.entry.where):
        (first, *_) = splits = list(splits)
        opened.append((first.entry, {split.split: split.source for split in splits}))
        found.warnings += of_classes(*opened[-1])
    say(data, opened)
    found.errors += problems(opened, overlaps(opened))
    compare(found)
    if plot:
        draw(found.splits, Path(plot))
    return found


def scan(entry: Entry, split: str, source: Source) -> Split:
    """Decode every picture, in processes where there are many."""
    hashes, broken, peculiar = [], [], Counter()
    for part, unread, found in in_chunks(
        partial(hash_chunk, source), len(source), f"{entry.where} ({split})"
    ):
        hashes.append(part)
        broken += unread
        peculiar += found
    counts = source.caption_counts()
    captions, bare = int(counts.sum()), int((counts == 0).sum())
    return Split(entry, split, source, np.concatenate(hashes), broken, captions, bare, peculiar)


def hash_chunk(source: Source, numbers: range) -> tuple[np.ndarray, list[tuple[str, str]], Counter]:
    """-> hashes of the pixels, broken pictures and what is wrong, how many are peculiar and how."""
    hashes, problems, peculiar = np.zeros(len(numbers), np.uint64), [], Counter()
    for place, index in enumerate(numbers):
        try:
            image = source.image(index)
            pixels = image.convert("RGB")
            peculiar.update(peculiarities(image))
        except UNREADABLE as error:
            problems.append((source.name_of(index), " ".join(str(error).split())))
            continue
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=8, salt=repr(pixels.size).encode()[:16])
        hashes[place] = max(int.from_bytes(digest.digest(), "little"), 1)
    return hashes, problems, peculiar


def judge(split: Split, data: DataFile, found: Findings, reader: Reader) -> None:
    """What can be said of a split by itself."""
    source, total, warn = split.source, len(split.source), found.warnings
    warn += [f"{split.name}: {note}" for note in (*source.notes, *unread_texts(source))]
    if split.broken:
        broken = [f"{name}: {reason}" for name, reason in split.broken]
        try:
            check_limit(source, split.name, broken)
            warn.append(summary(split.name, broken, total))
        except UserError as error:
            found.errors.append(str(error))
    warn += of_pictures(split.name, split.peculiar, total, source)
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
    warn += of_texts(split.entry, split.split, source, range(total), reader)
    if data.image_size:
        cache = folder_of(source, PreprocessCfg(size=data.image_size))
        if cache.exists() and open_complete(cache) is None:
            warn.append(f"{split.name}: its pixel cache {cache} is not as it was written, delete it")


def compare(found: Findings) -> None:
    """Splits with each other: copies of test pictures in what is trained on."""
    train = {s.entry.where: s for s in found.splits if s.split == "train"}
    for test in (s for s in found.splits if s.split == "test"):
        copied = np.zeros(len(test.hashes), bool)
        for where, other in train.items():
            same = np.isin(test.hashes, other.hashes) & (test.hashes > 0)
            if same.any():
                what = f"{plural(int(same.sum()), 'picture is', 'pictures are')} also in {where} (train)"
                first = test.source.name_of(int(same.argmax()))
                found.warnings.append(f"{test.name}: {what}, first: {first}")
            copied |= same
        test.copies = int(copied.sum())


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
        pixels, _ = decode(source, PreprocessCfg(size=TILE), index)
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


def fill_caches(path: str | Path, how: PreprocessCfg) -> str:
    """Make the cache of every split; -> a table of what is there."""
    data = read(path)
    if data.cache == "never":
        raise UserError(f"{path}: cache: it says never, so there is nothing to make")
    rows = []
    for entry, split in splits_of(data):
        if (source := entry.open(split)) is None:
            continue
        source.cache = "always"  # that is what the command is for
        pixels = open_pixels(source, how, f"{entry.where} ({split})")
        megabytes = pixels.meta["bytes"] / 2**20
        rows.append(
            [entry.where, split, plural(len(source), "picture"), f"{megabytes:.1f} MB", str(pixels.folder)]
        )
    return aligned(rows, left=2) if rows else ""


def as_cached(path: str | Path, model: Model, size: int | None = None) -> PreprocessCfg:
    """How `update` would cache pictures: at `size`, else the data file's image_size, else the model's.

    All else is the model's, from its configuration: its weights are neither read nor fetched.
    """
    side = size or read(path).image_size or architecture(model)["vision_cfg"].get("image_size", 224)
    return replace(preprocess_of(model), size=side[0] if isinstance(side, (tuple, list)) else side)


def preprocess_of(model: Model) -> PreprocessCfg:
    if not (model.name or model.pretrained):
        return PreprocessCfg()
    stored = configuration(model.name, model.pretrained).get("preprocess_cfg", {})
    return PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), stored))
