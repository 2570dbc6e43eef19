"""What is scored: the test splits of a data file, and the subsets of them that a run scores on its way."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fomo.clip import Clip
from fomo.datasets import datafile
from fomo.datasets.datafile import DataFile
from fomo.datasets.samples import Samples, by_label
from fomo.datasets.sources.base import Source
from fomo.errors import UserError

NAMED = 10_000  # pictures of a set up to which it is told of each what it is taken for

RETENTION = Path(__file__).resolve().parents[2] / "recipes/data/retention.yaml"


@dataclass
class TestSet:
    name: str
    role: str  # "adaptation" or "evaluation"
    task: str  # "classification" or "retrieval"
    samples: Samples
    usable: np.ndarray  # (N,) numbers of the samples that can be scored
    prompts: list[list[np.ndarray]]  # per template, the token ids of each of the C classes
    classes: list[str] = field(default_factory=list)  # the C names; the set's own if it is scored as a whole
    content: str = ""  # a hash of what a score of it is a score of
    source: Source | None = None  # of a set to learn that has classes and at most NAMED pictures


def open_tests(data: DataFile, clip: Clip, size: int, split: str = "test") -> list[TestSet]:
    """All test splits of a data file, or those for validation."""
    tests = []
    for entry in [*data.adaptation.values(), *data.evaluation.values()]:
        source = entry.open(split)
        if source is None or (split == "validation" and not len(source)):
            continue
        if entry.task == "classification" and not source.classes:
            raise UserError(f"{data.path}: {entry.role}.{entry.name}: no class labels, say `task: retrieval`")
        samples = Samples(source, clip, size, f"{entry.name} ({split})")
        usable = samples.pixels.shapes[:, 0] > 0
        usable &= (
            source.labels >= 0 if entry.task == "classification" else np.diff(samples.captions.offsets) > 0
        )
        if not usable.any():
            lacking = "a class label" if entry.task == "classification" else "a caption"
            raise UserError(
                f"{data.path}: {entry.role}.{entry.name}: no readable {split} picture has {lacking}"
            )
        templates = source.prompts if entry.task == "classification" else ()
        prompts = [clip.tokenize([t.replace("{}", name) for name in source.classes]) for t in templates]
        classes = source.classes if entry.task == "classification" else [entry.name]
        kept = np.flatnonzero(usable)
        content = content_hash(source, entry.task, kept)
        told = (entry.role, entry.task) == ("adaptation", "classification") and len(kept) <= NAMED
        test = TestSet(entry.name, entry.role, entry.task, samples, kept, prompts, classes, content)
        tests.append(replace(test, source=source if told else None))
    return tests


def described(tests: list[TestSet], subsets: dict[str, np.ndarray]) -> dict[str, dict]:
    """What run.json says of each set. tested: how many samples are scored of each class, of retrieval in all."""
    fields = {"roles": "role", "classes": "classes", "contents": "content", "tasks": "task"}
    tested = {}
    for test in tests:
        numbers = subsets[test.name]
        tested[test.name] = [len(numbers)]
        if test.task == "classification":
            labels = test.samples.labels[numbers]
            tested[test.name] = np.bincount(labels, minlength=len(test.classes)).tolist()
    found = {key: {test.name: getattr(test, field) for test in tests} for key, field in fields.items()}
    return {**found, "tested": tested}


def open_validation(data: DataFile, clip: Clip, size: int) -> list[TestSet]:
    """What is chosen on. Sets that must be kept are needed: without any, rendered pictures stand for them."""
    found = open_tests(data, clip, size, "validation")
    if not any(test.role == "adaptation" for test in found):
        raise UserError(
            f"{data.path}: adaptation: too few pictures to choose on: say method.keep and a budget"
        )
    if not any(test.role == "evaluation" for test in found):
        found += open_tests(datafile.read(RETENTION), clip, size)
    return found


def to_choose_on(tests: list[TestSet]) -> int:
    """Validation pictures of what is to be learned."""
    return sum(len(test.usable) for test in tests if test.role == "adaptation")


def content_hash(source: Source, task: str, numbers: np.ndarray) -> str:
    """Tells test sets of one name apart, wherever they lie: by pictures' names and lengths, labels and prompts."""
    digest = hashlib.sha256(json.dumps([task, source.classes, source.prompts]).encode())
    digest.update(source.labels[numbers].tobytes())
    sizes = source.byte_sizes()
    for index in numbers.tolist():
        picture = f"{source.id_of(index)} {'' if sizes is None else sizes[index]}\n"
        digest.update(picture.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


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
    for own in by_label(labels, shuffled).values():
        rank[own] = np.arange(len(own))
    balanced = shuffled[rank[shuffled] < wanted // classes]
    rest = shuffled[rank[shuffled] >= wanted // classes]
    return np.sort(numbers[np.concatenate([balanced, rest])[:wanted]])
