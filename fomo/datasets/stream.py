"""Streams: all concepts in order, cut into T updates (paper, section 3.3); the official stream files; a summary.

A stream file is a JSON list of `FOLDER+++class name`. FOLDER is the official folder of a set that the catalogue
knows (`dataset:` in the data file), else the set's name in the data file.
"""

import itertools
import json
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fomo.datasets.datafile import DataFile
from fomo.datasets.sources.catalogue import catalogue, find
from fomo.errors import UserError
from fomo.text import plural

SEPARATOR = "+++"
NAMED = 20  # so many missing concepts are named one by one


class Concept(NamedTuple):
    """One class of one dataset."""

    dataset: str
    label: int  # -1: the whole of a set without classes
    name: str
    prompt: str = "a photo of a {}."


def concepts_of(data: DataFile) -> tuple[list[Concept], list[int]]:
    """What there is to learn and how many pictures each concept has, without looking at a picture."""
    concepts, sizes = [], []
    for name, entry in data.adaptation.items():
        source = entry.open("train")
        if source is None:
            continue
        labels, counts = np.unique(source.labels, return_counts=True)
        size = dict(zip(labels.tolist(), counts.tolist(), strict=True))
        for label, title in enumerate(source.classes) if source.classes else [(-1, name)]:
            if label in size:
                concepts.append(Concept(name, label, title, source.prompts[0]))
                sizes.append(size[label])
    if not concepts:
        raise UserError(f"{data.path}: adaptation: no training pictures, there is nothing to learn")
    return concepts, sizes


def cut(concepts: list[Concept], updates: int, per_dataset: bool = False) -> list[list[Concept]]:
    """T contiguous chunks; the first N mod T are one concept longer (as the released code).

    per_dataset: one chunk per dataset, in the order in which they first appear.
    """
    if per_dataset:
        return chunks_of(concepts, updates, "dataset", lambda concept: concept.dataset)
    if updates > len(concepts):
        raise UserError(
            f"stream.updates: {updates} updates need as many concepts, the data has {len(concepts)}"
        )
    size, longer = divmod(len(concepts), updates)
    starts = [t * size + min(t, longer) for t in range(updates + 1)]
    return [concepts[a:b] for a, b in itertools.pairwise(starts)]


def chunks_of(
    concepts: list[Concept], updates: int, what: str, group: Callable[[Concept], str]
) -> list[list[Concept]]:
    """One chunk per group, in the order in which they first appear. what: word for a group."""
    chunks: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        chunks[group(concept)].append(concept)
    if updates != len(chunks):
        problem = f"one update per {what} makes {plural(len(chunks), 'update')}, got {updates}"
        raise UserError(f"stream.updates: {problem}")
    return list(chunks.values())


def plain(name: str) -> str:
    """Names are compared without case, and with `_` as a space: there torchvision and official files differ."""
    return " ".join(name.casefold().replace("_", " ").split())


def folders_of(data: DataFile) -> dict[str, str]:
    """Dataset of the data file -> its name in stream files."""
    official = {name: entry.spec.get("dataset") for name, entry in data.adaptation.items()}
    return {name: find(dataset).folder if dataset else name for name, dataset in official.items()}


def read_stream(path: str | Path) -> list[str]:
    """The lines of a stream file, checked."""
    try:
        lines = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(lines, list) or not lines:
        raise UserError(
            f"{path}: expected a JSON list of FOLDER{SEPARATOR}class name, got {str(lines)[:40]!r}"
        )
    for i, line in enumerate(lines):
        if not isinstance(line, str) or not all(line.partition(SEPARATOR)):
            raise UserError(f"{path}: entry {i}: expected FOLDER{SEPARATOR}class name, got {line!r}")
    return lines


def write_stream(path: str | Path, lines: list[str]) -> None:
    """Byte for byte as the official files are."""
    Path(path).write_text(json.dumps(lines, indent=4), encoding="utf-8")


def lines_of(concepts: list[Concept], data: DataFile) -> list[str]:
    folders = folders_of(data)
    return [f"{folders[c.dataset]}{SEPARATOR}{c.name}" for c in concepts]


def match(path: str | Path, concepts: list[Concept], data: DataFile, partial: bool = False) -> list[Concept]:
    """The concepts in the order of a stream file. What the data lacks is an error, or with `partial` a note.

    Concepts that the file does not name are not in the stream: they are tested, and never learned.
    """
    folders, rows = folders_of(data), catalogue()
    datasets = {plain(rows[name].folder): name for name in folders if name in rows}
    datasets |= {plain(name): name for name in folders} | {plain(f): name for name, f in folders.items()}
    waiting: dict[tuple[str, str], deque[Concept]] = defaultdict(deque)  # two classes may share a name
    for concept in concepts:
        waiting[concept.dataset, plain(concept.name)].append(concept)
    found, missing = [], []
    for line in read_stream(path):
        folder, _, name = line.partition(SEPARATOR)
        queue = waiting.get((datasets.get(plain(folder), ""), plain(name)))
        if queue:
            found.append(queue.popleft())
        else:
            missing.append(line)
    extra = lines_of([concept for queue in waiting.values() for concept in queue], data)
    if missing and not (partial and found):
        hint = "; stream.partial: true takes the rest" if found else ""
        raise UserError(f"{path}: {counted(missing, 'not in the data')}{hint}")
    notes = ((missing, "not in the data, left out"), (extra, "of the data not in the stream, never learned"))
    for lines, what in notes:
        if lines:
            print(f"{path}: {counted(lines, what)}", file=sys.stderr)
    return found


def counted(lines: list[str], what: str) -> str:
    """How many, of which sets, and by name while they are few."""
    count = f"{len(lines):,} concept{'s' * (len(lines) != 1)} {what}: "
    if len(lines) <= NAMED:
        return count + ", ".join(lines)
    sets = Counter(line.partition(SEPARATOR)[0] for line in lines)
    first = ", ".join(lines[:3])
    return f"{count}{', '.join(f'{n:,} of {folder}' for folder, n in sets.items())} (first {first})"


def switches(concepts: list[Concept]) -> int:
    """How often the next concept comes from another dataset."""
    return sum(a.dataset != b.dataset for a, b in itertools.pairwise(concepts))


def summary(stream: list[list[Concept]], sizes: dict[tuple[str, int], int]) -> str:
    """A table with one line per update. sizes: (dataset, label) -> pictures."""
    lines = ["update  concepts    samples  datasets  switches  largest"]
    whole = list(itertools.chain(*stream))
    for update, chunk in enumerate([*stream, whole], 1):
        samples = sum(sizes[c.dataset, c.label] for c in chunk)
        sets = Counter(c.dataset for c in chunk)
        name = f"{update:6}" if update <= len(stream) else "   all"
        largest = ", ".join(f"{dataset} {n}" for dataset, n in sets.most_common(3))
        lines.append(f"{name}  {len(chunk):8,}  {samples:9,}  {len(sets):8}  {switches(chunk):8,}  {largest}")
    return "\n".join(lines)


def composition(stream: list[list[Concept]]) -> list[dict[str, int]]:
    """How many concepts each dataset gives to each update."""
    return [dict(Counter(concept.dataset for concept in chunk)) for chunk in stream]
