"""Tables of pictures: open_clip's own CSV and TSV format, a path and a caption in each row."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from fomo.datasets.arrays import Captions, Strings
from fomo.datasets.sources.base import Captioned, NamedClasses, PictureFiles, distinct
from fomo.errors import UserError

csv.field_size_limit(10_000_000)  # characters of a caption; Python's own limit is 131,072


class Table(PictureFiles, Captioned, NamedClasses):
    """All rows of one picture, wherever they stand, are one sample with several captions, each of them once.

    A picture without a caption in the table has the lines of the `.txt` beside it. Samples are in the order of
    their first rows; a picture has one class, that of its first row that has any.
    """

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
        names: dict[str, int] = {}  # class name -> its number here
        numbers: dict[str, int] = {}  # path -> number of the sample
        files, labels, captions, contradictory = [], [], [], {}
        for file, text, concept in self.rows():
            number = numbers.setdefault(os.path.normpath(self.locate(file)), len(files))
            if number == len(files):
                files.append(file)
                labels.append(-1)
                captions.append([])
            captions[number].append(text)
            label = names.setdefault(concept, len(names)) if concept else -1
            if labels[number] == -1:
                labels[number] = label
            elif label not in (-1, labels[number]):
                contradictory.setdefault(number, concept)
        if not files:
            raise UserError(f"{self.path}: no rows below the header")
        self.files = Strings.of(files)
        written = map(distinct, captions)
        self.texts = Captions.of([texts or self.captions_beside(i) for i, texts in enumerate(written)])
        self.number(list(names), labels)
        if contradictory:
            self.notes = (self.contradiction(contradictory),)

    def contradiction(self, others: dict[int, str]) -> str:
        """A note on pictures with rows of several classes. others: number of the sample -> another class of it."""
        number, other = next(iter(others.items()))
        both = f"{self.classes[self.labels[number]]!r} and {other!r}"
        first = f"first: {self.files[number]} ({both})"
        return f"{len(others)} pictures have rows of several classes, {first}; only their first is used"

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
        return self.locate(self.files[index])

    def locate(self, file: str) -> str:
        return os.path.join(self.base, os.path.expandvars(file))


class Tsv(Table):
    separator = "\t"
