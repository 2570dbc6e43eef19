"""Folders of pictures: one folder a class, or one folder of pictures with captions beside them."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fomo.datasets.arrays import Strings
from fomo.datasets.sources.base import IMAGE_SUFFIXES, NamedClasses, PictureFiles, unread_texts
from fomo.errors import UserError
from fomo.schema import Natural
from fomo.text import plural

JUNK = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "Icon\r")  # what systems leave in folders


@dataclass
class Tree:
    """What lies in a folder, in order of names; hidden files and JUNK are not there."""

    path: Path
    content: list["str | Tree"] = field(default_factory=list)  # names of pictures, and folders
    others: list[str] = field(default_factory=list)  # names of files that are no pictures

    @classmethod
    def of(cls, path: Path, links: int = 1) -> "Tree":
        """links: so many levels down links to folders are followed; deeper they could lead in a circle."""
        tree = cls(path)
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name in JUNK:
                continue
            if entry.is_dir(follow_symlinks=links > 0):
                tree.content.append(cls.of(Path(entry.path), links - 1))
            elif entry.is_file() and suffix_of(entry.name) in IMAGE_SUFFIXES:
                tree.content.append(entry.name)
            else:
                tree.others.append(entry.name)
        return tree

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def folders(self) -> list["Tree"]:
        return [inner for inner in self.content if isinstance(inner, Tree)]

    @property
    def pictures(self) -> list[str]:
        """The names of those that lie in it and not deeper."""
        return [inner for inner in self.content if isinstance(inner, str)]

    def walk(self) -> Iterator["Tree"]:
        """Itself and all folders below."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def all_pictures(self) -> Iterator[str]:
        """The paths of all pictures, here and deeper."""
        for inner in self.content:
            if isinstance(inner, Tree):
                yield from inner.all_pictures()
            else:
                yield os.path.join(self.path, inner)

    def holds_pictures(self) -> bool:
        return next(self.all_pictures(), None) is not None

    def at(self, level: int) -> Iterator["Tree"]:
        """The folders so many levels down."""
        for folder in self.folders:
            yield from (folder.at(level - 1) if level > 1 else (folder,))

    def relative(self, path: "str | Path") -> str:
        return os.path.relpath(path, self.path)


@dataclass
class Folder(PictureFiles, NamedClasses):
    """PATH/CLASS/.../picture.jpg, at any depth; or PATH/picture.jpg with PATH/picture.txt, a caption set.

    level: where the class folders are, 1: in PATH, 2: in the folders of PATH; 0: none is a class, pictures have
    captions at any depth. The name of a class is that of its folder, `_` read as a blank.
    """

    path: str
    level: Natural = 1

    def __post_init__(self):
        if not Path(self.path).is_dir():
            raise UserError(f"{self.path}: no such folder")
        tree = Tree.of(Path(self.path), self.level)
        folders = {tree.relative(folder.path): folder for folder in tree.at(self.level)} if self.level else {}
        found = {name: list(map(tree.relative, folder.all_pictures())) for name, folder in folders.items()}
        found = {name: files for name, files in sorted(found.items()) if files}
        if found:
            files = [file for group in found.values() for file in group]
            names = self.class_names(list(found))
            self.number(names, [i for i, group in enumerate(found.values()) for _ in group])
        else:
            files = tree.pictures if self.level else list(map(tree.relative, tree.all_pictures()))
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
        self.notes = tuple(left_out(tree, folders, found))

    def class_names(self, folders: list[str]) -> list[str]:
        for folder in folders:
            if re.search("[\udc80-\udcff]", folder):  # bytes that os.scandir could not decode
                raise UserError(f"{self.path}: the name of a class folder is not UTF-8: {folder}")
        names = [os.path.basename(folder).replace("_", " ").strip() for folder in folders]
        for name in {n for n in names if names.count(n) > 1}:
            same = [folder for folder, other in zip(folders, names, strict=True) if other == name]
            remedy = "; rename one, or say at which `level` the classes are" if self.level > 1 else ""
            raise UserError(
                f"{self.path}: two classes have the same name {name!r}: {', '.join(same)}{remedy}"
            )
        return names

    def captions(self, index: int) -> list[str]:
        """The lines of the `.txt` beside the picture."""
        return self.captions_beside(index)


def suffix_of(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def left_out(tree: Tree, classes: dict[str, Tree], found: dict[str, list[str]]) -> Iterator[str]:
    """Lines on what of a folder is in no class, and on what is no picture."""
    if found:
        within = {file for files in found.values() for file in files}
        loose = [file for file in map(tree.relative, tree.all_pictures()) if file not in within]
        if loose:
            count = plural(len(loose), "picture is", "pictures are")
            yield f"{count} in no class folder, first: {loose[0]}; skipped"
        if empty := [name for name in classes if name not in found]:
            count = plural(len(empty), "folder has", "folders have")
            yield f"{count} no picture, first: {empty[0]}; no class is made of it"
        deeper = (
            tree.relative(file)
            for name in found
            for inner in classes[name].folders
            for file in inner.all_pictures()
        )
        if first := next(deeper, None):
            yield f"pictures lie deeper than the class folders, first: {first}; `level` says which are classes"
    if skipped := skipped_files(tree):
        yield skipped


def skipped_files(tree: Tree, used: Collection[str] = ()) -> str:
    """How many files are neither pictures nor their captions, by suffix; nothing if there are none.

    used: suffixes and names of files that are.
    """
    kinds: Counter = Counter()
    for folder in tree.walk():
        stems = {os.path.splitext(name)[0] for name in folder.pictures}
        for name in folder.others:
            stem, suffix = os.path.splitext(name)
            if (
                not (suffix.lower() == ".txt" and stem in stems)
                and suffix.lower() not in used
                and name not in used
            ):
                kinds[suffix.lower() or name] += 1
    if not kinds:
        return ""
    listed = ", ".join(f"{suffix} {count}" for suffix, count in kinds.most_common(6))
    more = f", and {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
    return f"{plural(kinds.total(), 'file')} skipped, of a kind that is not read here ({listed}{more})"
