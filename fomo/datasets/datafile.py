"""Data files: which sources are the pretraining pool, what there is to learn, and what must be kept.

pretraining: [{source: webdataset, path: coco/train.tar}]
adaptation:
  flowers: {source: webdataset, train: flowers/train.tar, test: flowers/test.tar, prompt: "a photo of a {}."}
evaluation:
  mnist: {source: torchvision, name: MNIST, root: mnist}
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

from fomo.datasets.sources import Source, Torchvision, Webdataset
from fomo.datasets.world import World
from fomo.errors import FieldError, UserError
from fomo.recipe import build, locate, one_of, read_yaml, refuse_unknown

SOURCES: dict[str, type[Source]] = {"world": World, "torchvision": Torchvision, "webdataset": Webdataset}
PATHS = ("path", "root", "classes_file")  # places: variables expand, relative to the data file
SAID = ("source", "train", "test", "prompt", "task")  # of any entry, beside the fields of its source
SPLITS = {"pretraining": ("train",), "adaptation": ("train", "test"), "evaluation": ("test",)}  # needs one of
TASKS = ("classification", "retrieval")


@dataclass(frozen=True)
class Entry:
    """One named dataset of a data file; its splits are opened when asked for."""

    name: str
    role: str  # "adaptation" or "evaluation"
    spec: dict  # as written
    file: Path

    @property
    def task(self) -> str:
        return self.spec.get("task", "classification")

    @property
    def where(self) -> str:
        """The dotted path of the entry in its file."""
        return self.name if self.role == "pretraining" else f"{self.role}.{self.name}"

    def has(self, split: str) -> bool:
        field = SOURCES[self.spec["source"]].split_field
        return field == "split" or field in self.spec or split in self.spec

    def open(self, split: str) -> Source | None:
        """The split "train" or "test", None if the data file has no such split."""
        if not self.has(split):
            return None
        cls = SOURCES[self.spec["source"]]
        fields = {k: v for k, v in self.spec.items() if k not in SAID}
        if split in self.spec:
            fields[cls.split_field] = self.spec[split]
        if "split" in inspect.signature(cls).parameters:
            fields.setdefault("split", split)
        return opened(cls, fields, self)


@dataclass(frozen=True)
class DataFile:
    path: Path
    image_size: int | None
    pretraining: list[Entry]
    adaptation: dict[str, Entry]
    evaluation: dict[str, Entry]

    def pool(self) -> list[Source]:
        """The sources of the pretraining pool."""
        return [entry.open("train") for entry in self.pretraining]


def read(path: str | Path) -> DataFile:
    """Read and check a data file; nothing is opened yet."""
    path = Path(path)
    values = read_yaml(path)
    known = ("image_size", "pretraining", "adaptation", "evaluation")
    for key in values:
        try:
            one_of(str(key), key, known)
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
        entries[role] = {str(name): entry(str(name), role, spec, path) for name, spec in named.items()}
    for name in entries["adaptation"].keys() & entries["evaluation"].keys():
        raise UserError(f"{path}: evaluation.{name}: adaptation has a set of this name, scores go by name")
    size = values.get("image_size")
    if size is not None and not (type(size) is int and size > 0):
        raise UserError(f"{path}: image_size: expected a positive whole number, got {size!r}")
    pretraining = [entry(f"pretraining[{i}]", "pretraining", spec, path) for i, spec in enumerate(pool)]
    return DataFile(path, size, pretraining, entries["adaptation"], entries["evaluation"])


def entry(name: str, role: str, spec: dict, path: Path) -> Entry:
    made = Entry(name, role, spec, path)
    if not isinstance(spec, dict) or "source" not in spec:
        raise UserError(f"{path}: {made.where}: expected named fields with `source`, got {spec!r}")
    try:
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
    refuse_unknown(spec, (*SAID, *inspect.signature(cls).parameters), where)
    for prompt in prompts_of(spec):
        if "{}" not in str(prompt):
            raise FieldError(f"{where}.prompt", f"{prompt!r} has no {{}} for the class name")
    needed = SPLITS[entry.role]
    if not any(entry.has(split) for split in needed):
        field = cls.split_field if entry.role == "pretraining" else " or ".join(needed)
        raise FieldError(f"{where}.{field}", "missing, and it has no default")


def prompts_of(spec: dict) -> tuple[str, ...]:
    """What the data file gives; nothing: the source's own are used."""
    prompt = spec.get("prompt") or ()
    return tuple(prompt) if isinstance(prompt, (list, tuple)) else (prompt,)


def opened(cls: type[Source], fields: dict, entry: Entry) -> Source:
    where = entry.where
    for key in PATHS:
        if isinstance(fields.get(key), str):
            fields[key] = locate(fields[key], entry.file)
            if unset := re.search(r"\$\{?\w+\}?", fields[key]):
                raise UserError(f"{entry.file}: {where}: the environment variable {unset.group()} is not set")
    try:
        source = build(cls, fields, where)
    except UserError as error:
        message = str(error) if str(error).startswith(where) else f"{where}: {error}"
        raise UserError(f"{entry.file}: {message}") from None
    if prompts := prompts_of(entry.spec):
        source.prompts = prompts
    return source
