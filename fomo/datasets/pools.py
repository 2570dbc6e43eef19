"""The data of a run: the stream of concepts, the pools that batches are drawn from, the sets that are scored."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomo.clip import Clip
from fomo.datasets.datafile import DataFile
from fomo.datasets.eval_sets import TestSet, open_tests, open_validation, subset
from fomo.datasets.mixture import Batches, Pool, pool_of, reservoir, sub_batches
from fomo.datasets.orders import Context, make_stream
from fomo.datasets.periods import read_for
from fomo.datasets.samples import Collection, Samples, by_label
from fomo.datasets.stream import Concept
from fomo.errors import UserError
from fomo.recipe import Recipe


@dataclass
class Pools:
    stream: list[list[Concept]]  # T updates
    adaptation: Collection
    names: list[str]  # of the parts of `adaptation`
    numbers_of: dict[tuple[str, int], np.ndarray]  # (dataset, label) -> sample numbers in `adaptation`
    pretraining: Collection
    tests: list[TestSet]
    subsets: dict[str, np.ndarray]  # of each test set, the samples scored during the run
    validation: list[TestSet]  # what is chosen on, if anything is

    def batches(self, recipe: Recipe, update: int, steps: int) -> Batches:
        """The batches of one update (from 0)."""
        new, earlier = self.numbers(self.stream[update : update + 1]), self.numbers(self.stream[:update])
        seed, buffer = recipe.seed, reservoir(earlier, recipe.mixture.limit, recipe.seed)
        pools = {
            "pretraining": pool_of(self.pretraining, (seed, update, 0)),
            "update": Pool(self.adaptation, new, (seed, update, 1)),
            "buffer": Pool(self.adaptation, buffer, (seed, update, 2)),
        }
        empty = frozenset(name for name, pool in pools.items() if not len(pool)) - {"update"}
        counts = sub_batches(recipe.optimizer.batch_size, recipe.mixture, empty)
        return Batches([(name, pools[name], counts[name]) for name in pools], seed, update, steps)

    def drawn(self, recipe: Recipe) -> list[tuple[str, int, int]]:
        """Of each update the pools, the pairs that a batch has of each, and the pictures there are."""
        every = (self.batches(recipe, update, 1).draws for update in range(len(self.stream)))
        return [(name, count, len(pool)) for draws in every for name, pool, count in draws]

    def numbers(self, updates: list[list[Concept]]) -> np.ndarray:
        """The samples of all concepts of some updates."""
        found = [self.numbers_of[c.dataset, c.label] for concepts in updates for c in concepts]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def by_dataset(self, numbers: np.ndarray) -> list[tuple[str, Samples, np.ndarray]]:
        """The name, the samples and the numbers within it of each dataset among `numbers`; those with classes."""
        starts, found = self.adaptation.offsets, []
        for part, (name, samples) in enumerate(zip(self.names, self.adaptation.parts, strict=True)):
            within = numbers[(numbers >= starts[part]) & (numbers < starts[part + 1])] - starts[part]
            within = within[samples.pixels.shapes[within, 0] > 0]  # those that can be read
            if len(within) and (samples.labels[within] >= 0).all():
                found.append((name, samples, within))
        return found

    def record(self) -> dict:
        """stream.json: the stream as plain lists, and what a run must find again in its sources to go on."""
        updates = [[[c.dataset, c.label, c.name] for c in concepts] for concepts in self.stream]
        parts = zip(self.names, self.adaptation.parts, strict=True)
        return {"sources": {name: fingerprint(part) for name, part in parts}, "updates": updates}


def open_pools(recipe: Recipe, clip: Clip, record: dict | None = None, skip_bad: bool = False) -> Pools:
    """`record`: of a run that has begun, as `Pools.record` gave it; its stream is not ordered again."""
    data = read_for(recipe, skip_bad)
    size = data.image_size or clip.image_size
    concepts, parts, numbers_of = open_adaptation(data, clip, size)
    pool = [Samples(source, clip, size, f"pretraining[{i}]") for i, source in enumerate(data.pool())]
    if not pool and recipe.mixture.pretraining:
        print(f"{data.path}: no pretraining pool; its share goes to the other pools", file=sys.stderr)
    if record is None:
        seed = recipe.seed if recipe.stream.seed is None else recipe.stream.seed
        stream = make_stream(concepts, Context(recipe.stream, seed, data, lambda: clip, parts, pool))
    else:
        compare_sources(record["sources"], parts, data.path)
        stream = recorded_stream(record["updates"], concepts, data.path)
    tests = open_tests(data, clip, size)
    subsets = {test.name: subset(test, recipe.evaluation.subset, recipe.seed) for test in tests}
    validation = open_validation(data, clip, size) if recipe.chooses else []
    adaptation = Collection(list(parts.values()))
    return Pools(stream, adaptation, list(parts), numbers_of, Collection(pool), tests, subsets, validation)


def open_adaptation(
    data: DataFile, clip: Clip, size: int
) -> tuple[list[Concept], dict[str, Samples], dict[tuple[str, int], np.ndarray]]:
    """-> the concepts, the training split of each dataset, and each concept's sample numbers among all of them."""
    concepts, parts, numbers_of, start = [], {}, {}, 0
    for name, entry in data.adaptation.items():
        source = entry.open("train")
        if source is None:
            continue
        parts[name] = Samples(source, clip, size, name)
        usable = by_label(source.labels, np.flatnonzero(parts[name].described()))
        for label, title in enumerate(source.classes) if source.classes else [(-1, name)]:
            if label in usable:
                concepts.append(Concept(name, label, title, source.prompts[0]))
                numbers_of[name, label] = start + usable[label]
        start += len(parts[name])
    if not concepts:
        raise UserError(f"{data.path}: adaptation: no training pictures, there is nothing to learn")
    return concepts, parts, numbers_of


def fingerprint(samples: Samples) -> dict:
    """Of the pictures and their labels; the pixels themselves have a cache with a name of its own."""
    return {"pictures": len(samples), "labels": hashlib.sha256(samples.labels.tobytes()).hexdigest()[:16]}


def compare_sources(then: dict, now: dict[str, Samples], file: Path) -> None:
    """A run goes on only with what it learned from: its buffer is drawn from the sources by number."""
    for name, known in then.items():
        if name not in now:
            raise UserError(f"{file}: adaptation.{name}: missing, and this run has learned from it")
        found = fingerprint(now[name])
        if found != known:
            counts = f"pictures: {known['pictures']} then, {found['pictures']} now"
            changed = "its pictures or labels changed since this run began"
            advice = "restore it, and give new pictures a set of their own"
            raise UserError(f"{file}: adaptation.{name}: {changed} ({counts}); {advice}")


def recorded_stream(updates: list[list], concepts: list[Concept], file: Path) -> list[list[Concept]]:
    """The concepts of a recorded stream; a UserError names those that the data no longer have."""
    known = {(c.dataset, c.label, c.name): c for c in concepts}
    missing = [
        f"{d} {name!r}" for update in updates for d, label, name in update if (d, label, name) not in known
    ]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{file}: concepts that this run has learned are gone ({len(missing)}): {some}")
    return [[known[tuple(c)] for c in update] for update in updates]
