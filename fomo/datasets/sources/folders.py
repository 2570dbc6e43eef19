"""Pictures in folders: one folder per class, or a single one with captions in `.txt` files of the same names."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomo.datasets.arrays import Strings
from fomo.datasets.sources.base import IMAGE_SUFFIXES, NamedClasses, PictureFiles, unread_texts
from fomo.errors import UserError


@dataclass
class Folder(PictureFiles, NamedClasses):
    """PATH/CLASS/.../picture.jpg, at any depth; or PATH/picture.jpg with PATH/picture.txt, a caption set.

    The name of a class is that of its folder, `_` read as a blank.
    """

    path: str

    def __post_init__(self):
        root = Path(self.path)
        if not root.is_dir():
            raise UserError(f"{self.path}: no such folder")
        found = {entry.name: list(pictures(Path(entry.path), root)) for entry in folders_in(root)}
        found = {name: files for name, files in sorted(found.items()) if files}
        loose = [entry.name for entry in os.scandir(root) if is_picture(entry)]
        if found:
            files = [file for group in found.values() for file in group]
            names = self.class_names(list(found))
            self.number(names, [i for i, group in enumerate(found.values()) for _ in group])
            if loose:
                self.notes = (f"{len(loose)} pictures are in no class folder, first: {min(loose)}; skipped",)
        else:
            files = sorted(loose)
            self.classes, self.labels = [], np.broadcast_to(np.int64(-1), len(files))
        if not files:
            known = ", ".join(IMAGE_SUFFIXES)
            raise UserError(f"{self.path}: no pictures in it or in its folders (known: {known})")
        self.base, self.files = self.path, Strings.of(files)
        if not found and not any(self.captions(i) for i in range(len(self))):
            problem = [
                "neither class folders nor a .txt with a caption beside a picture",
                *unread_texts(self),
            ]
            raise UserError(f"{self.path}: {'; '.join(problem)}")

    def class_names(self, folders: list[str]) -> list[str]:
        for folder in folders:
            if re.search("[\udc80-\udcff]", folder):  # bytes that os.scandir could not decode
                raise UserError(f"{self.path}: the name of a class folder is not UTF-8: {folder}")
        names = [folder.replace("_", " ").strip() for folder in folders]
        for name in {n for n in names if names.count(n) > 1}:
            same = [folder for folder, other in zip(folders, names, strict=True) if other == name]
            raise UserError(f"{self.path}: two classes have the same name {name!r}: {', '.join(same)}")
        return names

    def captions(self, index: int) -> list[str]:
        """The lines of the `.txt` beside the picture."""
        return self.captions_beside(index)


def folders_in(root: Path) -> list[os.DirEntry]:
    return [entry for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]


def is_picture(entry: os.DirEntry) -> bool:
    suffix = entry.name.rpartition(".")[2].lower()
    return suffix in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()


def pictures(folder: Path, root: Path) -> Iterator[str]:
    """Paths relative to `root` of all pictures below `folder`, in order."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if is_picture(entry):
            yield os.path.relpath(entry.path, root)
        elif entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from pictures(Path(entry.path), root)
