"""Tables of pictures: open_clip's own CSV and TSV, JSON lines as of Hugging Face, COCO captions, Parquet."""

import csv
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

import numpy as np

from fomo.datasets.arrays import Captions, Strings
from fomo.datasets.dates import date_of
from fomo.datasets.sources.base import Captioned, NamedClasses, PictureFiles, distinct
from fomo.datasets.sources.folders import Tree
from fomo.datasets.sources.split_names import chosen_test, split_in
from fomo.errors import UserError, one_line
from fomo.text import plural

csv.field_size_limit(10_000_000)  # characters of a caption; Python's own limit is 131,072
SEPARATORS = (",", "\t", ";", "|")
SNIFFED = 20  # rows that decide the separator
Row = dict[str, object]


class Rows(PictureFiles, Captioned, NamedClasses):
    """All rows of one picture, wherever they stand, are one sample with several captions, each of them once.

    A picture without a caption in the table has the lines of the `.txt` beside it. Samples are in the order of
    their first rows; a picture has one class and one date, those of its first rows that have any. A name that is
    no path from `root` stands for the one picture below `root` whose path ends so, with or without its suffix.
    """

    def __init__(
        self,
        path: str,
        image: str,
        caption: str | None,
        concept: str | None,
        root: str | None,
        split_column: str | None,
        date: str | None,
        split: str,
    ):
        """image, caption, concept, date: names of columns; concept: that of the class names."""
        self.path, self.columns = path, (image, caption, concept, date)
        self.split_column, self.split = split_column, split
        self.base = root or str(Path(path).parent)
        self.moved: dict[str, str] = {}  # names in the table -> where the pictures are
        self.unreadable: dict[int, str] = {}  # number of the sample -> what stands for its date
        self.ignored: Counter = Counter()  # rows by what a column of splits says that is not used
        names: dict[str, int] = {}  # class name -> its number here
        numbers: dict[str, int] = {}  # path -> number of the sample
        files, labels, captions, dates, contradictory = [], [], [], [], {}
        for file, texts, concept, written in self.rows():
            place = self.place(file)
            number = numbers.setdefault(os.path.normpath(os.path.join(self.base, place)), len(files))
            if number == len(files):
                files.append(place)
                labels.append(-1)
                captions.append([])
                dates.append("")
            captions[number] += texts
            dates[number] = dates[number] or date_of(written)
            if written and not dates[number]:
                self.unreadable.setdefault(number, written)
            label = names.setdefault(concept, len(names)) if concept else -1
            if labels[number] == -1:
                labels[number] = label
            elif label not in (-1, labels[number]):
                contradictory.setdefault(number, concept)
        if not files:
            raise UserError(f"{self.path}: no rows below the header")
        self.files = Strings.of(files)
        given = map(distinct, captions)
        self.texts = Captions.of([texts or self.captions_beside(i) for i, texts in enumerate(given)])
        self.number(list(names), labels)
        if date:
            self.dates = np.array(dates)
        self.notes = tuple(self.remarks(contradictory))

    def remarks(self, contradictory: dict[int, str]) -> Iterator[str]:
        """contradictory: number of the sample -> another class of it."""
        if contradictory:
            number, other = next(iter(contradictory.items()))
            both = f"{self.classes[self.labels[number]]!r} and {other!r}"
            first = f"first: {self.files[number]} ({both})"
            count = plural(len(contradictory), "picture has", "pictures have")
            yield f"{count} rows of several classes, {first}; only the first of them is used"
        if self.dates is not None and (undated := np.flatnonzero(self.dates == "")).size:
            example = self.unreadable.get(int(undated[0]), "")
            first = f"first: {self.files[int(undated[0])]} ({example!r})"
            yield f"{plural(len(undated), 'picture has', 'pictures have')} no date that can be read, {first}"
        if len(self.ignored) > 1:
            found = ", ".join(f"{kind} {count}" for kind, count in self.ignored.items())
            yield f"the column 'split' ({found}) is not used; to use it: `path` and `split_column: split`"
        if self.moved:
            name, place = next(iter(self.moved.items()))
            what = plural(len(self.moved), "picture was", "pictures were")
            yield f"{what} found below {self.base} by the end of the path, first: {place} for {name}"

    def rows(self) -> Iterator[tuple[str, list[str], str, str]]:
        """(picture, captions, concept, date) of each row of this split, empty where it has none."""
        image, caption, concept, date = self.columns
        wanted = self.values_of_split() if self.split_column else None
        for number, row in enumerate(self.records(), 1):
            if wanted is not None and plain(row.get(self.split_column)) not in wanted:
                continue
            if wanted is None and (kind := split_in(plain(row.get("split")))):
                self.ignored[kind] += 1
            if not (file := plain(row.get(image))):
                raise UserError(f"{self.path}: row {number} has no {image}")
            texts = row.get(caption) if caption else None
            texts = texts if isinstance(texts, list) else [texts]
            found = [plain(row.get(column)) if column else "" for column in (concept, date)]
            yield file, list(map(plain, texts)), *found

    def values_of_split(self) -> set[str]:
        """What stands in the column for this split."""
        counts = Counter(plain(row.get(self.split_column)) for row in self.records())
        kinds = {value: split_in(value) for value in counts}
        where = f"{self.path}: column {self.split_column!r}"
        if unknown := [value for value, kind in kinds.items() if kind is None]:
            found = ", ".join(map(repr, unknown[:3]))
            raise UserError(f"{where}: {found} is no split, accepted: train, test, val and the like")
        kind = "train" if self.split == "train" else chosen_test(set(kinds.values()))
        if kind not in kinds.values():
            raise UserError(f"{where}: no row of {self.split}, it has: {', '.join(kinds)}")
        return {value for value in kinds if kinds[value] == kind}

    def records(self) -> Iterator[Row]:
        """The rows, by the names of the columns; a UserError if one that is needed is missing."""
        raise NotImplementedError

    def require(self, columns: list[str]) -> None:
        for column in filter(None, (*self.columns, self.split_column)):
            if column not in columns:
                hint = "; is the separator right?" if len(columns) == 1 else ""
                none = ", or `caption: null` for none" if column == self.columns[1] else ""
                raise UserError(
                    f"{self.path}: no column {column!r}, it has: {', '.join(columns)}{none}{hint}"
                )

    def place(self, file: str) -> str:
        """Where the picture is, from `base`; as it is written if there is none."""
        for name in dict.fromkeys((file, file.replace("\\", "/"))):
            if os.path.isfile(os.path.join(self.base, name)):
                return name
        if found := self.pictures.find(file):
            self.moved[file] = found
        return found or file

    @cached_property
    def pictures(self) -> "Ends":
        return Ends(self.base)


class Ends:
    """The pictures below a folder, by the ends of their paths."""

    def __init__(self, root: str):
        self.root = root
        self.named: dict[str, list[str]] = defaultdict(list)  # by name, and by name without suffix
        if Path(root).is_dir():
            tree = Tree.of(Path(root))
            for file in map(tree.relative, tree.all_pictures()):
                name = normalize("NFC", os.path.basename(file))
                self.named[name].append(file)
                self.named[os.path.splitext(name)[0]].append(file)

    def find(self, name: str) -> str | None:
        """The one picture whose path has most of `name` at its end; a UserError if several do."""
        parts = normalize("NFC", name).replace("\\", "/").strip("/").split("/")
        found = self.named.get(parts[-1]) or self.named.get(os.path.splitext(parts[-1])[0], [])
        if len(found) > 1:
            shared = {file: common_end(file.split("/")[:-1], parts[:-1]) for file in found}
            found = [file for file in found if shared[file] == max(shared.values())]
        if len(found) > 1:
            problem = f"{name} may be {found[0]} or {found[1]}"
            raise UserError(f"{self.root}: {problem}; write more of its path into the table")
        return found[0] if found else None


def common_end(one: list[str], other: list[str]) -> int:
    """How many of the last parts are the same."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count


def plain(value: object) -> str:
    """A cell as text."""
    return "" if value is None else str(value).strip()


class Table(Rows):
    """Separated values; without `separator` the one of SEPARATORS that the first rows have."""

    separator: str | None = None

    def __init__(
        self,
        path: str,
        image: str = "filepath",
        caption: str | None = "title",
        concept: str | None = None,
        separator: str | None = None,
        root: str | None = None,
        split_column: str | None = None,
        date: str | None = None,
        split: str = "train",
    ):
        self.separator = separator or self.separator
        if self.separator and len(self.separator) != 1:
            raise UserError(f"{path}: separator: expected one character, got {separator!r}")
        super().__init__(path, image, caption, concept, root, split_column, date, split)

    def records(self) -> Iterator[Row]:
        columns, rows = separated(Path(self.path), self.separator)
        self.require(columns)
        return rows


class Tsv(Table):
    separator = "\t"


class Json(Rows):
    """A `.jsonl` of an object a line, a `.json` list of objects, or captions in COCO's form."""

    def __init__(
        self,
        path: str,
        image: str = "file_name",
        caption: str | None = "text",
        concept: str | None = None,
        root: str | None = None,
        split_column: str | None = None,
        date: str | None = None,
        split: str = "train",
    ):
        super().__init__(path, image, caption, concept, root, split_column, date, split)

    def records(self) -> Iterator[Row]:
        objects = json_objects(Path(self.path))
        self.require(list(dict.fromkeys(key for row in objects for key in row)))
        return iter(objects)


def separated(path: Path, separator: str | None = None) -> tuple[list[str], Iterator[Row]]:
    """-> the names of the columns, and the rows below them."""
    try:
        with open(path, "rb") as file:
            utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")  # what spreadsheets write as Unicode text
        encoding = "utf-16" if utf16 else "utf-8-sig"
        separator = separator or sniffed(path, encoding)
        with open(path, encoding=encoding, newline="") as file:
            columns = next(csv.reader(file, delimiter=separator), [])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table: {one_line(error)}") from None
    return columns, separated_rows(path, encoding, separator)


def separated_rows(path: Path, encoding: str, separator: str) -> Iterator[Row]:
    try:
        with open(path, encoding=encoding, newline="") as file:
            yield from csv.DictReader(file, delimiter=separator, restval="")
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table: {one_line(error)}") from None


def sniffed(path: Path, encoding: str = "utf-8-sig") -> str:
    """The separator that cuts the first rows into the same number of columns, and into most."""
    with open(path, encoding=encoding, newline="") as file:
        lines = [line for line, _ in zip(file, range(SNIFFED), strict=False)]
    columns = {}
    for separator in SEPARATORS:
        counts = [len(row) for row in csv.reader(lines, delimiter=separator) if row]
        # A caption without quotes may hold separators, so the header's count is the least, not the only one.
        columns[separator] = counts[0] if counts and min(counts) >= counts[0] else 1
    return max(SEPARATORS, key=lambda separator: columns[separator])


def json_objects(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            content = json.loads(text)
            objects = coco_captions(content) if isinstance(content, dict) else content
        else:
            objects = [json.loads(line) for line in text.splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable table: {one_line(error)}") from None
    if not isinstance(objects, list) or not all(isinstance(row, dict) for row in objects):
        raise UserError(f"{path}: expected a list of objects, or an object a line, or captions as COCO's")
    return objects


def coco_captions(content: dict) -> list[Row] | None:
    """Rows of file_name and caption from `images` and `annotations`; None if they are not there."""
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        return None
    names = {image["id"]: image["file_name"] for image in images if {"id", "file_name"} <= image.keys()}
    return [
        {"file_name": names[row["image_id"]], **{k: v for k, v in row.items() if k in ("caption",)}}
        for row in annotations
        if row.get("image_id") in names
    ]
