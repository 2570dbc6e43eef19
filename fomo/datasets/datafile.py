"""Data files: which sources are the pretraining pool, what there is to learn, and what must be kept.

cache: auto              # or always, never: how pixels are kept, see pixels.open_pixels
pretraining: [{source: webdataset, path: "cc3m/{0000..0019}.tar", weight: 2, limit: 100_000}]
adaptation:
  flowers: {source: webdataset, train: flowers/train.tar, test: flowers/test.tar, prompt: "a photo of a {}."}
  shop: {source: folder, train: shop, holdout: 0.1}  # a tenth of every class is the test split
evaluation:
  mnist: {source: torchvision, name: MNIST, root: mnist}
"""

import inspect
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fomo.datasets.sources.base import Part, Source, at_most, held_out
from fomo.datasets.sources.catalogue import with_catalogue
from fomo.datasets.sources.clip_benchmark import ClipBenchmark
from fomo.datasets.sources.folders import Folder
from fomo.datasets.sources.fomo_in_flux import FomoInFlux
from fomo.datasets.sources.tables import Table, Tsv
from fomo.datasets.sources.torchvision import Torchvision
from fomo.datasets.sources.webdataset import Webdataset
from fomo.datasets.sources.world import World
from fomo.errors import FieldError, UserError
from fomo.schema import at_least, build, convert, locate, one_of, read_yaml, refuse_unknown

SOURCES: dict[str, type[Source]] = {
    "world": World,
    "torchvision": Torchvision,
    "folder": Folder,
    "csv": Table,
    "tsv": Tsv,
    "webdataset": Webdataset,
    "clip_benchmark": ClipBenchmark,
    "fomo_in_flux": FomoInFlux,
}
PATHS = ("path", "root", "info", "classes_file")  # places: variables expand, relative to the data file
SAID = ("source", "train", "test", "prompt", "task", "dataset", "year")  # of any entry
OF_ROLE = {"pretraining": ("weight", "limit"), "adaptation": ("holdout",), "evaluation": ()}
CACHE = ("auto", "always", "never")  # see pixels.open_pixels
SPLITS = {"pretraining": ("train",), "adaptation": ("train", "test"), "evaluation": ("test",)}  # needs one of
TASKS = ("classification", "retrieval")


@dataclass(frozen=True)
class Entry:
    """One named dataset of a data file; its splits are opened when asked for."""

    name: str
    role: str  # "adaptation" or "evaluation"
    spec: dict  # as written, with what the catalogue knows
    file: Path
    keep: str = "auto"  # one of CACHE

    @property
    def task(self) -> str:
        return self.spec.get("task", "classification")

    @property
    def where(self) -> str:
        """The dotted path of the entry in its file."""
        return self.name if self.role == "pretraining" else f"{self.role}.{self.name}"

    def has(self, split: str) -> bool:
        field = SOURCES[self.spec["source"]].split_field
        if split == "test" and "holdout" in self.spec:
            return True
        return field == "split" or field in self.spec or split in self.spec

    def open(self, split: str) -> Source | None:
        """The split "train" or "test", None if the data file has no such split."""
        if not self.has(split):
            return None
        if "holdout" in self.spec:
            return self.open_part(split)
        source = self.open_alone(split)
        other = {"train": "test", "test": "train"}[split]
        if type(source).agree is not Source.agree and other in self.spec and split in self.spec:
            both = {split: source, other: self.open_alone(other)}
            source.agree([both["train"], both["test"]])
        self.say_notes(source, split)
        return source

    def open_part(self, split: str) -> Source:
        """What `holdout` takes from the training pictures for testing, or what it leaves of them."""
        whole = self.open_alone("train")
        self.say_notes(whole, "train")
        test = held_out(whole, float(self.spec["holdout"]))
        if not test.any():
            problem = "no class has two pictures, so none can be held out for testing"
            raise UserError(f"{self.file}: {self.where}.holdout: {problem}")
        return Part(whole, np.flatnonzero(test if split == "test" else ~test))

    def say_notes(self, source: Source, split: str) -> None:
        for note in source.notes:
            say_once(f"{self.where} ({split}): {note}")

    def open_alone(self, split: str) -> Source:
        """One split, with the class names that are found in it alone."""
        cls = SOURCES[self.spec["source"]]
        fields = {k: v for k, v in self.spec.items() if k not in (*SAID, *OF_ROLE[self.role])}
        if split in self.spec:
            fields[cls.split_field] = self.spec[split]
        if "split" in inspect.signature(cls).parameters:
            fields.setdefault("split", split)
        try:
            return opened(cls, fields, self)
        except UserError as error:
            message = str(error) if str(error).startswith(self.where) else f"{self.where}: {error}"
            if split in self.spec:  # `train: 5` is the user's word for what the source calls `path`
                message = message.replace(f"{self.where}.{cls.split_field}", f"{self.where}.{split}", 1)
            raise UserError(f"{self.file}: {message}") from None


@cache
def say_once(note: str) -> None:
    tqdm.write(note, file=sys.stderr)


@dataclass(frozen=True)
class DataFile:
    path: Path
    image_size: int | None
    pretraining: list[Entry]
    adaptation: dict[str, Entry]
    evaluation: dict[str, Entry]
    keep: str = "auto"

    def pool(self) -> list[Source]:
        """The sources of the pretraining pool."""
        return [entry.open("train") for entry in self.pretraining]


def read(path: str | Path) -> DataFile:
    """Read and check a data file; nothing is opened yet."""
    path = Path(path)
    values = read_yaml(path)
    known = ("image_size", "cache", "pretraining", "adaptation", "evaluation")
    keep = values.get("cache", "auto")
    try:
        for key in values:
            one_of(str(key), key, known)
        one_of("cache", keep, CACHE)
    except FieldError as error:
        raise UserError(f"{path}: {error}") from None
    pool = values.get("pretraining") or []
    if not isinstance(pool, list):
        raise UserError(f"{path}: pretraining: expected a list of sources, got {type(pool).__name__}")
    entries = {}
    for role in ("adaptation", "evaluation"):
        named = values.get(role) or {}
        if not isinstance(named, dict):
            raise UserError(f"{path}: {role}: expected named datasets, got {type(named).__name__}")
        entries[role] = {str(name): entry(str(name), role, spec, path, keep) for name, spec in named.items()}
    for name in entries["adaptation"].keys() & entries["evaluation"].keys():
        raise UserError(f"{path}: evaluation.{name}: adaptation has a set of this name, scores go by name")
    size = values.get("image_size")
    if size is not None and not (type(size) is int and size > 0):
        raise UserError(f"{path}: image_size: expected a positive whole number, got {size!r}")
    pretraining = [entry(f"pretraining[{i}]", "pretraining", spec, path, keep) for i, spec in enumerate(pool)]
    return DataFile(path, size, pretraining, entries["adaptation"], entries["evaluation"], keep)


def entry(name: str, role: str, spec: dict, path: Path, keep: str = "auto") -> Entry:
    made = Entry(name, role, spec, path, keep)
    if not isinstance(spec, dict) or "source" not in spec:
        raise UserError(f"{path}: {made.where}: expected named fields with `source`, got {spec!r}")
    try:
        made = replace(made, spec=with_catalogue(spec, made.where))
        check(made)
    except FieldError as error:
        raise UserError(f"{path}: {error}") from None
    return made


def check(entry: Entry) -> None:
    """Raises a FieldError for what can be wrong in an entry before anything is opened."""
    spec, where = entry.spec, entry.where
    one_of(f"{where}.source", spec["source"], tuple(SOURCES))
    one_of(f"{where}.task", entry.task, TASKS)
    cls = SOURCES[spec["source"]]
    fields = inspect.signature(cls).parameters
    refuse_unknown(spec, (*SAID, *OF_ROLE[entry.role], *fields), where)
    for prompt in prompts_of(spec):
        if "{}" not in str(prompt):
            raise FieldError(f"{where}.prompt", f"{prompt!r} has no {{}} for the class name")
    if entry.role == "adaptation":
        for field in {"split", *(() if "split" in fields else (cls.split_field,))} & spec.keys():
            raise FieldError(f"{where}.{field}", "would be learnt and tested on, say train and test")
    if "weight" in spec and convert(spec["weight"], float, f"{where}.weight") <= 0:
        raise FieldError(f"{where}.weight", f"must be positive, got {spec['weight']}")
    if "limit" in spec:
        at_least(f"{where}.limit", convert(spec["limit"], int, f"{where}.limit"), 1)
    if "holdout" in spec:
        check_holdout(entry)
    needed = SPLITS[entry.role]
    if not any(entry.has(split) for split in needed):
        field = cls.split_field if entry.role == "pretraining" else " or ".join(needed)
        raise FieldError(f"{where}.{field}", "missing, and it has no default")


def check_holdout(entry: Entry) -> None:
    field = f"{entry.where}.holdout"
    share = convert(entry.spec["holdout"], float, field)
    if not 0 < share < 1:
        raise FieldError(field, f"a share between 0 and 1, got {share:g}")
    if "test" in entry.spec:
        raise FieldError(field, "takes the test pictures from train, but test is given too")
    if not entry.has("train"):
        raise FieldError(f"{entry.where}.train", "missing, and holdout takes the test pictures from it")


def prompts_of(spec: dict) -> tuple[str, ...]:
    """What the data file gives; nothing: the source's own are used."""
    prompt = spec.get("prompt") or ()
    return tuple(prompt) if isinstance(prompt, (list, tuple)) else (prompt,)


def opened(cls: type[Source], fields: dict, entry: Entry) -> Source:
    for key in PATHS:
        if isinstance(fields.get(key), str):
            fields[key] = place(fields[key], entry)
        elif isinstance(fields.get(key), list):
            fields[key] = [place(path, entry) if isinstance(path, str) else path for path in fields[key]]
    source = build(cls, fields, entry.where)
    if entry.spec.get("limit") is not None:
        source = at_most(source, int(entry.spec["limit"]))
    source.prompts = prompts_of(entry.spec) or source.prompts
    source.weight, source.cache = float(entry.spec.get("weight", 1)), entry.keep
    return source


def place(path: str, entry: Entry) -> str:
    """A path with its variables expanded, relative to the data file, or one of the hub."""
    expanded = os.path.expandvars(path)
    if unset := re.search(r"\$\{?\w+\}?", expanded):
        raise UserError(f"the environment variable {unset.group()} is not set")
    return expanded if expanded.startswith("hf://") else locate(expanded, entry.file)


def content(data: DataFile) -> dict:
    """A data file that says the same from anywhere: its paths are absolute."""
    roles = {role: getattr(data, role).items() for role in ("adaptation", "evaluation")}
    sets = {role: {name: absolute(entry) for name, entry in some} for role, some in roles.items()}
    said = {"image_size": data.image_size, "cache": data.keep}
    return {**said, "pretraining": [absolute(entry) for entry in data.pretraining], **sets}


def absolute(entry: Entry) -> dict:
    spec = dict(entry.spec)
    splits = ("train", "test") if SOURCES[spec["source"]].split_field in PATHS else ()
    for key in spec.keys() & {*PATHS, *splits}:
        value = spec[key]
        if isinstance(value, str):
            spec[key] = place(value, entry)
        elif isinstance(value, list):
            spec[key] = [place(path, entry) if isinstance(path, str) else path for path in value]
    return spec


def wanted(data: DataFile) -> Iterator[tuple[Entry, str]]:
    for entry in data.pretraining:
        yield entry, "train"
    for entry in data.adaptation.values():
        yield entry, "train"
        yield entry, "test"
    for entry in data.evaluation.values():
        yield entry, "test"
