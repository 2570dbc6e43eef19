"""Evaluation: zero-shot classification and retrieval; knowledge accumulation (KA), zero-shot retention (ZS), GM.

KA is the mean score over the adaptation sets, ZS over the held-out sets, GM their geometric mean, in percent
(paper, section 4). N pictures, C classes, D embedding width.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fomo.clip import Clip, encode_text
from fomo.datasets.crops import central_crops, crop
from fomo.datasets.datafile import DataFile
from fomo.datasets.samples import Samples, canvas_of, padded
from fomo.errors import UserError

IMAGES, TEXTS = 256, 512  # per forward pass
RECALL_AT = 5


@dataclass
class TestSet:
    name: str
    role: str  # "adaptation" or "evaluation"
    task: str  # "classification" or "retrieval"
    samples: Samples
    usable: np.ndarray  # (N,) numbers of the samples that can be scored
    prompts: list[list[np.ndarray]]  # per template, the token ids of each of the C classes


@dataclass(frozen=True)
class Score:
    metric: str
    score: float  # percent
    n: int  # pictures
    stderr: float  # percent, of sampling the pictures


def open_tests(data: DataFile, clip: Clip, size: int) -> list[TestSet]:
    """All test splits of a data file."""
    tests = []
    for entry in [*data.adaptation.values(), *data.evaluation.values()]:
        source = entry.open("test")
        if source is None:
            continue
        if entry.task == "classification" and not source.classes:
            raise UserError(f"{data.path}: {entry.role}.{entry.name}: no class labels, say `task: retrieval`")
        samples = Samples(source, clip, size, f"{entry.name} (test)")
        usable = samples.pixels.shapes[:, 0] > 0
        usable &= (
            source.labels >= 0 if entry.task == "classification" else np.diff(samples.captions.offsets) > 0
        )
        if not usable.any():
            lacking = "a class label" if entry.task == "classification" else "a caption"
            raise UserError(f"{data.path}: {entry.role}.{entry.name}: no readable test picture has {lacking}")
        templates = source.prompts if entry.task == "classification" else ()
        prompts = [clip.tokenize([t.replace("{}", name) for name in source.classes]) for t in templates]
        tests.append(TestSet(entry.name, entry.role, entry.task, samples, np.flatnonzero(usable), prompts))
    return tests


def subset(test: TestSet, share: float, seed: int) -> np.ndarray:
    """The samples scored during a run: max(2 per class, 300, share of the set), class-balanced first.

    Drawn once from (seed, dataset) and never from an earlier subset: the released code shrinks its test sets.
    """
    numbers = test.usable
    labels = test.samples.labels[numbers]
    classes = len(np.unique(labels))
    wanted = max(2 * classes, 300, round(share * len(numbers)))
    if wanted >= len(numbers) or share == 1:
        return numbers
    rng = np.random.default_rng([seed, *test.name.encode()])
    shuffled = rng.permutation(len(numbers))
    rank = np.empty(len(numbers), dtype=np.int64)  # how many of the same class come before
    for label in np.unique(labels):
        own = shuffled[labels[shuffled] == label]
        rank[own] = np.arange(len(own))
    balanced = shuffled[rank[shuffled] < wanted // classes]
    rest = shuffled[rank[shuffled] >= wanted // classes]
    return np.sort(numbers[np.concatenate([balanced, rest])[:wanted]])


@torch.no_grad()
def image_features(
    clip: Clip, samples: Samples, numbers: np.ndarray, device: torch.device, tick: Callable
) -> Tensor:
    """(N, D) on the unit sphere."""
    out = []
    for start in range(0, len(numbers), IMAGES):
        chunk = numbers[start : start + IMAGES]
        canvas, shapes = canvas_of([samples.pixels[int(i)] for i in chunk])
        boxes = torch.from_numpy(central_crops(shapes[:, 0].astype(float), shapes[:, 1].astype(float)))
        images = crop(canvas.to(device), boxes.to(device), clip.image_size, clip.mean, clip.std)
        out.append(F.normalize(clip.model.encode_image(images).float(), dim=-1))
        tick(len(chunk))
    return torch.cat(out)


@torch.no_grad()
def text_features(clip: Clip, rows: list[np.ndarray], device: torch.device) -> Tensor:
    """(N, D) on the unit sphere, in large batches of similar length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = None
    for start in range(0, len(rows), TEXTS):
        chunk = order[start : start + TEXTS]
        features = encode_text(clip.model, padded([rows[i] for i in chunk]).to(device))
        features = F.normalize(features.float(), dim=-1)
        if out is None:
            out = torch.empty(len(rows), features.shape[1], device=device)
        out[torch.tensor(chunk, device=device)] = features
    return out


@torch.no_grad()
def class_features(clip: Clip, prompts: list[list[np.ndarray]], device: torch.device) -> Tensor:
    """(C, D): one prompt, or the normalised mean over templates."""
    rows = [row for template in prompts for row in template]
    features = text_features(clip, rows, device).view(len(prompts), len(prompts[0]), -1)
    return F.normalize(features.mean(0), dim=-1)


def accuracy(images: Tensor, classes: Tensor, labels: Tensor) -> Score:
    """Top-1 over the full label space."""
    return proportion("accuracy", (images @ classes.T).argmax(-1) == labels)


def recall(images: Tensor, texts: Tensor, owner: Tensor, k: int = RECALL_AT) -> Score:
    """Mean of text-to-image and image-to-text recall@k. owner (number of texts,): the picture of each text.

    T2I: share of texts whose picture is among the k nearest; I2T: share of pictures with an own text among them.
    """
    similarity = texts @ images.T  # (texts, N)
    nearest = similarity.topk(min(k, len(images)), dim=1).indices
    t2i = (nearest == owner[:, None]).any(1)
    nearest = similarity.T.topk(min(k, len(texts)), dim=1).indices  # (N, k)
    i2t = (owner[nearest] == torch.arange(len(images), device=owner.device)[:, None]).any(1)
    one, two = proportion("", t2i), proportion("", i2t)
    mean, stderr = (one.score + two.score) / 2, math.hypot(one.stderr, two.stderr) / 2
    return Score(f"recall@{k}", mean, len(images), stderr)


def proportion(metric: str, hits: Tensor) -> Score:
    n, p = len(hits), hits.double().mean().item()
    return Score(metric, 100 * p, n, 100 * math.sqrt(p * (1 - p) / n))


def score_test(
    clip: Clip, test: TestSet, parts: list[np.ndarray], device: torch.device, tick: Callable
) -> list[Score]:
    """Scores on each of `parts` (sample numbers, each contained in the first) from one pass over the pictures."""
    numbers = parts[0]
    images = image_features(clip, test.samples, numbers, device, tick)
    places = [torch.from_numpy(np.searchsorted(numbers, part)).to(device) for part in parts]
    if test.task == "classification":
        classes = class_features(clip, test.prompts, device)
        labels = torch.from_numpy(test.samples.labels[numbers]).to(device)
        return [accuracy(images[place], classes, labels[place]) for place in places]
    counts = np.diff(test.samples.captions.offsets)[numbers]
    owner = torch.from_numpy(np.repeat(np.arange(len(numbers)), counts)).to(device)
    captions = [test.samples.tokens[t] for i in numbers for t in test.samples.captions[int(i)]]
    texts = text_features(clip, captions, device)
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
) -> tuple[dict, dict | None]:
    """-> the metrics on the subsets and, if asked for and different, on the whole sets."""
    clip.model.eval()
    on_subset, on_full = {}, {}
    for test in tests:
        part = subsets[test.name]
        parts = [test.usable, part] if full else [part]
        scores = score_test(clip, test, parts, device, tick)
        on_full[test.name], on_subset[test.name] = scores[0], scores[-1]
    different = any(len(subsets[test.name]) < len(test.usable) for test in tests)
    return summarise(tests, on_subset), summarise(tests, on_full) if full and different else None


def summarise(tests: list[TestSet], scores: dict[str, Score]) -> dict:
    """KA, ZS, GM (None where there is no set to average) and the scores by dataset."""
    means = {}
    for key, role in (("ka", "adaptation"), ("zs", "evaluation")):
        values = [scores[test.name].score for test in tests if test.role == role]
        means[key] = sum(values) / len(values) if values else None
    both = means["ka"] is not None and means["zs"] is not None
    means["gm"] = math.sqrt(means["ka"] * means["zs"]) if both else None
    return {**means, "datasets": scores}


def as_metrics(scores: dict) -> dict:
    """The scores as a line of metrics.jsonl has them: plain numbers in percent."""
    by_dataset = {
        "datasets": {name: score.score for name, score in scores["datasets"].items()},
        "stderr": {name: score.stderr for name, score in scores["datasets"].items()},
    }
    return {**scores, **by_dataset}


def table(scores: dict, as_json: bool = False) -> str:
    """The scores as text for people, or as one JSON document."""
    rows = {name: vars(score) for name, score in scores["datasets"].items()}
    means = {key: scores[key] for key in ("ka", "zs", "gm")}
    if as_json:
        return json.dumps({**means, "datasets": rows}, indent=1)
    lines = [
        f"{n:30} {r['metric']:10} {r['score']:6.2f} +- {r['stderr']:.2f}  n={r['n']}" for n, r in rows.items()
    ]
    shown = [f"{key.upper()} {value:.2f}" for key, value in means.items() if value is not None]
    return "\n".join([*lines, "  ".join(shown)])
