"""The data of a life: the stream of concepts, the pools to draw from, the sets to score."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomo.clip import Clip
from fomo.datasets import datafile
from fomo.datasets.eval_sets import TestSet, open_tests, subset
from fomo.datasets.mixture import Batches, Pool, pool_of, reservoir, sub_batches
from fomo.datasets.orders import Context, make_stream
from fomo.datasets.samples import Collection, Samples, by_label
from fomo.datasets.stream import Concept
from fomo.errors import UserError
from fomo.recipe import Recipe


@dataclass
class Material:
    stream: list[list[Concept]]  # T updates
    adaptation: Collection
    names: list[str]  # of the parts of `adaptation`
    concept_numbers: dict[tuple[str, int], np.ndarray]  # (dataset, label) -> sample numbers
    pretraining: Collection
    tests: list[TestSet]
    subsets: dict[str, np.ndarray]

    def life(self) -> dict:
        """What a run must find again when it goes on: its stream as plain lists, and what its sources held."""
        updates = [[[c.dataset, c.label, c.name] for c in concepts] for concepts in self.stream]
        parts = zip(self.names, self.adaptation.parts, strict=True)
        return {"sources": {name: fingerprint(part) for name, part in parts}, "updates": updates}

    def numbers(self, updates: list[list[Concept]]) -> np.ndarray:
        """The samples of all concepts of some updates."""
        found = [self.concept_numbers[c.dataset, c.label] for concepts in updates for c in concepts]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def by_dataset(self, numbers: np.ndarray) -> list[tuple[str, Samples, np.ndarray]]:
        """The name, the samples and the own numbers of each dataset among `numbers`; those with classes."""
        starts, found = self.adaptation.offsets, []
        for part, name in enumerate(self.names):
            samples = self.adaptation.parts[part]
            own = numbers[(numbers >= starts[part]) & (numbers < starts[part + 1])] - starts[part]
            own = own[samples.pixels.shapes[own, 0] > 0]  # those that can be read
            if len(own) and (samples.labels[own] >= 0).all():
                found.append((name, samples, own))
        return found


def open_material(recipe: Recipe, clip: Clip, life: dict | None = None) -> Material:
    """`life`: of a run that has begun, as `Material.life` gave it; its stream is not ordered again."""
    data = datafile.read(recipe.data)
    size = data.image_size or clip.image_size
    concepts, parts, numbers, by_name = [], [], {}, {}
    start = 0
    for name, entry in data.adaptation.items():
        source = entry.open("train")
        if source is None:
            continue
        samples = Samples(source, clip, size, name)
        parts.append(samples)
        by_name[name] = samples
        usable = by_label(source.labels, np.flatnonzero(samples.described()))
        for label, title in enumerate(source.classes) if source.classes else [(-1, name)]:
            if label in usable:
                concepts.append(Concept(name, label, title, source.prompts[0]))
                numbers[name, label] = start + usable[label]
        start += len(samples)
    if not concepts:
        raise UserError(f"{data.path}: adaptation: no training pictures, there is nothing to learn")
    pool = [Samples(source, clip, size, f"pretraining[{i}]") for i, source in enumerate(data.pool())]
    if not pool and recipe.mixture.pretraining:
        print(f"{data.path}: no pretraining pool; its share goes to the other pools", file=sys.stderr)
    if life is None:
        seed = recipe.seed if recipe.stream.seed is None else recipe.stream.seed
        stream = make_stream(concepts, Context(recipe.stream, seed, data, lambda: clip, by_name, pool))
    else:
        compare_sources(life["sources"], by_name, data.path)
        stream = found_again(life["updates"], concepts, data.path)
    tests = open_tests(data, clip, size)
    subsets = {test.name: subset(test, recipe.evaluation.subset, recipe.seed) for test in tests}
    return Material(stream, Collection(parts), list(by_name), numbers, Collection(pool), tests, subsets)


def fingerprint(samples: Samples) -> dict:
    """Of the pictures and their labels; the pixels themselves have a cache with a name of its own."""
    return {"pictures": len(samples), "labels": hashlib.sha256(samples.labels.tobytes()).hexdigest()[:16]}


def compare_sources(then: dict, now: dict[str, Samples], where: Path) -> None:
    """A life goes on only with what it learned from: its buffer is drawn from the sources by number."""
    for name, known in then.items():
        if name not in now:
            raise UserError(f"{where}: adaptation.{name}: missing, and this life has learned from it")
        found = fingerprint(now[name])
        if found != known:
            counts = f"{known['pictures']} pictures then, {found['pictures']} now"
            changed = "its pictures or labels changed since this life began"
            advice = "restore it, and give new pictures a set of their own"
            raise UserError(f"{where}: adaptation.{name}: {changed} ({counts}); {advice}")


def found_again(lived: list[list], concepts: list[Concept], where: Path) -> list[list[Concept]]:
    known = {(c.dataset, c.label, c.name): c for c in concepts}
    missing = [
        f"{dataset} {name!r}"
        for c in lived
        for dataset, label, name in c
        if (dataset, label, name) not in known
    ]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{where}: {len(missing)} concepts that this life has learned are gone: {some}")
    return [[known[tuple(c)] for c in update] for update in lived]


def batches_of(material: Material, recipe: Recipe, update: int, steps: int) -> Batches:
    """The batches of one update (from 0)."""
    new, seen = material.stream[update : update + 1], material.stream[:update]
    kept = reservoir(material.numbers(seen), recipe.mixture.limit, recipe.seed)
    pools = {
        "pretraining": pool_of(material.pretraining, (recipe.seed, update, 0)),
        "update": Pool(material.adaptation, material.numbers(new), (recipe.seed, update, 1)),
        "buffer": Pool(material.adaptation, kept, (recipe.seed, update, 2)),
    }
    empty = frozenset(name for name, pool in pools.items() if not len(pool)) - {"update"}
    counts = sub_batches(recipe.optimizer.batch_size, recipe.mixture, empty)
    return Batches([(name, pools[name], counts[name]) for name in pools], recipe.seed, update, steps)
