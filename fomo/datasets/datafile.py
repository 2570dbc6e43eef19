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
from fomo.recipe import build, locate, one_of, read_yaml

SOURCES: dict[str, type[Source]] = {"world": World, "torchvision": Torchvision, "webdataset": Webdataset}
PATHS = (
    "path",
    "root",
    "classes_file",
)  # fields that are places: variables expand, relative to the data file
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

    def open(self, split: str) -> Source | None:
        """The split "train" or "test", None if the data file has no such split."""
        cls = SOURCES[self.spec["source"]]
        fields = {
            k: v for k, v in self.spec.items() if k not in ("source", "train", "test", "prompt", "task")
        }
        if split in self.spec:
            fields[cls.split_field] = self.spec[split]
        elif cls.split_field not in fields and cls.split_field != "split":
            return None
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
    entries = {
        role: {name: entry(str(name), role, spec, path) for name, spec in (values.get(role) or {}).items()}
        for role in ("adaptation", "evaluation")
    }
    size = values.get("image_size")
    if size is not None and not (isinstance(size, int) and size > 0):
        raise UserError(f"{path}: image_size: expected a positive whole number, got {size!r}")
    pretraining = [entry(f"pretraining[{i}]", "pretraining", spec, path) for i, spec in enumerate(pool)]
    return DataFile(path, size, pretraining, entries["adaptation"], entries["evaluation"])


def entry(name: str, role: str, spec: dict, path: Path) -> Entry:
    where = name if role == "pretraining" else f"{role}.{name}"
    if not isinstance(spec, dict) or "source" not in spec:
        raise UserError(f"{path}: {where}: expected named fields with `source`, got {spec!r}")
    try:
        one_of(f"{where}.source", spec["source"], tuple(SOURCES))
        one_of(f"{where}.task", spec.get("task", "classification"), TASKS)
    except FieldError as error:
        raise UserError(f"{path}: {error}") from None
    for prompt in prompts_of(spec):
        if "{}" not in str(prompt):
            raise UserError(f"{path}: {where}.prompt: {prompt!r} has no {{}} for the class name")
    return Entry(name, role, spec, path)


def prompts_of(spec: dict) -> tuple[str, ...]:
    prompt = spec.get("prompt", ())
    return (prompt,) if isinstance(prompt, str) else tuple(prompt)


def opened(cls: type[Source], fields: dict, entry: Entry) -> Source:
    where = entry.name if entry.role == "pretraining" else f"{entry.role}.{entry.name}"
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
