"""Tables of pictures: open_clip's own CSV and TSV format, a path and a caption in each row."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from fomo.datasets.arrays import Captions, Strings
from fomo.datasets.sources.base import Captioned, NamedClasses, PictureFiles
from fomo.errors import UserError

csv.field_size_limit(10_000_000)  # characters of a caption; Python's own limit is 131,072


class Table(PictureFiles, Captioned, NamedClasses):
    """Rows that follow each other with the same picture are one sample with several captions."""

    separator = ","

    def __init__(
        self,
        path: str,
        image: str = "filepath",
        caption: str | None = "title",
        concept: str | None = None,
        separator: str | None = None,
    ):
        """image, caption, concept: names of columns; concept: that of the class names."""
        self.path, self.columns = path, (image, caption, concept)
        self.base, self.separator = str(Path(path).parent), separator or self.separator
        if len(self.separator) != 1:
            raise UserError(f"{path}: separator: expected one character, got {separator!r}")
        names: dict[str, int] = {}
        files, labels, captions = [], [], []
        for file, text, concept in self.rows():
            if not files or file != files[-1]:
                files.append(file)
                labels.append(names.setdefault(concept, len(names)) if concept else -1)
                captions.append([])
            if text:
                captions[-1].append(text)
        if not files:
            raise UserError(f"{self.path}: no rows below the header")
        self.files, self.texts = Strings.of(files), Captions.of(captions)
        self.number(list(names), labels)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(picture, caption, concept) of each row, empty where it has none."""
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter=self.separator, restval="")
                for column in filter(None, self.columns):
                    self.require(column, list(reader.fieldnames or []))
                for number, row in enumerate(reader, 1):
                    values = [(row[column] or "").strip() if column else "" for column in self.columns]
                    if not values[0]:
                        raise UserError(f"{self.path}: row {number} has no {self.columns[0]}")
                    yield tuple(values)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self.path}: not a readable table: {error}") from None

    def require(self, column: str, columns: list[str]) -> None:
        if column not in columns:
            hint = "; is the separator right?" if len(columns) == 1 else ""
            none = ", or `caption: null` for none" if column == self.columns[1] else ""
            raise UserError(f"{self.path}: no column {column!r}, it has: {', '.join(columns)}{none}{hint}")

    def path_of(self, index: int) -> str:
        return os.path.join(self.base, os.path.expandvars(self.files[index]))


class Tsv(Table):
    separator = "\t"
