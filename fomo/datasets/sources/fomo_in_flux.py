"""The authors' layout of all 63 sets: pictures under ROOT/FOLDER, and JSON files that say what they are.

FOLDER_SPLIT.json maps a picture's path to its class and captions, FOLDER_SPLIT_224.json those of the copies
resized to 224 px; FOLDER_classnames.json lists the class names in label order.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fomo.datasets.arrays import Strings
from fomo.datasets.sources.base import Source, twins
from fomo.datasets.sources.folders import digest_of
from fomo.errors import UserError

PRIMER = "primer_caption"  # the class prompt filled in: what there is to say where nobody wrote a caption
CAPTIONS = ("default_caption", "synthetic_merged_caption", PRIMER)  # the first that an entry has


@dataclass
class FomoInFlux(Source):
    """One split of one set. The JSON files may lie in ROOT, ROOT/FOLDER, ROOT/info or in `info`."""

    root: str
    folder: str  # the official name, as in the released streams: DTD, MONKEYS10
    split: str = "train"
    info: str | None = None
    resized: bool | None = None  # the copies of 224 px; default: if they are there
    split_field = "split"

    def __post_init__(self):
        resized = [True, False] if self.resized is None else [self.resized]
        stems = [f"{self.folder}_{self.split}{'_224' * small}" for small in resized]
        found = [(file, base) for stem in stems if (file := self.find(stem)) and (base := self.base_of(file))]
        if not found:
            file = next(filter(None, map(self.find, stems)), None)
            places = ", ".join(str(place) for place in self.places())
            raise UserError(
                f"{file}: its first picture is not under {Path(self.root) / self.folder}"
                if file
                else f"no {' or '.join(f'{stem}.json' for stem in stems)} in {places}"
            )
        file, self.base = found[0]
        entries = read_json(file, dict)
        self.files = Strings.of(entries)
        try:
            texts = [captions_of(entry) for entry in entries.values()]
            named = [entry["classname"] is not None for entry in entries.values()]
            labels = [int(entry["target"]) for entry in entries.values()]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: an entry is not of the official form: {error!r}") from None
        self.texts = Strings.of(text for of_picture in texts for text in of_picture)
        self.ends = np.cumsum([len(of_picture) for of_picture in texts], dtype=np.int64)
        self.labels = np.where(named, np.array(labels, np.int64), -1)
        self.classes = self.class_names(file, [entry["classname"] for entry in entries.values()])
        self.notes = twins(self.classes)

    def places(self) -> list[Path]:
        root = Path(self.root)
        return [*([Path(self.info)] if self.info else []), root, root / self.folder, root / "info"]

    def find(self, stem: str) -> Path | None:
        return next((f for place in self.places() if (f := place / f"{stem}.json").is_file()), None)

    def base_of(self, file: Path) -> str | None:
        """Where the paths of an info file begin: ROOT/FOLDER, or ROOT as some archives unpack."""
        first = next(iter(read_json(file, dict)), "")
        bases = [Path(self.root) / self.folder, Path(self.root)]
        return next((str(base) for base in bases if first and (base / first).is_file()), None)

    def class_names(self, file: Path, names: list[str | None]) -> list[str]:
        """Of FOLDER_classnames.json; without it, what the entries say. A label beyond them is a mistake."""
        by_label = {
            label: name for label, name in zip(self.labels.tolist(), names, strict=True) if label >= 0
        }
        if not by_label:
            return []
        listed = self.find(f"{self.folder}_classnames")
        if listed is None:
            return [by_label.get(label, f"class {label}") for label in range(max(by_label) + 1)]
        classes = read_json(listed, list)
        if max(by_label) >= len(classes):
            raise UserError(f"{file}: label {max(by_label)} has no name, {listed} has {len(classes)}")
        return [str(name) for name in classes]

    def agree(self, splits: list[Source]) -> None:
        """Without a list of names: the longest of the splits', for a label that only one of them has."""
        self.classes = max((split.classes for split in splits), key=len)

    def image(self, index: int) -> Image.Image:
        return Image.open(self.name_of(index))

    def captions(self, index: int) -> list[str]:
        return [self.texts[i] for i in range(self.ends[index - 1] if index else 0, self.ends[index])]

    def caption_counts(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def name_of(self, index: int) -> str:
        return f"{self.base}/{self.files[index]}"

    def id_of(self, index: int) -> str:
        return self.files[index]

    def key(self) -> str:
        return f"fomo_in_flux {Path(self.base).resolve()} {digest_of(self.base, self.files)}"


def captions_of(entry: dict) -> list[str]:
    for field in CAPTIONS:
        texts = [entry[field]] if isinstance(entry[field], str) else entry[field] or []
        if texts := [text.strip() for text in texts if text.strip()]:
            return texts
    return []


def read_json(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable JSON file: {error}") from None
    if not isinstance(content, kind) or not content:
        raise UserError(f"{file}: expected a JSON {'object' if kind is dict else 'list'} that is not empty")
    return content
