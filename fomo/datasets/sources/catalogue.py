"""The catalogue: the paper's 63 datasets as data (its tables 2 and 3), 41 to learn and 22 that must be kept.

The table is catalogue.csv beside this file; an empty cell means unknown or not applicable. `dataset: NAME` in an
entry of a data file takes prompt, task, year, and the source's own name and splits from here.
"""

import csv
import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fomo.errors import FieldError, UserError
from fomo.schema import convert
from fomo.text import aligned

TABLE = Path(__file__).with_name("catalogue.csv")
# Calendar years of the 15 year groups: the order is the released time streams', the years are inferred.
YEARS = (2008, 2009, 2010, 2011, 2013, 2014, 2015, 2016, 2017, 2018, 2019, 2020, 2021, 2022, 2023)
# Where a source finds the dataset: its field, and the column that fills it.
PLACES = {
    "fomo_in_flux": ("folder", "folder"),
    "torchvision": ("name", "torchvision"),
    "clip_benchmark": ("name", "clip_benchmark"),
}


@dataclass(frozen=True)
class Row:
    """One dataset. Sizes are the paper's; `train` of a held-out set is what its loader could provide."""

    name: str  # of the loader, and of `dataset:` in a data file
    title: str
    folder: str  # in the authors' layout and in their stream files
    role: str  # "adaptation" or "evaluation"
    train: int
    test: int
    classes: int
    in_stream: int | None  # classes that the released streams hold
    domain: str
    year_group: int | None  # rank in the released time streams
    captions: str  # where they come from: generated, procedural, available, custom
    prompt: str
    metric: str  # "accuracy" or "recall@5"
    torchvision: str
    train_split: str  # torchvision's splits that are the paper's; empty: it has no such split
    test_split: str
    split_rule: str  # the paper's splits, in words
    clip_benchmark: str
    clip_benchmark_splits: str  # whether they are the paper's
    licence: str  # only where it could be verified

    @property
    def task(self) -> str:
        return "retrieval" if self.metric.startswith("recall") else "classification"

    @property
    def year(self) -> int | None:
        return YEARS[self.year_group - 1] if self.year_group else None


@cache
def catalogue() -> dict[str, Row]:
    """All 63 rows by name, adaptation first."""
    hints = Row.__annotations__
    with TABLE.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = {}
    for line in lines:
        values = {key: text if hints[key] is str else text or None for key, text in line.items()}
        fields = {key: convert(value, hints[key], f"{TABLE.name}: {key}") for key, value in values.items()}
        rows[line["name"]] = Row(**fields)
    return rows


def find(name: str, field: str = "dataset") -> Row:
    """The row of a name; for an unknown one an error with the nearest, which may be known by folder or title."""
    rows = catalogue()
    if str(name) in rows:
        return rows[name]
    known_as = {
        alias.casefold(): row.name for row in rows.values() for alias in (row.title, row.folder, row.name)
    }
    near = difflib.get_close_matches(str(name).casefold(), known_as, n=1)
    hint = f", did you mean {known_as[near[0]]}?" if near else ""
    raise FieldError(
        field, f"{name!r} is not in the catalogue{hint} (`python fomo.py data list` shows all 63)"
    )


def with_catalogue(spec: dict, where: str) -> dict:
    """A data file's entry with what the catalogue knows of its `dataset:`; what the entry says itself stands."""
    if "dataset" not in spec:
        return spec
    row = find(spec["dataset"], f"{where}.dataset")
    known = {"prompt": row.prompt, "task": row.task, "year": row.year}
    source = spec.get("source")
    if source in ("torchvision", "fomo_in_flux") or (source in PLACES and "root" not in spec):
        field, column = PLACES[source]
        if not (getattr(row, column) or field in spec):
            raise FieldError(f"{where}.dataset", f"{source} has no {row.title}")
        known[field] = getattr(row, column)
    if source == "torchvision" and not ({"train", "test"} & spec.keys()):
        known |= torchvision_splits(row, f"{where}.source")
    return {**{key: value for key, value in known.items() if value is not None}, **spec}


def torchvision_splits(row: Row, where: str) -> dict:
    splits = {"train": row.train_split, "test": row.test_split}
    if not any(splits.values()):
        other = f", clip_benchmark ({row.clip_benchmark})" if row.clip_benchmark else ""
        problem = f"torchvision {row.torchvision} lacks the paper's splits ({row.split_rule})"
        raise FieldError(where, f"{problem}; say train and test yourself, or use fomo_in_flux{other}")
    return {name: split for name, split in splits.items() if split}


def listing(root: str | None = None) -> str:
    """The catalogue as a table for people; with `root`, what is there in the authors' layout."""
    if root is not None and not Path(root).is_dir():
        raise UserError(f"--root {root}: no such directory")
    head = ["dataset", "folder", "role", "    train", "     test", "classes", "domain", "year", "captions"]
    lines = [[*head, "metric", "torchvision", "clip_benchmark", "licence", *(["present"] if root else [])]]
    for row in catalogue().values():
        sizes = [f"{row.train:9,}", f"{row.test:9,}", f"{row.classes:7,}"]
        what = [row.domain, str(row.year_group or ""), row.captions, row.metric]
        places = [row.torchvision, row.clip_benchmark, row.licence]
        found = [present(row, Path(root))] if root else []
        lines.append([row.name, row.folder, row.role, *sizes, *what, *places, *found])
    return "\n".join([aligned(lines, left=len(lines[0])), "", *totals(root)])


def totals(root: str | None) -> list[str]:
    lines = []
    for role in ("adaptation", "evaluation"):
        rows = [row for row in catalogue().values() if row.role == role]
        train, test = sum(row.train for row in rows), sum(row.test for row in rows)
        classes = sum(row.classes for row in rows)
        lines.append(f"{len(rows)} {role}: {train:,} train, {test:,} test, {classes:,} classes")
    if root:
        here = sum(present(row, Path(root)) != "-" for row in catalogue().values())
        lines.append(f"{here} of {len(catalogue())} are under {root}")
    return lines


def present(row: Row, root: Path) -> str:
    """What of a dataset is under `root` in the authors' layout: "-", or its splits that have an info file."""
    if not (root / row.folder).is_dir():
        return "-"
    infos = [*root.glob(f"{row.folder}_*.json"), *root.glob(f"*/{row.folder}_*.json")]
    names = {info.stem.removeprefix(f"{row.folder}_") for info in infos}
    found = [s for s in ("train", "test", "train_224", "test_224") if s in names]
    return " ".join(found) or "pictures, no info file"
