"""What the columns of a table mean: by their names, else by what stands in them."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from fomo.datasets.dates import date_of
from fomo.datasets.sources.split_names import split_in
from fomo.datasets.sources.tables import Ends, Row, json_objects, plain, separated, sniffed
from fomo.errors import UserError

SOURCES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
CLOSED = (".xlsx", ".xls", ".ods", ".arrow", ".feather")  # tables that are not read
COLUMNS = {  # by name, in any case; the first that a table has
    "image": ("filepath", "file_path", "image_path", "path", "file_name", "filename", "file", "image"),
    "caption": ("title", "caption", "captions", "text", "description", "comment"),
    "concept": ("concept", "category", "class_name", "classname", "class", "label"),
    "split_column": ("split", "subset", "partition", "usage", "set"),
    "date": ("date", "datetime", "timestamp", "time", "created_at", "date_taken", "month", "year"),
}
USUAL = {".csv": ",", ".tsv": "\t", ".txt": ","}  # separators
LOOKED = 200  # rows
ENOUGH = 0.5  # of them name a picture that is there, or say a date
WEB = re.compile("https?://", re.IGNORECASE)


@dataclass
class Look:
    """What a table is found to be."""

    file: Path
    fields: dict = field(default_factory=dict)  # of its entry in a data file: image, caption, concept, ...
    splits: set[str] = field(default_factory=set)  # in its column of splits
    problem: str = ""  # why it cannot be used

    @property
    def source(self) -> str:
        return SOURCES[self.file.suffix.lower()]


def look_at(file: Path, roots: Iterable[Path], ends: Callable[[Path], Ends]) -> Look:
    """roots: folders that its names may be paths in, the likeliest first; ends: of such a folder."""
    if file.suffix.lower() in CLOSED:
        return Look(file, problem="is a table that is not read here; save it as .csv")
    try:
        columns, rows, every = first_rows(file)
    except UserError as error:
        return Look(file, problem=f"cannot be used: {str(error).removeprefix(f'{file}: ')}")
    names = {name.strip().lower(): name for name in reversed(columns) if isinstance(name, str)}
    known = {what: first_of(COLUMNS[what], names) for what in COLUMNS}
    image, root = column_of_pictures(file, columns, rows, known["image"], roots, ends)
    if image is None or (root and is_picture(image, root, ends)):  # what stands for a name is a picture
        return Look(file, problem=without_pictures(columns, rows, ends(next(iter(roots)))))
    date = column_of_dates(names, rows)
    found = {"image": image, "caption": known["caption"], "concept": known["concept"], "date": date}
    if not (found["caption"] or found["concept"]):
        others = [name for name in columns if name not in (image, known["split_column"])]
        others = [name for name in others if name != date] or others
        found["concept"] = column_of_classes(others, every())
        if found["concept"] is None:
            return Look(file, {"image": image}, problem=without_texts(others, rows))
    fields = {key: name for key, name in found.items() if name or key == "caption"}
    if root not in (None, file.parent):
        fields["root"] = str(root)
    if file.suffix.lower() in USUAL:
        fields |= separator_of(file)
    splits = splits_in(known["split_column"], every)
    return Look(file, fields | ({"split_column": known["split_column"]} if splits else {}), splits)


def first_rows(file: Path) -> tuple[list[str], list[Row], Callable[[], list[Row]]]:
    """-> the columns, the first LOOKED rows, and all rows when they are asked for."""
    if file.suffix.lower() == ".parquet":
        from fomo.datasets.sources import parquet

        columns, rows = parquet.without_pictures(str(file))
        return columns, rows[:LOOKED], lambda: rows
    if SOURCES[file.suffix.lower()] == "json":
        objects = json_objects(file)
        return list(dict.fromkeys(key for row in objects for key in row)), objects[:LOOKED], lambda: objects
    columns, rows = separated(file)
    return columns, list(islice(rows, LOOKED)), lambda: list(separated(file)[1])


def first_of(known: tuple[str, ...], names: dict[str, str]) -> str | None:
    return next((names[name] for name in known if name in names), None)


def column_of_dates(names: dict[str, str], rows: list[Row]) -> str | None:
    """The first of a known name whose values are dates."""
    for column in (names[name] for name in COLUMNS["date"] if name in names):
        if rows and sum(bool(date_of(row.get(column))) for row in rows) > ENOUGH * len(rows):
            return column
    return None


def column_of_pictures(
    file: Path,
    columns: list[str],
    rows: list[Row],
    known: str | None,
    roots: Iterable[Path],
    ends: Callable[[Path], Ends],
) -> tuple[str | None, Path | None]:
    """The column whose values are pictures, one of a known name first, and the folder that they are in."""
    if file.suffix.lower() == ".parquet":
        from fomo.datasets.sources import parquet

        inside = parquet.embedded_in(parquet.opened(str(file)))
        if inside:
            return (known if known in inside else inside[0]), None
    for column in dict.fromkeys([*([known] if known else []), *columns]):
        values = [plain(row.get(column)) for row in rows]
        for root in roots:
            if values and sum(is_picture(value, root, ends) for value in values) > ENOUGH * len(values):
                return column, root
    web = known and any(WEB.match(plain(row.get(known))) for row in rows)
    here = any(ends(root).named for root in roots)
    return (None if web or here or not rows else known), None  # its pictures may be missing: said when opened


def is_picture(value: object, root: Path, ends: Callable[[Path], Ends]) -> bool:
    if not isinstance(value, str) or not value.strip() or "\0" in value or WEB.match(value):
        return False
    try:
        return (root / value).is_file() or ends(root).find(value) is not None
    except (OSError, UserError):  # a name that is too long; one that may be several
        return False


def without_pictures(columns: list[str], rows: list[Row], ends: Ends) -> str:
    accepted, has = ", ".join(COLUMNS["image"]), ", ".join(map(str, columns)) or "none"
    if any(is_picture(name, Path(ends.root), lambda root: ends) for name in columns):
        return f"has no header, its first row is: {has}; add one such as filepath,label"
    if any(WEB.match(plain(value)) for row in rows for value in row.values()):
        return "names web addresses; download the pictures first, as img2dataset does"
    hint = "; is the separator right?" if len(columns) == 1 else ""
    return f"has no column of pictures that are there, it has: {has}; accepted: {accepted}{hint}"


def without_texts(others: list[str], rows: list[Row]) -> str:
    if not others:
        return "names pictures, and has neither captions nor classes"
    flags = [name for name in others if {plain(row.get(name)) for row in rows} <= {"0", "1", "0.0", "1.0"}]
    if len(flags) > 1:
        return f"has a column of 0 and 1 for each class ({', '.join(flags[:3])}, ...); make one, `label`, of them"
    has = ", ".join(others)
    return f"has no column of captions or classes, it has: {has}; call it caption or label"


def column_of_classes(others: list[str], rows: list[Row]) -> str | None:
    """The only other column, if its values repeat as names of classes do."""
    if len(others) != 1:
        return None
    values = {plain(row.get(others[0])) for row in rows} - {""}
    return others[0] if 1 < len(values) <= len(rows) / 2 else None


def separator_of(file: Path) -> dict:
    found = sniffed(file)
    return {} if found == USUAL[file.suffix.lower()] else {"separator": found}


def splits_in(column: str | None, every: Callable[[], list[Row]]) -> set[str]:
    """The splits that a column tells apart; none if no value of it is one."""
    kinds = {split_in(plain(row.get(column))) for row in every()} if column else set()
    return kinds - {None}
