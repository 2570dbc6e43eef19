"""The paper's six orders of a stream, each a function of the concepts and what may be asked about them.

Every order starts from the concepts shuffled by the seed, and sorts that stably, so ties are broken by the seed.
Random, dataset, time and frequency need no model.

n concepts, D embedding width.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fomo.clip import Clip
from fomo.datasets.datafile import DataFile
from fomo.datasets.features import image_features, text_features
from fomo.datasets.samples import Samples
from fomo.datasets.sources.base import Source
from fomo.datasets.stream import SEPARATOR, Concept, chunks_of, cut, folders_of, match, plain
from fomo.errors import UserError
from fomo.progress import Progress
from fomo.recipe import Stream
from fomo.schema import NotNegative, convert
from fomo.text import plural

STARTS = 64  # nearest-neighbour paths that are tried; the paper tries all n
PAIRS, OTHERS = 50, 50  # pairs of a concept, and of the pretraining pool among them (paper, section 3.3)
POOLED = 5000  # pretraining pairs that are encoded once; each concept is compared with some of them


@dataclass
class Context:
    """What an order may ask. The model, and pictures that are not opened yet, are opened when asked for."""

    how: Stream
    seed: int
    data: DataFile
    load: Callable[[], Clip]  # the model that performance and similarity ask, on its device
    opened: dict[str, Samples] = field(default_factory=dict)  # training splits by dataset
    pool: list[Samples] | None = None  # the pretraining pool, if it is open

    @cached_property
    def clip(self) -> Clip:
        clip = self.load()
        clip.model.eval()
        return clip

    @property
    def device(self) -> torch.device:
        return next(self.clip.model.parameters()).device

    def period_of(self, concept: Concept) -> str:
        return self.data.adaptation[concept.dataset].spec["period"]

    def samples(self, name: str) -> Samples:
        """The training split of a dataset."""
        if name not in self.opened:
            self.opened[name] = self.open(self.data.adaptation[name].open("train"), name)
        return self.opened[name]

    def pretraining(self) -> list[Samples]:
        if self.pool is None:
            self.pool = [self.open(source, f"pretraining[{i}]") for i, source in enumerate(self.data.pool())]
        return self.pool

    def open(self, source: Source, name: str) -> Samples:
        return Samples(source, self.clip, self.data.image_size or self.clip.image_size, name)


def make_stream(concepts: list[Concept], context: Context) -> list[list[Concept]]:
    """All concepts in the order of the recipe, cut into its updates."""
    how, ordered = context.how, order_concepts(concepts, context)
    if how.every:
        return chunks_of(ordered, how.updates, "period", context.period_of)
    return cut(ordered, how.updates, how.per_dataset)


def order_concepts(concepts: list[Concept], context: Context) -> list[Concept]:
    how = context.how
    if how.file:
        ordered = match(how.file, concepts, context.data, how.partial)
    else:
        permutation = np.random.default_rng([context.seed, 0x57EA]).permutation(len(concepts))
        ordered = ORDERS[how.order]([concepts[i] for i in permutation], context)
    return ordered[::-1] if how.reverse else ordered


def ascending(concepts: list[Concept], keys: Iterable) -> list[Concept]:
    keyed = list(zip(concepts, keys, strict=True))
    return [concept for concept, _ in sorted(keyed, key=lambda pair: pair[1])]


def by_dataset(concepts: list[Concept], context: Context) -> list[Concept]:
    """Whole datasets one after the other, they and their classes in random order."""
    rank = {name: i for i, name in enumerate(shuffled_sets(concepts, context.seed))}
    return ascending(concepts, (rank[c.dataset] for c in concepts))


def shuffled_sets(concepts: list[Concept], seed: int) -> list[str]:
    names = sorted({c.dataset for c in concepts})
    return [names[i] for i in np.random.default_rng([seed, 0xDA7A]).permutation(len(names))]


def by_time(concepts: list[Concept], context: Context) -> list[Concept]:
    """Old datasets first. Those of one year are shuffled together, or with `stream.whole` kept apart.

    With `stream.every` by their periods.
    """
    if context.how.every:
        return ascending(concepts, map(context.period_of, concepts))
    names = [name for name in context.data.adaptation if any(c.dataset == name for c in concepts)]
    years = {name: context.data.adaptation[name].spec.get("year") for name in names}
    undated = [name for name in names if years[name] is None]
    if undated:
        after = " and come last" if len(undated) < len(names) else ""
        note = f"no year, so they keep the order of the file{after}: {', '.join(undated)}"
        print(f"{context.data.path}: stream.order time: {note}", file=sys.stderr)
    when = {name: (0, year, "") for name, year in years.items() if year is not None}
    when |= {name: (1, i, "") for i, name in enumerate(undated)}
    if context.how.whole:
        rank = {name: i for i, name in enumerate(shuffled_sets(concepts, context.seed))}
        when = {name: (*key[:2], rank[name]) for name, key in when.items()}
    return ascending(concepts, (when[c.dataset] for c in concepts))


def by_frequency(concepts: list[Concept], context: Context) -> list[Concept]:
    """Rare class names first: by a file of counts, or by the captions of the pretraining pool."""
    if context.how.counts:
        return ascending(concepts, counts_from(context.how.counts, concepts, context.data))
    pool = context.data.pool()
    if not pool:
        problem = "the data file has no pretraining pool to count class names in"
        raise UserError(f"{context.data.path}: stream.order frequency: {problem}; give stream.counts: FILE")
    captions = (text for source in pool for i in range(len(source)) for text in source.captions(i))
    return ascending(concepts, count_names([c.name for c in concepts], captions))


def count_names(names: list[str], captions: Iterable[str]) -> list[int]:
    """How many captions hold each name, as whole words in this order."""
    wanted = [tuple(words(name)) for name in names]
    counts = dict.fromkeys(wanted, 0)
    lengths: dict[str, set[int]] = {}  # first word of a name -> lengths of such names
    for name in counts:
        if name:
            lengths.setdefault(name[0], set()).add(len(name))
    for caption in captions:
        text = words(caption)
        starts = ((i, n) for i, word in enumerate(text) if word in lengths for n in lengths[word])
        for name in {tuple(text[i : i + n]) for i, n in starts} & counts.keys():
            counts[name] += 1
    return [counts[name] if name else 0 for name in wanted]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", plain(text))


def counts_from(path: str, concepts: list[Concept], data: DataFile) -> list[float]:
    """Counts by `FOLDER+++class name` or by class name; a name that the file lacks counts 0, with a note."""
    counts, folders = read_counts(path), folders_of(data)
    keys = [(plain(f"{folders[c.dataset]}{SEPARATOR}{c.name}"), plain(c.name)) for c in concepts]
    absent = [c.name for c, both in zip(concepts, keys, strict=True) if not counts.keys() & both]
    if len(absent) == len(concepts):
        raise UserError(
            f"{path}: names none of the {plural(len(concepts), 'concept')} of {data.path}, as {absent[0]!r}"
        )
    if absent:
        some = ", ".join(sorted(absent)[:5]) + ", ..." * (len(absent) > 5)
        missing = plural(len(absent), "class name is", "class names are")
        print(f"{path}: {missing} not in it and count 0: {some}", file=sys.stderr)
    return [counts.get(full, counts.get(name, 0)) for full, name in keys]


def read_counts(path: str) -> dict[str, float]:
    """Counts by name: a JSON object, or a .csv or .tsv of two columns, which may begin with `name,count`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix == ".json":
            content = json.loads(text)
            rows = list(content.items()) if isinstance(content, dict) else [[content]]
        else:
            rows = list(csv.reader(text.splitlines(), delimiter="\t" if Path(path).suffix == ".tsv" else ","))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a readable file of counts: {error}") from None
    if rows and len(rows[0]) == 2 and rows[0][1] == "count":
        rows = rows[1:]
    counts = {}
    for i, row in enumerate(rows, 1):
        try:
            name, count = row
            counts[plain(name)] = convert(count, NotNegative, "count")
        except (
            ValueError,
            AttributeError,
        ):  # not two columns, no number (a FieldError), a name that is no text
            problem = f"expected a class name and a count of 0 or more, got {row!r}"
            raise UserError(f"{path}: entry {i}: {problem}") from None
    return counts


def by_similarity(concepts: list[Concept], context: Context) -> list[Concept]:
    """Neighbours in the stream are neighbours in meaning, by the model's text features of the prompts."""
    texts = [c.prompt.replace("{}", c.name) for c in concepts]
    features = text_features(context.clip, context.clip.tokenize(texts), context.device)
    return [concepts[i] for i in lightest_path(features.cpu().numpy(), STARTS, context.seed)]


def lightest_path(features: np.ndarray, starts: int, seed: int) -> np.ndarray:
    """The lightest of several greedy nearest-neighbour paths through (n, D) unit vectors, as n positions.

    The weight of a path is the sum of its cosine distances. Memory: 4 n^2 bytes; 1.35 GB for 18,381.
    """
    n = len(features)
    similarity = features @ features.T  # (n, n)
    best, closest = None, -math.inf
    for start in np.random.default_rng([seed, 0x9A7B]).permutation(n)[:starts]:
        path, closeness = nearest_path(similarity, int(start))
        if closeness > closest:
            best, closest = path, closeness
    return best


def nearest_path(similarity: np.ndarray, start: int) -> tuple[np.ndarray, float]:
    """From `start` always to the nearest that is left; -> the positions and the sum of the similarities."""
    n = len(similarity)
    visited = np.zeros(n, np.float32)  # 0, or minus infinity where the path has been
    row, path, total = np.empty(n, np.float32), np.empty(n, np.int64), 0.0
    path[0], visited[start] = start, -np.inf
    for place in range(1, n):
        np.add(similarity[path[place - 1]], visited, out=row)
        nearest = row.argmax()
        total += row[nearest]
        path[place], visited[nearest] = nearest, -np.inf
    return path, float(total)


def by_performance(concepts: list[Concept], context: Context) -> list[Concept]:
    """Easy first: by the mean contrastive loss of a concept's pairs among pretraining pairs."""
    return ascending(concepts, concept_losses(concepts, context))


def concept_losses(concepts: list[Concept], context: Context) -> list[float]:
    """Each concept's loss: PAIRS of its own among OTHERS of the pool's (without a pool: of all concepts')."""
    rng = np.random.default_rng([context.seed, 0x9E2F])
    names = sorted({c.dataset for c in concepts})
    pool = context.pretraining()
    if not pool:
        note = "stream.order performance: no pretraining pool, concepts are mixed with each other"
        print(f"{context.data.path}: {note}", file=sys.stderr)
        pool = [context.samples(name) for name in names]
    mixed = pool_features(context, pool, rng)
    losses: dict[tuple[str, int], float] = {}
    for name in Progress(names, desc="performance", unit="dataset", leave=False):
        samples = context.samples(name)
        usable = np.flatnonzero(samples.complete())
        for label in sorted(c.label for c in concepts if c.dataset == name):
            own = rng.permutation(usable[samples.labels[usable] == label])[:PAIRS]
            others = torch.from_numpy(rng.permutation(len(mixed[0]))[:OTHERS]).to(context.device)
            among = tuple(features[others] for features in mixed)
            scale = context.clip.model.logit_scale.exp().item()
            losses[name, label] = loss_among(pair_features(context, samples, own), among, scale)
    return [losses[c.dataset, c.label] for c in concepts]


def pool_features(context: Context, pool: list[Samples], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(k, D) image and text features of at most POOLED pairs, spread over the pool's sources by their sizes."""
    usable = [np.flatnonzero(part.complete()) for part in pool]
    total = sum(map(len, usable))
    parts = []
    for samples, numbers in zip(pool, usable, strict=True):
        share = min(len(numbers), math.ceil(POOLED * len(numbers) / max(total, 1)))
        if share:
            parts.append(pair_features(context, samples, rng.permutation(numbers)[:share]))
    return tuple(torch.cat(kind) for kind in zip(*parts, strict=True))


def pair_features(context: Context, samples: Samples, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
    """(k, D) image and text features of some samples, on the unit sphere; the first caption of each."""
    images = image_features(context.clip, samples, numbers, context.device, lambda n: None)
    captions = [samples.caption(int(i), 0.0) for i in numbers]
    return images, text_features(context.clip, captions, context.device)


def loss_among(own: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], scale: float) -> float:
    """Mean over the own pairs of the symmetric contrastive loss among all pairs; each (k, D) images, texts."""
    images, texts = (torch.cat(both) for both in zip(own, others, strict=True))  # (own + others, D)
    logits, count = scale * images @ texts.T, len(own[0])
    right = torch.arange(count, device=logits.device)
    both = F.cross_entropy(logits[:count], right) + F.cross_entropy(logits.T[:count], right)
    return both.item() / 2


ORDERS: dict[str, Callable[[list[Concept], Context], list[Concept]]] = {
    "random": lambda concepts, context: concepts,  # they are shuffled already
    "frequency": by_frequency,
    "performance": by_performance,
    "similarity": by_similarity,
    "time": by_time,
    "dataset": by_dataset,
}
