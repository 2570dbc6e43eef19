"""The authors' layout of all 63 sets: pictures under ROOT/FOLDER, and JSON files that say what they are.

FOLDER_SPLIT.json maps a picture's path to its class and captions, FOLDER_SPLIT_224.json those of the copies
resized to 224 px; FOLDER_classnames.json lists the class names in label order.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fomo.datasets.arrays import Captions, Strings
from fomo.datasets.sources.base import Captioned, NumberedClasses, PictureFiles
from fomo.errors import UserError

PRIMER = "primer_caption"  # the class prompt filled in: what there is to say where nobody wrote a caption
CAPTIONS = ("default_caption", "synthetic_merged_caption", PRIMER)  # the first that an entry has


@dataclass
class FomoInFlux(PictureFiles, Captioned, NumberedClasses):
    """One split of one set. The JSON files may lie in ROOT, ROOT/FOLDER, ROOT/info or in `info`."""

    root: str
    folder: str  # the official name, as in the released streams: DTD, MONKEYS10
    split: str = "train"
    info: str | None = None
    resized: bool | None = None  # the copies of 224 px; default: if they are there
    split_field = "split"

    def __post_init__(self):
        file, self.base = self.find_split()
        entries = read_json(file, dict)
        self.files = Strings.of(entries)
        try:
            self.texts = Captions.of([captions_of(entry) for entry in entries.values()])
            names = [entry["classname"] for entry in entries.values()]
            labels = [int(entry["target"]) for entry in entries.values()]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: an entry is not of the official form: {error!r}") from None
        self.labels = np.where([name is not None for name in names], np.array(labels, np.int64), -1)
        listed = self.find(f"{self.folder}_classnames")
        classes = [str(name) for name in read_json(listed, list)] if listed else []
        self.name_classes(dict(zip(self.labels.tolist(), names, strict=True)), listed, classes, str(file))

    def find_split(self) -> tuple[Path, str]:
        """The info file of the split, and the folder where the paths in it begin."""
        resized = [True, False] if self.resized is None else [self.resized]
        stems = [f"{self.folder}_{self.split}{'_224' * small}" for small in resized]
        files = [file for stem in stems if (file := self.find(stem))]
        for file in files:
            if base := self.base_of(file):
                return file, base
        if files:
            raise UserError(f"{files[0]}: its first picture is not under {Path(self.root) / self.folder}")
        names, places = " or ".join(f"{stem}.json" for stem in stems), ", ".join(map(str, self.places()))
        raise UserError(f"no {names} in {places}")

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
