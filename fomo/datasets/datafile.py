"""Data files: which sources are the pretraining pool, what there is to learn, and what must be kept.

cache: auto              # or always, never: whether pixels are cached, see cache.open_pixels
skip_bad: false          # true: however many pictures cannot be read, go on without them
pretraining: [{source: webdataset, path: "cc3m/{0000..0019}.tar", weight: 2, limit: 100_000}]
adaptation:
  flowers: {source: webdataset, train: flowers/train.tar, test: flowers/test.tar, prompt: "a photo of a {}."}
  shop: {source: folder, train: shop, holdout: 0.1}  # a tenth of every class is the test split
evaluation:
  mnist: {source: torchvision, name: MNIST, root: mnist}
"""

import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from fomo.datasets.dates import is_period, within
from fomo.datasets.sources.base import Part, Source, holdout_mask, limited
from fomo.datasets.sources.catalogue import with_catalogue
from fomo.datasets.sources.clip_benchmark import ClipBenchmark
from fomo.datasets.sources.folders import Folder
from fomo.datasets.sources.fomo_in_flux import FomoInFlux
from fomo.datasets.sources.parquet import Parquet
from fomo.datasets.sources.tables import Json, Table, Tsv
from fomo.datasets.sources.torchvision import Torchvision
from fomo.datasets.sources.webdataset import Webdataset
from fomo.datasets.sources.world import World
from fomo.errors import FieldError, UserError
from fomo.schema import Count, Positive, build, convert, locate, read_yaml, refuse_unknown

SOURCES: dict[str, type[Source]] = {
    "world": World,
    "torchvision": Torchvision,
    "folder": Folder,
    "csv": Table,
    "tsv": Tsv,
    "json": Json,
    "parquet": Parquet,
    "webdataset": Webdataset,
    "clip_benchmark": ClipBenchmark,
    "fomo_in_flux": FomoInFlux,
}
PATHS = ("path", "root", "info", "classes_file")  # fields of sources: relative to the data file
HOLDOUT = 0.1  # of every class is the test split of what is to be learned and has none
VALIDATION = 0.1  # of what is to be learned, and of what must be kept, is for choices (fomo/choice.py)
CHOSEN_ON = {"adaptation": "train", "evaluation": "test"}  # the split that validation pictures are taken from
TYPES = {  # of the fields that do not depend on the source
    "source": Literal[tuple(SOURCES)],
    "prompt": str | list[str] | None,
    "task": Literal["classification", "retrieval"],
    "dataset": str,
    "year": int,
    "period": str,
    "weight": Positive,
    "limit": Count,
    "holdout": float,
    "validation": float,
    "one_class": bool,
}
# fields of any entry
COMMON = ("source", "train", "test", "prompt", "task", "dataset", "year", "period", "one_class")
OF_ROLE = {
    "pretraining": ("weight", "limit"),
    "adaptation": ("holdout", "validation"),
    "evaluation": ("validation",),
}
SPLITS = {"pretraining": ("train",), "adaptation": ("train", "test"), "evaluation": ("test",)}  # needs one of


@dataclass(frozen=True)
class Entry:
    """One named dataset of a data file; its splits are opened when asked for."""

    name: str
    role: str  # "adaptation" or "evaluation"
    spec: dict  # as written, with what the catalogue knows
    file: Path
    cache: str = "auto"
    skip_bad: bool = False
    # splits of sets of which entries are periods, see kept_open
    opened: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def task(self) -> str:
        return self.spec.get("task", "classification")

    @property
    def where(self) -> str:
        """The dotted path of the entry in its file."""
        return self.name if self.role == "pretraining" else f"{self.role}.{self.name}"

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the data file gives; nothing: the source's own are used."""
        prompt = self.spec.get("prompt") or ()
        return (prompt,) if isinstance(prompt, str) else tuple(prompt)

    @property
    def source(self) -> type[Source]:
        return SOURCES[self.spec["source"]]

    def has(self, split: str) -> bool:
        if split == "test" and "holdout" in self.spec:
            return True
        field = self.source.split_field
        return field == "split" or field in self.spec or split in self.spec

    @property
    def splits_itself(self) -> bool:
        """Whether one path or name stands for both splits."""
        return self.source.split_field == "split" or "split_column" in self.spec

    def open(self, split: str) -> Source | None:
        """The split "train", "test" or "validation", None if the data file has no such split."""
        if "period" in self.spec:
            return self.open_period(split)
        share, of = self.spec.get("validation"), CHOSEN_ON.get(self.role)
        if not share or split not in (of, "validation"):
            return None if split == "validation" else self.open_split(split)
        whole = self.open_split(of)
        if whole is None:
            return None
        taken = holdout_mask(whole, share, "validation")
        return Part(whole, np.flatnonzero(taken if split == "validation" else ~taken))

    def open_split(self, split: str) -> Source | None:
        """As the data file has it, before validation pictures are taken from it."""
        if not self.has(split):
            return None
        if "holdout" in self.spec:
            return self.open_part(split)
        source = self.open_alone(split)
        other = {"train": "test", "test": "train"}[split]
        several = {"train", "test"} <= self.spec.keys() or "split_column" in self.spec
        if type(source).agree is not Source.agree and several:
            both = {split: source, other: self.open_alone(other)}
            source.agree([both["train"], both["test"]])
        self.show_notes(source, split)
        return source

    def open_part(self, split: str) -> Source:
        """What `holdout` takes from the training pictures for testing, or what it leaves of them."""
        whole = self.open_alone("train")
        self.show_notes(whole, "train")
        test = holdout_mask(whole, self.spec["holdout"])
        if not test.any():
            problem = (
                "no class has two different pictures, so none can be held out for testing; name a test split"
            )
            raise UserError(f"{self.file}: {self.where}.holdout: {problem}")
        return Part(whole, np.flatnonzero(test if split == "test" else ~test))

    @property
    def whole(self) -> "Entry":
        """The set that this one is a period of; itself if it is none."""
        spec = {key: value for key, value in self.spec.items() if key != "period"}
        name = self.name.removesuffix(f"/{self.spec.get('period')}")
        return replace(self, name=name, spec=spec)

    def open_period(self, split: str) -> Source | None:
        """The pictures of one period; None if the split has none. All classes of the whole set are its classes."""
        whole, period = self.whole, self.spec["period"]
        dates = whole.dates()
        if not any(within(known, period).any() for known in dates.values()):
            raise UserError(f"{self.file}: {self.where}: no picture is of the period {period}")
        numbers = np.flatnonzero(within(dates[split], period)) if split in dates else []
        return Part(whole.kept_open(split), numbers) if len(numbers) else None

    def dates(self) -> dict[str, np.ndarray]:
        """(n,) texts of each split, see dates.py; of a source that has none the entry's `year`."""
        found = {}
        for split in (*SPLITS[self.role], "validation"):
            source = self.kept_open(split)
            if source is not None and source.dates is None and "year" not in self.spec:
                remedy = "name its column (`date: COLUMN`), or say the `year` of all of it"
                raise UserError(f"{self.file}: {self.where}: its pictures have no date; {remedy}")
            if source is not None:
                year = f"{self.spec.get('year', 0):04d}"
                found[split] = np.full(len(source), year) if source.dates is None else source.dates
        return found

    def kept_open(self, split: str) -> Source | None:
        """A split that is opened once, however many of its periods are entries."""
        key = split, json.dumps(self.spec, default=str)
        if key not in self.opened:
            self.opened[key] = self.open(split)
        return self.opened[key]

    def show_notes(self, source: Source, split: str) -> None:
        for note in source.notes:
            write_once(f"{self.where} ({split}): {note}")

    def open_alone(self, split: str) -> Source:
        """One split, with the class names that are found in it alone."""
        fields = {k: v for k, v in self.spec.items() if k not in (*COMMON, *OF_ROLE[self.role])}
        if split in self.spec:
            fields[self.source.split_field] = self.spec[split]
        if "split" in inspect.signature(self.source).parameters:
            fields.setdefault("split", split)
        try:
            source = build(self.source, absolute(fields, PATHS, self.file), self.where)
        except UserError as error:
            message = str(error) if str(error).startswith(self.where) else f"{self.where}: {error}"
            if split in self.spec:  # `train: 5` is the user's word for what the source calls `path`
                message = message.replace(
                    f"{self.where}.{self.source.split_field}", f"{self.where}.{split}", 1
                )
            raise UserError(f"{self.file}: {message}") from None
        source = limited(source, self.spec.get("limit"))
        source.prompts = self.prompts or source.prompts
        source.weight, source.cache = self.spec.get("weight", 1.0), self.cache
        source.skip_bad, source.data_file = self.skip_bad, self.file
        return source


@cache
def write_once(note: str) -> None:
    """On standard error, unless this process has written it before."""
    tqdm.write(note, file=sys.stderr)


@dataclass(frozen=True)
class DataFile:
    path: Path
    image_size: int | None
    pretraining: list[Entry]
    adaptation: dict[str, Entry]
    evaluation: dict[str, Entry]
    cache: str = "auto"
    skip_bad: bool = False

    def pool(self) -> list[Source]:
        """The sources of the pretraining pool."""
        return [entry.open("train") for entry in self.pretraining]


@dataclass(frozen=True)
class Content:
    """The top of a data file."""

    image_size: Count | None = None
    cache: Literal["auto", "always", "never"] = "auto"
    skip_bad: bool = False
    pretraining: list | None = None
    adaptation: dict | None = None
    evaluation: dict | None = None


def read(path: str | Path, skip_bad: bool = False, validation: bool = False) -> DataFile:
    """Read and check a data file; nothing is opened yet. skip_bad, validation: as if the file said so."""
    path = Path(path)
    values, opened = read_yaml(path), {}
    try:
        top = build(Content, values)
        common = {"cache": top.cache, "skip_bad": top.skip_bad or skip_bad}
        split = {"validation": VALIDATION} if validation else {}
        entries = {
            role: {
                str(name): entry(str(name), role, with_fields(split, spec), path, opened, **common)
                for name, spec in named.items()
            }
            for role, named in (("adaptation", top.adaptation or {}), ("evaluation", top.evaluation or {}))
        }
        for name in entries["adaptation"].keys() & entries["evaluation"].keys():
            raise FieldError(f"evaluation.{name}", "adaptation has a set of this name, scores go by name")
        pool = [
            entry(f"pretraining[{i}]", "pretraining", spec, path, opened, **common)
            for i, spec in enumerate(top.pretraining or [])
        ]
    except FieldError as error:
        raise UserError(f"{path}: {error}") from None
    return DataFile(path, top.image_size, pool, **entries, **common)


def with_fields(fields: dict, spec: Any) -> Any:
    return {**fields, **spec} if isinstance(spec, dict) else spec


def entry(
    name: str,
    role: str,
    spec: dict,
    path: Path,
    opened: dict | None = None,
    cache: str = "auto",
    skip_bad: bool = False,
) -> Entry:
    """An entry with everything checked that can be before its files are opened. Raises a FieldError.

    opened: what entries of one data file share, see Entry.kept_open.
    """
    made = Entry(name, role, spec, path, cache, skip_bad, {} if opened is None else opened)
    if not isinstance(spec, dict) or "source" not in spec:
        raise FieldError(made.where, f"expected named fields with `source`, got {spec!r}")
    typed = {
        key: convert(spec[key], kind, f"{made.where}.{key}") for key, kind in TYPES.items() if key in spec
    }
    made = replace(made, spec=with_catalogue({**spec, **typed}, made.where))
    check(made)
    if role == "adaptation" and not made.has("test"):
        made = replace(made, spec={**made.spec, "holdout": HOLDOUT})
    return made


def check(entry: Entry) -> None:
    """Raises a FieldError for fields that are unknown, missing, or do not go together."""
    spec, where, split_field = entry.spec, entry.where, entry.source.split_field
    fields = inspect.signature(entry.source).parameters
    refuse_unknown(spec, (*COMMON, *OF_ROLE[entry.role], *fields), where)
    for prompt in entry.prompts:
        if "{}" not in prompt:
            raise FieldError(f"{where}.prompt", f"{prompt!r} has no {{}} for the class name")
    if not is_period(spec.get("period", "2024")):
        accepted = "accepted: 2024, 2024-Q2, 2024-05, or the first and last date, 2024-05..2024-07"
        raise FieldError(f"{where}.period", f"got {spec['period']!r}, {accepted}")
    if entry.role == "adaptation":
        for field in {"split", *(() if entry.splits_itself else (split_field,))} & spec.keys():
            raise FieldError(f"{where}.{field}", "would be learnt and tested on, say train and test")
    for field in {"holdout", "validation"} & spec.keys():
        if not 0 < spec[field] < 1:
            raise FieldError(f"{where}.{field}", f"a share between 0 and 1, got {spec[field]:g}")
    if "holdout" in spec:
        if "test" in spec:
            raise FieldError(f"{where}.holdout", "takes the test pictures from train, but test is given too")
        if not entry.has("train"):
            raise FieldError(f"{where}.train", "missing, and holdout takes the test pictures from it")
    needed = SPLITS[entry.role]
    if not any(entry.has(split) for split in needed):
        field = split_field if entry.role == "pretraining" else " or ".join(needed)
        raise FieldError(f"{where}.{field}", "missing, and it has no default")


def absolute(spec: dict, keys: tuple[str, ...], file: Path) -> dict:
    """The fields of an entry; paths in `keys` are those that they mean in this data file, wherever that lies."""
    out = dict(spec)
    for key in spec.keys() & set(keys):
        value = spec[key]
        if isinstance(value, str):
            out[key] = resolve(value, file)
        elif isinstance(value, list):
            out[key] = [resolve(path, file) if isinstance(path, str) else path for path in value]
    return out


def resolve(path: str, file: Path) -> str:
    """A path with each ${NAME} expanded, relative to the data file, or one of the hub."""

    def value(variable: re.Match) -> str:
        if variable[1] not in os.environ:
            raise UserError(f"the environment variable {variable.group()} is not set")
        return os.environ[variable[1]]

    expanded = re.sub(r"\$\{(\w+)\}", value, path)
    return expanded if expanded.startswith("hf://") else locate(expanded, file)


def content(data: DataFile) -> dict:
    """A data file that says the same from anywhere: its paths are absolute."""

    def written(entry: Entry) -> dict:
        splits = ("train", "test") if entry.source.split_field in PATHS else ()
        return absolute(entry.spec, (*PATHS, *splits), entry.file)

    return {
        "image_size": data.image_size,
        "cache": data.cache,
        "skip_bad": data.skip_bad,
        "pretraining": [written(entry) for entry in data.pretraining],
        "adaptation": {name: written(entry) for name, entry in data.adaptation.items()},
        "evaluation": {name: written(entry) for name, entry in data.evaluation.items()},
    }


def splits_of(data: DataFile) -> Iterator[tuple[Entry, str]]:
    """Every entry with each split that its role may have."""
    for entry in (*data.pretraining, *data.adaptation.values(), *data.evaluation.values()):
        for split in (*SPLITS[entry.role], "validation"):
            yield entry, split
