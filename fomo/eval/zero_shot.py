"""Evaluation: zero-shot classification and retrieval; knowledge accumulation (KA), zero-shot retention (ZS), GM.

KA is the mean score over the adaptation sets, ZS over the held-out sets, GM their geometric mean, in percent
(paper, section 4). Beside the means over datasets stand those over concepts: every class of every set has the same
weight, and a retrieval set is one concept. Drift needs no labels: how far the image features have moved.

    classification   accuracy (the score), top5, mean_per_class_recall
    retrieval        t2i@k: share of texts whose picture is among the k nearest, i2t@k: share of pictures with an
                     own text among them, recall@k: their mean, for k = 1, 5, 10; recall@5 is the score

N pictures, C classes, D embedding width.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fomo.clip import Clip
from fomo.datasets import datafile
from fomo.datasets.eval_sets import TestSet, open_tests
from fomo.datasets.features import image_features, text_features
from fomo.datasets.samples import Collection
from fomo.distributed import ALONE, Ranks
from fomo.eval.meaning import RECALL_AT, meaning, near_chance
from fomo.progress import Progress

COMPARED = 4096  # pictures that are compared with all classes at a time
TOP = 5
RANKS = (1, 5, 10)
SHOWN = ("top5", "mean_per_class_recall", "recall@1", "recall@10")  # to people, beside the score
DRIFT_PICTURES = 512


@dataclass(frozen=True)
class Score:
    metric: str
    score: float  # percent
    n: int  # pictures
    stderr: float  # percent, of sampling the pictures
    details: dict[str, float] = field(default_factory=dict)  # percent, by name
    by_class: list[float | None] = field(default_factory=list)  # None: no picture; retrieval: one
    # the class that each picture is taken for, by number; retrieval: none
    predicted: list[int] = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True)
class Scores:
    """Of all test sets. None where there is no set to average."""

    ka: float | None  # mean over the adaptation sets, percent
    zs: float | None  # mean over the held-out sets
    gm: float | None  # geometric mean of both
    concept_means: dict[str, float | None]  # "ka" and "zs" as means over concepts
    datasets: dict[str, Score]
    announced: list[str] = field(default_factory=list)  # what KA and ZS are of

    @property
    def means(self) -> dict[str, float | None]:
        return {"ka": self.ka, "zs": self.zs, "gm": self.gm}

    def as_metrics(self) -> dict:
        """As a line of metrics.jsonl has them: plain numbers in percent."""
        by_dataset = {
            key: {name: getattr(score, field) for name, score in self.datasets.items()}
            for key, field in (("datasets", "score"), ("stderr", "stderr"), ("details", "details"))
        }
        return {**self.means, "concept_means": self.concept_means, **by_dataset}

    def by_class(self) -> dict[str, list[float | None]]:
        """By dataset, percent of each class, as concepts.jsonl has them; of a retrieval set its score."""
        return {
            name: [None if value is None else round(value, 4) for value in score.by_class]
            for name, score in self.datasets.items()
        }

    def as_json(self) -> str:
        shown = ("metric", "score", "n", "stderr", "details")
        by_dataset = {name: {key: getattr(s, key) for key in shown} for name, s in self.datasets.items()}
        return json.dumps(
            {**self.means, "concept_means": self.concept_means, "datasets": by_dataset}, indent=1
        )

    def as_text(self) -> str:
        lines = list(self.announced)
        for name, s in self.datasets.items():
            more = "".join(f"  {key} {s.details[key]:.2f}" for key in SHOWN if key in s.details)
            lines.append(f"{name:30} {s.metric:10} {s.score:6.2f} +- {s.stderr:.2f}  n={s.n}{more}")
        for values, over in ((self.means, ""), (self.concept_means, "  over concepts instead of datasets")):
            known = [f"{key.upper()} {value:.2f}" for key, value in values.items() if value is not None]
            lines += ["  ".join(known) + over] if known else []
        return "\n".join(lines)


@torch.no_grad()
def class_features(
    clip: Clip, prompts: list[list[np.ndarray]], device: torch.device, ranks: Ranks = ALONE
) -> Tensor:
    """(C, D): one prompt, or the normalised mean over templates."""
    rows = [row for template in prompts for row in template]
    features = text_features(clip, rows, device, ranks).view(len(prompts), len(prompts[0]), -1)
    return F.normalize(features.mean(0), dim=-1)


def accuracy(images: Tensor, classes: Tensor, labels: Tensor) -> Score:
    """Over the full label space; by class, and their mean, for classes that have a picture."""
    predicted, in_top = torch.empty_like(labels), torch.empty_like(labels, dtype=torch.bool)
    for start in range(0, len(images), COMPARED):
        some = slice(start, start + COMPARED)
        similarity = images[some] @ classes.T  # (COMPARED, C)
        predicted[some] = similarity.argmax(-1)
        nearest = similarity.topk(min(TOP, len(classes)), dim=1).indices
        in_top[some] = (nearest == labels[some, None]).any(1)
    hits = predicted == labels
    pictures, found = (torch.bincount(x, minlength=len(classes)).tolist() for x in (labels, labels[hits]))
    by_class = [100 * hit / n if n else None for hit, n in zip(found, pictures, strict=True)]
    details = {f"top{TOP}": percent(in_top), "mean_per_class_recall": mean(by_class)}
    score = proportion("accuracy", hits)
    return replace(score, details=details, by_class=by_class, predicted=predicted.tolist())


def recall(images: Tensor, texts: Tensor, owner: Tensor) -> Score:
    """Of retrieval; owner (number of texts,): the picture of each text."""
    similarity, most = texts @ images.T, max(RANKS)  # (texts, N)
    t2i = similarity.topk(min(most, len(images)), dim=1).indices == owner[:, None]  # (texts, k)
    nearest = similarity.T.topk(min(most, len(texts)), dim=1).indices  # (N, k)
    i2t = owner[nearest] == torch.arange(len(images), device=owner.device)[:, None]
    details = {}
    for k in RANKS:
        one, two = percent(t2i[:, :k].any(1)), percent(i2t[:, :k].any(1))
        details |= {f"t2i@{k}": one, f"i2t@{k}": two, f"recall@{k}": (one + two) / 2}
    metric = f"recall@{RECALL_AT}"
    stderr = recall_error(t2i[:, :RECALL_AT].any(1), i2t[:, :RECALL_AT].any(1), owner)
    return Score(metric, details[metric], len(images), stderr, details, [details[metric]])


def recall_error(t2i: Tensor, i2t: Tensor, owner: Tensor) -> float:
    """Percent, of drawing N pictures with all their texts: what belongs to one picture is no independent draw.

    T2I is a ratio, texts found / texts, so picture i with c_i texts moves the mean of both by its
    ((found_i - T2I c_i) / mean(c) + i2t_i - I2T) / 2N (linearisation, Cochran 1977, section 6.3).
    """
    count = len(i2t)
    texts, found = (torch.bincount(x, minlength=count).double() for x in (owner, owner[t2i]))
    ratio = found.sum() / texts.sum()
    moved = (found - ratio * texts) / texts.mean() + i2t - i2t.double().mean()
    return 50 * (moved.square().mean() / count).sqrt().item()


def mean(values: list[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def proportion(metric: str, hits: Tensor) -> Score:
    n, p = len(hits), hits.double().mean().item()
    return Score(metric, 100 * p, n, 100 * math.sqrt(p * (1 - p) / n))


def score_test(
    clip: Clip,
    test: TestSet,
    parts: list[np.ndarray],
    device: torch.device,
    tick: Callable,
    ranks: Ranks = ALONE,
) -> list[Score]:
    """Scores on each of `parts` (sample numbers, each contained in the first) from one pass over the pictures."""
    numbers = parts[0]
    images = image_features(clip, test.samples, numbers, device, tick, ranks)
    places = [torch.from_numpy(np.searchsorted(numbers, part)).to(device) for part in parts]
    if test.task == "classification":
        classes = class_features(clip, test.prompts, device, ranks)
        labels = torch.from_numpy(test.samples.labels[numbers]).to(device)
        return [accuracy(images[place], classes, labels[place]) for place in places]
    counts = np.diff(test.samples.captions.offsets)[numbers]
    owner = torch.from_numpy(np.repeat(np.arange(len(numbers)), counts)).to(device)
    captions = [test.samples.tokens[t] for i in numbers for t in test.samples.captions[int(i)]]
    texts = text_features(clip, captions, device, ranks)
    scores = []
    for place in places:  # pictures and captions are cut together
        kept = torch.isin(owner, place)
        scores.append(recall(images[place], texts[kept], torch.searchsorted(place, owner[kept])))
    return scores


def evaluate(
    clip: Clip,
    tests: list[TestSet],
    subsets: dict[str, np.ndarray],
    device: torch.device,
    *,
    full: bool = False,
    tick: Callable = lambda n: None,
    ranks: Ranks = ALONE,
) -> tuple[Scores, Scores | None]:
    """-> the scores on the subsets and, if asked for and different, on the whole sets.

    Several ranks share the encoding, and each has all scores.
    """
    clip.model.eval()
    on_subset, on_full = {}, {}
    for test in tests:
        part = subsets[test.name]
        parts = [test.usable, part] if full else [part]
        scores = score_test(clip, test, parts, device, tick, ranks)
        on_full[test.name], on_subset[test.name] = scores[0], scores[-1]
    different = any(len(subsets[test.name]) < len(test.usable) for test in tests)
    return summarise(tests, on_subset), summarise(tests, on_full) if full and different else None


def evaluate_data(clip: Clip, path: str | Path, device: torch.device) -> Scores:
    """The scores of a model, which is moved to `device`, on the whole test sets of a data file."""
    clip.model.to(device)
    data = datafile.read(path)
    tests = open_tests(data, clip, data.image_size or clip.image_size)
    pictures = sum(len(test.usable) for test in tests)
    with Progress(total=pictures, desc="evaluating", unit="img", leave=False) as bar:
        return evaluate(clip, tests, {t.name: t.usable for t in tests}, device, tick=bar.update)[0]


def summarise(tests: list[TestSet], scores: dict[str, Score]) -> Scores:
    """The means over datasets and over concepts of each role."""
    chosen = {
        role: [scores[t.name] for t in tests if t.role == role] for role in ("adaptation", "evaluation")
    }
    ka, zs = (mean([score.score for score in some]) for some in chosen.values())
    by_class = [mean([value for score in some for value in score.by_class]) for some in chosen.values()]
    gm = None if ka is None or zs is None else math.sqrt(ka * zs)
    over_concepts = dict(zip(("ka", "zs"), by_class, strict=True))
    return Scores(ka, zs, gm, over_concepts, scores, announced(tests, {n: s.n for n, s in scores.items()}))


def announced(tests: list[TestSet], pictures: Mapping[str, int]) -> list[str]:
    """What KA and ZS are of, a line each, and warnings where chance is high. pictures: that are scored, by set."""
    lines = []
    for score, role in (("KA", "adaptation"), ("ZS", "evaluation")):
        if sets := [(test.name, test.task, pictures[test.name]) for test in tests if test.role == role]:
            lines += [meaning(score, sets), *(f"warning: {line}" for line in near_chance(sets))]
    return lines


def drift_sample(collection: Collection, seed: int, n: int = DRIFT_PICTURES) -> np.ndarray:
    """Numbers of at most n pictures of the pretraining pool, decided by the seed; those that can be read."""
    rng = np.random.default_rng([seed, 0xD21F])
    drawn = np.sort(rng.choice(len(collection), min(n, len(collection)), replace=False))
    places = [collection.locate(number) for number in drawn.tolist()]
    return drawn[np.array([samples.pixels[index].size > 0 for samples, index in places], bool)]


def drift_features(
    clip: Clip, collection: Collection, numbers: np.ndarray, device: torch.device, ranks: Ranks = ALONE
) -> Tensor:
    """(N, D) on the CPU, of ascending sample numbers of a collection."""
    clip.model.eval()
    owner = np.searchsorted(collection.offsets, numbers, side="right") - 1
    features = []
    for part in np.unique(owner):
        own = numbers[owner == part] - collection.offsets[part]
        features.append(image_features(clip, collection.parts[part], own, device, lambda n: None, ranks))
    return torch.cat(features).cpu()


def drift(original: Tensor, now: Tensor) -> float:
    """Mean cosine between features (N, D) of the same pictures, then and now: 1 where nothing has moved."""
    return F.cosine_similarity(original.double(), now.double(), dim=-1).mean().item()
